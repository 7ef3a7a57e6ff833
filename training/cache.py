"""Latents, decoded pictures and text embeddings of the bundled world, computed once and kept on disk by
content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import images
from controlkit.files import cache_folder, temporary_beside
from controlkit.training.draws import derived_seed
from controlkit.training.world import VERSION, World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

_BATCH = 4  # small batches stay in the processor's cache, where large ones wait for memory
Report = Callable[[str], None]


def cached_latents(world: World, vae: AutoencoderKL, *, report: Report) -> Tensor:
    """Scaled latent means of every scene: float16 (N, 4, S/8, S/8). The spread around them is below the
    rounding of a picture's bytes for the bundled autoencoder, so the mean stands for the distribution.
    """
    vae = vae.to(memory_format=torch.channels_last)

    def encode(rows: range) -> NDArray[np.float16]:
        pixel_values = images.picture_to_tensor([world.picture[i] for i in rows]).to(vae.device)
        pixel_values = pixel_values.to(memory_format=torch.channels_last)
        latents = vae.encode(pixel_values).latent_dist.mean * vae.config.scaling_factor
        return cast("NDArray[np.float16]", latents.cpu().numpy().astype(np.float16))

    weights = [vae.encoder, vae.quant_conv]
    key = _key("latents", VERSION, len(world), vae.config.scaling_factor, _digest(weights), world.captions[0])
    path = _computed(f"latents-{key}", len(world), encode, report, "encoding pictures")
    return torch.from_numpy(np.load(path))


def cached_passed(
    world: World, vae: AutoencoderKL, *, latent_noise: float, report: Report
) -> NDArray[np.uint8]:
    """Every scene's picture through the autoencoder, with Gaussian noise of the given spread on its scaled
    latents: uint8 (N, S, S, 3), mapped from disk.
    """
    latents = cached_latents(world, vae, report=report)

    def decode(rows: range) -> NDArray[np.uint8]:
        generator = torch.Generator().manual_seed(derived_seed("passed", rows.start))
        noise = torch.randn(latents[rows.start : rows.stop].shape, generator=generator)
        noisy = (latents[rows.start : rows.stop].float() + latent_noise * noise).to(vae.device)
        noisy = (noisy / vae.config.scaling_factor).contiguous(memory_format=torch.channels_last)
        return np.stack(images.tensor_to_pictures(vae.decode(noisy).sample))

    key = _key("passed", VERSION, len(world), latent_noise, _digest([vae]), world.captions[0])
    path = _computed(f"passed-{key}", len(world), decode, report, "decoding pictures")
    return cast("NDArray[np.uint8]", np.load(path, mmap_mode="r"))


def cached_text(
    captions: Sequence[str], encoder: CLIPTextModel, tokenizer: CLIPTokenizer, *, report: Report
) -> Tensor:
    """Last hidden states of each caption, and of "" in the row after the last: float16 (N + 1, 77, D)."""
    texts = [*captions, ""]

    def encode(rows: range) -> NDArray[np.float16]:
        tokens = tokenizer(
            [texts[i] for i in rows],
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        hidden = encoder(tokens.to(encoder.device)).last_hidden_state
        return cast("NDArray[np.float16]", hidden.cpu().numpy().astype(np.float16))

    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    key = _key("text", _digest([encoder]), vocabulary, *texts)
    path = _computed(f"text-{key}", len(texts), encode, report, "encoding captions")
    return torch.from_numpy(np.load(path))


def _key(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:20]


def _digest(modules: Iterable[nn.Module]) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def _computed(
    name: str, count: int, compute: Callable[[range], NDArray[Any]], report: Report, doing: str
) -> Path:
    """The cache's file of the rows that `compute` gives, made (atomically) where it is not there yet."""
    path: Path = cache_folder() / f"{name}.npy"
    if not path.is_file():
        parts: list[NDArray[Any]] = []
        for start in range(0, count, _BATCH):
            parts.append(compute(range(start, min(start + _BATCH, count))))
            if (start // _BATCH + 1) % 400 == 0:
                report(f"{doing}: {start + _BATCH} of {count}")
        _write(path, np.concatenate(parts))
    return path


def _write(path: Path, rows: NDArray[Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(Path(os.path.realpath(path))) as temporary:
            with temporary.open("wb") as file:
                np.save(file, rows)
            os.replace(temporary, path)
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error} (CONTROLKIT_CACHE names another folder)"
        ) from error

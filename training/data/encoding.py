"""What the networks make of pictures and captions, as trainings keep it.

Latents are kept as the mean and the spread of the autoencoder's distribution, so that each visit draws from
it (Rombach et al. 2022, arXiv:2112.10752, appendix G). On a CPU every picture is encoded by itself, so that
the result depends on nothing else; elsewhere in batches, which round differently.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import images, latent_scale
from controlkit.base import Base

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

KEPT = torch.float16
"""Precision of what is kept: its rounding is far below the spread of the autoencoder's own distribution."""
AT_ONCE = 8
"""Pictures that are encoded at once, elsewhere than on a CPU."""
_OF_FILES = ("architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of configurations that say how a network was saved, not what it makes."""


class Moments(NamedTuple):
    """Of the scaled latents: ``mean`` and ``std`` (N, 4, h, w), ``KEPT``, on the CPU."""

    mean: Tensor
    std: Tensor


class Text(NamedTuple):
    """Of captions: ``encoder_hidden_states`` (N, 77, D) and SDXL's ``pooled`` (N, P) or None; as
    `Moments`.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None


@torch.no_grad()
def encode_pictures(base: Base, pictures: Sequence[NDArray[np.uint8]], *, at_once: int = AT_ONCE) -> Moments:
    """Pictures of one size, uint8 (H, W, 3), to the moments of their scaled latents."""
    size = 1 if base.vae.device.type == "cpu" else at_once
    parts = [_moments(base, pictures[start : start + size]) for start in range(0, len(pictures), size)]
    return Moments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _moments(base: Base, pictures: Sequence[NDArray[np.uint8]]) -> Moments:
    pixel_values = images.picture_to_tensor(list(pictures)).to(base.vae.device, base.vae.dtype)
    posterior = base.vae.encode(pixel_values.to(memory_format=torch.channels_last)).latent_dist
    parts = latent_scale.scaled(posterior.mean, base.vae), latent_scale.spread(posterior.std, base.vae)
    return Moments(*(part.to("cpu", KEPT).contiguous() for part in parts))


@torch.no_grad()
def encode_captions(base: Base, captions: Sequence[str]) -> Text:
    """Captions to what the U-Net is told of them: each by itself, as sampling does."""
    encoded = base.encode_prompts(captions)
    pooled = None if encoded.pooled is None else encoded.pooled.to("cpu", KEPT)
    return Text(encoded.encoder_hidden_states.to("cpu", KEPT), pooled)


def picture_encoder_id(base: Base) -> str:
    """What decides the latents of a picture, in 16 letters: weights, configuration, precision."""
    modules = [base.vae.encoder, base.vae.quant_conv]
    return _identity(modules, _told(base.vae.config), base.vae.dtype, KEPT, _place(base.vae.device))


def text_encoder_id(base: Base) -> str:
    """What decides the embedding of a caption, in 16 letters: weights, configuration, words, precision."""
    told = [_told(encoder.config.to_dict()) for encoder in base.text_encoders]
    words = [*map(_reading, base.tokenizers), sorted(base.words.items()), base.clip_skip]
    places = [_place(encoder.device) for encoder in base.text_encoders]
    return _identity(base.text_encoders, base.family, *told, *words, base.dtype, KEPT, *places)


def _told(config: Mapping[str, Any]) -> str:
    """What a network's configuration says of its results: no folder, version or precision of its file."""
    kept = {key: value for key, value in config.items() if key[:1] != "_" and key not in _OF_FILES}
    return json.dumps(kept, sort_keys=True, default=str)


def _reading(tokenizer: CLIPTokenizer) -> str:
    """All that decides which tokens a tokenizer makes of a text, and how it fills up."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())  # vocabulary, merges, what is made of letters
    for of_last_call in ("padding", "truncation"):
        del rules[of_last_call]
    return json.dumps([rules, tokenizer.pad_token_id, tokenizer.split_special_tokens], sort_keys=True)


def _place(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "batched"


def _identity(modules: Iterable[nn.Module], *parts: object) -> str:
    digest = hashlib.sha256("\n".join(map(str, parts)).encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

"""CLIP guidance: every step's predicted picture is moved a little towards what CLIP takes for the prompt.

With x_0 the clean latents that a step predicts and L the distance between CLIP's vectors of the decoded
picture and of the prompt (on the sphere, in radians squared: 2 arcsin(|a - b| / 2)^2, from 0 to 4.9; that of
Crowson's CLIP-guided diffusion notebooks),

    g     =  dL / dx_0
    x_0'  =  x_0 - (1 - alpha_bar_t) * scale * g

and the scheduler is given the prediction that implies x_0'. This is classifier guidance (Dhariwal & Nichol
2021, arXiv:2105.05233, equation 14) with log p(y | x_t) = -scale * L, where the derivative of x_0 by x_t is
taken as that of a unit Gaussian prior, sqrt(alpha_bar_t). No gradient goes through the U-Net: a step costs
one decoding and one look of CLIP, forward and back, and the U-Net keeps no graph. diffusers' community
pipeline clip_guided_stable_diffusion has the same loss in the same unit (100 is its usual scale), but
differentiates through the U-Net, so that the same scale need not have the same effect. A scale that is too
large overshoots: pictures move away from the prompt and fall apart. Which scale is best is not measured here.

The picture that CLIP judges is small: where it is several times as large as CLIP's own, the latents are
averaged by so many, decoded, and the middle square of that is looked at, as in CLIP's training.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from controlkit import diffusion, latent_scale, limits
from controlkit.base_parts import load_tokenizer
from controlkit.controlnet import digest_of_weights, lock
from controlkit.devices import check_device, check_dtype
from controlkit.files import as_text
from controlkit.folders import alone, load_part, read_json, weight_files
from controlkit.hub import check_exists, find_folder
from controlkit.prompt_syntax import parse

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

    from controlkit.base import Base

ALIASES: Mapping[str, str] = {
    "clip-b": "openai/clip-vit-base-patch32",
    "clip-l": "openai/clip-vit-large-patch14",
}
_PLACES: Mapping[str, Any] = {"what": "CLIP", "top_file": "config.json", "bundled": {}, "aliases": ALIASES}
_HUB_FILES = ("*.json", "merges.txt", "*.safetensors", "*pytorch_model*.bin")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIPs
_UNIT = 4096.0  # the loss is multiplied by it and the gradient divided: small ones would be 0 in float16
_FARTHEST = 1 - 1e-6  # of |a - b| / 2: at 1, opposite vectors, the distance has no derivative


@dataclass(frozen=True, eq=False)
class Clip:
    """A CLIP with both halves (Radford et al. 2021, arXiv:2103.00020), locked. Build it with `load_clip`.

    mean, std: (1, 3, 1, 1), of the pixels in [0, 1] that it was trained with.
    """

    model: CLIPModel = field(repr=False)
    tokenizer: CLIPTokenizer = field(repr=False)
    mean: Tensor
    std: Tensor

    @property
    def size(self) -> int:
        """The side of the square that it looks at, in pixels."""
        return int(self.model.config.vision_config.image_size)

    def digest(self) -> str:
        """SHA-256 over its weights and the pixels that it expects."""
        return hashlib.sha256(
            f"{digest_of_weights([self.model])} {self.mean} {self.std}".encode()
        ).hexdigest()

    @torch.no_grad()
    def encode_prompt(self, prompt: str, *, syntax: str = "plain") -> Tensor:
        """The prompt's vector (1, D) of length 1; what is beyond its tokens is cut off.

        syntax: as in `prompt_syntax`; weights are nothing to CLIP and are left out.
        """
        if syntax == "a1111":
            prompt = " ".join("".join(words.text for words in part) for part in parse(prompt))
        model = self.model
        length = model.config.text_config.max_position_embeddings
        tokens = self.tokenizer([prompt], max_length=length, truncation=True, return_tensors="pt")
        pooled = model.text_model(input_ids=tokens.input_ids.to(model.device)).pooler_output
        return _unit(model.text_projection(pooled))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Vectors (B, D) of length 1 of pictures (B, 3, H, W) in [-1, 1]; gradients pass.

        The shorter side is brought to `size`, and the middle square is looked at.
        """
        dtype = torch.promote_types(pixels.dtype, torch.float32)
        size, (height, width) = self.size, pixels.shape[-2:]
        sides = [size * side // min(height, width) for side in (height, width)]
        seen = (pixels.to(dtype) / 2 + 0.5).clamp(0, 1)
        seen = functional.interpolate(seen, size=sides, mode="bicubic", antialias=True)
        top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
        seen = seen[..., top : top + size, left : left + size]
        seen = (seen - self.mean.to(seen)) / self.std.to(seen)
        model = self.model
        pooled = model.vision_model(pixel_values=seen.to(model.dtype)).pooler_output
        return _unit(model.visual_projection(pooled))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (B, D) brought to length 1, in float32 at least."""
    return functional.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def spherical_distance(a: Tensor, b: Tensor) -> Tensor:
    """(B,) distances of vectors of length 1, (B, D): half the squared angle, in radians squared."""
    half_chord = ((a - b).norm(dim=-1) / 2).clamp(max=_FARTHEST)
    return 2 * half_chord.arcsin() ** 2


@dataclass(frozen=True, eq=False)
class ClipGuidance:
    """How strongly a CLIP guides. scale: 0 (off) to `limits.MAX_CLIP_GUIDANCE`, in units of the latents' log
    probability for each radian squared. Raises ValueError for another."""

    clip: Clip
    scale: float

    def __post_init__(self) -> None:
        limits.check_clip_guidance(self.scale)


class ClipGuide:
    """CLIP guidance towards one prompt, as the loop applies it."""

    def __init__(self, base: Base, guidance: ClipGuidance, prompt: str, *, syntax: str = "plain") -> None:
        self.base, self.guidance = base, guidance
        self.target = guidance.clip.encode_prompt(prompt, syntax=syntax)

    def __call__(self, model_pred: Tensor, noisy_latents: Tensor, t: Tensor) -> Tensor:
        """The guided ``model_pred`` (B, C, h, w) at timestep ``t``, for ``noisy_latents`` as the network saw
        them. Each picture is looked at by itself: none depends on its neighbours in the batch."""
        base = self.base
        timesteps = t.round().long().expand(len(noisy_latents))
        told = base.prediction_type, noisy_latents, timesteps, base.alphas_cumprod
        x_0 = diffusion.predict_x0(told[0], model_pred, *told[1:])
        gradients = torch.cat([self.gradient(row[None]) for row in x_0])
        noise_power = 1 - float(base.alphas_cumprod[timesteps[0]])
        moved = x_0 - noise_power * self.guidance.scale * gradients
        return diffusion.prediction_of(told[0], moved, *told[1:])

    def distance(self, x_0: Tensor) -> Tensor:
        """(B,): how far pictures of clean latents (B, C, h, w) are from the prompt, in radians squared."""
        vae, clip = self.base.vae, self.guidance.clip
        share = max(min(x_0.shape[-2:]) * self.base.vae_factor // clip.size, 1)
        small = functional.avg_pool2d(x_0, share) if share > 1 else x_0
        pixels = vae.decode(latent_scale.unscaled(small.to(vae.dtype), vae)).sample
        return spherical_distance(clip.encode_pixels(pixels), self.target)

    def gradient(self, x_0: Tensor) -> Tensor:
        """The distance's derivative by clean latents (1, C, h, w), of that shape."""
        with torch.enable_grad():
            x_0 = x_0.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(_UNIT * self.distance(x_0).sum(), x_0)
        return gradient / _UNIT


def check_clip(name_or_path: str) -> None:
    """Raise `load_clip`'s ValueError for a name that leads nowhere, without loading or downloading."""
    check_exists(name_or_path, **_PLACES)


@alone
def load_clip(
    name_or_path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> Clip:
    """Load a CLIP by its short name (`ALIASES`), a folder of a transformers CLIPModel, or its hub id.

    Raises ValueError, one line, for a name that leads nowhere, a folder that holds something else or damaged
    files, or a device that is not there.
    """
    from transformers import CLIPModel

    device, dtype = check_device(device), check_dtype(dtype)
    name = as_text("a CLIP", name_or_path)
    folder = find_folder(name, complete=_is_complete, files=_HUB_FILES, **_PLACES)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no CLIP: it has no config.json")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{folder} holds a model of the type {kind!r}, not a CLIP with both halves ('clip')")
    model = lock(load_part(CLIPModel, folder, dtype=dtype)).to(device)
    mean, std = (
        torch.tensor(values, dtype=torch.float32).reshape(1, 3, 1, 1) for values in _pixels_of(folder)
    )
    return Clip(model, load_tokenizer(folder), mean, std)


def _pixels_of(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and spread of the pixels that a CLIP was trained with, OpenAI's where its folder does not say."""
    file = folder / "preprocessor_config.json"
    if not file.is_file():
        return _MEAN, _STD
    config = read_json(file)
    mean, std = (tuple(config.get(key, usual)) for key, usual in (("image_mean", _MEAN), ("image_std", _STD)))
    for values in (mean, std):
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values) or 0 in std:
            raise ValueError(f"{file}: image_mean and image_std must be three numbers each, not {values}")
    return mean, std


def _is_complete(folder: Path) -> bool:
    """Whether a cached copy has all that `load_clip` reads."""
    try:
        words = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        return words and all(file.is_file() for file in weight_files(folder))
    except ValueError:
        return False

"""Latents and what the autoencoder takes them for: the factor, and in some autoencoders mean and spread.

Equal to diffusers' SDXL pipelines, which know both (``latents_mean``, ``latents_std``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def scaled(encoded: Tensor, vae: Any) -> Tensor:
    """What the encoder gave (B, C, h, w), as the latents of about unit variance that the U-Net sees."""
    mean, std = _statistics(encoded, vae)
    return (encoded if mean is None else encoded - mean) * (vae.config.scaling_factor / std)


def unscaled(latents: Tensor, vae: Any) -> Tensor:
    """Latents (B, C, h, w), as the decoder takes them."""
    mean, std = _statistics(latents, vae)
    plain = latents * std / vae.config.scaling_factor
    return plain if mean is None else plain + mean


def spread(encoded: Tensor, vae: Any) -> Tensor:
    """A standard deviation of what the encoder gives, in units of latents."""
    return encoded * (vae.config.scaling_factor / _statistics(encoded, vae)[1])


def _statistics(latents: Tensor, vae: Any) -> tuple[Tensor | None, Tensor | float]:
    """Mean and spread, (1, C, 1, 1); None and 1 where the autoencoder names none."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return None, 1.0
    shape = (1, -1, 1, 1)
    found = (torch.tensor(values, dtype=latents.dtype, device=latents.device) for values in (mean, std))
    first, second = (values.view(shape) for values in found)
    return first, second

"""The guidance scale that is usual for a base, by its configuration files alone.

Needs no torch, so that a command can tell at once what has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlkit.families import family_of, takes_picture

_BY_NAME = {"tiny": 2.0}
_BY_FAMILY = {"sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}
_TOLD = 8.5  # of bases that are told it, as diffusers' LatentConsistencyModelPipeline
_PICTURE = 10.0  # of bases that are told a picture, as diffusers' StableUnCLIPImg2ImgPipeline


def usual_guidance(name: str, unet_config: Mapping[str, Any], scheduler_config: Mapping[str, Any]) -> float:
    """The usual scale of a base: of its name, of its kind, or else of its family.

    Bases distilled to few steps have their own: a latent consistency model is told 8.5, and those of the
    Turbo kind take none, which is 1. One that is told a picture takes 10.
    """
    if is_told_guidance(unet_config):
        return _TOLD
    if is_turbo(scheduler_config):
        return 1.0
    if takes_picture(unet_config):
        return _PICTURE
    return _BY_NAME.get(name, _BY_FAMILY[family_of(unet_config)])


def is_told_guidance(unet_config: Mapping[str, Any]) -> bool:
    """Whether a U-Net takes the guidance scale as an input, as latent consistency models do."""
    return unet_config.get("time_cond_proj_dim") is not None


def is_turbo(scheduler_config: Mapping[str, Any]) -> bool:
    """Whether a base was distilled to few steps without guidance, going by how its scheduler spaces them.

    SD-Turbo and SDXL-Turbo (Sauer et al. 2023, arXiv:2311.17042) predict the noise and come with an Euler
    scheduler that starts at the last timestep. So do bases trained to zero signal-to-noise, which are guided.
    """
    euler = str(scheduler_config.get("_class_name", "")).startswith("Euler")
    trailing = scheduler_config.get("timestep_spacing") == "trailing"
    predicts_noise = str(scheduler_config.get("prediction_type", "epsilon")) == "epsilon"
    return euler and trailing and predicts_noise and not scheduler_config.get("rescale_betas_zero_snr", False)

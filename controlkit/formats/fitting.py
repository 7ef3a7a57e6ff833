"""Whether a network fits a base, from their configurations alone: before anything large is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from controlkit.families import FAMILY_TITLES, family_of, t2i_shape
from controlkit.formats.structure import TEXT_FAMILIES

EITHER = "SD1 or SD2"  # what fits one fits the other, where a network does not read the text
_PLAIN = "DownBlock2D"
DEFAULTS: Mapping[str, Any] = {  # of diffusers' ControlNets, for what a config.json leaves out
    "in_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + (_PLAIN,),
}
_SIZES = ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types")


@dataclass(frozen=True)
class BaseStructure:
    """What a base is, as far as an adapter must fit it: its name, and its U-Net's configuration."""

    name: str
    unet: Mapping[str, Any]
    prediction_type: str = "epsilon"

    @property
    def family(self) -> str:
        """ "sd1", "sd2" or "sdxl"."""
        return family_of(self.unet)


def check_kind_fits(
    kind: str, config: Mapping[str, Any], family: str, base: BaseStructure, *, name: str
) -> None:
    """Raise ValueError, one line that names both sides, unless a file of this kind fits a base."""
    if kind not in ("control-lora", "lllite", "controlnext"):
        check_sizes(config, base, name=name)
    elif family not in ("", base.family):  # the rest of their structure is their base's
        raise ValueError(
            f"{name} does not fit the base {base.name}: it is for {FAMILY_TITLES[family]},"
            f" the base is {FAMILY_TITLES[base.family]}"
        )


def check_sizes(config: Mapping[str, Any], base: BaseStructure, *, name: str) -> None:
    """Raise ValueError, one line with both networks' sizes, unless a network of this configuration fits.

    ``config``: with its ``_class_name``; a ControlNet's without. ``name``: of the adapter, for messages.
    """
    if config.get("_class_name", "ControlNetModel") in ("ControlNetModel", "ControlNetUnionModel"):
        config = {**DEFAULTS, **config}
    own = _wanted(config, base)
    different = [key for key in own if plain(config.get(key)) != plain(own[key])]
    family = config_family(config)
    reads_text = config.get("_class_name") != "T2IAdapter"  # what does not fits any base of its sizes
    if not different and (not reads_text or family in ("", base.family)):
        return
    adapter_sizes = ", ".join(f"{key} {plain(config.get(key))}" for key in different) or "other attention"
    base_sizes = ", ".join(f"{key} {plain(own[key])}" for key in different) or "its own"
    title = FAMILY_TITLES.get(family, EITHER)
    if config.get("adapter_type") == "light_adapter" and different == [
        "channels"
    ]:  # which are not the base's
        raise ValueError(
            f"{name} does not fit the base {base.name}: it has {adapter_sizes}, and a T2I-Adapter of its sort"
            f" for {FAMILY_TITLES[base.family]} has {base_sizes}"
        )
    raise ValueError(
        f"{name} does not fit the base {base.name}: it is for {title} ({adapter_sizes}),"
        f" the base is {FAMILY_TITLES[base.family]} ({base_sizes})"
    )


def config_family(config: Mapping[str, Any]) -> str:
    """The family that a network of this configuration is for; "" where SD1 and SD2 would be the same."""
    match config.get("_class_name", "ControlNetModel"):
        case "T2IAdapter":
            return "sdxl" if config.get("adapter_type") == "full_adapter_xl" else ""
        case "LightControl":
            return str(config.get("family", ""))
        case "ControlNetXSAdapter":
            small = len(config["block_out_channels"]) < 4  # SDXL has three levels
            by_structure = "sdxl" if small else family_of(config)
            return TEXT_FAMILIES.get(config["cross_attention_dim"], by_structure)
    return family_of(config)


def plain(value: Any) -> Any:
    """A configuration's value as it prints: lists and tuples are the same, and written with slashes."""
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else value


def _wanted(config: Mapping[str, Any], base: BaseStructure) -> dict[str, Any]:
    """What the configuration has to say to fit."""
    unet = base.unet
    widths = list(unet["block_out_channels"])
    match config.get("_class_name", "ControlNetModel"):
        case "T2IAdapter":
            shape = t2i_shape(unet)
            if config.get("adapter_type") == "light_adapter" and shape.adapter_type == "full_adapter":
                return {"adapter_type": "light_adapter", "channels": widths[:-1]}
            return {"adapter_type": shape.adapter_type, "channels": shape.channels}
        case "LightControl":  # it enters behind the first convolution
            return {"block_out_channels": widths[: len(config.get("block_out_channels", widths))]}
        case "ControlNetXSAdapter":
            own = {key: unet[key] for key in ("cross_attention_dim", "down_block_types")}
            return {"base_block_out_channels": widths, **own}
    # A base that fills holes sees more besides the latents, and its control networks do not.
    own = {**{key: unet[key] for key in _SIZES}, "in_channels": unet.get("out_channels", 4)}
    blocks = config.get("down_block_types") or ()
    pairs = zip(blocks, own["down_block_types"], strict=False)
    if len(blocks) == len(own["down_block_types"]) and all(one in (other, _PLAIN) for one, other in pairs):
        own["down_block_types"] = blocks  # small ones leave attention out, as diffusers' for SDXL
    if not _reads_text(blocks, config):
        del own["cross_attention_dim"]
    return own


def _reads_text(blocks: Sequence[str], config: Mapping[str, Any]) -> bool:
    """Whether a ControlNet has a layer that reads the text: diffusers' small ones have none."""
    depths = config.get("transformer_layers_per_block", 1)
    depths = [depths] * len(blocks) if isinstance(depths, int) else depths
    in_blocks = any(depth for block, depth in zip(blocks, depths, strict=False) if block != _PLAIN)
    return in_blocks or (config.get("mid_block_type") != "UNetMidBlock2D" and any(depths[-1:]))

"""A network's configuration from the shapes of its tensors, so that one file needs no config.json and no hub.

The names are diffusers'. What no shape tells (the number of attention heads, the groups of the norms) is left
out here: the base at hand has it, or the family's published models (`UNTOLD`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from controlkit.families import family_of
from controlkit.formats.weight_file import Stored

CLASS_NAMES: Mapping[str, str] = {
    "controlnet": "ControlNetModel",
    "controlnet-difference": "ControlNetModel",
    "control-lora": "ControlNetModel",
    "controlnet-union": "ControlNetUnionModel",
    "t2i-adapter": "T2IAdapter",
    "controlnet-xs": "ControlNetXSAdapter",
    "lite": "LightControl",
}
"""The class of each kind that has a configuration: diffusers', or ours (`MODULES`)."""
MODULES: Mapping[str, str] = {"LightControl": "controlkit.light"}
"""Where a class is that is not diffusers'."""
UNTOLD: Mapping[str, Mapping[str, Any]] = {
    "sd1": {"attention_head_dim": 8},
    "sd2": {"attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {"attention_head_dim": (5, 10, 20), "addition_time_embed_dim": 256},
}
"""What shapes do not tell, of the published models of each family; for the rest diffusers' defaults hold."""
PUBLISHED_WIDTHS = frozenset({320, 640, 1280})
"""Channels of the published models' levels: `UNTOLD` holds for these alone."""
TEXT_FAMILIES: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}

IN_NO_SHAPE = ("global_pool_conditions", "controlnet_conditioning_channel_order")
"""How a ControlNet takes its map: neither its shapes nor its base know it."""

Config = dict[str, Any]


class Shapes:
    """The shapes of a file's tensors by their names in the network; a missing one is a plain error."""

    def __init__(self, entries: Mapping[str, Stored], where: object) -> None:
        self.entries, self.where = entries, where

    def __getitem__(self, key: str) -> tuple[int, ...]:
        if key not in self.entries:
            raise ValueError(f"{self.where} lacks {key}: it is incomplete")
        return self.entries[key].shape

    def __contains__(self, key: str) -> bool:
        return key in self.entries

    def size(self, key: str, axis: int) -> int:
        """One side of a tensor. Raises ValueError for one with fewer sides."""
        shape = self[key]
        if len(shape) <= axis:
            raise ValueError(f"{self.where}: {key} has the shape {by(shape)}, which no such network has")
        return shape[axis]

    def count(self, pattern: str) -> int:
        """How many numbers stand for the group in a pattern that begins a name: 0, 1 ... without a gap."""
        found = {int(match[1]) for key in self.entries if (match := re.match(pattern, key))}
        if found != set(range(len(found))):
            missing = min(set(range(max(found))) - found)
            group = pattern.split("(")[0].replace("\\", "")
            raise ValueError(f"{self.where} lacks {group}{missing}: it is incomplete")
        return len(found)

    def text_width(self) -> int | None:
        """The width of the text that its cross-attentions read; None for a network without any."""
        key = next((key for key in self.entries if key.endswith(".attn2.to_k.weight")), None)
        return None if key is None else self.size(key, 1)


def by(shape: tuple[int, ...]) -> str:
    """A shape as it is written in messages."""
    return "x".join(map(str, shape)) or "a single number"


def controlnet_config(shapes: Shapes) -> Config:
    """A ControlNet's configuration, of diffusers' class. Raises ValueError for missing tensors."""
    return {**encoder_config(shapes), **hint_config(shapes)}


def encoder_config(shapes: Shapes) -> Config:
    """What a U-Net's encoder and its copy have in common. Raises ValueError for missing tensors."""
    levels = shapes.count(r"down_blocks\.(\d+)\.")
    if not levels:
        raise ValueError(f"{shapes.where} lacks down_blocks.0: it is incomplete")
    layers = {shapes.count(rf"down_blocks\.{level}\.resnets\.(\d+)\.") for level in range(levels)}
    if len(layers) != 1:
        raise ValueError(
            f"{shapes.where}: its levels have {sorted(layers)} layers, and must have equally many"
        )
    attended = [shapes.count(rf"down_blocks\.{level}\.attentions\.(\d+)\.") > 0 for level in range(levels)]
    config: Config = {
        "in_channels": shapes.size("conv_in.weight", 1),
        "block_out_channels": tuple(
            shapes.size(f"down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)
        ),
        "layers_per_block": layers.pop(),
        "down_block_types": tuple("CrossAttnDownBlock2D" if text else "DownBlock2D" for text in attended),
        **_attention_config(shapes, attended),
    }
    if "add_embedding.linear_1.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "projection_class_embeddings_input_dim": shapes.size("add_embedding.linear_1.weight", 1),
        }
    return config


def union_config(shapes: Shapes) -> Config:
    """A ControlNet-Union's configuration: a ControlNet's, and the part that tells its kinds apart."""
    kinds, width = shapes.size("task_embedding", 0), shapes.size("task_embedding", 1)
    return {
        **controlnet_config(shapes),
        "num_control_type": kinds,
        "num_trans_channel": width,
        "num_trans_layer": shapes.count(r"transformer_layes\.(\d+)\."),
        "num_proj_channel": shapes.size("spatial_ch_projs.weight", 0),
        "addition_time_embed_dim": shapes.size("control_add_embedding.linear_1.weight", 1) // kinds,
    }


def hint_config(shapes: Shapes) -> Config:
    """The hint encoder's: its input channels and its widths."""
    where = "controlnet_cond_embedding"
    blocks = shapes.count(rf"{where}\.blocks\.(\d+)\.")
    widths = [shapes.size(f"{where}.conv_in.weight", 0)]
    widths += [shapes.size(f"{where}.blocks.{index}.weight", 0) for index in range(1, blocks, 2)]
    return {
        "conditioning_channels": shapes.size(f"{where}.conv_in.weight", 1),
        "conditioning_embedding_out_channels": tuple(widths),
    }


def _attention_config(shapes: Shapes, attended: list[bool]) -> Config:
    # diffusers' small ones for SDXL have in the middle an attention's norm and projections, without layers.
    has_mid = "mid_block.attentions.0.proj_in.weight" in shapes
    in_mid = shapes.count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    depths = [
        shapes.count(rf"down_blocks\.{level}\.attentions\.0\.transformer_blocks\.(\d+)\.") if text else 1
        for level, text in enumerate(attended)
    ]
    if not attended[-1]:  # diffusers gives the mid block the last level's depth
        depths[-1] = in_mid if has_mid else 1
    config: Config = {"transformer_layers_per_block": tuple(depths) if set(depths) != {1} else 1}
    if not has_mid:
        config["mid_block_type"] = "UNetMidBlock2D"
    width = shapes.text_width()
    if width is not None:
        config["cross_attention_dim"] = width
    if has_mid or any(attended):
        config["use_linear_projection"] = uses_linear(shapes, width)
    return config


def uses_linear(shapes: Shapes, width: int | None) -> bool:
    """Whether the attention's input is projected by linear layers, as in SD2 and SDXL.

    width: of the text, None where no layer reads it. A published one says so: some files store SD1's 1x1
    convolutions as matrices.
    """
    if width is not None and width in TEXT_FAMILIES:
        return TEXT_FAMILIES[width] != "sd1"
    key = next(key for key in shapes.entries if key.endswith(".proj_in.weight"))
    return len(shapes[key]) == 2


def with_untold(config: Config, known: Mapping[str, Any] | None) -> Config:
    """The configuration with what no shape tells: as ``known`` has it (a base's, say), or the family's."""
    untold = dict(UNTOLD[family_of(config)])
    if known is not None:
        untold |= {key: known[key] for key in _SHARED if known.get(key) is not None}
    if config.get("addition_embed_type") is None:
        untold.pop("addition_time_embed_dim", None)
    return {**untold, **config}


_SHARED = (  # between a U-Net and its copy, and in no shape
    *("act_fn", "attention_head_dim", "num_attention_heads", "addition_time_embed_dim", "downsample_padding"),
    *("flip_sin_to_cos", "freq_shift", "mid_block_scale_factor", "norm_eps", "norm_num_groups"),
    *("resnet_time_scale_shift", "upcast_attention"),
)

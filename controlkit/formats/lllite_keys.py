"""The names of a ControlNet-LLLite's tensors, and the shapes that belong to them. Needs no torch.

kohya-ss's sd-scripts, ``networks/control_net_lllite.py``: ``lllite_unet_`` and the original's name of an
attention's projection with underscores, then the part (``conditioning1.0.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

STRIDES = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
"""Of the map's convolutions, by depth: kernels as large."""
_PLACE = re.compile(
    r"lllite_unet_(?:(input|output)_blocks_(\d+)|middle_block)_1_transformer_blocks_(\d+)"
    r"_(attn[12])_to_(q|(?<=attn1_to_)[kv])"
)
_PROJECTION = re.compile(
    r"(down|up|mid)_blocks?\.(?:(\d+)\.)?attentions\.(\d+)\.transformer_blocks\.(\d+)\..+"
)


def place(name: str) -> str:
    """The U-Net's projection that a name of the file means, as diffusers names it. Raises ValueError."""
    match = _PLACE.fullmatch(name)
    if match is None:
        raise ValueError(f"LLLite: {name} names no attention projection of a U-Net")
    side, block, transformer, attention, projection = match.groups()
    if side == "input":
        where = f"down_blocks.{(int(block) - 1) // 3}.attentions.{(int(block) - 1) % 3}"
    elif side == "output":
        where = f"up_blocks.{int(block) // 3}.attentions.{int(block) % 3}"
    else:
        where = "mid_block.attentions.0"
    return f"{where}.transformer_blocks.{transformer}.{attention}.to_{projection}"


def depth_of(own: Mapping[str, tuple[int, ...]]) -> int:
    """How deep one part's encoder of the map is, by the shapes of its tensors."""
    if "conditioning1.4.weight" in own:
        return 3
    return 2 if own["conditioning1.2.weight"][-1] == 4 else 1


def part_tensors(tokens: int, embedded: int, inner: int, depth: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the network in front of one projection."""
    wide = [embedded // 2] * (len(STRIDES[depth]) - 1) + [embedded]
    shapes: dict[str, tuple[int, ...]] = {
        f"conditioning1.{2 * k}": (wide[k], 3 if k == 0 else wide[k - 1], stride, stride)
        for k, stride in enumerate(STRIDES[depth])
    }
    shapes |= {"down.0": (inner, tokens), "mid.0": (inner, inner + embedded), "up.0": (tokens, inner)}
    return {
        f"{name}.{part}": shape if part == "weight" else shape[:1]
        for name, shape in shapes.items()
        for part in ("weight", "bias")
    }


def width_at(projection: str, unet: Mapping[str, Any]) -> int | None:
    """How wide the tokens are at a projection of a U-Net of the usual blocks; None where it has no such."""
    match = _PROJECTION.fullmatch(projection)
    widths, kinds = list(unet["block_out_channels"]), list(unet["down_block_types"])
    depths = unet.get("transformer_layers_per_block") or 1
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    layers = unet.get("layers_per_block", 2)
    if match is None or not isinstance(layers, int):
        return None
    side, level, layer, block = match[1], int(match[2] or 0), int(match[3]), int(match[4])
    if side == "mid":
        level, layers, attends = len(widths) - 1, 1, True
    elif level >= len(widths):
        return None
    else:
        layers += side == "up"
        level = len(widths) - 1 - level if side == "up" else level
        attends = "CrossAttn" in kinds[level]
    return widths[level] if attends and layer < layers and block < depths[level] else None

"""The types of the values in a network's configuration, as files of other programs have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHOLE = (
    "conditioning_channels",
    "downscale_factor",
    "in_channels",
    "norm_num_groups",
    "num_control_type",
    "num_proj_channel",
    "num_res_blocks",
    "num_trans_channel",
    "num_trans_head",
    "num_trans_layer",
)
_WHOLE_OR_LIST = (
    "attention_head_dim",
    "cross_attention_dim",
    "layers_per_block",
    "num_attention_heads",
    "transformer_layers_per_block",
)
_LISTS = ("base_block_out_channels", "block_out_channels", "channels", "conditioning_embedding_out_channels")
_NAMES = ("down_block_types",)


def check_types(config: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError, one line, for a size that is no whole number, a list of them that is none, or names
    of blocks that are none. What is null or left out is diffusers' default."""
    for key, value in config.items():
        if value is None:
            continue
        if key in _WHOLE and not _is_whole(value):
            raise ValueError(f"{where} says {key} {value!r}: it is a whole number")
        if key in _WHOLE_OR_LIST and not (_is_whole(value) or _are(value, int)):
            raise ValueError(f"{where} says {key} {value!r}: it is a whole number, or a list of them")
        if key in _LISTS and not _are(value, int):
            raise ValueError(f"{where} says {key} {value!r}: it is a list of whole numbers")
        if key in _NAMES and not _are(value, str):
            raise ValueError(f"{where} says {key} {value!r}: it is a list of names")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are(value: object, kind: type) -> bool:
    """Whether a value is a list of a kind, and not empty."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)

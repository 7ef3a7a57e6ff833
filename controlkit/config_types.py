"""The types of the values in a network's configuration, as files of other programs have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WHOLE = (
    "conditioning_channels",
    "downscale_factor",
    "eos_token_id",
    "in_channels",
    "latent_channels",
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
_OF_SIDES = ("sample_size",)  # one number or two, whatever the class says
_NAMES = ("down_block_types", "up_block_types")


def check_types(config: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError, one line, for a size that is no whole number, a list of them that is none, or names
    of blocks that are none. What is null or left out is diffusers' default."""
    for key, value in config.items():
        if value is None:
            continue
        if key in _WHOLE and not _is_whole(value):
            raise ValueError(f"{where} says {key} {value!r}: it is a whole number")
        if key in _WHOLE_OR_LIST and not (_is_whole(value) or _are(_flat(value), int)):
            raise ValueError(f"{where} says {key} {value!r}: it is a whole number, or a list of them")
        if key in _LISTS and not _are(value, int):
            raise ValueError(f"{where} says {key} {value!r}: it is a list of whole numbers")
        if key in _NAMES and not _are(value, str):
            raise ValueError(f"{where} says {key} {value!r}: it is a list of names")


def check_like_defaults(cls: type, config: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError, one line, for a value of another type than a diffusers class has as its default.

    What is null is left to the class. A list, of one for each block, stands for one where the class says so.
    """
    for key, parameter in inspect.signature(cls).parameters.items():
        default, value = parameter.default, config.get(key)
        if value is None or default is None or default is parameter.empty or key in _OF_SIDES:
            continue
        is_list = isinstance(default, tuple | list)
        one = default[0] if is_list and default else default
        said = str(parameter.annotation).lower()
        may_be_list = is_list or "tuple" in said or "list" in said
        in_shape = may_be_list if isinstance(value, list) else not is_list
        if not (in_shape and _is_like(value, one)):
            raise ValueError(f"{where} says {key} {value!r}: it is {_in_words(one, many=is_list)}")


def _is_like(value: object, default: object) -> bool:
    if isinstance(value, list):  # within a list: of the layers of one block
        return all(_is_like(each, default) for each in value)
    if isinstance(default, bool | str):
        return value is None or isinstance(value, type(default))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or not isinstance(default, int | float)


def _in_words(default: object, *, many: bool) -> str:
    names: Mapping[type, str] = {bool: "true or false", str: "a name", int: "a number", float: "a number"}
    one = names.get(type(default), "a value")
    return f"a list, each {one}" if many else one


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flat(value: object) -> object:
    """A list without the lists in it: of a block's layers each."""
    if not isinstance(value, list):
        return value
    return [one for each in value for one in (each if isinstance(each, list) else [each])]


def _are(value: object, kind: type) -> bool:
    """Whether a value is a list of a kind, and not empty."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in value)

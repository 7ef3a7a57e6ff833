"""The types of the values in a network's configuration, as files of other programs have them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_KEYS: Mapping[str, tuple[str, ...]] = {  # what a value is, and of which
    "a whole number": (
        "addition_embed_type_num_heads",
        *("conditioning_channels", "downsample_padding", "downscale_factor", "eos_token_id", "in_channels"),
        *("latent_channels", "norm_num_groups", "num_control_type", "num_hidden_layers", "num_proj_channel"),
        "num_res_blocks",
        *("num_trans_channel", "num_trans_head", "num_trans_layer"),
    ),
    "a whole number, or a list of them": (
        *("attention_head_dim", "cross_attention_dim", "layers_per_block", "num_attention_heads"),
        "transformer_layers_per_block",
    ),
    "a list of whole numbers": (
        *("base_block_out_channels", "block_out_channels", "channels", "conditioning_embedding_out_channels"),
    ),
    "a list of names": ("down_block_types", "up_block_types"),
    "a number": ("freq_shift", "mid_block_scale_factor", "norm_eps", "time_embedding_mix"),
    "true or false": (
        *("flip_sin_to_cos", "global_pool_conditions", "learn_time_embedding", "upcast_attention"),
        "use_linear_projection",
    ),
    "a name": (
        *("act_fn", "conditioning_channel_order", "controlnet_conditioning_channel_order"),
        "resnet_time_scale_shift",
    ),
}
_NEVER_NULL = (
    *("block_out_channels", "channels", "conditioning_embedding_out_channels", "down_block_types"),
    *("cross_attention_dim", "in_channels", "layers_per_block", "transformer_layers_per_block"),
    *("downscale_factor", "eos_token_id", "num_res_blocks"),
)
_LAYERS = (
    *("layers_per_block", "num_control_type", "num_hidden_layers", "num_res_blocks", "num_trans_layer"),
    "transformer_layers_per_block",
)
_MOST, _MOST_LAYERS = 1_000_000, 1000  # far above what there is; a list of all layers' names is made
_OF_SIDES = ("sample_size",)  # one number or two, whatever the class says


def check_types(config: Mapping[str, Any], where: Path) -> None:
    """Raise ValueError, one line, for a value of another type than diffusers' networks have, as a size that
    is no whole number. What is left out is diffusers' default."""
    for words, keys in _KEYS.items():
        for key in keys:
            value = config.get(key)
            left_out = value is None and (key not in config or key not in _NEVER_NULL)
            if not left_out and not _is(words, value):
                raise ValueError(f"{where} says {key} {value!r}: it is {words}")
            most = _MOST_LAYERS if key in _LAYERS else _MOST
            if any(not 0 <= number <= most for number in _whole_numbers(value)):
                raise ValueError(f"{where} says {key} {value!r}: networks have 0 to {most}")


def _is(words: str, value: Any) -> bool:
    match words:
        case "a whole number":
            return _is_whole(value)
        case "a whole number, or a list of them":
            return _is_whole(value) or _are(_flat(value), int)
        case "a list of whole numbers":
            return _are(value, int)
        case "a list of names":
            return _are(value, str)
        case "a number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "true or false":
            return isinstance(value, bool)
    return isinstance(value, str)


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


def _whole_numbers(value: object) -> Iterator[int]:
    """All that are in a value."""
    if isinstance(value, list):
        for one in value:
            yield from _whole_numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


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

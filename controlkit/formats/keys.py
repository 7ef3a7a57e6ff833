"""The names of a ControlNet's tensors: the original project's and diffusers', one to one.

The original stores a flat list of encoder blocks (``input_blocks.4.0.in_layers.2.weight``), diffusers levels
of layers (``down_blocks.1.resnets.0.conv1.weight``). With L layers per level, the original's block ``n`` is
layer ``(n - 1) mod (L + 1)`` of level ``(n - 1) div (L + 1)``, and the last of each L + 1 downsamples. Pure
functions over strings, for any number of levels and layers; what stands inside a transformer has the same
name in both. (The original: github.com/lllyasviel/ControlNet, ``cldm/cldm.py``.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

PREFIX = "control_model."  # of the original's checkpoints; the published files have it or not

_TOP: Mapping[str, str] = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block_out.0": "controlnet_mid_block",
}
_RESNET: Mapping[str, str] = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP_BACK = {ours: theirs for theirs, ours in _TOP.items()}
_RESNET_BACK = {ours: theirs for theirs, ours in _RESNET.items()}
_TRANSFORMER = re.compile(r"norm|proj_in|proj_out|transformer_blocks\.\d+\..+")


class Counts(NamedTuple):
    """What the numbers in the names depend on: layers per level, and convolutions of the hint encoder."""

    layers: int = 2
    hint_convs: int = 8


PUBLISHED = Counts()


def to_diffusers(key: str, counts: Counts = PUBLISHED) -> str | None:
    """diffusers' name of a tensor that the original calls ``key`` (without prefix); None if it is no such
    name.

    >>> to_diffusers("input_blocks.4.0.in_layers.2.weight")
    'down_blocks.1.resnets.0.conv1.weight'
    """
    name, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        return None
    found = _TOP.get(name) or _hint_to_diffusers(name, counts) or _block_to_diffusers(name, counts)
    return f"{found}.{parameter}" if found else None


def to_original(key: str, counts: Counts = PUBLISHED) -> str | None:
    """The original's name, without prefix, of a tensor that diffusers calls ``key``; None if it has none.

    >>> to_original("down_blocks.1.resnets.0.conv1.weight")
    'input_blocks.4.0.in_layers.2.weight'
    """
    name, _, parameter = key.rpartition(".")
    if parameter not in ("weight", "bias"):
        return None
    found = _TOP_BACK.get(name) or _hint_to_original(name, counts) or _block_to_original(name, counts)
    return f"{found}.{parameter}" if found else None


def counts_of_original(keys: Iterable[str]) -> Counts:
    """The counts of a file with the original's names (without prefix)."""
    names = list(keys)
    downs = [int(found[1]) for key in names if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.", key))]
    blocks = [int(found[1]) for key in names if (found := re.match(r"input_blocks\.(\d+)\.", key))]
    hints = [int(found[1]) for key in names if (found := re.match(r"input_hint_block\.(\d+)\.", key))]
    # A single level has no downsampling: then all blocks behind the first are its layers.
    layers = min(downs) - 1 if downs else max(blocks, default=PUBLISHED.layers)
    return Counts(layers, max(hints) // 2 + 1 if hints else PUBLISHED.hint_convs)


def counts_of_diffusers(keys: Iterable[str]) -> Counts:
    """The counts of a file with diffusers' names."""
    names = list(keys)
    layers = {found[1] for key in names if (found := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", key))}
    hints = [key for key in names if key.startswith("controlnet_cond_embedding.") and key.endswith(".weight")]
    return Counts(len(layers) or PUBLISHED.layers, len(hints) or PUBLISHED.hint_convs)


def _hint_to_diffusers(name: str, counts: Counts) -> str | None:
    found = re.fullmatch(r"input_hint_block\.(\d+)", name)
    if not found or int(found[1]) % 2:  # between the convolutions stand activations
        return None
    index = int(found[1]) // 2
    if index >= counts.hint_convs:
        return None
    ends = {0: "conv_in", counts.hint_convs - 1: "conv_out"}
    part = ends.get(index, f"blocks.{index - 1}")
    return f"controlnet_cond_embedding.{part}"


def _hint_to_original(name: str, counts: Counts) -> str | None:
    part = name.removeprefix("controlnet_cond_embedding.")
    if part == name:
        return None
    if found := re.fullmatch(r"blocks\.(\d+)", part):
        index = int(found[1]) + 1
        return f"input_hint_block.{2 * index}" if index < counts.hint_convs - 1 else None
    ends = {"conv_in": 0, "conv_out": counts.hint_convs - 1}
    return f"input_hint_block.{2 * ends[part]}" if part in ends else None


def _block_to_diffusers(name: str, counts: Counts) -> str | None:
    if found := re.fullmatch(r"zero_convs\.(\d+)\.0", name):
        return f"controlnet_down_blocks.{found[1]}"
    if found := re.fullmatch(r"middle_block\.(\d)\.(.+)", name):
        place, inner = int(found[1]), found[2]
        if place == 1:
            return _in_transformer("mid_block.attentions.0", inner)
        return _in_resnet(f"mid_block.resnets.{place // 2}", inner, _RESNET) if place in (0, 2) else None
    found = re.fullmatch(r"input_blocks\.(\d+)\.([01])\.(.+)", name)
    if not found or int(found[1]) == 0:
        return None
    level, layer = divmod(int(found[1]) - 1, counts.layers + 1)
    if layer == counts.layers:
        is_down = (found[2], found[3]) == ("0", "op")
        return f"down_blocks.{level}.downsamplers.0.conv" if is_down else None
    if found[2] == "0":
        return _in_resnet(f"down_blocks.{level}.resnets.{layer}", found[3], _RESNET)
    return _in_transformer(f"down_blocks.{level}.attentions.{layer}", found[3])


def _block_to_original(name: str, counts: Counts) -> str | None:
    if found := re.fullmatch(r"controlnet_down_blocks\.(\d+)", name):
        return f"zero_convs.{found[1]}.0"
    if found := re.fullmatch(r"mid_block\.resnets\.([01])\.(.+)", name):
        return _in_resnet(f"middle_block.{2 * int(found[1])}", found[2], _RESNET_BACK)
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", name):
        return _in_transformer("middle_block.1", found[1])
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", name):
        return f"input_blocks.{(int(found[1]) + 1) * (counts.layers + 1)}.0.op"
    found = re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", name)
    if not found or int(found[3]) >= counts.layers:
        return None
    block = int(found[1]) * (counts.layers + 1) + int(found[3]) + 1
    if found[2] == "resnets":
        return _in_resnet(f"input_blocks.{block}.0", found[4], _RESNET_BACK)
    return _in_transformer(f"input_blocks.{block}.1", found[4])


def _in_resnet(where: str, inner: str, names: Mapping[str, str]) -> str | None:
    return f"{where}.{names[inner]}" if inner in names else None


def _in_transformer(where: str, inner: str) -> str | None:
    return f"{where}.{inner}" if _TRANSFORMER.fullmatch(inner) else None

"""The names of a T2I-Adapter's tensors: the original project's and diffusers', one to one.

The full adapter is a flat list of residual blocks in the original (``body.3.block1.weight``) and levels of
them in diffusers (``adapter.body.1.resnets.1.block1.weight``); the light one has levels in both. Mou et al.
2023, arXiv:2302.08453; the original: github.com/TencentARC/T2I-Adapter, ``ldm/modules/encoders/adapter.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

BLOCKS = 2  # residual blocks per level of the full adapter, as published
PREFIX = "adapter."


def to_diffusers(key: str, *, light: bool, blocks: int = BLOCKS) -> str | None:
    """diffusers' name of a tensor that the original calls ``key``; None if it is no such name."""
    key = key.removeprefix(PREFIX)
    if re.fullmatch(r"conv_in\.(weight|bias)", key) and not light:
        return PREFIX + key
    if light:
        found = re.fullmatch(
            r"body\.(\d+)\.(?:body\.(\d+)\.)?(block[12]|in_conv|out_conv)\.(weight|bias)", key
        )
        if not found or (found[2] is None) == found[3].startswith("block"):
            return None
        inner = f"resnets.{found[2]}.{found[3]}" if found[2] else found[3]
        return f"{PREFIX}body.{found[1]}.{inner}.{found[4]}"
    found = re.fullmatch(r"body\.(\d+)\.(block[12]|in_conv)\.(weight|bias)", key)
    if not found:
        return None
    level, block = divmod(int(found[1]), blocks)
    if found[2] == "in_conv":  # widens a level's input, so it can only stand in the first block of one
        return f"{PREFIX}body.{level}.in_conv.{found[3]}" if block == 0 else None
    return f"{PREFIX}body.{level}.resnets.{block}.{found[2]}.{found[3]}"


def to_original(key: str, *, light: bool, blocks: int = BLOCKS) -> str | None:
    """The original's name of a tensor that diffusers calls ``key``; None if it has none."""
    if key in (f"{PREFIX}conv_in.weight", f"{PREFIX}conv_in.bias") and not light:
        return key.removeprefix(PREFIX)
    pattern = r"adapter\.body\.(\d+)\.(?:resnets\.(\d+)\.)?(block[12]|in_conv|out_conv)\.(weight|bias)"
    found = re.fullmatch(pattern, key)
    if not found or (found[2] is None) == found[3].startswith("block"):
        return None
    if light:
        inner = f"body.{found[2]}.{found[3]}" if found[2] else found[3]
        return f"body.{found[1]}.{inner}.{found[4]}"
    if found[3] == "out_conv":
        return None
    return f"body.{int(found[1]) * blocks + int(found[2] or 0)}.{found[3]}.{found[4]}"


def blocks_of_original(keys: Iterable[str]) -> int:
    """Residual blocks per level of a full adapter with the original's names: the first that widens tells.

    A level that keeps its width has no ``in_conv``, so this is read where the second level begins.
    """
    widening = [int(found[1]) for key in keys if (found := re.match(r"body\.(\d+)\.in_conv\.", key))]
    return min(widening, default=BLOCKS) or BLOCKS


def blocks_of_diffusers(keys: Iterable[str]) -> int:
    """Residual blocks per level of an adapter with diffusers' names."""
    found = {match[1] for key in keys if (match := re.match(r"adapter\.body\.0\.resnets\.(\d+)\.", key))}
    return len(found) or BLOCKS

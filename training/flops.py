"""How many floating-point operations an operator takes, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
SAME_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}
"""Operators that torch has no formula for before 2.12, and those whose formula is theirs."""


def formula(packet: Any) -> Callable[..., int] | None:
    """What counts the operations of a call, of its arguments and `out_val`; None for an operator that has
    none that count.
    """
    found: Callable[..., int] | None = flop_registry.get(packet) or flop_registry.get(SAME_AS.get(packet))
    return found

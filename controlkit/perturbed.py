"""Perturbed-attention guidance: away from what the base predicts where it does not look around.

    eps  =  eps_u + guidance * (eps_c - eps_u) + pag * (eps_c - eps_p)

eps_p is the conditional prediction in which the self-attentions of the U-Net's middle block give every place
its own value and nothing of the others' (Ahn et al. 2024, arXiv:2403.17377, section 4; diffusers' pipelines
with ``pag_applied_layers="mid"``, ComfyUI's node). The encoder and the control networks stand before that
block, so they are not run again: what they found serves both predictions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def check_perturbable(unet: Any) -> None:
    """Raise ValueError for a U-Net whose middle block has no self-attention to leave out."""
    if not _attentions(unet.mid_block):
        raise ValueError("pag needs self-attention in the U-Net's middle block, and this base has none there")


def twice(x: Tensor, rows: int, tail: int) -> Tensor:
    """The last ``tail`` of ``rows`` rows once more behind them; one row for all of them stays one."""
    return torch.cat([x, x[-tail:]]) if len(x) == rows else x


@contextlib.contextmanager
def looking_nowhere(mid_block: nn.Module, tail: int) -> Iterator[None]:
    """Within the block the self-attentions of ``mid_block`` give the last ``tail`` rows their own values."""
    attentions = _attentions(mid_block)
    before = [attention.processor for attention in attentions]
    for attention in attentions:
        attention.processor = _LastRowsAlone(attention.processor, tail)
    try:
        yield
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor


def _attentions(mid_block: nn.Module | None) -> list[Any]:
    if mid_block is None:
        return []
    return [module for name, module in mid_block.named_modules() if name.endswith("attn1")]


class _LastRowsAlone:
    """An attention's processor that hands all rows but the last to the one that was there."""

    def __init__(self, processor: Any, tail: int) -> None:
        self.processor, self.tail = processor, tail

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **more: Any) -> Tensor:
        """The attention's output for ``hidden_states`` (B, S, C)."""
        looking, alone = hidden_states[: -self.tail], hidden_states[-self.tail :]
        values = attn.to_out[0](attn.to_v(alone)) / attn.rescale_output_factor
        return torch.cat([self.processor(attn, looking, *args, **more), values])

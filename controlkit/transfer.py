"""A ControlNet carried over to another base of its family.

What it learned beyond its base is added to the other base: w + w_new - w_old, for every weight that was
copied from the U-Net's encoder; the hint encoder and the zero convolutions have no counterpart and stay. It
is what the original project does (``tool_transfer_control.py``), and exact for an untrained copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from controlkit.formats.control_lora import encoder_of


def transfer_state(
    state: Mapping[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A ControlNet's tensors (diffusers' names) on the base whose U-Net's are ``new``, from that of ``old``.

    Computed in float64, in each tensor's own precision; where both bases have the same weight, it stays bit
    for bit. Raises ValueError where the three do not have the same shapes.
    """
    before, after = encoder_of(old), encoder_of(new)
    strange = [key for key in before if key not in state] + sorted(before.keys() ^ after.keys())
    if strange:
        raise ValueError(
            f"the adapter and the two bases do not have the same structure: {strange[0]} differs"
        )
    moved = dict(state)
    for key, tensor in state.items():
        if key not in before:
            continue
        shapes = [tuple(part.shape) for part in (tensor, before[key], after[key])]
        if shapes[1] != shapes[2] or before[key].numel() != tensor.numel():
            raise ValueError(
                f"the adapter and the two bases differ in {key}: it is {shapes[0]} in the adapter,"
                f" {shapes[1]} in the old base and {shapes[2]} in the new one"
            )
        change = after[key].double() - before[key].double()
        if change.any():
            moved[key] = (tensor.cpu().double() + change.reshape(tensor.shape)).to(tensor.dtype)
    return moved


class Distances(NamedTuple):
    """How far encoders are apart: the root of the sum of squared differences of their weights.

    ``old`` and ``new``: of the adapter's copy and either base's; ``bases``: of the two bases'.
    """

    old: float
    new: float
    bases: float


def distances(state: Mapping[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Distances:
    """How far a ControlNet is from the base that it comes from and from the one that it goes to.

    A trained copy lies near its own base, so that it tells where one was named that is not the right one.
    The shapes are those of `transfer_state`.
    """
    before, after = encoder_of(old), encoder_of(new)
    sums = [0.0, 0.0, 0.0]
    for key, own in before.items():
        copied, other = state[key].cpu().reshape(own.shape), after[key]
        for index, (a, b) in enumerate(((copied, own), (copied, other), (own, other))):
            sums[index] += float((a.double() - b.double()).square().sum())
    return Distances(*(total**0.5 for total in sums))


def encoder_digest(unet: Mapping[str, Tensor]) -> str:
    """SHA-256 of a U-Net's encoder, rounded to half precision: the same for its files of either precision."""
    total = hashlib.sha256()
    for key, tensor in sorted(encoder_of(unet).items()):
        half = tensor.detach().to("cpu", torch.float16).contiguous().reshape(-1)
        total.update(f"{key} {tuple(tensor.shape)}\n".encode())
        total.update(half.view(torch.uint8).numpy().data)
    return total.hexdigest()

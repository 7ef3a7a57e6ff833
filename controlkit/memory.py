"""Generations in little memory: what is done at a time, and what rests on the processor meanwhile.

Measures, in the order of what they cost, which is the order in which `memory_plan.fit` takes them:

    sliced-vae    pictures are decoded one by one: nothing
    offload       text encoders, the pair and the autoencoder are on the device only while they work: moving
                  their weights, once for each batch of pictures
    batch=N       fewer pictures are denoised at once, down to one: time, where a device is not filled
    one-branch    unconditional and conditional branch one after the other: time, and rounding
    tiled-vae     the autoencoder works in overlapping tiles: differences that can be seen when looked for

The first two leave every bit as it was. On the processor itself nothing can be moved away, and `offload` does
nothing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from controlkit import limits

if TYPE_CHECKING:
    from controlkit.base import Base

HOST = "cpu"  # where networks rest
_BATCH = re.compile(r"batch=([1-9]\d*)")


@dataclass(frozen=True)
class Memory:
    """The measures that a generation takes, and how many pictures it denoises at once.

    Raises ValueError for a number of pictures that is no whole number from 1.
    """

    batch_size: int
    sliced_vae: bool = False
    offload: bool = False
    one_branch: bool = False
    tiled_vae: bool = False

    def __post_init__(self) -> None:
        limits.check_batch(self.batch_size, may_be_none=False)

    @property
    def measures(self) -> tuple[str, ...]:
        """Their names, as the module's text has them."""
        switches = ("sliced_vae", "offload", "one_branch", "tiled_vae")
        names = [name.replace("_", "-") for name in switches if getattr(self, name)]
        return (*names, f"batch={self.batch_size}")

    @classmethod
    def of(cls, measures: Iterable[str]) -> Memory:
        """Measures by their names, or one. Raises ValueError for another name."""
        memory = cls(1)
        for name in [measures] if isinstance(measures, str) else measures:
            batch = _BATCH.fullmatch(str(name))
            if batch is not None:
                memory = replace(memory, batch_size=int(batch[1]))
            elif name in ("sliced-vae", "offload", "one-branch", "tiled-vae"):
                memory = replace(memory, **{name.replace("-", "_"): True})
            else:
                raise ValueError(f"{name!r} is none of the ways to save memory that this version knows")
        return memory


@contextlib.contextmanager
def kept_small(memory: Memory | None, base: Base, *controlnets: Any) -> Iterator[None]:
    """Within the block the measures are taken: the networks start where they belong, and end where they
    were.
    """
    if memory is None:
        yield
        return
    networks = (*base.encoders, base.unet, *controlnets, base.vae)
    before, slices = [network.device for network in networks], memory.sliced_vae and not base.vae.use_slicing
    try:  # a device that is too small for one of them leaves none on it
        for network in networks:
            network.to(HOST if memory.offload else base.device)
        if slices:
            base.vae.enable_slicing()
        yield
    finally:
        if slices:
            base.vae.disable_slicing()
        for network, place in zip(networks, before, strict=True):
            network.to(place)


@contextlib.contextmanager
def at_work(memory: Memory | None, base: Base, *networks: Any) -> Iterator[None]:
    """Within the block the networks are on the base's device, behind it they rest again, if they are to."""
    if memory is None or not memory.offload:
        yield
        return
    try:
        for network in networks:
            network.to(base.device)
        yield
    finally:
        for network in networks:
            network.to(HOST)
        if base.device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # or the room of one network is not whole enough for the next


def rested(base: Base, device: torch.device) -> Base:
    """A base that was loaded on the processor, told to work on a device that has little memory."""
    return replace(base, device=device)

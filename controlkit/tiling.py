"""Large pictures in tiles: what the networks see at once has a bounded size, and no seam shows.

In every step the pair predicts each of the overlapping tiles by itself, under its part of the maps, and the
predictions are averaged under smooth windows before the scheduler takes the step on the whole
(MultiDiffusion: Bar-Tal et al. 2023, arXiv:2302.08113, equation 5, for samplers linear in the prediction).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from controlkit import limits
from controlkit.applying import EncodedControl, Rows
from controlkit.kinds import map_hint

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.predicting import Predictor


@dataclass(frozen=True)
class Tiles:
    """How a picture is cut: squares of `size` pixels (multiples of 64) that overlap by the share `overlap`.

    Raises ValueError for a number outside its range.
    """

    size: int
    overlap: float = 0.25

    def __post_init__(self) -> None:
        limits.check_tile(self.size)
        if not 0.1 <= limits.number(self.overlap) <= 0.75:
            raise ValueError(f"tiles overlap by a share from 0.1 to 0.75, not {self.overlap!r}")


class Window(NamedTuple):
    """A tile's place in the latents."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor) -> Tensor:
        """The tile's part of (..., h, w)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def windows(height: int, width: int, *, size: int, overlap: float) -> list[Window]:
    """Tiles of `size` latents that cover height x width, evenly spaced, overlapping at least so much."""
    return [
        Window(top, left, min(size, height), min(size, width))
        for top, left in itertools.product(_starts(height, size, overlap), _starts(width, size, overlap))
    ]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    if length <= size:
        return [0]
    count = math.ceil((length - size) / (size * (1 - overlap))) + 1
    return [round(k * (length - size) / (count - 1)) for k in range(count)]


def window_weights(height: int, width: int) -> Tensor:
    """(height, width) weights that fall smoothly from the middle and are nowhere zero: sin^2 by sin^2."""
    rows, columns = (
        torch.sin(math.pi * (torch.arange(n, dtype=torch.float32) + 0.5) / n).square()
        for n in (height, width)
    )
    return rows[:, None] * columns[None, :] + 1e-4


class TiledPredictor:
    """A `Predictor` for pictures of any size, made of one for each tile."""

    def __init__(self, whole: Predictor, tiles: Tiles, *, height: int, width: int) -> None:
        """height, width: of the latents."""
        base = whole.base
        cells = tiles.size // base.vae_factor
        self.windows = windows(height, width, size=cells, overlap=tiles.overlap)
        self.parts = [_part_of(whole, window, height, width) for window in self.windows]
        self.weights = [window_weights(w.height, w.width).to(base.device) for w in self.windows]
        total = torch.zeros(height, width, device=base.device)
        for window, weight in zip(self.windows, self.weights, strict=True):
            window.of(total).add_(weight)
        self.total = total

    def __call__(self, noisy_latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """``model_pred`` (B, C, h, w), float32, as `Predictor` gives it."""
        summed = torch.zeros_like(noisy_latents, dtype=torch.float32)
        for window, weight, part in zip(self.windows, self.weights, self.parts, strict=True):
            window.of(summed).add_(part(window.of(noisy_latents), timestep, step) * weight)
        return summed / self.total


def _part_of(whole: Predictor, window: Window, height: int, width: int) -> Predictor:
    """A predictor for a tile."""
    return replace(
        whole,
        controls=[_cut(control, window, height, width) for control in whole.controls],
        rows=_told_where(whole.rows, window, whole.base, height, width),
        shown=None if whole.shown is None else window.of(whole.shown),
        deep={},
    )


def _cut(encoded: EncodedControl, window: Window, height: int, width: int) -> EncodedControl:
    region = encoded.region
    if region is not None:
        region = torch.nn.functional.interpolate(region, size=(height, width), mode="bilinear")
        region = window.of(region)
    part = lambda tensor: window.of(tensor) if tensor.dim() == 4 else tensor  # noqa: E731
    return replace(encoded, hint=map_hint(encoded.hint, part), region=region, regions={}, last={})


def _told_where(rows: Rows, window: Window, base: Base, height: int, width: int) -> Rows:
    """SDXL is told the size of the whole and the tile's place in it, as it was of crops in its training."""
    if rows.added_cond is None:
        return rows
    factor, time_ids = base.vae_factor, rows.added_cond["time_ids"]
    sizes = [height, width, window.top, window.left, window.height, window.width]
    told = torch.tensor([factor * size for size in sizes], dtype=time_ids.dtype, device=time_ids.device)
    return rows.with_added({**rows.added_cond, "time_ids": told.expand(len(time_ids), -1)})


@contextlib.contextmanager
def tiled_vae(base: Base, tiled: bool) -> Iterator[None]:
    """Within the block the autoencoder works in tiles, too, if so told, and behind it as it did before."""
    before = base.vae.use_tiling
    if not tiled or before:
        yield
        return
    base.vae.enable_tiling()
    try:
        yield
    finally:
        base.vae.disable_tiling()

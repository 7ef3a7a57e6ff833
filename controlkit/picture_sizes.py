"""How large the pictures of a generation are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from controlkit import limits

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.control import Control
    from controlkit.starting import Start

MOST_CUT = 0.05  # of a map, to have the sides that networks are best at
AREA_FACTOR = 2.0  # a map whose area is within this factor of the base's native area keeps its size


def picture_size(
    base: Base,
    map_size: tuple[int, int] | None,
    width: int | None = None,
    height: int | None = None,
    *,
    any_area: bool = False,
) -> tuple[int, int]:
    """Width and height to generate, in pixels.

    map_size: width and height of the first map, None without one. A given width or height is kept, and one
    that is given alone brings the other in the map's shape, to a multiple of 8. With neither given the map
    decides: its own size, to multiples of 8, when its area is within a factor of 2 of the base's native area,
    else its shape at the native area: to multiples of the U-Net's coarsest cell (64 pixels) where that cuts
    off no more than `MOST_CUT`, else of a half, a quarter or an eighth of it. Never a side outside
    `limits.SIZE_RANGE`, however thin the map is. Without a map the picture is the native square.
    any_area: keep the map's size however large it is, as pictures in tiles do.
    Raises ValueError for a given side that is no multiple of 8.
    """
    limits.check_size(width, height)
    if map_size and width and not height:
        return width, _allowed_side(width * map_size[1] / map_size[0], base.vae_factor)
    if map_size and height and not width:
        return _allowed_side(height * map_size[0] / map_size[1], base.vae_factor), height
    native = base.resolution
    map_width, map_height = map_size or (native, native)
    ratio = (native * native / (map_width * map_height)) ** 0.5  # factor to the native area, per side
    cell = base.vae_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    if any_area or 1 / AREA_FACTOR <= ratio * ratio <= AREA_FACTOR:
        ratio, cell = 1.0, base.vae_factor
    while True:
        free = tuple(_allowed_side(side * ratio, cell) for side in (map_width, map_height))
        if cell <= base.vae_factor or share_cut((map_width, map_height), *free) <= MOST_CUT:
            return width or free[0], height or free[1]
        cell //= 2


def share_cut(size: tuple[int, int], width: int, height: int) -> float:
    """The share of a picture of a size that lies outside width x height, which it covers."""
    ratio = size[0] * height / (size[1] * width)
    return 1 - min(ratio, 1 / ratio)


def natural_size(controls: Sequence[Control], start: Start | None) -> tuple[int, int] | None:
    """Width and height of what decides the size."""
    if controls:
        return controls[0].size
    return None if start is None else (start.picture.shape[1], start.picture.shape[0])


def _allowed_side(side: float, cell: int) -> int:
    """The multiple of `cell` nearest to a side, in pixels, within what is allowed."""
    low, high = limits.SIZE_RANGE
    return min(max(round(side / cell) * cell, cell, low), high)

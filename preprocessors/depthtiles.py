"""Depth of large pictures: one estimate of the whole, refined by estimates of overlapping tiles.

A network sees a large picture reduced to a few hundred pixels. Tiles show it the detail, but each tile's
depth has a scale and a shift of its own and no idea of the whole: so each is fitted to the whole's estimate.
"""

from collections.abc import Callable, Sequence

import numpy as np

Estimate = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
"""From pictures, uint8 (H, W, 3), to their inverse depth, float32 (H, W)."""

_OVERLAP = 1 / 3  # of a tile's side, that it shares with its neighbour at least


def tiled_depth(estimate: Estimate, picture: np.ndarray, tile: int) -> np.ndarray:
    """Return the inverse depth of a picture, uint8 (H, W, 3), by tiles of ``tile`` pixels: float32 (H, W).

    Each tile is brought to the whole's estimate by the scale and shift of least squares, and blended into its
    neighbours by windows that fall to zero at its edges, so that there are no seams (:func:`fitted`). A
    picture that fits into one tile is estimated as it is.
    """
    (whole,) = estimate([picture])
    height, width = whole.shape
    if max(height, width) <= tile:
        return whole
    tall, wide = min(tile, height), min(tile, width)
    window = np.outer(_window(tall, height), _window(wide, width))
    total = np.zeros((height, width), np.float32)
    weight = np.zeros((height, width), np.float32)
    for top in _starts(height, tall):
        boxes = [np.s_[top : top + tall, left : left + wide] for left in _starts(width, wide)]
        for box, part in zip(boxes, estimate([picture[box] for box in boxes]), strict=True):
            total[box] += window * fitted(part, whole[box])
            weight[box] += window
    return total / weight


def fitted(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return ``part`` (H, W) with the scale and shift that bring it closest to ``whole``, in least squares.

    It counts as far as the two agree, by the square of their correlation; the rest is ``whole``. Where they
    contradict each other (a scale of zero or less), or one is constant, that is all there is.
    """
    centred = part - part.mean(dtype=np.float64)
    target = whole - whole.mean(dtype=np.float64)
    variance, covariance = float((centred * centred).mean()), float((centred * target).mean())
    if covariance <= 0 or variance <= 1e-12 * float(part.mean(dtype=np.float64)) ** 2:
        return whole
    scale = covariance / variance
    agreement = scale * covariance / float((target * target).mean())
    return (whole + agreement * (scale * centred - target)).astype(np.float32)


def _starts(length: int, tile: int) -> list[int]:
    """Return where tiles begin that cover a length evenly, each overlapping the next by a third or more."""
    step = tile - int(tile * _OVERLAP)
    count = 1 + -(-(length - tile) // step)
    return [round(start) for start in np.linspace(0, length - tile, count)]


def _window(tile: int, length: int) -> np.ndarray:
    """Return the weights along a tile's side: 1 in its middle, falling as a squared sine to almost 0."""
    if tile == length:
        return np.ones(tile, np.float32)
    ramp = max(1, int(tile * _OVERLAP))
    to_edge = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 0.5
    return (np.sin(0.5 * np.pi * np.minimum(to_edge / ramp, 1.0)) ** 2).astype(np.float32)

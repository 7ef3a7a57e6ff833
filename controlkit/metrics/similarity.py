"""How much do two pictures look alike, window by window? For maps that are drawn, not binary."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from controlkit.metrics.arrays import same_shaped

WINDOW = 11  # pixels, of a Gaussian of spread 1.5
_SPREAD = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_BEYOND = 1e-3  # of [0, 1], by which resampling and rounding may overshoot
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_LEAST = WINDOW * 2 ** (len(SCALE_WEIGHTS) - 1)
"""The shortest side, in pixels, whose smallest scale still holds a window."""


def ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity of two pictures (H, W) in [0, 1], at most 1: Wang, Bovik, Sheikh & Simoncelli
    2004, equation 13, with their Gaussian window (spread 1.5) and constants, over windows that fit inside.

    Raises ValueError: the shapes differ, a side is shorter than the window, 11 pixels, or numbers are whole
    or outside of [0, 1].
    """
    luminance, structure = _parts(*_checked("ssim", a, b, least=WINDOW))
    return float((luminance * structure).mean())


def ms_ssim(a: ArrayLike, b: ArrayLike) -> float:
    """Structural similarity over five scales of two pictures (H, W) in [0, 1]: Wang, Simoncelli & Bovik 2003,
    equation 7, with their weights; each scale is the mean of 2 x 2 pixels of the one before.

    A negative mean counts as 0, so that its power exists. As in the paper, windows lie inside the picture at
    every scale; torchmetrics 1.9 reflects the borders of the coarsest one, and differs where that is small.
    Raises ValueError: as `ssim`, the shortest side being `MS_SSIM_LEAST`.
    """
    x, y = _checked("ms_ssim", a, b, least=MS_SSIM_LEAST)
    product = 1.0
    for scale, weight in enumerate(SCALE_WEIGHTS):
        luminance, structure = _parts(x, y)
        is_last = scale == len(SCALE_WEIGHTS) - 1
        mean = float((luminance * structure if is_last else structure).mean())
        product *= max(mean, 0.0) ** weight
        x, y = _halved(x), _halved(y)
    return product


def _parts(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Luminance, and contrast times structure, of every window that fits inside."""

    def mean(image: NDArray[Any]) -> NDArray[Any]:
        return cv2.GaussianBlur(image, (WINDOW, WINDOW), _SPREAD)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    luminance = (2 * mu_x * mu_y + _C1) / (mu_x**2 + mu_y**2 + _C1)
    structure = (2 * cov + _C2) / (var_x + var_y + _C2)
    inside = slice(WINDOW // 2, -(WINDOW // 2))
    return luminance[inside, inside], structure[inside, inside]


def _halved(image: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = image.shape[0] // 2, image.shape[1] // 2
    return np.asarray(
        image[: 2 * height, : 2 * width].reshape(height, 2, width, 2).mean(axis=(1, 3), dtype=np.float64)
    )


def _checked(
    what: str, a: ArrayLike, b: ArrayLike, *, least: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x, y = same_shaped(what, a, b)
    if x.ndim != 2 or min(x.shape) < least:
        raise ValueError(f"{what}: wanted are pictures (H, W) with sides of {least} or more, not {x.shape}")
    whole = next((one.dtype for one in (x, y) if np.issubdtype(one.dtype, np.integer)), None)
    if whole is not None:  # the constants are those of [0, 1]: of 0 to 255 they would stand for nothing
        raise ValueError(f"{what}: wanted are floats in [0, 1], not {whole}")
    x, y = x.astype(np.float64), y.astype(np.float64)
    for one in (x, y):
        if not (one.min() >= -_BEYOND and one.max() <= 1 + _BEYOND):  # also where one is NaN
            raise ValueError(f"{what}: wanted are floats in [0, 1], not from {one.min():g} to {one.max():g}")
    return x, y

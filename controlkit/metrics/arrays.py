"""What the metrics ask of their arrays, said once."""

import numpy as np
from numpy.typing import ArrayLike


def same_shaped(what: str, pred: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays, lists and PIL images too; a one-line `ValueError` unless their shapes agree."""
    first, second = np.asarray(pred), np.asarray(true)
    if first.shape != second.shape:
        raise ValueError(f"{what}: the two differ in shape, {first.shape} and {second.shape}")
    return first, second


def as_mask(what: str, mask: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Return `mask` as bool (H, W), selecting at least one pixel of a picture of `shape` (H, W)."""
    region = np.asarray(mask, dtype=bool)
    if region.shape != shape:
        raise ValueError(f"{what}: the mask is {region.shape}, the picture {shape}")
    if not region.any():
        raise ValueError(f"{what}: the mask selects no pixel")
    return region

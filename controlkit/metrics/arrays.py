"""What the metrics ask of their arrays, said once."""

import numpy as np


def check_same_shape(what: str, pred: np.ndarray, true: np.ndarray) -> None:
    """Raise a one-line `ValueError` unless both arrays have the same shape."""
    if pred.shape != true.shape:
        raise ValueError(f"{what}: the two differ in shape, {pred.shape} and {true.shape}")


def as_mask(what: str, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return `mask` as bool (H, W), selecting at least one pixel of a picture of `shape` (H, W)."""
    mask = np.asarray(mask, dtype=bool)
    if mask.shape != shape:
        raise ValueError(f"{what}: the mask is {mask.shape}, the picture {shape}")
    if not mask.any():
        raise ValueError(f"{what}: the mask selects no pixel")
    return mask

"""Arrays of any accepted type as pictures: uint8, (H, W, 3)."""

import numpy as np


def array_to_rgb(array: np.ndarray, name: str, *, behind: int = 255) -> np.ndarray:
    """An array (H, W) or (H, W, 1, 3 or 4) as a picture. behind: the grey level behind what is transparent.

    Raises ValueError, beginning with ``name``, for another shape, type or range.
    """
    array = np.asarray(array)  # of a masked one what lies beneath, which its own minimum would leave out
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"{name} has the shape {array.shape}; a picture is (height, width) or (height, width, 1, 3 or 4)"
        )
    levels = _to_levels(array, name)
    if levels.shape[2] == 4:
        return over(levels, behind)
    if levels.shape[2] == 1:
        levels = np.broadcast_to(levels, (*levels.shape[:2], 3))
    return np.ascontiguousarray(levels)


def _to_levels(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of any accepted type as uint8 levels, of the same shape."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} has the type {array.dtype}, not uint8, uint16, bool or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also when either is NaN
        raise ValueError(f"{name} has float values from {low:g} to {high:g}; they must lie in [0, 1]")
    return np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8)


def over(rgba: np.ndarray, behind: int) -> np.ndarray:
    """uint8 (H, W, 4) on a grey level, (H, W, 3)."""
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + behind * (255 - alpha) + 127) // 255).astype(np.uint8)

"""What the metrics ask of their arrays, said once."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from controlkit.naming import kind_of_value


def as_numbers(what: str, given: Any) -> np.ndarray:
    """Return an array, or what becomes one (a list, a PIL image, a tensor, a map), as an array of numbers.

    Raises a one-line `ValueError` for anything else.
    """
    if hasattr(given, "detach"):  # a tensor, whose graph and half precision numpy does not know
        given = given.detach().cpu()
        given = given.double() if given.is_floating_point() else given
    try:
        numbers = np.asarray(given)
    except ValueError as error:
        raise ValueError(f"{what}: the rows of {kind_of_value(given)} differ in length") from error
    if numbers.dtype.kind not in "biuf":
        raise ValueError(f"{what}: wanted are numbers in an array, not {kind_of_value(given)}")
    return numbers


def same_shaped(what: str, pred: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays of numbers; a one-line `ValueError` unless their shapes agree."""
    first, second = as_numbers(what, pred), as_numbers(what, true)
    if first.shape != second.shape:
        raise ValueError(f"{what}: the two differ in shape, {first.shape} and {second.shape}")
    return first, second


def as_mask(what: str, mask: ArrayLike, shape: tuple[int, ...]) -> np.ndarray:
    """Return `mask` as bool (H, W), selecting at least one pixel of a picture of `shape` (H, W)."""
    region = as_numbers(what, mask).astype(bool)
    if region.shape != shape:
        raise ValueError(f"{what}: the mask is {region.shape}, the picture {shape}")
    if not region.any():
        raise ValueError(f"{what}: the mask selects no pixel")
    return region

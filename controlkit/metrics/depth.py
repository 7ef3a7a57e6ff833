"""Is the depth of a generated picture the depth that was asked for?"""

import numpy as np
from numpy.typing import ArrayLike

from controlkit.metrics.arrays import as_mask, same_shaped


def depth_rmse(pred: ArrayLike, true: ArrayLike, *, mask: ArrayLike | None = None) -> float:
    """Root mean square error after the best scale and shift of `pred`, in the unit of `true`.

    Monocular estimators predict inverse depth up to an unknown scale and shift; both are fitted by least
    squares first, as in MiDaS (Ranftl et al. 2020, equations 3 and 4), except that the scale cannot be
    negative: near and far exchanged is an error. The result is at most the standard deviation of `true`,
    which is what a constant prediction gets.

    Args:
        pred: relative inverse depth, (H, W), near is large.
        true: inverse depth, (H, W); finite wherever the mask selects (the sky's inverse depth is 0).
        mask: bool (H, W), the pixels that count; all of them by default.

    Raises:
        ValueError: the shapes differ, no pixel counts, or a value that counts is not finite.
    """
    found, wanted = same_shaped("depth_rmse", pred, true)
    keep = np.ones(wanted.shape, bool) if mask is None else as_mask("depth_rmse", mask, wanted.shape)
    x, y = found[keep].astype(np.float64), wanted[keep].astype(np.float64)
    _check_finite("depth_rmse", x, y, cure="; mask them out")
    x, y = x - x.mean(), y - y.mean()  # the best shift
    variance = float(x @ x)
    scale = max(float(x @ y) / variance, 0.0) if variance > 0 else 0.0
    return float(np.sqrt(np.mean((scale * x - y) ** 2)))


def depth_rmse_255(pred_map: ArrayLike, true_map: ArrayLike) -> float:
    """Root mean square difference of two depth maps in grey levels (0 to 255), as in ControlNet++.

    Nothing is fitted: both are maps as the depth preprocessor makes them, (H, W) or (H, W, 3) with values in
    [0, 255], so each has its own nearest point at 255 and its farthest at 0.

    Raises:
        ValueError: the shapes differ, there is no pixel, or a value is not finite.
    """
    found, wanted = same_shaped("depth_rmse_255", pred_map, true_map)
    _check_finite("depth_rmse_255", found, wanted)
    difference = found.astype(np.float64) - wanted.astype(np.float64)
    return float(np.sqrt(np.mean(difference**2)))


def _check_finite(what: str, pred: np.ndarray, true: np.ndarray, *, cure: str = "") -> None:
    """Raise ValueError unless there are values, and all are finite numbers."""
    if not true.size:
        raise ValueError(f"{what}: there is no pixel to compare")
    for name, values in (("pred", pred), ("true", true)):
        if not np.isfinite(values).all():
            raise ValueError(f"{what}: {name} has values that are not finite{cure}")

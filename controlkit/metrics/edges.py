"""Do the edges of a generated picture lie where the map asked for them?"""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import ArrayLike

from controlkit.limits import number
from controlkit.metrics.arrays import same_shaped

_CHANNELS = ((), (1,), (3,))  # no alpha, which is above 0 everywhere


@dataclass(frozen=True)
class EdgeScore:
    """Agreement of two edge maps, each value in [0, 1]; 1 is best."""

    f1: float
    """Harmonic mean of precision and recall."""
    precision: float
    """Share of the predicted edge pixels that lie on a true edge."""
    recall: float
    """Share of the true edge pixels that were predicted."""


def edge_f1(pred_map: ArrayLike, true_map: ArrayLike, *, tolerance: float = 2) -> EdgeScore:
    """Compare two binary edge maps, allowing edges to be `tolerance` pixels (Euclidean) out of place.

    A pixel counts as matched if the other map has an edge within `tolerance`. This is the boundary measure
    of the Berkeley segmentation benchmark (Martin, Fowlkes, Malik 2004) without its one-to-one assignment, so
    one edge may vouch for several. `tolerance=0` is the strict F1 that ControlNet++ (Li et al. 2024) reports.

    Args:
        pred_map: edges of the generated picture, (H, W) or (H, W, 3); anything above 0 is an edge.
        true_map: the map that was asked for, same shape.
        tolerance: in pixels, 0 or more.

    Returns:
        The score; two maps without any edge agree perfectly (1), one empty map scores 0.

    Raises:
        ValueError: the shapes differ or are none of a map's, or the tolerance is negative or not a number.
    """
    maps = same_shaped("edge_f1", pred_map, true_map)
    if maps[0].ndim < 2 or maps[0].shape[2:] not in _CHANNELS:
        raise ValueError(f"edge_f1: an edge map is (H, W) or (H, W, 3), not {maps[0].shape}")
    if not number(tolerance) >= 0:
        raise ValueError(f"edge_f1: tolerance is {tolerance}, allowed is 0 or more pixels")
    pred, true = (_is_edge(one) for one in maps)
    if not pred.any() and not true.any():
        return EdgeScore(f1=1.0, precision=1.0, recall=1.0)
    precision = _share_near(pred, true, tolerance)
    recall = _share_near(true, pred, tolerance)
    total = precision + recall
    return EdgeScore(f1=2 * precision * recall / total if total else 0.0, precision=precision, recall=recall)


def _is_edge(edge_map: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, C) -> bool (H, W)."""
    edge = edge_map > 0
    return np.any(edge, axis=2) if edge.ndim == 3 else edge


def _share_near(edge: np.ndarray, other: np.ndarray, tolerance: float) -> float:
    """Share of the pixels of `edge` with a pixel of `other` within `tolerance`; 0 if either is empty."""
    if not edge.any() or not other.any():
        return 0.0
    distance = cv2.distanceTransform((~other).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return float(np.mean(distance[edge] <= np.float32(tolerance)))  # as exact as the distances are

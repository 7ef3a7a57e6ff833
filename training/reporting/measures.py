"""What a generated picture's map is compared with, and how: edges, depth, joints, or the map as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from controlkit.metrics import depth_rmse, edge_f1, pck

if TYPE_CHECKING:
    from controlkit.preprocessors import Preprocessor
    from controlkit.training.reporting.scores import Pair

LOWER_IS_BETTER = frozenset({"depth error", "map error"})
_EDGE_KINDS = ("canny", "mlsd", "scribble")
_DEPTH_KINDS = ("depth", "leres", "midas", "zoe")
_SMALLEST_PERSON = 8  # pixels; a tenth of less is below a joint's own uncertainty
Values = dict[str, float]
Measure = Callable[["NDArray[np.uint8]", int], Values]
"""Scores of a picture that was generated for the pair of a number; {} where there is nothing to score."""


def ssim(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Structural similarity of two pictures (H, W) in [0, 1], at most 1: Wang, Bovik, Sheikh & Simoncelli
    2004, equation 13, with their Gaussian window (spread 1.5) and constants, over windows that fit inside.
    """
    x, y = a.astype(np.float64), b.astype(np.float64)

    def mean(image: NDArray[Any]) -> NDArray[Any]:
        return cv2.GaussianBlur(image, (11, 11), 1.5)

    mu_x, mu_y = mean(x), mean(y)
    var_x, var_y, cov = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    c1, c2 = 0.01**2, 0.03**2
    quality = (2 * mu_x * mu_y + c1) * (2 * cov + c2) / ((mu_x**2 + mu_y**2 + c1) * (var_x + var_y + c2))
    return float(quality[5:-5, 5:-5].mean())


def measure_of(kind: str) -> Callable[[Sequence[Pair], Preprocessor], Measure]:
    """How a kind of map is scored: given the pairs and a preprocessor, what makes numbers of a picture."""
    if kind in _EDGE_KINDS:
        return _edges
    if kind in _DEPTH_KINDS:
        return _depth
    return _joints if kind == "openpose" else _maps


def _edges(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """Edge F1, tolerance 2 pixels, of the picture's edges and the map."""
    wanted = [pair.map.max(axis=2) for pair in pairs]
    return lambda picture, index: {
        "edge F1": edge_f1(preprocessor(picture).image.max(axis=2), wanted[index]).f1
    }


def _depth(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """Root mean square error of depth after scale and shift, in units of the map's range."""

    def measure(picture: NDArray[np.uint8], index: int) -> Values:
        found = preprocessor(picture)
        pred = _grey(found.image) if found.depth is None else found.depth
        return {"depth error": depth_rmse(pred, _grey(pairs[index].map))}

    return measure


def _joints(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """Share of the joints that are found within a tenth of their person's size."""
    wanted = true_poses(pairs, preprocessor)

    def measure(picture: NDArray[np.uint8], index: int) -> Values:
        if index not in wanted:
            return {}
        poses = preprocessor(picture).poses
        assert poses is not None, preprocessor.kind
        return {"joints": joints_right(poses.people, wanted[index])}

    return measure


def _maps(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """For any other kind: how much the picture's map is like the one that was asked for."""

    def measure(picture: NDArray[np.uint8], index: int) -> Values:
        pred, true = _grey(preprocessor(picture).image), _grey(pairs[index].map)
        return {"map SSIM": ssim(pred, true), "map error": float(np.abs(pred - true).mean())}

    return measure


def joints_right(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Share of the visible joints of `wanted` (P, 18, 3) that `found` (Q, 18, 3) has in place.

    People are paired one to one, greedily, best agreement first; whoever finds no partner has every joint
    wrong. In place is within a tenth of the person's size, the longer side of the box around the joints.
    """
    visible = (wanted[..., 2] > 0).sum(axis=1)
    shares = np.array([[pck(pose, true, size=_size(true)) for pose in found] for true in wanted])
    shares = shares.reshape(len(wanted), len(found))
    right = 0.0
    for _ in range(min(shares.shape)):
        person, partner = np.unravel_index(np.argmax(shares), shares.shape)
        right += max(shares[person, partner], 0.0) * visible[person]
        shares[person, :], shares[:, partner] = -1, -1
    return float(right / visible.sum())


def true_poses(pairs: Sequence[Pair], preprocessor: Preprocessor | None) -> Mapping[int, NDArray[Any]]:
    """The people of each pair that has any large enough, from its file or else from its picture."""
    people: dict[int, NDArray[Any]] = {}
    for index, pair in enumerate(pairs):
        poses = pair.poses
        if poses is None and preprocessor is not None:
            poses = preprocessor(pair.picture).poses
        seen = [pose for pose in ([] if poses is None else poses.people) if _size(pose) >= _SMALLEST_PERSON]
        if seen:
            people[index] = np.stack(seen)
    return people


def _size(pose: NDArray[Any]) -> float:
    points = pose[pose[:, 2] > 0, :2]
    return float(np.ptp(points, axis=0).max()) if len(points) else 0.0


def _grey(image: NDArray[Any]) -> NDArray[np.float32]:
    """(H, W, C) uint8 or uint16 -> (H, W) in [0, 1]."""
    return np.asarray(image.mean(axis=2, dtype=np.float32) / np.iinfo(image.dtype).max)

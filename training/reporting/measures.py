"""What a generated picture's map is compared with, and how: edges, depth, joints, or the map as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit.metrics import depth_rmse, edge_f1, pck, ssim

if TYPE_CHECKING:
    from controlkit.preprocessors import Preprocessor
    from controlkit.training.reporting.scores import Pair

LOWER_IS_BETTER = frozenset({"depth error", "map error"})
EDGE_KINDS = ("canny", "mlsd", "scribble")
DEPTH_KINDS = ("depth", "leres", "midas", "zoe")
_BETWEEN = (32, 127)  # of 255
SMALLEST_PERSON = 8  # pixels; a tenth of less is below a joint's own uncertainty
Values = dict[str, float]
Measure = Callable[["NDArray[np.uint8]", int], Values]
"""Scores of a picture that was generated for the pair of a number; {} where there is nothing to score."""


def measure_of(kind: str) -> Callable[[Sequence[Pair], Preprocessor], Measure]:
    """How a kind of map is scored: given the pairs and a preprocessor, what makes numbers of a picture."""
    if kind in EDGE_KINDS:
        return _edges
    if kind in DEPTH_KINDS:
        return _depth
    return _joints if kind == "openpose" else _maps


def _edges(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """Edge F1, tolerance 2 pixels, of the picture's edges and the map."""
    wanted = [black_and_white(pair.map) for pair in pairs]
    return lambda picture, index: {
        "edge F1": edge_f1(black_and_white(preprocessor(picture).image), wanted[index]).f1
    }


def black_and_white(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """Lines of a map (H, W, C) as 0 and 255, (H, W): what JPEG or resizing left grey is one of both.

    Between them is the level of Otsu 1979, at least an eighth of white (noise of an empty map is none) and at
    most half of it. Maps that are black and white stay what they are.
    """
    import cv2

    bright = levels.max(axis=2)
    eight = (bright >> 8).astype(np.uint8) if bright.dtype == np.uint16 else bright.astype(np.uint8)
    level, _ = cv2.threshold(eight, 0, 255, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    return np.where(eight > np.clip(level, *_BETWEEN), 255, 0).astype(np.uint8)


def _depth(pairs: Sequence[Pair], preprocessor: Preprocessor) -> Measure:
    """Root mean square error of depth after scale and shift, in units of the map's range."""

    def measure(picture: NDArray[np.uint8], index: int) -> Values:
        found = preprocessor(picture)
        pred = grey(found.image) if found.depth is None else found.depth
        return {"depth error": depth_rmse(pred, grey(pairs[index].map))}

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
        pred, true = grey(preprocessor(picture).image), grey(pairs[index].map)
        return {"map SSIM": ssim(pred, true), "map error": float(np.abs(pred - true).mean())}

    return measure


def joints_right(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Share of the visible joints of `wanted` (P, 18, 3) that `found` (Q, 18, 3) has in place.

    People are paired one to one, greedily, best agreement first; whoever finds no partner has every joint
    wrong. In place is within a tenth of the person's size, the longer side of the box around the joints.
    """
    visible = (wanted[..., 2] > 0).sum(axis=1)
    shares = np.array([[pck(pose, true, size=person_size(true)) for pose in found] for true in wanted])
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
        seen = large_enough([] if poses is None else poses.people)
        if seen is not None:
            people[index] = seen
    return people


def large_enough(people: Iterable[NDArray[Any]]) -> NDArray[Any] | None:
    """Of people (18, 3) those whose joints can be told apart, (P, 18, 3); None where there is nobody."""
    seen = [pose for pose in people if person_size(pose) >= SMALLEST_PERSON]
    return np.stack(seen) if seen else None


def person_size(pose: NDArray[Any]) -> float:
    """The longer side of the box around a person's visible joints, in pixels."""
    points = pose[pose[:, 2] > 0, :2]
    return float(np.ptp(points, axis=0).max()) if len(points) else 0.0


def grey(image: NDArray[Any]) -> NDArray[np.float32]:
    """(H, W, C) uint8 or uint16 -> (H, W) in [0, 1]."""
    return np.asarray(image.mean(axis=2, dtype=np.float32) / np.iinfo(image.dtype).max)

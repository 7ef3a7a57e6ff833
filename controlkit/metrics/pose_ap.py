"""Are the people of a map found in the generated pictures? COCO's average precision, over many pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controlkit.metrics.arrays import as_numbers
from controlkit.metrics.pose import oks
from controlkit.naming import check_list_of

THRESHOLDS = tuple(float(t) for t in np.linspace(0.5, 0.95, 10))
_MOST_FOUND = 20  # detections of a picture that count, as in COCO's evaluation of keypoints
_RECALLS = np.linspace(0, 1, 101)
_AREA_OF_BOX = 0.53  # a person's area by that of the box around the joints, as in xtcocotools and MMPose


@dataclass(frozen=True, eq=False)
class Matches:
    """One picture: how alike each person who was found is to each who was asked for.

    similarity: (found, asked for), OKS in [0, 1]. scores: (found,), how sure the estimator was.
    """

    similarity: NDArray[np.float64]
    scores: NDArray[np.float64]


def matches(found: ArrayLike, wanted: ArrayLike) -> Matches:
    """Compare all people who were found (Q, K, 3) with all who were asked for (P, K, 3), K = 17 or 18.

    A person's area is 0.53 of the box around the visible joints, and the score of one who was found the mean
    of the visible joints' scores. Raises ValueError as `oks`.
    """
    people, asked = as_numbers("matches", found), as_numbers("matches", wanted)
    similarity = np.array([[oks(pose, true, area=person_area(true)) for true in asked] for pose in people])
    scores = [float(pose[pose[:, 2] > 0, 2].mean()) if (pose[:, 2] > 0).any() else 0.0 for pose in people]
    return Matches(similarity.reshape(len(people), len(asked)), np.array(scores))


def person_area(pose: NDArray[np.float64]) -> float:
    """A person's area in square pixels, from the visible joints (K, 3); at least 1."""
    points = pose[pose[:, 2] > 0, :2]
    sides = np.ptp(points, axis=0) if len(points) else np.zeros(2)
    return max(float(_AREA_OF_BOX * sides[0] * sides[1]), 1.0)


def average_precision(pictures: Sequence[Matches], *, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """OKS-AP in [0, 1]: the mean over thresholds (0.50 to 0.95) of the average precision.

    As COCO's evaluation of keypoints does it: those found, surest first, take the person most like them who
    is still free; precision is interpolated at 101 recalls. Not a number where nobody was asked for. Raises
    ValueError for anything but a list of `matches`, or no threshold.
    """
    check_list_of("pictures", pictures, Matches, "matches(found, wanted)")
    if not np.size(thresholds) or np.ndim(thresholds) != 1:
        raise ValueError(f"average_precision: thresholds is a list of numbers, as [0.5], not {thresholds}")
    ranked = Ranked([[picture] for picture in pictures], thresholds=thresholds)
    return float(ranked.precisions(np.arange(len(pictures))[None])[0])


class Ranked:
    """Groups of pictures (those of one pair), matched and ranked once, for the OKS-AP of many choices."""

    def __init__(
        self, groups: Sequence[Sequence[Matches]], *, thresholds: Sequence[float] = THRESHOLDS
    ) -> None:
        self._asked = np.array([sum(one.similarity.shape[1] for one in group) for group in groups], int)
        scores, of_group, right = [np.zeros(0)], [np.zeros(0, int)], [np.zeros((len(thresholds), 0), bool)]
        for number, picture in ((k, one) for k, group in enumerate(groups) for one in group):
            order = np.argsort(-picture.scores, kind="stable")[:_MOST_FOUND]
            scores.append(picture.scores[order])
            of_group.append(np.full(len(order), number))
            right.append(np.array([_taken(picture.similarity[order], t) for t in thresholds]))
        surest = np.argsort(-np.concatenate(scores), kind="stable")
        self._of_group = np.concatenate(of_group)[surest]
        self._right = np.concatenate(right, axis=1)[:, surest]

    def precisions(self, chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        """The OKS-AP (R,) of groups that are chosen by number (R, N), some more than once."""
        rows, groups = len(chosen), len(self._asked)
        places = (chosen + groups * np.arange(rows)[:, None]).ravel()
        times = np.bincount(places, minlength=rows * groups).reshape(rows, groups)
        total = times @ self._asked
        totals, which = np.unique(total, return_inverse=True)
        recalls = np.arange(total.max() + 1) / np.maximum(totals, 1)[:, None]  # of so many, by hits
        reached = np.searchsorted(_RECALLS, recalls, side="right")
        weights = times[:, self._of_group]  # who is chosen twice is found twice
        found = np.maximum(np.cumsum(weights, axis=1), 1)
        precisions = np.zeros(rows)
        for right in self._right:
            hits = np.cumsum(weights * right, axis=1)
            best = np.maximum.accumulate((hits / found)[:, ::-1], axis=1)[:, ::-1]
            at = np.diff(reached[which[:, None], hits], prepend=0, axis=1)
            precisions += (best * at).sum(axis=1) / len(_RECALLS)
        return np.where(total > 0, precisions / len(self._right), np.nan)


def _taken(similarity: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Whether each of those found, surest first, gets a person of his own."""
    free = np.ones(similarity.shape[1], dtype=bool)
    right = np.zeros(len(similarity), dtype=bool)
    for row, likeness in enumerate(similarity):
        fitting = np.flatnonzero(free & (likeness >= min(threshold, 1 - 1e-10)))
        if len(fitting):
            # of equals COCO's loop keeps the last
            best = fitting[len(fitting) - 1 - np.argmax(likeness[fitting][::-1])]
            free[best], right[row] = False, True
    return right

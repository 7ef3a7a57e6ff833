"""Reading people off OpenPose's heatmaps and part-affinity fields (Cao et al. 2017), without upsampling them.

The rules are those of controlnet_aux's ``Body``: the network's cells are enlarged 8 times (Lanczos), cropped
to the network's picture, resized to the picture (Lanczos, or area where it shrinks) and smoothed (Gaussian,
sigma 3); joints are the local maxima above 0.1. All of these steps are linear and act on each axis alone, so
per axis they are one small matrix (:mod:`.gridmaps`). Smoothed values are then needed only where a bound on
that product exceeds 0.1, and the fields only at 10 points per possible limb.

The product differs from the reference's single-precision steps by rounding. A comparison that is closer than
that is decided on the reference's own steps, so that joints, ties and grouping come out the same.
"""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from controlkit.preprocessors.gridmaps import Grid, is_peak
from controlkit.preprocessors.grouping import Limb, assemble, choose, mean_scores

PEAK = 0.1
"""What a joint's smoothed heatmap must exceed."""
_ON_LIMB = 0.05  # what a field must exceed along a limb
_POINTS = 10  # at which a limb's field is read
_ROUNDING = 2e-6  # by which values may differ from the reference's, relative to the largest input

# Limbs as pairs of joints, and the channels of their fields (x, y), in the order in which persons grow.
# The last two join persons but start none.
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11),
    (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17), (2, 16), (5, 17),
)  # fmt: skip
_FIELDS = (
    (12, 13), (20, 21), (14, 15), (16, 17), (22, 23), (24, 25), (0, 1), (2, 3), (4, 5), (6, 7),
    (8, 9), (10, 11), (28, 29), (30, 31), (34, 35), (32, 33), (36, 37), (18, 19), (26, 27),
)  # fmt: skip


def decode_people(heatmaps: np.ndarray, fields: np.ndarray, grid: Grid) -> np.ndarray:
    """Return the people that OpenPose's network saw, float64 (N, 18, 3): x, y in whole pixels and score.

    ``heatmaps`` float32 (19, h, w), the background last and unused; ``fields`` float32 (38, h, w). A joint's
    score is its heatmap's value there; absent joints are zeros. Persons have at least 4 joints and a mean
    score of at least 0.4.
    """
    assert heatmaps.shape == (19, *grid.cells), heatmaps.shape
    assert fields.shape == (38, *grid.cells), fields.shape
    with np.errstate(invalid="ignore"):
        if not (np.isfinite(heatmaps).all() and np.isfinite(fields).all()):
            return np.zeros((0, 18, 3))
    people = _Decoding(heatmaps, fields, grid, exact=False).people()
    if people is None:
        people = _Decoding(heatmaps, fields, grid, exact=True).people()
        assert people is not None
    return people


@dataclass
class _Decoding:
    """One decoding; ``exact`` takes the reference's own steps throughout."""

    heatmaps: np.ndarray
    fields: np.ndarray
    grid: Grid
    exact: bool

    def people(self) -> np.ndarray | None:
        """Return the people, or None if rounding could decide whether there is one."""
        peaks = [self._peaks(joint) for joint in range(18)]
        starts = np.cumsum([0, *(len(found) for found in peaks)])
        limbs = [self._limb(k, peaks) for k in range(len(_LIMBS))]
        candidates = np.concatenate(peaks)
        persons = assemble(limbs, _LIMBS, candidates[:, 2], starts)
        means = mean_scores(persons)
        if not self.exact and (np.abs(means - 0.4) < 1e-4).any():
            return None
        kept = [p for p, mean in zip(persons, means, strict=True) if p.count >= 4 and mean >= 0.4]
        people = np.zeros((len(kept), 18, 3))
        for row, person in zip(people, kept, strict=True):
            present = person.joints >= 0
            row[present] = candidates[person.joints[present]]
        return people

    @cached_property
    def _slack(self) -> float:
        return _ROUNDING * max(1.0, float(np.abs(self.heatmaps[:18]).max()))

    @cached_property
    def _field_slack(self) -> float:
        return _ROUNDING * max(1.0, float(np.abs(self.fields).max()))

    @cached_property
    def _warm(self) -> np.ndarray:
        """Where a smoothed heatmap may exceed the threshold: bool (18, blocks down, blocks across)."""
        return self.grid.bound(self.heatmaps[:18]) > PEAK - self._slack

    def _peaks(self, joint: int) -> np.ndarray:
        """Return a joint's candidates, row by row, float64 (n, 3): x, y, score."""
        heatmap = self.heatmaps[joint]
        windows = self.grid.windows(self._warm[joint])
        x, y, clear = self.grid.maxima(heatmap, windows, threshold=PEAK, slack=self._slack)
        if not len(x) or (clear and not self.exact):
            return np.stack([x, y, self.grid.values(heatmap, x, y)], axis=1)
        full = self.grid.enlarged(heatmap)
        kept = is_peak(full, x, y, threshold=PEAK)
        return np.stack([x[kept], y[kept], full[y[kept], x[kept]]], axis=1)

    def _limb(self, k: int, peaks: list[np.ndarray]) -> Limb:
        """Return which candidates of limb k's two joints belong together."""
        start, end = (peaks[joint] for joint in _LIMBS[k])
        if not len(start) or not len(end):
            return Limb.none()
        if not self.exact:
            limb = self._scored(k, start, end, exact=False)
            if limb is not None:
                return limb
        exactly = self._scored(k, start, end, exact=True)
        assert exactly is not None
        return exactly

    def _scored(self, k: int, start: np.ndarray, end: np.ndarray, *, exact: bool) -> Limb | None:
        """Return the pairs chosen for limb k, or None if rounding could change them."""
        channels = self.fields[list(_FIELDS[k])]
        full = [self.grid.enlarged(channel) for channel in channels] if exact else None
        pairs, scores, slack = [], [], 0.0 if exact else self._field_slack
        for first in range(0, len(start), rows := max(1, 4096 // len(end))):
            some = start[first : first + rows]
            along, score = self._along(channels, full, some, end)
            near = np.abs(along - _ON_LIMB) <= slack
            on_limb = (along > _ON_LIMB).sum(axis=2)
            possible = (on_limb + near.sum(axis=2) > 0.8 * _POINTS) & (score > -slack)
            if slack and (possible & (near.any(axis=2) | (score <= slack))).any():
                return None
            i, j = np.nonzero(possible & (score > 0))
            pairs.append(np.stack([i + first, j], axis=1))
            scores.append(score[i, j])
        return choose(np.concatenate(pairs), np.concatenate(scores), len(start), len(end), slack=slack)

    def _along(
        self, channels: np.ndarray, full: list[np.ndarray] | None, start: np.ndarray, end: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the field along each possible limb, (n, m, 10), and the limbs' scores, (n, m)."""
        origin, step = start[:, None, :2], end[None, :, :2] - start[:, None, :2]
        length = np.maximum(0.001, np.sqrt(step[..., 0] * step[..., 0] + step[..., 1] * step[..., 1]))
        direction = step / length[..., None]
        # numpy.linspace's arithmetic, so that points between two pixels are rounded as in the reference.
        points = np.arange(_POINTS)[:, None] * (step / (_POINTS - 1))[:, :, None, :] + origin[:, :, None, :]
        points[:, :, -1] = end[None, :, :2]
        x, y = np.rint(points).astype(np.int64).reshape(-1, 2).T
        read = [
            self.grid.values(channels[axis], x, y) if full is None else full[axis][y, x].astype(np.float64)
            for axis in (0, 1)
        ]
        x_part, y_part = (values.reshape(*length.shape, _POINTS) for values in read)
        along = x_part * direction[..., :1] + y_part * direction[..., 1:]
        total = along[..., 0].copy()
        for k in range(1, _POINTS):  # one after the other, as the reference adds
            total += along[..., k]
        return along, total / _POINTS + np.minimum(0.5 * self.grid.height / length - 1, 0)


def scaled_size(height: int, width: int) -> tuple[int, int]:
    """Return the size (height, width) at which OpenPose's body network sees a picture: 184 pixels high."""
    scale = 0.5 * 368 / height
    return int(height * scale), int(width * scale)


def grid_of(height: int, width: int) -> Grid:
    """Return the grid of a picture's heatmaps: cells of 8 x 8 of its scaled pixels, padded to whole cells."""
    scaled = scaled_size(height, width)
    shrinks = height + width < sum(scaled)
    return Grid.of(
        size=(height, width),
        scaled=scaled,
        interpolation=cv2.INTER_LANCZOS4 if not shrinks else cv2.INTER_AREA,
    )

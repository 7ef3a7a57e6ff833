"""A network's coarse maps on the pixels of a picture: values anywhere, peaks, without enlarging the maps.

Enlarging 8 times, cropping, resizing and smoothing are linear along each axis, so the smoothed map is
``A @ cells @ B.T`` with two small matrices; any window of it is the product of some of their rows. The
matrices come from applying the very steps to the identity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

STRIDE = 8
"""Pixels of the network's picture per cell."""
_SIGMA, _RADIUS = 3.0, 12  # SciPy's gaussian_filter(sigma=3): cut at four sigma

_THREADS_FROM = 1 << 18  # multiplications; OpenBLAS uses one thread up to here
_CALL_PIXELS = 8192  # that are evaluated in the time that a window costs whatever its size
_AROUND = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))

_FINER = 8  # how much closer neighbours lie to the reference in double precision

_Window = tuple[int, int, int, int]  # top, bottom, left, right in pixels


@dataclass(frozen=True, eq=False)
class _Axis:
    """One axis: from cells to pixels."""

    enlarge: np.ndarray
    """float64 (pixels, cells)."""
    smooth: np.ndarray
    """float64 (pixels, cells): enlarged, then smoothed."""
    rough: np.ndarray
    """The same in float32."""
    edges: np.ndarray
    """int (blocks + 1,): the pixels at which blocks of about a cell begin and end."""
    reach: np.ndarray
    """float64 (blocks, cells): the largest absolute weight of a cell within a block."""


@dataclass(frozen=True, eq=False)
class Grid:
    """How the cells of a map lie on a picture of ``height`` x ``width`` pixels."""

    height: int
    width: int
    scaled: tuple[int, int]
    interpolation: int
    _rows: _Axis
    _columns: _Axis

    @classmethod
    def of(cls, *, size: tuple[int, int], scaled: tuple[int, int], interpolation: int) -> "Grid":
        """Return the grid of a picture of ``size`` that a network saw at ``scaled`` (height, width)."""
        rows, columns = (_axis(n, s, interpolation) for n, s in zip(size, scaled, strict=True))
        return cls(*size, scaled, interpolation, rows, columns)

    @property
    def cells(self) -> tuple[int, int]:
        """The height and width of the map in cells."""
        return self._rows.enlarge.shape[1], self._columns.enlarge.shape[1]

    def enlarged(self, cells: np.ndarray) -> np.ndarray:
        """Return a map float32 (h, w) on all pixels, step by step: float32 (height, width)."""
        high, wide = self.cells
        large = cv2.resize(cells, (wide * STRIDE, high * STRIDE), interpolation=cv2.INTER_LANCZOS4)
        cropped = large[: self.scaled[0], : self.scaled[1]]
        resized = cv2.resize(cropped, (self.width, self.height), interpolation=self.interpolation)
        return np.asarray(resized)

    def values(self, cells: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Return a map's values, not smoothed, at pixels x (n,), y (n,): float64 (n,)."""
        return np.einsum("nw,nw->n", _product(self._rows.enlarge[y], cells), self._columns.enlarge[x])

    def bound(self, maps: np.ndarray) -> np.ndarray:
        """Return what the smoothed maps (n, h, w) cannot exceed, per block: (n, blocks down, across)."""
        bounds: np.ndarray = self._rows.reach @ np.abs(maps).astype(np.float64) @ self._columns.reach.T
        return bounds

    def windows(self, warm: np.ndarray) -> list[_Window]:
        """Return windows that cover the warm blocks (blocks down, blocks across) of :meth:`bound`, bool."""
        if not warm.any():
            return []
        _, _, boxes, _ = cv2.connectedComponentsWithStats(warm.astype(np.uint8))
        left, top, across, down, _area = boxes[1:].T
        rows, columns = self._rows.edges, self._columns.edges
        windows = np.stack([rows[top], rows[top + down], columns[left], columns[left + across]], axis=1)
        around = np.array([*windows[:, [0, 2]].min(axis=0), *windows[:, [1, 3]].max(axis=0)])[[0, 2, 1, 3]]
        if _area_of(around) <= _area_of(windows.T) + _CALL_PIXELS * len(windows):
            windows = around[None]
        return [(t, b, le, r) for t, b, le, r in windows.tolist()]

    def maxima(
        self, cells: np.ndarray, windows: Sequence[_Window], *, threshold: float, slack: float
    ) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return the local maxima x (n,), y (n,) of a smoothed map in windows, row by row.

        A maximum exceeds ``threshold`` and is no less than its four neighbours. Those returned include any
        that are maxima but for ``slack``, by which a value may be off in single precision; the third answer
        says whether all of them are maxima beyond doubt.
        """
        found = [self._maxima(cells, window, threshold, slack) for window in windows]
        y, x = np.divmod(np.unique(np.concatenate([np.zeros(0, np.int64), *found])), self.width)
        return x, y, self._are_clear(cells, x, y, threshold, slack)

    def _maxima(self, cells: np.ndarray, window: _Window, threshold: float, slack: float) -> np.ndarray:
        """Return the maxima but for slack in a window as indices y * width + x."""
        top, bottom, left, right = window
        first, last = max(top - 1, 0), min(bottom + 1, self.height)
        start, stop = max(left - 1, 0), min(right + 1, self.width)
        across = self._columns.rough[start:stop].T
        values = _product(_product(self._rows.rough[first:last], cells), across)
        high = (cv2.dilate(values, _CROSS) - values <= slack) & (values > threshold - slack)
        high[: top - first] = high[bottom - first :] = 0
        high[:, : left - start] = high[:, right - start :] = 0
        found = cv2.findNonZero(high.view(np.uint8)) if high.any() else np.zeros((0, 2))
        x, y = np.asarray(found, np.int64).reshape(-1, 2).T
        return np.asarray((y + first) * self.width + x + start)

    def _are_clear(
        self, cells: np.ndarray, x: np.ndarray, y: np.ndarray, threshold: float, slack: float
    ) -> bool:
        """Return whether all of these pixels are maxima beyond doubt."""
        at_x, at_y = x + _AROUND[:, :1], y + _AROUND[:, 1:]  # (5, n)
        inside = (at_x >= 0) & (at_x < self.width) & (at_y >= 0) & (at_y < self.height)
        rows = self._rows.smooth[np.where(inside, at_y, 0).ravel()]
        columns = self._columns.smooth[np.where(inside, at_x, 0).ravel()]
        values = np.einsum("nw,nw->n", _product(rows, cells), columns).reshape(inside.shape)
        lead = values[0] - np.where(inside, values, -np.inf)[1:]
        return bool((values[0] > threshold + slack).all() and (lead > slack / _FINER).all())


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return ``a @ b`` in steps so small that BLAS does not wake threads: waiting for them costs more."""
    rows = max(1, _THREADS_FROM // b.size)
    if len(a) <= rows:
        return np.asarray(a @ b)
    return np.concatenate([a[start : start + rows] @ b for start in range(0, len(a), rows)])


def _area_of(window: np.ndarray) -> int:
    """Return the area of a window (4,), or of all windows (4, n)."""
    top, bottom, left, right = window
    return int(((bottom - top) * (right - left)).sum())


def is_peak(full: np.ndarray, x: np.ndarray, y: np.ndarray, *, threshold: float) -> np.ndarray:
    """Return at which pixels x (n,), y (n,) a map (H, W) has a peak once smoothed: bool (n,).

    It is smoothed as SciPy does. A peak exceeds ``threshold`` and is no less than its four neighbours;
    outside the map they are 0.
    """
    return np.concatenate(
        [_is_peak(full, x[k : k + 4096], y[k : k + 4096], threshold) for k in range(0, len(x), 4096)]
    )


def _is_peak(full: np.ndarray, x: np.ndarray, y: np.ndarray, threshold: float) -> np.ndarray:
    height, width = full.shape
    centre = _smoothed(full, x, y)
    peak = centre > threshold
    for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        inside = (x + dx >= 0) & (x + dx < width) & (y + dy >= 0) & (y + dy < height)
        neighbour = np.where(
            inside, _smoothed(full, np.clip(x + dx, 0, width - 1), np.clip(y + dy, 0, height - 1)), 0.0
        )
        peak &= centre >= neighbour
    return peak


def _smoothed(full: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return SciPy's Gaussian at some pixels, bit for bit: first down, then across, from the rim inwards."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    rows = _reflected(y[:, None] + offsets, full.shape[0])
    columns = _reflected(x[:, None] + offsets, full.shape[1])
    patches = full[rows[:, :, None], columns[:, None, :]].astype(np.float64)
    return _weighed(_weighed(patches))


def _weighed(values: np.ndarray) -> np.ndarray:
    """Return the Gaussian's sum over axis 1 of (n, 25, ...), mirrored taps added before they are weighed."""
    taps = _gaussian()
    total = values[:, _RADIUS] * taps[_RADIUS]
    for k in range(_RADIUS):
        total += (values[:, k] + values[:, -1 - k]) * taps[k]
    return np.asarray(total)


def _reflected(index: np.ndarray, size: int) -> np.ndarray:
    """Return indices folded back into 0 .. size - 1 as in d c b a | a b c d | d c b a."""
    folded = index % (2 * size)
    return np.minimum(folded, 2 * size - 1 - folded)


@lru_cache(maxsize=1)
def _gaussian() -> np.ndarray:
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    weights = np.exp(-0.5 / (_SIGMA * _SIGMA) * offsets**2)
    return np.asarray(weights / weights.sum())


@lru_cache(maxsize=32)
def _axis(size: int, scaled: int, interpolation: int) -> _Axis:
    """Return the matrices of one axis: cells of ``scaled`` pixels, brought to ``size`` pixels."""
    cells = -(-scaled // STRIDE)
    identity = np.eye(cells, dtype=np.float32)
    large = cv2.resize(identity, (cells, cells * STRIDE), interpolation=cv2.INTER_LANCZOS4)[:scaled]
    pixels = np.eye(scaled, dtype=np.float32)
    resized = cv2.resize(pixels, (scaled, size), interpolation=interpolation)
    enlarge = resized.astype(np.float64) @ large.astype(np.float64)
    rows = _reflected(np.arange(-_RADIUS, size + _RADIUS), size)
    smooth = np.zeros_like(enlarge)
    for offset, weight in enumerate(_gaussian()):
        smooth += weight * enlarge[rows[offset : offset + size]]
    blocks = max(1, min(cells, size // 4))
    edges = np.linspace(0, size, blocks + 1).astype(np.int64)
    reach = np.maximum.reduceat(np.abs(smooth), edges[:-1], axis=0)
    return _Axis(enlarge, smooth, smooth.astype(np.float32), edges, reach)

"""How sure is a mean? Bootstrap intervals over pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 2000, 0.95
_CHUNK = 2_000_000  # numbers drawn at once


@dataclass(frozen=True)
class Interval:
    """A value and where it would lie in most repetitions with other pairs."""

    value: float
    low: float
    high: float


def mean_interval(
    values: NDArray[np.float64], *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of one value per pair (N,), with its percentile bootstrap interval (Efron 1979).

    Pairs are drawn with replacement. What several pictures of one pair gave is to be averaged first: they are
    not independent. One pair has no interval: low and high are then not numbers.
    Raises ValueError where there is no value, or the level is not between 0 and 1.
    """
    count = _checked(len(values), level)
    if count == 1:
        return Interval(float(values[0]), float("nan"), float("nan"))
    draws, random = [], np.random.default_rng(seed)
    for rows in _chunks(resamples, count):
        draws.append(values[random.integers(count, size=(rows, count))].mean(axis=1))
    return _interval(float(values.mean()), np.concatenate(draws), level)


def interval(
    statistic: Callable[[NDArray[np.int64]], float],
    count: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The same for any statistic of chosen pairs, given as indices (N,), some more than once.

    Resamples whose statistic is not a number are left out. Raises ValueError as `mean_interval`.
    """
    count = _checked(count, level)
    value = statistic(np.arange(count))
    if count == 1:
        return Interval(value, float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    draws = np.array([statistic(random.integers(count, size=count)) for _ in range(resamples)])
    return _interval(value, draws[np.isfinite(draws)], level)


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Interval:
    if not len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def _chunks(resamples: int, count: int) -> list[int]:
    """How many resamples are drawn at a time."""
    rows = max(1, _CHUNK // count)
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _checked(count: int, level: float) -> int:
    if count < 1:
        raise ValueError("an interval needs at least one value")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval is {level}, allowed is between 0 and 1")
    return count

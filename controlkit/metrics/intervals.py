"""How sure is a mean? Bootstrap intervals over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES, LEVEL = 2000, 0.95
LEAST = 8
"""Values below which there is no interval: resamples of fewer say too little (of two normal values, the true
mean lies between them half of the time).
"""
_BEYOND, _BEYOND_SLOW = 20, 5  # resamples wanted beyond either end: of means, of any statistic
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
    """The mean of one value per pair (N,), with its expanded percentile bootstrap interval (Hesterberg 2015,
    section 4.2): Efron's percentiles, moved outwards by what makes them Student's t interval for normal
    values; without it, those of 8 pairs miss at least twice as often as they say (a test counts).

    Pairs are drawn with replacement. What several pictures of one pair gave is to be averaged first: they are
    not independent. Fewer pairs than LEAST have no interval: low and high are then not numbers.
    Raises ValueError where there is no value, or the level is not between 0 and 1.
    """
    count = _checked(len(values), level)
    if count < LEAST:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    tail = _tail(count, level)
    draws, random = [], np.random.default_rng(seed)
    for rows in _chunks(max(resamples, math.ceil(_BEYOND / tail)), count):
        draws.append(values[random.integers(count, size=(rows, count))].mean(axis=1))
    return _interval(float(values.mean()), np.concatenate(draws), tail)


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
    if count < LEAST:
        return Interval(value, float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    tail = _tail(count, level)
    wanted = max(resamples, math.ceil(_BEYOND_SLOW / tail))
    draws = np.array([statistic(random.integers(count, size=count)) for _ in range(wanted)])
    return _interval(value, draws[np.isfinite(draws)], tail)


def _tail(count: int, level: float) -> float:
    """The share of the resamples that is left out at either end."""
    from scipy.special import ndtr, stdtrit

    return float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - level) / 2)))


def _interval(value: float, draws: NDArray[np.float64], tail: float) -> Interval:
    if not len(draws):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(draws, [tail, 1 - tail])
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

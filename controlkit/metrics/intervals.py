"""How sure is a mean? Bootstrap intervals over pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controlkit.limits import is_whole, number
from controlkit.metrics.arrays import as_numbers

RESAMPLES, LEVEL = 2000, 0.95
LEAST = 8
"""Values below which there is no interval: resamples of fewer say too little (of two normal values, the true
mean lies between them half of the time).
"""
_BEYOND, _BEYOND_SLOW = 20, 5  # resamples wanted beyond either end: of means, of any statistic
_MOST, _MOST_SLOW = 100_000, 25_000  # drawn at most, unless more are asked for: both reach as far out
_CHUNK, _ROWS = 2_000_000, 500  # numbers drawn at once; resamples that a statistic is given at once


@dataclass(frozen=True)
class Interval:
    """A value and where it would lie in most repetitions with other pairs.

    resamples: from which low and high come; 0 where there is no interval.
    """

    value: float
    low: float
    high: float
    resamples: int = 0


def mean_interval(
    values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of one value per pair (N,), with its expanded percentile bootstrap interval (Hesterberg 2015,
    section 4.2): Efron's percentiles, moved outwards by what makes them Student's t interval for normal
    values; without it, those of 8 pairs miss at least twice as often as they say (a test counts).

    Pairs are drawn with replacement. What several pictures of one pair gave is to be averaged first: they are
    not independent. Fewer pairs than LEAST have no interval: low and high are then not numbers. Nor have
    values of which one is not finite, nor a level so high that its ends lie beyond what a bounded number of
    resamples tells, which it does the sooner the fewer pairs there are.
    Raises ValueError where there is no value, the level is not between 0 and 1, or resamples or seed are no
    whole numbers from 1 and 0.
    """
    each = _one_per_pair(values)
    count = _checked(len(each), level, resamples, seed)
    tail = _tail(count, level)
    wanted = _wanted(tail, count, resamples, beyond=_BEYOND, most=_MOST) if np.isfinite(each).all() else 0
    random = np.random.default_rng(seed)
    draws = [
        each[random.integers(count, size=(rows, count))].mean(axis=1)
        for rows in _chunks(wanted, max(1, _CHUNK // count))
    ]
    return _interval(float(each.mean()), draws, tail)


def interval(
    statistic: Callable[[NDArray[np.int64]], Any],
    count: int,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    batched: bool = False,
) -> Interval:
    """The same for any statistic of chosen pairs, given as indices (N,), some more than once; where it is
    batched, of several choices at once, indices (R, N), for which it returns numbers (R,).

    Resamples whose statistic is not a number are left out. Raises ValueError as `mean_interval`.
    """
    count = _checked(count, level, resamples, seed)
    every = statistic if batched else lambda chosen: np.array([statistic(one) for one in chosen])
    tail = _tail(count, level)
    wanted = _wanted(tail, count, resamples, beyond=_BEYOND_SLOW, most=_MOST_SLOW)
    random = np.random.default_rng(seed)
    draws = [every(random.integers(count, size=(rows, count))) for rows in _chunks(wanted, _ROWS)]
    return _interval(float(every(np.arange(count)[None])[0]), draws, tail)


def _tail(count: int, level: float) -> float:
    """The share of the resamples that is left out at either end; 0 of a single pair."""
    from scipy.special import ndtr, stdtrit

    if count < 2:
        return 0.0
    return float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, (1 - level) / 2)))


def _wanted(tail: float, count: int, resamples: int, *, beyond: int, most: int) -> int:
    """How many resamples are drawn; 0 where there is no interval."""
    if count < LEAST or beyond > tail * max(resamples, most):
        return 0
    return max(resamples, math.ceil(beyond / tail))


def _interval(value: float, draws: Sequence[NDArray[np.float64]], tail: float) -> Interval:
    drawn = np.concatenate(draws) if draws else np.zeros(0)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Interval(value, float(low), float(high), len(drawn))


def _chunks(resamples: int, rows: int) -> list[int]:
    """How many resamples are drawn at a time."""
    return [min(rows, resamples - start) for start in range(0, resamples, rows)]


def _one_per_pair(values: ArrayLike) -> NDArray[np.float64]:
    each = as_numbers("an interval", values).astype(np.float64)
    if each.ndim != 1:
        raise ValueError(f"an interval is of one value per pair, (N,), not {each.shape}")
    return each


def _checked(count: int, level: float, resamples: int, seed: int) -> int:
    if not is_whole(count) or count < 1:
        raise ValueError("an interval needs at least one value")
    for name, given, least in (("resamples", resamples, 1), ("seed", seed, 0)):
        if not is_whole(given) or given < least:
            raise ValueError(f"{name} of an interval must be a whole number from {least}, not {given}")
    if not 0 < number(level) < 1:
        raise ValueError(f"the level of an interval is {level}, allowed is between 0 and 1")
    return count

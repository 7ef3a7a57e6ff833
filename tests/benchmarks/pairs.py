"""Timing two ways of doing the same thing side by side, for the benchmarks in this folder."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Clock = Callable[[], float]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast ours is as the peer: over rounds of pairs, each in random order."""

    peer_seconds: float
    ours_seconds: float
    low: float
    """The ratio's lower quartile."""
    median: float
    high: float

    def __str__(self) -> str:
        """Medians in milliseconds, and the ratio with its quartiles."""
        return (
            f"{1e3 * self.peer_seconds:.1f} ms | {1e3 * self.ours_seconds:.1f} ms | "
            f"**{self.median:.1f}x** ({self.low:.1f} to {self.high:.1f})"
        )


def compare(
    peer: Callable[[], object], ours: Callable[[], object], *, rounds: int, clock: Clock = time.perf_counter
) -> Ratio:
    """Time `peer` and `ours` alternately, in random order, after one run of each that is not counted."""
    order = random.Random(0)
    peer()
    ours()
    times: dict[str, list[float]] = {"peer": [], "ours": []}
    for _ in range(rounds):
        pair = [("peer", peer), ("ours", ours)]
        order.shuffle(pair)
        for name, run in pair:
            start = clock()
            run()
            times[name].append(clock() - start)
    ratios = [p / o for p, o in zip(times["peer"], times["ours"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    return Ratio(statistics.median(times["peer"]), statistics.median(times["ours"]), low, middle, high)

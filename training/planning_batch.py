"""The largest batch that fits, found by trying; and how much memory there is to fit into."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from controlkit.training.memory import free_memory, is_out_of_memory

USABLE = 0.85
"""Share of the free memory that is planned with: predictions are within 15 %."""


@dataclass
class Batches:
    """What was tried: samples per second by batch size, and the sizes that did not fit."""

    samples_per_s: dict[int, float] = field(default_factory=dict)
    too_large: list[int] = field(default_factory=list)

    @property
    def largest(self) -> int:
        """The largest size that fitted."""
        return max(self.samples_per_s)

    @property
    def fastest(self) -> int:
        """The size with the most samples per second: on a CPU seldom the largest."""
        return max(self.samples_per_s, key=lambda size: self.samples_per_s[size])

    def lines(self) -> list[str]:
        """A line for each size that was tried, and one on what to choose."""
        rows = [
            f"batch_size={size}: {rate:.2f} samples/s" for size, rate in sorted(self.samples_per_s.items())
        ]
        rows += [f"batch_size={size}: does not fit" for size in sorted(self.too_large)]
        same = self.fastest == self.largest
        return [
            *rows,
            f"largest: {self.largest}" + (", and fastest" if same else f"; fastest: {self.fastest}"),
        ]


def find_batch(
    try_batch: Callable[[int], None],
    *,
    start: int,
    limit: int,
    need: Callable[[int], int] | None = None,
    available: int | None = None,
    prefer: Literal["largest", "fastest"] = "largest",
) -> int:
    """The largest batch size up to ``limit`` for which a step fits, or the fastest one: see `try_batches`."""
    tried = try_batches(try_batch, start=start, limit=limit, need=need, available=available)
    return tried.largest if prefer == "largest" else tried.fastest


def try_batches(
    try_batch: Callable[[int], None],
    *,
    start: int,
    limit: int,
    need: Callable[[int], int] | None = None,
    available: int | None = None,
) -> Batches:
    """Find the largest batch size that fits, doubling from ``start``, then halving the gap; time each size.

    ``try_batch(size)`` takes a whole step (forward, backward, optimizer) and returns when it is done. It is
    called twice for each size that fits: first steps are slow.

    A processor's memory raises no error before the system ends the process. There ``need(size)``, the
    predicted bytes beyond those in use, decides first: sizes that need more than 85 % of ``available`` are
    not tried. Without either of the two, sizes are only limited by errors.

    Raises ValueError where not even a batch of 1 fits.
    """
    assert 1 <= start <= limit
    tried = Batches()

    def fits(size: int) -> bool:
        known = need is not None and available is not None
        if known and need(size) > USABLE * available:  # type: ignore[misc, operator]
            tried.too_large.append(size)
            return False
        return _timed(try_batch, size, tried)

    good, bad = _bracket(fits, start, limit)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    if good == 0:
        raise ValueError(
            "not even one pair at once fits in memory: try gradient_checkpointing=true, precision=bf16 or a"
            " smaller data.resolution"
        )
    return tried


def _bracket(fits: Callable[[int], bool], start: int, limit: int) -> tuple[int, int]:
    """(A size that fits, or 0; a larger one that does not, or limit + 1), from doubling or halving."""
    if not fits(start):
        bad = start
        while bad > 1 and not fits(bad // 2):
            bad //= 2
        return bad // 2, bad
    good = start
    while good < limit:
        larger = min(2 * good, limit)
        if not fits(larger):
            return good, larger
        good = larger
    return good, limit + 1


def _timed(try_batch: Callable[[int], None], size: int, tried: Batches) -> bool:
    try:
        try_batch(size)
        started = time.perf_counter()
        try_batch(size)
        tried.samples_per_s[size] = size / max(time.perf_counter() - started, 1e-9)
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tried.too_large.append(size)
        return False
    finally:
        free_memory()  # also after a size that fits: the next one finds the memory as it was

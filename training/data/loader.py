"""Batches prepared by threads beside the training: read, decoded, resized, drawn, but not yet on a device.

What a batch holds is a function of its number; how many threads there are, and how far ahead they run,
changes nothing. Threads suffice because OpenCV, Pillow and NumPy let go of the interpreter while they work.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Batch = TypeVar("Batch")
_AHEAD = 2  # batches per thread that wait to be used


class Loader(Generic[Batch]):
    """The batches of one process, asked for by number, mostly in the order of ``following``."""

    def __init__(
        self, make: Callable[[int], Batch], following: Callable[[int], int], *, workers: int
    ) -> None:
        """``following``: the number that this process asks for after a given one. No workers: no threads."""
        self._make, self._following, self._ahead = make, following, workers * _AHEAD
        self._threads = ThreadPoolExecutor(workers) if workers else None
        self._coming: dict[int, Future[Batch]] = {}

    def get(self, number: int) -> Batch:
        """The batch of that number. Raises what making it raised."""
        if self._threads is None:
            return self._make(number)
        wanted = [number]
        while len(wanted) <= self._ahead:
            wanted.append(self._following(wanted[-1]))
        for gone in self._coming.keys() - set(wanted):
            self._coming.pop(gone).cancel()
        for coming in wanted:
            if coming not in self._coming:
                self._coming[coming] = self._threads.submit(self._make, coming)
        return self._coming.pop(number).result()

    def close(self) -> None:
        """Let the threads end; what they prepared is dropped."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

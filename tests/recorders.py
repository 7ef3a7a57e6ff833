"""Recorders for devices without graphs: one that does the work again, one that counts, a strict one, and
two that are wrong; and what the one for CUDA asks of torch, without a GPU."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from controlkit.recording import Work


class Repeater:
    """Keeps the work and does it again."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Do the work once, to know its result's shape."""
        result = work()

        def again() -> None:
            result.copy_(work())

        return again, result


class Counting(Repeater):
    """Counts what is recorded and how often it is repeated."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        again, result = super().record(work)
        self.recorded += 1

        def counted() -> None:
            self.repeated += 1
            again()

        return counted, result


class Capturing(Repeater):
    """Warms up as for a CUDA graph, and then takes no work for which host and device copy anything."""

    def __init__(self, count: Mapping[str, int]) -> None:
        self._count = count
        self.recorded = 0

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        for _ in range(3):
            work()
        before = dict(self._count)
        recorded = super().record(work)
        assert dict(self._count) == before
        self.recorded += 1
        return recorded


class Deaf(Repeater):
    """Repeats what it recorded, whatever the inputs are now: a constant in a graph."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        _, result = super().record(work)
        return lambda: None, result


class Failing:
    """A capture that does not succeed."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        work()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


class Driver:
    """torch.cuda's streams and captures as `CudaRecorder` uses them. Graphs do nothing.

    A capture that fails is ended with an error of its own and leaves its stream the current one, as by torch
    2.11. Two at once are refused, as by CUDA.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.made, self.captures, self.capturing = 0, list[tuple[Any, Any]](), False
        self.first = self.now = self.stream()
        for name, stands_for in {
            "device": lambda _: contextlib.nullcontext(),
            "Stream": self.stream,
            "current_stream": lambda: self.now,
            "stream": self.within,
            "CUDAGraph": lambda: SimpleNamespace(pool=lambda: "the pool", replay=lambda: None),
            "graph": self.capture,
        }.items():
            patch.setattr(torch.cuda, name, stands_for)

    def stream(self) -> SimpleNamespace:
        """One more, with those that it waited for."""
        self.made += 1
        waited_for: list[Any] = []
        return SimpleNamespace(waited_for=waited_for, wait_stream=waited_for.append)

    @contextlib.contextmanager
    def within(self, stream: Any) -> Iterator[None]:
        """Within the block a stream is the current one."""
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def capture(
        self, _: Any, pool: Any = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """See the class."""
        if self.capturing:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        before, self.capturing = self.now, True
        self.now = stream or self.stream()
        self.captures.append((self.now, pool))
        try:
            yield
        except RuntimeError:
            raise RuntimeError("CUDA error: operation failed due to a previous error") from None
        finally:
            self.capturing = False
        self.now = before

"""Recorders for devices without graphs: one that does the work again, one that counts, a strict one, and
two that are wrong."""

from collections.abc import Callable, Mapping

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

"""What is to be known of a piece of work, told to whoever listens in this thread, or else as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("listener", default=None)


class Report(Protocol):
    """How a job tells what it is doing; the command line shows it."""

    def status(self, text: str) -> None:
        """What happens now, in one line."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the current part is."""


def reason(error: Exception) -> str:
    """The first line of what an error says, or else what it is called."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def warn(line: str, *, stacklevel: int = 1) -> None:
    """Tell a line. stacklevel: as `warnings.warn` takes it, counted from who calls this."""
    listener = _listener.get()
    if listener is None:
        warnings.warn(line, stacklevel=stacklevel + 1)
    else:
        listener(line)


@contextmanager
def heard(listener: Callable[[str], None]) -> Iterator[None]:
    """Within the block `listener` is given every line, also one that was told before.

    A filter of `warnings` is the whole process's, and shows a line once: neither suits a server.
    """
    before = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(before)

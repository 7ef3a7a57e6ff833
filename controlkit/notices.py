"""What is to be known of a piece of work, told to whoever listens in this thread, or else as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

_FULL = (  # what libraries say of a memory that is full, where it is not torch's OutOfMemoryError
    "can't allocate memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "out of memory",  # "CUDA error: out of memory" of what allocates past torch, and other devices' own
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "failed to map segment from shared object",  # a library that is too large to be loaded
)
_LOST = (  # what gloo and NCCL say where another process, or its machine, has gone
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
    "Timed out waiting",
)
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full. Needs no torch, which raises most of them."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError | ImportError) and any(text in str(error) for text in _FULL)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error says that another one of the processes that share a job has ended. Needs no torch."""
    of_torch = type(error).__name__.startswith("Dist") or "gloo" in str(error)  # DistBackendError: NCCL's
    return isinstance(error, RuntimeError) and of_torch and any(text in str(error) for text in _LOST)


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

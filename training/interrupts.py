"""Ctrl-C and SIGTERM while training: the step is finished and the state saved before the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.wanted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is remembered, a second ends the run where it is."""
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Within the block SIGINT and SIGTERM set ``wanted``; a second one raises KeyboardInterrupt.

    Signals reach the main thread only; in any other the block changes nothing.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {number: signal.signal(number, interrupts) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Ctrl-C, SIGTERM, a lost terminal: the step is finished and the state saved before a training ends."""

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
        self.number: int = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is remembered, a second ends the run where it is."""
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted, self.number = True, number


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Within the block SIGINT, SIGTERM and SIGHUP set ``wanted``; a second one raises KeyboardInterrupt.

    A SIGHUP that is ignored stays so: `nohup` asks for that.

    Signals reach the main thread only; in any other the block changes nothing.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    wanted = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        wanted.append(hangup)
    before = {number: signal.signal(number, interrupts) for number in wanted}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Ctrl-C, SIGTERM, a lost terminal: the step is finished and the state saved before a training ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class Interrupts:
    """Whether somebody asked the run to stop."""

    def __init__(self) -> None:
        self.wanted = False
        self.number: int = signal.SIGINT

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: the first is remembered, a second ends the run where it is.

        Of a terminal that is closed both the system and its shell tell.
        """
        if self.wanted and number != _HANGUP:
            raise KeyboardInterrupt
        self.wanted, self.number = True, number


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Within the block SIGINT, SIGTERM and SIGHUP set ``wanted``; a second one of the first two raises
    KeyboardInterrupt.

    A SIGHUP that is ignored stays so: `nohup` asks for that.

    Signals reach the main thread only; in any other the block changes nothing.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    wanted = [signal.SIGINT, signal.SIGTERM]
    if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
        wanted.append(_HANGUP)
    before = {number: signal.signal(number, interrupts) for number in wanted}
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

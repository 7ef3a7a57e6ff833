"""Whose turn it is to generate: the clicks of each session in their order, and what cancels them."""

from __future__ import annotations

import threading


class Turns:
    """The runs that sessions wait for or are in; each has an event that stops it.

    A click comes first, its run when the device is free. A run that nobody clicked for (of a program) has its
    turn, too.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, list[threading.Event]] = {}  # by session, in the order of the clicks
        self._running: dict[str, list[threading.Event]] = {}
        self._told: dict[str, int] = {}  # failures that are known here, and that the page will report

    def click(self, session: str) -> None:
        """A run is wanted; it can be stopped from now on."""
        with self._lock:
            self._waiting.setdefault(session, []).append(threading.Event())

    def begin(self, session: str) -> threading.Event:
        """A run has the device: what stops it, which may have happened while it waited."""
        with self._lock:
            waiting = self._waiting.get(session, [])
            stop = waiting.pop(0) if waiting else threading.Event()
            self._running.setdefault(session, []).append(stop)
            self._tidy()
            return stop

    def follow(self, session: str, stop: threading.Event) -> None:
        """A page that was loaded anew looks at a run of the one before, and can stop it, too."""
        with self._lock:
            self._running.setdefault(session, []).append(stop)

    def end(self, session: str, stop: threading.Event, *, failed: bool = False) -> None:
        """A run has ended. failed: the page is told of an error, and will `refuse` what has ended already."""
        with self._lock:
            self._running[session] = [one for one in self._running.get(session, []) if one is not stop]
            if failed:
                self._told[session] = self._told.get(session, 0) + 1
            self._tidy()

    def refuse(self, session: str) -> None:
        """A click came to nothing: its run did not begin, or else ended by an error."""
        with self._lock:
            if self._told.get(session):
                self._told[session] -= 1
            elif self._waiting.get(session):
                self._waiting[session].pop(0)
            self._tidy()

    def leave(self, session: str) -> None:
        """Forget the clicks of a session that is gone; a run ends by itself."""
        with self._lock:
            self._waiting.pop(session, None)
            self._told.pop(session, None)

    def stop(self, session: str) -> None:
        """Stop all that a session waits for and is in."""
        with self._lock:
            for event in (*self._waiting.get(session, []), *self._running.get(session, [])):
                event.set()

    def wanted(self, session: str) -> bool:
        """Whether a session waits for pictures, or is in a run, and has not cancelled that."""
        with self._lock:
            both = (*self._waiting.get(session, []), *self._running.get(session, []))
            return not all(event.is_set() for event in both)

    def _tidy(self) -> None:
        for kept in (self._waiting, self._running, self._told):
            for session in [name for name, value in kept.items() if not value]:
                del kept[session]

"""Each visitor's pictures, for as long as the server runs: a page that is loaded anew shows them again."""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.studio.gallery import Made

if TYPE_CHECKING:
    from controlkit.studio.running import Run

MOST_VISITORS = 64  # who have pictures; whoever came back longest ago is forgotten
MOST_KEPT = 100  # pictures of one of them; the oldest are forgotten
_TOKEN = re.compile(r"[\w-]{43}", re.ASCII)


def token_of(given: Any) -> str:
    """The secret name that a browser gives for its visitor, a new one for anything else."""
    return given if isinstance(given, str) and _TOKEN.fullmatch(given) else secrets.token_urlsafe(32)


@dataclass(eq=False)
class _Visitor:
    made: list[Made] = field(default_factory=list)  # the newest first
    run: Run | None = None  # the one that was begun last


class Visitors:
    """Pictures and runs by the visitors' names; who has made nothing takes no place."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all: OrderedDict[str, _Visitor] = OrderedDict()

    def made(self, name: str) -> list[Made]:
        """A visitor's pictures that the page can still show, the newest first."""
        with self._lock:
            visitor = self._all.get(name)
            if visitor is None:
                return []
            self._all.move_to_end(name)
            visitor.made = [one for one in visitor.made if one.there]
            return [*visitor.made]

    def run(self, name: str) -> Run | None:
        """What is in the making for a visitor."""
        with self._lock:
            visitor = self._all.get(name)
            return None if visitor is None or visitor.run is None or visitor.run.ended else visitor.run

    def begin(self, name: str, run: Run) -> None:
        """Something is in the making for a visitor."""
        with self._lock:
            self._of(name).run = run

    def add(self, name: str, made: Made) -> None:
        """A visitor's newest picture."""
        with self._lock:
            visitor = self._of(name)
            visitor.made.insert(0, made)
            _delete(visitor.made[MOST_KEPT:])
            del visitor.made[MOST_KEPT:]

    def forget(self, name: str) -> None:
        """A visitor starts afresh: what is in the making stops, and no page shows the pictures any more."""
        with self._lock:
            gone = self._all.pop(name, _Visitor())
            if gone.run is not None:
                gone.run.stop.set()
            _delete(gone.made)

    def _of(self, name: str) -> _Visitor:
        visitor = self._all.setdefault(name, _Visitor())
        self._all.move_to_end(name)
        while len(self._all) > MOST_VISITORS:
            _, gone = self._all.popitem(last=False)
            _delete(gone.made)
        return visitor


def _delete(made: list[Made]) -> None:
    """Delete the page's copies of pictures; those in the folder of the pictures stay."""
    for one in made:
        with suppress(OSError):
            Path(one.file).unlink()

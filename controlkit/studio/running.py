"""A request that is being made beside the page: whoever looks sees how far it is, and nobody has to look."""

from __future__ import annotations

import threading
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit.studio.engine import Engine, Stopped, Telling
from controlkit.studio.gallery import Made
from controlkit.studio.uploads import write_shown
from controlkit.studio.wording import sentence

if TYPE_CHECKING:
    from controlkit.generate_plan import Plan
    from controlkit.infotext import PictureRecord

WORKER = "studio-generation"
UNGUIDED = "No map guided this: there is no photo, or its strength is 0."
_LOOK_SECONDS = 0.2  # between two updates of the page
_PATIENCE = 2.0  # seconds without news, after which a page that has gone is noticed


class Run:
    """One request. It ends by itself, by an error, or by `stop`; pages that go and come change nothing.

    told: what happens now, how far and of how much; None before anything does. preview: a look at the
    unfinished picture, uint8 (H, W, 3). pictures: the finished ones in their order. error: what ended it.
    """

    def __init__(self, job: Plan, stop: threading.Event, notes: Notes) -> None:
        self.job, self.stop, self.notes = job, stop, notes
        self.told: tuple[str, int, int] | None = None
        self.preview: np.ndarray | None = None
        self.pictures: tuple[Made, ...] = ()
        self.error: BaseException | None = None
        self.ended = False
        self._news, self._changed = 0, threading.Condition()
        self._worker: threading.Thread | None = None

    def begin(self, engine: Engine, finished: Callable[[Made], None]) -> None:
        """Begin. finished: told of each picture, also when no page looks."""
        self._worker = threading.Thread(target=self._work, args=(engine, finished), name=WORKER, daemon=True)
        self._worker.start()

    def wait(self, seen: int) -> int:
        """Wait, not for long, for more news than were seen; how many there are."""
        with self._changed:
            self._changed.wait_for(lambda: self._news != seen, _PATIENCE)
            if self._news != seen and not self.ended:
                self._changed.wait_for(lambda: self.ended, _LOOK_SECONDS)
            return self._news

    def join(self) -> None:
        """Wait until it has ended."""
        if self._worker is not None:
            self._worker.join()

    @property
    def waits(self) -> bool:
        """Whether it has not begun: another one has the device."""
        return self.told is None

    @property
    def stopped(self) -> bool:
        """Whether somebody cancelled it."""
        return isinstance(self.error, Stopped)

    def bar(self) -> str:
        """How far it is, as HTML."""
        if self.told is None:  # it waits
            return '<p role="status">Waiting for the device.</p>'
        text, done, total = self.told
        count = len(self.job.outputs)
        share = done / total if total else 0.0
        now = f"{text[:1].upper()}{text[1:]}"
        told = f"Picture {min(len(self.pictures) + 1, count)} of {count}" if total else now
        return (
            f'<p role="status">{escape(told)}</p>'
            f'<progress max="1" value="{share:.3f}" aria-label="{escape(told)}"></progress>'
        )

    def line(self) -> str:
        """How it ended, as HTML."""
        count = len(self.job.outputs)
        if self.stopped:
            told = f"<p>Cancelled: {len(self.pictures)} of {count} finished.</p>"
        else:
            told = f"<p>{count} picture{'s' * (count != 1)} made.</p>"
        return told + self.notes.html()

    def _work(self, engine: Engine, finished: Callable[[Made], None]) -> None:
        def made(k: int, record: PictureRecord) -> None:
            file = write_shown(self.job.outputs[k].read_bytes(), f"picture-seed-{record.seed}.png")
            finished(Made(file, record))
            self._tell(pictures=(*self.pictures, Made(file, record)), preview=None)

        telling = Telling(lambda *told: self._tell(told=told), self.stop)
        error: BaseException | None = None
        try:
            engine.generate(
                self.job, telling, preview=lambda picture: self._tell(preview=picture), finished=made,
                noted=self.notes.add,
            )  # fmt: skip
        except BaseException as raised:  # noqa: BLE001 - raised anew where it is shown
            error = raised
        self._tell(error=error, ended=True)

    def _tell(self, **news: object) -> None:
        with self._changed:
            vars(self).update(news)
            self._news += 1
            self._changed.notify_all()


class Notes:
    """What is to be known of the pictures, in the page's words. guided: whether a map acts."""

    def __init__(self, keep: Path, *, guided: bool) -> None:
        self.keep = keep
        self.lines = [] if guided else [UNGUIDED]

    def add(self, line: str) -> None:
        """Another one; what is wrong with a map is told beneath it already."""
        if not line.startswith(str(self.keep)):
            line = sentence(line.replace(f"{self.keep.parent}/", ""))
            self.lines += [line] * (line not in self.lines)

    def html(self) -> str:
        """As a list, in the status."""
        items = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        return f'<ul class="notes">{items}</ul>' if items else ""

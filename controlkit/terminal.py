"""What a command says while it works: status lines and progress, on stderr."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal to draw a bar in
SHORTEST_TIMED = 0.2  # seconds; a rate over less says nothing


class Terminal:
    """Status lines and progress on stderr: a bar in a terminal, now and then a line elsewhere.

    Where nobody hears it any more, as in a terminal that was closed, the work goes on.
    """

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._first: tuple[float, int] | None = None  # when the first progress came, and how far it was
        self._last = time.monotonic()

    def status(self, text: str) -> None:
        """Say what happens now; the next progress is that of something new."""
        self.close()
        self._last = time.monotonic()
        self._say(f"{text} ...")

    def note(self, text: str) -> None:
        """Say something without interrupting the progress."""
        if self._bar is None:
            self._say(text)
        else:
            with suppress(OSError):
                self._bar.console.print(text, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Show how far it is: the count, the rate, the time left, and a note."""
        now = time.monotonic()
        self._first = self._first or (now, done)
        seconds = (now - self._first[0]) / max(done - self._first[1], 1)  # for one step
        if now - self._first[0] < SHORTEST_TIMED:
            seconds = 0.0
        rate = "" if not seconds else f"{1 / seconds:.1f}/s" if seconds < 1 else f"{seconds:.1f} s each"
        left = f"{seconds * (total - done):.0f} s left" if seconds and done < total else ""
        if sys.stderr is not None and sys.stderr.isatty():
            with suppress(OSError):
                self._draw(done, total, "  ".join(part for part in (rate, left, note) if part))
        elif done == total or now - self._last >= PLAIN_SECONDS:
            self._last = now
            self._say("  ".join(part for part in (f"  {done}/{total}", rate, left, note) if part))

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            with suppress(OSError):
                self._bar.stop()
        self._bar = self._first = None

    def _say(self, text: str) -> None:
        with suppress(OSError):
            typer.echo(text, err=True)

    def _draw(self, done: int, total: int, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("", total=total, text="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)


@contextmanager
def opened() -> Iterator[Terminal]:
    """A terminal for one command: its bar is closed at the end, and warnings become one-line notes."""
    terminal = Terminal()
    # diffusers imports bitsandbytes, which on some processors misses a kernel that nothing here asks for
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: terminal.note(f"note: {message}")
    try:
        yield terminal
    except KeyboardInterrupt:
        terminal.close()
        terminal.note("interrupted")
        raise
    finally:
        warnings.showwarning = before
        terminal.close()

"""Data that is read from beginning to end, again and again: nothing is fetched before it is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example
from controlkit.training.data.map_use import about_idle
from controlkit.training.data.source_columns import LOOKED_AT, Columns, about_maps, choose_columns
from controlkit.training.data.source_tables import Place, example_of_row, load, plain_errors

_MARKS = 64  # more than the windows that are ever prepared ahead


class Mark(NamedTuple):
    """A place in a stream that reading can begin at."""

    in_lap: int
    """Number, in the data, of the row that comes next."""
    skipped: int = 0
    """How many rows the table that is read leaves out at its start; all before the mark where ``rows`` is
    None.
    """
    rows: dict[str, Any] | None = None
    """The library's state of that table there, by which it finds the place without reading earlier files."""


class Stream:
    """A data set as an endless repetition of its rows, in windows.

    Asked for one window after the other it reads forward. It notes where windows begin, and how long the data
    is once its end was seen: a resumed run that is given the `state` of the stopped one goes on there, and
    reads nothing to find its place.
    """

    def __init__(self, table: Any, columns: Columns, place: Place, data: DataRecipe) -> None:
        """table: an IterableDataset of the library datasets."""
        self.length: int | None = None
        self._table, self._columns, self._place, self._data = table, columns, place, data
        self._reading: Any = table
        """What is read at present: the table, or a later part of it."""
        self._open: list[Iterator[Any]] = []
        """Its iterator, if there is one."""
        weakref.finalize(self, _close, self._open)  # also before the interpreter ends, when it would fail
        self._position = -1
        """Number, in the endless repetition, of the row that comes next; -1 before the first."""
        self._in_lap = 0
        """Number of that row in the data."""
        self._skipped = 0
        """How many rows of the data come before what is read."""
        self._marks = {0: Mark(0)}
        """By position; the latest ones."""

    def window(self, number: int, size: int) -> list[Example]:
        """Return examples number * size to (number + 1) * size - 1 of the endless repetition.

        Raises ValueError, one line: the data is empty, cannot be read, or has become shorter or longer.
        """
        start = number * size
        with plain_errors(self._place.source):
            if start != self._position:
                self._go_to(start)
            self._note()
            examples = [self._next() for _ in range(size)]
            self._note()  # the next window begins here
        return examples

    def state(self, position: int) -> dict[str, Any]:
        """What `restore` needs to read from a position on, as JSON has it: the nearest mark before it."""
        at, mark = max((at, mark) for at, mark in dict(self._marks).items() if at <= position)
        return {"length": self.length, "library": _version(), "position": at, **mark._asdict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what an earlier stream knew of the same data when its `state` was taken."""
        in_lap, mark = state["in_lap"], Mark(state["in_lap"], state["skipped"], state["rows"])
        if state["library"] != _version():  # which may not understand its state; skipping rows does the same
            mark = Mark(in_lap, in_lap)
        self.length = state["length"]
        self._marks[state["position"]] = mark

    def _note(self) -> None:
        if self._position in self._marks:  # where reading has just begun the library's state says nothing yet
            return
        rows = self._reading.state_dict() if self._in_lap > self._skipped else None
        self._marks[self._position] = Mark(self._in_lap, self._skipped, rows)
        for old in list(self._marks)[1:-_MARKS]:
            del self._marks[old]

    def _next(self) -> Example:
        index, row = self._row()
        return example_of_row(row, index, columns=self._columns, place=self._place, data=self._data)

    def _row(self) -> tuple[int, Any]:
        """The next row, and its number in the data."""
        row = next(self._open[0], None)
        if row is None:
            self._end_lap()
            row = next(self._open[0], None)
        if row is None or self._in_lap == self.length:
            raise ValueError("the data has changed: it has not as many rows as it had before")
        self._in_lap += 1
        self._position += 1
        return self._in_lap - 1, row

    def _end_lap(self) -> None:
        if self._in_lap == 0:
            raise ValueError("there are no rows")
        if self.length not in (None, self._in_lap):
            raise ValueError(f"the data has changed: it had {self.length} rows and has {self._in_lap}")
        self.length = self._in_lap
        self._begin(Mark(0))

    def _go_to(self, position: int) -> None:
        """Begin at the nearest mark before a position, or in its lap, whichever leaves less to be read."""
        at = max(at for at in self._marks if at <= position)
        mark = self._marks[at]
        if self.length is not None and position % self.length <= position - at:
            at, mark = position, Mark(position % self.length, position % self.length)
        self._begin(mark)
        self._position = at
        while self._position < position:
            self._row()

    def _begin(self, mark: Mark) -> None:
        _close(self._open)
        self._in_lap, self._skipped = mark.in_lap, mark.skipped
        # always a table of its own, for the library keeps in it where it was told to begin
        self._reading = self._table.skip(mark.skipped)
        if mark.rows is not None:
            self._reading.load_state_dict(deepcopy(mark.rows))  # it may be changed as rows are read
        self._open.append(iter(self._reading))


def _version() -> str:
    from datasets import __version__

    return str(__version__)


def _close(rows: list[Any]) -> None:
    while rows:
        rows.pop().close()


def open_stream(
    data: DataRecipe, *, kind: str = "", report: Callable[[str], None] = lambda _: None
) -> Stream:
    """Open a data set of the library datasets for reading from beginning to end: a hub id or local files.

    The first rows are read, for what their columns hold, where the recipe names none of maps.

    Raises ValueError, one line: it does not exist, is empty, or a column that is named is not there.
    """
    table = load(data.source, data, streaming=True)
    if data.limit:
        table = table.take(data.limit)
    names = table.column_names
    if names is None:
        with plain_errors(data.source):
            names = list(next(iter(table), {}))
        if not names:
            raise ValueError(f"{data.source}: there are no rows")
    rows: list[Any] = []
    if data.maps != "made" and not data.map_column:  # nothing else says which columns hold maps
        with plain_errors(data.source):
            rows = list(table.take(LOOKED_AT))
    columns = choose_columns(names, data=data, kind=kind, where=data.source, rows=rows)
    report(f"{data.source}: a stream, {about_maps(columns.maps, kind, columns.unused)}")
    if columns.maps and (idle := about_idle(data, kind=kind, count=len(columns.maps))):
        report(idle)
    wanted = [columns.picture, *columns.maps, *([columns.caption] if columns.caption else [])]
    return Stream(table.select_columns(wanted), columns, Place.of(data.source), data)

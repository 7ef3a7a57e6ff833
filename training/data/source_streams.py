"""Data that is read from beginning to end, again and again: nothing is fetched before it is needed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example
from controlkit.training.data.source_columns import Columns, about_maps, choose_columns
from controlkit.training.data.source_tables import Place, example_of_row, load, plain_errors


class Stream:
    """A data set as an endless repetition of its rows, in windows.

    Asked for one window after the other it reads forward; asked for a later one, as after a resume, it has
    the library skip to it. How long the data is shows at its end; a resumed run sets `length` to what the
    stopped one had learned, so that nothing need be read again to find out.
    """

    def __init__(self, table: Any, columns: Columns, place: Place, data: DataRecipe) -> None:
        """table: an IterableDataset of the library datasets."""
        self.length: int | None = None
        self._table, self._columns, self._place, self._data = table, columns, place, data
        self._open: list[Iterator[Any]] = []
        """The iterator that is read, if there is one."""
        weakref.finalize(self, _close, self._open)  # also before the interpreter ends, when it would fail
        self._position = -1
        """Number, in the endless repetition, of the row that comes next; -1 before the first."""
        self._in_lap = 0
        """Number of that row in the data."""

    def window(self, number: int, size: int) -> list[Example]:
        """Return examples number * size to (number + 1) * size - 1 of the endless repetition.

        Raises ValueError, one line: the data is empty, cannot be read, or has become shorter or longer.
        """
        start = number * size
        with plain_errors(self._place.source):
            if start != self._position:
                self._go_to(start)
            return [self._next() for _ in range(size)]

    def _next(self) -> Example:
        row = next(self._open[0], None)
        if row is None:
            self._end_lap()
            row = next(self._open[0], None)
        if row is None or self._in_lap == self.length:
            raise ValueError("the data has changed: it has not as many rows as it had before")
        index = self._in_lap
        self._in_lap += 1
        self._position += 1
        return example_of_row(row, index, columns=self._columns, place=self._place, data=self._data)

    def _end_lap(self) -> None:
        if self._in_lap == 0:
            raise ValueError("there are no rows")
        if self.length not in (None, self._in_lap):
            raise ValueError(f"the data has changed: it had {self.length} rows and has {self._in_lap}")
        self.length, self._in_lap = self._in_lap, 0
        self._read(self._table)

    def _go_to(self, position: int) -> None:
        if self.length is None and position > 0:
            self._count_up_to(position)
        self._in_lap = position if self.length is None else position % self.length
        self._read(self._table.skip(self._in_lap) if self._in_lap else self._table)
        self._position = position

    def _read(self, table: Any) -> None:
        _close(self._open)
        self._open.append(iter(table))

    def _count_up_to(self, position: int) -> None:
        """Learn whether the data ends before a position; only then is all of it read."""
        if next(iter(self._table.skip(position)), None) is not None:
            return
        count = sum(1 for _ in self._table)
        if count == 0:
            raise ValueError("there are no rows")
        self.length = count


def _close(rows: list[Any]) -> None:
    while rows:
        rows.pop().close()


def open_stream(
    data: DataRecipe, *, kind: str = "", report: Callable[[str], None] = lambda _: None
) -> Stream:
    """Open a data set of the library datasets for reading from beginning to end: a hub id or local files.

    The first row is read, for the names of its columns where the data does not say them.

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
    columns = choose_columns(names, data=data, kind=kind, where=data.source)
    report(f"{data.source}: a stream, {about_maps(columns.maps, kind)}")
    wanted = [columns.picture, *columns.maps, *([columns.caption] if columns.caption else [])]
    return Stream(table.select_columns(wanted), columns, Place.of(data.source), data)

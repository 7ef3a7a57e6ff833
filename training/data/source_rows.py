"""Data sets listed in a text file: Hugging Face's metadata.jsonl and .csv, Fill50K's prompt.json."""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from controlkit import preprocessors
from controlkit.picture_files import SUFFIXES, read_text
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Piece
from controlkit.training.data.source_columns import LOOKED_AT, about_maps, choose_columns
from controlkit.training.data.source_doubts import MAP_FOLDERS
from controlkit.training.data.source_files import (
    LazyExamples,
    Leftover,
    RefusedPiece,
    captions_of,
    name_within,
    named_file,
    walk,
)
from controlkit.training.data.source_pairs import POSES, SHEET
from controlkit.training.data.source_splits import folders_of, take_split

METADATA = ("metadata.jsonl", "metadata.csv")
"""Hugging Face's imagefolder."""
PROMPTS = "prompt.json"
"""lllyasviel's Fill50K: source is the map, target the picture."""
_FILES = SUFFIXES | {POSES}

Row = tuple[str, dict[str, Any]]
"""What messages call a row's place ("line 3", "entry 3"), and the row."""


def open_rows(
    file: Path, *, data: DataRecipe, kind: str, report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open a data set by the file that lists it: a JSON object on each line, a JSON array, or a CSV table.

    Names in it are relative to its folder. Nothing but this file is read. A row that lacks a key, or names a
    file outside of the folder, becomes an example that says so when it is read. Of pictures in folders of
    several splits those of `data.split` are taken (`take_split`), unless the file lies in a split's own.

    Raises ValueError, one line: the file cannot be read, a line of it is broken, no column holds pictures, or
    a split is named that has none.
    """
    rows = list(_rows_of(file))
    names = list(dict.fromkeys(key for _, row in rows for key in row))
    if not rows:
        raise ValueError(f"{file} lists no pictures: it is empty")
    first = [row for _, row in rows[:LOOKED_AT]]
    columns = choose_columns(names, data=data, kind=kind, where=str(file), rows=first)
    report(f"{file}: {len(rows):,} rows, {about_maps(columns.maps, kind, columns.unused)}")
    _say_others(file, report)
    rows = _of_split(rows, columns.picture, file, data, report)
    wanted = [columns.picture, *columns.maps, *([columns.caption] if columns.caption else [])]
    kept = [(place, [row.get(key, _ABSENT) for key in wanted]) for place, row in rows]
    root, count = file.parent, len(columns.maps)

    def make(index: int) -> Example:
        place, values = kept[index]
        where = f"{file}, {place}"
        picture, *maps = (
            _piece(value, root, where=where, key=key)
            for key, value in zip(wanted, values[: 1 + count], strict=False)
        )
        captions: tuple[str, ...] = ("",)
        try:
            if columns.caption and values[-1] is not _ABSENT:
                captions = captions_of(values[-1], where=f"{where}, {columns.caption}")
        except ValueError as error:
            picture = RefusedPiece(where, str(error))
        name = values[0] if isinstance(values[0], str) and values[0] else where
        return Example(name, picture, captions[0] or data.caption, tuple(maps), captions[1:])

    return LazyExamples(len(kept), make, lambda: _unlisted(file, columns.picture))


def _say_others(file: Path, report: Callable[[str], None]) -> None:
    """Say that another listing lies beside the one that is read."""
    for name in METADATA:
        if file.name in METADATA and name != file.name and (file.parent / name).is_file():
            report(f"{file.parent}: {name} is not read, for {file.name} lies beside it")


def _of_split(
    rows: list[Row], picture: str, file: Path, data: DataRecipe, report: Callable[[str], None]
) -> list[Row]:
    """The rows of the split that is wanted."""
    root = file.parent
    if folders_of(data.split, [root.resolve().name]):
        return rows
    values = (row.get(picture) for _, row in rows)
    names = [posixpath.normpath(name_within(name, root)) if isinstance(name, str) else "" for name in values]
    taken = set(take_split(names, data, root, report))
    return [row for row, name in zip(rows, names, strict=True) if name in taken]


def _unlisted(file: Path, picture_key: str) -> list[Leftover]:
    """The pictures and maps below a listing's folder that no row of it names under any key."""
    pictures, maps = _named_by(file, picture_key)
    of_maps = {posixpath.dirname(name) for name in maps} - {posixpath.dirname(name) for name in pictures}
    of_poses = {posixpath.dirname(name) for name in maps if name.endswith(POSES)}
    known = {*MAP_FOLDERS, *preprocessors.names()}
    found = []
    for name in _below(file.parent):
        folder, suffix = posixpath.dirname(name), os.path.splitext(name)[1].lower()
        if name in pictures or name in maps or not (suffix in SUFFIXES or folder in of_poses):
            continue
        is_map = folder in of_maps or folder.partition("/")[0].casefold() in known
        problem = f"{name} is named by no row of {file.name}"
        found.append(Leftover(name, is_map, problem, "add it to a row, or delete it"))
    return found


def _named_by(file: Path, picture_key: str) -> tuple[set[str], set[str]]:
    """The pictures that a listing's rows name, and whatever else they name that may be a map."""
    pictures: set[str] = set()
    others: set[str] = set()
    for _, row in _rows_of(file):  # read again: what is asked for once need not be kept
        for key, value in row.items():
            if isinstance(value, str) and os.path.splitext(value)[1].lower() in _FILES:
                name = posixpath.normpath(name_within(value, file.parent))
                (pictures if key == picture_key else others).add(name)
    return pictures, others


def _below(root: Path) -> list[str]:
    """Files that may be pictures or maps of a listing, sorted; not those of a listing in a folder below."""
    names = sorted(walk(root, root))
    others = {posixpath.dirname(name) for name in names if posixpath.basename(name) in (*METADATA, PROMPTS)}
    closed = tuple(f"{folder}/" for folder in others if folder)
    fitting = (name for name in names if os.path.splitext(name)[1].lower() in _FILES)
    return [name for name in fitting if name != SHEET and not name.startswith(closed)]


class _Absent:
    """Stands where a row has no such key."""


_ABSENT = _Absent()


def _piece(value: Any, root: Path, *, where: str, key: str) -> Piece:
    if value is _ABSENT:
        return RefusedPiece(where, f"{where}: the key {key!r} is missing")
    if isinstance(value, dict) and isinstance(value.get("people"), list):  # a pose that stands in the row
        from controlkit.training.data.source_files import BytesPiece

        return BytesPiece(json.dumps(value).encode(), f"{where}, {key}")
    return named_file(value, root, where=f"{where}, {key}")


def _rows_of(file: Path) -> Iterator[Row]:
    text = read_text(file)
    if file.suffix.lower() == ".csv":
        return _csv_rows(file, text)
    if text.lstrip().startswith("["):
        return _array_rows(file, text)
    return _line_rows(file, text)


def _line_rows(file: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: this is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: this is not a JSON object")
        yield f"line {number}", row


def _array_rows(file: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: this is not JSON ({error})") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{file}, entry {number}: this is not a JSON object")
        yield f"entry {number}", row


def _csv_rows(file: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    longest = csv.field_size_limit(len(text) + 1)  # a caption may have any length
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"{file}, line {reader.line_num}: more fields than the first line names")
            values = {key: value for key, value in row.items() if value is not None}
            yield f"line {reader.line_num}", values
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: this is not CSV ({error})") from error
    finally:
        csv.field_size_limit(longest)

"""Data sets of the library `datasets`: written by save_to_disk, parquet and arrow files, or from the hub.

The library is optional. It reads tables and fetches from the hub; pictures come out of it as the bytes that
went in, and are decoded where all others are.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit.hub import first_sentence
from controlkit.naming import did_you_mean
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import ArrayPiece, Example, Piece
from controlkit.training.data.source_columns import LOOKED_AT, Columns, about_maps, choose_columns
from controlkit.training.data.source_files import (
    BytesPiece,
    InsideFile,
    LazyExamples,
    RefusedPiece,
    captions_of,
    leads_out,
    named_file,
)
from controlkit.training.data.source_hub import check_hub

TABLES = (".parquet", ".arrow")
_SAVED = ("state.json", "dataset_dict.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any(os.path.isfile(folder / name) for name in _SAVED)  # pathlib raises where it may not look


def is_hub_id(source: str) -> bool:
    """Whether a source may be a data set's name on the hub: "owner/name"."""
    return bool(_HUB_ID.fullmatch(source)) and "/" in source


def library(source: str) -> Any:
    """Return the library `datasets`. Raises ValueError that says how to install it where it is missing."""
    try:
        import datasets
    except ImportError as error:
        what = (
            ""
            if os.path.exists(os.path.expanduser(source))
            else " is no folder here; if it is on the hub, it"
        )
        raise ValueError(
            f"{source}{what} is read by the library datasets, which is not installed: "
            "uv sync --extra data, or pip install datasets"
        ) from error
    return datasets


@contextmanager
def plain_errors(source: str) -> Iterator[None]:
    """Turn what the library raises on missing, unreachable or damaged data into one line."""
    datasets = library(source)
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"there is no data set {source}, here or on the hub: {first_sentence(error)}"
        ) from error
    except ConnectionError as error:
        raise ValueError(f"the data set {source} cannot be fetched: {first_sentence(error)}") from error
    except ValueError as error:  # pyarrow's errors are among them
        raise ValueError(f"the data set {source}: {' '.join(str(error).split())}") from error
    except LookupError as error:  # of files that are none, or that lack a key
        raise ValueError(
            f"the data set {source} cannot be read: it is empty, or not whole ({first_sentence(error)})"
        ) from error
    except Exception as error:  # of a README.md that is no card, what reading its YAML meets
        raise ValueError(f"the data set {source} cannot be read: {first_sentence(error)}") from error


def load(source: str, data: DataRecipe, *, streaming: bool = False) -> Any:
    """Return the split of a data set as the library has it, with pictures left as bytes.

    Raises ValueError, one line: there is none, it has no such split, or it cannot be read or fetched.
    """
    datasets = library(source)
    if not os.path.exists(os.path.expanduser(source)):
        check_hub(source)
    with _quiet(datasets), plain_errors(source):
        loaded = _load(datasets, Path(source).expanduser(), source, data.split, streaming=streaming)
    if isinstance(loaded, Mapping):
        if data.split not in loaded:
            hint = did_you_mean(data.split, loaded)
            raise ValueError(f"data.split: {source} has no {data.split!r}{hint}; splits: {', '.join(loaded)}")
        loaded = loaded[data.split]
    return _undecoded(datasets, loaded)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """No progress bars and no log lines of the library's: what matters in them is raised, too."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _load(datasets: Any, path: Path, source: str, split: str, *, streaming: bool) -> Any:
    if path.is_dir() and is_saved(path):
        saved = datasets.load_from_disk(str(path))
        if not streaming:
            return saved
        if isinstance(saved, Mapping):
            return {name: table.to_iterable_dataset() for name, table in saved.items()}
        return saved.to_iterable_dataset()
    if path.is_dir():
        return datasets.load_dataset(str(path), streaming=streaming)
    if path.suffix in TABLES:
        files = {split: str(path)}
        return datasets.load_dataset(path.suffix[1:], data_files=files, streaming=streaming)
    return datasets.load_dataset(source, streaming=streaming)


def _undecoded(datasets: Any, table: Any) -> Any:
    """The same data with pictures as bytes: what was saved is what is trained on, and hashed."""
    if table.features is None:
        return table.decode(False)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def open_table(
    source: str, *, data: DataRecipe, kind: str, report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open a data set whose rows can be asked for in any order; reads the captions and nothing else.

    Raises ValueError, one line: as `load`, or a column that is named is not there.
    """
    table = load(source, data)
    first = [table[index] for index in range(min(LOOKED_AT, len(table)))]
    columns = choose_columns(table.column_names, data=data, kind=kind, where=source, rows=first)
    report(f"{source}: {len(table):,} rows, {about_maps(columns.maps, kind, columns.unused)}")
    captions = table.select_columns([columns.caption])[:][columns.caption] if columns.caption else None
    parts = {name: table.select_columns([name]) for name in (columns.picture, *columns.maps)}
    place = Place.of(source)

    def make(index: int) -> Example:
        where = f"{source} row {index}"
        pieces = [CellPiece(part, index, name, place) for name, part in parts.items()]
        picture: Piece = pieces[0]
        told: tuple[str, ...] = ("",)
        try:
            if captions is not None:
                told = captions_of(captions[index], where=f"{where}, {columns.caption}")
        except ValueError as error:
            picture = RefusedPiece(where, str(error))
        return Example(where, picture, told[0] or data.caption, tuple(pieces[1:]), told[1:])

    return LazyExamples(len(table), make)


def example_of_row(
    row: Mapping[str, Any], index: int, *, columns: Columns, place: Place, data: DataRecipe
) -> Example:
    """Build the example of a stream's row, which is in memory."""
    where = f"{place.source} row {index}"
    pieces = [
        _piece_of(row.get(name), place, where=f"{where}, column {name}")
        for name in (columns.picture, *columns.maps)
    ]
    told: tuple[str, ...] = ("",)
    try:
        told = captions_of(row.get(columns.caption), where=f"{where}, {columns.caption}")
    except ValueError as error:
        pieces[0] = RefusedPiece(where, str(error))
    return Example(where, pieces[0], told[0] or data.caption, tuple(pieces[1:]), told[1:])


@dataclass(frozen=True)
class Place:
    """Where a data set came from, and which files its rows may name."""

    source: str
    roots: tuple[Path, ...]
    """Folders whose files may be read."""

    @classmethod
    def of(cls, source: str) -> Place:
        """The place of a source: a local one's own folder, or for the hub's what the library fetched."""
        path = Path(source).expanduser()
        if path.exists():
            return cls(source, (path if path.is_dir() else path.parent,))
        from datasets import config
        from huggingface_hub import constants

        return cls(source, (Path(config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)))


@dataclass(frozen=True, eq=False)
class CellPiece(Piece):
    """A cell of a table, read when it is asked for."""

    table: Any
    """The table with this column alone: reading a row of it reads no other pictures."""
    row: int
    column: str
    place: Place

    @property
    def name(self) -> str:  # type: ignore[override]
        """The row and the column."""
        return f"{self.place.source} row {self.row}, column {self.column}"

    def read(self) -> bytes | NDArray[Any]:
        """The cell's bytes or array. Raises ValueError: it holds neither, or a file that may not be read."""
        with plain_errors(self.place.source):
            value = self.table[self.row][self.column]
        return _piece_of(value, self.place, where=self.name).read()


def _piece_of(value: Any, place: Place, *, where: str) -> Piece:
    """The piece that a cell's value is: {bytes, path}, bytes, a file's name, a pose, or an array."""
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
        return BytesPiece(value["bytes"], where)
    if isinstance(value, bytes):
        return BytesPiece(value, where)
    if isinstance(value, Mapping) and isinstance(value.get("people"), list):
        return BytesPiece(json.dumps(dict(value)).encode(), where)
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        return _file_of(value["path"], place, where=where)
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        return BytesPiece(value.encode(), where)
    if isinstance(value, str):
        return _file_of(value, place, where=where)
    if isinstance(value, Sequence) and value:
        return _array_of(value, where=where)
    what = "nothing" if value is None else f"{type(value).__name__}"
    return RefusedPiece(where, f"{where} holds {what}, no picture")


def _array_of(value: Sequence[Any], *, where: str) -> Piece:
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        return RefusedPiece(where, f"{where} holds a list that is no picture")
    if array.ndim not in (2, 3) or array.dtype.kind not in "iufb":
        return RefusedPiece(where, f"{where} holds a list that is no picture")
    if array.dtype.kind == "i" and array.min() >= 0 and array.max() <= 65535:
        array = array.astype(np.uint8 if array.max() <= 255 else np.uint16)
    return ArrayPiece(array, where)


def _file_of(name: str, place: Place, *, where: str) -> Piece:
    """The file that a row names: below the data set's folder, or what the library fetched of it."""
    if name.startswith("hf://"):
        return _RemotePiece(name, place.source, where)
    if not os.path.isabs(name):
        return named_file(name, place.roots[0], where=where)
    for root in place.roots:
        if not leads_out(Path(name), root):
            return InsideFile(Path(name), root)
    problem = f"{where}: {name} lies outside of the data set and is not read"
    return RefusedPiece(where, problem)


@dataclass(frozen=True, eq=False)
class _RemotePiece(Piece):
    """A file on the hub that a stream's row names; fetched when it is read."""

    address: str
    source: str
    name: str

    def read(self) -> bytes:
        """The file's bytes. Raises ValueError: of another data set, or it cannot be fetched."""
        if not re.match(rf"hf://datasets/{re.escape(self.source)}[@/]", self.address) or ".." in self.address:
            raise ValueError(f"{self.name}: {self.address} lies outside of the data set and is not read")
        import fsspec

        with plain_errors(self.source), fsspec.open(self.address, "rb") as file:
            return bytes(file.read())

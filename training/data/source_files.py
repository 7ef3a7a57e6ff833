"""What every source of examples is built from: files that stay inside their data set, rows made on demand.

A data set comes from somebody else. A name in it that leads out of its folder (`../x.png`, an absolute path
elsewhere, a link) is never followed: whoever trains on pictures of strangers would otherwise read, and
publish, files of their own. The hub's cache keeps a data set's files beside its folder, as links say: those
count as within.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

from controlkit.training.data.examples import Example, FilePiece, Piece

_OF_RUN = (".lock", "metrics.jsonl", "checkpoints", "samples", "controlnet")
MAX_BYTES = 2**30
"""Larger files are no pictures."""


@dataclass(frozen=True)
class InsideFile(FilePiece):
    """A file of a data set; read only if it lies in the data set's folder, links included."""

    root: Path

    def read(self) -> bytes:
        """The file's bytes. Raises ValueError, one line: a link that leads out, no plain file, too large."""
        problem = leads_out(self.path, self.root)
        if problem:
            raise ValueError(problem)
        try:
            status = self.path.stat()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise ValueError(f"{self.path} is not a file")
        if status.st_size > MAX_BYTES:
            raise ValueError(f"{self.path} has {status.st_size:,} bytes, too many for a picture")
        return super().read()


@dataclass(frozen=True, eq=False)
class RefusedPiece(Piece):
    """What stands where a picture or a map was to be, and cannot be used: reading it says why."""

    name: str
    problem: str
    code: str = "refused"
    """What a look at the data calls it, in a word or two."""
    cure: str = ""

    def read(self) -> bytes:
        """Raises ValueError with the problem, always."""
        raise ValueError(self.problem)


@dataclass(frozen=True, eq=False)
class BytesPiece(Piece):
    """The bytes of a file that is in memory."""

    content: bytes
    name: str

    def read(self) -> bytes:
        """The bytes."""
        return self.content


def leads_out(path: Path, root: Path) -> str:
    """Say why a path may not be read: where its links are followed it lies outside `root`. "" if it may."""
    real = os.path.realpath(path)
    if any(_is_within(real, place) for place in _places(str(root))):
        return ""
    return (
        f"{path} leads out of the data set (to a file elsewhere) and is not read: copy the file into {root}"
    )


def _is_within(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


@lru_cache(maxsize=64)
def _places(folder: str) -> tuple[str, ...]:
    """Where a data set's files may lie: in its folder; of a snapshot in the hub's cache among its blobs."""
    real = os.path.realpath(folder)
    cached, found, _ = real.partition(f"{os.sep}snapshots{os.sep}")
    is_cached = found and os.path.basename(cached).startswith("datasets--")
    return (real, os.path.join(cached, "blobs")) if is_cached else (real,)


def named_file(name: object, root: Path, *, where: str) -> Piece:
    """Return the piece for a file that a data set names, relative to its folder `root`; opens nothing.

    where: what messages call the place of the name, such as "metadata.jsonl, line 3, file_name".
    A name that is none, is absolute and elsewhere, or climbs out becomes a piece that refuses to be read.
    """
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return RefusedPiece(where, f"{where}: a file's name is wanted, not {name!r:.60}")
    path = name_within(name, root)
    drive = len(path) > 1 and path[1] == ":"
    if path.startswith("/") or drive or ".." in path.split("/"):
        problem = f"{where}: {name!r} leads out of the data set and is not read; names are relative to {root}"
        return RefusedPiece(where, problem)
    return InsideFile(root / path, root)


def name_within(name: str, root: Path) -> str:
    """A file's name as a data set writes it, on whatever system, with "/" and relative to its folder, if it
    lies there.
    """
    path = name.replace("\\", "/")
    if path.startswith("/") and _is_within(os.path.normpath(path), os.path.abspath(root)):
        return os.path.relpath(path, root)
    return path


@dataclass(frozen=True)
class Leftover:
    """A file of a data set that is in none of its pairs."""

    name: str
    """Relative to the data set's folder."""
    is_map: bool
    """Whether it lies where the maps lie."""
    problem: str
    """Why it is in none, in plain words, with its name."""
    cure: str


class LazyExamples(Sequence[Example]):
    """Examples made when they are asked for: a million rows take no more memory than their names."""

    def __init__(
        self,
        count: int,
        make: Callable[[int], Example],
        leftovers: Callable[[], list[Leftover]] = list,
    ) -> None:
        """count: how many there are. make: builds one of them by its number; called from several threads.

        leftovers: lists the files that are in no example, whatever `data.limit` is; it may read folders.
        """
        self._count, self._make, self.leftovers = count, make, leftovers

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(self._count)[index]]
        return self._make(range(self._count)[index])  # the range refuses what lies outside

    def __iter__(self) -> Iterator[Example]:
        return map(self._make, range(self._count))


def walk(folder: Path, root: Path, *, run: Callable[[str], None] = lambda _: None) -> Iterator[str]:
    """Yield the names of the files below a folder, relative to it, with "/", unsorted; hidden ones and what
    trainings wrote there (`is_run`) are left out, and `run` is told of each of these folders.

    Raises ValueError: a folder is a link that leads out of `root`, or cannot be listed.
    """
    problem = leads_out(folder, root)
    if problem:
        raise ValueError(problem)
    waiting = [""]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(folder / place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if not entry.is_dir(follow_symlinks=False):
                        if not (entry.is_symlink() and entry.is_dir()):
                            yield place + entry.name
                        elif problem := leads_out(Path(entry.path), root):
                            raise ValueError(problem)
                    elif is_run(Path(entry.path)):
                        run(f"{place}{entry.name}/")
                    else:
                        waiting.append(f"{place}{entry.name}/")
        except OSError as error:
            raise ValueError(f"the folder {folder / place} cannot be read: {error.strerror}") from error


def is_run(folder: Path) -> bool:
    """Whether a folder is a training's, whose samples and sheets are no pictures to train on."""
    # of a folder that may not be entered pathlib raises, before whoever lists it can say so
    return os.path.isfile(folder / "config.toml") and any(os.path.exists(folder / name) for name in _OF_RUN)


def read_caption(piece: Piece) -> str:
    """Return the text of a caption's file, on one line. Raises ValueError: not there, or not UTF-8 text."""
    content = piece.read()
    assert isinstance(content, bytes)
    try:
        return " ".join(content.decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.name} is not UTF-8 text: save it as that") from error


def captions_of(value: object, *, where: str) -> tuple[str, ...]:
    """Return captions as data sets hold them: a text, none at all, or a list; at least one, maybe empty.

    Raises ValueError with `where`: it is something else.
    """
    found = []
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(text, str | None):
            raise ValueError(f"{where}: a caption is a text, not {text!r:.60}")
        found.append(" ".join((text or "").split()))
    return tuple(text for text in found if text) or ("",)

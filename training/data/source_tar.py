"""Tar files, read where their members lie: which shards there are, and an index of each."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from controlkit.picture_files import matches
from controlkit.training.data.examples import Piece
from controlkit.training.data.source_files import MAX_BYTES, RefusedPiece

_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class TarPiece(Piece):
    """A member of a tar file."""

    shard: Path
    offset: int
    """Bytes from the start of the shard."""
    size: int
    """Bytes."""
    name: str

    def read(self) -> bytes:
        """The member's bytes. Raises ValueError: the shard cannot be read, or has become shorter."""
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ValueError(f"{self.name} cannot be read: {error.strerror or error}") from error
        if len(content) < self.size:
            raise ValueError(f"{self.name} is cut off: {self.shard} has become shorter")
        return content


@dataclass(frozen=True)
class Shard:
    """The index of a tar file: a row for each example, a column for each kind of member."""

    path: Path
    keys: list[str]
    members: list[str]
    """What follows the key and its dot: "jpg", "map.png", "txt"."""
    spans: NDArray[np.int64]
    """(rows, columns, 2): offset and size in bytes; -1 where there is no such member."""

    def piece(self, row: int, member: str) -> Piece:
        """One member of an example."""
        name = f"{self.path}/{self.keys[row]}.{member}"
        column = self.members.index(member) if member in self.members else -1
        offset, size = self.spans[row, column].tolist() if column >= 0 else (-1, -1)
        if offset < 0:
            return RefusedPiece(name, f"{name} is not there")
        if size > MAX_BYTES:
            return RefusedPiece(name, f"{name} has {size:,} bytes, too many for a picture")
        return TarPiece(self.path, offset, size, name)


def is_shards(source: str) -> bool:
    """Whether a source is written as tar files are: one, a pattern, a range in braces."""
    return source.lower().endswith((".tar", *_PACKED))


def find_shards(source: str) -> list[Path]:
    """Return the tar files that a file, a folder, a pattern or "{0000..0009}" stands for, in order.

    Raises ValueError, one line: there are none, one is compressed, or it is no file but an address.
    """
    if re.match(r"[a-z][a-z0-9+]*:(//|\S* )", source):
        raise ValueError(f"{source}: shards are read from disk; fetch them first and name the files")
    if os.path.isdir(source):
        paths = [Path(source, name) for name in sorted(os.listdir(source)) if is_shards(name)]
    else:
        paths = []
        for part in _braces(source):
            found = matches(part) if glob.has_magic(part) and not os.path.exists(part) else [part]
            paths += map(Path, found)
    if not paths:
        raise ValueError(f"{source}: no tar file is there")
    for path in paths:
        if path.name.lower().endswith(_PACKED):
            raise ValueError(
                f"{path} is compressed, so nothing in it can be found quickly: unpack it to a .tar"
            )
    return paths


def _braces(pattern: str) -> Iterator[str]:
    """Expand {0000..0009} and {a,b}."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        yield pattern
        return
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        parts = [f"{number:0{len(ends[1])}d}" for number in range(first, last + 1)]
    else:
        parts = match[1].split(",")
    for part in parts:
        yield from _braces(pattern[: match.start()] + part + pattern[match.end() :])


def read_index(path: Path, report: Callable[[str], None] = lambda _: None) -> Shard:
    """Read the headers of a tar file. report: called with a line where its end may be missing.

    Raises ValueError, one line: missing, damaged, cut off, compressed.
    """
    keys: dict[str, int] = {}
    members: dict[str, int] = {}
    found: list[tuple[int, int, int, int]] = []
    for name, offset, size in _tar_members(path, report):
        folder, _, base = name.rpartition("/")
        stem, dot, member = base.partition(".")
        if not stem or not dot or base.startswith("__"):
            continue
        key = f"{folder}/{stem}" if folder else stem
        member = member.lower()
        found.append(
            (keys.setdefault(key, len(keys)), members.setdefault(member, len(members)), offset, size)
        )
    spans = np.full((len(keys), len(members), 2), -1, np.int64)
    for row, column, offset, size in found:
        if spans[row, column, 0] >= 0:
            twice = f"{list(keys)[row]}.{list(members)[column]}"
            raise ValueError(f"{path} holds {twice} twice: which of them is meant?")
        spans[row, column] = offset, size
    return Shard(path, list(keys), list(members), spans)


def _tar_members(path: Path, report: Callable[[str], None]) -> Iterator[tuple[str, int, int]]:
    try:
        length = os.path.getsize(path)
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else it keeps all of them
                if not member.isfile() or member.issparse():
                    continue
                if member.offset_data + member.size > length:
                    raise ValueError(f"{path} is cut off in {member.name}")
                yield member.name.removeprefix("./"), member.offset_data, member.size
            end = archive.offset
        with open(path, "rb") as file:  # tarfile takes a damaged header for the end
            file.seek(end)
            block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            raise ValueError(f"{path} is damaged {end:,} bytes from its start")
        if not block:  # some write none, so this may be all
            report(f"{path} ends without the mark of a tar file's end: if it was cut off, files are missing")
    except tarfile.TarError as error:
        raise ValueError(f"{path} cannot be read as a tar file: {_one_line(error)}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__

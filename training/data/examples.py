"""A data set as the training sees it: a sequence of pairs, each a picture, a caption and its map.

Nothing is read before it is asked for. Where examples come from is the business of `sources.py`; what is done
with one of them at a visit is that of `visits.py`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit import images


class Piece(ABC):
    """A picture or a map, somewhere: in a file, in an archive, in a table's row, in memory."""

    name: str
    """What messages call it: a path, "shards/00001.tar/0004.png", "row 17, column image"."""

    @abstractmethod
    def read(self) -> bytes | NDArray[Any]:
        """The bytes of a file, or an array H×W or H×W×C.

        Raises ValueError, one line naming the piece, where it is not there or cannot be read.
        """

    def digest(self) -> bytes:
        """SHA-256 of the content: equal digests, equal pixels."""
        return content_digest(self.read())


@dataclass(frozen=True)
class FilePiece(Piece):
    """A file."""

    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        """The path, as it was given."""
        return str(self.path)

    def read(self) -> bytes:
        """The file's bytes."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True, eq=False)
class ArrayPiece(Piece):
    """An array that is in memory, or mapped from disk."""

    array: NDArray[Any]
    name: str = "an array"

    def read(self) -> NDArray[Any]:
        """The array itself."""
        return self.array


@dataclass(frozen=True, eq=False)
class Example:
    """One pair of a data set, not yet read.

    ``maps`` is empty where the map is to be made of the picture; several are stacked, channel by channel. A
    piece whose bytes are JSON holds a pose (any layout that `controlkit.preprocessors.read_poses` reads).
    ``more_captions`` are those beside the first one: each visit is told one of all of them.
    """

    name: str
    """What messages call the pair."""
    picture: Piece
    caption: str
    maps: tuple[Piece, ...] = ()
    more_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All of them, the first one first."""
        return self.caption, *self.more_captions


Examples = Sequence[Example]
"""A data set whose examples can be asked for in any order. Reading an example reads no picture."""


def content_digest(content: bytes | NDArray[Any]) -> bytes:
    """SHA-256 of what a piece's `read` gave: the same as its `digest`."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).digest()
    array = np.ascontiguousarray(content)
    return hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).digest()


def digest_of_pairs(pairs: Iterable[tuple[Example, Sequence[str]]]) -> str:
    """SHA-256 over pairs, in their order: of each the digests of picture and maps, and its captions."""
    total = hashlib.sha256()
    for example, content in pairs:
        captions = "\0".join(example.captions)  # several are not one of their words
        total.update(" ".join([*content, captions]).encode())
    return total.hexdigest()


def size_of_example(example: Example) -> tuple[int, int]:
    """Width and height of an example's picture, upright, from its header. Raises ValueError that names it."""
    return size_and_digest(example, hashed=False)[0]


def size_and_digest(example: Example, *, hashed: bool = True) -> tuple[tuple[int, int], str]:
    """The size of an example's picture as `size_of_example` has it, and its digest, "" unless ``hashed``."""
    try:
        content = example.picture.read()
        return images.stored_size(content), content_digest(content).hex() if hashed else ""
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from error

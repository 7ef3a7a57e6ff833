"""What earlier checks found, on disk: a second look at files that have not changed costs next to nothing."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path
from typing import Any

from controlkit import files
from controlkit.training.data.check_facts import Facts
from controlkit.training.data.examples import FilePiece, Piece
from controlkit.training.data.source_files import InsideFile, leads_out
from controlkit.training.data.source_tar import TarPiece

VERSION = 4  # raise when the checks or the lint find other things

Key = tuple[str, list[int]]
"""Where a piece lies, and the numbers that change when its content does."""


class Memory:
    """The facts about the files of one data set. What could not be read is not kept."""

    def __init__(self, source: str, *, folder: Path | None = None) -> None:
        """source: what the recipe calls the data set. folder: where the memory is kept."""
        place = os.path.abspath(os.path.expanduser(source))
        name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self._path = (folder or files.cache_folder() / "checks") / f"{name}.json"
        self._files: dict[str, Any] = {}
        """By place: the numbers, and by role what was found."""
        self._changed = False
        self._may_read = lru_cache(maxsize=4096)(_may_read)
        self._status = lru_cache(maxsize=4096)(_numbers)
        with suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or damaged
            kept = json.loads(self._path.read_bytes())
            if kept["version"] == VERSION:
                self._files = dict(kept["files"])

    def key(self, piece: Piece) -> Key | None:
        """What a piece is known by; None for one that has no file, or whose file may not be read."""
        try:
            if isinstance(piece, TarPiece):
                return f"{os.path.abspath(piece.shard)}@{piece.offset}+{piece.size}", self._status(
                    piece.shard
                )
            if isinstance(piece, FilePiece):
                place = os.path.abspath(piece.path)
                status = os.lstat(place)
                if not stat.S_ISREG(status.st_mode):
                    return None
                if isinstance(piece, InsideFile) and not self._may_read(os.path.dirname(place), piece.root):
                    return None
                return place, _numbers_of(status)
        except OSError:
            return None
        return None

    def recall(self, key: Key | None, role: str, *, thorough: bool) -> Facts | None:
        """The facts about an unchanged piece that was looked at in that role, as thoroughly or more."""
        numbers, roles = self._files.get(key[0], (None, {})) if key else (None, {})
        if key is None or numbers != key[1]:
            return None
        found = roles.get(role)
        if not found and not thorough:  # what was looked through for some kind will do
            found = next((facts for other, facts in roles.items() if other.startswith(f"{role} ")), None)
        if not found or (thorough and not found[0]):
            return None
        _, width, height, digest, grey, people, lint, refused = found
        return Facts(width, height, digest, grey, people, tuple(map(tuple, lint)), refused)

    def keep(self, key: Key | None, role: str, facts: Facts, *, thorough: bool) -> None:
        """Remember the facts about a piece; `key` is from before it was read."""
        if key is None:
            return
        numbers, roles = self._files.get(key[0], (None, {}))
        roles = dict(roles) if numbers == key[1] else {}
        self._files[key[0]] = (key[1], roles | {role: [thorough, *astuple(facts)]})
        self._changed = True

    def save(self) -> None:
        """Write it down. Raises ValueError, one line, where that is not possible."""
        if not self._changed:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {self._path.parent}: {error.strerror}") from error
        content = json.dumps({"version": VERSION, "files": self._files}, separators=(",", ":"))
        files.write_bytes(self._path, content.encode(), durable=False)


def _may_read(folder: str, root: Path) -> bool:
    return not leads_out(Path(folder), root)


def _numbers(path: Path) -> list[int]:
    return _numbers_of(os.stat(path))


def _numbers_of(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]

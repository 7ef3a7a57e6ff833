"""The content of files, and of what is in tar files, by digests: remembered while size and times stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from controlkit.training.data.examples import FilePiece, Piece
from controlkit.training.data.source_tar import TarPiece

_MANY = 5000  # files, whose reading is worth a line


class Digests:
    """Digests of pieces: files, and what is in tar files, are read once, and again when they change; others
    (a table's cells, arrays) each time.
    """

    def __init__(self, memory: Path) -> None:
        """``memory``: a file of JSON lines that is read, and added to; it may be lost or damaged."""
        self._memory = memory
        self._known: dict[str, str] = {}
        with suppress(OSError):
            for line in memory.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError):
                    key, digest = json.loads(line)
                    self._known[key] = digest

    def of(
        self, pieces: Sequence[Piece], *, report: Callable[[str], None] = lambda _: None, workers: int = 4
    ) -> list[str]:
        """SHA-256 of each piece's content, in hexadecimal. Raises ValueError where one cannot be read."""
        stated = lru_cache(maxsize=4096)(_state)  # of a shard once, not for each of its members
        keys = [_key(piece, stated) or number for number, piece in enumerate(pieces)]
        unknown = {key: piece for key, piece in zip(keys, pieces, strict=True) if key not in self._known}
        if len(unknown) > _MANY:
            report(f"reading {len(unknown)} files for the first time")
        with ThreadPoolExecutor(workers) as threads:
            found = list(threads.map(lambda piece: piece.digest().hex(), unknown.values()))
        fresh = dict(zip(unknown, found, strict=True))
        self._remember({key: digest for key, digest in fresh.items() if isinstance(key, str)})
        return [fresh.get(key) or self._known[str(key)] for key in keys]

    def _remember(self, digests: dict[str, str]) -> None:
        self._known |= digests
        if not digests:
            return
        with suppress(OSError):  # a memory that cannot be kept costs time only
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with self._memory.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in digests.items())


def _key(piece: Piece, stated: Callable[[Path], str]) -> str:
    """What tells one state of a file, or of its part, from another; "" for what is in no file."""
    if not isinstance(piece, FilePiece | TarPiece):
        return ""
    try:
        if isinstance(piece, TarPiece):
            return f"{stated(piece.shard)}|{piece.offset}+{piece.size}"
        return _state(piece.path)
    except OSError:
        return ""


def _state(path: Path) -> str:
    status = path.stat()
    # the second time cannot be set: an archive that is unpacked anew may bring the first one with it
    return f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"

"""The content of files by their digests, remembered as long as a file's size and times stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from controlkit.training.data.examples import FilePiece, Piece

_MANY = 5000  # files, whose reading is worth a line


class Digests:
    """Digests of pieces: files are read once, and again when they change; others each time."""

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
        keys = [_key(piece) for piece in pieces]
        unknown = [k for k, key in enumerate(keys) if key not in self._known]
        if len(unknown) > _MANY:
            report(f"reading {len(unknown)} files for the first time")
        with ThreadPoolExecutor(workers) as threads:
            found = list(threads.map(lambda k: pieces[k].digest().hex(), unknown))
        fresh = dict(zip(unknown, found, strict=True))
        self._remember({keys[k]: digest for k, digest in fresh.items() if keys[k]})
        return [fresh.get(k) or self._known[key] for k, key in enumerate(keys)]

    def _remember(self, digests: dict[str, str]) -> None:
        self._known |= digests
        if not digests:
            return
        with suppress(OSError):  # a memory that cannot be kept costs time only
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with self._memory.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(item) + "\n" for item in digests.items())


def _key(piece: Piece) -> str:
    """What tells one state of a file from another; "" for what is no file."""
    if not isinstance(piece, FilePiece):
        return ""
    try:
        status = piece.path.stat()
    except OSError:
        return ""
    # the second time cannot be set: an archive that is unpacked anew may bring the first one with it
    return f"{piece.path.absolute()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ctime_ns}"

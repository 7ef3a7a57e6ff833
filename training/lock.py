"""One run, one process: a lock on the folder that ends with the process, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controlkit.files import FULL_DISK

NAME = ".lock"


@contextmanager
def locked(
    folder: Path, *, what: str = "training", instead: str = "another folder with out=FOLDER"
) -> Iterator[None]:
    """Hold the folder's lock for the block; the system gives it back when the process dies.

    what: is going on in the folder. instead: what else may be chosen.

    Raises ValueError where another process, which is named, holds it, where the disk is full, and where the
    lock cannot be opened. On a disk without locks there is none.
    """
    path = folder / NAME
    descriptor = _opened(path)
    with open(descriptor, "r+", encoding="utf-8") as file:
        # a lock on a file that its last holder has removed meanwhile is worth nothing
        if not _take(file.fileno()) or not _is_at(path, file.fileno()):
            holder = file.read(100).strip()
            raise ValueError(
                f"another {what}{f' (process {holder})' if holder else ''} is running in {folder}:"
                f" wait for it, or choose {instead}"
            )
        try:
            _sign(path, file.fileno())
            yield
        finally:
            path.unlink(missing_ok=True)


def holder(folder: Path) -> int | None:
    """The process that trains in a folder now; None where nobody does, or where the disk has no locks."""
    path = folder / NAME
    try:
        with open(path, "r+", encoding="utf-8") as file:
            if _take(file.fileno()):  # given back when the file is closed
                return None
            written = file.read(100).strip()
    except OSError:
        return None
    return int(written) if written.isdecimal() else None


def _opened(path: Path) -> int:
    """The lock's file, open. Raises ValueError where something else is there, or it may not be written."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write {path}: {FULL_DISK.get(error.errno or 0, error.strerror)}")


def _sign(path: Path, descriptor: int) -> None:
    """Write into the lock whose it is. Raises ValueError where that cannot be."""
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
    except OSError as error:
        raise _cannot_write(path, error) from error


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _take(descriptor: int) -> bool:
    """Whether the lock could be had (or there are none here)."""
    try:
        import fcntl
    except ImportError:  # Windows
        return _take_on_windows(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a network disk without locks
        return True
    return True


def _take_on_windows(descriptor: int) -> bool:
    import msvcrt

    try:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return False
    return True

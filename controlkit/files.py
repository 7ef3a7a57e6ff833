"""Writing files so that nothing is ever half-written, and saying in one line why it cannot be done.

A file is written under a temporary name in its own folder and renamed when it is complete. Its mode is what
the umask gives to any new file (``0o666 & ~umask``), because the kernel applies it to the file we create.
Every failure that a user can cause (no such folder, no permission, full disk) is a one-line ``ValueError``.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from controlkit.naming import kind_of_value

PathLike = str | os.PathLike[str]

_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{32}\.tmp")  # as `_temporary_beside` has it
_START, _SAMPLES, _SAMPLE = 1 << 20, 64, 1 << 14  # bytes, pieces, and bytes of each: see `sampled`
FULL_DISK: Mapping[int, str] = {  # what the system says where no more can be written
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full for this user",
    errno.EFBIG: "it would be larger than this disk's format or this user's limit allows",
}


def at_home(path: str) -> str:
    """``path`` with its leading ``~`` read as a shell does, which does not within a word: kind=~/a.jpg.

    A file that is called so, and the home of an unknown user, stay as they are written.
    """
    return path if os.path.exists(path) else os.path.expanduser(path)


def as_text(what: str, given: object) -> str:
    """A name or a path as text; ``what`` it names. Raises ValueError for anything else, as None."""
    if not isinstance(given, str | os.PathLike):
        raise ValueError(f"{what} is a name or a path, not {kind_of_value(given)}")
    return os.fspath(given)


def write_bytes(path: PathLike, data: bytes, *, durable: bool = True) -> None:
    """Write ``data`` to ``path`` atomically: afterwards the file is the old one or the new one, never a part.

    A symbolic link stays and its target is replaced. A device or pipe is written directly. ``durable`` waits
    until the disk has the data, so that this holds when the power fails, too; without it a new file may then
    be empty.

    Raises:
        ValueError: the folder does not exist, is not writable, the disk is full, or ``path`` is a folder.
    """
    target = Path(os.path.realpath(path))
    with _plain_errors(path):
        _refuse_folder(target)
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        temporary = _temporary_beside(target)
        try:
            _write_new(temporary, data, durable=durable)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: PathLike, text: str) -> None:
    """Write ``text`` as UTF-8 with ``\\n`` line ends; otherwise as :func:`write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: PathLike, obj: Any) -> None:
    """Write ``obj`` as indented JSON with a final line end; otherwise as :func:`write_bytes`.

    Not-a-number and infinities are refused (``ValueError``): they are not JSON, and readers choke on them.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def replace_folder(path: PathLike) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; when the block succeeds it takes the place of ``path``.

    A folder that was at ``path`` is moved away first and deleted last, contents and all: the caller decides
    whether it may be. When the block fails the new folder is removed and the old one is untouched. All files
    get the mode that the umask gives to new files, whatever their writer chose (safetensors writes 0600).

    Raises:
        ValueError: the parent does not exist or is not writable, the disk is full, or ``path`` is a file.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_beside(target)
    with _plain_errors(path):
        if target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name", str(target))
        temporary.mkdir()
    try:
        with _plain_errors(path, only=FULL_DISK):
            yield temporary
        with _plain_errors(path):
            _apply_umask(temporary)
            _swap_in(temporary, target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, ValueError) and str(temporary) in str(error):
            # said of a file in the folder, whose temporary name tells nobody anything
            raise ValueError(str(error).replace(str(temporary), os.fspath(path))) from error
        raise


@contextmanager
def replace_file(path: PathLike) -> Iterator[Path]:
    """Yield an empty file beside ``path`` to write into; when the block succeeds it takes ``path``'s place.

    For writers that want a path, not bytes. When the block fails the new file is removed and the old one is
    untouched. Its mode is what the umask gives to new files, whatever its writer chose.

    Raises:
        ValueError: as :func:`write_bytes`.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_beside(target)
    try:
        with _plain_errors(path):
            _refuse_folder(target)
            _write_new(temporary, b"")
            mode = stat.S_IMODE(temporary.stat().st_mode)
        with _plain_errors(path, only=FULL_DISK):
            yield temporary
        with _plain_errors(path):
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def one_at_a_time(folder: PathLike) -> Iterator[None]:
    """Within the block no other process is in such a block for the same folder: one that reads a file there,
    and writes it anew with more in it, loses nothing that another has added. On a disk without locks, and on
    Windows, nobody is waited for.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # given back when it is closed, and when the process dies
        yield
    finally:
        os.close(descriptor)


def cache_folder() -> Path:
    """What is computed once is kept here: $CONTROLKIT_CACHE, or controlkit/ in the user's cache folder.

    Raises ValueError where nobody says where the user is at home, as in some containers.
    """
    root = os.environ.get("CONTROLKIT_CACHE")
    if root:
        return Path(root)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "controlkit"
    except RuntimeError as error:
        raise ValueError("this user has no home folder for a cache: name one in CONTROLKIT_CACHE") from error


def refuse_pipe(path: PathLike) -> None:
    """Raise ValueError for a pipe, a socket or a device: what lies among pictures would be waited for without
    end. Raises OSError where nothing is there.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(f"{os.fspath(path)} is a pipe, a socket or a device, and a file is wanted")


def sha256_file(path: PathLike) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled(path: PathLike) -> bytes:
    """SHA-256 over a file's size, its first megabyte and 64 pieces throughout: what tells one large file from
    another at once. Raises OSError where it cannot be read.
    """
    size = os.stat(path).st_size
    told = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        told.update(stream.read(_START))
        for piece in range(_SAMPLES):
            stream.seek(max(size - _SAMPLE, 0) * piece // (_SAMPLES - 1))
            told.update(stream.read(_SAMPLE))
    return told.digest()


def check_writable(path: PathLike, *, folder: bool = False) -> None:
    """Fail now, not after minutes of work, if ``path`` cannot be written as a file (or as a ``folder``).

    Tries it: creates and removes a file beside ``path``. Leaves nothing behind.

    Raises:
        ValueError: as :func:`write_bytes` or :func:`replace_folder` would.
    """
    target = Path(os.path.realpath(path))
    with _plain_errors(path):
        if folder and target.exists() and not target.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of that name", str(target))
        if not folder:
            _refuse_folder(target)
            if target.exists() and not target.is_file():
                return
        _refuse_others(target)
        temporary = _temporary_beside(target)
        try:
            _write_new(temporary, b"", durable=False)
        finally:  # also where somebody interrupts
            temporary.unlink(missing_ok=True)


def _refuse_folder(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder, a file name is wanted", str(target))


def _refuse_others(target: Path) -> None:
    """Refuse what is somebody else's in a folder such as /tmp, in which everybody may replace their own."""
    if not (target.exists() and hasattr(os, "geteuid")):
        return
    folder = target.parent.stat()
    if folder.st_mode & stat.S_ISVTX and os.geteuid() not in {0, folder.st_uid, target.stat().st_uid}:
        raise PermissionError(errno.EPERM, "it is somebody else's, and in this folder it stays", str(target))


def is_half_written(name: str) -> bool:
    """Whether a file's or folder's name is one that things have here until they are complete: such a one is
    being written, or was when its process died.
    """
    return _HALF_WRITTEN.fullmatch(name) is not None


def _temporary_beside(target: Path) -> Path:
    return target.parent / f".{uuid.uuid4().hex}.tmp"


def _write_new(path: Path, data: bytes, *, durable: bool = True) -> None:
    # The kernel applies the umask to a new file of mode 0o666; to read the umask ourselves we would have to
    # change it, for every thread.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _apply_umask(folder: Path) -> None:
    # mkdir made the folder 0o777 & ~umask, so its mode tells the umask.
    file_mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(file_mode)


def _swap_in(temporary: Path, target: Path) -> None:
    old = _temporary_beside(target)
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except BaseException:  # an interrupt, too, may come between the two
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)
        raise
    if old.exists():
        with suppress(OSError):  # the new folder is in place; what is left of the old one is hidden
            shutil.rmtree(old)


@contextmanager
def _plain_errors(path: PathLike, *, only: Collection[int] | None = None) -> Iterator[None]:
    """Turn an OSError (of the given error numbers, or any) into the one-line ValueError naming ``path``."""
    try:
        yield
    except OSError as error:
        if only is not None and error.errno not in only:
            raise
        raise ValueError(f"cannot write {os.fspath(path)}: {_reason(error, Path(path))}") from error


def _reason(error: OSError, path: Path) -> str:
    if (full := FULL_DISK.get(error.errno or 0)) is not None:
        return full
    if error.errno == errno.ENOENT:
        is_there = path.parent.is_dir()  # as /proc, in which nothing can be made
        return "it cannot be made there" if is_there else f"the folder {path.parent} does not exist"
    if error.errno == errno.EACCES:
        return "no permission"
    return error.strerror or str(error)

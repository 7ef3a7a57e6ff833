"""Writing files so that nothing is ever half-written, and saying in one line why it cannot be done.

A file is written under a temporary name in its own folder and renamed when it is complete. Its mode is what
the umask gives to any new file (``0o666 & ~umask``), because the kernel applies it to the file we create.
Every failure that a user can cause (no such folder, no permission, full disk) is a one-line ``ValueError``.
What a process that was killed has left half written goes when another one writes in the same folder an hour
later.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from controlkit.naming import kind_of_value

PathLike = str | os.PathLike[str]

_HALF_WRITTEN = re.compile(r"\.controlkit-[0-9a-f]{32}\.tmp")  # as `temporary_beside` has it
_OF_BEFORE = re.compile(r"\.[0-9a-f]{32}\.tmp")  # as versions had it that lock nothing meanwhile
_MOVED_AWAY = re.compile(r"\.controlkit-[0-9a-f]{12}\.(.+)", re.DOTALL)  # as `_kept_beside` has it
_LONGEST_NAME = 255  # bytes
_LEFT_FOR = 3600.0  # seconds: locks of a disk that several machines share may hold on one of them alone
_POLL = 0.01  # seconds between two tries for a lock
_PATIENCE = 10.0  # seconds for one that some other program may have for good, in /tmp for example
_cleared: set[Path] = set()  # folders in which this process has looked for what others left
_own = threading.local()  # .folders: those that this thread has for itself
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
        with temporary_beside(target) as temporary:
            _write_new(temporary, data, durable=durable)
            os.replace(temporary, target)


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
    with temporary_beside(target) as temporary:
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
        except ValueError as error:
            if str(temporary) not in str(error):
                raise
            # said of a file in the folder, whose temporary name tells nobody anything
            raise ValueError(str(error).replace(str(temporary), os.fspath(path))) from error


@contextmanager
def replace_file(path: PathLike) -> Iterator[Path]:
    """Yield an empty file to write into; when the block succeeds it takes ``path``'s place.

    For writers that want a path, not bytes, and may put files of their own beside it, as safetensors does.
    When the block fails the new file is removed and the old one is untouched. Its mode is what the umask
    gives to new files, whatever its writer chose.

    Raises:
        ValueError: as :func:`write_bytes`.
    """
    target = Path(os.path.realpath(path))
    with temporary_beside(target) as folder:
        temporary = folder / target.name
        with _plain_errors(path):
            _refuse_folder(target)
            folder.mkdir()
            _write_new(temporary, b"")
            mode = stat.S_IMODE(temporary.stat().st_mode)
        with _plain_errors(path, only=FULL_DISK):
            yield temporary
        with _plain_errors(path):
            temporary.chmod(mode)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)


@contextmanager
def one_at_a_time(folder: PathLike) -> Iterator[None]:
    """Within the block nobody else writes in the folder, or is in such a block for it: who reads a file
    there, and writes it anew with more in it, loses nothing that another has added. On a disk without locks,
    and on Windows, nobody is waited for.

    Not within a block that writes in the same folder: it would wait for itself.
    """
    place = Path(os.path.realpath(folder))
    before: frozenset[Path] = getattr(_own, "folders", frozenset())
    with locked_folder(place, alone=True, patience=math.inf) as is_alone:
        if is_alone:
            _clear(place)
        _own.folders = before | {place}
        try:
            yield
        finally:
            _own.folders = before


@contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """Yield a name in ``target``'s folder for a file or a folder that is to take its place; what is left
    there at the block's end is removed, and after a kill by who writes in the folder an hour later.

    ``target``: without links, as `os.path.realpath` gives it.
    """
    place = target.parent
    temporary = place / f".controlkit-{uuid.uuid4().hex}.tmp"
    _clear_once(place)
    is_own = place in getattr(_own, "folders", ())
    with nullcontext() if is_own else locked_folder(place, alone=False, patience=_PATIENCE):
        try:
            yield temporary
        finally:
            _remove(temporary)


@contextmanager
def locked_folder(folder: PathLike, *, alone: bool, patience: float) -> Iterator[bool]:
    """Within the block this process has a lock on the folder, ``alone`` or among others; yields whether it
    could be had within ``patience``, in seconds. There is none on a disk without locks, and on Windows.

    The system gives it back when the process dies, however it does.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (ImportError, OSError):
        yield False
        return
    try:
        how = (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB
        yield _is_had(lambda: fcntl.flock(descriptor, how), patience)
    finally:
        os.close(descriptor)


def _is_had(take: Callable[[], None], patience: float) -> bool:
    """Whether a lock could be taken in time."""
    until = time.monotonic() + patience
    while True:
        try:
            take()
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(_POLL)
        except OSError:  # there are none here
            return False
        else:
            return True


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
    end; and for characters that no name has. Raises OSError where nothing is there.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r} is no file's name: {error}") from error
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
        with temporary_beside(target) as temporary:
            _write_new(temporary, b"", durable=False)


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
    return any(pattern.fullmatch(name) for pattern in (_HALF_WRITTEN, _OF_BEFORE))


def _clear_once(folder: Path) -> None:
    """Clear away what processes that died have left in a folder, unless anybody is writing there now."""
    if folder in _cleared:
        return
    with locked_folder(folder, alone=True, patience=0) as is_alone:
        if is_alone:
            _clear(folder)
            _cleared.add(folder)


def _clear(folder: Path) -> None:
    """Remove what is half written in a folder, and put back what was moved away for something that never
    came, where nothing has changed of it for long. Only whoever has the folder's lock alone may call it:
    everybody who writes there shares it.
    """
    with suppress(OSError):
        for name in os.listdir(folder):
            path, moved = folder / name, _MOVED_AWAY.fullmatch(name)
            is_ours = moved or _HALF_WRITTEN.fullmatch(name)
            if not is_ours or time.time() - path.lstat().st_ctime < _LEFT_FOR:
                continue
            if moved and not os.path.lexists(folder / moved[1]):
                os.rename(path, folder / moved[1])
            else:
                _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, as far as that can be done."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _kept_beside(target: Path) -> Path:
    """Where a folder stays until another one has its place; it tells the folder's own name, for `_clear`."""
    name = f".controlkit-{uuid.uuid4().hex[:12]}.{target.name}"
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = f".controlkit-{uuid.uuid4().hex}.tmp"
    return target.with_name(name)


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
    old = _kept_beside(target)
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

"""The folder that has what is put into the page and what it shows, for as long as the page is open."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from controlkit.files import locked_folder

PREFIX = "controlkit-page-"  # of folders that are locked; those of before, controlkit-studio-, were not
_PATIENCE = 1.0  # seconds; the lock is another's only while that one clears the folder away


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder among the temporary ones, nobody else's, and removed at the end.

    What pages that were killed have left is removed first.
    """
    _clear(Path(tempfile.gettempdir()))
    while True:
        place = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        with locked_folder(place, alone=True, patience=_PATIENCE):
            if not place.is_dir():  # taken for one that was left, before it was locked
                continue
            try:
                yield place
            finally:
                shutil.rmtree(place, ignore_errors=True)
            return


def _clear(temporary: Path) -> None:
    """Remove this user's folders whose pages are no more: those that can be locked."""
    for place in temporary.glob(f"{PREFIX}*"):
        with suppress(OSError), locked_folder(place, alone=True, patience=0) as is_left:
            if is_left and _is_mine(place.lstat()):
                shutil.rmtree(place, ignore_errors=True)


def _is_mine(status: os.stat_result) -> bool:
    """Whether it is a folder of this user's, and no link to one."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()

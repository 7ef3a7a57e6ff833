"""A checkpoint that is named as a base: its parts are written once into a folder of the cache, and found
there.

So a base of one file is loaded, planned for, streamed and trained on as any other, and from the second time
on without being taken apart.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlkit import files, notices
from controlkit.checkpoints.reading import Checkpoint, open_checkpoint
from controlkit.families import BUNDLED
from controlkit.folders import read_json

_FOLDER = "bases"
_VERSION = 1  # raise when a checkpoint's parts are written otherwise


def checkpoint_file(name: str) -> Path | None:
    """The file that is named as a base; None for anything else."""
    path = os.path.expanduser(name)
    return Path(path) if name not in BUNDLED and os.path.isfile(path) else None


def check_checkpoint(file: Path) -> None:
    """Raise `open_checkpoint`'s ValueError, unless the file's parts are at hand."""
    if not _place(file).is_dir():
        open_checkpoint(file)


def configs(file: Path) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The configurations of a checkpoint's U-Net and scheduler, without writing anything.

    Raises ValueError as `open_checkpoint` does.
    """
    folder = _place(file)
    if folder.is_dir():
        return read_json(folder / "unet" / "config.json"), read_json(
            folder / "scheduler" / "scheduler_config.json"
        )
    found = open_checkpoint(file).configs
    return found["unet"], found["scheduler"]


def kept_folder(file: Path) -> Path:
    """The folder of a checkpoint's parts, made if it is not there. Says so in a warning.

    Raises ValueError as `open_checkpoint` and `writing.write_folder` do.
    """
    folder = _place(file)
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".lock"):  # other processes of the same job wait, and find it
            for left in folder.parent.glob(".*.tmp"):  # by a process that was killed
                shutil.rmtree(left, ignore_errors=True)
            if not folder.is_dir():
                _write(open_checkpoint(file), folder)
    except OSError as error:
        raise ValueError(
            f"cannot write {folder}: {error.strerror or error} (CONTROLKIT_CACHE names another folder)"
        ) from error
    return folder


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    from controlkit.checkpoints.writing import write_folder

    write_folder(checkpoint, folder)
    notices.warn(
        f"{checkpoint.path.name} predicts {checkpoint.prediction_type} (by {checkpoint.known_by});"
        f" its parts are kept in {folder}",
        stacklevel=2,
    )


def _place(file: Path) -> Path:
    """Where the parts of a file are, or would be: another file of the same name has another place.

    Raises ValueError for a file that cannot be read.
    """
    try:
        told = hashlib.sha256(f"{_VERSION} {file.stat().st_mtime_ns}".encode() + files.sampled(file))
        beside = file.with_suffix(".yaml")
        told.update(beside.read_bytes() if beside.is_file() else b"")
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror}") from error
    stem = re.sub(r"[^\w.-]+", "-", file.stem)[:60]
    return files.cache_folder() / _FOLDER / f"{stem}-{told.hexdigest()[:16]}"

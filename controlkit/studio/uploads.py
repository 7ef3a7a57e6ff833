"""Pictures that come from the browser: read within limits; no message names a place on the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import images

MAX_BYTES = 20 * 1024 * 1024  # of one upload
MAX_PIXELS = 40_000_000  # of one picture; a camera's 24 megapixels and some more


def read_upload(path: str, *, is_map: bool = False) -> np.ndarray:
    """An uploaded picture or map, uint8 (H, W, 3). Raises ValueError, naming the file without its folder."""
    try:
        return (images.load_map if is_map else images.load_picture)(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(path, os.path.basename(path))) from error


def upload_size(path: str) -> tuple[int, int]:
    """Width and height of an uploaded picture, by its header. Raises ValueError as `read_upload`."""
    try:
        return images.check_picture(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(path, os.path.basename(path))) from error


def as_given(component: Any) -> Any:
    """Make a component hand over what it holds; gradio would say what is wrong in words of its own."""
    component.preprocess = lambda payload: payload
    return component


def as_file(upload: Any) -> Any:
    """Make a component of pictures hand over the file as it came; gradio would open it, and say what is wrong
    in words of its own.
    """
    upload.preprocess = lambda payload: None if payload is None else _uploaded(payload.path)
    return upload


def _uploaded(path: str) -> str:
    """A file that came through the page; gradio looks only at requests that say that they hold files."""
    import gradio as gr

    place = os.environ.get("GRADIO_TEMP_DIR")
    if not place or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(place)):
        raise gr.Error("That is no picture that was put into this page.", print_exception=False)
    return path


def write_shown(data: bytes, name: str) -> str:
    """Put a file where the page may serve it, in a folder of its own whose name nobody guesses."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    (folder / name).write_bytes(data)
    return str(folder / name)


class Shown:
    """Files of the trainings where the page may serve them: one copy of each as long as it stays as it is."""

    def __init__(self) -> None:
        self._copies: dict[Path, tuple[tuple[int, int], str]] = {}

    def copy(self, file: Path, name: str) -> str | None:
        """Where a file is shown, by this name; None where it is gone."""
        try:
            status = file.stat()
            stamp = status.st_mtime_ns, status.st_size
            before, place = self._copies.get(file, (None, ""))
            if before != stamp or not os.path.isfile(place):
                place = write_shown(file.read_bytes(), name)
                self._copies[file] = stamp, place
            os.utime(place)  # it is looked at: the page deletes what nobody has for long
        except OSError:
            return None
        return place

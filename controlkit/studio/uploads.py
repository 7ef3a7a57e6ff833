"""Pictures that come from the browser: read within limits; no message names a place on the machine."""

from __future__ import annotations

import io
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import images

MAX_BYTES = 20 * 1024 * 1024  # of one upload
UNSHOWN = (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")  # that browsers do not show
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
ORIENTATION = 0x0112  # the EXIF tag
MAX_PIXELS = 40_000_000  # of one picture; a camera's 24 megapixels and some more


def read_upload(path: str, *, is_map: bool = False) -> np.ndarray:
    """An uploaded picture or map, uint8 (H, W, 3). Raises ValueError, naming the file without its folder."""
    try:
        return (images.load_map if is_map else images.load_picture)(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(path, os.path.basename(path))) from error


def uploaded(path: str | None) -> Any:
    """What a browser shows of an upload, as `displayable`. Raises ValueError for what cannot be read: it is
    told at once, also where the map is out of sight.
    """
    if path is not None:
        read_upload(path)
    return displayable(path)


def displayable(path: str | None) -> Any:
    """What a browser shows of an upload that it would not: the same pixels, whole, as a PNG.

    Skipped for all others, and for what cannot be read, of which the map tells.
    """
    import gradio as gr

    from controlkit import decoding

    if path is None or Path(path).suffix.lower() not in UNSHOWN:
        return gr.skip()
    try:
        with decoding.opened(path, max_pixels=MAX_PIXELS) as (image, _):
            as_it_is, turned = image.mode in PNG_MODES, image.getexif().get(ORIENTATION, 1) != 1
            if not as_it_is or turned:
                return write_shown(images.encode_png(read_upload(path)), f"{Path(path).stem}.png")
            data = io.BytesIO()
            image.save(data, "PNG", icc_profile=image.info.get("icc_profile"))
    except (ValueError, *decoding.DECODE_ERRORS):
        return gr.skip()
    return write_shown(data.getvalue(), f"{Path(path).stem}.png")


def upload_size(path: str) -> tuple[int, int]:
    """Width and height of an uploaded picture, upright, by its header. Raises ValueError as `read_upload`."""
    try:
        return images.stored_size(path, max_pixels=MAX_PIXELS)
    except ValueError as error:
        raise ValueError(str(error).replace(path, os.path.basename(path))) from error


def write_shown(data: bytes, name: str) -> str:
    """Put a file where the page may serve it, in a folder of its own whose name nobody guesses."""
    folder = Path(tempfile.mkdtemp(dir=os.environ.get("GRADIO_TEMP_DIR")))
    (folder / name).write_bytes(data)
    return str(folder / name)


def is_shown(path: str) -> bool:
    """Whether a path lies, links followed, where the page has what was put into it and what it shows."""
    place = os.environ.get("GRADIO_TEMP_DIR")
    try:
        return bool(place) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(str(place)))
    except (OSError, ValueError):  # no path at all
        return False


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

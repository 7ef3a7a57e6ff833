"""Picture files: the header first, refused where it is none or too large, then decoded upright."""

import io
import os
import re
import struct
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from controlkit.files import PathLike, refuse_pipe
from controlkit.naming import kind_of_value
from controlkit.pixel_arrays import array_to_rgb, over

DEFAULT_MAX_PIXELS = 89_478_485
"""Pictures of more pixels are refused before they are decoded; Pillow starts to warn at the same size."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Pillow imports all of its plugins, a tenth of a second, when it is asked for any other.
_QUICK_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")
ORIENTATION = 0x0112
"""EXIF's tag."""
_BITS_PER_SAMPLE = 258  # TIFF's
_PNG_START, _CRC = b"\x89PNG\r\n\x1a\n", 4  # before a PNG's chunks, and bytes behind each
_LOOKALIKES = {
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file (an SVG drawing?)",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
    b"%pdf": "a PDF",
}
_JSON = re.compile(rb'[\[{]\s*(["\[{}\]]|$)')
_HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}  # of the ISO media formats
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,  # BigTIFF
    RuntimeError,  # AVIF
    struct.error,
)
"""What Pillow raises on damaged files, gathered from its decoders."""
# Guards warnings.catch_warnings, which changes state that all threads share.
_opening = threading.Lock()


@contextmanager
def opened(
    source: PathLike | bytes, *, max_pixels: int, formats: Sequence[str] = _FORMATS
) -> Iterator[tuple[Image.Image, str]]:
    """Read a picture file's header, refuse what is no picture or too large; yield picture and name."""
    if not isinstance(source, (str, os.PathLike, bytes)):
        raise ValueError(f"a picture's file is a path or bytes, not {kind_of_value(source)}")
    name = "the data given" if isinstance(source, bytes) else os.fspath(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else _open_file(name)
    with file:
        image = _read_header(file, name, formats)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{name} has {width} x {height} pixels; at most {max_pixels:,} pixels are read")
        yield image, name


def _open_file(name: str) -> io.BufferedReader:
    try:
        refuse_pipe(name)
        return open(name, "rb")
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder, not a picture") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _read_header(file: io.BytesIO | io.BufferedReader, name: str, formats: Sequence[str]) -> Image.Image:
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            try:
                return Image.open(file, formats=[name for name in formats if name in _QUICK_FORMATS])
            except UnidentifiedImageError:
                return Image.open(file, formats=list(formats))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} {_what_it_is(file, formats)}") from error
    except Image.DecompressionBombError as error:
        limit = f"{2 * DEFAULT_MAX_PIXELS:,} pixels"
        raise ValueError(f"{name} is too large: its header announces more than {limit}") from error
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} cannot be read as a picture: {one_line(error)}") from error


def _what_it_is(file: io.BytesIO | io.BufferedReader, formats: Sequence[str]) -> str:
    file.seek(0)
    start = file.read(64).lstrip().lower()
    if not start:
        return "is empty"
    for prefix, kind in _LOOKALIKES.items():
        if start.startswith(prefix):
            return f"is not a picture but {kind}"
    if _JSON.match(start.removeprefix(b"\xef\xbb\xbf").lstrip()):
        return "is not a picture but a JSON file (a pose is drawn first: `controlkit draw FILE`)"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        return "is a HEIC picture, as iPhones save them, which is not read here: convert it to JPEG"
    if start.startswith((b"ii*\0", b"mm\0*")):
        return "is a TIFF of a sort that is not read here, or damaged: save it with 8 or 16 bits per channel"
    return f"is not a picture of a format that is read here ({', '.join(formats)})"


def image_to_rgb(image: Image.Image, name: str, *, behind: int = 255) -> np.ndarray:
    """Decode a picture: uint8 (H, W, 3), upright; behind: the grey level behind what is transparent.

    Raises ValueError, beginning with ``name``.
    """
    try:
        image.load()
        return _upright_to_rgb(upright(image), name, behind)
    except _PictureRefused:
        raise
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged or truncated: {one_line(error)}") from error


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF orientation says."""
    return ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image


def orientation(image: Image.Image, name: str) -> int:
    """The EXIF orientation, 1 to 8, by which an opened picture is turned; 1 is upright.

    Its header tells. A PNG is decoded for it only where something is said behind the pixels. Raises
    ValueError, beginning with ``name``, for damage.
    """
    try:
        if image.format != "PNG":
            return int(image.getexif().get(ORIENTATION, 1))
        if _tells_late(image):
            image.load()
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))  # PNG's own always decodes
    except DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged or truncated: {one_line(error)}") from error


def _tells_late(image: Any) -> bool:
    """Whether an opened PNG says something behind its pixels: EXIF, or text."""
    file, is_behind = image.fp, False
    place = file.tell()
    file.seek(len(_PNG_START))
    try:
        while len(head := file.read(8)) == 8 and head[4:].isalpha():
            is_behind = is_behind or head[4:] == b"IDAT"
            if is_behind and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + _CRC, os.SEEK_CUR)
        return False
    finally:
        file.seek(place)


class _PictureRefused(ValueError):
    """A picture that decodes but has values with no defined meaning as a picture."""


def _upright_to_rgb(image: Image.Image, name: str, behind: int) -> np.ndarray:
    if 0 in image.size:
        raise _PictureRefused(f"{name} is empty: {image.width} x {image.height} pixels")
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is 32 bits, used by 16-bit PGM and TIFF
        values = deep_values(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _PictureRefused(f"{name} has integer values outside 0 to 65535")
        return array_to_rgb(values.astype(np.uint16), name)
    if image.mode == "F":
        try:
            return array_to_rgb(deep_values(image), name)
        except ValueError as error:
            raise _PictureRefused(str(error)) from error
    if image.has_transparency_data:
        return over(np.asarray(image.convert("RGBA")), behind)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert always copies


def deep_values(image: Any) -> np.ndarray:
    """The numbers (H, W) of a picture of 16 or 32 bits, of the modes I and F.

    Of a big-endian TIFF that is packed, libtiff has put the bytes in order, and Pillow exchanges them again.
    """
    values = np.asarray(image)
    if image.format != "TIFF" or image.mode not in ("I", "F") or image.info.get("compression") == "raw":
        return values
    tags = image.tag_v2
    if tags.prefix != b"MM":
        return values
    is_short = image.mode == "I" and max(tags[_BITS_PER_SAMPLE]) == 16
    return (values.astype(np.int16) if is_short else values).byteswap()


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__

"""What one file of a data set says of itself: whether it is whole, its size, whether it is grey."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlkit import preprocessors
from controlkit.images import DEFAULT_MAX_PIXELS, load_picture
from controlkit.training.data.examples import Piece, content_digest
from controlkit.training.data.map_files import is_json, is_numbers, read_alpha, read_joints
from controlkit.training.data.map_use import MapUse

LARGE = 16_000_000
"""Pictures of more pixels are decoded one at a time, so that a check's memory stays small."""

UNKNOWN_KIND = "unknown kind"
"""The code of a map that looks like none, where nobody said what it is."""
_GREY = 6  # levels between the channels; JPEG tints grey by less
_PNG = b"\x89PNG\r\n\x1a\n"
_HEADER_END = 29  # of a PNG: width, height, bits, colour type and how its data are packed end here
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by a PNG's colour type
_LAST_FILTER = 4  # of a PNG's rows
_PART = 16384  # bytes unpacked at once, to 16 MiB at most
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAY_TURN = (b"XML:com.adobe.xmp", b"Raw profile type")  # texts in which an orientation may stand
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_ORIENTATION = 0x0112
_PLAIN = MapUse()
_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class Facts:
    """What a look at a picture, a map or a pose gave."""

    width: int
    """Pixels, upright; of a pose, those of its canvas."""
    height: int
    digest: str
    """SHA-256 of the content, in hexadecimal."""
    grey: bool | None = None
    """Whether a picture has no colour; None where that was not looked at."""
    people: int | None = None
    """Of a pose, how many there are."""
    lint: tuple[tuple[str, str, str], ...] = ()
    """Of a map, what `controlkit.preprocessors.lint` found: code, message, cure."""
    refused: str = ""
    """Of a map that can be read, why visits would refuse it all the same: see `MapUse.problem`."""


def look_at_picture(piece: Piece, *, thorough: bool, alpha_mask: bool = False) -> Facts:
    """Read a picture to its end.

    thorough: find out whether it is grey, too. Otherwise a PNG is judged by its check sums and unpacked
    without being decoded, which is faster; damage shows all the same. alpha_mask: of the recipe's data.

    Raises ValueError, one line with the piece's name: not there, no picture, damaged, cut off, too large,
    or wholly transparent where that leaves nothing to train on.
    """
    content = piece.read()
    if alpha_mask and (alpha := read_alpha(content, piece.name)) is not None and not alpha.any():
        raise ValueError(f"{piece.name} is wholly transparent, and with data.alpha_mask nothing of it counts")
    digest = content_digest(content).hex()
    if isinstance(content, bytes) and not thorough and (size := _whole_png(content)):
        return Facts(*size, digest)
    width, height, pixels = _named(content, piece)
    sample = np.ascontiguousarray(pixels[:: max(1, len(pixels) // 64), :: max(1, pixels.shape[1] // 64)])
    spread = sample.max(axis=2) - sample.min(axis=2)
    return Facts(width, height, digest, bool(spread.max() <= _GREY))


def look_at_map(
    piece: Piece, *, canvas: tuple[int, int] | None, kind: str | None, use: MapUse = _PLAIN
) -> Facts:
    """Read a map to its end, or a pose.

    canvas: width and height that a pose without its own refers to. kind: what the map is looked through for
    (`controlkit.preprocessors.lint`), "" to have it guessed, None to leave that out. use: what is done with
    it at visits.

    Raises ValueError, one line with the piece's name: as `look_at_picture`, or no pose in OpenPose's format.
    """
    content = piece.read()
    facts = _map_facts(piece, content, canvas=canvas, kind=kind, use=use)
    return replace(facts, refused=use.problem(content, piece.name))


def _map_facts(
    piece: Piece,
    content: bytes | NDArray[Any],
    *,
    canvas: tuple[int, int] | None,
    kind: str | None,
    use: MapUse,
) -> Facts:
    digest = content_digest(content).hex()
    if not isinstance(content, bytes):
        if content.ndim not in (2, 3) or content.size == 0:
            raise ValueError(f"{piece.name} has the shape {content.shape}, which no map has")
        return Facts(content.shape[1], content.shape[0], digest)
    if is_json(content):
        return _pose_facts(content, digest, piece.name, canvas)
    if is_numbers(content):
        levels = use.levels(content, piece.name)
        return Facts(levels.shape[1], levels.shape[0], digest)
    if kind is None and (size := _whole_png(content)):
        return Facts(*size, digest)
    width, height, _ = _named(content, piece)
    return Facts(width, height, digest, lint=() if kind is None else _lint(content, kind))


def _pose_facts(content: bytes, digest: str, name: str, canvas: tuple[int, int] | None) -> Facts:
    width, height = canvas or (None, None)
    poses = read_joints(content, name, width=width, height=height)
    return Facts(poses.width, poses.height, digest, people=len(poses.people))


def _lint(content: bytes, kind: str) -> tuple[tuple[str, str, str], ...]:
    found = preprocessors.lint(content, kind)
    if not kind and not found and not preprocessors.guess_kind(content):
        said = "its kind cannot be told, so only what holds for every map was checked"
        return ((UNKNOWN_KIND, said, "say what the maps are with --map KIND"),)
    # Which style a pose is drawn in matters to an adapter that was trained, not to one that will be.
    return tuple(
        (finding.code, finding.message, finding.cure) for finding in found if finding.code != "style"
    )


def _named(content: bytes | NDArray[Any], piece: Piece) -> tuple[int, int, NDArray[np.uint8]]:
    """Width, height and pixels (of a JPEG fewer than it has); errors bear the piece's name."""
    try:
        if isinstance(content, bytes) and (quick := _quick_jpeg(content)):
            return quick
        pixels = _decoded(content)
    except ValueError as error:
        problem = str(error)
        for stand_in in ("the data given", "the array", "the picture"):
            problem = problem.removeprefix(f"{stand_in} ")
        raise ValueError(f"{piece.name} {problem}") from error
    return pixels.shape[1], pixels.shape[0], pixels


def _decoded(content: bytes | NDArray[Any]) -> NDArray[np.uint8]:
    try:
        return load_picture(content, max_pixels=LARGE)
    except ValueError:  # damaged, or large
        with _one_at_a_time:
            return load_picture(content)


def _quick_jpeg(content: bytes) -> tuple[int, int, NDArray[np.uint8]] | None:
    """Read a JPEG to its end and decode an eighth of its size; None for what is no plain JPEG.

    All of the data is unpacked, so that damage shows; only the transform of its blocks is left out.
    """
    if not content.startswith(b"\xff\xd8"):
        return None
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG"])
    except (OSError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None  # load_picture says what it is
    width, height = image.size
    if width * height > DEFAULT_MAX_PIXELS:
        return None
    image.draft(None, (max(1, width // 8), max(1, height // 8)))
    pixels = load_picture(image)
    if image.getexif().get(_ORIENTATION) in _TURNED:
        width, height = height, width
    return width, height, pixels


def _whole_png(content: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG whose check sums are right and whose data unpack to all of its rows; None
    where it must be decoded to judge.
    """
    if not content.startswith(_PNG) or content[12:16] != b"IHDR" or len(content) < _HEADER_END:
        return None
    place, data = len(_PNG), list[memoryview]()
    view = memoryview(content)
    while place + 12 <= len(content):
        length = int.from_bytes(view[place : place + 4], "big")
        kind, end = bytes(view[place + 4 : place + 8]), place + 8 + length
        if end + 4 > len(content) or zlib.crc32(view[place + 4 : end]) != int.from_bytes(
            view[end : end + 4], "big"
        ):
            return None
        if kind == b"eXIf" or (kind in _TEXTS and bytes(view[place + 8 : end][:32]).startswith(_MAY_TURN)):
            return None
        if kind == b"IDAT":
            data.append(view[place + 8 : end])
        if kind == b"IEND":
            width, height = struct.unpack(">II", content[16:24])
            is_whole = 0 < width * height <= DEFAULT_MAX_PIXELS and _unpacks(data, content[16:_HEADER_END])
            return (width, height) if is_whole else None
        place = end + 4
    return None


def _unpacks(data: list[memoryview], header: bytes) -> bool:
    """Whether a PNG's data give all of its rows, each with a filter that there is. Holds a part at a time."""
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    if interlaced or colour not in _CHANNELS:
        return False
    row = (width * bits * _CHANNELS[colour] + 7) // 8 + 1  # a row begins with its filter
    unpacker, done = zlib.decompressobj(), 0
    parts = (part[start : start + _PART] for part in data for start in range(0, len(part), _PART))
    try:
        for part in parts:
            unpacked = unpacker.decompress(part)
            if max(unpacked[-done % row :: row], default=0) > _LAST_FILTER:
                return False
            done += len(unpacked)
            if done > row * height:
                return False
    except zlib.error:
        return False
    return unpacker.eof and done == row * height

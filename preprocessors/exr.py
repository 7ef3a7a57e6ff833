"""The depth channel of an OpenEXR file, as renderers write them: single part, by scanlines.

OpenCV's own reader is left out of most builds. The format is simple as far as it is needed here (OpenEXR file
layout, openexr.com; half, float and uint channels; no compression, RLE, ZIPS and ZIP).
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from controlkit.preprocessors.exrchannels import depth_channels

_TYPES = {0: "<u4", 1: "<f2", 2: "<f4"}
_ROWS = {0: 1, 1: 1, 2: 1, 3: 16}  # rows in a block by compression: none, RLE, ZIPS, ZIP
_COMPRESSIONS = ["none", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24", "B44", "B44A", "DWAA", "DWAB"]
_TILED, _DEEP, _PARTS = 0x200, 0x800, 0x1000  # bits of the version field
# Not as TIFF or .npy, which do not say that Z is a distance.
_HOW = "save it with ZIP compression (oiiotool in.exr --ch Z --scanline --compression zip -o out.exr)"
_Window = tuple[int, int, int, int]  # left, top, width, height


class UnreadKind(ValueError):
    """An intact file that is not read here; the message continues the file's name."""


@dataclass(frozen=True)
class _Header:
    channels: list[tuple[str, np.dtype]]  # in the order of the file
    compression: int
    window: _Window  # of the pixels that are stored
    shown: _Window  # of the picture that they belong to
    end: int  # where the table of offsets starts

    @property
    def row_bytes(self) -> int:
        return self.window[2] * sum(dtype.itemsize for _, dtype in self.channels)


def read_exr(data: bytes, *, max_pixels: int) -> tuple[np.ndarray, bool]:
    """Return the depth in the bytes of an EXR file, and whether it is a distance: it is in a channel Z.

    Depth is (H, W), or (H, W, 3) from R, G, B (:func:`depth_channels` says which channels hold it), of the
    size of the picture that was rendered (the display window); what is not stored of it is NaN.

    Raises:
        UnreadKind: another kind of EXR (tiled, deep, several parts, lossy), no such channel, or too large.
        ValueError: a damaged file, which can raise struct.error or zlib.error's subclass of it too.
    """
    header = _read_header(data)
    for _, _, width, height in (header.window, header.shown):
        if width * height > max_pixels:
            raise UnreadKind(f"has {width} x {height} pixels; at most {max_pixels:,} are read")
    try:
        wanted, is_distance = depth_channels([name for name, _ in header.channels])
    except ValueError as error:
        raise UnreadKind(f"{error}; {_HOW}") from error
    found = _read_channels(data, header, wanted)
    stored = found[wanted[0]] if len(wanted) == 1 else np.stack([found[name] for name in wanted], axis=2)
    return _in_picture(stored, header), is_distance


def _read_channels(data: bytes, header: _Header, wanted: list[str]) -> dict[str, np.ndarray]:
    _, top, width, height = header.window
    found = {name: np.zeros((height, width), np.float32) for name in wanted}
    rows = _ROWS[header.compression]
    blocks = -(-height // rows)
    for offset in struct.unpack_from(f"<{blocks}Q", data, header.end):
        row, size = struct.unpack_from("<ii", data, offset) if offset < len(data) else (top - 1, 0)
        first = row - top
        count = min(rows, height - first)
        if not 0 <= first < height or offset + 8 + size > len(data):
            raise ValueError("it is cut short or its table of rows is wrong")
        block = _unpacked(data[offset + 8 : offset + 8 + size], count * header.row_bytes, header.compression)
        _place(block, header, first, count, found)
    return found


def _in_picture(stored: np.ndarray, header: _Header) -> np.ndarray:
    """Place what is stored into the picture that was rendered, which may be larger, smaller, elsewhere."""
    if header.window == header.shown:
        return stored
    left, top = header.window[0] - header.shown[0], header.window[1] - header.shown[1]
    _, _, width, height = header.shown
    picture = np.full((height, width, *stored.shape[2:]), np.nan, np.float32)
    inside = stored[max(0, -top) : max(0, height - top), max(0, -left) : max(0, width - left)]
    down, right = max(0, top), max(0, left)
    picture[down : down + inside.shape[0], right : right + inside.shape[1]] = inside
    return picture


def _read_header(data: bytes) -> _Header:
    _, version = struct.unpack_from("<II", data)
    kinds = {_PARTS: "of several parts", _DEEP: "with deep pixels", _TILED: "in tiles"}
    if found := [what for bit, what in kinds.items() if version & bit]:
        raise UnreadKind(f"is an EXR {' and '.join(found)}, which is not read here; {_HOW}")
    attributes, end = _read_attributes(data)
    compression = attributes["compression"][0]
    if compression not in _ROWS:
        known = _COMPRESSIONS[compression] if compression < len(_COMPRESSIONS) else f"unknown ({compression})"
        raise UnreadKind(f"is an EXR with {known} compression, which is not read here; {_HOW}")
    window = _read_window(attributes["dataWindow"])
    shown = _read_window(attributes.get("displayWindow", attributes["dataWindow"]))
    return _Header(_read_listed(attributes["channels"]), compression, window, shown, end)


def _read_window(value: bytes) -> _Window:
    left, top, right, bottom = struct.unpack("<4i", value)
    if right < left or bottom < top:
        raise ValueError("its header announces no pixels")
    return left, top, right - left + 1, bottom - top + 1


def _read_attributes(data: bytes) -> tuple[dict[str, bytes], int]:
    """Return the header's attributes by name, and where they end."""
    attributes, at = {}, 8
    while data[at] != 0:
        name_end = data.index(b"\0", at)
        type_end = data.index(b"\0", name_end + 1)
        (size,) = struct.unpack_from("<i", data, type_end + 1)
        value = type_end + 5
        if size < 0 or value + size > len(data):
            raise ValueError("its header is damaged")
        attributes[data[at:name_end].decode("latin-1")] = data[value : value + size]
        at = value + size
    return attributes, at + 1


def _read_listed(data: bytes) -> list[tuple[str, np.dtype]]:
    """Return the names and types of the channels, as the header lists them."""
    channels, at = [], 0
    while data[at] != 0:
        end = data.index(b"\0", at)
        kind, _, sample_x, sample_y = struct.unpack_from("<iIii", data, end + 1)
        if (sample_x, sample_y) != (1, 1):
            raise UnreadKind(f"has a channel of reduced size, which is not read here; {_HOW}")
        channels.append((data[at:end].decode("latin-1"), np.dtype(_TYPES[kind])))
        at = end + 17
    return channels


def _unpacked(packed: bytes, size: int, compression: int) -> bytes:
    """Return a block's bytes; one that would not shrink is stored as it is."""
    if compression == 0 or len(packed) == size:
        block = packed
    else:
        block = _reordered(_unrolled(packed) if compression == 1 else _inflated(packed, size))
    if len(block) != size:
        raise ValueError("a block of rows has the wrong length")
    return block


def _inflated(packed: bytes, size: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(packed, size)
    except zlib.error as error:
        raise ValueError("a block of rows is damaged") from error


def _unrolled(packed: bytes) -> bytes:
    """Undo the run lengths: a negative count, so many bytes as they are; else one byte repeated count + 1."""
    out, at = bytearray(), 0
    while at < len(packed):
        (count,) = struct.unpack_from("<b", packed, at)
        if count < 0:
            out += packed[at + 1 : at + 1 - count]
            at += 1 - count
        else:
            out += packed[at + 1 : at + 2] * (count + 1)
            at += 2
    return bytes(out)


def _reordered(block: bytes) -> bytes:
    """Undo the two steps before compression: differences of neighbours, and even bytes before odd ones."""
    differences = np.frombuffer(block, np.uint8).astype(np.int64)
    differences[1:] -= 128
    values = (np.cumsum(differences) & 255).astype(np.uint8)
    half = (len(values) + 1) // 2
    mixed = np.empty_like(values)
    mixed[0::2], mixed[1::2] = values[:half], values[half:]
    return mixed.tobytes()


def _place(block: bytes, header: _Header, first: int, count: int, found: dict[str, np.ndarray]) -> None:
    """Put a block's rows, in each of which the channels follow one another, into the arrays ``found``."""
    rows = np.frombuffer(block, np.uint8).reshape(count, header.row_bytes)
    at = 0
    for name, dtype in header.channels:
        length = header.window[2] * dtype.itemsize
        if name in found:
            values = np.ascontiguousarray(rows[:, at : at + length]).view(dtype)
            found[name][first : first + count] = values.astype(np.float32)
        at += length

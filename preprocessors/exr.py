"""The depth channel of an OpenEXR file, as renderers write them: single part, by scanlines.

OpenCV's own reader is left out of most builds. The format is simple as far as it is needed here (OpenEXR file
layout, openexr.com; half, float and uint channels; no compression, RLE, ZIPS and ZIP).
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

_TYPES = {0: "<u4", 1: "<f2", 2: "<f4"}
_ROWS = {0: 1, 1: 1, 2: 1, 3: 16}  # rows in a block by compression: none, RLE, ZIPS, ZIP
_COMPRESSIONS = ["none", "rle", "zips", "zip", "piz", "pxr24", "b44", "b44a", "dwaa", "dwab"]
_TILED, _DEEP, _PARTS = 0x200, 0x800, 0x1000  # bits of the version field
_HOW = "save it as 32-bit float with ZIP compression, or as .npy or TIFF (oiiotool in.exr --ch Z -o out.tif)"


@dataclass(frozen=True)
class _Header:
    channels: list[tuple[str, np.dtype]]  # in the order of the file
    compression: int
    left: int
    top: int
    width: int
    height: int
    end: int  # where the table of offsets starts

    @property
    def row_bytes(self) -> int:
        return self.width * sum(dtype.itemsize for _, dtype in self.channels)


def read_exr(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Return the depth in the bytes of an EXR file: (H, W) of the channel Z or Y, or (H, W, 3) of R, G, B.

    Raises:
        ValueError: another kind of EXR (tiled, deep, several parts, lossy), no such channel, too large, or
            damaged; a damaged file can raise struct.error or zlib.error's subclass of it too.
    """
    header = _read_header(data)
    if header.width * header.height > max_pixels:
        raise ValueError(f"it has {header.width} x {header.height} pixels; at most {max_pixels:,} are read")
    names = [name for name, _ in header.channels]
    wanted = _wanted(names)
    found = {name: np.zeros((header.height, header.width), np.float32) for name in wanted}
    rows = _ROWS[header.compression]
    blocks = -(-header.height // rows)
    for offset in struct.unpack_from(f"<{blocks}Q", data, header.end):
        row, size = struct.unpack_from("<ii", data, offset)
        first = row - header.top
        count = min(rows, header.height - first)
        if not 0 <= first < header.height or offset + 8 + size > len(data):
            raise ValueError("it is cut short or its table of rows is wrong")
        block = _unpacked(data[offset + 8 : offset + 8 + size], count * header.row_bytes, header.compression)
        _place(block, header, first, count, found)
    return found[wanted[0]] if len(wanted) == 1 else np.stack([found[name] for name in wanted], axis=2)


def _wanted(names: list[str]) -> list[str]:
    plain = {name.rsplit(".", 1)[-1].casefold(): name for name in names}  # "ViewLayer.Depth.Z"
    for depth in ("z", "depth", "y", "v"):
        if depth in plain:
            return [plain[depth]]
    if all(colour in plain for colour in "rgb"):
        return [plain[colour] for colour in "rgb"]
    if len(names) == 1:
        return names
    raise ValueError(f"it has no channel Z (it has {', '.join(names)}); {_HOW}")


def _read_header(data: bytes) -> _Header:
    _, version = struct.unpack_from("<II", data)
    if version & (_TILED | _DEEP | _PARTS):
        raise ValueError(f"it is tiled, deep or of several parts; {_HOW}")
    attributes, end = _read_attributes(data)
    compression = attributes["compression"][0]
    if compression not in _ROWS:
        known = _COMPRESSIONS[compression] if compression < len(_COMPRESSIONS) else str(compression)
        raise ValueError(f"its compression {known} is not read here; {_HOW}")
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    if right < left or bottom < top:
        raise ValueError("its header announces no pixels")
    channels = _read_channels(attributes["channels"])
    return _Header(channels, compression, left, top, right - left + 1, bottom - top + 1, end)


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


def _read_channels(data: bytes) -> list[tuple[str, np.dtype]]:
    channels, at = [], 0
    while data[at] != 0:
        end = data.index(b"\0", at)
        kind, _, sample_x, sample_y = struct.unpack_from("<iIii", data, end + 1)
        if (sample_x, sample_y) != (1, 1):
            raise ValueError(f"it has a channel of reduced size; {_HOW}")
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
        length = header.width * dtype.itemsize
        if name in found:
            values = np.ascontiguousarray(rows[:, at : at + length]).view(dtype)
            found[name][first : first + count] = values.astype(np.float32)
        at += length

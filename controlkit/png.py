"""PNG files (PNG specification, third edition): pixels by OpenCV or as runs, and text beside them."""

import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

_HEADER_END = 8 + 25
"""Signature (8 bytes) and the IHDR chunk (4 length + 4 type + 13 data + 4 checksum): text may follow."""


def is_whole(path: Path) -> bool:
    """Whether a file is there and ends as a PNG does, which one that was cut off does not."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            return file.read() == _END
    except OSError:  # also where it is shorter than that
        return False


def with_text(data: bytes, text: Mapping[str, str]) -> bytes:
    """The bytes of a PNG file with text, before the pixels: tEXt, or iTXt where a value is not Latin-1.

    Raises ValueError for a keyword that PNG does not allow (1 to 79 Latin-1 characters).
    """
    chunks = b"".join(_text_chunk(keyword, value) for keyword, value in text.items())
    return data[:_HEADER_END] + chunks + data[_HEADER_END:]


def encode(image: np.ndarray) -> bytes:
    """A picture, uint8 (H, W, 3), as a PNG file."""
    import cv2

    ok, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert ok, "OpenCV encodes every uint8 RGB picture"
    return encoded.tobytes()


def encode_runs(image: np.ndarray) -> bytes:
    """The same, of which only runs of one colour are coded."""
    height, width = image.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter, 0 for none
    rows[:, 1:] = image.reshape(height, 3 * width)
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    packed = packer.compress(rows.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _END
    return b"\x89PNG\r\n\x1a\n" + chunks


def _text_chunk(keyword: str, value: str) -> bytes:
    try:
        key = keyword.encode("latin-1")
    except UnicodeEncodeError as error:
        raise ValueError(f"the PNG keyword {keyword!r} is not Latin-1") from error
    if not 1 <= len(key) <= 79 or b"\0" in key:
        raise ValueError(f"the PNG keyword {keyword!r} must have 1 to 79 characters")
    try:
        if "\0" not in value:
            return _chunk(b"tEXt", key + b"\0" + value.encode("latin-1"))
    except UnicodeEncodeError:
        pass
    return _chunk(b"iTXt", key + b"\0" + b"\0\0" + b"\0" + b"\0" + value.encode("utf-8"))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_END = _chunk(b"IEND", b"")

"""Whether the numbers of a weight file are finite, found without torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from controlkit.folders import read_header

_ALL_ONES = {  # by type: unsigned numbers of its width, and the bits that are all set where it is not finite
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}


def not_finite(path: Path, keys: Iterable[str]) -> list[str]:
    """Those of a safetensors file's tensors, all of them floats, that hold a NaN or an infinity."""
    import numpy as np

    header = read_header(path)
    with path.open("rb") as stream:
        begin = 8 + int.from_bytes(stream.read(8), "little")
    content = np.memmap(path, dtype=np.uint8, mode="r")[begin:]
    found = []
    for key in keys:
        kind, mask = _ALL_ONES[header[key]["dtype"]]
        first, last = header[key]["data_offsets"]
        bits = np.frombuffer(content[first:last], dtype=kind)
        if ((bits & mask) == mask).any():
            found.append(key)
    return found

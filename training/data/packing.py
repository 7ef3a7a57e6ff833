"""Maps as the cache keeps them: a bit per pixel where they are black and white, one channel where all are
alike.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_HEADER = 4  # the first values of a packed map: how it is packed, channels, width in bits


def pack(levels: NDArray[np.uint8 | np.uint16]) -> Tensor:
    """A map, uint8 or uint16 (H, W, C), without loss: flat bytes, or (H, W, C) as it is."""
    if levels.dtype != np.uint8:
        return torch.from_numpy(np.ascontiguousarray(levels))
    _, width, channels = levels.shape
    first = levels[..., 0]
    alike = channels == 1 or all(np.array_equal(first, levels[..., k]) for k in range(1, channels))
    if not alike:
        return torch.from_numpy(np.ascontiguousarray(levels))
    binary = not bool((first + np.uint8(1) > 1).any())  # 255 + 1 is 0
    rows = np.packbits(first > 0, axis=1) if binary else first
    header = np.array([binary, channels, width >> 8, width & 255], dtype=np.uint8)
    packed = np.concatenate([header, np.ascontiguousarray(rows).reshape(-1)])
    return torch.from_numpy(packed)


def unpack(packed: Tensor) -> NDArray[np.uint8 | np.uint16]:
    """The map again, (H, W, C)."""
    array = packed.numpy()
    if array.ndim == 3:
        return array
    binary, channels, high, low = (int(value) for value in array[:_HEADER])
    width = (high << 8) + low
    body = array[_HEADER:]
    if binary:
        bits = body.reshape(-1, -(-width // 8))
        one = np.unpackbits(bits, axis=1, count=width) * np.uint8(255)
    else:
        one = body.reshape(-1, width)
    return np.repeat(one[..., None], channels, axis=2)

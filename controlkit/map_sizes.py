"""Maps at another size: lines stay lines, colours that mean something stay these colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit import images


def is_black_and_white(levels: NDArray[np.uint8]) -> bool:
    """Whether every value is 0 or 255, and every pixel has equal channels."""
    import cv2

    rows = np.ascontiguousarray(levels).reshape(len(levels), -1)
    if cv2.countNonZero(cv2.inRange(rows, np.array(1), np.array(254))):
        return False
    return levels.ndim == 2 or all(np.array_equal(levels[..., 0], levels[..., k]) for k in (1, 2))


def resize_black_and_white(image: NDArray[Any], width: int, height: int) -> NDArray[Any]:
    """Lines at another size (`images.resize_lines`), whichever of black and white they are."""
    import cv2

    if cv2.mean(image)[0] < 128:
        return images.resize_lines(image, width, height)
    return cv2.bitwise_not(images.resize_lines(cv2.bitwise_not(image), width, height))


def cover_map(image: NDArray[np.uint8], width: int, height: int, *, palette: bool) -> NDArray[np.uint8]:
    """`images.cover` for a map, uint8 (H, W, 3), as training resizes its maps.

    What is black and white is drawn anew, with lines as thin as they were; of a `palette` (poses) colours are
    never blended; all else is resampled smoothly.
    """
    if is_black_and_white(image):
        part = images.central_part(image, width, height)
        return resize_black_and_white(np.ascontiguousarray(part), width, height)
    return images.cover(image, width, height, nearest=palette)

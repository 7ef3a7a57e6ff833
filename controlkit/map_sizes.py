"""Maps at another size: lines stay lines, colours that mean something stay these colours."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controlkit import images

_FEW = 199  # colours that a map of labels has at most (sd-webui-controlnet draws the same line)
_SAMPLE = 4096  # pixels that show whether a map has more
_DEPTH = {"leres", "midas", "zoe"}
_SOFT = {"hed", "lineart", "pidinet", "shuffle", "softedge"}

Sense = Literal["depth", "normals", "pose", "soft", ""]


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


def cover_map(image: NDArray[np.uint8], width: int, height: int, *, kind: str) -> NDArray[np.uint8]:
    """`images.cover` for a map, uint8 (H, W, 3), as training resizes its maps.

    What is black and white is drawn anew, with lines as thin as they were; colours that mean something, of
    poses and of labels (`right_sampling`), are never blended; all else is resampled smoothly, also a drawn
    pose whose colours a JPEG has blurred.
    """
    sampling = right_sampling(image, sense_of(kind))
    if sampling == "lines":
        part = images.central_part(image, width, height)
        return resize_black_and_white(np.ascontiguousarray(part), width, height)
    return images.cover(image, width, height, nearest=sampling == "nearest")


def sense_of(kind: str) -> Sense:
    """What a kind of map, or the name of a column with maps, says of their values; "" where nothing is known.

    "soft" are those whose levels say how much, not which: what lies between two levels means something, as it
    does in depth and normals.
    """
    words = re.findall("[a-z]+", kind.lower())
    if any(word.startswith("depth") or word in _DEPTH for word in words):
        return "depth"
    if any(word.startswith("normal") for word in words):
        return "normals"
    if any(word.endswith(("pose", "poses")) for word in words):
        return "pose"
    return "soft" if _SOFT.intersection(words) else ""


def right_sampling(levels: NDArray[Any], sense: Sense) -> Literal["lines", "nearest", "smooth"]:
    """How a map is resized: lines stay lines, labels stay labels, and all else is resampled smoothly.

    Lines are 0 and 255 in equal channels; labels have up to 199 colours and are neither depth, nor normals,
    nor soft.
    """
    if levels.dtype == np.uint8 and is_black_and_white(levels):
        return "lines"
    if sense in ("depth", "normals", "soft"):
        return "smooth"
    return "nearest" if _has_few_colours(levels) else "smooth"


def _has_few_colours(levels: NDArray[Any]) -> bool:
    codes = levels.astype(np.int32)
    if levels.ndim == 3:
        codes = codes[..., 0] << 16 | codes[..., 1] << 8 | codes[..., 2]
    codes = codes.ravel()
    if len(np.unique(codes[:: max(1, len(codes) // _SAMPLE)])) > _FEW:
        return False
    changes = np.flatnonzero(np.diff(codes, prepend=-1))  # maps of labels are flat: few pixels differ
    return len(np.unique(codes[changes])) <= _FEW

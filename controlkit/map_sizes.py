"""Maps at another size: lines stay lines, colours that mean something stay these colours."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from controlkit import images
from controlkit.rules import USUAL_FIT

_FEW = 199  # colours that a map of labels has at most (sd-webui-controlnet draws the same line)
_SAMPLE = 4096  # pixels that show whether a map has more
_DEPTH = {"leres", "midas", "zoe"}
_SOFT = {"hed", "lineart", "pidinet", "shuffle", "softedge"}

Sense = Literal["depth", "normals", "pose", "soft", ""]
Sampling = Literal["lines", "nearest", "smooth"]


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
    part = images.central_part(image, width, height)
    return _resized(part, width, height, right_sampling(image, sense_of(kind)))


def fit_map(
    image: NDArray[np.uint8], width: int, height: int, *, kind: str, fit: str = USUAL_FIT
) -> NDArray[np.uint8]:
    """A map, uint8 (H, W, 3), at another size and shape, in one of the ways `rules.FITS`.

    It is resampled as by `cover_map`. What "fill" puts around it has the colour of its border: of each
    channel the median of the border's pixels, as in sd-webui-controlnet and InvokeAI (of an even number the
    lower one, so that black and white stay so), and for labels the commonest, which is a label.
    """
    if fit == "crop":
        return cover_map(image, width, height, kind=kind)
    inner = _inner_size(image, width, height) if fit == "fill" else (width, height)
    sampling = right_sampling(image, sense_of(kind))
    behind = _commonest(_border(image)) if sampling == "nearest" else _middle(_border(image))
    return surround(_resized(image, *inner, sampling), width, height, behind=behind)


def fit_picture(
    image: NDArray[np.uint8], width: int, height: int, *, fit: str = USUAL_FIT
) -> NDArray[np.uint8]:
    """A photo as its map is made of it: with "fill" it is smaller than width x height, and the map is then
    what `surround` completes.
    """
    if fit == "crop":
        return images.cover(image, width, height)
    return images.resize(image, *(_inner_size(image, width, height) if fit == "fill" else (width, height)))


def fit_region(mask: NDArray[Any], width: int, height: int, *, fit: str = USUAL_FIT) -> NDArray[Any]:
    """A region, (H, W), uint8 or float, fitted as its map is; beside it there is none."""
    if fit == "crop":
        return images.cover(mask, width, height)
    inner = _inner_size(mask, width, height) if fit == "fill" else (width, height)
    return surround(images.resize(mask, *inner), width, height, behind=0)


def surround(
    image: NDArray[Any], width: int, height: int, *, behind: NDArray[Any] | float | None = None
) -> NDArray[Any]:
    """An image, (H, W) or (H, W, C), in the middle of width x height, and `behind` or its border's colour
    around it.
    """
    inner_height, inner_width = image.shape[:2]
    if (inner_width, inner_height) == (width, height):
        return image
    whole = np.empty((height, width, *image.shape[2:]), image.dtype)
    whole[...] = _middle(_border(image)) if behind is None else behind
    left, top = (width - inner_width) // 2, (height - inner_height) // 2
    whole[top : top + inner_height, left : left + inner_width] = image
    return whole


def _border(image: NDArray[Any]) -> NDArray[Any]:
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def _middle(colours: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.sort(colours, axis=0)[(len(colours) - 1) // 2])


def _commonest(colours: NDArray[Any]) -> NDArray[Any]:
    different, count = np.unique(colours, axis=0, return_counts=True)
    return np.asarray(different[count.argmax()])


def _inner_size(image: NDArray[Any], width: int, height: int) -> tuple[int, int]:
    """The largest width and height within width x height of the image's shape."""
    scale = min(width / image.shape[1], height / image.shape[0])
    sides = (image.shape[1], width), (image.shape[0], height)
    inner_width, inner_height = (min(most, max(1, round(side * scale))) for side, most in sides)
    return inner_width, inner_height


def _resized(image: NDArray[np.uint8], width: int, height: int, sampling: Sampling) -> NDArray[np.uint8]:
    if sampling == "lines":
        return resize_black_and_white(np.ascontiguousarray(image), width, height)
    return images.resize(image, width, height, nearest=sampling == "nearest")


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


def right_sampling(levels: NDArray[Any], sense: Sense) -> Sampling:
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

"""Maps that come in files: pictures of 8 or 16 bits, depth, and poses as joints."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlkit import images
from controlkit.map_sizes import Sense as Sense
from controlkit.map_sizes import right_sampling as right_sampling
from controlkit.map_sizes import sense_of as sense_of

if TYPE_CHECKING:
    from controlkit.preprocessors import Poses

_NO_PICTURES = (b"\x93NUMPY", b"PK\x03\x04", b"Pf", b"PF", b"v/1\x01")  # npy, npz, pfm, exr
_PNG, _TIFFS = b"\x89PNG", (b"II*\0", b"MM\0*", b"II+\0")
_BIT_DEPTH = 24  # where a PNG says how many bits its channels have
_BITS_PER_SAMPLE = 258  # tag of TIFF
_GREY_TOLERANCE = 8  # levels of 255 by which channels may differ: what JPEG does to a grey picture


def is_json(content: bytes | NDArray[Any]) -> bool:
    """Whether a map is JSON, that is, a pose."""
    return isinstance(content, bytes) and content[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[")


def is_numbers(content: bytes | NDArray[Any]) -> bool:
    """Whether a map is a file of numbers (npy, npz, pfm, EXR), which only depth may be."""
    return isinstance(content, bytes) and content.startswith(_NO_PICTURES)


def _not_depth(name: str) -> str:
    """Why a file of numbers cannot be another map."""
    return f"{name} holds numbers (npy, npz, pfm, EXR), which are read where the map is depth, and only there"


def grey_pose(name: str) -> str:
    """Why a pose cannot be a grey map."""
    return f"{name} is a pose, which is drawn in colours, and data.map_mode is grey"


def read_joints(content: bytes, name: str, *, width: int | None, height: int | None) -> Poses:
    """The poses of a JSON file (see `poses_from_json`); the canvas has the size given where it names none.

    Raises:
        ValueError: one line with ``name``: it is not JSON, or in neither format.
    """
    from controlkit.preprocessors.posejson import poses_from_json

    try:
        poses = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a JSON file: {error}") from error
    return poses_from_json(poses, name=name, width=width, height=height)


def read_levels(
    content: bytes | NDArray[Any],
    name: str,
    *,
    grey: bool,
    depth: bool,
    metric: bool | None = None,
    fill: bool = False,
) -> NDArray[Any]:
    """A map's levels: uint8 (H, W, 3), or with ``grey`` uint8 or uint16 (H, W).

    Pictures are read as :func:`controlkit.images.load_map` defines. ``grey`` keeps 16 bits where there
    are any; otherwise they become 8. With ``depth``, what is no picture of 8 bits (npy, npz, pfm, EXR, PNG
    and TIFF of 16 bits or floats, arrays of other types than uint8) is read as depth
    (:func:`controlkit.preprocessors.read_depth`), whose range becomes black to white: near is white.
    ``metric`` says that values grow with the distance, and pictures of 8 bits are then read so, too; without
    it they do in an EXR's channel Z or depth alone.
    ``fill`` fills holes in depth from around them.

    Raises:
        ValueError: one line with ``name``: it cannot be read, or is coloured where it must be grey.
    """
    if not depth and is_numbers(content):
        raise ValueError(_not_depth(name))
    with _named(name):
        is_deep = _is_deep(content)
        if depth and (metric or is_deep):
            return _depth_levels(content, grey=grey, metric=metric, fill=fill)
        if grey and is_deep and not _is_float(content):
            return _deep_levels(content)
        picture = images.load_map(content)
    return _one_channel(picture, name) if grey else picture


# --- depth and 16 bits ---


def _is_deep(content: bytes | NDArray[Any]) -> bool:
    """Whether a map has more than 8 bits, or is in a format for numbers."""
    if not isinstance(content, bytes):
        return content.dtype not in (np.uint8, np.bool_)
    if content.startswith(_PNG):
        return content[_BIT_DEPTH : _BIT_DEPTH + 1] == b"\x10"
    return content.startswith(_NO_PICTURES) or (content.startswith(_TIFFS) and _is_deep_tiff(content))


def _is_deep_tiff(content: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(content), formats=["TIFF"]) as image:
            tags: Any = getattr(image, "tag_v2", {})
            bits = tags.get(_BITS_PER_SAMPLE, (8,))
            return bool(max(bits if isinstance(bits, tuple) else (bits,)) > 8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False  # whoever decodes it says what is wrong


def _is_float(content: bytes | NDArray[Any]) -> bool:
    """Whether a map that is no depth holds floats: levels from 0 to 1, which have no bits to keep."""
    if not isinstance(content, bytes):
        return content.dtype != np.uint16
    if content.startswith(_PNG):
        return False
    with Image.open(io.BytesIO(content)) as image:
        return image.mode in ("F", "I")  # in RGB Pillow shows 16 bits as 8


def _depth_levels(
    content: bytes | NDArray[Any], *, grey: bool, metric: bool | None, fill: bool
) -> NDArray[Any]:
    from controlkit.preprocessors import depth_to_map, read_depth

    inverse = read_depth(content, metric=metric, fill=fill)
    if not grey:
        return depth_to_map(inverse)
    low, high = float(inverse.min()), float(inverse.max())
    share = (inverse.astype(np.float64) - low) / ((high - low) or 1.0)
    return np.rint(share * 65535.0).astype(np.uint16)


def _deep_levels(content: bytes | NDArray[Any]) -> NDArray[np.uint16]:
    from controlkit.preprocessors import read_depth

    return read_depth(content).astype(np.uint16)  # float32 holds every integer of 16 bits


# --- colours ---


def _one_channel(picture: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """The grey of a picture (H, W, 3) whose channels are equal: uint8 (H, W)."""
    import cv2

    red, green, blue = cv2.split(picture)
    span = cv2.subtract(cv2.max(cv2.max(red, green), blue), cv2.min(cv2.min(red, green), blue))
    if span.max() > _GREY_TOLERANCE:
        raise ValueError(f"{name} is coloured, and data.map_mode is grey; rgb keeps its colours")
    return np.asarray(green)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let errors about bytes and arrays say what they are called."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for anonymous in ("the data given", "the depth given", "the array"):
            if anonymous in said:
                raise ValueError(said.replace(anonymous, name, 1)) from error
        raise ValueError(f"{name}: {said}") from error


def read_picture(content: bytes | NDArray[Any], name: str) -> NDArray[np.uint8]:
    """A picture, uint8 (H, W, 3), as :func:`controlkit.images.load_picture` defines it.

    Raises:
        ValueError: one line with ``name``.
    """
    with _named(name):
        return images.load_picture(content)


def read_alpha(content: bytes | NDArray[Any], name: str) -> NDArray[np.uint8] | None:
    """How opaque a picture is: :func:`controlkit.images.load_alpha`. Raises as `read_picture`."""
    with _named(name):
        return images.load_alpha(content)

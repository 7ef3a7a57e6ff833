"""Depth in files: from sensors and renderers, in all its bits, and back to disk.

Depth comes in two senses. Metric depth grows with the distance (metres, millimetres); inverse depth grows
towards the viewer (disparity, and what relative networks estimate). Here everything becomes inverse depth.
"""

import io
import os
import sys
import tokenize
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from controlkit.files import PathLike, refuse_pipe, write_bytes
from controlkit.images import DECODE_ERRORS, DEFAULT_MAX_PIXELS, deep_values, load_picture, orientation
from controlkit.preprocessors.exr import UnreadKind, read_exr

if TYPE_CHECKING:
    import torch

    DepthSource = PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

_GREY_TOLERANCE = 8  # levels of 255 by which channels may differ: what JPEG does to a grey picture
_SKY = 1e9  # metres or millimetres; Blender writes 1e10 where its rays hit nothing
_EXR = b"v/1\x01"
_DAMAGE = (*DECODE_ERRORS, zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # numpy's, of a header


def read_depth(source: "DepthSource", *, metric: bool | None = None, fill: bool = False) -> np.ndarray:
    """Return depth from a file or array as inverse depth: float32 (H, W), larger is nearer, finite.

    ``source`` is a path, the bytes of a file, a PIL image, or an array or tensor of any real type, of the
    shape (H, W) or with an axis of equal channels. Files, recognised by their content: PNG and TIFF of 8 or
    16 bits, TIFF of 32-bit floats, ``.npy`` and ``.npz`` (with one array; pickled objects are refused),
    ``.pfm``, ``.exr`` (the channel Z or Y, or equal R, G and B; of several passes that named depth), and
    8-bit pictures of other formats.

    ``metric`` says that values grow with the distance; they are inverted (1 / depth). None leaves it to the
    file: an EXR's channel Z or depth is a distance, as OpenEXR defines it; everything else counts as larger
    is nearer. Holes (NaN, infinity, transparent pixels, what an EXR stores no pixels for, and with ``metric``
    zero and less) become as far as the farthest value, so they are black in the map and leave the range of
    the rest as it is; with ``fill`` they become as far as the measured pixel that is nearest to them in the
    picture. So does a renderer's sky (with ``metric`` values from 1e9 on), which is never filled. Where all
    is a hole, the depth is 0 throughout.

    Raises:
        ValueError: one line with the file's name: it is missing, damaged, too large, coloured (equal channels
            are needed), or of a format that holds no depth.
    """
    values, is_distance = _values(source)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values.reshape(values.shape[1:] if values.shape[0] == 1 else values.shape[:2])
    name = _name(source)
    if np.issubdtype(values.dtype, np.complexfloating) or not np.issubdtype(values.dtype, np.number):
        raise ValueError(f"{name} holds values of the type {values.dtype}; depth is made of numbers")
    if values.ndim == 3 and values.shape[2] in (2, 3, 4):
        values = _one_channel(values, name)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} has the shape {values.shape}; depth is (height, width)")
    is_metric = is_distance if metric is None else metric
    return _inverse(values, metric=is_metric, fill=fill)


def write_depth_png16(path: PathLike, depth: np.ndarray) -> None:
    """Write depth, float (H, W), as a grey PNG of 16 bits, atomically: its range becomes 0 to 65535.

    Constant depth becomes 0.

    Raises:
        ValueError: as :func:`depth_range` or :func:`controlkit.files.write_bytes`.
    """
    depth, low, high = depth_range(depth)
    share = (depth.astype(np.float64) - low) / ((high - low) or 1.0)
    ok, encoded = cv2.imencode(".png", np.rint(share * 65535.0).astype(np.uint16))
    assert ok, "OpenCV encodes every uint16 array"
    write_bytes(path, encoded.tobytes())


def write_depth_npy(path: PathLike, depth: np.ndarray) -> None:
    """Write depth, float (H, W), as a ``.npy`` file of float32, atomically and with nothing lost.

    Raises:
        ValueError: it is not (H, W) numbers, or as :func:`controlkit.files.write_bytes`.
    """
    buffer = io.BytesIO()
    np.save(buffer, depth_values(depth).astype(np.float32), allow_pickle=False)
    write_bytes(path, buffer.getvalue())


def depth_values(depth: Any) -> np.ndarray:
    """Return depth, an array or what becomes one (a tensor, a list), as an array (H, W) of numbers.

    Raises:
        ValueError: another shape or type.
    """
    held = _held(depth) if hasattr(depth, "detach") else np.asarray(depth)
    if held.ndim != 2 or held.size == 0 or held.dtype.kind not in "biuf":
        raise ValueError(f"depth is (height, width) numbers, not {held.dtype} {held.shape}")
    return held


def depth_range(depth: Any) -> tuple[np.ndarray, float, float]:
    """Return what :func:`depth_values` does, its smallest and its largest value.

    Raises:
        ValueError: as there, or a value is not finite.
    """
    values = depth_values(depth)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(high - low):
        raise ValueError("the depth has values that are not finite (NaN or infinity)")
    return values, low, high


def _inverse(values: np.ndarray, *, metric: bool, fill: bool) -> np.ndarray:
    """Return (H, W) numbers, NaN and infinity included, as inverse depth, its holes filled."""
    with np.errstate(invalid="ignore"):  # NaNs that signal
        values = values.astype(np.float64)
    sky = np.isfinite(values) & (values >= _SKY) if metric else np.zeros(values.shape, bool)
    with np.errstate(all="ignore"):
        inverse = (np.where(values > 0, 1.0 / values, np.nan) if metric else values).astype(np.float32)
        inverse[np.isinf(values) | sky] = np.nan
    valid = np.isfinite(inverse)
    farthest = inverse[valid].min() if valid.any() else np.float32(0.0)
    inverse[sky] = farthest
    valid |= sky
    if fill and valid.any() and not valid.all():
        from scipy import ndimage

        nearest = ndimage.distance_transform_edt(~valid, return_distances=False, return_indices=True)
        return inverse[tuple(nearest)]
    return np.where(valid, inverse, farthest)


def _one_channel(values: np.ndarray, name: str) -> np.ndarray:
    """Return the grey of (H, W, 2, 3 or 4) values; where an alpha channel is 0 there is a hole."""
    has_alpha = values.shape[2] in (2, 4)
    colours = values[:, :, :-1] if has_alpha else values
    tolerance = _GREY_TOLERANCE if values.dtype == np.uint8 else 0
    low, high = colours.min(axis=2), colours.max(axis=2)
    if (np.nan_to_num(high) - np.nan_to_num(low) > tolerance).any():
        raise ValueError(f"{name} is coloured; depth has equal channels (a colour scale cannot be undone)")
    grey = colours[:, :, colours.shape[2] // 2].astype(np.float64)
    return np.where(values[:, :, -1] > 0, grey, np.nan) if has_alpha else grey


# --- files ---


def _name(source: object) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return "the data given" if isinstance(source, bytes) else "the depth given"


def _values(source: "DepthSource") -> tuple[np.ndarray, bool]:
    """Return the values of depth as they are stored, and whether the file says that they are distances."""
    if not isinstance(source, (str, os.PathLike, bytes)):
        return _held(source), False
    name = _name(source)
    data = source if isinstance(source, bytes) else _read_bytes(name)
    try:
        if data.startswith(_EXR):
            return read_exr(data, max_pixels=DEFAULT_MAX_PIXELS)
        for start, read in _READERS.items():
            if data.startswith(start):
                return read(data, name), False
    except _Refused:
        raise
    except UnreadKind as error:
        raise ValueError(f"{name} {error}") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name} is damaged or cannot be read: {reason}") from error
    return load_picture(source), False


def _held(source: Any) -> np.ndarray:
    """Return the values of what is no file, of any type and shape."""
    if isinstance(source, np.ndarray):
        return source
    if isinstance(source, Image.Image):
        return np.asarray(source if source.mode not in ("P", "1") else source.convert("RGB"))
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        tensor: Any = source.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return values.transpose(1, 2, 0) if values.ndim == 3 else values
    given = type(source).__name__
    raise ValueError(f"depth is a path, bytes, a PIL image, an array or a tensor, not {given}")


class _Refused(ValueError):
    """A file that can be read and that is not taken as depth."""


def _read_bytes(name: str) -> bytes:
    try:
        refuse_pipe(name)
        with open(name, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder, not a file of depth") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _check_size(width: int, height: int, name: str) -> None:
    if width * height > DEFAULT_MAX_PIXELS:
        raise _Refused(f"{name} has {width} x {height} pixels; at most {DEFAULT_MAX_PIXELS:,} are read")


def _read_npy(data: bytes, name: str) -> np.ndarray:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    read_header = (
        np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise _Refused(f"{name} holds Python objects, which could run code: save a plain array of numbers")
    _check_size(int(np.prod(shape, dtype=np.float64)), 1, name)
    stream.seek(0)
    values: np.ndarray = np.load(stream, allow_pickle=False)
    return values


def _read_npz(data: bytes, name: str) -> np.ndarray:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if len(members) != 1 or not members[0].filename.endswith(".npy"):
            names = ", ".join(member.filename.removesuffix(".npy") for member in members)
            raise _Refused(f"{name} must hold one array; it holds {names or 'nothing'}")
        if members[0].file_size > 16 * DEFAULT_MAX_PIXELS:
            raise _Refused(f"{name} unpacks to more than {DEFAULT_MAX_PIXELS:,} pixels")
        return _read_npy(archive.read(members[0]), name)


def _read_pfm(data: bytes, name: str) -> np.ndarray:
    """Read Netpbm-like floats: three lines of text, then rows from the bottom up (Debevec's PFM)."""
    magic, size, scale, pixels = data.split(b"\n", 3)
    width, height = (int(number) for number in size.split())
    _check_size(width, height, name)
    channels = 3 if magic.strip() == b"PF" else 1
    order = "<" if float(scale) < 0 else ">"
    values = np.frombuffer(pixels, f"{order}f4", count=width * height * channels)
    return values.reshape(height, width, channels)[::-1]


def _read_raster(data: bytes, name: str) -> np.ndarray:
    """Read a PNG or TIFF: 16 bits and floats as they are, 8 bits as any picture."""
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "TIFF"]) as image:
            _check_size(*image.size, name)
            turn = orientation(image, name) if image.format == "PNG" else 1  # TIFF is turned as it is decoded
            if image.mode == "F" or image.mode.startswith("I"):
                return _upright(deep_values(image), turn)
            is_deep = _is_deep(image, data)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _Refused(f"{name} is too large: at most {DEFAULT_MAX_PIXELS:,} pixels are read") from error
    except UnidentifiedImageError as error:
        raise _Refused(
            f"{name} is damaged, or a PNG or TIFF of another kind than 8 or 16 bits or 32-bit floats"
        ) from error
    picture = load_picture(data)  # refuses what is cut short, which OpenCV reads without a word
    if is_deep:  # 16 bits in several channels, which Pillow reduces to 8
        deep: np.ndarray | None = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        return picture if deep is None else _upright(deep, turn)
    return picture


def _upright(values: np.ndarray, orientation: int) -> np.ndarray:
    """Rows and columns as EXIF's orientation, 1 to 8, says that they are to be seen."""
    if orientation >= 5:  # rows are columns
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def _read_grey(data: bytes, name: str) -> np.ndarray:
    """A PGM: of 16 bits its own numbers, which Pillow would stretch to 65535."""
    import cv2

    picture = load_picture(data)  # refuses what is cut short
    ended = data + b"\n"  # OpenCV wants something behind the last number in words
    levels: np.ndarray | None = cv2.imdecode(np.frombuffer(ended, np.uint8), cv2.IMREAD_UNCHANGED)
    return picture if levels is None or levels.dtype != np.uint16 else levels


def _is_deep(image: Image.Image, data: bytes) -> bool:
    if image.format == "PNG":
        return data[24] == 16  # the header's bit depth
    bits = getattr(image, "tag_v2", {}).get(258, (8,))  # BitsPerSample
    return max(bits if isinstance(bits, tuple) else (bits,)) > 8


_READERS = {
    b"\x89PNG": _read_raster,
    b"P5": _read_grey,
    b"P2": _read_grey,
    b"II*\0": _read_raster,
    b"MM\0*": _read_raster,
    b"II+\0": _read_raster,  # BigTIFF
    b"\x93NUMPY": _read_npy,
    b"PK\x03\x04": _read_npz,
    b"Pf": _read_pfm,
    b"PF": _read_pfm,
}
"""First bytes of a file: how it is read."""

"""Pixel layouts and ranges: the one place where pictures come in, change size, become tensors and go out.

Three layouts exist in ControlKit, and they are converted only here:

=================  =====================================  ==========  ========================================
name               array                                  range       used for
=================  =====================================  ==========  ========================================
picture or map     uint8, (H, W, 3), RGB                  0..255      everything a person sees or a file holds
``pixel_values``   float32 tensor, (N, 3, H, W)           [-1, 1]     what the autoencoder encodes and decodes
controlnet_cond    float32 tensor, (N, 3, H, W)           [0, 1]      the map, as the control network reads it
=================  =====================================  ==========  ========================================

The two tensor ranges differ on purpose: ControlNet was trained with targets in [-1, 1] and hints in [0, 1]
(lllyasviel/ControlNet, tutorial_dataset.py). Mixing them up is the classic ControlNet mistake: nothing
crashes, the control only gets weak.
"""

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from controlkit.files import PathLike, write_bytes

if TYPE_CHECKING:
    import torch

    Source = PathLike | bytes | Image.Image | np.ndarray | torch.Tensor

DEFAULT_MAX_PIXELS = 89_478_485
"""Pictures of more pixels are refused before they are decoded; Pillow starts to warn at the same size."""

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
# Pillow imports all of its plugins, a tenth of a second, when it is asked for any other.
_QUICK_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "PPM")
_ORIENTATION = 0x0112  # EXIF's tag
_LOOKALIKES = {
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file (an SVG drawing?)",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer (run `git lfs pull`)",
    b"%pdf": "a PDF",
}
# What Pillow raises on damaged files, gathered from its decoders.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    RuntimeError,  # AVIF
    struct.error,
)
# Guards warnings.catch_warnings, which changes state that all threads share.
_opening = threading.Lock()


def load_picture(source: "Source", *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Return any picture as uint8 RGB of shape (H, W, 3).

    ``source`` is a path, the bytes of a file, a PIL image, a numpy array (uint8, uint16, bool, or float in
    [0, 1]; (H, W) or (H, W, C) with 1, 3 or 4 channels) or a torch tensor of the same types, (C, H, W).
    The array returned may share memory with the one given.

    Whatever the format, the result is defined: turned upright by its EXIF orientation, 16 bits scaled by
    1/257, alpha composited on white, CMYK, palettes and 1-bit converted, of an animation the first frame.
    Colour profiles are ignored, as in every data set that ControlNets were trained on.

    Raises:
        ValueError: one line with the file's name. There is no such file, it is no picture, it is truncated or
            empty, its header announces more than ``max_pixels`` (or twice DEFAULT_MAX_PIXELS, whatever
            ``max_pixels`` is; nothing is decoded then), or an array has another shape, type or range.
    """
    if isinstance(source, np.ndarray):
        return _array_to_rgb(source, "the array")
    if isinstance(source, Image.Image):
        return _image_to_rgb(source, "the picture")
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        return _tensor_to_rgb(source)
    if not isinstance(source, (str, os.PathLike, bytes)):
        given = type(source).__name__
        raise ValueError(f"a picture is a path, bytes, a PIL image, an array or a tensor, not {given}")
    with _opened(source, max_pixels=max_pixels) as (image, name):
        return _image_to_rgb(image, name)


def load_mask(path: PathLike) -> np.ndarray:
    """Return a mask's file as uint8 of shape (H, W): 255 where it selects, 0 where it does not.

    White selects, black and what is transparent do not: alpha is composited on black. Where all that is
    visible has one colour, as strokes of a brush on a transparent layer, the alpha alone is the mask: what is
    opaque selects. Of colours the largest channel counts.

    Raises:
        ValueError: as :func:`load_picture`.
    """
    with _opened(path, max_pixels=DEFAULT_MAX_PIXELS) as (image, name):
        grey = _image_to_rgb(image, name).max(axis=2)
        if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
            return grey
        rgba = np.asarray(_upright(image).convert("RGBA"))
    colour, alpha = rgba[..., :3], rgba[..., 3]
    visible = colour[alpha > 0]
    if alpha.min() < 255 and len(visible) and (visible == visible[0]).all():
        return alpha.copy()
    return ((colour.max(axis=2).astype(np.uint32) * alpha + 127) // 255).astype(np.uint8)


def check_picture(path: PathLike, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int]:
    """Return a picture file's width and height from its header, before EXIF turns it; decodes nothing.

    Raises:
        ValueError: as :func:`load_picture`, but for damage that only decoding shows.
    """
    with _opened(path, max_pixels=max_pixels) as (image, _):
        return image.size


def picture_size(source: "PathLike | bytes | np.ndarray") -> tuple[int, int]:
    """Return the width and height that :func:`load_picture` would give, from a file's header alone.

    Raises:
        ValueError: as :func:`check_picture`.
    """
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with _opened(source, max_pixels=DEFAULT_MAX_PIXELS) as (image, _):
        width, height = image.size
        turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


def load_pictures(sources: "Source | Sequence[Source]") -> "tuple[list[np.ndarray], bool]":
    """Return one picture or a batch as a list of pictures, and whether it was a batch.

    A batch is a list or tuple of what :func:`load_picture` takes, an array (N, H, W, C), or a tensor
    (N, C, H, W); it may be empty.

    Raises:
        ValueError: as :func:`load_picture`; for a batch, with the number of the picture in it.
    """
    if not isinstance(sources, (list, tuple)) and getattr(sources, "ndim", 0) != 4:
        return [load_picture(cast("Source", sources))], False
    pictures = []
    for index, source in enumerate(cast(Sequence[Any], sources)):
        try:
            pictures.append(load_picture(source))
        except ValueError as error:
            raise ValueError(f"picture {index} of the batch: {error}") from error
    return pictures, True


def resize(image: np.ndarray, width: int, height: int, *, nearest: bool = False) -> np.ndarray:
    """Return ``image`` (H, W) or (H, W, C), uint8 or float32, as (height, width) or (height, width, C).

    Each axis that shrinks is averaged by area, each that grows is interpolated cubically; with ``nearest``
    the pixel at the centre is taken, which keeps binary and palette maps (edges, poses) free of in-between
    colours. The same size returns ``image`` itself.

    Raises:
        ValueError: ``width`` or ``height`` is below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"cannot resize to {width} x {height}: width and height must be at least 1")
    import cv2

    source_height, source_width = image.shape[:2]
    if (source_width, source_height) == (width, height):
        return image
    if nearest:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    smaller = (min(width, source_width), min(height, source_height))
    if smaller != (source_width, source_height):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return image


def at_resolution(image: np.ndarray, resolution: int) -> np.ndarray:
    """Return ``image`` (H, W[, C]) with its shorter side brought to ``resolution`` pixels, its aspect kept.

    The longer side grows to eight times the original at most, so that a 3000 x 2 strip stays manageable.
    """
    height, width = image.shape[:2]
    scale = min(resolution / min(height, width), 8.0)
    return resize(image, max(1, round(width * scale)), max(1, round(height * scale)))


def resize_lines(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a binary map, uint8 (H, W[, C]) of 0 and 255 in equal channels, at another size, still binary.

    It is resampled smoothly and cut at half. One-pixel lines, which that would break up or thicken, are
    drawn anew, one pixel wide. (The A1111 extension does the same, by other means, in high_quality_resize.)
    """
    if image.shape[:2] == (height, width):
        return image
    import cv2

    mask = image if image.ndim == 2 else np.ascontiguousarray(image[..., 0])
    if _has_thin_lines(mask):
        lines = _redraw_lines(mask, width, height)
    else:
        lines = (resize(mask, width, height) >= 128).astype(np.uint8) * np.uint8(255)
    return lines if image.ndim == 2 else cv2.merge([lines] * image.shape[2])


def cover(image: np.ndarray, width: int, height: int, *, nearest: bool = False) -> np.ndarray:
    """Return the largest central part of ``image`` that has the shape width : height, at that size.

    The aspect is kept and nothing is padded. The part depends on the two sizes only, so a picture and its map
    stay aligned. It is cut before it is resized: a 3000 x 2 strip never becomes a huge intermediate picture.

    Raises:
        ValueError: ``width`` or ``height`` is below 1.
    """
    return resize(central_part(image, width, height), width, height, nearest=nearest)


def central_part(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the largest central part of ``image`` that has the shape width : height, not resized.

    Raises:
        ValueError: ``width`` or ``height`` is below 1, or ``image`` is empty.
    """
    if width < 1 or height < 1:
        raise ValueError(f"cannot crop to {width} x {height}: width and height must be at least 1")
    source_height, source_width = image.shape[:2]
    if not (source_height and source_width):
        raise ValueError(f"a picture of {source_width} x {source_height} pixels is empty")
    shrink = min(source_width / width, source_height / height)
    part_width = min(source_width, max(1, round(width * shrink)))
    part_height = min(source_height, max(1, round(height * shrink)))
    left, top = (source_width - part_width) // 2, (source_height - part_height) // 2
    return image[top : top + part_height, left : left + part_width]


def picture_to_tensor(pictures: np.ndarray | Sequence[np.ndarray]) -> "torch.Tensor":
    """Return pictures of one size, uint8 (H, W, 3), as a float32 tensor (N, 3, H, W) in [-1, 1].

    A single picture gives N = 1.

    Raises:
        ValueError: not uint8 RGB, or of different sizes.
    """
    return _to_nchw(pictures) / 127.5 - 1.0


def map_to_cond(maps: np.ndarray | Sequence[np.ndarray]) -> "torch.Tensor":
    """Return maps of one size, uint8 (H, W, 3), as ``controlnet_cond``: float32 (N, 3, H, W) in [0, 1].

    A single map gives N = 1.

    Raises:
        ValueError: not uint8 RGB, or of different sizes.
    """
    return _to_nchw(maps) / 255.0


def maps_to_levels(maps: Sequence[np.ndarray]) -> "torch.Tensor":
    """Return maps of one size, (H, W, C) of 8 or 16 bits and any number of channels, as (N, C, H, W).

    The numbers stay as they are, a quarter (or half) of the memory of :func:`levels_to_cond`'s, which makes
    of them what a network takes.

    Raises:
        ValueError: maps of different sizes, channels or bits.
    """
    import torch

    kinds = sorted({f"{m.shape[1]} x {m.shape[0]} x {m.shape[2]} {m.dtype}" for m in maps})
    if len(kinds) != 1:
        raise ValueError(f"the maps of a batch must be alike, found: {', '.join(kinds) or 'no map'}")
    return torch.from_numpy(np.ascontiguousarray(np.stack(maps).transpose(0, 3, 1, 2)))


def levels_to_cond(levels: "torch.Tensor") -> "torch.Tensor":
    """Return levels (N, C, H, W), uint8 or uint16, as ``controlnet_cond``: float32 in [0, 1]."""
    import torch

    assert levels.dtype in (torch.uint8, torch.uint16), levels.dtype
    return levels.to(torch.float32) / (255.0 if levels.dtype == torch.uint8 else 65535.0)


def tensor_to_pictures(x: "torch.Tensor") -> list[np.ndarray]:
    """Return a tensor (N, 3, H, W), nominally in [-1, 1], as N pictures, uint8 (H, W, 3).

    Any float type and device. Values outside are clipped, levels are rounded half to even. Inverts
    :func:`picture_to_tensor` exactly.

    Raises:
        ValueError: a value is not finite (a black picture would hide it), or the shape is another.
    """
    import torch

    if x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"pictures have the shape (N, 3, height, width), not {tuple(x.shape)}")
    x = x.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the picture has values that are not finite (NaN or infinity)")
    levels = ((x + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return list(levels.permute(0, 2, 3, 1).contiguous().numpy())


def encode_png(image: np.ndarray, *, text: Mapping[str, str] | None = None, plain: bool = False) -> bytes:
    """Return a picture or map, uint8 (H, W, 3), as the bytes of a PNG file; the same input, the same bytes.

    ``text`` becomes tEXt chunks, or iTXt where a value is not Latin-1 (what A1111 and Pillow read and write),
    in the mapping's order, before the pixels. OpenCV compresses: several times as fast as Pillow. ``plain``
    is for lines and strokes on black: the runs of one colour are coded and nothing else, which is quicker
    still and smaller there; the pixels are the same.

    Raises:
        ValueError: not uint8 RGB, or a keyword that PNG does not allow (1 to 79 Latin-1 characters).
    """
    data = _encode_runs(_rgb(image)) if plain else _encode(_rgb(image))
    chunks = b"".join(_text_chunk(keyword, value) for keyword, value in (text or {}).items())
    return data[:_PNG_HEADER_END] + chunks + data[_PNG_HEADER_END:]


def _encode(image: np.ndarray) -> bytes:
    import cv2

    ok, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert ok, "OpenCV encodes every uint8 RGB picture"
    return encoded.tobytes()


def _encode_runs(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter, 0 for none
    rows[:, 1:] = image.reshape(height, 3 * width)
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    packed = packer.compress(rows.tobytes()) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def read_png_text(path: PathLike) -> dict[str, str]:
    """Return the text chunks of a PNG file: tEXt, zTXt and iTXt, wherever they stand in the file.

    Raises:
        ValueError: one line with the file's name: missing, not a PNG, damaged, or too large.
    """
    with _opened(path, max_pixels=DEFAULT_MAX_PIXELS, formats=("PNG",)) as (image, name):
        try:
            image.load()
        except _DECODE_ERRORS as error:
            raise ValueError(f"{name} is damaged: {_one_line(error)}") from error
        return {str(key): str(value) for key, value in getattr(image, "text", {}).items()}


def write_png(
    path: PathLike,
    image: np.ndarray,
    *,
    text: Mapping[str, str] | None = None,
    plain: bool = False,
    durable: bool = True,
) -> None:
    """Write :func:`encode_png`'s bytes to ``path``, atomically; ``durable`` as in ``files.write_bytes``.

    Raises:
        ValueError: as :func:`encode_png` and :func:`controlkit.files.write_bytes`.
    """
    write_bytes(path, encode_png(image, text=text, plain=plain), durable=durable)


# --- lines ---


def _has_thin_lines(mask: np.ndarray) -> bool:
    """Whether hardly any white pixel has nothing but white around it, as in maps of edges."""
    import cv2

    solid = cv2.erode(mask, np.ones((3, 3), np.uint8))
    return bool(np.count_nonzero(solid) < 0.05 * np.count_nonzero(mask))


def _redraw_lines(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a binary map of thin lines at another size, one pixel wide, uint8 (height, width).

    Along an axis that shrinks, a pixel is white where any that fall into it are, so that no line breaks; one
    that grows is smoothed. Then lines are thinned.
    """
    import cv2

    source_height, source_width = mask.shape
    smaller = np.zeros((min(height, source_height), min(width, source_width)), np.uint8)
    rows, columns = np.nonzero(mask)  # a pixel lands where its middle does
    smaller[
        (2 * rows + 1) * smaller.shape[0] // (2 * source_height),
        (2 * columns + 1) * smaller.shape[1] // (2 * source_width),
    ] = 255
    if smaller.shape != (height, width):
        growth_x, growth_y = width / smaller.shape[1], height / smaller.shape[0]
        smaller = cv2.resize(smaller, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
        smooth = cv2.GaussianBlur(smaller, (0, 0), 0.5 * growth_x, sigmaY=0.5 * growth_y)
        smaller = (smooth > _BESIDE_A_LINE).astype(np.uint8) * np.uint8(255)
    return thin(smaller)


def thin(mask: np.ndarray) -> np.ndarray:
    """Return a binary mask, uint8 (H, W) of 0 and 255, with its lines thinned to one pixel.

    What is connected stays connected and ends stay where they are. (Zhang and Suen 1984, "A fast parallel
    algorithm for thinning digital patterns".)
    """
    import cv2

    image = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0) // 255
    tables = _thinning_tables()
    while True:
        before = np.count_nonzero(image)
        for removable in tables:
            neighbours = cv2.filter2D(image, cv2.CV_8U, _NEIGHBOUR_BITS, borderType=cv2.BORDER_CONSTANT)
            image[(cv2.LUT(neighbours, removable) != 0) & (image != 0)] = 0
        if np.count_nonzero(image) == before:
            return image[1:-1, 1:-1] * np.uint8(255)


@cache
def _thinning_tables() -> tuple[np.ndarray, np.ndarray]:
    """For each of the two passes, whether a pixel with the neighbours of a bit pattern goes, uint8 (256,).

    Bit i is the i-th neighbour clockwise from the one above.
    """
    ring = (np.arange(256)[:, None] >> np.arange(8)) & 1
    count = ring.sum(axis=1)
    rises = ((ring == 0) & (np.roll(ring, -1, axis=1) == 1)).sum(axis=1)
    edge = (count >= 2) & (count <= 6) & (rises == 1)
    up, right, down, left = ring[:, 0], ring[:, 2], ring[:, 4], ring[:, 6]
    first = edge & (up * right * down == 0) & (right * down * left == 0)
    second = edge & (up * right * left == 0) & (up * down * left == 0)
    return first.astype(np.uint8), second.astype(np.uint8)


_NEIGHBOUR_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.float32)
_BESIDE_A_LINE = 100  # a little below half of white, so that steps of an enlarged diagonal join

# --- arrays and tensors ---


def _array_to_rgb(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"{name} has the shape {array.shape}; a picture is (height, width) or (height, width, 1, 3 or 4)"
        )
    levels = _to_levels(array, name)
    if levels.shape[2] == 4:
        return _on_white(levels)
    if levels.shape[2] == 1:
        levels = np.broadcast_to(levels, (*levels.shape[:2], 3))
    return np.ascontiguousarray(levels)


def _to_levels(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of any accepted type as uint8 levels, of the same shape."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name} has the type {array.dtype}, not uint8, uint16, bool or float in [0, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also when either is NaN
        raise ValueError(f"{name} has float values from {low:g} to {high:g}; they must lie in [0, 1]")
    return np.rint(np.clip(array, 0.0, 1.0) * 255.0).astype(np.uint8)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    return ((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _tensor_to_rgb(tensor: "torch.Tensor") -> np.ndarray:
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise ValueError(f"the tensor has the shape {shape}; a picture is (1, 3 or 4, height, width)")
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()
    return _array_to_rgb(array, "the tensor")


def _rgb(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"a picture or map is uint8 (height, width, 3), not {image.dtype} {image.shape}")
    return image


def _to_nchw(images: np.ndarray | Sequence[np.ndarray]) -> "torch.Tensor":
    """Return uint8 (H, W, 3) images of one size as a float32 tensor (N, 3, H, W), still 0..255."""
    import torch

    if isinstance(images, np.ndarray) and images.ndim == 3:
        images = [images]
    checked = [_rgb(image) for image in images]
    if len({image.shape for image in checked}) != 1:
        sizes = ", ".join(sorted({f"{image.shape[1]} x {image.shape[0]}" for image in checked}))
        raise ValueError(f"the images of a batch must have one size, found: {sizes or 'no image'}")
    batch = torch.from_numpy(np.stack(checked))  # (N, H, W, 3)
    return batch.permute(0, 3, 1, 2).to(torch.float32).contiguous()


# --- files ---


@contextmanager
def _opened(
    source: PathLike | bytes, *, max_pixels: int, formats: Sequence[str] = _FORMATS
) -> Iterator[tuple[Image.Image, str]]:
    """Read a picture file's header, refuse what is no picture or too large; yield picture and name."""
    name = "the data given" if isinstance(source, bytes) else os.fspath(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else _open_file(name)
    with file:
        image = _read_header(file, name, formats)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{name} has {width} x {height} pixels; at most {max_pixels:,} pixels are read")
        yield image, name


def _open_file(name: str) -> io.BufferedReader:
    try:
        return open(name, "rb")
    except FileNotFoundError as error:
        raise ValueError(f"{name} does not exist") from error
    except IsADirectoryError as error:
        raise ValueError(f"{name} is a folder, not a picture") from error
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def _read_header(file: io.BytesIO | io.BufferedReader, name: str, formats: Sequence[str]) -> Image.Image:
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            try:
                return Image.open(file, formats=[name for name in formats if name in _QUICK_FORMATS])
            except UnidentifiedImageError:
                return Image.open(file, formats=list(formats))
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} {_what_it_is(file, formats)}") from error
    except Image.DecompressionBombError as error:
        limit = f"{2 * DEFAULT_MAX_PIXELS:,} pixels"
        raise ValueError(f"{name} is too large: its header announces more than {limit}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} cannot be read as a picture: {_one_line(error)}") from error


def _what_it_is(file: io.BytesIO | io.BufferedReader, formats: Sequence[str]) -> str:
    file.seek(0)
    start = file.read(64).lstrip().lower()
    if not start:
        return "is empty"
    for prefix, kind in _LOOKALIKES.items():
        if start.startswith(prefix):
            return f"is not a picture but {kind}"
    return f"is not a picture of a format that is read here ({', '.join(formats)})"


def _image_to_rgb(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        return _upright_to_rgb(_upright(image), name)
    except _PictureRefused:
        raise
    except _DECODE_ERRORS as error:
        raise ValueError(f"{name} is damaged or truncated: {_one_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image


class _PictureRefused(ValueError):
    """A picture that decodes but has values with no defined meaning as a picture."""


def _upright_to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode.startswith("I"):  # I;16 and its byte orders; I is 32 bits, used by 16-bit PGM and TIFF
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise _PictureRefused(f"{name} has integer values outside 0 to 65535")
        return _array_to_rgb(values.astype(np.uint16), name)
    if image.mode == "F":
        try:
            return _array_to_rgb(np.asarray(image), name)
        except ValueError as error:
            raise _PictureRefused(str(error)) from error
    if image.has_transparency_data:
        return _on_white(np.asarray(image.convert("RGBA")))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert always copies


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- PNG chunks (PNG specification, third edition, sections 5.3 and 11.3.3) ---

_PNG_HEADER_END = 8 + 25
"""Signature (8 bytes) and the IHDR chunk (4 length + 4 type + 13 data + 4 checksum): text may follow."""


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

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

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from PIL import Image

from controlkit import png
from controlkit.decoding import DECODE_ERRORS as DECODE_ERRORS
from controlkit.decoding import DEFAULT_MAX_PIXELS as DEFAULT_MAX_PIXELS
from controlkit.decoding import deep_values as deep_values
from controlkit.decoding import image_to_rgb, one_line, opened, upright
from controlkit.decoding import orientation as orientation
from controlkit.files import PathLike, write_bytes
from controlkit.limits import is_whole
from controlkit.naming import kind_of_value
from controlkit.pixel_arrays import array_to_rgb
from controlkit.thin_lines import has_thin_lines, redraw_lines
from controlkit.thin_lines import thin as thin

if TYPE_CHECKING:
    import torch

    Source = PathLike | bytes | Image.Image | np.ndarray | torch.Tensor


def load_picture(source: "Source", *, max_pixels: int = DEFAULT_MAX_PIXELS, behind: int = 255) -> np.ndarray:
    """Return any picture as uint8 RGB of shape (H, W, 3).

    ``source`` is a path, the bytes of a file, a PIL image, a numpy array (uint8, uint16, bool, or float in
    [0, 1]; (H, W) or (H, W, C) with 1, 3 or 4 channels), what numpy makes such an array of (a preprocessor's
    ``Map``), or a torch tensor of the same types, (C, H, W).
    The array returned may share memory with the one given.

    Whatever the format, the result is defined: turned upright by its EXIF orientation, 16 bits scaled by
    1/257, alpha composited on white (on the grey level ``behind``), CMYK, palettes and 1-bit converted, of an
    animation the first frame.
    Colour profiles are ignored, as in every data set that ControlNets were trained on.

    Raises:
        ValueError: one line with the file's name. There is no such file, it is no picture, it is truncated or
            empty, its header announces more than ``max_pixels`` (or twice DEFAULT_MAX_PIXELS, whatever
            ``max_pixels`` is; nothing is decoded then), or an array has another shape, type or range.
    """
    if isinstance(source, np.ndarray):
        return array_to_rgb(source, "the array", behind=behind)
    if isinstance(source, Image.Image):
        return image_to_rgb(source, "the picture", behind=behind)
    if "torch" in sys.modules and isinstance(source, sys.modules["torch"].Tensor):
        return _tensor_to_rgb(source, behind)
    if hasattr(source, "__array__"):
        return array_to_rgb(np.asarray(source), "the array", behind=behind)
    if not isinstance(source, (str, os.PathLike, bytes)):
        given = type(source).__name__
        raise ValueError(f"a picture is a path, bytes, a PIL image, an array or a tensor, not {given}")
    with opened(source, max_pixels=max_pixels) as (image, name):
        return image_to_rgb(image, name, behind=behind)


def load_map(source: "Source", *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Return any map as :func:`load_picture` does, but on black, as lines, poses and depth are drawn."""
    return load_picture(source, max_pixels=max_pixels, behind=0)


def load_mask(source: PathLike | bytes | Image.Image) -> np.ndarray:
    """Return a mask, a file or a PIL image, as uint8 of shape (H, W): 255 where it selects, 0 where it does
    not.

    White selects, black and what is transparent do not: alpha is composited on black. Where all that is
    visible has one colour, as strokes of a brush on a transparent layer, the alpha alone is the mask: what is
    opaque selects. Of colours the largest channel counts.

    Raises:
        ValueError: as :func:`load_picture`.
    """
    if isinstance(source, Image.Image):
        return _mask_of(source, "the mask")
    with opened(source, max_pixels=DEFAULT_MAX_PIXELS) as (image, name):
        return _mask_of(image, name)


def mask_as_read(mask: Any) -> Any:
    """Return what :func:`load_mask` makes of a file or a PIL image, and anything else as it is."""
    return load_mask(mask) if isinstance(mask, (str, os.PathLike, bytes, Image.Image)) else mask


def _mask_of(image: Image.Image, name: str) -> np.ndarray:
    grey = image_to_rgb(image, name).max(axis=2)
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return grey
    rgba = np.asarray(upright(image).convert("RGBA"))
    colour, alpha = rgba[..., :3], rgba[..., 3]
    visible = colour[alpha > 0]
    if alpha.min() < 255 and len(visible) and (visible == visible[0]).all():
        return alpha.copy()
    return ((colour.max(axis=2).astype(np.uint32) * alpha + 127) // 255).astype(np.uint8)


def load_alpha(source: "PathLike | bytes | np.ndarray") -> np.ndarray | None:
    """Return how opaque a picture is, uint8 (H, W), upright as :func:`load_picture` has it; None where
    nothing of it is transparent.

    Raises:
        ValueError: as :func:`load_picture`.
    """
    if isinstance(source, np.ndarray):
        has_alpha = source.ndim == 3 and source.shape[2] == 4
        alpha = array_to_rgb(source[..., 3], "the array")[..., 0] if has_alpha else None
    else:
        with opened(source, max_pixels=DEFAULT_MAX_PIXELS) as (image, _):
            has_alpha = image.has_transparency_data
            alpha = np.asarray(upright(image).convert("RGBA"))[..., 3] if has_alpha else None
    return None if alpha is None or alpha.min() == 255 else alpha


def stored_size(
    source: "PathLike | bytes | np.ndarray", *, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[int, int]:
    """Return the width and height that :func:`load_picture` would give, from a file's header alone.

    Raises:
        ValueError: as :func:`load_picture`, but for damage that only decoding shows.
    """
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    with opened(source, max_pixels=max_pixels) as (image, name):
        width, height = image.size
        is_turned = orientation(image, name) in (5, 6, 7, 8) and image.format != "TIFF"  # Pillow turned it
        return (height, width) if is_turned else (width, height)


def load_pictures(
    sources: "Source | Sequence[Source]", *, behind: int = 255
) -> "tuple[list[np.ndarray], bool]":
    """Return one picture or a batch as a list of pictures, and whether it was a batch. behind: as there.

    A batch is a list or tuple of what :func:`load_picture` takes, an array (N, H, W, C), or a tensor
    (N, C, H, W); it may be empty.

    Raises:
        ValueError: as :func:`load_picture`; for a batch, with the number of the picture in it.
    """
    if not isinstance(sources, (list, tuple)) and getattr(sources, "ndim", 0) != 4:
        return [load_picture(cast("Source", sources), behind=behind)], False
    pictures = []
    for index, source in enumerate(cast(Sequence[Any], sources)):
        try:
            pictures.append(load_picture(source, behind=behind))
        except ValueError as error:
            raise ValueError(f"picture {index} of the batch: {error}") from error
    return pictures, True


_SMOOTH = (np.uint8, np.uint16, np.int16, np.float32, np.float64)  # what OpenCV averages


def resize(image: np.ndarray, width: int, height: int, *, nearest: bool = False) -> np.ndarray:
    """Return ``image`` (H, W) or (H, W, C), uint8 or float32, as (height, width) or (height, width, C).

    Each axis that shrinks is averaged by area, each that grows is interpolated cubically; with ``nearest``
    the pixel at the centre is taken, which keeps binary and palette maps (edges, poses) free of in-between
    colours. The same size returns ``image`` itself.

    Raises:
        ValueError: ``width`` or ``height`` is no whole number from 1, or ``image`` is no such array.
    """
    _check_sides("resize", width, height)
    _check_array(image)
    import cv2

    source_height, source_width = image.shape[:2]
    if (source_width, source_height) == (width, height):
        return image
    if not nearest and image.dtype not in _SMOOTH:
        raise ValueError(f"an image of {image.dtype} is not resampled smoothly: take uint8 or float32")
    shape = (height, width, *image.shape[2:])  # OpenCV drops a third axis of one
    if nearest:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_NEAREST_EXACT).reshape(shape)
    smaller = (min(width, source_width), min(height, source_height))
    if smaller != (source_width, source_height):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    if smaller != (width, height):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.reshape(shape)


def at_resolution(image: np.ndarray, resolution: int) -> np.ndarray:
    """Return ``image`` (H, W[, C]) with its shorter side brought to ``resolution`` pixels, its aspect kept.

    The longer side grows to eight times the original at most, so that a 3000 x 2 strip stays manageable.

    Raises:
        ValueError: ``resolution`` is below 1.
    """
    if not resolution >= 1:
        raise ValueError(f"the shorter side of a picture must be at least 1 pixel, not {resolution}")
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

    mask = image if image.ndim == 2 else np.ascontiguousarray(image[..., 0])
    if has_thin_lines(mask):
        lines = redraw_lines(mask, width, height)
    else:
        lines = (resize(mask, width, height) >= 128).astype(np.uint8) * np.uint8(255)
    return lines if image.ndim == 2 else lines[..., None].repeat(image.shape[2], axis=2)


def cover(image: np.ndarray, width: int, height: int, *, nearest: bool = False) -> np.ndarray:
    """Return the largest central part of ``image`` that has the shape width : height, at that size.

    The aspect is kept and nothing is padded. The part depends on the two sizes only, so a picture and its map
    stay aligned. It is cut before it is resized: a 3000 x 2 strip never becomes a huge intermediate picture.

    Raises:
        ValueError: as :func:`resize`.
    """
    return resize(central_part(image, width, height), width, height, nearest=nearest)


def central_part(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return the largest central part of ``image`` that has the shape width : height, not resized.

    Raises:
        ValueError: ``width`` or ``height`` is no whole number from 1, or ``image`` is empty.
    """
    _check_sides("crop", width, height)
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
    of them what a network takes; where 8 and 16 bits are mixed all become 16, and a network takes the same.

    Raises:
        ValueError: maps of different sizes or channels, or of other types.
    """
    import torch

    for one in maps:
        if not isinstance(one, np.ndarray) or one.ndim != 3:
            raise ValueError(f"a map is uint8 or uint16 (height, width, channels), not {_kind_of(one)}")
    if {m.dtype for m in maps} == {np.dtype(np.uint8), np.dtype(np.uint16)}:
        maps = [m if m.dtype == np.uint16 else m.astype(np.uint16) * np.uint16(257) for m in maps]
    kinds = sorted({f"{m.shape[1]} x {m.shape[0]} x {m.shape[2]} {m.dtype}" for m in maps})
    if len(kinds) != 1:
        raise ValueError(f"the maps of a batch must be alike, found: {', '.join(kinds) or 'no map'}")
    if maps[0].dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a map is uint8 or uint16 (height, width, channels), not {_kind_of(maps[0])}")
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
    data = png.encode_runs(_rgb(image)) if plain else png.encode(_rgb(image))
    return png.with_text(data, text or {})


def read_png_text(path: PathLike) -> dict[str, str]:
    """Return the text chunks of a PNG file: tEXt, zTXt and iTXt, wherever they stand in the file.

    Raises:
        ValueError: one line with the file's name: missing, not a PNG, damaged, or too large.
    """
    with opened(path, max_pixels=DEFAULT_MAX_PIXELS, formats=("PNG",)) as (image, name):
        try:
            image.load()
        except DECODE_ERRORS as error:
            raise ValueError(f"{name} is damaged: {one_line(error)}") from error
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


# --- arrays and tensors ---


def _tensor_to_rgb(tensor: "torch.Tensor", behind: int) -> np.ndarray:
    shape = tuple(tensor.shape)
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise ValueError(f"the tensor has the shape {shape}; a picture is (1, 3 or 4, height, width)")
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.is_floating_point() else tensor).permute(1, 2, 0).numpy()
    return array_to_rgb(array, "the tensor", behind=behind)


def _rgb(image: np.ndarray) -> np.ndarray:
    is_array = isinstance(image, np.ndarray)
    if not is_array or image.dtype != np.uint8 or image.shape[2:] != (3,) or image.size == 0:
        raise ValueError(f"a picture or map is uint8 (height, width, 3), not {_kind_of(image)}")
    return image


def _kind_of(image: object) -> str:
    """What an image is, for messages: an array by its type and shape."""
    return f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else kind_of_value(image)


def _check_sides(what: str, width: int, height: int) -> None:
    """Raise ValueError unless both sides are whole numbers from 1."""
    if not (is_whole(width) and is_whole(height) and width >= 1 and height >= 1):
        raise ValueError(
            f"cannot {what} to {width} x {height}: width and height must be whole and at least 1"
        )


def _check_array(image: np.ndarray) -> None:
    """Raise ValueError unless it is an array (H, W) or (H, W, C) with pixels."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or image.size == 0:
        raise ValueError(f"an image is an array (height, width[, channels]), not {_kind_of(image)}")


def _to_nchw(images: np.ndarray | Sequence[np.ndarray]) -> "torch.Tensor":
    """Return uint8 (H, W, 3) images of one size as a float32 tensor (N, 3, H, W), still 0..255."""
    import torch

    if not isinstance(images, Iterable) or getattr(images, "ndim", 0) == 3:
        images = [cast("np.ndarray", images)]
    checked = [_rgb(image) for image in images]
    if len({image.shape for image in checked}) != 1:
        sizes = ", ".join(sorted({f"{image.shape[1]} x {image.shape[0]}" for image in checked}))
        raise ValueError(f"the images of a batch must have one size, found: {sizes or 'no image'}")
    batch = torch.from_numpy(np.stack(checked))  # (N, H, W, 3)
    return batch.permute(0, 3, 1, 2).to(torch.float32).contiguous()

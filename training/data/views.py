"""The geometry of a visit: how a picture and its map are scaled, cut and mirrored, both in the same way.

A picture is scaled so that it covers the shape that is trained on, its aspect kept to the pixel, and a part
of that shape is cut out of it. A map of another size is scaled to the same pixels as its picture before it is
cut, so that both stay in register whatever their sizes were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from controlkit import images
from controlkit.map_sizes import resize_black_and_white
from controlkit.training.draws import derived_seed

if TYPE_CHECKING:
    from controlkit.training.config_adapter import DataRecipe

    Sampling = Literal["smooth", "nearest", "lines"]
    Size = tuple[int, int]

_LARGEST = 8  # parts that a scaled picture may have; of more elongated ones only the part is computed
_TAPS = 2  # pixels on either side that cubic interpolation looks at


@dataclass(frozen=True)
class View:
    """A part of a picture: scaled to ``resized_width`` x ``resized_height`` pixels, cut, then mirrored.

    The part is ``width`` x ``height`` pixels; its upper left corner is pixel (``left``, ``top``) of what was
    scaled.
    """

    width: int
    height: int
    resized_width: int
    resized_height: int
    left: int
    top: int
    mirrored: bool

    @property
    def seen_left(self) -> int:
        """Pixels that are cut off at the left of the whole picture as it is shown, mirrored or not."""
        return self.resized_width - self.width - self.left if self.mirrored else self.left


def shapes(data: DataRecipe, *, resolution: int) -> list[Size]:
    """The shapes (width, height) in pixels that are trained on, the narrowest first.

    Without buckets there is one, the square of side ``resolution``. With them, sides are multiples of
    ``data.bucket_step`` and the longer is at most ``data.bucket_ratio`` times the shorter; the area is at
    most that of the square, and no side can grow by a step without exceeding it. The largest square is
    always among them. (NovelAI's aspect ratio buckets, 2022, which kohya's sd-scripts have as well.)
    """
    if not data.buckets:
        return [(resolution, resolution)]
    step, area = data.bucket_step, resolution**2
    square = resolution // step * step
    if not square:
        return [(resolution, resolution)]
    found = {(square, square)}
    for width in range(step, area // step + 1, step):
        height = area // width // step * step
        is_widest = height > 0 and area // height // step * step == width
        if is_widest and max(width, height) <= data.bucket_ratio * min(width, height):
            found.add((width, height))
    return sorted(found)


def nearest_shape(size: Size, shapes: Sequence[Size]) -> int:
    """The number of the shape whose aspect is nearest to that of a picture of ``size`` (width, height).

    Aspects are compared by their logarithms; of two equally near shapes the larger is taken, then the first.
    """
    wanted = math.log(size[0] / size[1])

    def distance(number: int) -> tuple[float, int, int]:
        width, height = shapes[number]
        return round(abs(math.log(width / height) - wanted), 9), -width * height, number

    return min(range(len(shapes)), key=distance)


def make_views(size: Size, shape: Size, *, data: DataRecipe, key: object) -> list[View]:
    """Every view that a visit can have of a picture of ``size``, cut to ``shape``, both (width, height).

    One in the centre, or up to ``data.crops`` at random places drawn from ``key`` alone. Where
    ``0 < data.flip < 1``, each as it is and then mirrored, so that view 2 k + 1 mirrors view 2 k; otherwise
    all are as they are (0) or mirrored (1).
    """
    resized = _covering(size, shape)
    faces = [False] * (data.flip < 1) + [True] * (data.flip > 0)
    return [
        View(*shape, *resized, left, top, mirrored)
        for left, top in dict.fromkeys(_places(resized, shape, data, key))
        for mirrored in faces
    ]


def look(image: NDArray[Any], view: View, *, sampling: Sampling = "smooth") -> NDArray[Any]:
    """What a view shows of a picture or map, uint8 or uint16 (H, W) or (H, W, C), C-contiguous.

    ``smooth`` averages where it shrinks and interpolates cubically where it grows; ``nearest`` keeps the
    colours of palettes; ``lines`` is for maps of 0 and 255 in equal channels, which stay so
    (:func:`controlkit.images.resize_lines`).
    """
    part = _part(image, view, sampling)
    return np.ascontiguousarray(part[:, ::-1] if view.mirrored else part)


def _covering(size: Size, shape: Size) -> Size:
    """The size, to the nearest pixel, at which a picture covers a shape and has one of its sides."""
    (width, height), (wide, high) = size, shape
    if wide * height >= high * width:
        return wide, max(high, (2 * height * wide + width) // (2 * width))
    return max(wide, (2 * width * high + height) // (2 * height)), high


def _places(resized: Size, shape: Size, data: DataRecipe, key: object) -> Iterator[Size]:
    spare = resized[0] - shape[0], resized[1] - shape[1]
    if data.crop == "centre":
        yield spare[0] // 2, spare[1] // 2
        return
    random = np.random.default_rng(derived_seed(key, "crops"))
    places = random.integers(0, np.array(spare) + 1, size=(data.crops, 2))
    yield from ((int(left), int(top)) for left, top in places)


def _part(image: NDArray[Any], view: View, sampling: Sampling) -> NDArray[Any]:
    height, width = image.shape[:2]
    if view.resized_width * view.resized_height > max(_LARGEST * view.width * view.height, height * width):
        return _only_part(image, view, sampling)
    wide, high = view.resized_width, view.resized_height
    if sampling == "lines":
        whole = resize_black_and_white(image, wide, high)
    else:
        whole = images.resize(image, wide, high, nearest=sampling == "nearest")
    return whole[view.top : view.top + view.height, view.left : view.left + view.width]


def _only_part(image: NDArray[Any], view: View, sampling: Sampling) -> NDArray[Any]:
    """The part of a picture so elongated that all of it, enlarged, would be huge (3000 x 2, say)."""
    import cv2

    height, width = image.shape[:2]
    columns = 2 * np.arange(view.left, view.left + view.width) + 1  # centres, in half pixels
    rows = 2 * np.arange(view.top, view.top + view.height) + 1
    if sampling == "nearest":
        across, down = columns * width // (2 * view.resized_width), rows * height // (2 * view.resized_height)
        return image[down[:, None], across]
    x, left, right = _window(columns, width, view.resized_width)
    y, top, bottom = _window(rows, height, view.resized_height)
    grid_x, grid_y = np.meshgrid(x.astype(np.float32), y.astype(np.float32))
    part = cv2.remap(
        image[top:bottom, left:right], grid_x, grid_y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    return (part >= 128).astype(np.uint8) * np.uint8(255) if sampling == "lines" else part


def _window(centres: NDArray[Any], side: int, resized: int) -> tuple[NDArray[Any], int, int]:
    """Places in a window of an axis of ``side`` pixels, and where the window begins and ends."""
    places = centres * side / (2 * resized) - 0.5
    begin = min(max(0, math.floor(places[0]) - _TAPS), side - 1)
    return places - begin, begin, max(begin + 1, min(side, math.ceil(places[-1]) + _TAPS + 1))

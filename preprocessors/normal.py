"""Normal maps from depth: which way each piece of a surface faces."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.limits import number
from controlkit.preprocessors.depth import Depth
from controlkit.preprocessors.depthfiles import depth_range
from controlkit.preprocessors.depthnet import USUAL
from controlkit.preprocessors.maps import Map, Preprocessor

FLAT = math.tau
"""The weight of "towards the viewer" in lllyasviel's formula: 2 pi."""

_RANGE = (
    1000.0  # of an estimate, at a shorter side of 512: where MiDaS's own values lie, for which FLAT is made
)
_SIDE = 512


class Normal(Preprocessor):
    """The normals of a picture's surfaces, from its depth. Red: left, green: top, blue: to the viewer.

    ``model``, ``device``, ``precision``, ``tile``, ``metric`` and ``fill`` are :class:`Depth`'s. Its estimate
    is scaled so that its range means the same whatever the network and the picture's size. ``a`` is the
    weight of "towards the viewer": more makes flatter maps. Where the depth is below the share
    ``bg_threshold`` of its range, it counts as background and faces the viewer.

    The formula is that of ControlNet 1.0 (:func:`normal_from_depth`), the colours are those of ControlNet 1.0
    and 1.1 as their networks see them. ``Map.depth`` is the depth it was made from.

    Raises:
        ValueError: as :class:`Depth`; ``a`` or ``bg_threshold`` out of range.
    """

    kind = "normal"

    def __init__(
        self,
        *,
        model: str = USUAL,
        device: str = "auto",
        precision: str = "auto",
        a: float = FLAT,
        bg_threshold: float = 0.1,
        tile: int = 0,
        metric: bool | None = None,
        fill: bool = False,
        resolution: int = 0,
    ) -> None:
        """Load the depth network."""
        super().__init__(resolution=resolution)
        check_normal_options(self.kind, a, bg_threshold)
        self._depth = Depth(
            model=model, device=device, precision=precision, tile=tile, metric=metric, fill=fill
        )
        self._a, self._bg_threshold = a, bg_threshold
        self.load = self._depth.load  # type: ignore[method-assign]  # a file of depth is read as one

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(made) for made in self._depth.extract(pictures)]

    def _map(self, made: Map) -> Map:
        assert made.depth is not None
        relief = _RANGE * min(made.depth.shape) / _SIDE
        low, high = float(made.depth.min()), float(made.depth.max())
        scaled = (made.depth - low) * np.float32(relief / ((high - low) or 1.0))
        return Map(
            image=normal_from_depth(scaled, a=self._a, bg_threshold=self._bg_threshold),
            kind=self.kind,
            polarity="normals",
            params=made.params | {"a": self._a, "bg_threshold": self._bg_threshold},
            model=made.model,
            depth=made.depth,
        )


def normal_from_depth(inverse_depth: np.ndarray, *, a: float = FLAT, bg_threshold: float = 0.1) -> np.ndarray:
    """Return inverse depth, float (H, W), larger is nearer, as normals: uint8 (H, W, 3), 127.5 (n + 1).

    n is (dx, dy, a) at length 1, where dx and dy are the 3 x 3 Sobel derivatives of the values as they are:
    their scale decides how steep things look, and ``a`` = 2 pi fits MiDaS's (lllyasviel/ControlNet,
    annotator/midas; controlnet-aux has the same channels in the order blue, green, red). Red is high where a
    surface faces left, green where it faces up, blue where it faces the viewer. Where the value is below
    ``bg_threshold`` of the range, n is (0, 0, 1).

    Raises:
        ValueError: a value is not finite, it is not (H, W) numbers, ``a`` is not above 0, or ``bg_threshold``
            is no share.
    """
    check_normal_options("normal", a, bg_threshold)
    values, low, high = depth_range(inverse_depth)
    depth = values.astype(np.float32, copy=False)
    x, y = (cv2.Sobel(depth, cv2.CV_32F, dx, 1 - dx, ksize=3) for dx in (1, 0))
    is_background = (depth - low) / ((high - low) or 1.0) < bg_threshold
    x[is_background] = y[is_background] = 0.0
    normal = np.dstack([x, y, np.full_like(x, a)])
    normal = normal / np.sqrt((normal * normal).sum(axis=2, keepdims=True))
    return (normal * 127.5 + 127.5).clip(0, 255).astype(np.uint8)


def check_normal_options(kind: str, a: float, bg_threshold: float) -> None:
    """Raise ValueError, one line, unless ``a`` is above 0 and ``bg_threshold`` a share."""
    if not (0 < number(a) < math.inf):
        raise ValueError(f"{kind}'s a is {a}; it must be a number above 0 (2 pi is usual)")
    if not 0 <= number(bg_threshold) <= 1:
        raise ValueError(f"{kind}'s bg_threshold is {bg_threshold}; it must be from 0 to 1")

"""Soft edges and scribbles made from Canny edges: no network, no weights."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.images import at_resolution, resize_lines
from controlkit.preprocessors.canny import auto_thresholds, canny_edges
from controlkit.preprocessors.maps import Map, Preprocessor

_SIDE = 512  # pixels of the shorter side for which widths are given
_SOFT_SCALES = (0.8, 1.6, 3.2)  # sigmas, in pixels at that side, at which edges are looked for
_SAFE_STEPS = 2


class SoftEdge(Preprocessor):
    """Soft white edges on black, for the adapters that learned from HED or PiDiNet.

    Canny edges are taken at three scales (Gaussians of 0.8, 1.6 and 3.2 pixels where the shorter side is
    512), each with thresholds chosen from the picture, and softened as wide as they were looked for: the mean
    is bright where an edge shows at every scale, as the networks' answer is. ``safe`` cuts it to three
    levels, so that faint traces of the picture cannot hide in it (as ControlNet 1.1's "safe" maps do).
    """

    kind = "softedge"

    def __init__(self, *, safe: bool = False, resolution: int = 0) -> None:
        """Keep the options."""
        super().__init__(resolution=resolution)
        self._safe = safe

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        soft = soft_edges(picture)
        if self._safe:
            soft = np.floor(soft * (_SAFE_STEPS + 1)).clip(0, _SAFE_STEPS) / _SAFE_STEPS
        levels = np.rint(soft * 255).astype(np.uint8)
        return Map(
            image=cv2.merge([levels, levels, levels]),
            kind=self.kind,
            polarity="white-on-black",
            params={"safe": self._safe},
        )


class Scribble(Preprocessor):
    """Thick white strokes on black, as if the outlines had been drawn by hand; binary.

    Canny edges of the picture blurred by ``detail`` pixels, without pieces shorter than a few strokes'
    widths, widened to ``width``; both in pixels where the shorter side is 512. ControlNet 1.1's scribble
    adapter learned from strokes 1 to 24 pixels wide. With a ``resolution`` outlines are found at that scale,
    and drawn at full size.

    Raises:
        ValueError: ``width`` is not from 1 to 24, or ``detail`` not from 0 to 20.
    """

    kind = "scribble"

    def __init__(self, *, width: float = 6, detail: float = 3, resolution: int = 0) -> None:
        """Check and keep the options."""
        super().__init__(resolution=resolution)
        for name, value, low, high in (("width", width, 1, 24), ("detail", detail, 0, 20)):
            if not low <= value <= high:
                raise ValueError(
                    f"scribble's {name} is {value:g}; it must be from {low} to {high} pixels at 512"
                )
        self._width, self._detail = width, detail

    def extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        """Return the map of each picture, uint8 (H, W, 3) of any sizes, with strokes as wide in each."""
        return self._extract(pictures)

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        height, width = picture.shape[:2]
        seen = at_resolution(picture, self.resolution) if self.resolution else picture
        lines = resize_lines(self._outlines(seen), width, height)
        strokes = cv2.dilate(lines, _disc(self._stroke(picture)))
        params: dict[str, float | str] = {"width": self._width, "detail": self._detail}
        return Map(
            image=cv2.merge([strokes, strokes, strokes]),
            kind=self.kind,
            polarity="white-on-black",
            params=params | ({"resolution": self.resolution} if self.resolution else {}),
        )

    def _outlines(self, picture: np.ndarray) -> np.ndarray:
        """The lines of a picture that are worth a stroke, one pixel wide: uint8 (H, W)."""
        lines = _edges_at(picture, self._detail * min(picture.shape[:2]) / _SIDE)
        return _without_short(lines, 4 * self._stroke(picture))

    def _stroke(self, picture: np.ndarray) -> int:
        """How wide a stroke is in a picture, in pixels."""
        return max(1, round(self._width * min(picture.shape[:2]) / _SIDE))


def soft_edges(picture: np.ndarray) -> np.ndarray:
    """Return the soft edges of a uint8 (H, W, 3) picture: float32 (H, W) in [0, 1]."""
    scale = min(picture.shape[:2]) / _SIDE
    total = np.zeros(picture.shape[:2], np.float32)
    for sigma in (s * scale for s in _SOFT_SCALES):
        edges = _edges_at(picture, sigma).astype(np.float32) / 255.0
        if sigma >= _LEAST_SIGMA:
            # a straight one-pixel line comes out of the Gaussian with a peak of 1 / (sigma * sqrt(2 pi))
            edges = cv2.GaussianBlur(edges, (0, 0), sigma) * (sigma * math.sqrt(2 * math.pi))
        total += np.minimum(edges, 1.0)
    return total / len(_SOFT_SCALES)


_LEAST_SIGMA = 0.4  # a Gaussian narrower than this stays within its pixel


def _edges_at(picture: np.ndarray, sigma: float) -> np.ndarray:
    """Return the Canny edges of a picture blurred by ``sigma`` pixels, thresholds chosen from it."""
    if sigma >= _LEAST_SIGMA:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    low, high = auto_thresholds(picture)
    return canny_edges(picture, low=low, high=high)


def _without_short(lines: np.ndarray, length: int) -> np.ndarray:
    """Return thin lines without the connected pieces of fewer than ``length`` pixels."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(lines, connectivity=8)
    keep = stats[:, cv2.CC_STAT_AREA] >= length
    keep[0] = False  # the background
    return keep[labels].astype(np.uint8) * np.uint8(255)


def _disc(diameter: int) -> np.ndarray:
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (diameter, diameter))

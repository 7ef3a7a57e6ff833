"""Canny edges, byte-equal to ``cv2.Canny`` on the RGB picture, at about half its cost."""

import math
from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.preprocessors.maps import Map, Preprocessor

_HIGHEST = 2041.0  # |dx| + |dy| of a 3 x 3 Sobel gradient ends at 2040
_STRIP_ROWS = 64  # the gradients of one strip stay in the processor's cache


class Canny(Preprocessor):
    """White edges on black, as ``cv2.Canny(rgb, low, high)`` draws them (aperture 3, L1 norm).

    ``low`` and ``high`` are the hysteresis thresholds on the gradient |dx| + |dy| of 8-bit levels, which
    reaches 2040: a pixel above ``high`` is an edge, and so is one above ``low`` that touches an edge. 100
    and 200 are what lllyasviel's ControlNets were trained with.

    Raises:
        ValueError: a threshold is negative or not finite, or ``low`` is above ``high``.
    """

    kind = "canny"

    def __init__(self, *, low: float = 100, high: float = 200, resolution: int = 0) -> None:
        """Check and keep the thresholds."""
        super().__init__(resolution=resolution)
        for name, value in (("low", low), ("high", high)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"canny's {name} threshold is {value:g}; it must be finite and not negative")
        if low > high:
            raise ValueError(f"canny's low threshold {low:g} is above its high threshold {high:g}")
        self.low, self.high = low, high

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        """Return the edges of a picture: every value is 0 or 255, the three channels are equal."""
        edges = canny_edges(picture, low=self.low, high=self.high)
        return Map(
            image=cv2.merge([edges, edges, edges]),
            kind=self.kind,
            polarity="white-on-black",
            params={"low": self.low, "high": self.high},
        )


def canny_edges(picture: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """Return ``cv2.Canny(picture, low, high)`` of a uint8 (H, W, 3) picture: uint8 (H, W), 0 or 255.

    At each pixel OpenCV follows the channel with the largest |dx| + |dy|, the first one on ties. Doing that
    with its vectorised gradient and arithmetic, and handing the chosen gradients to ``cv2.Canny(dx, dy)``,
    gives the same bytes faster than its own loop over interleaved channels.
    """
    height, width = picture.shape[:2]
    dx, dy = np.empty((height, width), np.int16), np.empty((height, width), np.int16)
    for top in range(0, height, _STRIP_ROWS):
        bottom = min(height, top + _STRIP_ROWS)
        above, below = min(top, 1), min(height - bottom, 1)  # a 3 x 3 gradient looks one row beyond
        strip_dx, strip_dy = _strongest_gradient(picture[top - above : bottom + below])
        inner = slice(above, above + bottom - top)
        dx[top:bottom], dy[top:bottom] = strip_dx[inner], strip_dy[inner]
    # OpenCV turns larger thresholds into negative ones; no gradient passes the highest
    return cv2.Canny(dx, dy, min(low, _HIGHEST), min(high, _HIGHEST))


def _strongest_gradient(strip: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 3 x 3 Sobel gradient (dx, dy), int16 (H, W), of each pixel's strongest channel."""
    (best_dx, best_dy), *others = [
        cv2.spatialGradient(channel, ksize=3, borderType=cv2.BORDER_REPLICATE) for channel in cv2.split(strip)
    ]
    best = cv2.add(np.abs(best_dx), np.abs(best_dy))
    for dx, dy in others:
        strength = cv2.add(np.abs(dx), np.abs(dy))
        stronger = cv2.compare(strength, best, cv2.CMP_GT)
        cv2.copyTo(dx, stronger, best_dx)
        cv2.copyTo(dy, stronger, best_dy)
        best = cv2.max(best, strength)
    return best_dx, best_dy

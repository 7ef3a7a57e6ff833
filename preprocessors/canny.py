"""Canny edges, byte-equal to ``cv2.Canny`` on the RGB picture, at about half its cost."""

import math
import zlib
from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.preprocessors.maps import Map, Preprocessor
from controlkit.preprocessors.options import Range

LOW, HIGH = 100.0, 200.0
"""The defaults of the original project's demo (lllyasviel/ControlNet, gradio_canny2image.py). Its networks
were trained with thresholds drawn at random (Zhang et al. 2023, arXiv:2302.05543).
"""

_HIGHEST = 2041.0  # |dx| + |dy| of a 3 x 3 Sobel gradient ends at 2040
_STRIP_PIXELS = 65536  # the gradients of one strip stay in the processor's cache
_AUTO_SHARE, _AUTO_RATIO, _AUTO_FLOOR = 0.9, 0.4, 40.0
_FARTHEST_THRESHOLD = 1e6  # beyond any gradient, within OpenCV's integers


class Canny(Preprocessor):
    """White edges on black, as ``cv2.Canny(rgb, low, high, apertureSize=aperture, L2gradient=l2)``.

    ``low`` and ``high`` are the hysteresis thresholds on the gradient |dx| + |dy| of 8-bit levels, which
    reaches 2040 at aperture 3: a pixel above ``high`` is an edge, and so is one above ``low`` that touches an
    edge. Each may be a range, ``(50, 150)`` or ``"50..150"``, from which a number is drawn, uniformly, for
    each picture: adapters that are to follow any map (ControlNet's own) are trained so. The draw depends on
    ``seed`` and the picture's pixels alone, so it repeats in any order and on any machine.

    ``auto`` chooses both from the picture: ``high`` is what a tenth of its gradients exceed (40 at least, so
    that noise is no edge), ``low`` is 0.4 of that (the ratio of MATLAB's ``edge``). ``aperture`` is the Sobel
    kernel's size, 3, 5 or 7; ``l2`` takes sqrt(dx^2 + dy^2) instead of the sum; ``blur`` is the sigma, in
    pixels, of a Gaussian before anything else (0: none). The thresholds in force are in the map's ``params``.

    Raises:
        ValueError: a threshold is negative or not finite, ``low`` is above ``high``, thresholds are given
            beside ``auto``, or another option is out of its range.
    """

    kind = "canny"

    def __init__(
        self,
        *,
        low: float | Range = LOW,
        high: float | Range = HIGH,
        auto: bool = False,
        aperture: int = 3,
        l2: bool = False,
        blur: float = 0.0,
        seed: int = 0,
        resolution: int = 0,
    ) -> None:
        """Check and keep the options."""
        super().__init__(resolution=resolution)
        self._low, self._high = _ends("low", low), _ends("high", high)
        for at, end in enumerate(("low", "high")):
            if self._low[at] > self._high[at]:
                which = "" if low == self._low[0] and high == self._high[0] else f" at its range's {end} end"
                raise ValueError(
                    f"canny's low threshold {self._low[at]:g} is above its high threshold "
                    f"{self._high[at]:g}{which}"
                )
        if auto and (low, high) != (LOW, HIGH):
            raise ValueError("canny's auto chooses the thresholds itself: leave low and high out")
        if aperture not in (3, 5, 7):
            raise ValueError(f"canny's aperture is {aperture}; it must be 3, 5 or 7")
        if auto and (aperture != 3 or l2):
            raise ValueError("canny's auto is defined for aperture 3 without l2")
        if not (math.isfinite(blur) and 0 <= blur <= 100):
            raise ValueError(f"canny's blur is {blur:g}; it must be a sigma from 0 to 100 pixels")
        if seed < 0:
            raise ValueError(f"canny's seed is {seed}; it must not be negative")
        self._auto, self._aperture, self._l2, self._blur, self._seed = auto, aperture, l2, blur, seed

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        """Return the edges of a picture: every value is 0 or 255, the three channels are equal."""
        if self._blur:
            picture = cv2.GaussianBlur(picture, (0, 0), self._blur)
        low, high = auto_thresholds(picture) if self._auto else self._draw(picture)
        edges = canny_edges(picture, low=low, high=high, aperture=self._aperture, l2=self._l2)
        params: dict[str, float | str] = {"low": low, "high": high}
        changed = {"auto": self._auto, "blur": self._blur, "l2": self._l2}
        params |= {name: value for name, value in changed.items() if value}
        if self._aperture != 3:
            params["aperture"] = self._aperture
        return Map(
            image=cv2.merge([edges, edges, edges]), kind=self.kind, polarity="white-on-black", params=params
        )

    def _draw(self, picture: np.ndarray) -> tuple[float, float]:
        """Return the thresholds for a picture; two draws may come in the wrong order, and are exchanged."""
        if self._low[0] == self._low[1] and self._high[0] == self._high[1]:
            return self._low[0], self._high[0]
        rng = np.random.default_rng([self._seed, zlib.crc32(picture.tobytes())])
        low, high = sorted(round(float(rng.uniform(*ends)), 1) for ends in (self._low, self._high))
        return low, high


def _ends(name: str, threshold: float | Range) -> tuple[float, float]:
    """Return the ends of a threshold's range; of a single number, twice that."""
    ends = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    for value in ends:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"canny's {name} threshold is {value:g}; it must be finite and not negative")
    if ends[0] > ends[1]:
        raise ValueError(f"canny's {name} threshold has the range {ends[0]:g}..{ends[1]:g}: it goes upwards")
    return ends


def auto_thresholds(picture: np.ndarray) -> tuple[float, float]:
    """Return the thresholds (low, high) that :class:`Canny` chooses for a uint8 (H, W, 3) picture."""
    dx, dy = _strongest_gradients(picture)
    gradient = cv2.add(np.abs(dx), np.abs(dy))
    high = max(_AUTO_FLOOR, float(np.quantile(gradient, _AUTO_SHARE)))
    return round(_AUTO_RATIO * high, 1), round(high, 1)


def canny_edges(
    picture: np.ndarray, *, low: float, high: float, aperture: int = 3, l2: bool = False
) -> np.ndarray:
    """Return ``cv2.Canny(picture, low, high)`` of a uint8 (H, W, 3) picture: uint8 (H, W), 0 or 255.

    At each pixel OpenCV follows the channel with the largest |dx| + |dy|, the first one on ties. Doing that
    with its vectorised gradient and arithmetic, and handing the chosen gradients to ``cv2.Canny(dx, dy)``,
    gives the same bytes faster than its own loop over interleaved channels. With another aperture or the
    other norm, OpenCV does it all.
    """
    if aperture != 3 or l2:
        low, high = min(low, _FARTHEST_THRESHOLD), min(high, _FARTHEST_THRESHOLD)
        return cv2.Canny(np.ascontiguousarray(picture), low, high, apertureSize=aperture, L2gradient=l2)
    dx, dy = _strongest_gradients(picture)
    # OpenCV turns larger thresholds into negative ones; no gradient passes the highest
    return cv2.Canny(dx, dy, min(low, _HIGHEST), min(high, _HIGHEST))


def _strongest_gradients(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 3 x 3 Sobel gradient (dx, dy), int16 (H, W), of each pixel's strongest channel.

    Computed in strips of rows whose arrays stay in the processor's cache and are used again. (Strips in
    several threads take longer: the calls are too short to be worth handing over.)
    """
    height, width = picture.shape[:2]
    dx, dy = np.empty((height, width), np.int16), np.empty((height, width), np.int16)
    strip = min(height, max(16, _STRIP_PIXELS // width))
    rows = strip + 2  # a 3 x 3 gradient looks one row beyond
    channels = np.empty((3, rows, width), np.uint8)
    all_dx, all_dy, strength, spare = (np.empty((3, rows, width), np.int16) for _ in range(4))
    for top in range(0, height, strip):
        bottom = min(height, top + strip)
        above, below = min(top, 1), min(height - bottom, 1)
        seen = bottom - top + above + below
        cv2.split(picture[top - above : bottom + below], [channel[:seen] for channel in channels])
        for channel, channel_dx, channel_dy in zip(channels, all_dx, all_dy, strict=True):
            gradient = channel_dx[:seen], channel_dy[:seen]
            cv2.spatialGradient(channel[:seen], *gradient, ksize=3, borderType=cv2.BORDER_REPLICATE)
        np.abs(all_dx, out=strength)
        np.abs(all_dy, out=spare)
        np.add(strength, spare, out=strength)
        inner = slice(above, above + bottom - top)
        _take_strongest(
            dx[top:bottom], dy[top:bottom], all_dx[:, inner], all_dy[:, inner], strength[:, inner]
        )
    return dx, dy


def _take_strongest(
    dx: np.ndarray, dy: np.ndarray, all_dx: np.ndarray, all_dy: np.ndarray, strength: np.ndarray
) -> None:
    """Fill (dx, dy), each (h, w), from the strongest of three channels, (3, h, w); the first on ties."""
    dx[:], dy[:] = all_dx[0], all_dy[0]
    for channel in (1, 2):
        stronger = cv2.compare(strength[channel], strength[0], cv2.CMP_GT)
        cv2.copyTo(all_dx[channel], stronger, dx)
        cv2.copyTo(all_dy[channel], stronger, dy)
        if channel == 1:
            cv2.max(strength[0], strength[1], strength[0])

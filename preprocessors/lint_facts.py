"""What the lint knows of a map: levels, colours and shapes, measured once."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

_COLOURFUL = 24  # levels between the strongest and the weakest channel; JPEG tints grey by less
_SOLID = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Finding:
    """Something wrong with a map, and what cures it."""

    code: str
    """A short name that stays the same: "inverted", "jpeg", "channels" ..."""
    severity: str
    """"error": the map says something else than is meant; "warning": it says it badly."""
    message: str
    """What is wrong, in plain words."""
    cure: str
    """What to do about it."""


def error(code: str, message: str, cure: str) -> Finding:
    """Return a finding that makes a map useless."""
    return Finding(code, "error", message, cure)


def warning(code: str, message: str, cure: str) -> Finding:
    """Return a finding that makes a map worse."""
    return Finding(code, "warning", message, cure)


class Facts:
    """Measurements of a map, uint8 (H, W, 3) RGB; those that cost something are made when asked for."""

    def __init__(self, image: np.ndarray) -> None:
        """Measure levels and colours."""
        self.image = image
        self.height, self.width = image.shape[:2]
        self.pixels = self.height * self.width
        channels = cv2.split(image)
        self.level = cv2.max(cv2.max(channels[0], channels[1]), channels[2])
        """The strongest channel, uint8 (H, W)."""
        self.lowest = cv2.min(cv2.min(channels[0], channels[1]), channels[2])
        """The weakest channel, uint8 (H, W)."""
        self.histogram = cv2.calcHist([self.level], [0], None, [256], [0, 256]).ravel()
        """How many pixels have each level, float32 (256,)."""
        self.spread_histogram = cv2.calcHist([self.level - self.lowest], [0], None, [256], [0, 256]).ravel()

    def share(self, low: int, high: int = 255) -> float:
        """Return the share of pixels with levels from ``low`` to ``high``, both included."""
        return float(self.histogram[low : high + 1].sum()) / self.pixels

    @property
    def coloured(self) -> float:
        """The share of pixels with an obvious colour."""
        return float(self.spread_histogram[_COLOURFUL:].sum()) / self.pixels

    @property
    def colourful(self) -> float:
        """The share of coloured pixels among those that are not nearly black."""
        return self.coloured / max(self.share(17), 1 / self.pixels)

    @property
    def is_constant(self) -> bool:
        """Whether all pixels are the same, whatever their colour."""
        return bool((self.image == self.image[0, 0]).all())

    @property
    def marked(self) -> int:
        """How many pixels are not black."""
        return self.pixels - int(self.histogram[0])

    @cached_property
    def middle(self) -> float:
        """The share of pixels that are neither nearly black nor nearly white."""
        return self.share(17, 238)

    @cached_property
    def white(self) -> np.ndarray:
        """Where it is rather white than black: uint8 (H, W), 0 or 255."""
        return above(self.level, 127)

    @cached_property
    def solid_white(self) -> float:
        """Of the white pixels, the share with nothing but white around them; 0 for lines one pixel wide."""
        return _solid_share(self.white)

    @cached_property
    def solid_black(self) -> float:
        """Of the black pixels, the share with nothing but black around them; 0 for lines one pixel wide."""
        return _solid_share(255 - self.white)

    @cached_property
    def roughness(self) -> float:
        """The share of pixels that stand out from their neighbours: texture, not a large map's noise."""
        grey = self.image[..., 1]
        if min(self.height, self.width) >= 256:
            grey = cv2.resize(grey, (self.width // 2, self.height // 2), interpolation=cv2.INTER_AREA)
        edges = cv2.Laplacian(grey, cv2.CV_16S, ksize=1)
        return float(np.count_nonzero(np.abs(edges) > 12)) / edges.size


def sample(image: np.ndarray, side: int) -> np.ndarray:
    """Return the pixels of a regular grid of at most ``side`` rows and columns."""
    rows, columns = (np.linspace(0, n - 1, min(n, side)).astype(int) for n in image.shape[:2])
    return image[rows][:, columns]


def above(level: np.ndarray, limit: int) -> np.ndarray:
    """Where levels (H, W) are above a limit: uint8 (H, W), 0 or 255."""
    return cv2.threshold(level, limit, 255, cv2.THRESH_BINARY)[1]


def _solid_share(mask: np.ndarray) -> float:
    count = cv2.countNonZero(mask)
    inside = cv2.erode(mask, _SOLID, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return cv2.countNonZero(inside) / count if count else 0.0


def has_ringing(facts: Facts, *, least: float = 0.4) -> bool:
    """Whether there is faint ripple well away from strong lines: JPEG leaves it, blur and resizing do not.

    ``least``: how much of what is faint must stand above its neighbours.
    """
    usual = int(facts.histogram[:32].argmax())  # JPEG may lift the whole background by a level or two
    level = cv2.absdiff(facts.level, np.full_like(facts.level, usual)) if usual else facts.level
    strong = cv2.dilate(above(level, 39), np.ones((9, 9), np.uint8))
    faint = (level > 0) & (level <= 24) & (strong == 0)
    count = int(np.count_nonzero(faint))
    if count < max(8.0, 0.003 * np.count_nonzero(level)):
        return False
    wave = np.zeros(level.shape, bool)
    wave[:, 1:-1] |= (level[:, 1:-1] > level[:, :-2]) & (level[:, 1:-1] > level[:, 2:])
    wave[1:-1] |= (level[1:-1] > level[:-2]) & (level[1:-1] > level[2:])
    return bool(np.count_nonzero(wave & faint) > (0.02 if usual else least) * count)

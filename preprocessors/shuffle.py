"""A picture's colours and shapes, stirred: for adapters that take a style and leave the composition open."""

from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.preprocessors.maps import Map, Preprocessor


class Shuffle(Preprocessor):
    """The picture, warped by smooth random displacements (ControlNet 1.1's content shuffle).

    Each pixel is taken from a place that a smooth random field names, whose features are about ``cell``
    pixels large (0: half the shorter side, 256 at the usual 512). The same ``seed`` stirs pictures of the
    same size in the same way; no other random number is touched.

    Raises:
        ValueError: an option is out of range.
    """

    kind = "shuffle"

    def __init__(self, *, seed: int = 0, cell: int = 0, resolution: int = 0) -> None:
        """Check and keep the options."""
        super().__init__(resolution=resolution)
        if seed < 0:
            raise ValueError(f"shuffle's seed is {seed}; it must be 0 or more")
        if not 0 <= cell <= 8192:
            raise ValueError(f"shuffle's cell is {cell}; it must be 0 (half the shorter side) to 8192 pixels")
        self._seed, self._cell = seed, cell

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        params: dict[str, float | str] = {"seed": self._seed, "cell": self._cell}
        return [
            Map(image=self._stirred(picture), kind=self.kind, polarity="colours", params=params)
            for picture in pictures
        ]

    def _stirred(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        cell = self._cell or max(1, min(height, width) // 2)
        random = np.random.default_rng(self._seed)
        x, y = (smooth_noise(height, width, cell, random) * (side - 1) for side in (width, height))
        return cv2.remap(picture, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR)


def smooth_noise(height: int, width: int, cell: int, random: np.random.Generator) -> np.ndarray:
    """Return noise, float64 (height, width) from 0 to 1, whose features are about ``cell`` pixels large."""
    coarse = random.uniform(size=(height // cell + 2, width // cell + 2, 1))
    # An axis at a time, and cut in between: the same numbers, and no large cell makes a huge picture.
    wide = cv2.resize(coarse, (width + 2 * cell, len(coarse)), interpolation=cv2.INTER_CUBIC)
    wide = wide[:, cell : cell + width]
    fine = cv2.resize(wide, (width, height + 2 * cell), interpolation=cv2.INTER_CUBIC)[cell : cell + height]
    low, high = float(fine.min()), float(fine.max())
    return (fine - low) / ((high - low) or 1.0)

"""Does a region have the colour its caption names?"""

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import ArrayLike

from controlkit.metrics.arrays import as_mask, as_numbers, same_shaped

_DARKEST = 0.2  # below this share of light, rounding to 8 bits and decoding errors outweigh the colour


def nearest_colour(
    picture: ArrayLike,
    mask: ArrayLike,
    shade: ArrayLike,
    palette: Mapping[str, tuple[int, int, int]],
) -> str:
    """Return the palette's name for the colour of a shaded region.

    The light is divided out of the sRGB values as they are stored, because the bundled world's renderer
    multiplies it into them (picture = colour * shade); the per-channel median over the region is then matched
    to the palette by Euclidean distance in CIELAB (D65), where equal distances look about equal.

    Args:
        picture: uint8 (H, W, 3), RGB.
        mask: bool (H, W), the region.
        shade: float (H, W), the light that fell on each pixel, 1 = the colour itself. Pixels darker than 0.2
            are left out unless the whole region is that dark.
        palette: name -> (R, G, B) in 0 to 255.

    Raises:
        ValueError: the shapes differ, the mask selects nothing, the palette is empty, or the light is not
            finite.
    """
    pixels = as_numbers("nearest_colour", picture)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"nearest_colour: a picture is (H, W, 3), not {pixels.shape}")
    region = as_mask("nearest_colour", mask, pixels.shape[:2])
    light_on, _ = same_shaped("nearest_colour", shade, region)
    if not np.isfinite(light_on[region]).all():
        raise ValueError("nearest_colour: shade has values that are not finite")
    if not palette:
        raise ValueError("nearest_colour: the palette is empty")
    lit = region & (light_on >= _DARKEST)
    region = lit if lit.any() else region
    light = np.maximum(light_on[region], 1 / 255)[:, None]
    colour = np.clip(np.median(pixels[region] / light, axis=0), 0, 255)
    names = list(palette)
    lab = _lab(np.array([colour, *(palette[name] for name in names)]))
    return names[int(np.argmin(np.linalg.norm(lab[1:] - lab[0], axis=1)))]


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (N, 3) in [0, 255] -> CIELAB (N, 3)."""
    pixels = (rgb / 255).astype(np.float32)[None]  # (1, N, 3)
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB)[0])

"""Maps of thin lines at other sizes: no line breaks, none becomes thick."""

from functools import cache

import numpy as np

_NEIGHBOUR_BITS = np.array([[128, 1, 2], [64, 0, 4], [32, 16, 8]], np.float32)
_BESIDE_A_LINE = 100  # a little below half of white, so that steps of an enlarged diagonal join


def has_thin_lines(mask: np.ndarray) -> bool:
    """Whether hardly any white pixel has nothing but white around it, as in maps of edges."""
    import cv2

    solid = cv2.erode(mask, np.ones((3, 3), np.uint8))
    return bool(np.count_nonzero(solid) < 0.05 * np.count_nonzero(mask))


def redraw_lines(mask: np.ndarray, width: int, height: int) -> np.ndarray:
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

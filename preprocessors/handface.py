"""Hands and faces as OpenPose finds them: boxes beside the joints of a body, and points on heatmaps.

The rules, and the numbers down to the pixel, are those of controlnet_aux's ``handDetect``, ``faceDetect``,
``Hand`` and ``Face`` (after OpenPose's handDetector.cpp).
"""

from collections.abc import Sequence

import cv2
import numpy as np

from controlkit.preprocessors.gridmaps import STRIDE

HAND_SCALES = (184, 368, 552, 736)
"""The sides of the squares at which the hand network sees a hand."""
FACE_SIDE = 384
"""The side of the square in which the face network sees a face."""

_ARMS = ((5, 6, 7), (2, 3, 4))  # shoulder, elbow, wrist: left, right
_BEYOND_WRIST = 0.33
_SMALLEST = 20  # pixels
_MAP = 128  # the side of a hand's heatmaps once enlarged
_THRESHOLD = 0.05
_SIGMA, _KERNEL = 3.0, 25
_TINY_SCORE = 1e-3  # of a point whose heatmap is not positive there

Box = tuple[int, int, int]
"""Left, top and side in pixels."""


def hand_boxes(body: np.ndarray, height: int, width: int) -> tuple[Box | None, Box | None]:
    """Return the squares with the left and right hand of a body (18, 3); None if tiny or without a whole arm.

    The middle lies beyond the wrist by a third of the forearm; the side is 1.5 times the forearm, or nine
    tenths of the upper arm where that is more.
    """
    left, right = (_hand_box(body[list(arm)], height, width) for arm in _ARMS)
    return left, right


def _hand_box(arm: np.ndarray, height: int, width: int) -> Box | None:
    if not (arm[:, 2] > 0).all():
        return None
    (x1, y1), (x2, y2), (x3, y3) = arm[:, :2].tolist()
    forearm = ((x3 - x2) ** 2 + (y3 - y2) ** 2) ** 0.5
    upper_arm = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    side = 1.5 * max(forearm, 0.9 * upper_arm)
    x = max(0, x3 + _BEYOND_WRIST * (x3 - x2) - side / 2)
    y = max(0, y3 + _BEYOND_WRIST * (y3 - y2) - side / 2)
    return _fitted(x, y, side, side, height, width)


def face_box(body: np.ndarray, height: int, width: int) -> Box | None:
    """Return the square with the face of a body (18, 3); None without a nose and an eye or ear, or if tiny.

    It reaches from the nose by three times the farthest eye or one and a half times the farthest ear, and may
    reach beyond the picture.
    """
    nose, *others = body[[0, 14, 15, 16, 17]]
    present = [(point, reach) for point, reach in zip(others, (3, 3, 1.5, 1.5), strict=True) if point[2] > 0]
    if nose[2] <= 0 or not present:
        return None
    reach = max(float(np.abs(point[:2] - nose[:2]).max()) * factor for point, factor in present)
    x, y = max(0, float(nose[0]) - reach), max(0, float(nose[1]) - reach)
    return _fitted(x, y, reach, 2 * reach, height, width)


def _fitted(x: float, y: float, reach: float, side: float, height: int, width: int) -> Box | None:
    """Return the square at x, y, cut to the picture where it ends before ``reach``."""
    across = width - x if x + reach > width else side
    down = height - y if y + reach > height else side
    side = min(across, down)
    return (int(x), int(y), int(side)) if side >= _SMALLEST else None


def hand_inputs(hand: np.ndarray) -> list[np.ndarray]:
    """Return what the hand network sees of a square picture, uint8 BGR: one uint8 (s, s, 3) per scale."""
    soft = cv2.GaussianBlur(hand, (0, 0), 0.8)
    return [_square(soft, side) for side in HAND_SCALES]


def face_input(face: np.ndarray) -> np.ndarray:
    """Return what the face network sees of a square picture, uint8 BGR: uint8 (384, 384, 3)."""
    return _square(face, FACE_SIDE)


def _square(picture: np.ndarray, side: int) -> np.ndarray:
    shrinks = 2 * side < sum(picture.shape[:2])
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    return np.asarray(cv2.resize(picture, (side, side), interpolation=interpolation))


def decode_hand(outputs: Sequence[np.ndarray], side: int) -> np.ndarray:
    """Return the 21 points of a hand of ``side`` pixels, float64 (21, 3): x, y in whole pixels, score.

    ``outputs`` are the network's heatmaps (22, h, w), one per scale. They are brought to 128 x 128 and
    averaged; a point is the largest value in the patch above 0.05 (smoothed) that weighs most. A point in the
    first row or column counts as absent.
    """
    points = np.zeros((21, 3))
    for point, channel in zip(points, range(21), strict=True):
        heatmap = np.zeros((_MAP, _MAP))
        for output in outputs:
            heatmap += _enlarged(output[channel]) / len(outputs)
        place = _strongest(heatmap)
        if place is not None:
            row, column = place
            y, x = int(row * side / _MAP), int(column * side / _MAP)
            if x > 0 and y > 0:
                point[:] = x, y, max(heatmap[place], _TINY_SCORE)
    return points


def _enlarged(cells: np.ndarray) -> np.ndarray:
    high, wide = cells.shape
    large = cv2.resize(
        np.ascontiguousarray(cells), (wide * STRIDE, high * STRIDE), interpolation=cv2.INTER_LANCZOS4
    )
    return np.asarray(cv2.resize(large, (_MAP, _MAP), interpolation=cv2.INTER_AREA))


def _strongest(heatmap: np.ndarray) -> tuple[int, int] | None:
    """Return the row and column of the largest value in the warm patch that weighs most."""
    smooth = cv2.GaussianBlur(heatmap, (_KERNEL, _KERNEL), _SIGMA, borderType=cv2.BORDER_REFLECT)
    warm = (smooth > _THRESHOLD).astype(np.uint8)
    if not warm.any():
        return None
    count, labels = cv2.connectedComponents(warm, connectivity=8)
    weights = np.bincount(labels.ravel(), weights=heatmap.ravel(), minlength=count)[1:]
    patch = labels == int(weights.argmax()) + 1
    row, column = np.unravel_index(int(np.where(patch, heatmap, 0.0).argmax()), heatmap.shape)
    return int(row), int(column)


def decode_face(heatmaps: np.ndarray) -> np.ndarray:
    """Return the 70 points of a face, float64 (70, 3): x, y in whole pixels, score.

    ``heatmaps`` (70 or more, H, W) have been brought to the size of the face; the largest value is the point,
    if it exceeds 0.05. Further channels (the background) are not read. A point in the first row or column
    counts as absent.
    """
    points = np.zeros((70, 3))
    for point, heatmap in zip(points, heatmaps[:70], strict=True):
        y, x = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
        score = float(heatmap[y, x])
        if score > _THRESHOLD and x > 0 and y > 0:
            point[:] = x, y, score
    return points

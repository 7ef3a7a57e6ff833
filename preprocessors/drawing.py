"""Drawing poses the way ControlNets were trained to read them."""

import math
from collections.abc import Iterable

import cv2
import numpy as np

from controlkit.naming import unknown
from controlkit.preprocessors.skeleton import COLOURS, LIMBS

STYLES = ("v1.1",)
"""v1.1: ControlNet 1.1, controlnet_aux and the A1111 extension."""

_THICKNESS = 4  # half the width of a limb and the radius of a joint, in pixels, whatever the picture's size
_LIMB_LEVEL = 0.6
_FARTHEST = 1e6  # OpenCV draws with integers; a joint farther away (in pixels) is a mistake


def draw_poses(poses: Iterable[np.ndarray], width: int, height: int, *, style: str = "v1.1") -> np.ndarray:
    """Return poses, each (18, 3) of x, y in pixels and score, as a map: uint8 (height, width, 3) RGB.

    Style "v1.1" is pixel-identical to controlnet_aux 0.0.10's ``draw_bodypose`` at the same pixel
    coordinates: on black, person by person, 17 limbs as filled ellipses at 0.6 of their colour, then the
    joints as discs in full colour. Joints with score 0 and their limbs are left out; no person gives a
    black map.

    Raises:
        ValueError: an unknown style, or a visible joint that is not finite or over a million pixels away.
    """
    if style not in STYLES:
        raise unknown("draw style", style, STYLES)
    canvas = np.zeros((height, width, 3), np.uint8)
    for pose in poses:
        _draw_person(canvas, _visible_joints(pose))
    return canvas


def _visible_joints(pose: np.ndarray) -> dict[int, tuple[float, float]]:
    assert pose.shape == (18, 3), pose.shape
    visible = {joint: (float(x), float(y)) for joint, (x, y, score) in enumerate(pose) if score > 0}
    for joint, (x, y) in visible.items():
        if not (abs(x) <= _FARTHEST and abs(y) <= _FARTHEST):  # also when either is NaN
            raise ValueError(f"joint {joint} of a pose lies at ({x:g}, {y:g}), outside any picture")
    return visible


def _draw_person(canvas: np.ndarray, joints: dict[int, tuple[float, float]]) -> None:
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):  # 17 limbs, 18 colours
        if start in joints and end in joints:
            dimmed = [int(level * _LIMB_LEVEL) for level in colour]
            cv2.fillConvexPoly(canvas, _limb(joints[start], joints[end]), dimmed)
    for joint, (x, y) in joints.items():
        cv2.circle(canvas, (int(x), int(y)), _THICKNESS, COLOURS[joint], thickness=-1)


def _limb(start: tuple[float, float], end: tuple[float, float]) -> np.ndarray:
    """Return the outline of a limb: an ellipse over the two joints, sampled at every degree, (n, 2) int32.

    Middle, half length and angle are cut to integers, as in the drawings that ControlNets learned from.
    """
    dx, dy = start[0] - end[0], start[1] - end[1]
    middle = (int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2))
    length = (dy**2 + dx**2) ** 0.5
    angle = math.degrees(math.atan2(dy, dx))
    return np.asarray(cv2.ellipse2Poly(middle, (int(length / 2), _THICKNESS), int(angle), 0, 360, 1))

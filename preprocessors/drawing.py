"""Drawing poses the way ControlNets were trained to read them."""

import math
from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from controlkit.naming import unknown
from controlkit.preprocessors.maps import Map
from controlkit.preprocessors.poseedit import scale_poses
from controlkit.preprocessors.skeleton import (
    COLOURS,
    HAND_COLOURS,
    HAND_EDGES,
    LIMBS,
    Poses,
    check_canvas,
    points_of,
)

USUAL_STYLE = "v1.1"
STYLES = (USUAL_STYLE, "v1.0", "xinsir")
"""v1.1: ControlNet 1.1, controlnet_aux and the A1111 extension; v1.0: the first ControlNet, limbs blended
over the joints; xinsir: xinsir's SDXL models, v1.1 with limbs and joints that grow with the picture."""

_THICKNESS = 4  # half the width of a limb and the radius of a joint, in pixels, whatever the picture's size
_FACE_RADIUS = 3
_LIMB_LEVEL = 0.6
_HAND_POINT = (0, 0, 255)
_FACE_POINT = (255, 255, 255)
_FARTHEST = 1e6  # OpenCV draws with integers; a joint farther away (in pixels) is a mistake

_Points = dict[int, tuple[float, float]]


def draw_poses(
    poses: Iterable[np.ndarray],
    width: int,
    height: int,
    *,
    style: str = USUAL_STYLE,
    hands: Iterable[np.ndarray] = (),
    faces: Iterable[np.ndarray] = (),
) -> np.ndarray:
    """Return poses, each (18, 3) of x, y in pixels and score, as a map: uint8 (height, width, 3) RGB.

    ``hands`` (2, 21, 3) and ``faces`` (70, 3) are those of the same people, or are left out. On black,
    nothing is smoothed, and joints with score 0 and their limbs are left out; no person gives a black map.

    - "v1.1" is pixel-identical to controlnet_aux 0.0.10: person by person, 17 limbs as filled ellipses at 0.6
      of their colour, the joints as discs in full colour, lines of the hands in 20 hues with blue discs, and
      white discs for the face. As there, coordinates are divided by the picture's size and multiplied again
      before they are cut to whole pixels.
    - "v1.0" is lllyasviel's first drawing: all joints, then all limbs in full colour, each blended in at 0.6.
      Its hands and faces are those of v1.1.
    - "xinsir" is v1.1 with limbs and joints 2 to 7 times as thick from 500 pixels (longer side) on, as the
      model's card draws them (ComfyUI's switch for it leaves the joints small).

    Raises:
        ValueError: an unknown style, another shape, a size that is not at least 1, or a visible joint that is
            not finite or over a million pixels away.
    """
    if isinstance(poses, Poses):
        raise ValueError("draw_poses takes joints, such as poses.people; poses_to_map draws Poses whole")
    check_canvas(width, height)
    if style not in STYLES:
        raise unknown("draw style", style, STYLES)
    people = [_visible(pose, 18, "joint") for pose in poses]
    both_hands = [[_visible(hand, 21, "hand point") for hand in pair] for pair in hands]
    all_faces = [_visible(face, 70, "face point") for face in faces]
    canvas = np.zeros((height, width, 3), np.uint8)
    if style == "v1.0":
        _draw_blended(canvas, people)
    thickness = _THICKNESS * (_xinsir_scale(width, height) if style == "xinsir" else 1)
    for i in range(max(len(people), len(both_hands), len(all_faces))):
        if style != "v1.0" and i < len(people):
            _draw_person(canvas, _there_and_back(people[i], width, height), thickness)
        for hand in both_hands[i] if i < len(both_hands) else ():
            _draw_hand(canvas, _in_single_precision(hand, width, height))
        if i < len(all_faces):
            _draw_face(canvas, _in_single_precision(all_faces[i], width, height))
    return canvas


def poses_to_map(
    poses: Poses, *, width: int | None = None, height: int | None = None, style: str = USUAL_STYLE
) -> Map:
    """Return the drawing of poses as a :class:`Map`, at their canvas's size or another.

    Given one side, the other follows from the canvas's shape; given both, the poses are stretched.

    Raises:
        ValueError: as :func:`draw_poses`, and a size that is not at least 1.
    """
    if width is None and height is None:
        width, height = poses.width, poses.height
    check_canvas(*(1 if side is None else side for side in (width, height)))
    if width is None:
        assert height is not None
        width = max(1, round(poses.width * height / poses.height))
    if height is None:
        height = max(1, round(poses.height * width / poses.width))
    scaled = scale_poses(poses, width, height)
    image = draw_poses(scaled.people, width, height, style=style, hands=scaled.hands, faces=scaled.faces)
    return Map(image=image, kind="openpose", polarity="openpose-18", params={"style": style}, poses=scaled)


def _visible(points: np.ndarray, count: int, what: str) -> _Points:
    points = points_of(f"a pose's {what}s", points, (count, 3))
    visible = {i: (float(x), float(y)) for i, (x, y, score) in enumerate(points) if score > 0}
    for i, (x, y) in visible.items():
        if not (abs(x) <= _FARTHEST and abs(y) <= _FARTHEST):  # also when either is NaN
            raise ValueError(f"{what} {i} of a pose lies at ({x:g}, {y:g}), outside any picture")
    return visible


def _there_and_back(points: _Points, width: int, height: int) -> _Points:
    """Return points as they are after having been kept as fractions of the picture."""
    return {i: (x / width * width, y / height * height) for i, (x, y) in points.items()}


def _in_single_precision(points: _Points, width: int, height: int) -> _Points:
    """Return hands or faces likewise; whole pixels, which networks give, are kept in single precision."""
    kept = {}
    for i, place in points.items():
        x, y = (
            float(np.float32(value) / np.float32(side) * np.float32(side))
            if value.is_integer()
            else value / side * side
            for value, side in zip(place, (width, height), strict=True)
        )
        kept[i] = (x, y)
    return kept


def _xinsir_scale(width: int, height: int) -> int:
    side = max(width, height)
    return 1 if side < 500 else min(2 + side // 1000, 7)


def _draw_person(canvas: np.ndarray, joints: _Points, thickness: int) -> None:
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):  # 17 limbs, 18 colours
        if start in joints and end in joints:
            dimmed = [int(level * _LIMB_LEVEL) for level in colour]
            cv2.fillConvexPoly(canvas, _limb(joints[start], joints[end], thickness), dimmed)
    for joint, (x, y) in joints.items():
        cv2.circle(canvas, (int(x), int(y)), thickness, COLOURS[joint], thickness=-1)


def _draw_blended(canvas: np.ndarray, people: Sequence[_Points]) -> None:
    """Draw as v1.0: joint by joint and limb by limb, each for all people."""
    for joint, colour in enumerate(COLOURS):
        for joints in people:
            if joint in joints:
                x, y = joints[joint]
                cv2.circle(canvas, (int(x), int(y)), _THICKNESS, colour, thickness=-1)
    for (start, end), colour in zip(LIMBS, COLOURS, strict=False):
        for joints in people:
            if start in joints and end in joints:
                _blend(canvas, _limb(joints[start], joints[end], _THICKNESS), colour)


def _blend(canvas: np.ndarray, outline: np.ndarray, colour: Sequence[int]) -> None:
    height, width = canvas.shape[:2]
    left, top = np.maximum(outline.min(axis=0), 0)
    right, bottom = np.minimum(outline.max(axis=0) + 1, [width, height])
    if left < right and top < bottom:
        part = canvas[top:bottom, left:right]
        filled = part.copy()
        cv2.fillConvexPoly(filled, outline - [left, top], colour)
        part[:] = cv2.addWeighted(part, 1 - _LIMB_LEVEL, filled, _LIMB_LEVEL, 0)


def _limb(start: tuple[float, float], end: tuple[float, float], thickness: int) -> np.ndarray:
    """Return the outline of a limb: an ellipse over the two joints, sampled at every degree, (n, 2) int32.

    Middle, half length and angle are cut to integers, as in the drawings that ControlNets learned from.
    """
    dx, dy = start[0] - end[0], start[1] - end[1]
    middle = (int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2))
    length = (dy**2 + dx**2) ** 0.5
    angle = math.degrees(math.atan2(dy, dx))
    outline = cv2.ellipse2Poly(middle, (int(length / 2), thickness), int(angle), 0, 360, 1)
    return np.asarray(outline, np.int32)


def _draw_hand(canvas: np.ndarray, points: _Points) -> None:
    drawn = _inner_pixels(points)
    for (start, end), colour in zip(HAND_EDGES, HAND_COLOURS, strict=True):
        if start in drawn and end in drawn:
            cv2.line(canvas, drawn[start], drawn[end], colour, thickness=2)
    for place in drawn.values():
        cv2.circle(canvas, place, _THICKNESS, _HAND_POINT, thickness=-1)


def _draw_face(canvas: np.ndarray, points: _Points) -> None:
    for place in _inner_pixels(points).values():
        cv2.circle(canvas, place, _FACE_RADIUS, _FACE_POINT, thickness=-1)


def _inner_pixels(points: _Points) -> dict[int, tuple[int, int]]:
    """Return points as whole pixels, without those in the first row or column or before: 0 means absent."""
    pixels = {i: (int(x), int(y)) for i, (x, y) in points.items()}
    return {i: (x, y) for i, (x, y) in pixels.items() if x > 0 and y > 0}

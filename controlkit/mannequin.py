"""A posed mannequin: anatomically plausible joint angles, the 18 OpenPose joints, and solids to draw.

Body space: x to the person's left, y up, z forward, metres, for a person 1.7 m tall.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from controlkit.raycast import Capsule, Shape, Sphere, Vector, add, unit

Uniform = Callable[[float, float], float]

ACTIONS = ("standing", "walking", "sitting", "raising")

# OpenPose's 18 joints in its order; "Right" is the person's right.
JOINTS = (
    *("nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow"),
    *("left_wrist", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle"),
    *("right_eye", "left_eye", "right_ear", "left_ear"),
)

HEAD_RADIUS = 0.125
LIMB_RADIUS = {"arm": 0.058, "forearm": 0.05, "thigh": 0.085, "shank": 0.066}


def cosine(degrees: float) -> float:
    """cos rounded to 1e-9: libraries differ in the last bit, and scenes must not."""
    return round(math.cos(math.radians(degrees)), 9)


def sine(degrees: float) -> float:
    """sin rounded to 1e-9, for the same reason."""
    return round(math.sin(math.radians(degrees)), 9)


@dataclass(frozen=True)
class Body:
    """Joint positions by name (those of `JOINTS`, and hands and toes) and the head's axes, in one space."""

    joints: dict[str, Vector]
    head: Vector
    head_axes: tuple[Vector, Vector, Vector]  # left, up, forward

    def moved(self, place: Callable[[Vector], Vector], turn: Callable[[Vector], Vector]) -> Body:
        """The body in another space: `place` maps points, `turn` directions."""
        left, up, forward = (turn(axis) for axis in self.head_axes)
        joints = {name: place(point) for name, point in self.joints.items()}
        return Body(joints, place(self.head), (left, up, forward))

    def solids(self) -> list[Shape]:
        """Capsules and spheres of the body; the head is the first."""
        j = self.joints
        neck, pelvis = j["neck"], add(j["right_hip"], add(j["left_hip"], j["right_hip"], -1.0), 0.5)
        shapes: list[Shape] = [
            Sphere(self.head, HEAD_RADIUS),
            Capsule(neck, self.head, 0.055),
            Capsule(j["right_shoulder"], j["left_shoulder"], 0.075),
            Capsule(add(neck, add(pelvis, neck, -1.0), 0.25), pelvis, 0.135),
            Capsule(j["right_hip"], j["left_hip"], 0.1),
        ]
        for side in ("right", "left"):
            chain = (
                ("shoulder", "elbow", "arm"),
                ("elbow", "wrist", "forearm"),
                ("hip", "knee", "thigh"),
                ("knee", "ankle", "shank"),
            )
            for upper, lower, limb in chain:
                shapes.append(Capsule(j[f"{side}_{upper}"], j[f"{side}_{lower}"], LIMB_RADIUS[limb]))
            shapes.append(Sphere(j[f"{side}_hand"], 0.062))
            shapes.append(Capsule(j[f"{side}_ankle"], j[f"{side}_toe"], 0.055))
        return shapes


def _swing(forward: float, outward: float, side: float) -> Vector:
    """Direction of a limb hanging down, swung `forward` and then `outward` by degrees; side is +1 for
    left.
    """
    return (
        side * sine(outward),
        -cosine(forward) * cosine(outward),
        sine(forward) * cosine(outward),
    )


@dataclass(frozen=True)
class _Arm:
    forward: float
    outward: float
    bend: float


@dataclass(frozen=True)
class _Leg:
    forward: float
    outward: float
    bend: float


def _arms(action: str, stride: float, uniform: Uniform) -> tuple[_Arm, _Arm]:
    """Right and left arm for an action."""

    def hanging(swing: float) -> _Arm:
        return _Arm(swing + uniform(-12, 12), uniform(4, 28), uniform(5, 45))

    def raised() -> _Arm:
        return _Arm(uniform(140, 178), uniform(0, 38), uniform(-10, 45))

    def aside() -> _Arm:
        return _Arm(uniform(-10, 30), uniform(60, 92), uniform(0, 60))

    def loose() -> _Arm:
        return _Arm(uniform(-25, 45), uniform(8, 30), uniform(5, 60))

    def standing() -> _Arm:
        return aside() if uniform(0, 1) < 0.25 else hanging(0.0)

    if action == "raising":
        both = uniform(0, 1) < 0.5
        arms = (raised(), raised() if both else hanging(0.0))
        return arms if both or uniform(0, 1) < 0.5 else (arms[1], arms[0])
    if action == "walking":
        return hanging(-stride), hanging(stride)
    if action == "sitting":
        return loose(), loose()
    return standing(), standing()


def _legs(action: str, stride: float, uniform: Uniform) -> tuple[_Leg, _Leg]:
    """Right and left leg for an action; a positive stride puts the right leg in front."""

    def raised(height: float) -> _Leg:
        return _Leg(height + uniform(-10, 6), uniform(3, 20), uniform(60, 118))

    def standing() -> _Leg:
        return _Leg(uniform(-8, 10), uniform(2, 14), uniform(0, 10))

    if action == "sitting":
        height = uniform(95, 128)
        return raised(height), raised(height)
    if action == "walking":
        front = _Leg(abs(stride), uniform(1, 5), uniform(2, 18))
        back = _Leg(-abs(stride) * 0.8, uniform(1, 5), uniform(10, 50))
        return (front, back) if stride > 0 else (back, front)
    return standing(), standing()


def pose(action: str, uniform: Uniform) -> Body:
    """A random body doing `action` (one of `ACTIONS`), its lowest point on the floor y = 0, pelvis over the
    origin.

    `uniform(low, high)` draws the angles; the same draws give the same body.
    """
    stride = uniform(22, 38) * (1.0 if uniform(0, 1) < 0.5 else -1.0)
    lean = uniform(-14, 16) if action == "sitting" else uniform(-4, 9)
    tilt = uniform(-5, 5)
    spine = unit((sine(tilt), cosine(lean) * cosine(tilt), sine(lean) * cosine(tilt)))
    across = unit((cosine(tilt), -sine(tilt), 0.0))
    joints: dict[str, Vector] = {}
    joints["neck"] = neck = add((0.0, 0.0, 0.0), spine, 0.52)
    legs, arms = _legs(action, stride, uniform), _arms(action, stride, uniform)
    for side, sign, leg, arm in (("right", -1.0, legs[0], arms[0]), ("left", 1.0, legs[1], arms[1])):
        joints[f"{side}_hip"] = hip = add((0.0, 0.0, 0.0), across, 0.1 * sign)
        joints[f"{side}_knee"] = knee = add(hip, _swing(leg.forward, leg.outward, sign), 0.42)
        joints[f"{side}_ankle"] = ankle = add(knee, _swing(leg.forward - leg.bend, leg.outward, sign), 0.41)
        joints[f"{side}_toe"] = add(
            ankle, _swing(max(leg.forward - leg.bend, -30) + 85, leg.outward, sign), 0.13
        )
        joints[f"{side}_shoulder"] = shoulder = add(add(neck, across, 0.185 * sign), spine, -0.04)
        joints[f"{side}_elbow"] = elbow = add(shoulder, _swing(arm.forward + lean, arm.outward, sign), 0.29)
        direction = _swing(arm.forward + lean + arm.bend, arm.outward * 0.7, sign)
        joints[f"{side}_wrist"] = wrist = add(elbow, direction, 0.25)
        joints[f"{side}_hand"] = add(wrist, direction, 0.06)
    return _on_floor(_with_head(joints, neck, spine, uniform))


def _with_head(joints: dict[str, Vector], neck: Vector, spine: Vector, uniform: Uniform) -> Body:
    """Add head, nose, eyes and ears; the head turns up to 35° and nods a little."""
    turn, nod = uniform(-35, 35), uniform(-12, 14)
    head = add(neck, spine, 0.21)
    forward = unit((sine(turn) * cosine(nod), -sine(nod), cosine(turn) * cosine(nod)))
    left = unit((forward[2], 0.0, -forward[0]))
    up = (
        forward[1] * left[2] - forward[2] * left[1],
        forward[2] * left[0] - forward[0] * left[2],
        forward[0] * left[1] - forward[1] * left[0],
    )
    axes = (left, up, forward)

    def on_head(left_: float, up_: float, forward_: float) -> Vector:
        direction = unit(
            add(add((left_ * left[0], left_ * left[1], left_ * left[2]), up, up_), forward, forward_)
        )
        return add(head, direction, HEAD_RADIUS)

    joints["nose"] = on_head(0.0, -0.1, 1.0)
    joints["right_eye"], joints["left_eye"] = on_head(-0.38, 0.22, 0.9), on_head(0.38, 0.22, 0.9)
    joints["right_ear"], joints["left_ear"] = on_head(-1.0, 0.05, 0.0), on_head(1.0, 0.05, 0.0)
    return Body(joints, head, axes)


def _on_floor(body: Body) -> Body:
    """Shift the body so that its lowest solid touches y = 0."""
    lowest = min(_lowest(shape) for shape in body.solids())

    def lift(point: Vector) -> Vector:
        return (point[0], point[1] - lowest, point[2])

    return body.moved(lift, lambda axis: axis)


def _lowest(shape: Shape) -> float:
    if isinstance(shape, Sphere):
        return shape.centre[1] - shape.radius
    assert isinstance(shape, Capsule)
    return min(shape.start[1], shape.end[1]) - shape.radius


def _highest(shape: Shape) -> float:
    if isinstance(shape, Sphere):
        return shape.centre[1] + shape.radius
    assert isinstance(shape, Capsule)
    return max(shape.start[1], shape.end[1]) + shape.radius


def extent(body: Body) -> tuple[float, float]:
    """Lowest and highest y of the body's solids."""
    solids = body.solids()
    return min(map(_lowest, solids)), max(map(_highest, solids))

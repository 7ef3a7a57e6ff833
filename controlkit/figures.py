"""The bundled world: pictures of a posed figure beside an object, with exact depth, joints, masks and a
caption.

Everything follows from a split's name and a seed; the same pair gives the same bytes everywhere. Splits
draw from different random streams, so training, validation and demonstration scenes never coincide.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from controlkit import mannequin, raycast
from controlkit.limits import is_whole
from controlkit.mannequin import JOINTS, Body, Uniform, cosine, sine
from controlkit.raycast import FLOOR, SKY, Frame, Shape, Vector, add, dot, unit

SPLITS: Final = ("train", "validation", "demo")
MAX_SEED: Final = 2**32 - 1

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (214, 40, 40),
    "orange": (247, 127, 20),
    "yellow": (252, 214, 52),
    "green": (46, 150, 66),
    "cyan": (72, 202, 208),
    "blue": (40, 84, 204),
    "purple": (122, 54, 166),
    "pink": (246, 140, 186),
    "brown": (122, 74, 38),
    "white": (246, 246, 246),
    "grey": (144, 144, 144),
    "black": (42, 42, 46),
}
OBJECTS: Final = ("cube", "ball", "cylinder", "cone")

_PHRASES: Final = {
    "standing": ("", " standing"),
    "walking": (" walking",),
    "sitting": (" sitting",),
    "raising": (" with raised arms",),
}
_AMBIENT, _DIFFUSE, _SHADOW = 0.46, 0.54, 0.52
_FACE_LIGHTENING, _EYE_COLOUR = 0.5, (30.0, 28.0, 36.0)
_LEAST_PIXELS = {
    "figure": 0.035,
    "object": 0.012,
    "object2": 0.008,
    "sky": 0.08,
    "floor": 0.15,
}  # of the picture


@dataclass(frozen=True)
class Scene:
    """One rendered scene of size×size pixels.

    picture: uint8 H×W×3, RGB. caption: one English phrase. depth: float32 H×W, metres along the view axis,
    inf in the sky. joints: float64 18×3 (x, y in pixels, 1 where visible else 0), OpenPose order. masks:
    bool H×W for "figure", "object", sometimes "object2", "floor" and "sky"; they partition the picture.
    colours: colour name of each mask. shade: float32 H×W, the light on each pixel (picture ≈ colour ×
    shade). action: one of `mannequin.ACTIONS`.
    """

    picture: NDArray[np.uint8]
    caption: str
    depth: NDArray[np.float32]
    joints: NDArray[np.float64]
    masks: dict[str, NDArray[np.bool_]]
    colours: dict[str, str]
    shade: NDArray[np.float32]
    action: str

    @cached_property
    def inverse_depth(self) -> NDArray[np.float32]:
        """1 / depth in 1/m, 0 in the sky: near is large, as relative depth networks predict it."""
        return (1.0 / self.depth).astype(np.float32)

    @property
    def figure_height(self) -> float:
        """Height of the figure's visible pixels, the unit of joint distances."""
        rows = np.flatnonzero(self.masks["figure"].any(axis=1))
        return float(rows[-1] - rows[0] + 1)


class _Dice:
    """Random choices whose arithmetic stands here: `random` promises the same bits for `random()` alone."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed).random

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def choose(self, options: Sequence[str]) -> str:
        return options[int(self.random() * len(options))]


@dataclass(frozen=True)
class _Camera:
    """A camera `height` metres above the floor's origin, looking `pitch` degrees down: floor space (as body
    space, but z away from the camera) to view space.
    """

    focal: float
    pitch: float
    height: float

    def direction(self, v: Vector) -> Vector:
        c, s = cosine(self.pitch), sine(self.pitch)
        return (v[0], v[1] * c + v[2] * s, v[2] * c - v[1] * s)

    def point(self, p: Vector) -> Vector:
        return self.direction((p[0], p[1] - self.height, p[2]))


@dataclass(frozen=True)
class _Prop:
    """An object of the scene: what it is called, its solid in view space, and capsules that stand in for
    its shadow.
    """

    kind: str
    shape: Shape
    shadow: list[raycast.Capsule]


@dataclass(frozen=True)
class _Layout:
    """Everything that decides a picture except its size."""

    action: str
    body: Body  # in view space
    props: list[_Prop]
    colours: dict[str, str]
    caption: str
    up: Vector
    light: Vector
    focal: float
    camera_height: float

    @property
    def shapes(self) -> list[Shape]:
        return [*self.body.solids(), *(prop.shape for prop in self.props)]

    @property
    def owners(self) -> list[str]:
        """Mask name of each of `shapes`."""
        names = ["object", "object2"]
        return ["figure"] * len(self.body.solids()) + names[: len(self.props)]


def render(seed: int, *, size: int = 128, split: str = "demo") -> Scene:
    """The scene of a seed in a split, at size×size pixels.

    Raises ValueError for an unknown split, a seed that is no whole number from 0 to 2³²-1, or a size that is
    none from 16 to 4096. The layout does not depend on the size: a larger picture shows the same scene,
    sharper.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the bundled world: use one of {', '.join(SPLITS)}")
    if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed {seed!r} of the bundled world is out of range: use 0 to {MAX_SEED}")
    if not is_whole(size) or not 16 <= size <= 4096:
        raise ValueError(f"size {size!r} of the bundled world is out of range: use 16 to 4096 pixels")
    layout = _layout(split, seed)
    return _draw(layout, size)


def _layout(split: str, seed: int) -> _Layout:
    """Draw layouts until every part of the scene can be seen well enough."""
    for attempt in range(200):
        layout = _random_layout(_Dice(f"controlkit/figures/1/{split}/{seed}/{attempt}"))
        if _well_seen(layout):
            return layout
    raise AssertionError(f"no visible layout for {split} {seed}")


def _well_seen(layout: _Layout) -> bool:
    size = 32
    frame = _trace(layout, size)
    masks = _masks(layout, frame)
    if any(masks[name].sum() < least * size * size for name, least in _LEAST_PIXELS.items() if name in masks):
        return False
    figure = masks["figure"]
    return not (figure[0].any() or figure[-1].any() or figure[:, 0].any() or figure[:, -1].any())


def _random_layout(dice: _Dice) -> _Layout:
    action = dice.choose(mannequin.ACTIONS)
    body = mannequin.pose(action, dice.uniform)
    camera, distance = _random_camera(dice, mannequin.extent(body)[1])
    x = dice.uniform(-0.16, 0.16) * distance / camera.focal
    body = _placed(body, (x, 0.0, distance), dice.uniform(0, 360), camera)
    kinds = [dice.choose(OBJECTS) for _ in range(2 if dice.random() < 0.3 else 1)]
    side = 1.0 if x < 0 else -1.0  # the first object stands where there is more room
    props = []
    for kind, sign in zip(kinds, (side, -side), strict=False):
        reach = dice.uniform(0.2, 0.36) * distance / camera.focal
        at = (x + sign * reach, 0.0, distance + dice.uniform(-0.16, 0.3) * distance)
        props.append(_prop(kind, at, dice.uniform, camera))
    colours = _random_colours(dice, ["figure", *("object", "object2")[: len(kinds)], "floor", "sky"])
    light = (dice.uniform(-0.8, 0.8), dice.uniform(0.9, 1.6), dice.uniform(-1.0, -0.25))
    return _Layout(
        action=action,
        body=body,
        props=props,
        colours=colours,
        caption=_caption(kinds, colours, dice.choose(_PHRASES[action])),
        up=camera.direction((0.0, 1.0, 0.0)),
        light=unit(camera.direction(light)),
        focal=camera.focal,
        camera_height=camera.height,
    )


def _random_camera(dice: _Dice, top: float) -> tuple[_Camera, float]:
    """A camera, and how far from it a figure `top` metres high fills a random share of the picture."""
    focal, pitch, fill = dice.uniform(1.25, 1.6), dice.uniform(2, 13), dice.uniform(0.46, 0.8)
    distance = top * focal / fill
    aim = pitch + dice.uniform(-4, 1.5)  # a figure a little below the middle leaves room for the sky
    return _Camera(focal, pitch, 0.5 * top + distance * sine(aim) / cosine(aim)), distance


def _placed(body: Body, at: Vector, yaw: float, camera: _Camera) -> Body:
    """The body on the floor at `at`, in view space. A yaw of 0 faces the camera: the person's left is the
    picture's right.
    """
    c, s = cosine(yaw), sine(yaw)

    def turned(v: Vector) -> Vector:
        return (v[0] * c + v[2] * s, v[1], v[0] * s - v[2] * c)

    return body.moved(lambda p: camera.point(add(turned(p), at)), lambda v: camera.direction(turned(v)))


def _random_colours(dice: _Dice, parts: Sequence[str]) -> dict[str, str]:
    """A colour for each part, all different."""
    names = list(COLOURS)
    return {part: names.pop(int(dice.random() * len(names))) for part in parts}


def _prop(kind: str, at: Vector, uniform: Uniform, camera: _Camera) -> _Prop:
    """An object of a random size and turn, standing on the floor at `at` (floor space, metres)."""
    scale = at[2] / 4.4  # bigger where the camera is farther, so that it is seen
    radius, height = uniform(0.26, 0.4) * scale, uniform(0.6, 1.0) * scale
    angle, up = uniform(0, 90), camera.direction((0.0, 1.0, 0.0))

    def column(radius_: float, low: float, high: float) -> raycast.Capsule:
        return raycast.Capsule(camera.point((at[0], low, at[2])), camera.point((at[0], high, at[2])), radius_)

    shape: Shape
    if kind == "ball":
        shape = raycast.Sphere(camera.point((at[0], radius, at[2])), radius)
        shadow = [column(radius, radius, radius * 1.01)]
    elif kind == "cube":
        half = radius * 0.9
        axes = (
            camera.direction((cosine(angle), 0.0, sine(angle))),
            up,
            camera.direction((-sine(angle), 0.0, cosine(angle))),
        )
        shape = raycast.Box(camera.point((at[0], half, at[2])), axes, (half, half, half))
        shadow = [column(half * 1.15, 0.0, half * 1.7)]
    elif kind == "cylinder":
        shape = raycast.Cylinder(camera.point(at), up, height, radius * 0.8)
        shadow = [column(radius * 0.8, 0.0, height)]
    else:
        shape = raycast.Cone(camera.point(at), up, height * 1.15, radius * 1.05)
        shadow = [column(radius * part, 0.0, height * 1.15 * (1.0 - part)) for part in (0.9, 0.6, 0.3)]
    return _Prop(kind, shape, shadow)


def _caption(kinds: list[str], colours: dict[str, str], phrase: str) -> str:
    def a(colour: str, noun: str) -> str:
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {noun}"

    objects = " and ".join(
        a(colours[part], kind) for part, kind in zip(("object", "object2"), kinds, strict=False)
    )
    return (
        f"{a(colours['figure'], 'figure')}{phrase} next to {objects} "
        f"on {a(colours['floor'], 'floor')} under {a(colours['sky'], 'sky')}"
    )


def _trace(layout: _Layout, size: int) -> Frame:
    return raycast.trace(
        layout.shapes, size=size, focal=layout.focal, up=layout.up, camera_height=layout.camera_height
    )


def _masks(layout: _Layout, frame: Frame) -> dict[str, NDArray[np.bool_]]:
    owners = [*layout.owners, "floor", "sky"]  # FLOOR is -2 and SKY -1: they index from the end
    owner = np.array(owners)[frame.index]
    return {name: owner == name for name in dict.fromkeys(owners)}


def _draw(layout: _Layout, size: int) -> Scene:
    fine = _trace(layout, 2 * size)
    light = _shade(layout, fine)
    colour = _albedo(layout, fine) * light[..., None]
    samples = colour[0::2, 0::2] + colour[0::2, 1::2] + colour[1::2, 0::2] + colour[1::2, 1::2]
    picture = np.clip(0.25 * samples + 0.5, 0.0, 255.0).astype(np.uint8)
    frame = _trace(layout, size)
    return Scene(
        picture=picture,
        caption=layout.caption,
        depth=frame.z.astype(np.float32),
        joints=_project_joints(layout, frame, size),
        masks=_masks(layout, frame),
        colours=layout.colours,
        shade=_shade(layout, frame).astype(np.float32),
        action=layout.action,
    )


def _albedo(layout: _Layout, frame: Frame) -> NDArray[np.float64]:
    """Colour of each pixel before light, H×W×3; the head gets a lighter face and two dark eyes."""
    table = np.array(
        [COLOURS[layout.colours[part]] for part in (*layout.owners, "floor", "sky")], dtype=np.float64
    )
    albedo = table[frame.index]
    left, up, forward = layout.body.head_axes
    nx, ny, nz = frame.normal

    def along(v: Vector) -> NDArray[np.float64]:
        return nx * v[0] + ny * v[1] + nz * v[2]

    head = frame.index == 0
    face = head & (along(forward) > 0.45)
    albedo[face] = albedo[face] * (1.0 - _FACE_LIGHTENING) + 255.0 * _FACE_LIGHTENING
    for sign in (-1.0, 1.0):
        eye = unit(
            add(add((0.9 * forward[0], 0.9 * forward[1], 0.9 * forward[2]), up, 0.22), left, 0.38 * sign)
        )
        albedo[head & (along(eye) > 0.97)] = _EYE_COLOUR
    return albedo


def _shade(layout: _Layout, frame: Frame) -> NDArray[np.float64]:
    """Light on each pixel: Lambert's law with an ambient term, soft shadows on the floor, a gradient in the
    sky.
    """
    nx, ny, nz = frame.normal
    lit = nx * layout.light[0] + ny * layout.light[1] + nz * layout.light[2]
    shade = _AMBIENT + _DIFFUSE * np.maximum(lit, 0.0)
    floor, sky = frame.index == FLOOR, frame.index == SKY
    fade = 0.97 - 0.16 * np.minimum(frame.z[floor] / 30.0, 1.0)
    shade[floor] = (1.0 - _SHADOW * _floor_shadow(layout, [axis[floor] for axis in frame.points()])) * fade
    rows = np.broadcast_to(np.linspace(0.86, 1.0, frame.z.shape[0])[:, None], frame.z.shape)
    shade[sky] = rows[sky]
    return shade


def _floor_shadow(layout: _Layout, points: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """How dark N floor points are, 0 to 1: each capsule's shadow, cast along the light, with a blurred
    rim.
    """
    px, py, pz = points
    east = unit(add((1.0, 0.0, 0.0), layout.up, -layout.up[0]))
    north = (
        layout.up[1] * east[2] - layout.up[2] * east[1],
        layout.up[2] * east[0] - layout.up[0] * east[2],
        layout.up[0] * east[1] - layout.up[1] * east[0],
    )
    u = px * east[0] + py * east[1] + pz * east[2]
    v = px * north[0] + py * north[1] + pz * north[2]
    rise = dot(layout.light, layout.up)
    lu, lv = dot(layout.light, east) / rise, dot(layout.light, north) / rise
    stretch = float(
        np.sqrt(1.0 + lu * lu + lv * lv)
    )  # a ball's shadow is an ellipse, this long for its width
    shadow = np.zeros(px.shape)
    for capsule in _shadow_casters(layout):
        ends = []
        for point in (capsule.start, capsule.end):
            high = dot(point, layout.up) + layout.camera_height
            ends.append((dot(point, east) - high * lu, dot(point, north) - high * lv, high))
        blur = 0.035 + 0.06 * max(ends[0][2], ends[1][2])
        distance = _distance(u, v, ends, (lu, lv), stretch)
        shadow = np.maximum(shadow, (capsule.radius + blur - distance) * (0.5 / blur))
    shadow = np.minimum(shadow, 1.0)
    return shadow * shadow * (3.0 - 2.0 * shadow)


def _shadow_casters(layout: _Layout) -> list[raycast.Capsule]:
    casters = []
    for solid in layout.body.solids():
        if isinstance(solid, raycast.Sphere):
            solid = raycast.Capsule(solid.centre, add(solid.centre, layout.up, 1e-3), solid.radius)
        assert isinstance(solid, raycast.Capsule)
        casters.append(solid)
    return casters + [capsule for prop in layout.props for capsule in prop.shadow]


def _distance(
    u: NDArray[np.float64],
    v: NDArray[np.float64],
    ends: Sequence[Vector],
    slant: tuple[float, float],
    stretch: float,
) -> NDArray[np.float64]:
    """Distance of floor points (u, v) to a cast segment, shortened along the light so that balls cast
    ellipses.
    """
    length = float(np.sqrt(slant[0] * slant[0] + slant[1] * slant[1])) or 1.0
    cu, cv = slant[0] / length, slant[1] / length

    def squeezed(a: Any, b: Any) -> tuple[Any, Any]:
        return (a * cu + b * cv) / stretch, b * cu - a * cv

    (au, av), (bu, bv) = squeezed(ends[0][0], ends[0][1]), squeezed(ends[1][0], ends[1][1])
    pu, pv = squeezed(u, v)
    du, dv = bu - au, bv - av
    s = np.clip(((pu - au) * du + (pv - av) * dv) / max(du * du + dv * dv, 1e-12), 0.0, 1.0)
    ex, ey = pu - au - s * du, pv - av - s * dv
    return np.sqrt(ex * ex + ey * ey)


def _project_joints(layout: _Layout, frame: Frame, size: int) -> NDArray[np.float64]:
    """Pixel positions of the 18 joints; visible = in the picture and not behind another surface.

    A joint lies inside its limb, so the surface in front of it may be up to a limb's thickness nearer; nose,
    eyes and ears lie on the head's surface.
    """
    joints = np.zeros((len(JOINTS), 3))
    for row, name in enumerate(JOINTS):
        x, y, z = layout.body.joints[name]
        px = (x / z * layout.focal + 0.5) * size
        py = (0.5 - y / z * layout.focal) * size
        joints[row, :2] = px, py
        if 0.0 <= px < size and 0.0 <= py < size:
            margin = 0.03 if name.endswith(("nose", "_eye", "_ear")) else 0.17
            joints[row, 2] = float(frame.z[int(py), int(px)] > z - margin)
    return joints

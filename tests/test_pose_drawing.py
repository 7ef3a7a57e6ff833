"""Poses as pictures: three styles, hands and faces, byte for byte."""

import hashlib
import math
import sys
import types
from typing import Any

import cv2
import numpy as np
import pytest
from pose_networks import LIMBS

from controlkit.preprocessors import Poses, draw_poses, poses_to_map
from controlkit.preprocessors.annotators import import_annotator

# The 18 colours as degrees on the colour wheel, in steps of 1/3 of 60.
HUES = [0, 20, 40, 60, 80, 100, 120, 140, 160, 180, 200, 220, 240, 260, 280, 300, 320, 340]


def hue(degrees: float) -> list[float]:
    """Full colour of a hue, as the distance of each primary on the wheel."""
    away = [min(abs(degrees - primary), 360 - abs(degrees - primary)) for primary in (0, 120, 240)]
    return [255 * min(max(2 - distance / 60, 0), 1) for distance in away]


COLOURS = [[round(level) for level in hue(degrees)] for degrees in HUES]


def full_colour(turn: float) -> list[float]:
    """A hue in [0, 1) by the sectors of the wheel, with the arithmetic, so the rounding, of Matplotlib."""
    sector, part = divmod(turn * 6.0, 1.0)
    falling, rising = 1.0 * (1.0 - 1.0 * part), 1.0 * (1.0 - 1.0 * (1.0 - part))
    return [
        [1.0, rising, 0.0], [falling, 1.0, 0.0], [0.0, 1.0, rising],
        [0.0, falling, 1.0], [rising, 0.0, 1.0], [1.0, 0.0, falling],
    ][int(sector)]  # fmt: skip


def some_points(rng: np.random.Generator, *shape: int, width: int, height: int) -> np.ndarray:
    points = rng.uniform([-0.1, -0.1, 0.5], [1.1, 1.1, 1.0], (*shape, 3)) * [width, height, 1]
    points[rng.uniform(size=shape) < 0.2] = 0
    return points


def some_poses(seed: int, count: int, width: int, height: int) -> Poses:
    rng = np.random.default_rng(seed)
    size = {"width": width, "height": height}
    return Poses(
        some_points(rng, count, 18, **size),
        width,
        height,
        hands=some_points(rng, count, 2, 21, **size),
        faces=some_points(rng, count, 70, **size),
    )


def drawn(poses: Poses, style: str = "v1.1") -> np.ndarray:
    return draw_poses(
        poses.people, poses.width, poses.height, style=style, hands=poses.hands, faces=poses.faces
    )


@pytest.fixture
def aux(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return controlnet_aux's open_pose; of Matplotlib, which it wants for one function, a stand-in."""
    colours = types.SimpleNamespace(hsv_to_rgb=lambda hsv: np.array(full_colour(hsv[0])))
    monkeypatch.setitem(sys.modules, "matplotlib", types.SimpleNamespace(colors=colours))
    return import_annotator("open_pose")


def aux_drawing(aux: Any, poses: Poses, kind: type) -> np.ndarray:
    def keypoints(points: np.ndarray, absent: Any) -> list[Any]:
        scaled = points[:, :2].astype(kind) / np.array([poses.width, poses.height], kind)
        return [
            aux.body.Keypoint(*place) if score else absent
            for place, score in zip(scaled, points[:, 2], strict=True)
        ]

    nowhere = aux.body.Keypoint(-1.0, -1.0)
    results = [
        aux.PoseResult(
            aux.body.BodyResult(keypoints(body, None), 1.0, 18),
            *(keypoints(hand, nowhere) for hand in hands),
            keypoints(face, nowhere),
        )
        for body, hands, face in zip(poses.people, poses.hands, poses.faces, strict=True)
    ]
    return np.asarray(aux.draw_poses(results, poses.height, poses.width))


SIZES = [(512, 512), (640, 360), (37, 411), (1, 1), (3000, 2)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_v1_1_is_controlnet_aux(aux: Any, width: int, height: int) -> None:
    for seed in range(6):
        poses = some_poses(seed, 3, width, height)
        np.testing.assert_array_equal(drawn(poses), aux_drawing(aux, poses, np.float64))


def test_whole_pixels_are_drawn_as_controlnet_aux_keeps_them(aux: Any) -> None:
    """Dividing by the size and multiplying again loses a pixel here and there; hands in single precision."""
    for seed in range(6):
        width, height = np.random.default_rng(seed).integers(40, 700, 2).tolist()
        poses = some_poses(seed, 3, width, height)
        bodies = Poses(np.floor(poses.people), width, height)
        np.testing.assert_array_equal(drawn(bodies), aux_drawing(aux, bodies, np.float64))
        parts = Poses(
            np.zeros((3, 18, 3)), width, height, hands=np.ceil(poses.hands), faces=np.ceil(poses.faces)
        )
        np.testing.assert_array_equal(drawn(parts), aux_drawing(aux, parts, np.float32))


def outline(a: np.ndarray, b: np.ndarray, half_width: int) -> np.ndarray:
    (mx, my), (dx, dy) = (a + b) / 2, a - b
    axes = (int(np.hypot(dx, dy) / 2), half_width)
    return np.asarray(
        cv2.ellipse2Poly((int(mx), int(my)), axes, int(math.degrees(math.atan2(dy, dx))), 0, 360, 1)
    )


def limbs() -> list[tuple[int, int]]:
    pairs = [tuple(int(number) - 1 for number in limb.split("-")) for limb in LIMBS.split()[:17]]
    return [(a, b) for a, b in pairs]


def first_drawing(people: np.ndarray, width: int, height: int) -> np.ndarray:
    """The rule of v1.0: every limb on a copy of the whole picture, 4 parts old and 6 parts new."""
    canvas = np.zeros((height, width, 3), np.uint8)
    for joint, colour in enumerate(COLOURS):
        for x, y, score in people[:, joint]:
            if score:
                cv2.circle(canvas, (int(x), int(y)), 4, colour, -1)
    for (a, b), colour in zip(limbs(), COLOURS, strict=False):
        for person in people:
            if person[a, 2] and person[b, 2]:
                new = canvas.copy()
                cv2.fillConvexPoly(new, outline(person[a, :2], person[b, :2], 4), colour)
                canvas = np.rint(canvas * 0.4 + new * 0.6).astype(np.uint8)
    return canvas


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_v1_0_is_the_first_drawing(width: int, height: int) -> None:
    for seed in range(4):
        people = some_poses(seed, 3, width, height).people
        expected = first_drawing(people, width, height).astype(int)
        found = draw_poses(people, width, height, style="v1.0").astype(int)
        assert (
            np.abs(found - expected).max() <= 1
        )  # 0.4 and 0.6 are no binary numbers: halves fall either way
        assert (found != expected).mean() < 1e-3


@pytest.mark.parametrize(
    ("width", "height", "times"),
    [(499, 300, 1), (500, 300, 2), (999, 20, 2), (1000, 700, 3), (300, 2048, 4), (5000, 40, 7), (9000, 9, 7)],
)
def test_xinsir_thickens_limbs_and_joints_with_the_longer_side(width: int, height: int, times: int) -> None:
    people = some_poses(width, 2, width, height).people
    expected = np.zeros((height, width, 3), np.uint8)
    for person in people:
        for (a, b), colour in zip(limbs(), COLOURS, strict=False):
            if person[a, 2] and person[b, 2]:
                dimmed = [level * 3 // 5 for level in colour]
                cv2.fillConvexPoly(expected, outline(person[a, :2], person[b, :2], 4 * times), dimmed)
        for (x, y, score), colour in zip(person, COLOURS, strict=True):
            if score:
                cv2.circle(expected, (int(x), int(y)), 4 * times, colour, -1)
    np.testing.assert_array_equal(draw_poses(people, width, height, style="xinsir"), expected)


@pytest.mark.parametrize(
    ("style", "digest"),
    [("v1.1", "9db980a24512248f"), ("v1.0", "cc26e7e2437b50d3"), ("xinsir", "5c2126d9dfbeb60b")],
)
def test_styles_are_what_they_were(style: str, digest: str) -> None:
    """Golden pictures: an OpenCV that draws otherwise would change what ControlNets are shown."""
    poses = some_poses(11, 2, 600, 400)
    assert hashlib.sha256(drawn(poses, style).tobytes()).hexdigest()[:16] == digest


def test_hands_and_faces_are_drawn_over_every_style() -> None:
    poses = some_poses(1, 1, 300, 300)
    for style in ("v1.1", "v1.0", "xinsir"):
        picture = drawn(poses, style)
        x, y, _ = next(
            point
            for point in poses.faces[0][::-1]
            if point[2] and (point[:2] > 4).all() and (point[:2] < 296).all()
        )
        assert picture[int(y), int(x)].tolist() == [255, 255, 255]


def test_parts_that_are_nowhere_are_refused() -> None:
    hands = np.zeros((1, 2, 21, 3))
    hands[0, 1, 5] = np.nan, 1, 1
    with pytest.raises(ValueError, match="hand point 5 of a pose lies at"):
        draw_poses(np.zeros((1, 18, 3)), 9, 9, hands=hands)


def test_a_map_of_poses_at_any_size() -> None:
    poses = some_poses(4, 2, 400, 200)
    made = poses_to_map(poses, width=800)
    assert made.image.shape == (400, 800, 3)
    assert made.kind == "openpose"
    assert made.poses is not None
    np.testing.assert_allclose(made.poses.hands[..., :2], 2 * poses.hands[..., :2])
    np.testing.assert_array_equal(made.image, drawn(made.poses))
    assert poses_to_map(poses, height=50).image.shape == (50, 100, 3)
    assert poses_to_map(poses, height=50, width=70, style="v1.0").image.shape == (50, 70, 3)
    np.testing.assert_array_equal(poses_to_map(poses).image, drawn(poses))
    with pytest.raises(ValueError, match="0 x 10 pixels has no room"):
        poses_to_map(poses, width=0, height=10)


def test_what_is_no_pose_is_not_drawn() -> None:
    person = np.tile([4.0, 4.0, 1.0], (18, 1))
    np.testing.assert_array_equal(draw_poses([person.tolist()], 8, 8), draw_poses([person], 8, 8))
    for poses in (person, [np.ones((17, 3))]):  # one pose in place of a list of them, and COCO's
        with pytest.raises(ValueError, match=r"a pose's joints are \(18, 3\) numbers: x, y, score; not"):
            draw_poses(poses, 8, 8)
    with pytest.raises(ValueError, match="poses_to_map draws Poses whole"):
        draw_poses(Poses(person[None], 8, 8), 8, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a pose's hand points are \(21, 3\) numbers"):
        draw_poses([person], 8, 8, hands=[np.zeros((21, 3))])
    for width in (0, -1, 7.5):
        with pytest.raises(ValueError, match=f"a canvas of {width} x 8 pixels has no room"):
            draw_poses([], width, 8)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="has no room"):
            poses_to_map(Poses(person[None], 8, 8), width=width)  # type: ignore[arg-type]

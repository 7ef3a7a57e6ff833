"""The bundled world: the renderer against geometry worked by hand, and scenes against their own labels."""

import hashlib
import itertools
import math
import re

import numpy as np
import pytest

from controlkit import mannequin
from controlkit.figures import COLOURS, SPLITS, render
from controlkit.raycast import FLOOR, SKY, Box, Capsule, Cone, Cylinder, Sphere, pixel_rays, trace

UP = (0.0, 1.0, 0.0)


def surface_points(shape, size=96, focal=1.4):
    """Points where the rays of a picture enter the shape, (N, 3), and the rays that miss."""
    rays = pixel_rays(size, focal)
    hits = shape.hit(rays)
    seen = np.isfinite(hits.z)
    points = np.stack([rays.x * hits.z, rays.y * hits.z, hits.z], axis=-1)[seen]
    return points, ~seen


def test_sphere_depth_is_exact():
    points, missed = surface_points(Sphere((0.2, -0.1, 3.0), 0.5))
    assert len(points) > 300
    assert missed.any()
    np.testing.assert_allclose(np.linalg.norm(points - [0.2, -0.1, 3.0], axis=1), 0.5, atol=1e-9)
    rays = pixel_rays(97, 1.4)  # an odd size has a ray through the middle
    assert Sphere((0.0, 0.0, 3.0), 0.5).hit(rays).z[48, 48] == pytest.approx(2.5, abs=1e-12)


def test_capsule_surface_is_its_radius_from_the_segment():
    a, b = np.array([-0.5, -0.4, 3.2]), np.array([0.6, 0.5, 2.7])
    points, _ = surface_points(Capsule(tuple(a), tuple(b), 0.2))
    s = np.clip((points - a) @ (b - a) / ((b - a) @ (b - a)), 0, 1)
    assert len(points) > 300
    np.testing.assert_allclose(np.linalg.norm(points - a - s[:, None] * (b - a), axis=1), 0.2, atol=1e-9)


def test_box_cylinder_and_cone_surfaces():
    c, s = math.cos(0.5), math.sin(0.5)
    box = Box((0.0, 0.0, 3.0), ((c, 0.0, s), UP, (-s, 0.0, c)), (0.4, 0.3, 0.5))
    points, _ = surface_points(box)
    local = np.abs((points - [0.0, 0.0, 3.0]) @ np.array(box.axes).T) / np.array(box.half)
    np.testing.assert_allclose(local.max(axis=1), 1.0, atol=1e-9)

    base = np.array([0.1, -0.9, 3.0])
    points, _ = surface_points(Cylinder(tuple(base), UP, 0.7, 0.3))
    radius, height = np.hypot(points[:, 0] - 0.1, points[:, 2] - 3.0), points[:, 1] + 0.9
    on_side, on_top = np.abs(radius - 0.3) < 1e-9, np.abs(height - 0.7) < 1e-9
    assert on_side.any()
    assert on_top.any()
    assert (on_side | on_top).all()

    points, _ = surface_points(Cone(tuple(base), UP, 0.8, 0.3))
    radius, height = np.hypot(points[:, 0] - 0.1, points[:, 2] - 3.0), points[:, 1] + 0.9
    np.testing.assert_allclose(radius, 0.3 * (1 - height / 0.8), atol=1e-7)


def test_floor_depth_and_horizon():
    frame = trace([], size=64, focal=1.5, up=UP, camera_height=1.2)
    below = frame.rays.y < 0
    assert (frame.index[below] == FLOOR).all()
    assert (frame.index[~below] == SKY).all()
    np.testing.assert_allclose(frame.z[below], -1.2 / frame.rays.y[below])
    assert np.isinf(frame.z[~below]).all()


@pytest.mark.parametrize(
    "shape",
    [
        Sphere((0.9, -0.6, 2.0), 0.5),
        Capsule((-0.9, 0.2, 1.9), (0.3, -0.7, 2.6), 0.15),
        Box((-0.5, 0.4, 2.2), ((1.0, 0.0, 0.0), UP, (0.0, 0.0, 1.0)), (0.4, 0.4, 0.4)),
        Cylinder((0.4, -0.6, 1.8), UP, 0.9, 0.3),
        Cone((0.4, -0.6, 1.8), UP, 0.9, 0.3),
    ],
)
def test_the_window_that_is_traced_holds_the_whole_shape(shape):
    full = np.isfinite(shape.hit(pixel_rays(80, 1.3)).z)
    frame = trace([shape], size=80, focal=1.3, up=UP, camera_height=100.0)
    np.testing.assert_array_equal(frame.index == 0, full)


def test_scenes_are_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    for split, seed in itertools.product(SPLITS, range(2)):
        scene = render(seed, split=split)
        for array in (scene.picture, scene.depth, scene.joints.round(6), scene.masks["figure"]):
            digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(scene.caption.encode())
    # Recorded on x86-64; the renderer uses correctly rounded operations alone, so every machine has to agree.
    assert digest.hexdigest() == "1e6a9c036a9239638aba53d1d2d7e8320188131fd7dbbac970ab3433edb6a779"


def test_splits_and_seeds_give_different_scenes():
    pictures = {render(seed, split=split).picture.tobytes() for split in SPLITS for seed in range(3)}
    assert len(pictures) == 9


def test_a_scene_agrees_with_its_labels():
    for seed in range(12):
        scene = render(seed, split="validation")
        covered = sum(mask.astype(int) for mask in scene.masks.values())
        assert (covered == 1).all()
        assert set(scene.masks) == set(scene.colours)
        assert np.isinf(scene.depth[scene.masks["sky"]]).all()
        assert np.isfinite(scene.depth[~scene.masks["sky"]]).all()
        assert len(set(scene.colours.values())) == len(scene.colours)
        words = re.findall(r"\w+", scene.caption)
        assert [w for w in words if w in COLOURS] == list(scene.colours.values())
        for part, name in scene.colours.items():
            inside = scene.masks[part] & (scene.shade > 0.4)
            ratio = np.median(scene.picture[inside] / scene.shade[inside][:, None], axis=0)
            np.testing.assert_allclose(ratio, COLOURS[name], atol=12)


def test_visible_joints_lie_on_the_figure():
    on, visible = 0, 0
    for seed in range(30):
        scene = render(seed, split="validation")
        for x, y, seen in scene.joints:
            if seen:
                visible += 1
                on += scene.masks["figure"][int(y), int(x)]
    assert visible > 30 * 9
    assert on / visible > 0.95  # the rest are ears on the rim of the head


@pytest.mark.slow
def test_left_and_right_follow_the_facing():
    """Facing the camera (both eyes seen), the person's right is on the picture's left, and the nose is
    seen.
    """
    checked = 0
    for seed in range(60):
        joints = render(seed, split="validation").joints
        nose, right_eye, left_eye = joints[0], joints[14], joints[15]
        if right_eye[2] and left_eye[2] and left_eye[0] - right_eye[0] > 2:
            checked += 1
            assert nose[2]
            assert right_eye[0] < nose[0] < left_eye[0]
    assert checked > 8


@pytest.mark.slow
def test_figures_fill_the_stated_share_of_the_height():
    heights = [render(seed, split="validation").figure_height / 128 for seed in range(60)]
    assert min(heights) > 0.36
    assert max(heights) < 0.9
    assert np.std(heights) > 0.05


def test_poses_vary_and_stay_on_the_floor():
    import random

    for action in mannequin.ACTIONS:
        rng = random.Random(action)
        wrists = []
        for _ in range(8):
            body = mannequin.pose(action, lambda low, high, rng=rng: low + (high - low) * rng.random())
            assert mannequin.extent(body)[0] == pytest.approx(0.0, abs=1e-9)
            for upper, lower, length in (
                ("hip", "knee", 0.42),
                ("knee", "ankle", 0.41),
                ("shoulder", "elbow", 0.29),
            ):
                for side in ("left", "right"):
                    a, b = np.array(body.joints[f"{side}_{upper}"]), np.array(body.joints[f"{side}_{lower}"])
                    assert np.linalg.norm(a - b) == pytest.approx(length, abs=1e-6)
            wrists.append(body.joints["left_wrist"])
        assert np.std(wrists, axis=0).max() > 0.03


def test_a_larger_picture_shows_the_same_scene():
    small, large = render(4, size=64), render(4, size=256)
    assert small.caption == large.caption
    np.testing.assert_allclose(small.joints[:, :2] * 4, large.joints[:, :2], atol=1e-6)
    shrunk = large.picture.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small.picture).mean() < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**32}, "out of range"),
        ({"seed": 0, "split": "test"}, "unknown split 'test'"),
        ({"seed": 0, "size": 8}, "size 8"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"seed": "7"}, "seed '7'"),
        ({"seed": 0, "size": 64.0}, "size 64.0"),
    ],
)
def test_bad_requests_are_one_plain_line(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        render(**options)
    assert "\n" not in str(caught.value)

"""What a visit sees: pictures and maps of every kind, from files and made, the same for the same seed."""

import io
import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data as photographs

from controlkit import images, preprocessors
from controlkit.preprocessors import draw_poses, mirror_poses, poses_to_map
from controlkit.preprocessors.posejson import poses_to_json
from controlkit.preprocessors.skeleton import BODY_MIRROR, COLOURS, Poses
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import ArrayPiece, Example, FilePiece, Piece
from controlkit.training.data.map_use import about_idle
from controlkit.training.data.mirroring import mirrored_normals
from controlkit.training.data.views import View, look
from controlkit.training.data.visits import Visits

PICTURE = np.ascontiguousarray(photographs.astronaut()[60:403, 90:490])  # 400 x 343
SIZE = (400, 343)
WHOLE = View(400, 343, 400, 343, 0, 0, mirrored=False)
STANDING = np.array([
    [50, 12], [50, 24], [40, 25], [34, 40], [30, 55], [60, 24], [68, 38], [72, 54], [44, 54],
    [42, 74], [40, 94], [57, 54], [59, 74], [62, 93], [47, 9], [53, 9], [43, 11], [57, 11],
]) / 100  # fmt: skip
"""18 joints as fractions of the picture; nothing crosses."""


def standing(width: int = 400, height: int = 343) -> Poses:
    people = np.concatenate([STANDING * [width, height] + 0.3, np.ones((18, 1))], axis=1)[None]
    return Poses(people, width, height)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


class BytesPiece(Piece):
    def __init__(self, content: bytes, name: str) -> None:
        self._content, self.name = content, name

    def read(self) -> bytes:
        return self._content


def visits_of(
    *maps: bytes | np.ndarray,
    kind: str = "canny",
    picture: Any = PICTURE,
    count: int = 1,
    resolution: int = 256,
    seed: int = 1,
    **data: Any,
) -> Visits:
    """Visits to `count` times the same pair."""
    pieces = [
        BytesPiece(m, f"map{k}.bin") if isinstance(m, bytes) else ArrayPiece(m, f"map{k}.bin")
        for k, m in enumerate(maps)
    ]
    source = BytesPiece(picture, "photo.bin") if isinstance(picture, bytes) else ArrayPiece(picture)
    example = Example("pair", source, "a picture", tuple(pieces))
    size = images.load_picture(picture).shape[1::-1]
    return Visits(
        [example] * count,
        [size] * count,
        data=DataRecipe(**data),
        kind=kind,
        resolution=resolution,
        seed=seed,
    )


def seen(visits: Visits, *, mirrored: bool = False) -> np.ndarray:
    """The first view's map, or its mirror image's."""
    return visits.map(0, replace(visits.views(0)[0], mirrored=mirrored), seed=0)


def errors_line(caught: pytest.ExceptionInfo[ValueError]) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


# --- pictures ---


def test_a_picture_is_upright_on_white_and_of_8_bits() -> None:
    turned = Image.fromarray(np.rot90(PICTURE))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    visits = visits_of(PICTURE, picture=encoded(turned, exif=exif))
    assert np.array_equal(visits.picture(0, WHOLE), PICTURE)
    alpha = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 0, np.uint8)])
    visits = visits_of(PICTURE, picture=encoded(Image.fromarray(alpha)))
    assert visits.picture(0, WHOLE).min() == 255
    deep = cv2.imencode(".png", PICTURE[..., 0].astype(np.uint16) * 257)[1].tobytes()
    visits = visits_of(PICTURE, picture=deep)
    assert np.array_equal(visits.picture(0, WHOLE), PICTURE[..., :1].repeat(3, axis=2))


def test_pictures_are_views_of_what_was_decoded() -> None:
    visits = visits_of(PICTURE, kind="depth", crop="random", flip=0.5, resolution=192)
    assert len(visits.views(0)) > 2
    for view in visits.views(0):
        picture = visits.picture(0, view)
        assert np.array_equal(picture, look(PICTURE, view))
        assert picture.flags.c_contiguous
        assert picture.shape == (192, 192, 3)


def test_a_picture_that_cannot_be_read_or_has_changed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    images.write_png(path, PICTURE)
    example = Example("pair", FilePiece(path), "", ())
    visits = Visits([example], [SIZE], data=DataRecipe(), kind="canny", resolution=64, seed=1)
    view = visits.views(0)[0]
    images.write_png(path, PICTURE[:100])
    with pytest.raises(ValueError, match=r"photo.png has changed: it had 400 x 343 pixels before"):
        visits.picture(0, view)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"photo.png is damaged or truncated"):
        visits.picture(0, view)
    path.unlink()
    with pytest.raises(ValueError, match=r"photo.png cannot be read: No such file"):
        visits.picture(0, view)


def test_an_example_without_a_size_has_no_shape() -> None:
    example = Example("pair", BytesPiece(b"", "photo.bin"), "", ())
    visits = Visits([example], [None], data=DataRecipe(buckets=True), kind="canny", resolution=64, seed=1)
    assert visits.shape_of == [-1]
    with pytest.raises(ValueError, match=r"photo.bin could not be read"):
        visits.views(0)


def test_what_is_seen_of_an_array_on_disk_can_be_written(tmp_path: Path) -> None:
    np.save(tmp_path / "picture.npy", PICTURE)
    mapped = np.load(tmp_path / "picture.npy", mmap_mode="r")
    visits = visits_of(mapped, kind="tile", picture=mapped)
    for result in (visits.picture(0, WHOLE), visits.map(0, WHOLE, seed=0)):
        assert np.array_equal(result, PICTURE)
        assert result.flags.writeable


def test_a_first_pair_that_is_left_out_decides_nothing() -> None:
    broken = Example("broken", BytesPiece(b"", "broken.bin"), "", ())
    pair = Example("pair", ArrayPiece(PICTURE), "", (ArrayPiece(PICTURE),))
    for examples, sizes in (([broken, pair], [None, SIZE]), ([pair, broken], [SIZE, None])):
        visits = Visits(examples, sizes, data=DataRecipe(flip=0.5), kind="any", resolution=64, seed=1)
        assert not visits.made
        assert visits.channels == 3


# --- maps from files ---


def test_edges_stay_binary_and_thin_at_any_size() -> None:
    edges = preprocessors.get("canny")(PICTURE).image
    for factor in (0.7, 1.0, 1.6):
        other = images.resize_lines(edges, round(400 * factor), round(343 * factor))
        for mirrored in (False, True):
            lines = seen(visits_of(encoded(Image.fromarray(other)), resolution=192), mirrored=mirrored)
            assert lines.shape == (192, 192, 3)
            assert set(np.unique(lines)) == {0, 255}
            assert 0.03 < (lines > 0).mean() < 0.35
            view = View(192, 192, 224, 192, 16, 0, mirrored)
            assert np.array_equal(lines, look(other, view, sampling="lines"))


def test_labels_keep_their_colours_and_depth_gets_new_ones() -> None:
    labels = (PICTURE // 64 * 80).astype(np.uint8)  # up to 64 colours
    few = {tuple(colour) for colour in labels.reshape(-1, 3).tolist()}
    shown = seen(visits_of(labels, kind="seg"))
    assert {tuple(colour) for colour in shown.reshape(-1, 3).tolist()} <= few
    deep = visits_of(labels[..., 0].astype(np.uint16) * 200, kind="seg", map_mode="grey")
    assert set(np.unique(seen(deep)).tolist()) == {0, 16000, 32000, 48000}
    steps = labels[..., :1].repeat(3, axis=2)
    assert len(np.unique(seen(visits_of(steps, kind="seg")))) == 4
    assert len(np.unique(seen(visits_of(steps, kind="depth")))) > 50  # half-way values mean half-way


def test_photographs_as_maps_are_resampled_smoothly() -> None:
    visits = visits_of(PICTURE, kind="tile")
    (view,) = visits.views(0)
    assert np.array_equal(visits.map(0, view, seed=0), look(PICTURE, view))


def test_a_map_of_another_size_than_its_picture_fills_the_same_frame() -> None:
    larger = cv2.resize(PICTURE, (800, 686), interpolation=cv2.INTER_CUBIC)
    visits = visits_of(larger, kind="tile", crop="random", flip=0.5, resolution=192)
    for view in visits.views(0):
        difference = visits.map(0, view, seed=0).astype(int) - visits.picture(0, view)
        assert np.abs(difference).mean() < 3
        elsewhere = np.roll(visits.picture(0, view), 2, axis=1)
        assert np.abs(visits.map(0, view, seed=0).astype(int) - elsewhere).mean() > 6


def test_a_map_of_another_shape_than_its_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"map0.bin has 400 x 200 pixels, its picture 400 x 343"):
        seen(visits_of(PICTURE[:200], kind="tile"))
    with pytest.raises(ValueError, match=r"map0.bin has 200 x 343 pixels, its picture 400 x 343"):
        seen(visits_of(np.ascontiguousarray(PICTURE[:, :200]), kind="tile"))
    seen(visits_of(cv2.resize(PICTURE, (384, 320)), kind="tile"))  # stretched to multiples of 64


def test_grey_maps_have_one_channel_and_keep_16_bits() -> None:
    ramp = (np.arange(400 * 343) % 65536).astype(np.uint16).reshape(343, 400)
    png = cv2.imencode(".png", ramp)[1].tobytes()
    tiff = encoded(Image.fromarray(ramp), "TIFF")
    for content in (png, tiff, ramp, ramp[..., None]):
        visits = visits_of(content, kind="height", map_mode="grey")
        assert visits.channels == 1
        levels = visits.map(0, WHOLE, seed=0)
        assert levels.dtype == np.uint16
        assert np.array_equal(levels[..., 0], ramp)
        assert seen(visits).shape == (256, 256, 1)
    grey = PICTURE[..., 1]
    for content in (encoded(Image.fromarray(grey)), cv2.merge([grey] * 3)):
        levels = visits_of(content, kind="height", map_mode="grey").map(0, WHOLE, seed=0)
        assert levels.dtype == np.uint8
        assert np.array_equal(levels[..., 0], grey)
    jpeg = encoded(Image.fromarray(cv2.merge([grey] * 3)), "JPEG", quality=80)
    assert seen(visits_of(jpeg, kind="height", map_mode="grey")).shape == (256, 256, 1)
    with pytest.raises(ValueError, match=r"map0.bin is coloured, and data.map_mode is grey"):
        seen(visits_of(PICTURE, kind="height", map_mode="grey"))
    deep = visits_of(png, kind="height").map(0, WHOLE, seed=0)  # in three channels of 8 bits
    assert np.array_equal(deep[..., 0], images.load_picture(png)[..., 0])


def test_several_maps_are_stacked_in_their_order_and_share_their_bits() -> None:
    edges = preprocessors.get("canny")(PICTURE).image
    columns = ("edges", "height")
    visits = visits_of(edges, PICTURE, kind="both", map_column=columns)
    assert visits.channels == 6
    both = visits.map(0, WHOLE, seed=0)
    assert np.array_equal(both, np.dstack([edges, PICTURE]))
    deep = PICTURE[..., 0].astype(np.uint16) * 200
    grey = visits_of(edges[..., 0], deep, kind="both", map_column=columns, map_mode="grey")
    assert grey.channels == 2
    levels = grey.map(0, WHOLE, seed=0)
    assert levels.dtype == np.uint16
    assert np.array_equal(levels[..., 0], edges[..., 0].astype(np.uint16) * 257)
    assert np.array_equal(levels[..., 1], deep)
    blurred = visits_of(edges, PICTURE, kind="both", map_column=columns, map_blur=1.0)
    assert seen(blurred).shape == (256, 256, 6)  # more channels than a picture has


def depth_contents(inverse: np.ndarray) -> dict[str, bytes]:
    npy = io.BytesIO()
    np.save(npy, inverse)
    pfm = b"Pf\n400 343\n-1.0\n" + inverse[::-1].tobytes()
    return {"npy": npy.getvalue(), "pfm": pfm, "tiff": encoded(Image.fromarray(inverse), "TIFF")}


@pytest.mark.parametrize("format", ["npy", "pfm", "tiff"])
def test_depth_in_numbers_has_its_own_range_and_near_is_white(format: str) -> None:
    inverse = PICTURE[..., 0].astype(np.float32) / 100 + 3.5
    content = depth_contents(inverse)[format]
    levels = visits_of(content, kind="depth").map(0, WHOLE, seed=0)
    assert np.array_equal(levels, preprocessors.depth_to_map(inverse))
    assert (levels.min(), levels.max()) == (0, 255)
    deep = visits_of(content, kind="depth", map_mode="grey").map(0, WHOLE, seed=0)[..., 0]
    assert deep.dtype == np.uint16
    assert np.abs(deep / 65535 - (inverse - 3.5) / (inverse.max() - 3.5)).max() < 1e-4
    metric = visits_of(content, kind="depth", options={"metric": True}).map(0, WHOLE, seed=0)
    assert metric[inverse == inverse.max()].max() == 0  # far is black
    assert metric[inverse == inverse.min()].min() == 255


def test_holes_in_depth_are_filled_on_request() -> None:
    metres = np.full((343, 400), 2.0, np.float32)
    metres[:, 200:] = 4.0
    metres[10:20, 20:60] = 0.0
    content = depth_contents(metres)["npy"]
    for fill, level in ((False, 0), ("true", 255), ("no", 0)):
        options = {"metric": True, "fill": fill}
        assert (
            visits_of(content, kind="depth", options=options).map(0, WHOLE, seed=0)[12:18, 25:55] == level
        ).all()
    with pytest.raises(ValueError, match="depth's fill is 'some'; it must be true or false"):
        visits_of(content, kind="depth", options={"fill": "some"})


def test_depth_in_16_bits_is_stretched_and_depth_in_8_bits_is_taken_as_it_is() -> None:
    values = PICTURE[..., 0].astype(np.uint16) * 10 + 1000
    png = cv2.imencode(".png", values)[1].tobytes()
    levels = visits_of(png, kind="depth").map(0, WHOLE, seed=0)
    assert (levels.min(), levels.max()) == (0, 255)
    flat = (PICTURE[..., :1] // 2 + 20).repeat(3, axis=2)
    content = encoded(Image.fromarray(flat))
    assert np.array_equal(visits_of(content, kind="depth").map(0, WHOLE, seed=0), flat)
    inverted = visits_of(content, kind="depth", options={"metric": "true"}).map(0, WHOLE, seed=0)
    assert inverted[flat[..., 0] == flat.max()].max() == 0


# --- poses ---


def test_joints_are_moved_and_drawn_at_the_final_size() -> None:
    poses = standing()
    visits = visits_of(json.dumps(poses_to_json(poses)).encode(), kind="openpose", resolution=512, flip=0.5)
    plain, mirror = visits.views(0)
    scale = np.array([plain.resized_width / 400, plain.resized_height / 343])
    joints = poses.people[0].copy()
    joints[:, :2] = joints[:, :2] * scale - [plain.left, plain.top]
    assert np.array_equal(visits.map(0, plain, seed=0), draw_poses([joints], 512, 512))
    swapped = joints[list(BODY_MIRROR)]
    swapped[:, 0] = 512 - swapped[:, 0]
    assert np.array_equal(visits.map(0, mirror, seed=0), draw_poses([swapped], 512, 512))
    disc = (visits.map(0, plain, seed=0) == COLOURS[4]).all(axis=2)  # a wrist, which nothing covers
    assert disc.any(axis=0).sum() == 9  # a radius of 4, whatever the size was


def test_limbs_run_out_of_the_picture_as_in_a_drawing_that_is_cut() -> None:
    poses = standing()
    visits = visits_of(json.dumps(poses_to_json(poses)).encode(), kind="openpose", resolution=128)
    whole = draw_poses(poses.people, 400, 343)
    view = View(200, 100, 400, 343, 100, 200, mirrored=False)  # cuts both legs
    assert np.array_equal(visits.map(0, view, seed=0), whole[200:300, 100:300])
    assert visits.map(0, view, seed=0).any()


def test_a_pose_on_a_canvas_of_another_size_or_of_none() -> None:
    large = json.dumps(poses_to_json(standing(800, 686))).encode()
    bare = poses_to_json(standing())
    del bare["canvas_width"], bare["canvas_height"]
    expected = seen(visits_of(json.dumps(poses_to_json(standing())).encode(), kind="openpose"))
    for content in (b"\xef\xbb\xbf" + json.dumps(bare).encode(), large):
        drawn = seen(visits_of(content, kind="openpose"))
        assert (drawn != expected).any(axis=2).mean() < 0.003  # 0.3 pixels apart on the larger canvas


def test_joints_are_missing_and_elsewhere_at_each_visit_and_in_what_is_shown_they_are_not() -> None:
    content = json.dumps(poses_to_json(standing())).encode()
    expected = draw_poses(standing().people, 400, 343)
    dropped, jittered = (
        visits_of(content, kind="openpose", **moved) for moved in ({"pose_drop": 0.3}, {"pose_jitter": 3.0})
    )
    wrist, absent, places = COLOURS[4], 0, []
    for seed in range(200):
        seen_without, moved = (visits.map(0, WHOLE, seed=seed) for visits in (dropped, jittered))
        absent += not (seen_without == wrist).all(axis=2).any()
        places.append(np.argwhere((moved == wrist).all(axis=2)).mean(axis=0)[::-1])
        assert np.array_equal(moved, jittered.map(0, WHOLE, seed=seed))
    assert 0.2 < absent / 200 < 0.4
    off = np.array(places) - standing().people[0, 4, :2]
    assert np.allclose(off.mean(axis=0), 0, atol=0.8)
    assert np.allclose(off.std(axis=0), 3, atol=0.6)
    for visits in (dropped, jittered):
        assert not visits.fixed
        assert np.array_equal(visits.map(0, WHOLE, seed=7, whole=True), expected)
    assert visits_of(content, kind="openpose").fixed


def test_only_joints_can_be_missing() -> None:
    drawn = encoded(Image.fromarray(draw_poses(standing().people, 400, 343)))
    with pytest.raises(ValueError, match=r"change the joints of poses as JSON; map0\.bin is none"):
        visits_of(drawn, kind="openpose", pose_drop=0.1)
    with pytest.raises(ValueError, match="poses as JSON; here the maps are made of the pictures"):
        visits_of(kind="canny", pose_jitter=1.0)


@pytest.mark.parametrize(
    ("columns", "is_used"), [(("keypoints", "edges"), True), (("depth", "normals"), False)]
)
def test_a_style_is_used_where_a_column_may_hold_poses_and_names_the_map(
    columns: tuple[str, str], is_used: bool
) -> None:
    """What the cache holds of one style is not taken for another's, and what is said to be idle is idle."""
    pose, black = json.dumps(poses_to_json(standing())).encode(), np.zeros((343, 400, 3), np.uint8)
    given = {"kind": "openpose", "map_column": columns}
    usual, old = (visits_of(pose, black, **given, options={"style": style}) for style in ("v1.1", "v1.0"))
    assert np.array_equal(seen(old), seen(usual)) is not is_used
    assert (old.map_settings == usual.map_settings) is not is_used
    data = DataRecipe(map_column=columns, options={"style": "v1.0"})
    assert (about_idle(data, kind="openpose", count=2) == "") is is_used


def test_a_broken_pose_is_named() -> None:
    for content, said in (
        (b'{"people": [', "map0.bin is not a JSON file"),
        (b"{}", "map0.bin is not in OpenPose's format"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            seen(visits_of(content, kind="openpose"))
    far = poses_to_json(standing())
    far["people"][0]["pose_keypoints_2d"][0] = 1e9
    with pytest.raises(ValueError, match=r"map0.bin: joint 0 of a pose lies at"):
        seen(visits_of(json.dumps(far).encode(), kind="openpose"))
    with pytest.raises(ValueError, match=r"map0.bin is a pose, which is drawn in colours"):
        seen(visits_of(json.dumps(poses_to_json(standing())).encode(), kind="openpose", map_mode="grey"))


def test_a_mirrored_drawing_means_what_the_mirrored_joints_mean() -> None:
    poses = standing()
    visits = visits_of(poses_to_map(poses).image, kind="openpose", flip=0.5)
    mirrored = visits.map(0, replace(WHOLE, mirrored=True), seed=0)
    expected = poses_to_map(mirror_poses(poses)).image
    joints = np.zeros(expected.shape[:2], bool)
    for colour in COLOURS:
        joints |= (expected == colour).all(axis=2)
    assert joints.sum() > 18 * 40
    assert np.array_equal(mirrored[joints], expected[joints])  # the joints to the pixel
    differs = (mirrored != expected).any(axis=2).astype(np.uint8)
    assert 0 < differs.mean() < 0.01
    assert not cv2.erode(differs, np.ones((3, 3), np.uint8)).any()  # limbs up to their outlines
    assert (expected != poses_to_map(poses).image[:, ::-1]).any(axis=2).sum() > 3000


@pytest.mark.parametrize("apart", [None, 8])
def test_twice_mirrored_is_unchanged(apart: int | None) -> None:
    """Also of two people so near that their left knees are one spot, larger than a joint."""
    poses = standing()
    if apart is not None:
        beside = np.add(poses.people, (apart, 0, 0))
        poses = Poses(np.concatenate([poses.people, beside]), *SIZE)
    drawing = poses_to_map(poses).image
    turned = visits_of(drawing, kind="openpose", flip=1.0).map(0, replace(WHOLE, mirrored=True), seed=0)
    again = visits_of(turned, kind="openpose", flip=1.0).map(0, replace(WHOLE, mirrored=True), seed=0)
    assert np.array_equal(again, drawing)


def test_drawings_that_cannot_be_mirrored_are_refused_before_any_visit() -> None:
    poses = standing()
    hands = np.zeros((1, 2, 21, 3))
    hands[0, 0] = np.concatenate([np.linspace(60, 90, 42).reshape(21, 2), np.ones((21, 1))], axis=1)
    large = np.zeros((1, 2, 21, 3))
    large[0, 1] = np.concatenate(
        [np.random.default_rng(0).uniform(60, 130, (21, 2)), np.ones((21, 1))], axis=1
    )
    drawing = poses_to_map(poses).image
    for content in (
        poses_to_map(replace(poses, hands=hands)).image,  # its points cover its lines
        poses_to_map(replace(poses, hands=large)).image,
        poses_to_map(poses, style="v1.0").image,
        encoded(Image.fromarray(drawing), "JPEG"),
    ):
        with pytest.raises(ValueError, match="openpose_json") as caught:
            visits_of(content, kind="openpose", flip=0.5)
        assert errors_line(caught).startswith("map0.bin cannot be mirrored")
        visits_of(content, kind="openpose")  # without flips all is well
    faces = np.zeros((1, 70, 3))
    faces[0] = np.concatenate([np.linspace(60, 90, 140).reshape(70, 2), np.ones((70, 1))], axis=1)
    visits_of(poses_to_map(replace(poses, faces=faces)).image, kind="openpose", flip=0.5)


# --- normals ---


@pytest.mark.parametrize("kind", ["normal", "openpose"])
def test_grey_maps_say_nothing_of_left_and_right(kind: str) -> None:
    grey = cv2.merge([PICTURE[..., 1]] * 3)
    visits = visits_of(grey, kind=kind, map_mode="grey")
    assert np.array_equal(visits.map(0, replace(WHOLE, mirrored=True), seed=0)[..., 0], grey[:, ::-1, 0])


@pytest.mark.parametrize("kind", ["normal", "normalbae"])
def test_mirrored_normals_are_the_normals_of_the_mirrored_surface(kind: str) -> None:
    depth = cv2.GaussianBlur(PICTURE[..., 0].astype(np.float32), (0, 0), 4)
    normals = preprocessors.normal_from_depth(depth)
    of_mirrored = preprocessors.normal_from_depth(np.ascontiguousarray(depth[:, ::-1]))
    visits = visits_of(normals, kind=kind, flip=0.5)
    mirrored = visits.map(0, replace(WHOLE, mirrored=True), seed=0)
    assert np.abs(mirrored.astype(int) - of_mirrored).max() <= 1  # levels are cut, not rounded
    assert np.abs(normals[:, ::-1].astype(int) - of_mirrored).max() > 20
    assert np.array_equal(visits.map(0, WHOLE, seed=0), normals)


def test_holes_of_normals_stay() -> None:
    holes = np.array([[[0, 0, 0], [255, 255, 255], [255, 127, 127], [10, 127, 200]]], np.uint8)
    assert mirrored_normals(holes)[0, :, 0].tolist() == [0, 255, 0, 245]


# --- maps that are made ---


def test_a_made_map_is_that_of_the_view() -> None:
    visits = visits_of(kind="canny", flip=0.5, options={"low": 60, "high": "120"})
    assert visits.fixed
    assert visits.channels == 3
    canny = preprocessors.get("canny", low=60, high=120)
    for view in visits.views(0):
        picture = visits.picture(0, view)
        assert np.array_equal(visits.map(0, view, seed=0), canny(picture).image)
        assert np.array_equal(visits.map(0, view, seed=7, picture=picture), canny(picture).image)
    grey = visits_of(kind="canny", map_mode="grey", options={"low": 60, "high": "120"})
    assert np.array_equal(seen(grey), seen(visits)[..., :1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("canny", {"low": "20..80", "high": [120, 200]}),
        ("canny", {"blur": "0.5..3"}),
        ("scribble", {"width": "2..20"}),
        ("shuffle", {}),
        ("softedge", {"resolution": "64..256"}),
    ],
)
def test_ranges_are_drawn_anew_for_each_seed(kind: str, options: dict[str, Any]) -> None:
    visits = visits_of(kind=kind, options=options)
    assert not visits.fixed
    (view,) = visits.views(0)
    made = [visits.map(0, view, seed=seed) for seed in range(8)]
    assert len({image.tobytes() for image in made}) >= 4
    again = visits_of(kind=kind, options=options, seed=99)
    assert all(np.array_equal(again.map(0, view, seed=seed), made[seed]) for seed in (5, 2))


def test_a_seed_among_the_options_fixes_the_draw() -> None:
    visits = visits_of(kind="canny", options={"low": "20..80", "high": "120..200", "seed": 3})
    assert visits.fixed
    (view,) = visits.views(0)
    assert np.array_equal(visits.map(0, view, seed=1), visits.map(0, view, seed=2))
    expected = preprocessors.get("canny", low="20..80", high="120..200", seed=3)(visits.picture(0, view))
    assert np.array_equal(visits.map(0, view, seed=1), expected.image)


def test_drawn_numbers_fill_their_range() -> None:
    from controlkit.training.data.made_maps import Maker

    maker = Maker("scribble", {"width": "2..20"})
    widths = [maker._for_visit(seed)._width for seed in range(300)]  # type: ignore[attr-defined]
    assert 2 <= min(widths) < 2.5
    assert 19.5 < max(widths) <= 20
    sides = {Maker("softedge", {"resolution": "64..66"})._for_visit(s).resolution for s in range(40)}
    assert sides == {64, 65, 66}


def test_a_network_is_built_once_at_the_first_map_and_shared_by_threads() -> None:
    scene = cv2.resize(PICTURE, (128, 128))
    visits = visits_of(kind="depth", picture=scene, resolution=128, flip=0.5, options={"model": "tiny"})
    assert visits.fixed
    jobs = [visits.views(0)[k % 2] for k in range(6)]
    with ThreadPoolExecutor(3) as threads:
        made = list(threads.map(lambda view: visits.map(0, view, seed=0), jobs))
    for view, image in zip(jobs, made, strict=True):
        assert np.array_equal(image, visits.map(0, view, seed=0))
    assert not np.array_equal(made[0], made[1])
    assert visits._maker._network is not None
    missing = visits_of(kind="depth", options={"model": "/nowhere"})  # not looked for before it is needed
    with pytest.raises(ValueError, match="nowhere"):
        seen(missing)


@pytest.mark.parametrize(
    ("kind", "data", "said"),
    [
        ("cany", {}, "unknown map 'cany' (did you mean 'canny'?)"),
        ("canny", {"options": {"lo": 1}}, "unknown canny option 'lo' (did you mean 'low'?); choose from: "),
        ("depth", {"options": {"low": 1}}, "; data.options={} clears those of the recipe"),
        ("canny", {"options": {"low": "many"}}, "canny's low is 'many'"),
        ("canny", {"options": {"low": "50..300", "high": "100..200"}}, "canny's low threshold 300"),
        ("scribble", {"options": {"width": "1..99"}}, "scribble's width is 99"),
        ("scribble", {"options": {"width": "9..2"}}, "it goes upwards"),
        ("depth", {"options": {"clip": "0..2"}}, "only kinds without a network take ranges"),
        ("depth", {"options": {"model": "file"}}, "data.maps=files"),
        ("openpose", {"map_mode": "grey"}, "openpose maps are coloured"),
        ("canny", {"maps": "files"}, "pair has no map; data.maps=made makes maps of the pictures"),
    ],
)
def test_what_cannot_be_made_is_refused_at_once(kind: str, data: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        visits_of(kind=kind, **data)
    errors_line(caught)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"options": {"lo": 50}}, "data.options has lo, but these maps come from files"),
        ({"map_column": ("one", "two")}, "pair has 1 maps; 2 are wanted"),
        ({"options": {"style": "v3"}}, "unknown draw style 'v3'"),
    ],
)
def test_what_does_not_fit_files_is_refused_at_once(data: dict[str, Any], said: str) -> None:
    kind = "openpose" if "style" in data.get("options", {}) else "canny"
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        visits_of(PICTURE, kind=kind, **data)
    errors_line(caught)


@pytest.mark.parametrize("maps", ["auto", "files"])
def test_options_of_maps_that_are_made_do_not_bar_maps_from_files(maps: str) -> None:
    """The recipes of the families give canny's thresholds, and take the data's own maps where it has any."""
    plain = visits_of(PICTURE, kind="canny", maps=maps)
    given = visits_of(PICTURE, kind="canny", maps=maps, options={"low": "50..150", "high": "150..300"})
    assert np.array_equal(seen(given), seen(plain))
    assert (given.fixed, given.map_settings) == (True, plain.map_settings)


def test_made_maps_are_preferred_where_the_recipe_says_so() -> None:
    made = visits_of(PICTURE, kind="canny", maps="made")
    assert set(np.unique(seen(made))) == {0, 255}
    assert [piece.name for piece in made.pieces(0)] == ["an array"]
    from_file = visits_of(PICTURE, kind="canny")
    assert [piece.name for piece in from_file.pieces(0)] == ["map0.bin"]
    assert made.map_settings != from_file.map_settings


# --- visits ---


def test_a_visit_depends_on_seed_lap_and_index_alone() -> None:
    visits = visits_of(kind="canny", count=5, crop="random", crops=3, flip=0.5, resolution=128)
    jobs = [(index, lap) for index in range(5) for lap in range(4)]
    first = [visits.visit(*job) for job in jobs]
    shuffled = random.Random(0).sample(jobs, len(jobs))
    assert {job: visits.visit(*job) for job in shuffled} == dict(zip(jobs, first, strict=True))
    assert len({visit.seed for visit in first}) == 20
    other = visits_of(kind="canny", count=5, crop="random", crops=3, flip=0.5, resolution=128, seed=2)
    assert [other.visit(*job).seed for job in jobs] != [visit.seed for visit in first]
    assert [other.views(index) for index in range(5)] == [visits.views(index) for index in range(5)]
    assert visits.views(0) != visits.views(1)


def test_views_come_as_often_as_the_recipe_says() -> None:
    visits = visits_of(kind="canny", crop="random", crops=3, flip=0.25, resolution=128)
    drawn = [visits.visit(0, lap).view for lap in range(4000)]
    shares = np.bincount(drawn, minlength=6) / len(drawn)
    assert np.allclose(shares, np.tile([0.25, 0.25 / 3], 3), atol=0.02)
    always = visits_of(kind="canny", flip=1.0)
    assert [always.views(0)[always.visit(0, lap).view].mirrored for lap in range(5)] == [True] * 5


def test_a_share_of_the_maps_is_blurred() -> None:
    dot = np.zeros((343, 400, 3), np.uint8)
    dot[160:164, 200:204] = 255
    visits = visits_of(dot, kind="depth", map_blur=0.3)
    assert not visits.fixed
    spreads = []
    for seed in range(300):
        shown = visits.map(0, WHOLE, seed=seed)
        assert np.array_equal(shown, visits.map(0, WHOLE, seed=seed))
        if not np.array_equal(shown, dot):
            y = np.arange(343) - 161.5
            profile = shown[..., 0].sum(axis=1, dtype=np.float64)
            spreads.append(np.sqrt((profile * y**2).sum() / profile.sum() - 1.25))  # without the dot's own
    assert 0.22 < len(spreads) / 300 < 0.38
    assert 0.3 < min(spreads) < 0.7
    assert 1.7 < max(spreads) < 2.1


def sequential(visits: Visits, jobs: Sequence[tuple[int, int]]) -> list[bytes]:
    results = []
    for index, lap in jobs:
        visit = visits.visit(index, lap)
        view = visits.views(index)[visit.view]
        picture, shown = visits.picture(index, view), visits.map(index, view, seed=visit.seed)
        results.append(picture.tobytes() + shown.tobytes())
    return results


@pytest.mark.parametrize("kind", ["canny", "shuffle"])
def test_threads_and_order_change_nothing(kind: str) -> None:
    recipe: dict[str, Any] = {"crop": "random", "flip": 0.5, "map_blur": 0.5, "resolution": 128, "count": 6}
    if kind == "canny":
        recipe["options"] = {"low": "20..90", "high": "100..250"}
    visits = visits_of(kind=kind, picture=encoded(Image.fromarray(PICTURE), "JPEG"), **recipe)
    jobs = [(index, lap) for index in range(6) for lap in range(4)]
    expected = sequential(visits, jobs)
    assert len(set(expected)) > 20
    with ThreadPoolExecutor(4) as threads:
        backwards = list(threads.map(lambda job: sequential(visits, [job])[0], jobs[::-1]))
    assert backwards[::-1] == expected


def test_buckets_give_each_picture_its_shape() -> None:
    sizes = [(640, 480), (480, 640), (500, 500), None]
    examples = [
        Example("x", ArrayPiece(np.zeros((*(s or (1, 1))[::-1], 3), np.uint8)), "", ()) for s in sizes
    ]
    recipe = DataRecipe(buckets=True, bucket_step=64)
    visits = Visits(examples, sizes, data=recipe, kind="canny", resolution=256, seed=1)
    shapes = [visits.shapes[k] for k in visits.shape_of[:3]]
    assert shapes[0] == shapes[1][::-1]
    assert shapes[2] == (256, 256)
    for index in range(3):
        (view,) = visits.views(index)
        assert visits.picture(index, view).shape == (*shapes[index][::-1], 3)
    assert visits.shape_of[3] == -1

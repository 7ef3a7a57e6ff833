"""OpenPose maps: the drawing, the JSON, the joints' order, and finding them with real (tiny) networks."""

import json
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from skimage import data
from tiny_detectors import save_person_detector, save_pose_model, save_spot_finder

from controlkit import preprocessors
from controlkit.preprocessors import Poses, coco17_to_openpose18, draw_poses, read_poses, write_poses
from controlkit.preprocessors.heatmaps import decode_heatmaps
from controlkit.preprocessors.people import PersonDetector
from controlkit.preprocessors.vitpose import VitPose

# The published tables: limbs count joints from 1.
LIMBS = "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18"
COLOURS = (
    "FF0000 FF5500 FFAA00 FFFF00 AAFF00 55FF00 00FF00 00FF55 00FFAA "
    "00FFFF 00AAFF 0055FF 0000FF 5500FF AA00FF FF00FF FF00AA FF0055"
)
OPENPOSE_18 = (
    "nose neck right_shoulder right_elbow right_wrist left_shoulder left_elbow left_wrist "
    "right_hip right_knee right_ankle left_hip left_knee left_ankle right_eye left_eye right_ear left_ear"
)
COCO_17 = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow "
    "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
)


def published_drawing(people: np.ndarray, width: int, height: int) -> np.ndarray:
    """The v1.1 rule on coordinates relative to the picture, as controlnet_aux keeps them. NaN: absent."""
    canvas = np.zeros((height, width, 3), np.uint8)
    colours = [tuple(bytes.fromhex(code)) for code in COLOURS.split()]
    for person in people:
        points = person * [width, height]
        for limb, colour in zip(LIMBS.split(), colours, strict=False):
            a, b = (points[int(number) - 1] for number in limb.split("-"))
            if np.isnan([a, b]).any():
                continue
            (mx, my), difference = np.mean([a, b], axis=0), a - b
            axes = (int(np.hypot(*difference) / 2), 4)
            angle = int(math.degrees(math.atan2(difference[1], difference[0])))
            outline = cv2.ellipse2Poly((int(mx), int(my)), axes, angle, 0, 360, 1)
            cv2.fillConvexPoly(canvas, np.asarray(outline), tuple(int(level * 3 / 5) for level in colour))
        for (x, y), colour in zip(points, colours, strict=True):
            if not np.isnan(x):
                cv2.circle(canvas, (int(x), int(y)), 4, colour, -1)
    return canvas


def some_people(rng: np.random.Generator, count: int) -> np.ndarray:
    """Joints relative to the picture, a few absent (NaN), a few outside."""
    people = rng.uniform(-0.1, 1.1, (count, 18, 2))
    people[rng.uniform(size=(count, 18)) < 0.2] = np.nan
    return people


def as_poses(people: np.ndarray, width: int, height: int) -> np.ndarray:
    pixels = np.nan_to_num(people * [width, height])
    return np.concatenate([pixels, np.isfinite(people[..., :1])], axis=2)


# --- drawing ---


@pytest.mark.parametrize(("width", "height"), [(512, 512), (640, 360), (128, 128), (37, 411)])
def test_the_drawing_is_the_published_one(width: int, height: int) -> None:
    rng = np.random.default_rng(width)
    for count in (1, 2, 20):
        people = some_people(rng, count)
        drawn = draw_poses(as_poses(people, width, height), width, height)
        assert drawn.any()
        np.testing.assert_array_equal(drawn, published_drawing(people, width, height))


def test_a_joint_is_a_disc_and_a_limb_is_dimmed() -> None:
    pose = np.zeros((18, 3))
    pose[0], pose[1] = (50.9, 20.2, 1.0), (50.9, 80.7, 0.01)  # nose and neck: limb 13, blue
    drawn = draw_poses([pose], 100, 100)
    assert drawn[20, 50].tolist() == [255, 0, 0]
    assert drawn[80, 50].tolist() == [255, 85, 0]
    assert drawn[50, 50].tolist() == [0, 0, 153]
    disc = (drawn == [255, 0, 0]).all(axis=2)
    assert np.flatnonzero(disc.any(axis=0)).tolist() == list(range(46, 55))  # radius 4 about the pixel 50


def test_absent_joints_are_not_drawn() -> None:
    pose = np.zeros((18, 3))
    pose[:, :2] = 50
    assert not draw_poses([pose], 100, 100).any()
    assert not draw_poses([], 100, 100).any()
    assert not draw_poses(np.zeros((0, 18, 3)), 100, 100).any()


@pytest.mark.parametrize("x", [float("nan"), float("inf"), 1e12])
def test_joints_that_are_nowhere_are_refused(x: float) -> None:
    pose = np.zeros((18, 3))
    pose[3] = (x, 1, 1)
    with pytest.raises(ValueError, match="joint 3 of a pose lies at"):
        draw_poses([pose], 100, 100)


def test_unknown_styles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown draw style 'v1\.2' \(did you mean 'v1\.1'\?\)"):
        draw_poses([], 10, 10, style="v1.2")


# --- joints ---


def test_coco_keypoints_find_their_place() -> None:
    coco, openpose = COCO_17.split(), OPENPOSE_18.split()
    keypoints = np.array([[i + 1, 100 + i, 0.9] for i in range(17)])
    keypoints[coco.index("right_shoulder"), 2] = 0.5
    pose = coco17_to_openpose18(keypoints)
    for name, joint in zip(openpose, pose, strict=True):
        if name != "neck":
            np.testing.assert_array_equal(joint, keypoints[coco.index(name)])
    np.testing.assert_allclose(pose[1], [6.5, 105.5, 0.5])  # between the shoulders, with the lower score


@pytest.mark.parametrize("shoulder", [5, 6])
def test_no_neck_without_both_shoulders(shoulder: int) -> None:
    keypoints = np.ones((17, 3))
    keypoints[shoulder, 2] = 0
    pose = coco17_to_openpose18(keypoints)
    assert (pose[1] == 0).all()
    assert (pose[:, 2] > 0).sum() == 16
    assert (pose[pose[:, 2] == 0] == 0).all()


# --- JSON ---


def test_poses_survive_json(tmp_path: Path) -> None:
    people = as_poses(some_people(np.random.default_rng(0), 3), 640, 480)
    write_poses(tmp_path / "pose.json", Poses(people, 640, 480))
    read = read_poses(tmp_path / "pose.json")
    np.testing.assert_array_equal(read.people, people)
    assert (read.width, read.height) == (640, 480)
    obj = json.loads((tmp_path / "pose.json").read_text())
    assert len(obj["people"][0]["pose_keypoints_2d"]) == 54
    (tmp_path / "list.json").write_text(json.dumps([obj]))  # as editors for node graphs write it
    np.testing.assert_array_equal(read_poses(tmp_path / "list.json").people, people)


def test_nobody_survives_json(tmp_path: Path) -> None:
    write_poses(tmp_path / "pose.json", Poses(np.zeros((0, 18, 3)), 64, 48))
    assert read_poses(tmp_path / "pose.json").people.shape == (0, 18, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not a JSON file"),
        ("[]", "OpenPose's format"),
        ('{"people": 3}', "OpenPose's format"),
        ('{"people": [3], "canvas_width": 4, "canvas_height": 4}', r"people\[0\] has no list"),
        ('{"people": [{"pose_keypoints_2d": [1, 2]}]}', "has 0.666667 joints"),
        (json.dumps({"people": [{"pose_keypoints_2d": [1] * 51}]}), "has 17 joints"),
        (json.dumps({"people": [{"pose_keypoints_2d": ["a"] * 54}]}), "not a finite number"),
        ('{"people": [{"pose_keypoints_2d": [' + "NaN," * 53 + "1]}]}", "not a finite number"),
        ('{"people": [], "canvas_height": 4}', "no canvas_width"),
        ('{"people": [], "canvas_width": 4, "canvas_height": 0}', "no canvas_height"),
    ],
)
def test_other_json_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pose.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_poses(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_json_is_said() -> None:
    with pytest.raises(ValueError, match=r"no\.json cannot be read: No such file"):
        read_poses("no.json")


# --- decoding ---


def gaussians(centres: np.ndarray, *, height: int = 64, width: int = 48, sigma: float = 2.0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    distance2 = (x - centres[:, 0, None, None]) ** 2 + (y - centres[:, 1, None, None]) ** 2
    return np.exp(-distance2 / (2 * sigma**2)).astype(np.float32)


def test_gaussians_are_found_between_cells() -> None:
    rng = np.random.default_rng(0)
    centres = rng.uniform([6, 6], [42, 58], (50, 2))
    decoded = decode_heatmaps(gaussians(centres))
    assert np.abs(decoded[:, :2] - centres).max() < 0.01  # in cells
    assert decoded[:, 2].min() > 0.9


def test_clean_peaks_are_decoded_as_transformers_does() -> None:
    pytest.importorskip("scipy")
    from transformers.models.vitpose import image_processing_vitpose as theirs

    rng = np.random.default_rng(1)
    heatmaps = gaussians(rng.uniform([0, 0], [47, 63], (17, 2))) * rng.uniform(0.2, 1, (17, 1, 1))
    heatmaps = (heatmaps + rng.uniform(0, 0.005, heatmaps.shape)).astype(np.float32)
    coordinates, scores = theirs.get_keypoint_predictions(heatmaps[None])
    refined = theirs.post_dark_unbiased_data_processing(coordinates.copy(), heatmaps[None], kernel=11)
    clean = np.abs(refined - coordinates).max(axis=-1)[0] <= 1
    assert clean.sum() >= 12
    decoded = decode_heatmaps(heatmaps)
    np.testing.assert_allclose(decoded[clean, :2], refined[0, clean], atol=2e-3)
    np.testing.assert_array_equal(decoded[:, 2], scores[0, :, 0])


def test_empty_heatmaps_have_score_zero() -> None:
    assert (decode_heatmaps(np.zeros((17, 8, 8), np.float32)) == 0).all()
    assert (decode_heatmaps(np.full((17, 8, 8), -0.1, np.float32)) == 0).all()


# --- networks ---


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_pose_model(folder / "crops", width=96, height=128, crops_boxes=True)
    save_pose_model(folder / "thirteen", keypoints=13)
    save_spot_finder(folder / "spot")
    save_person_detector(folder / "people")
    return folder


@pytest.mark.parametrize(("width", "height"), [(128, 128), (256, 128), (96, 320)])
def test_joints_land_where_the_network_saw_them(models: Path, width: int, height: int) -> None:
    picture = np.zeros((height, width, 3), np.uint8)
    left, top = width * 3 // 8, height * 5 // 8  # patch (3, 5) of 8 x 8
    picture[top : top + height // 8, left : left + width // 8] = 255
    made = preprocessors.get("openpose", model=str(models / "spot"))(picture)
    assert made.poses is not None
    assert (made.poses.width, made.poses.height) == (width, height)
    (pose,) = made.poses.people
    centre = [left + width / 16, top + height / 16]
    np.testing.assert_allclose(pose[:, :2], np.broadcast_to(centre, (18, 2)), atol=width / 128)
    np.testing.assert_array_equal(made.image, draw_poses([pose], width, height))


def test_the_map_says_what_it_is(models: Path) -> None:
    made = preprocessors.get("openpose", model=str(models / "spot"), threshold=0.2)(data.astronaut()[:200])
    assert made.image.shape == (200, 512, 3)
    assert (made.kind, made.polarity, made.model) == ("openpose", "openpose-18", str(models / "spot"))
    assert made.params == {"threshold": 0.2, "style": "v1.1", "hands": False, "face": False}


def test_nobody_gives_a_black_map(models: Path) -> None:
    extract = preprocessors.get("openpose", model=str(models / "spot"))
    with pytest.warns(UserWarning, match="^no person was found: the openpose map is black$"):
        made = extract(np.zeros((64, 64, 3), np.uint8))
    with pytest.warns(UserWarning, match="^no person was found in 2 of 2 pictures"):
        extract(np.zeros((2, 64, 64, 3), np.uint8))
    assert made.poses is not None
    assert made.poses.people.shape == (0, 18, 3)
    assert made.image.shape == (64, 64, 3)
    assert not made.image.any()


def test_boxes_are_cut_as_transformers_does(models: Path) -> None:
    pytest.importorskip("scipy")
    from transformers import VitPoseForPoseEstimation, VitPoseImageProcessor

    picture = data.astronaut()
    boxes = np.array([[150.0, 60.0, 200.0, 300.0], [30.0, 300.0, 120.0, 90.0]])  # inside, also when enlarged
    theirs = VitPoseImageProcessor.from_pretrained(models / "crops")
    model = VitPoseForPoseEstimation.from_pretrained(models / "crops").eval()
    pixel_values = theirs(picture, boxes=[boxes.tolist()], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values)
    expected = theirs.post_process_pose_estimation(output, boxes=[boxes.tolist()])[0]
    ours = VitPose(models / "crops", device="cpu").keypoints(picture, boxes)
    assert ours.shape == (2, 17, 3)
    scores = np.array([person["scores"].numpy() for person in expected])
    scores = np.maximum(scores, 0.0)  # a peak that is not positive is no joint: ours scores it 0
    np.testing.assert_allclose(ours[..., 2], scores, atol=1e-3 * np.abs(scores).max())
    joints = np.array([person["keypoints"].numpy() for person in expected])
    distance = np.linalg.norm(ours[..., :2] - joints, axis=-1)
    assert (distance < 0.05).mean() > 0.75  # pixels; a random network has peaks without a clean maximum, too


def test_people_are_found_first_where_the_network_wants_boxes(models: Path) -> None:
    picture = data.astronaut()
    detector = PersonDetector(str(models / "people"), device="cpu")
    boxes = detector.boxes(picture)
    assert boxes.shape[1] == 4
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 512).all()
    extract = preprocessors.get(
        "openpose", model=str(models / "crops"), detector=str(models / "people"), threshold=0
    )
    made = extract(picture)
    assert made.poses is not None
    assert len(made.poses.people) == len(boxes)


def test_a_detector_must_know_people(tmp_path: Path) -> None:
    save_person_detector(tmp_path, labels=("cat", "dog"))
    with pytest.raises(ValueError, match="has no label 'person'"):
        PersonDetector(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "vitpos"}, r"no pose model called 'vitpos' \(did you mean 'vitpose'\?\)"),
        (
            {"model": "vitpose"},
            "usyd-community/vitpose-base-simple.* not in the cache .*'tiny' needs no network",
        ),
        ({"threshold": 1.5}, r"threshold is 1\.5; it must lie in \[0, 1\]"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"model": "tiny", "detector": "x/y"}, "the pose model tiny finds the people by itself"),
        ({"model": "openpose", "detector": "x/y"}, "the pose model openpose finds the people by itself"),
        ({"style": "v9"}, "unknown draw style 'v9'"),
        ({"threshold": "high"}, r"threshold is high; it must lie in \[0, 1\], or be auto"),
        ({"model": "tiny", "hands": "yes"}, "tiny knows neither hands nor faces; model=openpose does"),
        ({"modle": "tiny"}, r"unknown openpose option 'modle' \(did you mean 'model'\?\)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preprocessors.get("openpose", **options)
    assert "\n" not in str(caught.value)


def test_broken_folders_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 13 keypoints; COCO's 17 are wanted"):
        preprocessors.get("openpose", model=str(models / "thirteen"))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        preprocessors.get("openpose", model=str(tmp_path))
    save_pose_model(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 3}')
    with pytest.raises(ValueError, match="does not describe a pose network's input"):
        preprocessors.get("openpose", model=str(tmp_path))
    save_pose_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is cut short"):
        preprocessors.get("openpose", model=str(tmp_path))

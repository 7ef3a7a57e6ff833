"""Poses in and out of other people's JSON, and changed."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_detectors import save_pose_model

from controlkit import preprocessors
from controlkit.preprocessors import (
    Poses,
    crop_poses,
    drop_limbs,
    drop_people,
    drop_random_limbs,
    jitter_poses,
    keep_people,
    mirror_poses,
    move_person,
    poses_to_map,
    read_poses,
    scale_poses,
    write_poses,
)
from controlkit.preprocessors.skeleton import FACE_MIRROR, coco17_to_openpose18, coco133_to_openpose

R_SHOULDER, R_ELBOW, R_WRIST, L_SHOULDER, L_ELBOW, L_WRIST = 2, 3, 4, 5, 6, 7
_LIMBS = "Shoulder", "Elbow", "Wrist"
_HEAD = ["REye", "LEye", "REar", "LEar"]
_ARMS = ["Nose", "Neck", *("R" + name for name in _LIMBS), *("L" + name for name in _LIMBS)]
_LEGS = ["RHip", "RKnee", "RAnkle", "LHip", "LKnee", "LAnkle"]
_FEET = ["LBigToe", "LSmallToe", "LHeel", "RBigToe", "RSmallToe", "RHeel"]
BODY_25 = [*_ARMS, "MidHip", *_LEGS, *_HEAD, *_FEET]
BODY_18 = [*_ARMS, *_LEGS, *_HEAD]


def some_poses(count: int = 2, *, width: int = 400, height: int = 300, whole: bool = False) -> Poses:
    rng = np.random.default_rng(count)

    def points(*shape: int) -> np.ndarray:
        made = rng.uniform([0, 0, 0.5], [width - 1, height - 1, 1], (*shape, 3))
        if whole:
            made[..., :2] = np.floor(made[..., :2])
        made[rng.uniform(size=shape) < 0.2] = 0
        return made

    return Poses(points(count, 18), width, height, hands=points(count, 2, 21), faces=points(count, 70))


def same(one: Poses, other: Poses) -> None:
    np.testing.assert_array_equal(one.people, other.people)
    np.testing.assert_array_equal(one.hands, other.hands)
    np.testing.assert_array_equal(one.faces, other.faces)
    assert (one.width, one.height) == (other.width, other.height)


# --- JSON ---


@pytest.mark.parametrize("count", [0, 1, 3])
def test_hands_and_faces_survive_json(tmp_path: Path, count: int) -> None:
    poses = some_poses(count)
    poses.hands[:1, 0] = 0  # a hand that is absent
    write_poses(tmp_path / "pose.json", poses)
    same(read_poses(tmp_path / "pose.json"), poses)


def read(tmp_path: Path, obj: Any, **size: int) -> Poses:
    (tmp_path / "pose.json").write_text(json.dumps(obj))
    return read_poses(tmp_path / "pose.json", **size)


def test_what_openpose_itself_writes(tmp_path: Path) -> None:
    """--write_json: version, person_id, BODY_25, 3D lists that are empty, and no size of the canvas."""
    body = [[10.5 + i, 20.25 + i, 0.5] for i in range(25)]
    person = {
        "person_id": [-1],
        "pose_keypoints_2d": np.ravel(body).tolist(),
        "face_keypoints_2d": [],
        "hand_left_keypoints_2d": [1.5] * 63,
        "hand_right_keypoints_2d": [],
        "pose_keypoints_3d": [],
        "face_keypoints_3d": [],
    }
    obj = {"version": 1.3, "people": [person]}
    with pytest.raises(ValueError, match=r"no canvas_width .*: as width, of the command line as --canvas"):
        read(tmp_path, obj)
    poses = read(tmp_path, obj, width=640, height=480)
    assert (poses.width, poses.height) == (640, 480)
    for name, joint in zip(BODY_18, poses.people[0], strict=True):
        assert joint.tolist() == body[BODY_25.index(name)]
    assert (poses.hands[0, 0] == 1.5).all()
    assert not poses.hands[0, 1].any()
    assert not poses.faces.any()
    assert read(tmp_path, {"version": 1.3, "people": []}, width=9, height=9).people.shape == (0, 18, 3)


def test_what_the_a1111_extension_writes(tmp_path: Path) -> None:
    """A list of one, whole numbers, null for what is absent, animals."""
    person = {
        "pose_keypoints_2d": [100, 50, 1] * 17 + [0, 0, 0],
        "hand_right_keypoints_2d": None,
        "hand_left_keypoints_2d": None,
        "face_keypoints_2d": None,
    }
    obj = [{"people": [person], "animals": [], "canvas_height": 512, "canvas_width": 768.0}]
    poses = read(tmp_path, obj)
    assert (poses.width, poses.height) == (768, 512)
    assert poses.people[0, :17].tolist() == [[100, 50, 1]] * 17
    assert not poses.people[0, 17].any()
    assert read(tmp_path, obj, width=5, height=5).width == 768  # what the file says comes first


def test_what_the_a1111_openpose_editor_saves(tmp_path: Path) -> None:
    """Its size, and the joints of everybody in one list, without a score."""
    points = np.random.default_rng(1).integers(0, 500, (36, 2))
    poses = read(tmp_path, {"width": 512, "height": 768, "keypoints": points.tolist()})
    assert (poses.width, poses.height) == (512, 768)
    np.testing.assert_array_equal(poses.people[..., :2], points.reshape(2, 18, 2))
    assert (poses.people[..., 2] == 1).all()


def test_fractions_of_the_canvas_are_recognised(tmp_path: Path) -> None:
    """ComfyUI's nodes keep coordinates in [0, 1]."""
    person = {
        "pose_keypoints_2d": [0.5, 0.25, 1.0, 0.0, 1.0, 1.0] + [0.0, 0.0, 0.0] * 16,
        "face_keypoints_2d": [0.125, 0.5, 1.0] * 68,
    }
    poses = read(tmp_path, {"people": [person], "canvas_height": 400, "canvas_width": 800})
    assert poses.people[0, :3].tolist() == [[400, 100, 1], [0, 400, 1], [0, 0, 0]]
    assert (poses.faces[0, :68] == [100, 200, 1]).all()
    assert not poses.faces[0, 68:].any()  # the pupils: 68 points have none, and this body has no eyes
    for outside in ([0.25, 1.015625, 1.0], [-0.015625, 0.5, 1.0]):  # a person that is cut off
        cut = {"pose_keypoints_2d": [0.5, 0.25, 1.0] + outside + [0.0, 0.0, 0.0] * 16}
        poses = read(tmp_path, {"people": [cut], "canvas_height": 400, "canvas_width": 800})
        assert poses.people[0, 0].tolist() == [400, 100, 1]
        assert poses.people[0, 1, :2].tolist() == [800 * outside[0], 400 * outside[1]]
    whole = {"pose_keypoints_2d": [1, 1, 1] + [0] * 51}
    poses = read(tmp_path, {"people": [whole], "canvas_height": 400, "canvas_width": 800})
    assert poses.people[0, 0].tolist() == [1, 1, 1]  # a pixel


@pytest.mark.parametrize("unit", [(512.0, 300.0), (1.0, 1.0)])
def test_points_of_hands_that_a1111_did_not_find_are_absent(tmp_path: Path, unit: tuple[float, ...]) -> None:
    """It writes them with a score, a pixel before the canvas; however many, nothing counts from -1 to 1."""
    size = np.array([512, 300]) / unit
    nowhere = [*(np.float32(-1) / np.float32(size)).astype(float).tolist(), 1.0]
    beside = [nowhere[0], 150.5 / size[1], 1.0]  # in its first column
    hand = [128 / size[0], 75 / size[1], 1.0] * 3 + beside + nowhere * 17
    person = {"pose_keypoints_2d": [256 / size[0], 150 / size[1], 1.0] * 18, "hand_left_keypoints_2d": hand}
    poses = read(tmp_path, {"people": [person], "canvas_width": 512, "canvas_height": 300})
    np.testing.assert_allclose(poses.people[0], [[256, 150, 1]] * 18)
    np.testing.assert_allclose(poses.hands[0, 0, :3], [[128, 75, 1]] * 3)
    assert not poses.hands[0, 0, 3:].any()


def test_coordinates_from_minus_one_to_one_are_recognised(tmp_path: Path) -> None:
    """OpenPose with --keypoint_scale 4: (-1, -1) is the corner at the top left, (1, 1) the opposite one."""
    place = np.array([[0.1 * n - 0.8, 0.8 - 0.1 * n] for n in range(18)])
    body = np.concatenate([place, np.ones((18, 1))], axis=1)
    body[17] = 0
    right = {"pose_keypoints_2d": [0.5, 0.25, 1.0] * 18}  # nothing of it tells
    people = [{"pose_keypoints_2d": body.ravel().tolist(), "face_keypoints_2d": [-0.5, 0.5, 1.0] * 68}, right]
    poses = read(tmp_path, {"version": 1.3, "people": people}, width=800, height=400)
    np.testing.assert_allclose(poses.people[0, :17, :2], (place[:17] + 1) / 2 * [800, 400], atol=1e-9)
    assert not poses.people[0, 17].any()
    assert (poses.people[1] == [600, 250, 1]).all()
    assert (poses.faces[0, :68] == [200, 300, 1]).all()
    people[1] = {"pose_keypoints_2d": [0.5, 1.25, 1.0] * 18}  # somebody who is cut off by the lower edge
    poses = read(tmp_path, {"people": people}, width=800, height=400)
    assert poses.people[1, 0].tolist() == [400, 500, 1]


def test_one_of_several_pictures_is_read(tmp_path: Path) -> None:
    """ComfyUI writes a list, one object for each picture of a batch."""
    size = {"canvas_width": 100, "canvas_height": 100}
    batch = [{"people": [{"pose_keypoints_2d": [n, n, 1] * 18}], **size} for n in (10, 20)]
    assert read(tmp_path, batch, picture=2).people[0, 0].tolist() == [20, 20, 1]
    assert read(tmp_path, batch[:1], picture=1).people[0, 0].tolist() == [10, 10, 1]
    with pytest.raises(ValueError, match="say which, 1 to 2, as picture, of the command line as --picture"):
        read(tmp_path, batch)
    for wrong in (0, 3):
        with pytest.raises(ValueError, match=f"holds 2 pictures, and no number {wrong}"):
            read(tmp_path, batch, picture=wrong)
    with pytest.raises(ValueError, match="picture 2, has no list 'people'"):
        read(tmp_path, [*batch[:1], 3], picture=2)


def coco_person(seed: int, joints: int = 17) -> np.ndarray:
    """Points (joints, 3) of x, y and a score of at least 0.4, that of the left wrist 0.25."""
    points = np.random.default_rng(seed).uniform(0.4, 1, (joints, 3)) * [200, 200, 1]
    points[9, 2] = 0.25
    return points


def test_what_writes_cocos_keypoints_is_read(tmp_path: Path) -> None:
    """COCO's results, MMPose's and Sapiens' predictions, a video's frames: the same joints from each."""
    points = coco_person(1)
    wanted = coco17_to_openpose18(np.where(points[:, 2:] < 0.3, 0, points))
    assert not wanted[7].any()  # the left wrist
    apart = {"keypoints": points[:, :2].tolist(), "keypoint_scores": points[:, 2].tolist(), "bbox": [[0] * 4]}
    result = {"image_id": 7, "category_id": 1, "keypoints": points.ravel().tolist(), "score": 2.1}
    rows = {"keypoints": points.tolist()}
    for obj in ([result], [apart], [rows], {"meta_info": {}, "instance_info": [apart]}):
        poses = read(tmp_path, obj, width=300, height=200)
        np.testing.assert_array_equal(poses.people, wanted[None])
        assert (poses.width, poses.height) == (300, 200)
    both = [result, {**result, "keypoints": coco_person(2).ravel().tolist()}]
    assert len(read(tmp_path, both, width=300, height=200).people) == 2
    frames = [{"frame_id": n, "instances": [apart] * n} for n in range(3)]
    video = {"instance_info": frames}
    assert len(read(tmp_path, video, width=300, height=200, picture=3).people) == 2
    assert len(read(tmp_path, video, width=300, height=200, picture=1).people) == 0
    found = read(tmp_path, [{"keypoints": [[0, 0], *points[1:, :2].tolist()]}], width=300, height=200)
    assert not found.people[0, 0].any()  # what was not found lies at 0, 0, where nothing else says so
    assert (found.people[0, 1:, 2] == 1).all()


def test_cocos_annotations_are_read_by_picture(tmp_path: Path) -> None:
    """Hidden joints have a place, those not annotated have none; people without joints are left out."""
    points = coco_person(1)
    points[:, 2] = [0, 1, *[2] * 15]
    points[0] = 0
    person = {"image_id": 9, "keypoints": points.ravel().tolist(), "num_keypoints": 16}
    images = [{"id": 4, "width": 640, "height": 480}, {"id": 9, "width": 300, "height": 200}]
    others = [{"image_id": 9, "keypoints": [0] * 51, "iscrowd": 1}, {"image_id": 4, "bbox": [0] * 4}]
    obj = {"images": images, "annotations": [person, *others]}
    poses = read(tmp_path, obj, picture=2)
    assert (poses.width, poses.height) == (300, 200)
    np.testing.assert_array_equal(poses.people, coco17_to_openpose18(np.minimum(points, [999, 999, 1]))[None])
    assert len(read(tmp_path, obj, picture=1).people) == 0
    with pytest.raises(ValueError, match="holds 2 pictures; one is wanted"):
        read(tmp_path, obj)


def test_whole_bodies_of_coco_have_hands_and_faces(tmp_path: Path) -> None:
    points = coco_person(3, 133)
    points[:, 2] = np.where(points[:, 2] < 0.3, 0, 1)
    body, hands, face = coco133_to_openpose(points)
    parts = np.split(points, [17, 23, 91, 112])
    names = ("keypoints", "foot_kpts", "face_kpts", "lefthand_kpts", "righthand_kpts")
    annotation = {name: part.ravel().tolist() for name, part in zip(names, parts, strict=True)}
    for person in ({"keypoints": points.ravel().tolist()}, annotation):
        poses = read(tmp_path, [person], width=300, height=200)
        np.testing.assert_array_equal(poses.people[0], body)
        np.testing.assert_array_equal(poses.hands[0], hands)
        np.testing.assert_array_equal(poses.faces[0], face)
    one_hand = read(tmp_path, [{**annotation, "righthand_kpts": []}], width=300, height=200)
    np.testing.assert_array_equal(one_hand.hands[0, 0], hands[0])
    assert not one_hand.hands[0, 1].any()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([{"people": []}] * 3, "holds 3 pictures; one"),
        ([{"image_id": n, "keypoints": [1] * 51} for n in range(118)], "holds 118 pictures; one is wanted"),
        ([{"keypoints": [1] * 51}, {"bbox": [1] * 4}], "nor in COCO's"),
        ([{"keypoints": [1] * 78}], r"people\[0\] has 26 joints in 'keypoints'; 17 \(COCO\) and 133"),
        ([{"keypoints": [1] * 50}], "is not x, y and a score for each joint"),
        ([{"keypoints": [[1, 1]] * 17, "keypoint_scores": [1] * 16}], "is not x, y and a score"),
        ([{"keypoints": ["left"] * 51}], "is not x, y and a score for each joint"),
        ([{"keypoints": [None] * 51}], "has a number that is not finite"),
        ([{"keypoints": [10**400] * 51}], "is not x, y and a score for each joint"),
        ({"annotations": []}, "nor in COCO's"),
        ({"annotations": [{"keypoints": [1] * 51}], "images": True}, "no canvas_width"),
        ({"width": 9, "height": 9, "keypoints": [[1, 1]] * 17}, "nor in COCO's"),
        ({"width": 9, "height": 9, "keypoints": [["a", 1]] * 18}, "not a finite number"),
        ({"people": [{"face_keypoints_2d": [1] * 210}]}, "no list 'pose_keypoints_2d'"),
        ({"people": [{"pose_keypoints_2d": None, "hand_left_keypoints_2d": [1] * 60}]}, "has 20 points"),
        ({"people": [{"pose_keypoints_2d": [], "face_keypoints_2d": [None] * 210}]}, "not a finite number"),
        ({"people": [{"pose_keypoints_2d": [], "face_keypoints_2d": "all"}]}, "no list 'face_keypoints_2d'"),
        ({"people": [{"pose_keypoints_2d": [True] * 54}]}, "not a finite number"),
        ({"people": [{"pose_keypoints_2d": [10**400] * 54}]}, "not a finite number"),
        ({"people": [], "canvas_width": "640"}, "no canvas_width"),
        ({"people": [], "canvas_width": 640.5}, "no canvas_width"),
    ],
)
def test_other_json_is_refused_in_one_line(tmp_path: Path, obj: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, obj)
    assert "\n" not in str(caught.value)


# --- changes ---


def test_scaled_poses_draw_where_the_larger_picture_shows_them() -> None:
    poses = some_poses()
    large = scale_poses(poses, 800, 900)
    np.testing.assert_allclose(large.people, poses.people * [2, 3, 1])
    np.testing.assert_allclose(large.faces, poses.faces * [2, 3, 1])
    fitted = scale_poses(poses, 800, 900, keep_aspect=True)
    seen = poses.people[..., 2] > 0
    np.testing.assert_allclose(fitted.people[seen], (poses.people * [2, 2, 1] + [0, 150, 0])[seen])
    assert not fitted.people[~seen].any()
    assert scale_poses(poses, 400, 300) is poses


@pytest.mark.parametrize("whole", [True, False])
def test_a_mirrored_pose_is_drawn_as_the_mirrored_people(whole: bool) -> None:
    poses = some_poses(3, whole=whole)
    mirrored = mirror_poses(poses)
    same_place = mirror_poses(mirrored)
    np.testing.assert_allclose(same_place.people, poses.people, atol=1e-9)
    np.testing.assert_allclose(same_place.hands, poses.hands, atol=1e-9)
    np.testing.assert_allclose(same_place.faces, poses.faces, atol=1e-9)
    # Points of faces have one colour: their picture is flipped to the pixel.
    if not whole:
        parts = Poses(np.zeros((3, 18, 3)), 400, 300, faces=poses.faces)
        flipped, before = (poses_to_map(faces).image for faces in (mirror_poses(parts), parts))
        inner = np.s_[:, 5:-5]  # at x = 0 a point counts as absent
        np.testing.assert_array_equal(flipped[inner], before[:, ::-1][inner])
    left, right = mirrored.people[0, L_WRIST], poses.people[0, R_WRIST]
    assert left[1:].tolist() == right[1:].tolist()
    if right[2]:
        assert math.floor(left[0]) == 399 - math.floor(right[0])
        assert not whole or left[0] == 399 - right[0]
    assert mirrored.hands[1, 0, 4, 1] == poses.hands[1, 1, 4, 1]


def test_a_face_mirrors_into_itself() -> None:
    assert sorted(FACE_MIRROR) == list(range(70))
    assert [FACE_MIRROR[FACE_MIRROR[i]] for i in range(70)] == list(range(70))
    fixed = [i for i in range(70) if FACE_MIRROR[i] == i]
    assert fixed == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]  # chin, bridge of the nose, middle of the lips
    assert [FACE_MIRROR[i] for i in (0, 17, 21, 31, 36, 39, 40, 48, 55, 60, 65, 68)] == [
        16, 26, 22, 35, 45, 42, 47, 54, 59, 64, 67, 69,
    ]  # fmt: skip


def test_one_person_moves() -> None:
    poses = some_poses()
    moved = move_person(poses, 1, dx=10, dy=-5)
    np.testing.assert_array_equal(moved.people[0], poses.people[0])
    seen = poses.hands[1][..., 2] > 0
    np.testing.assert_allclose(moved.hands[1][seen], (poses.hands[1] + [10, -5, 0])[seen])
    assert not moved.hands[1][~seen].any()
    half = move_person(poses, 0, scale=0.5)
    spread = [np.ptp(p.faces[0][p.faces[0][:, 2] > 0][:, 0]) for p in (poses, half)]
    assert spread[1] == pytest.approx(spread[0] / 2)
    with pytest.raises(ValueError, match="no person 2: the poses have 2"):
        move_person(poses, 2)
    with pytest.raises(ValueError, match="scaled by 0"):
        move_person(poses, 0, scale=0)


def test_jitter_is_noise_that_a_seed_repeats() -> None:
    poses = some_poses(40)
    one, other = (jitter_poses(poses, np.random.default_rng(3), 2.0) for _ in range(2))
    same(one, other)
    seen = poses.people[..., 2] > 0
    shift = (one.people - poses.people)[seen][:, :2]
    assert shift.std() == pytest.approx(2.0, rel=0.1)
    assert not one.people[~seen].any()
    seen_hand = (poses.hands[:, 0, :, 2] > 0) & (poses.people[:, L_WRIST, 2:] > 0)
    of_hand = (one.hands - poses.hands)[:, 0]
    of_wrist = (one.people - poses.people)[:, L_WRIST]
    for person in range(40):
        np.testing.assert_allclose(
            of_hand[person][seen_hand[person]],
            np.tile(of_wrist[person], (seen_hand[person].sum(), 1)),
            atol=1e-9,
        )
    same(jitter_poses(poses, np.random.default_rng(0), 0.0), poses)
    with pytest.raises(ValueError, match="jitter is -1 pixels"):
        jitter_poses(poses, np.random.default_rng(0), -1)


def test_limbs_are_dropped_by_name() -> None:
    poses = some_poses()
    dropped = drop_limbs(poses, ["left-arm", "face"], people=[1])
    np.testing.assert_array_equal(dropped.people[0], poses.people[0])
    assert not dropped.people[1, [L_ELBOW, L_WRIST]].any()
    np.testing.assert_array_equal(dropped.people[1, L_SHOULDER], poses.people[1, L_SHOULDER])
    assert not dropped.hands[1, 0].any()
    assert dropped.hands[1, 1].any()
    assert not dropped.faces[1].any()
    assert not drop_limbs(poses, "right-hand").hands[:, 1].any()
    with pytest.raises(ValueError, match=r"unknown limb 'left-amr' \(did you mean 'left-arm'\?\)"):
        drop_limbs(poses, ["left-amr"])
    with pytest.raises(ValueError, match="no person 7"):
        drop_limbs(poses, ["face"], people=[7])


def test_limbs_are_dropped_at_random() -> None:
    poses = some_poses(200)
    poses.people[..., 2] = 1
    dropped = drop_random_limbs(poses, np.random.default_rng(0), 0.3)
    gone = dropped.people[..., 2] == 0
    assert gone[:, L_ELBOW].mean() == pytest.approx(0.3, abs=0.1)
    assert (gone[:, L_ELBOW] == gone[:, L_WRIST]).all()
    assert not gone[:, [1, 2, 5, 8, 11]].any()
    same(drop_random_limbs(poses, np.random.default_rng(0), 0.0), poses)
    with pytest.raises(ValueError, match="from 0 to 1, not 2"):
        drop_random_limbs(poses, np.random.default_rng(0), 2)


def test_people_are_kept_and_dropped() -> None:
    poses = some_poses(3)
    np.testing.assert_array_equal(keep_people(poses, [2, 0]).faces, poses.faces[[2, 0]])
    np.testing.assert_array_equal(drop_people(poses, [1]).hands, poses.hands[[0, 2]])
    assert keep_people(poses, []).people.shape == (0, 18, 3)
    with pytest.raises(ValueError, match="no person -1"):
        drop_people(poses, [-1])


def test_a_crop_sees_what_a_cropped_picture_shows() -> None:
    poses = some_poses(2)
    poses.people[1], poses.hands[1], poses.faces[1] = 0, 0, 0
    poses.people[1, 0] = 10, 10, 1
    cropped = crop_poses(poses, 100, 50, 200, 150)
    assert (cropped.width, cropped.height) == (200, 150)
    assert len(cropped.people) == 1  # the other had only a joint outside
    x, y, score = poses.people[0].T
    inside = (x >= 100) & (x < 300) & (y >= 50) & (y < 200) & (score > 0)
    assert 0 < inside.sum() < 18
    np.testing.assert_allclose(cropped.people[0][inside], (poses.people[0] - [100, 50, 0])[inside])
    assert not cropped.people[0][~inside].any()
    whole = crop_poses(poses, 100, 50, 200, 150, keep_outside=True)
    assert len(whole.people) == 2
    assert whole.people[1, 0].tolist() == [-90, -40, 1]
    with pytest.raises(ValueError, match="0 x 5 pixels has no room"):
        crop_poses(poses, 0, 0, 0, 5)


# --- COCO-WholeBody ---


def test_wholebody_keypoints_find_their_place() -> None:
    keypoints = np.array([[i, 1000 + i, 0.9] for i in range(133)])
    keypoints[100, 2] = 0
    body, hands, face = coco133_to_openpose(keypoints)
    assert body[0].tolist() == [0, 1000, 0.9]
    assert hands[0, 0, 0] == 91  # left wrist
    assert hands[1, 20, 0] == 132
    assert not hands[0, 9].any()
    assert face[0, 0] == 23
    assert face[67, 0] == 90
    assert face[68:, 0].tolist() == [2, 1]  # COCO's right eye is its third point, the left its second


def test_a_wholebody_network_gives_hands_and_faces(tmp_path: Path) -> None:
    save_pose_model(tmp_path, keypoints=133)
    picture = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    options = {"model": str(tmp_path), "threshold": 0.0}
    whole = preprocessors.get("openpose", **options, hands=True, face=True)(picture)
    body = preprocessors.get("openpose", **options)(picture)
    assert whole.poses is not None
    assert body.poses is not None
    assert whole.poses.hands.any()
    assert whole.poses.faces.any()
    assert not body.poses.hands.any()
    np.testing.assert_array_equal(whole.poses.people, body.poses.people)
    assert (whole.image != body.image).any()


def test_people_may_be_numbered_by_whatever_counts() -> None:
    poses = Poses(np.arange(3 * 18 * 3, dtype=np.float64).reshape(3, 18, 3) + 1, 64, 64)
    for numbers in ([2, 0], iter([2, 0]), np.array([2, 0]), (k for k in (2, 0))):
        np.testing.assert_array_equal(keep_people(poses, numbers).people, poses.people[[2, 0]])
    np.testing.assert_array_equal(drop_people(poses, iter([1])).people, poses.people[[0, 2]])
    without = drop_limbs(poses, ["head"], people=iter([1])).people
    np.testing.assert_array_equal((without != poses.people).any(axis=(1, 2)), [False, True, False])
    for people in (["0"], [0.0], np.array([True, False, True])):  # which select nobody by number
        with pytest.raises(ValueError, match="there is no person"):
            keep_people(poses, people)
    with pytest.raises(ValueError, match=r"people is a list of numbers, as \[0\], not an int"):
        drop_people(poses, 0)  # type: ignore[arg-type]


def test_poses_are_made_of_lists_and_of_nothing_else_than_poses() -> None:
    person = np.arange(54.0).reshape(18, 3)
    poses = Poses([person.tolist()], 8, 8)  # type: ignore[arg-type]
    np.testing.assert_array_equal(poses.people, person[None])
    assert poses.people.dtype == np.float64
    assert Poses([], 8, 8).people.shape == (0, 18, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"poses of 1 people have people \(1, 18, 3\), not \(1, 17, 3\)"):
        Poses(np.zeros((1, 17, 3)), 8, 8)
    with pytest.raises(ValueError, match=r"have hands \(1, 2, 21, 3\), not \(1, 21, 3\)"):
        Poses(person[None], 8, 8, hands=np.zeros((1, 21, 3)))
    for width in (0, 7.5):
        with pytest.raises(ValueError, match=f"a canvas of {width} x 8 pixels has no room"):
            Poses(person[None], width, 8)  # type: ignore[arg-type]
    np.testing.assert_array_equal(coco17_to_openpose18(np.ones((17, 3)).tolist()), np.ones((18, 3)))
    for convert, count in ((coco17_to_openpose18, 17), (coco133_to_openpose, 133)):
        with pytest.raises(ValueError, match=rf"keypoints are \({count}, 3\) numbers: x, y, score; not"):
            convert(np.ones((count + 1, 3)))

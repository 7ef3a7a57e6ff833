"""OpenPose's networks and decoding against controlnet_aux: the same joints, people, hands and faces."""

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pose_networks import bodies_of, fixed_body, network_output, save_network, save_openpose
from skimage import data

from controlkit import preprocessors
from controlkit.preprocessors import openposenet
from controlkit.preprocessors.annotators import import_annotator
from controlkit.preprocessors.gridmaps import _smoothed
from controlkit.preprocessors.handface import decode_face, decode_hand, face_box, hand_boxes, hand_inputs
from controlkit.preprocessors.limbs import decode_people, grid_of
from controlkit.preprocessors.openposenet import OpenPoseNet


@pytest.fixture(scope="module")
def aux() -> Any:
    return import_annotator("open_pose")


@pytest.fixture(scope="module")
def weights(aux: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_openpose(tmp_path_factory.mktemp("openpose"), import_annotator("open_pose.model"))


@pytest.fixture(autouse=True)
def no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openposenet, "_noticed", {"said"})


def theirs(body: Any, heatmaps: np.ndarray, fields: np.ndarray, height: int, width: int) -> np.ndarray:
    body.says = heatmaps, fields
    return bodies_of(body, *body(np.zeros((height, width, 3), np.uint8)))


def check_one(body: Any, heatmaps: np.ndarray, fields: np.ndarray, height: int, width: int) -> int:
    """Compare both decodings; return the number of people."""
    expected = theirs(body, heatmaps, fields, height, width)
    found = decode_people(heatmaps, fields, grid_of(height, width))
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found[..., :2], expected[..., :2])
    np.testing.assert_allclose(found[..., 2], expected[..., 2], rtol=0, atol=1e-6)
    return len(found)


def check_many(aux: Any, seeds: range) -> None:
    body, people = fixed_body(aux), 0
    for seed in seeds:
        rng = np.random.default_rng(seed)
        height, width = rng.integers(48, 420, 2).tolist()
        noise, hidden = rng.choice([0, 0.005, 0.02, 0.05]), rng.choice([0, 0.15, 0.4])
        cells = grid_of(height, width).cells
        output = network_output(rng, *cells, int(rng.integers(1, 9)), noise=noise, hidden=hidden)
        people += check_one(body, *output, height, width)
    assert people > 2 * len(seeds)


def test_people_are_those_of_controlnet_aux(aux: Any) -> None:
    check_many(aux, range(24))


@pytest.mark.slow
def test_people_are_those_of_controlnet_aux_many_times(aux: Any) -> None:
    check_many(aux, range(100, 400))


@pytest.mark.parametrize(
    ("height", "width"),
    [(512, 512), (184, 184), (368, 640), (60, 45), pytest.param(1024, 768, marks=pytest.mark.slow)],
)
def test_people_at_sizes_that_are_special(aux: Any, height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    output = network_output(rng, *grid_of(height, width).cells, 3, hidden=0.1)
    assert check_one(fixed_body(aux), *output, height, width) > 0


def test_ties_are_broken_alike(aux: Any) -> None:
    """Maps without noise, the same to the left and right: two pixels are highest, limbs score the same."""
    rng, height, width = np.random.default_rng(3), 368, 368
    high, wide = grid_of(height, width).cells
    heatmaps, fields = network_output(rng, high, wide, 2, noise=0, hidden=0)
    flat = np.round(heatmaps * 4) / 4  # plateaus
    for maps in (heatmaps, flat):
        symmetric = np.maximum(maps, maps[:, :, ::-1])
        along_x = np.arange(38) % 2 == 0
        mirrored = np.where(along_x[:, None, None], -fields[:, :, ::-1], fields[:, :, ::-1])
        assert check_one(fixed_body(aux), symmetric, fields + mirrored, height, width) >= 1
    moved = np.maximum(heatmaps, np.roll(heatmaps, wide // 2, axis=2))  # the same people twice
    twice = fields + np.roll(fields, wide // 2, axis=2)
    assert check_one(fixed_body(aux), moved, twice, height, width) >= 1


def test_nobody_is_found_in_nothing(aux: Any) -> None:
    grid = grid_of(100, 100)
    empty = np.zeros((19, *grid.cells), np.float32), np.zeros((38, *grid.cells), np.float32)
    assert check_one(fixed_body(aux), *empty, 100, 100) == 0
    broken = np.full_like(empty[0], np.nan)
    assert decode_people(broken, empty[1], grid).shape == (0, 18, 3)


def test_doubtful_peaks_are_smoothed_as_scipy_does() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    full = np.random.default_rng(0).uniform(size=(40, 9))  # narrower than the Gaussian is wide
    y, x = (index.ravel() for index in np.indices(full.shape))
    smoothed = _smoothed(full, x, y).reshape(full.shape)
    np.testing.assert_array_equal(smoothed, ndimage.gaussian_filter(full, sigma=3))


# --- networks ---


@pytest.mark.slow
def test_photographs_give_the_same_people_and_map(aux: Any, weights: Path) -> None:
    detector = aux.OpenposeDetector(aux.body.Body(weights / "body_pose_model.pth"))
    extract = preprocessors.get("openpose", model=str(weights), device="cpu")
    photograph = np.ascontiguousarray(data.astronaut()[:300])
    made = extract(photograph)
    found = detector.detect_poses(photograph)
    assert len(found) > 4
    assert made.poses is not None
    assert len(made.poses.people) == len(found)
    for pose, person in zip(found, made.poses.people, strict=True):
        expected = [(0, 0) if k is None else (k.x, k.y) for k in pose.body.keypoints]
        np.testing.assert_array_equal(person[:, :2] / [512, 300], expected)
    drawn = aux.draw_poses(found, 300, 512, draw_hand=False, draw_face=False)
    np.testing.assert_array_equal(made.image, drawn)
    assert (made.model, made.params["threshold"]) == (str(weights), 0.0)


@pytest.mark.slow
def test_another_resolution_moves_the_joints_and_draws_at_full_size(weights: Path) -> None:
    photograph = np.ascontiguousarray(data.astronaut()[:300])
    made = preprocessors.get("openpose", model=str(weights), device="cpu", resolution=128)(photograph)
    assert made.poses is not None
    assert made.image.shape == (300, 512, 3)
    assert (made.poses.width, made.poses.height) == (512, 300)
    assert len(made.poses.people) > 0
    assert made.params["resolution"] == 128
    expected = preprocessors.draw_poses(made.poses.people, 512, 300)
    np.testing.assert_array_equal(made.image, expected)


def small_network(channels: int, *, gain: float = 1.0) -> torch.nn.Module:
    """Return a network of OpenPose's shape, a cell per 8 x 8 pixels, that takes a moment, not a minute."""
    torch.manual_seed(channels)
    first, last = torch.nn.Conv2d(3, 16, 8, stride=8), torch.nn.Conv2d(16, channels, 3, padding=1)
    with torch.no_grad():
        first.weight *= 8
        last.weight *= gain
    return torch.nn.Sequential(first, torch.nn.Tanh(), last).eval().requires_grad_(False)


class Stages(torch.nn.Module):
    """The face network answers with the maps of all its stages."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, picture: torch.Tensor) -> list[torch.Tensor]:
        return [self.network(picture)]


def some_body(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    body = np.zeros((18, 3))
    body[:, :2] = np.rint(rng.uniform([0, 0], [width - 1, height - 1], (18, 2)))
    body[:, 2] = rng.uniform(size=18) < 0.85
    return body * body[:, 2:]


def aux_body(aux: Any, body: np.ndarray) -> Any:
    keypoints = [aux.body.Keypoint(float(x), float(y)) if score else None for x, y, score in body]
    return aux.body.BodyResult(keypoints, 1.0, 18)


def test_boxes_of_hands_and_faces_are_those_of_controlnet_aux(aux: Any) -> None:
    rng, counts = np.random.default_rng(0), np.zeros(3, int)
    for _ in range(400):
        height, width = rng.integers(30, 700, 2).tolist()
        body = some_body(rng, height, width)
        picture = np.zeros((height, width, 3), np.uint8)
        expected = {is_left: box for *box, is_left in aux.util.handDetect(aux_body(aux, body), picture)}
        left, right = hand_boxes(body, height, width)
        face = face_box(body, height, width)
        assert (left and list(left), right and list(right)) == (expected.get(True), expected.get(False))
        assert face == aux.util.faceDetect(aux_body(aux, body), picture)
        counts += [box is not None for box in (left, right, face)]
    assert (counts > 100).all()


@pytest.mark.slow
def test_hands_and_faces_are_those_of_controlnet_aux(aux: Any, weights: Path) -> None:
    ours = OpenPoseNet(str(weights), hands=False, face=False, device="cpu")
    hand, face = small_network(22, gain=0.3), Stages(small_network(71))
    ours._hand, ours._face = hand, face
    detector = aux.OpenposeDetector(None, object.__new__(aux.Hand), object.__new__(aux.Face))
    detector.hand_estimation.model, detector.face_estimation.model = hand, face
    picture = np.ascontiguousarray(data.astronaut()[:, :, ::-1])
    rng, present = np.random.default_rng(5), np.zeros(3, int)
    for _ in range(3):
        body = some_body(rng, 512, 512)
        sides = detector.detect_hands(aux_body(aux, body), picture)
        for k, (found, expected) in enumerate(
            zip(ours._hands([picture], [body[None]])[0][0], sides, strict=True)
        ):
            present[k] += check_points(found, expected)
        whole = detector.detect_face(aux_body(aux, body), picture)
        expected = None if whole is None else whole[:70]  # the 71st is the background
        present[2] += check_points(ours._faces([picture], [body[None]])[0][0], expected)
    assert (present > 10).all()


def check_points(found: np.ndarray, expected: Any) -> int:
    """Compare points with controlnet_aux's, fractions in single precision; return how many there are."""
    if expected is None:
        assert not found.any()
        return 0
    for (x, y, score), keypoint in zip(found, expected, strict=True):
        if keypoint.x < 0 or keypoint.y < 0:
            assert (x, y, score) == (0, 0, 0)
        else:
            assert (np.float32(x) / np.float32(512), np.float32(y) / np.float32(512)) == keypoint[:2]
            assert score > 0
    return int((found[:, 2] > 0).sum())


def test_faces_keep_their_order_where_a_point_is_missing() -> None:
    heatmaps = np.zeros((71, 30, 40), np.float32)
    heatmaps[np.arange(71), 7, 5] = 0.5
    heatmaps[3] = 0.04
    points = decode_face(heatmaps)
    assert points.shape == (70, 3)
    assert (points[3] == 0).all()
    assert (np.delete(points, 3, axis=0) == [5, 7, 0.5]).all()


def test_a_hand_that_is_not_there_has_no_points() -> None:
    assert (decode_hand([np.zeros((22, 23, 23), np.float32)], 100) == 0).all()
    assert [seen.shape for seen in hand_inputs(np.zeros((50, 50, 3), np.uint8))] == [
        (side, side, 3) for side in (184, 368, 552, 736)
    ]


@pytest.mark.slow
def test_a_batch_gives_what_each_picture_gives_alone(weights: Path) -> None:
    network = OpenPoseNet(str(weights), hands=False, face=False, device="cpu")
    network._face = Stages(small_network(71))
    pictures = [data.astronaut()[:150, :200], data.coffee()[:100, :90]]
    alone = [network.find([picture])[0] for picture in pictures]
    assert sum(len(poses.people) for poses in alone) > 1
    assert any(poses.faces.any() for poses in alone)
    for one, other in zip(alone, network.find(pictures), strict=True):
        np.testing.assert_array_equal(one.people, other.people)
        np.testing.assert_array_equal(one.faces, other.faces)
    network._batch = 4  # as on CUDA
    for one, other in zip(alone[:1] * 2, network.find([pictures[0], pictures[0]]), strict=True):
        assert one.people.shape == other.people.shape
        np.testing.assert_allclose(one.people[..., :2], other.people[..., :2], atol=1)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 3),
        (5, 20, 3),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 3000, 3), (64, 64, 3), (3000, 2, 3))),
    ],
)
@pytest.mark.slow
def test_any_size_is_looked_at(weights: Path, shape: tuple[int, ...]) -> None:
    extract = preprocessors.get("openpose", model=str(weights), device="cpu")
    with pytest.warns(UserWarning, match="no person was found: the openpose map is black"):
        made = extract(np.full(shape, 99, np.uint8))
    assert made.image.shape == shape


# --- weights ---


def test_only_what_is_asked_for_is_needed(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"hand_pose_model\.pth is missing"):
        preprocessors.get("openpose", model=str(weights), hands=True, device="cpu")
    with pytest.raises(ValueError, match=r"facenet\.pth is missing"):
        preprocessors.get("openpose", model=str(weights), face=True, device="cpu")
    with pytest.raises(ValueError, match=r"body_pose_model\.pth of lllyasviel/Annotators is needed"):
        preprocessors.get("openpose", model="openpose")


def test_the_licence_is_said_once(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openposenet, "_noticed", set())
    with pytest.warns(UserWarning, match="non-commercial use only"):
        preprocessors.get("openpose", model=str(weights), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocessors.get("openpose", model=str(weights), device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty|damaged"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page|HTML|html"),
        (b"\x80\x02garbage", "not a file of weights|damaged"),
        (None, "lack model0"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "body_pose_model.pth"
    if content is None:
        save_network(path, small_network(19), drop_branch=False)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        preprocessors.get("openpose", model=str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.slow
def test_a_body_costs_torch_alone() -> None:
    """controlnet_aux's open_pose imports SciPy and scikit-image; its network needs neither."""
    import subprocess

    code = (
        "import sys; from controlkit.preprocessors import openposenet as o;"
        "o._without_its_package('open_pose/model.py').bodypose_model;"
        "print([m for m in ('scipy', 'skimage', 'torchvision', 'matplotlib') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

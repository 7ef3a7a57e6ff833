"""Depth maps: near is white, always defined, from any network of transformers' depth classes."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tiny_detectors import save_depth_model, save_pose_model

from controlkit import figures, preprocessors
from controlkit.images import resize
from controlkit.preprocessors import depth_to_map, depthtiles, normal_from_depth
from controlkit.preprocessors.annotators import import_annotator
from controlkit.preprocessors.depth import Depth
from controlkit.preprocessors.depthnet import DepthNetwork
from controlkit.preprocessors.depthtiles import fitted, tiled_depth


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_depth_model(folder / "relative")
    save_depth_model(folder / "metric", kind="metric")
    save_pose_model(folder / "pose")
    return folder


def by_transformers(folder: Path, picture: np.ndarray) -> np.ndarray:
    """What the network predicts, by transformers' own documented steps."""
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(picture), return_tensors="pt"))
    (result,) = processor.post_process_depth_estimation(outputs, target_sizes=[picture.shape[:2]])
    return result["predicted_depth"].numpy()


@pytest.mark.parametrize("size", [(128, 128), (200, 300), (451, 300)])
def test_the_prediction_is_transformers_prediction(models: Path, size: tuple[int, int]) -> None:
    picture = np.array(Image.fromarray(data.coffee()).resize(size))
    ours = Depth(model=str(models / "relative")).inverse_depth(picture)
    theirs = by_transformers(models / "relative", picture)
    assert np.ptp(theirs) > 0
    np.testing.assert_array_equal(ours, theirs)


def test_metric_depth_is_inverted(models: Path) -> None:
    picture = data.coffee()[:128, :128]
    metres = by_transformers(models / "metric", picture)
    ours = Depth(model=str(models / "metric")).inverse_depth(picture)
    np.testing.assert_allclose(ours, 1 / np.maximum(metres, 0.1), rtol=1e-6)
    nearest = np.unravel_index(np.argmin(metres), metres.shape)
    made = preprocessors.get("depth", model=str(models / "metric"))(picture)
    assert made.image[nearest].tolist() == [255, 255, 255]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (1, 40), (40, 1), (3000, 2), (2, 3000)])
def test_odd_sizes_give_maps_of_their_size(models: Path, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    made = preprocessors.get("depth", model=str(models / "relative"))(picture)
    assert made.image.shape == picture.shape


def test_the_map_says_what_it_is(models: Path) -> None:
    made = preprocessors.get("depth", model=str(models / "relative"))(data.cat())
    assert (made.kind, made.polarity, made.poses) == ("depth", "near-is-white", None)
    assert made.model == str(models / "relative")
    assert made.image.shape == data.cat().shape
    assert made.image.dtype == np.uint8
    assert (made.image.min(), made.image.max()) == (0, 255)
    assert (made.image == made.image[..., :1]).all()


def test_depth_becomes_levels() -> None:
    inverse_depth = np.array([[0.0, 0.1], [0.25, 0.5]], np.float32)
    levels = depth_to_map(inverse_depth)
    assert levels.dtype == np.uint8
    assert levels[..., 0].tolist() == [[0, 51], [128, 255]]  # 127.5 is rounded to even
    np.testing.assert_array_equal(depth_to_map(inverse_depth * 7 + 3), levels)
    np.testing.assert_array_equal(depth_to_map(-inverse_depth)[..., 0], [[255, 204], [128, 0]])


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e30])
def test_constant_depth_is_black(value: float) -> None:
    assert not depth_to_map(np.full((4, 5), value, np.float32)).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_depth_that_is_not_finite_is_refused(bad: float) -> None:
    depth = np.ones((4, 4), np.float32)
    depth[1, 2] = bad
    with pytest.raises(ValueError, match="not finite"):
        depth_to_map(depth)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "depth-anything-v2"}, r"did you mean 'depth-anything-v2-\w+'\?"),
        ({}, "depth-anything/Depth-Anything-V2-Small-hf.* not in the cache .*'tiny' needs no network"),
        ({"model": "nobody/nothing"}, "'nobody/nothing'.* not in the cache .*'tiny' needs no network"),
        ({"model": "/no/such/folder"}, "no depth model called '/no/such/folder'"),
        ({"devise": "cpu"}, r"unknown depth option 'devise' \(did you mean 'device'\?\)"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        preprocessors.get("depth", **options)
    assert "\n" not in str(caught.value)


def test_broken_folders_and_devices_are_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot build AutoModelForDepthEstimation"):
        preprocessors.get("depth", model=str(models / "pose"))
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        preprocessors.get("depth", model=str(tmp_path))
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        preprocessors.get("depth", model=str(models / "relative"), device="gpu")
    save_depth_model(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    with pytest.raises(ValueError, match="does not describe an image processor"):
        preprocessors.get("depth", model=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 50}, "clip is 50; it must be a percentage from 0"),
        ({"clip": -1}, "clip is -1"),
        ({"clip": "nan"}, "clip is nan"),
        ({"tile": 10}, r"tile is 10; it must be 0 \(off\) or 64 to 8192"),
        ({"metric": True}, "metric is for model=file"),
        ({"precision": "fp8", "device": "cpu"}, "unknown precision .fp8.; choose from: auto, bf16"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 is for GPUs; on the CPU use fp32 or bf16"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessors.get("depth", **({"model": "tiny"} | options))


def test_half_precision_is_close() -> None:
    picture = figures.render(5).picture
    full = preprocessors.get("depth", model="tiny", device="cpu")(picture)
    half = preprocessors.get("depth", model="tiny", device="cpu", precision="bf16")(picture)
    assert half.depth is not None
    assert half.depth.dtype == np.float32
    assert half.params["precision"] == "bf16"
    assert 0 < np.abs(full.image.astype(int) - half.image).mean() < 4


# --- batches ---


def test_a_batch_equals_its_pictures(models: Path) -> None:
    coffee = data.coffee()
    pictures = [coffee[:128, :128], coffee[:100, :150], coffee[50:178, 30:158], coffee[:100, 200:350]]
    extract = preprocessors.get("depth", model=models / "relative", device="cpu")
    for made, picture in zip(extract(pictures), pictures, strict=True):
        np.testing.assert_array_equal(made.image, extract(picture).image)
        assert made.image.shape == picture.shape
    assert extract([]) == []


def test_pictures_that_pass_together_come_out_alike() -> None:
    """As on a GPU, where pictures of one size share a pass: float32 rounding is all that differs."""
    network = DepthNetwork("tiny", device="cpu", precision="fp32")
    scenes = [figures.render(seed).picture for seed in range(5)]
    pictures = [*scenes[:3], scenes[3][:100], scenes[4]]
    alone = [network.inverse_depth([picture])[0] for picture in pictures]
    network._at_once = 2  # so that there is a full pass and a remainder
    for together, single in zip(network.inverse_depth(pictures), alone, strict=True):
        np.testing.assert_allclose(together, single, rtol=1e-4, atol=1e-5)


def test_a_network_that_overflows_is_not_believed(tmp_path: Path) -> None:
    from transformers import AutoModelForDepthEstimation

    model = AutoModelForDepthEstimation.from_pretrained(save_depth_model(tmp_path))
    with torch.no_grad():
        model.head.conv3.bias.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    extract = preprocessors.get("depth", model=tmp_path, device="cpu")
    with pytest.raises(ValueError, match="not finite; use precision=fp32"):
        extract(data.coffee()[:128, :128])


def save_zoe_model(folder: Path) -> Path:
    """Save a ZoeDepthForDepthEstimation with random weights: metric, and its processor pads."""
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    torch.manual_seed(0)
    backbone = BeitConfig(
        image_size=64,
        patch_size=16,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = ZoeDepthConfig(
        backbone_config=backbone,
        neck_hidden_sizes=[16, 16, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        num_attractors=[4, 2, 2, 1],
        bin_embedding_dim=16,
        num_relative_features=8,
        patch_transformer_hidden_size=16,
        patch_transformer_intermediate_size=32,
        patch_transformer_num_attention_heads=2,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "nyu"}],
        initializer_range=0.3,
    )
    ZoeDepthForDepthEstimation(config).save_pretrained(folder)
    processor = {
        "image_processor_type": "ZoeDepthImageProcessor",
        "size": {"height": 64, "width": 64},
        "ensure_multiple_of": 32,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # in transformers 5.17
def test_zoedepth_is_metric_and_its_padding_is_cut_off(tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForDepthEstimation

    folder = save_zoe_model(tmp_path)
    picture = resize(data.coffee(), 90, 60)
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForDepthEstimation.from_pretrained(folder).eval()
    with torch.no_grad():
        outputs = model(**processor(images=Image.fromarray(picture), return_tensors="pt"))
    (theirs,) = processor.post_process_depth_estimation(
        outputs, source_sizes=[(60, 90)], target_sizes=[(60, 90)]
    )
    network = DepthNetwork(str(folder), device="cpu", precision="fp32")
    (ours,) = network.inverse_depth([picture])
    np.testing.assert_allclose(ours, 1 / np.maximum(theirs["predicted_depth"].numpy(), 0.1), rtol=1e-5)
    network._at_once = 2
    for one in network.inverse_depth([picture, picture]):
        np.testing.assert_allclose(one, ours, rtol=1e-3)


# --- range and size ---


def test_clipping_cuts_off_outliers() -> None:
    depth = np.tile(np.linspace(0, 1, 1000, dtype=np.float32), (10, 1))
    depth[0, 0], depth[0, 1] = -50, 90
    plain, clipped = depth_to_map(depth)[..., 0], depth_to_map(depth, clip=1)[..., 0]
    assert np.ptp(plain[1]) <= 2
    assert (clipped[0, 0], clipped[0, 1]) == (0, 255)
    assert len(np.unique(clipped[1])) == 256
    np.testing.assert_allclose(clipped[1, 500], 127.5, atol=1)
    spike = np.zeros((50, 50), np.float32)
    spike[3, 4] = 1
    np.testing.assert_array_equal(depth_to_map(spike, clip=5), depth_to_map(spike))
    assert not depth_to_map(np.ones((4, 4), np.float32), clip=5).any()


def test_at_another_resolution_depth_and_map_have_the_pictures_size() -> None:
    scene = figures.render(3)
    picture = resize(scene.picture, 301, 301)
    made = preprocessors.get("depth", model="tiny", device="cpu", resolution=128)(picture)
    assert made.depth is not None
    assert made.depth.shape == (301, 301)
    assert made.params["resolution"] == 128
    np.testing.assert_array_equal(made.image, depth_to_map(made.depth))
    assert (made.image.min(), made.image.max()) == (0, 255)


# --- tiles ---


def _by_brightness(pictures: Any) -> list[np.ndarray]:
    """Depth with a scale and a shift of its own for every picture, as networks have it."""
    rng = np.random.default_rng(len(pictures))
    brightness = [picture.mean(axis=2, dtype=np.float32) for picture in pictures]
    return [np.float32(rng.uniform(0.2, 3)) * one + np.float32(rng.normal()) for one in brightness]


def test_tiles_are_brought_to_the_whole() -> None:
    picture = data.coffee()
    tiled = tiled_depth(_by_brightness, picture, 130)
    (whole,) = _by_brightness([picture])
    np.testing.assert_allclose(tiled, whole, rtol=1e-4, atol=1e-3)


def test_one_tile_is_the_plain_estimate(models: Path) -> None:
    picture = data.coffee()[:120, :128]
    plain = preprocessors.get("depth", model=models / "relative", device="cpu")(picture)
    tiled = preprocessors.get("depth", model=models / "relative", device="cpu", tile=128)(picture)
    np.testing.assert_array_equal(tiled.image, plain.image)
    assert tiled.params["tile"] == 128


def test_a_tile_that_says_nothing_is_the_whole() -> None:
    whole = np.random.default_rng(0).normal(size=(8, 9)).astype(np.float32)
    assert fitted(np.full((8, 9), 3.0, np.float32), whole) is whole
    assert fitted(np.zeros((8, 9), np.float32), whole) is whole
    assert fitted(-whole, whole) is whole  # it contradicts
    noise = np.random.default_rng(1).normal(size=(8, 9)).astype(np.float32)
    assert np.abs(fitted(whole * 2 + noise, whole) - whole).mean() < 0.3  # it agrees in part
    np.testing.assert_allclose(fitted(whole * 3 + 5, whole), whole, rtol=1e-4, atol=1e-5)
    flat = np.full((8, 9), 2.0, np.float32)
    assert fitted(whole, flat) is flat
    sizes = np.zeros((300, 200, 3), np.uint8)
    black = tiled_depth(lambda pictures: [np.zeros(one.shape[:2], np.float32) for one in pictures], sizes, 64)
    assert black.shape == (300, 200)
    assert not black.any()


def _tilted(pictures: Any) -> list[np.ndarray]:
    """Depth that is tilted some other way in every picture, as networks that see no horizon have it."""
    found = []
    for picture in pictures:
        depth = cv2.GaussianBlur(picture.mean(axis=2, dtype=np.float32), (0, 0), 6)
        y, x = np.mgrid[-1 : 1 : depth.shape[0] * 1j, -1 : 1 : depth.shape[1] * 1j]
        slope_x, slope_y = np.random.default_rng(int(picture.sum())).normal(size=2) * 0.5 * depth.std()
        found.append((depth + slope_x * x + slope_y * y).astype(np.float32))
    return found


@pytest.mark.parametrize("hard", [False, True])
def test_tiles_leave_no_seams(hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tiles change is no rougher at their edges than elsewhere; without their windows it would be."""
    if hard:
        monkeypatch.setattr(depthtiles, "_window", lambda tile, length: np.ones(tile, np.float32))
    picture = resize(data.coffee(), 400, 250)
    change = tiled_depth(_tilted, picture, 128) - _tilted([picture])[0]
    assert np.abs(change).mean() > 1
    for axis, edges in ((0, (61, 122, 128, 189)), (1, (68, 128, 136, 196, 204, 264, 272, 332))):
        step = np.abs(np.diff(change, axis=axis)).mean(axis=1 - axis)
        roughest = step[[edge - 1 for edge in edges]].max() / np.median(step)
        assert (roughest > 8) if hard else (roughest < 2.5)


def test_tiles_of_a_network() -> None:
    scene = figures.render(11)
    picture = resize(scene.picture, 384, 300)
    plain, tiled = (
        preprocessors.get("depth", model="tiny", device="cpu", tile=tile)(picture) for tile in (0, 200)
    )
    assert tiled.image.shape == (300, 384, 3)
    assert tiled.params["tile"] == 200
    assert 0.5 < np.abs(tiled.image.astype(int) - plain.image).mean() < 25


def test_tiles_refine_what_the_whole_shows() -> None:
    """The network sees 128 pixels of 512; each tile shows it the detail, at a scale and shift of its own."""

    def short_sighted(pictures: Any) -> list[np.ndarray]:
        return [
            resize(resize(one, 128, 128), picture.shape[1], picture.shape[0])
            for picture, one in zip(pictures, _by_brightness(pictures), strict=True)
        ]

    picture = data.astronaut()
    truth = picture.mean(axis=2)
    (plain,) = short_sighted([picture])
    tiled = tiled_depth(short_sighted, picture, 160)
    error, refined = (np.abs(fitted(found, truth) - truth).mean() for found in (plain, tiled))
    assert refined < 0.5 * error


# --- normals ---


def test_normals_follow_controlnet_auxs_formula(models: Path) -> None:
    """The same depth through controlnet-aux's own code, whose network is replaced by that depth."""
    depth = (figures.render(2).inverse_depth * 300).astype(np.float32)

    class Given(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, _: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(depth)[None]

    detector = import_annotator("midas").MidasDetector(Given())
    picture = np.zeros((128, 128, 3), np.uint8)
    for a, threshold in ((np.pi * 2, 0.1), (1.0, 0.4)):
        _, expected = detector(
            picture, a=a, bg_th=threshold, depth_and_normal=True, detect_resolution=128, image_resolution=128
        )
        ours = normal_from_depth(depth, a=a, bg_threshold=threshold)
        np.testing.assert_array_equal(ours, expected[..., ::-1])


def test_normals_of_a_sphere() -> None:
    y, x = np.mgrid[-1.2:1.2:241j, -1.2:1.2:241j]
    radius = np.hypot(x, y)
    sphere = np.sqrt(np.maximum(0, 1 - radius**2)).astype(np.float32)
    normals = normal_from_depth(sphere * 100, a=8, bg_threshold=0.1).astype(int)
    inside = (radius < 0.9) & (radius > 0.05)
    left, top = normals[..., 0] - 127.5, normals[..., 1] - 127.5
    assert (left[inside & (x < -0.05)] > 0).all()  # red: what faces left
    assert (left[inside & (x > 0.05)] < 0).all()
    assert (top[inside & (y < -0.05)] > 0).all()  # green: what faces up
    assert (top[inside & (y > 0.05)] < 0).all()
    assert (normals[radius > 1.05] == (127, 127, 255)).all()  # the background faces the viewer
    assert normals[120, 120].tolist() == [127, 127, 255]
    turned = np.degrees(np.arctan2(top, left) - np.arctan2(-y, -x))
    assert np.abs((turned[inside & (radius > 0.3)] + 180) % 360 - 180).max() < 3
    assert (np.diff(normals[120, 125:215, 2]) <= 0).all()  # ever more to the side


@pytest.mark.parametrize(("dx", "dy"), [(1, 0), (0, 1), (-2, 3)])
def test_normals_of_a_plane(dx: int, dy: int) -> None:
    y, x = np.mgrid[:40, :50]
    depth = (dx * x + dy * y).astype(np.float32)
    normal = np.array([8 * dx, 8 * dy, 6.0])  # the weights of a Sobel kernel add up to 8 per step
    expected = normal / np.linalg.norm(normal) * 127.5 + 127.5
    got = normal_from_depth(depth, a=6.0, bg_threshold=0)[1:-1, 1:-1]
    np.testing.assert_allclose(got, np.broadcast_to(np.floor(expected), got.shape), atol=1)


def test_normals_of_figures() -> None:
    extract = preprocessors.get("normal", model="tiny", device="cpu")
    made = extract(figures.render(4).picture)
    assert (made.kind, made.polarity, made.model) == ("normal", "normals", "tiny")
    assert made.depth is not None
    assert made.params["bg_threshold"] == 0.1
    assert made.image[..., 2].min() >= 127  # nothing faces away
    floor = made.image[110:, :, 1].astype(int)
    assert np.median(floor) > 150  # the floor faces up
    assert made.image.shape == (128, 128, 3)


def test_normals_mean_the_same_at_any_size() -> None:
    extract = preprocessors.get("normal", model="tiny", device="cpu")
    picture = figures.render(4).picture
    small, large = extract(picture).image, extract(resize(picture, 256, 256)).image
    assert np.abs(resize(large, 128, 128).astype(int) - small).mean() < 12


@pytest.mark.parametrize(("options", "name"), [({"a": -1}, "a is -1"), ({"bg_threshold": 1.5}, "is 1.5")])
def test_normal_options_out_of_range_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        preprocessors.get("normal", model="tiny", **options)


def test_constant_depth_faces_the_viewer() -> None:
    assert (normal_from_depth(np.full((5, 6), 2.0, np.float32)) == (127, 127, 255)).all()
    with pytest.raises(ValueError, match="not finite"):
        normal_from_depth(np.array([[1.0, np.nan]], np.float32))


def test_depth_in_numbers_is_taken_in_any_way(tmp_path: Path) -> None:
    depth = np.arange(12.0).reshape(3, 4)
    for given in (depth.tolist(), torch.tensor(depth, requires_grad=True), torch.tensor(depth).bfloat16()):
        np.testing.assert_array_equal(depth_to_map(given), depth_to_map(depth))
        np.testing.assert_array_equal(normal_from_depth(given), normal_from_depth(depth))
        preprocessors.write_depth_npy(tmp_path / "depth.npy", given)
        np.testing.assert_array_equal(preprocessors.read_depth(tmp_path / "depth.npy"), depth)


@pytest.mark.parametrize("depth", [np.zeros((0, 4)), np.zeros((4, 4, 3)), np.array([["a"]]), None])
def test_what_is_no_depth_is_refused(depth: Any, tmp_path: Path) -> None:
    path = tmp_path / "depth"
    for use in (
        lambda: depth_to_map(depth),
        lambda: normal_from_depth(depth),
        lambda: preprocessors.write_depth_npy(path, depth),
        lambda: preprocessors.write_depth_png16(path, depth),
    ):
        with pytest.raises(ValueError, match=r"^depth is \(height, width\) numbers, not "):
            use()
    assert not path.exists()


def test_numbers_beside_depth_that_mean_nothing_are_refused() -> None:
    depth = np.arange(12.0).reshape(3, 4)
    for clip in (-1, 50, float("nan"), "2"):
        with pytest.raises(ValueError, match=r"clip is .*; it must be a percentage from 0"):
            depth_to_map(depth, clip=clip)
    for name, given in (("a", 0), ("a", float("nan")), ("bg_threshold", 2)):
        with pytest.raises(ValueError, match=f"normal's {name} is"):
            normal_from_depth(depth, **{name: given})

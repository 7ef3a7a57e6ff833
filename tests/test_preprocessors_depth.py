"""Depth maps: near is white, always defined, from any network of transformers' depth classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tiny_detectors import save_depth_model, save_pose_model

from controlkit import preprocessors
from controlkit.preprocessors import depth_to_map
from controlkit.preprocessors.depth import Depth


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
        ({"model": "depth-anything"}, r"did you mean 'depth-anything-v2-small'\?"),
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

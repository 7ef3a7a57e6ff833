"""Maps at another size: as a training resizes them, so that an adapter sees what it was trained on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from outcomes import Run

from controlkit.control import Control
from controlkit.generate_plan import _pixels
from controlkit.images import load_map, write_png
from controlkit.map_sizes import cover_map, right_sampling, sense_of
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.map_files import read_levels
from controlkit.training.data.views import look, make_views
from controlkit.training.data.visits import _sampling


def labels() -> np.ndarray:
    """Regions of eight colours with slanted borders, (90, 120, 3)."""
    y, x = np.mgrid[:90, :120]
    which = ((x + 2 * y) // 40 + (x - y) // 30) % 8
    return np.random.default_rng(3).integers(0, 256, (8, 3), dtype=np.uint8)[which]


def colours(image: np.ndarray) -> set[bytes]:
    return {pixel.tobytes() for pixel in image.reshape(-1, 3)}


@pytest.mark.parametrize(("kind", "kept"), [("seg", True), ("", True), ("openpose", True), ("normal", False)])
def test_colours_that_mean_something_are_never_blended(kind: str, kept: bool) -> None:
    image = labels()
    for width, height in ((64, 64), (200, 150)):
        found = cover_map(image, width, height, kind=kind)
        assert found.shape == (height, width, 3)
        assert (colours(found) <= colours(image)) is kept


@pytest.mark.parametrize("kind", ["openpose", "seg", "depth", "canny", ""])
@pytest.mark.parametrize("quality", [None, 80])
def test_maps_are_resized_as_in_training(kind: str, quality: int | None) -> None:
    """Also what a JPEG has blurred, which has thousands of colours."""
    image = labels()
    if quality is not None:
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        image = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    (view,) = make_views((120, 90), (64, 48), data=DataRecipe(source="x"), key=0)
    trained = look(image, view, sampling=_sampling(image, sense_of(kind), view))
    assert np.array_equal(cover_map(image, 64, 48, kind=kind), trained)


@pytest.mark.parametrize("rare", [98, 99])
@pytest.mark.parametrize(("count", "sampling"), [(199, "nearest"), (200, "smooth")])
def test_labels_have_at_most_199_colours(count: int, sampling: str, rare: int) -> None:
    """Those of a single pixel count, too, also of one that a sample misses, and black that comes first."""
    image = np.zeros((100, 100, 3), np.uint8)
    image[..., 1] = np.minimum(np.arange(10_000) // 50, count - 2).reshape(100, 100)
    image[99, rare, 1] = count - 1
    assert right_sampling(image, "") == sampling
    assert right_sampling(image[..., 1], "") == sampling
    image[..., 2] = image[..., 1] % 2  # blue tells as many apart
    image[..., 1] //= 2
    assert right_sampling(image, "") == sampling


def test_lines_have_equal_channels_and_either_colour() -> None:
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[::8] = 255
    blue = lines * np.array([0, 0, 1], np.uint8)
    assert [right_sampling(image, "") for image in (lines, 255 - lines, blue)] == [
        "lines",
        "lines",
        "nearest",
    ]
    for side in (32, 48, 96):
        drawn = cover_map(lines, side, side, kind="canny")
        assert np.array_equal(cover_map(255 - lines, side, side, kind="canny"), 255 - drawn)


@pytest.mark.parametrize(
    ("name", "sense"),
    [
        ("openpose", "pose"),
        ("dw_poses", "pose"),
        ("depth_anything", "depth"),
        ("MiDaS", "depth"),
        ("normalbae", "normals"),
        ("softedge", "soft"),
        ("lineart_anime", "soft"),
        ("canny", ""),
        ("", ""),
    ],
)
def test_names_of_maps_say_what_their_values_are(name: str, sense: str) -> None:
    assert sense_of(name) == sense


def test_depth_of_few_levels_is_still_resampled_smoothly() -> None:
    ramp = np.repeat(np.linspace(0, 255, 12).astype(np.uint8)[None, :, None], 12, axis=0).repeat(3, axis=2)
    for kind in ("depth", "normal", "softedge"):
        assert len(np.unique(cover_map(ramp, 48, 48, kind=kind))) > 12
    assert len(np.unique(cover_map(ramp, 48, 48, kind="seg"))) == 12


def test_a_control_takes_labels_as_they_are(load) -> None:
    from adapter_files import controlnet_of

    cond = Control(controlnet_of(load("sd1")), labels(), kind="seg").cond_for(64, 64)
    levels = (cond[0].permute(1, 2, 0) * 255).round().numpy().astype(np.uint8)
    assert colours(levels) <= colours(labels())


def test_deep_depth_becomes_black_to_white_as_in_training(tmp_path: Path, run: Run) -> None:
    y, x = np.mgrid[:64, :64]
    deep = (800 + 40 * x + 40 * y).astype(np.uint16)
    path = tmp_path / "depth.png"
    cv2.imwrite(str(path), deep)
    found = _pixels(str(path), "depth", is_map=True)
    assert (found.min(), found.max(), found.dtype, found.shape) == (0, 255, np.uint8, (64, 64, 3))
    assert np.array_equal(found, read_levels(path.read_bytes(), "it", grey=False, depth=True))
    np.save(tmp_path / "depth.npy", deep.astype(np.float32))
    assert np.array_equal(_pixels(str(tmp_path / "depth.npy"), "depth", is_map=True), found)
    write_png(tmp_path / "eight.png", found)  # eight bits are taken as they are
    assert np.array_equal(_pixels(str(tmp_path / "eight.png"), "depth", is_map=True), found)
    assert np.array_equal(_pixels(str(path), "canny", is_map=True), load_map(path))
    out = run("generate", "a cube", "--map", f"depth={path}", "--steps", 1, "-o", tmp_path / "out.png")
    assert "looks like" not in out.err
    out.done()
    run("generate", "--like", tmp_path / "out.png", "-o", tmp_path / "again.png").done()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()

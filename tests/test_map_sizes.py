"""Maps at another size: as a training resizes them, so that an adapter sees what it was trained on."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from outcomes import Run

from controlkit.control import Control
from controlkit.generate_plan import _pixels
from controlkit.images import load_map, read_png_text, resize, resize_lines, write_png
from controlkit.infotext import parse
from controlkit.map_sizes import cover_map, fit_map, right_sampling, sense_of
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


def edges(width: int, height: int) -> np.ndarray:
    """Two one-pixel rectangles, white on black, neither in the middle."""
    image = np.zeros((height, width, 3), np.uint8)
    cv2.rectangle(image, (4, 6), (width - 12, height - 16), (255, 255, 255), 1)
    cv2.rectangle(image, (20, 12), (40, 30), (255, 255, 255), 1)
    return image


@pytest.mark.parametrize(("width", "height"), [(64, 128), (128, 64), (120, 88), (72, 72), (8, 200)])
def test_what_is_filled_lies_where_the_a1111_extension_puts_it(width: int, height: int) -> None:
    """The sizes, the place and the colour of "Resize and Fill", computed as its detectmap_proc does."""
    y, x = np.mgrid[:90, :120]
    image = np.stack([2 * x, y + 9, 200 - y], axis=2).astype(np.uint8)
    scale = min(height / 90, width / 120)
    inner = round(120 * scale), round(90 * scale)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    wanted = np.broadcast_to(np.median(border, axis=0), (height, width, 3)).copy()
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    wanted[top : top + inner[1], left : left + inner[0]] = resize(image, *inner)
    found = fit_map(image, width, height, kind="normal", fit="fill")
    np.testing.assert_allclose(found.astype(np.float64), wanted, atol=1)  # a median between two levels


def test_a_map_is_stretched_or_filled_as_its_kind_wants() -> None:
    image = edges(96, 64)
    assert np.array_equal(fit_map(image, 64, 96, kind="canny", fit="stretch"), resize_lines(image, 64, 96))
    filled = fit_map(image, 64, 96, kind="canny", fit="fill")
    assert set(np.unique(filled)) == {0, 255}
    assert not filled[:26].any()
    assert not filled[69:].any()
    assert filled[26:69].any()
    assert np.array_equal(fit_map(255 - image, 64, 96, kind="canny", fit="fill"), 255 - filled)
    for fit in ("stretch", "fill"):
        assert colours(fit_map(labels(), 64, 200, kind="seg", fit=fit)) <= colours(labels())
        assert fit_map(image, 96, 64, kind="canny", fit=fit) is image
        assert fit_map(np.full((1, 3000, 3), 9, np.uint8), 64, 64, kind="", fit=fit).shape == (64, 64, 3)


def test_a_control_fits_its_region_as_its_map(load) -> None:
    from adapter_files import controlnet_of

    network, image = controlnet_of(load("sd1")), edges(96, 64)
    for fit, rows in (("crop", slice(0, 96)), ("stretch", slice(0, 96)), ("fill", slice(26, 69))):
        control = Control(network, image, mask=np.ones((64, 96)), kind="canny", fit=fit)
        cond = control.cond_for(64, 96)
        assert np.array_equal(cond[0, 0].numpy() * 255, fit_map(image, 64, 96, kind="canny", fit=fit)[..., 0])
        region = control.region(64, 96)
        assert region is not None
        inside = np.zeros((96, 64))
        inside[rows] = 1
        assert np.array_equal(region[0, 0].numpy(), inside)
    with pytest.raises(ValueError, match="unknown fit 'pad'"):
        Control(network, image, fit="pad")


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize(("fit", "mode"), [("stretch", "Just Resize"), ("fill", "Resize and Fill")])
def test_the_command_fits_maps_and_photos(tmp_path: Path, run: Run, fit: str, mode: str) -> None:
    """What is found in a photo ends at its border: that is no edge."""
    write_png(tmp_path / "photo.png", np.full((64, 96, 3), 200, np.uint8))
    write_png(tmp_path / "map.png", edges(96, 64))
    same = ("generate", "a cube", "--steps", 1, "--width", 64, "--height", 96)
    out = tmp_path / "out.png"
    of_photo = run(*same, "--control", f"canny={tmp_path}/photo.png:fit={fit}", "-o", out)
    of_photo.done()
    assert "is black: nothing was found" in of_photo.err
    run(*same, "--map", f"canny={tmp_path}/map.png:fit={fit}", "-o", out).done()
    text = read_png_text(out)
    assert parse(text, source=out).controls[0].fit == fit
    assert f"Resize Mode: {mode}" in text["parameters"]
    write_png(tmp_path / "fitted.png", fit_map(edges(96, 64), 64, 96, kind="canny", fit=fit))
    run(*same, "--map", f"canny={tmp_path}/fitted.png", "-o", tmp_path / "by-hand.png").done()
    assert np.array_equal(load_map(tmp_path / "by-hand.png"), load_map(out))
    run("generate", "--like", out, "-o", tmp_path / "again.png").done()
    assert (tmp_path / "again.png").read_bytes() == out.read_bytes()


@pytest.mark.filterwarnings("ignore:.*lies outside")
def test_fits_are_laid_out_and_wrong_ones_refused(tmp_path: Path, run: Run) -> None:
    write_png(tmp_path / "map.png", edges(96, 64))
    same = ("generate", "a cube", "--steps", 1, "--width", 64, "--height", 96, "-o", tmp_path / "out.png")
    told = f"canny={tmp_path}/map.png"
    run(*same, "--map", told, "--grid", "fit=crop,stretch,fill", "--keep").done()
    assert len({load_map(tmp_path / f"out-{number}.png").tobytes() for number in (1, 2, 3)}) == 3
    unknown = run(*same, "--map", f"{told}:fit=pad").refused()
    assert "unknown fit 'pad'" in unknown
    assert "choose from: crop, fill, stretch" in unknown

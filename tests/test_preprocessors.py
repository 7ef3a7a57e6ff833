"""What all preprocessors share: what they take, what they return, how options are read."""

import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from controlkit import preprocessors
from controlkit.images import load_picture
from controlkit.preprocessors import get

WEIGHTLESS = ["canny", "softedge", "scribble"]


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return data.coffee()[:181, :243]


def sources(photograph: np.ndarray, folder: Path) -> dict[str, object]:
    """The same picture as everything that a user may have at hand."""
    path = folder / "été #1.png"
    Image.fromarray(photograph).save(path)
    opaque = np.dstack([photograph, np.full(photograph.shape[:2], 255, np.uint8)])
    chw = torch.from_numpy(photograph).permute(2, 0, 1)
    return {
        "path": path,
        "text": str(path),
        "bytes": path.read_bytes(),
        "PIL": Image.open(path),
        "PIL RGBA": Image.fromarray(opaque),
        "array": photograph,
        "float array": photograph / np.float32(255),
        "double array": photograph / 255.0,
        "RGBA array": opaque,
        "fortran array": np.asfortranarray(photograph),
        "tensor": chw,
        "float tensor": chw / 255.0,
        "double tensor": chw.double() / 255.0,
    }


@pytest.mark.parametrize("kind", WEIGHTLESS)
def test_whatever_the_source_the_map_is_the_same(photograph: np.ndarray, tmp_path: Path, kind: str) -> None:
    extract = get(kind)
    expected = extract(photograph).image
    assert expected.shape == photograph.shape
    assert expected.dtype == np.uint8
    assert 0.005 < (expected > 0).mean() < 0.7
    for name, source in sources(photograph, tmp_path).items():
        np.testing.assert_array_equal(extract(source).image, expected, err_msg=name)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", WEIGHTLESS)
def test_a_batch_is_its_pictures_one_by_one(photograph: np.ndarray, kind: str) -> None:
    extract = get(kind)
    pictures = [photograph, photograph[::-1], photograph[:, ::-1]]
    expected = [extract(picture).image for picture in pictures]
    stacked = np.stack(pictures)
    tensor = torch.from_numpy(stacked.copy()).permute(0, 3, 1, 2)
    for batch in (pictures, tuple(pictures), stacked, stacked / 255.0, tensor, tensor / 255.0):
        maps = extract(batch)  # type: ignore[arg-type]
        assert isinstance(maps, list)
        for made, image in zip(maps, expected, strict=True):
            np.testing.assert_array_equal(made.image, image)
    assert extract([]) == []
    assert len(extract(stacked[:1])) == 1  # a batch of one is a batch
    different = extract([photograph, photograph[:50, :60]])
    assert [made.image.shape for made in different] == [photograph.shape, (50, 60, 3)]


def test_the_bad_picture_of_a_batch_is_named(photograph: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"picture 1 of the batch: no\.png does not exist"):
        get("canny")([photograph, "no.png"])


@pytest.mark.parametrize("kind", WEIGHTLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3000, 2), (2, 3000), (63, 65), (640, 481)])
def test_the_map_has_exactly_the_pictures_size(kind: str, size: tuple[int, int]) -> None:
    width, height = size
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    for resolution in (0, 64, 512):
        made = get(kind, resolution=resolution)(picture)
        assert made.image.shape == (height, width, 3)


@pytest.mark.parametrize("kind", WEIGHTLESS)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_plain_picture_gives_a_black_map(kind: str, level: int) -> None:
    assert not get(kind)(np.full((70, 90, 3), level, np.uint8)).image.any()


@pytest.mark.parametrize("resolution", [96, 300, 640])
def test_another_resolution_leaves_no_grey(photograph: np.ndarray, resolution: int) -> None:
    own = get("canny")(photograph)
    made = get("canny", resolution=resolution)(photograph)
    assert made.image.shape == photograph.shape
    assert set(np.unique(made.image)) == {0, 255}
    assert made.params["resolution"] == resolution
    # the lines are one pixel wide, as Canny's are
    thick = cv2.erode(made.image[..., 0], np.ones((2, 2), np.uint8))
    assert (thick > 0).sum() < 0.1 * (made.image[..., 0] > 0).sum()
    # and stand where the picture's own edges are, as far as both see the same ones
    near = cv2.dilate(own.image[..., 0], np.ones((7, 7), np.uint8)) > 0
    assert near[made.image[..., 0] > 0].mean() > 0.75


def test_the_picture_of_a_resolution_keeps_its_aspect() -> None:
    seen: list[tuple[int, ...]] = []

    class Spy(type(get("canny"))):  # type: ignore[misc]
        def _extract(self, pictures: list[np.ndarray]) -> list[preprocessors.Map]:
            seen.extend(picture.shape for picture in pictures)
            return super()._extract(pictures)

    Spy(resolution=512)([np.zeros((480, 640, 3), np.uint8), np.zeros((1080, 1920, 3), np.uint8)])
    assert seen == [(512, 683, 3), (512, 910, 3)]  # not 512 x 704 and 512 x 896


def test_every_kind_is_listed_and_has_options() -> None:
    assert preprocessors.list() == preprocessors.names() == sorted(preprocessors.names())
    taken: dict[str, object] = {}
    exec("from controlkit.preprocessors import *", taken)
    assert {"get", "names"} <= taken.keys()
    assert not {"list"} & taken.keys()
    assert {"canny", "openpose", "depth", "normal", "scribble", "softedge", "hed"} <= {*preprocessors.list()}
    for kind in preprocessors.list():
        assert "resolution" in preprocessors.options_of(kind), kind
    with pytest.raises(ValueError, match=r"unknown map 'opnpose' \(did you mean 'openpose'\?\)"):
        get("opnpose")
    with pytest.raises(ValueError, match=r"unknown map 'midas_depth'.*choose from: canny, "):
        preprocessors.options_of("midas_depth")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("canny", {"resolution": 5}, r"canny's resolution is 5; it must be 0 .* or 16 to 8192"),
        ("canny", {"resolution": "big"}, "canny's resolution is 'big'; it must be a whole number"),
        ("canny", {"resolution": 64.5}, "must be a whole number"),
        ("canny", {"auto": "perhaps"}, "canny's auto is 'perhaps'; it must be true or false"),
        ("canny", {"low": "9.."}, "must be a number or a range as 50..150"),
        ("canny", {"low": True}, "must be a number or a range"),
        ("softedge", {"saef": 1}, r"unknown softedge option 'saef' \(did you mean 'safe'\?\)"),
        ("scribble", {"width": 0.5}, "scribble's width is 0.5; it must be from 1 to 24"),
        ("scribble", {"detail": float("nan")}, "scribble's detail is nan"),
    ],
)
def test_bad_options_are_one_line(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        get(kind, **options)
    assert "\n" not in str(caught.value)


def test_options_may_be_text() -> None:
    typed = get("canny", low=50, high=120.5, l2=True, aperture=5, resolution=128)
    text = get("canny", low="50", high="120.5", l2="yes", aperture="5", resolution="128")
    picture = data.cat()[:100, :120]
    assert typed(picture).params == text(picture).params
    np.testing.assert_array_equal(typed(picture).image, text(picture).image)


def test_soft_edges_are_soft_and_where_the_edges_are() -> None:
    photograph = data.astronaut()
    soft = get("softedge")(photograph).image[..., 0]
    levels = np.unique(soft)
    assert len(levels) > 100
    assert levels[-1] == 255
    strong = get("canny", auto=True, blur=3)(photograph).image[..., 0] > 0
    assert soft[strong].mean() > 120
    assert soft[~strong].mean() < 40
    safe = get("softedge", safe=True)(photograph).image
    assert len(np.unique(safe)) == 3
    assert (np.abs(safe[..., 0].astype(int) - soft) <= 86).all()  # each is the nearest of three levels or so


def test_scribbles_are_binary_strokes_of_the_width_asked_for() -> None:
    disc = np.full((512, 512, 3), 255, np.uint8)
    cv2.circle(disc, (256, 256), 150, (0, 0, 0), -1)
    for width in (2, 6, 16):
        image = get("scribble", width=width)(disc).image[..., 0]
        assert set(np.unique(image)) == {0, 255}
        row = image[256] > 0
        assert abs(row[:256].sum() - width) <= 1  # across the left rim
        assert row[256 - 150 - width : 256 - 150 + width].any()
    small = get("scribble", width=8)(cv2.resize(disc, (128, 128), interpolation=cv2.INTER_AREA))
    assert abs((small.image[64, :64, 0] > 0).sum() - 2) <= 1  # widths are given for 512 pixels
    for resolution in (64, 128, 300, 1024):  # where outlines are found, not how wide they are drawn
        made = get("scribble", resolution=resolution)(disc)
        assert abs((made.image[256, :256, 0] > 0).sum() - 6) <= 1
        assert made.params["resolution"] == resolution


def test_importing_the_kinds_without_networks_costs_nothing_heavy() -> None:
    code = (
        "import sys, numpy; from controlkit import preprocessors as p;"
        "[p.get(k)(numpy.zeros((8, 8, 3), 'uint8')) for k in ('canny', 'softedge', 'scribble')];"
        "[p.options_of(k) for k in p.list()];"
        "print(sorted({'torch', 'transformers', 'diffusers', 'scipy', 'skimage', 'controlnet_aux', 'timm'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_library_breaks_only_what_needs_it() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('controlnet_aux', 'timm', 'transformers', 'torch')));"
        "import numpy; from controlkit.preprocessors import get, draw_poses;"
        "print(get('canny')(numpy.zeros((8, 8, 3), 'uint8')).kind, draw_poses([], 4, 4).shape)\n"
        "try: get('hed')\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.strip().splitlines()
    assert first == "canny (4, 4, 3)"
    assert "pip install" in second or "is needed" in second


def test_a_cold_start_is_quick_and_light(tmp_path: Path) -> None:
    Image.fromarray(data.coffee()).save(tmp_path / "photo.jpg")
    command = [sys.executable, "-X", "importtime", "-m", "controlkit", "preprocess", "canny", "photo.jpg"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    imported = {
        line.split("|")[2].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "cv2" in imported
    assert not imported & {"torch", "diffusers", "transformers", "scipy", "accelerate", "huggingface_hub"}
    expected = cv2.Canny(load_picture(tmp_path / "photo.jpg"), 100, 200)
    with Image.open(tmp_path / "map.png") as made:
        assert made.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(made)[..., 0], expected)


def test_a_map_is_taken_as_its_image_and_saved_as_the_command_does(tmp_path: Path) -> None:
    from controlkit.control import Control
    from controlkit.metrics import edge_f1
    from controlkit.preprocess_job import Beside, write_map

    made = get("canny")(data.astronaut()[:96, :96])
    assert np.array_equal(np.asarray(made), made.image)
    assert np.array_equal(load_picture(made), made.image)
    assert np.array_equal(Control(torch.nn.Identity(), [made, made.image]).maps, [made.image] * 2)
    assert edge_f1(made, made.image, tolerance=0).f1 == 1
    write_map(tmp_path / "command.png", made, Beside())
    made.save(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes() == (tmp_path / "command.png").read_bytes()
    with pytest.raises(ValueError, match="does not exist"):
        made.save(tmp_path / "nowhere" / "map.png")


def test_a_map_on_disk_says_what_it_is(tmp_path: Path) -> None:
    from controlkit.preprocess_job import Beside, write_map

    made = get("canny", low=30)(data.cat())
    write_map(tmp_path / "map.png", made, Beside())
    with Image.open(io.BytesIO((tmp_path / "map.png").read_bytes())) as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image), made.image)
        assert '"kind": "canny"' in image.info["controlkit"]
        assert '"low": 30.0' in image.info["controlkit"]

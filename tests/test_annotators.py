"""controlnet-aux's detectors under one contract: their own maps, at the picture's size, and plain errors."""

import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from annotator_weights import save_weights
from skimage import data

from controlkit import preprocessors
from controlkit.images import resize
from controlkit.preprocessors.annotators import import_annotator, quietly

CHEAP = ["hed", "lineart", "mlsd", "pidinet"]
EXPENSIVE = ["leres", "lineart_anime", "midas", "normalbae", "zoe"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("hed", {}),
    ("hed", {"safe": True}),
    ("hed", {"scribble": True}),
    ("lineart", {}),
    ("lineart", {"coarse": True}),
    ("mlsd", {}),
    ("pidinet", {}),
    ("pidinet", {"safe": True, "scribble": True}),
]
DETECTORS = {
    "hed": ("hed", "HEDdetector"),
    "leres": ("leres", "LeresDetector"),
    "lineart": ("lineart", "LineartDetector"),
    "lineart_anime": ("lineart_anime", "LineartAnimeDetector"),
    "midas": ("midas", "MidasDetector"),
    "mlsd": ("mlsd", "MLSDdetector"),
    "normalbae": ("normalbae", "NormalBaeDetector"),
    "pidinet": ("pidi", "PidiNetDetector"),
    "zoe": ("zoe", "ZoeDetector"),
}


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kind to the folder of its random weights, written when first asked for."""
    root = tmp_path_factory.mktemp("annotators")
    return lambda kind: root / kind if (root / kind).exists() else save_weights(kind, root / kind)


def theirs(kind: str, folder: Path, picture: np.ndarray, **options: Any) -> Any:
    """What controlnet-aux's own detector makes of a picture whose sides are multiples of 64."""
    module, name = DETECTORS[kind]
    with quietly():
        detector = getattr(import_annotator(module), name).from_pretrained(str(folder))
        if kind == "leres":  # its batch norms are left as in training, by oversight
            detector.model.eval()
        side = min(picture.shape[:2])
        return detector(picture, detect_resolution=side, image_resolution=side, output_type="np", **options)


def photo(width: int, height: int) -> np.ndarray:
    return resize(data.astronaut(), width, height)


# --- the maps ---


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_maps_are_controlnet_auxs(weights: Any, kind: str, options: dict[str, Any]) -> None:
    picture = photo(192, 128)
    made = preprocessors.get(kind, model=weights(kind), device="cpu", resolution=128, **options)(picture)
    np.testing.assert_array_equal(made.image, theirs(kind, weights(kind), picture, **options))
    assert made.image.std() > 0
    assert (made.kind, made.polarity) == (kind, "white-on-black")
    assert made.model == str(weights(kind))
    assert options.items() <= made.params.items()


@pytest.mark.parametrize("kind", CHEAP)
@pytest.mark.parametrize("size", [(171, 130), (1, 1), (90, 2)])
def test_maps_have_the_size_of_their_picture(weights: Any, kind: str, size: tuple[int, int]) -> None:
    made = preprocessors.get(kind, model=weights(kind), device="cpu", resolution=64)(photo(*size))
    assert made.image.shape == (size[1], size[0], 3)
    assert made.image.dtype == np.uint8


@pytest.mark.parametrize(("kind", "options"), [("hed", {"scribble": True}), ("mlsd", {})])
def test_binary_maps_stay_binary_at_any_size(weights: Any, kind: str, options: dict[str, Any]) -> None:
    made = preprocessors.get(kind, model=weights(kind), device="cpu", resolution=128, **options)(
        photo(331, 217)
    )
    assert made.is_binary
    assert made.image.any()


def test_the_aspect_is_kept(weights: Any) -> None:
    """What a network finds lies where it is: controlnet-aux stretches 340 x 200 to another aspect."""
    picture = np.zeros((200, 340, 3), np.uint8)
    picture[60:140, 250:290] = 255
    made = preprocessors.get("lineart_standard", resolution=128)(255 - picture)
    rows, columns = np.nonzero(made.image[..., 0] > 40)
    inside = (rows > 50) & (rows < 150) & (columns > 240) & (columns < 300)
    assert inside.mean() > 0.98
    assert abs(columns.mean() - 269.5) < 1
    assert abs(rows.mean() - 99.5) < 1
    detector = preprocessors.get("hed", model=weights("hed"), device="cpu", resolution=0)
    whole = detector(picture).image[40:160, 160:]
    narrow = detector(np.ascontiguousarray(picture[:, 148:])).image[40:160, 12:]
    assert np.abs(whole.astype(int) - narrow).mean() < 1  # what is beside the picture hardly matters


def test_a_batch_equals_its_pictures(weights: Any) -> None:
    pictures = [photo(96, 64), photo(64, 96), photo(80, 70)]
    detector = preprocessors.get("hed", model=weights("hed"), device="cpu", resolution=64)
    for made, picture in zip(detector(pictures), pictures, strict=True):
        np.testing.assert_array_equal(made.image, detector(picture).image)


def test_lines_without_a_network() -> None:
    picture = photo(192, 128)
    made = preprocessors.get("lineart_standard", resolution=128, sigma=4, intensity=6)(picture)
    detector = import_annotator("lineart_standard").LineartStandardDetector()
    options = {"guassian_sigma": 4, "intensity_threshold": 6, "detect_resolution": 128}
    np.testing.assert_array_equal(made.image, detector(picture, output_type="np", **options))
    assert not preprocessors.get("lineart_standard")(np.full((40, 50, 3), 90, np.uint8)).image.any()


def test_lines_are_white_on_black() -> None:
    page = preprocessors.get("lineart_standard")(data.page())  # dark letters on light paper
    assert page.image.mean() < 80
    text = data.page() < 60
    assert page.image[text].mean() > 3 * page.image[~text].mean()


def test_shuffling_is_controlnet_auxs_with_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = data.astronaut()
    state = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]  # noqa: NPY002
    made = preprocessors.get("shuffle", seed=3)(picture)
    again = preprocessors.get("shuffle", seed=3)(picture)
    assert np.random.get_state()[1].tolist() == state  # type: ignore[index, union-attr]  # noqa: NPY002
    np.testing.assert_array_equal(made.image, again.image)
    other = preprocessors.get("shuffle", seed=4)(picture)
    assert (other.image != made.image).mean() > 0.5
    monkeypatch.setattr(np.random, "uniform", np.random.default_rng(3).uniform)
    detector = import_annotator("shuffle").ContentShuffleDetector()
    np.testing.assert_array_equal(made.image, detector(picture, output_type="np"))


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (301, 77)])
def test_shuffling_any_size(size: tuple[int, int]) -> None:
    made = preprocessors.get("shuffle")(photo(*size))
    assert made.image.shape == (size[1], size[0], 3)
    assert made.polarity == "colours"


def test_a_large_cell_costs_no_more_memory_than_its_share() -> None:
    tracemalloc.start()
    preprocessors.get("shuffle", cell=8192)(photo(64, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6  # enlarged as a whole, its noise would take 2 GB


# --- expensive networks ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "polarity"),
    [("lineart_anime", "white-on-black"), ("normalbae", "normals")],
)
def test_large_networks_give_controlnet_auxs_maps(weights: Any, kind: str, polarity: str) -> None:
    picture = photo(192, 128)
    made = preprocessors.get(kind, model=weights(kind), device="cpu", resolution=128)(picture)
    np.testing.assert_array_equal(made.image, theirs(kind, weights(kind), picture))
    assert made.image.std() > 0
    assert made.polarity == polarity


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["leres", "midas", "zoe"])
def test_large_depth_networks_agree_with_controlnet_aux(weights: Any, kind: str) -> None:
    """Within one level: depth is rounded here, and cut off there."""
    picture = photo(192, 128)
    detector = preprocessors.get(kind, model=weights(kind), device="cpu", resolution=128)
    made = detector(picture)
    expected = theirs(kind, weights(kind), picture)
    assert np.abs(made.image.astype(int) - expected).max() <= 1
    assert made.image.std() > 0
    assert made.polarity == "near-is-white"
    assert detector(photo(151, 90)).image.shape == (90, 151, 3)


@pytest.mark.slow
def test_midas_normals_are_controlnet_auxs_in_rgb(weights: Any) -> None:
    picture = photo(192, 128)
    folder = weights("midas")
    made = preprocessors.get("midas", model=folder, device="cpu", resolution=128, normal=True, a=3.0)(picture)
    _, expected = theirs("midas", folder, picture, depth_and_normal=True, a=3.0)
    np.testing.assert_allclose(made.image, expected[..., ::-1], atol=1)
    assert made.polarity == "normals"
    assert made.depth is not None


@pytest.mark.slow
def test_leres_boosts_and_cuts(weights: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["controlkit", "--name", "x", "--no-such-option"])  # its code reads this
    picture = photo(320, 256)
    options = {"model": weights("leres"), "device": "cpu", "resolution": 256}
    made = preprocessors.get("leres", boost=True, **options)(picture)
    assert made.image.shape == picture.shape
    assert (made.image.min(), made.image.max()) == (0, 255)
    plain = preprocessors.get("leres", **options)(picture).image
    cut = preprocessors.get("leres", remove_near=20, remove_background=30, **options)(picture).image
    assert (cut[plain >= 205] == 255).all()
    assert (cut[plain <= 76] == 0).all()
    middle = (plain > 77) & (plain < 203)
    np.testing.assert_array_equal(cut[middle], plain[middle])


# --- weights ---


@pytest.mark.parametrize(
    ("kind", "options", "file"),
    [
        ("hed", {}, "ControlNetHED.pth"),
        ("pidinet", {}, "table5_pidinet.pth"),
        ("mlsd", {}, "mlsd_large_512_fp32.pth"),
        ("lineart", {}, "sk_model.pth"),
        ("lineart", {"coarse": True}, "sk_model2.pth"),
        ("lineart_anime", {}, "netG.pth"),
        ("midas", {}, "dpt_hybrid-midas-501f0c75.pt"),
        ("zoe", {}, "ZoeD_M12_N.pt"),
        ("leres", {}, "res101.pth"),
        ("normalbae", {}, "scannet.pt"),
    ],
)
def test_missing_weights_are_named(kind: str, options: dict[str, Any], file: str, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"^{file} of lllyasviel/Annotators .*model=FOLDER") as caught:
        preprocessors.get(kind, **options)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"{file} is missing in .*{file} is in lllyasviel/Annotators"):
        preprocessors.get(kind, model=tmp_path, **options)


def _evil(marker: Path) -> Any:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    return Evil()


def _damage(file: Path, how: str, marker: Path) -> None:
    good = file.read_bytes()
    tensors = torch.load(file, weights_only=True)
    name = next(iter(tensors))
    if how == "cut short":
        file.write_bytes(good[: len(good) // 2])
    elif how == "cut within a number":
        torch.save(tensors, file, _use_new_zipfile_serialization=False)
        file.write_bytes(file.read_bytes()[:18])
    elif how == "a web page":
        file.write_bytes(b"<!DOCTYPE html><html>404</html>")
    elif how == "LFS":
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "noise":
        file.write_bytes(b"not a pickle at all" * 50)
    elif how == "evil":
        torch.save({"x": _evil(marker)}, file)
    elif how == "a list":
        torch.save([1, 2], file)
    elif how == "lack":
        torch.save({key: value for key, value in tensors.items() if key != name}, file)
    elif how == "beyond":
        torch.save(tensors | {"extra": torch.zeros(1)}, file)
    elif how == "wrong shape":
        torch.save(tensors | {name: torch.zeros(3)}, file)
    elif how == "not finite":
        torch.save(tensors | {name: torch.full_like(tensors[name], float("nan"))}, file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut short", "is damaged or cut short"),
        ("cut within a number", "is damaged or cut short"),
        ("a web page", "is a web page"),
        ("LFS", "is a Git LFS pointer"),
        ("empty", "is empty"),
        ("noise", "is a text, not weights"),
        ("evil", "could run code"),
        ("a list", "holds no weights"),
        ("lack", "lack norm"),
        ("beyond", "beyond what the network takes, extra"),
        ("wrong shape", "have the wrong shape for norm"),
        ("not finite", "are not finite"),
    ],
)
def test_damaged_weights_are_refused(weights: Any, tmp_path: Path, how: str, message: str) -> None:
    file = tmp_path / "ControlNetHED.pth"
    file.write_bytes((weights("hed") / file.name).read_bytes())
    _damage(file, how, tmp_path / "marker")
    with pytest.raises(ValueError, match=message) as caught:
        preprocessors.get("hed", model=tmp_path, device="cpu")
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_building_leaves_random_numbers_alone(weights: Any) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    preprocessors.get("lineart", model=weights("lineart"), device="cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mlsd", {"score": 2}, "mlsd's score is 2; it must be from 0 to 1"),
        ("mlsd", {"distance": -1}, "distance is -1"),
        ("lineart_standard", {"sigma": 0}, "sigma is 0"),
        ("lineart_standard", {"intensity": 300}, "intensity is 300"),
        ("midas", {"a": 0}, "a is 0"),
        ("midas", {"bg_threshold": 2}, "bg_threshold is 2"),
        ("leres", {"remove_near": 101}, "remove_near is 101"),
        ("shuffle", {"seed": -1}, "seed is -1"),
        ("shuffle", {"cell": 10**6}, "cell is 1000000"),
        ("hed", {"save": True}, r"unknown hed option 'save' \(did you mean 'safe'\?\)"),
    ],
)
def test_options_out_of_range_are_refused(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessors.get(kind, **options)


# --- the import ---


def run_fresh(code: str) -> str:
    """Run code in a fresh interpreter in which every warning is an error; return what it printed."""
    command = [sys.executable, "-W", "error::UserWarning", "-W", "error::FutureWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_one_part_is_imported_alone(weights: Any) -> None:
    code = f"""
import sys
sys.modules["mediapipe"] = None
from controlkit import preprocessors
preprocessors.get("hed", model={str(weights("hed"))!r}, device="cpu")
parts = {{name.split(".")[1] for name in sys.modules if name.startswith("_controlkit_annotators.")}}
print(sorted(parts), "controlnet_aux" in sys.modules, "timm" in sys.modules)
"""
    assert run_fresh(code).splitlines() == ["['hed', 'util'] False False"]


@pytest.mark.parametrize("before", [None, "FALSE"])
def test_the_environment_stays_as_it_is(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("_controlkit_annotators.open_pose")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", before or "")
    if before is None:
        monkeypatch.delenv("KMP_DUPLICATE_LIB_OK")
    module = import_annotator("open_pose")
    assert module.os.environ is os.environ  # which it sets when it is imported
    assert os.environ.get("KMP_DUPLICATE_LIB_OK") == before


@pytest.mark.slow
def test_a_broken_package_breaks_only_what_needs_it(weights: Any) -> None:
    (weights("hed") / "dpt_hybrid-midas-501f0c75.pt").touch()
    code = f"""
import sys
sys.modules["timm"] = None
import numpy as np
from controlkit import preprocessors
picture = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
folder = {str(weights("hed"))!r}
try:
    preprocessors.get("midas", model=folder, device="cpu")
except ValueError as error:
    print(error)
for kind, options in {{"hed": {{"model": folder, "device": "cpu"}}, "canny": {{}}, "shuffle": {{}}}}.items():
    print(preprocessors.get(kind, **options)(picture).image.shape)
"""
    first, *others = run_fresh(code).splitlines()
    assert first.startswith("controlnet-aux's midas.midas.dpt_depth cannot be used: import of timm halted")
    assert first.endswith("install it with `pip install timm`")
    assert others == ["(64, 64, 3)"] * 3


def test_without_controlnet_aux_it_says_so() -> None:
    code = """
import sys
sys.modules["controlnet_aux"] = None
from controlkit.preprocessors.annotators import import_annotator
try:
    import_annotator("hed")
except ValueError as error:
    print(error)
"""
    (line,) = run_fresh(code).splitlines()
    assert line.startswith("controlnet-aux's hed cannot be used: ")
    assert line.endswith("install it with `pip install controlnet-aux`")


@pytest.mark.slow
def test_the_real_package_stays_usable_beside_it() -> None:
    code = """
import warnings
warnings.simplefilter("ignore")
from controlkit.preprocessors.annotators import import_annotator
first = import_annotator("hed")
import controlnet_aux
print(controlnet_aux.CannyDetector.__module__, first.__name__)
print(import_annotator("lineart").LineartDetector is controlnet_aux.LineartDetector)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = ["controlnet_aux.canny _controlkit_annotators.hed", "True"]
    assert done.stdout.splitlines()[-2:] == lines

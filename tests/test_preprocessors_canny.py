"""Canny: the bytes of cv2.Canny on the RGB picture, whatever the picture's size."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from skimage import data

from controlkit import preprocessors
from controlkit.preprocessors.canny import canny_edges

THRESHOLDS = [(100, 200), (50, 100.5), (0, 0), (99.9, 1000), (200, 200)]


@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat", "rocket"])
def test_photographs_give_opencvs_bytes(name: str) -> None:
    photograph = getattr(data, name)()
    for low, high in THRESHOLDS:
        expected = cv2.Canny(photograph, low, high)
        assert np.array_equal(canny_edges(photograph, low=low, high=high), expected)
    assert 0.01 < (cv2.Canny(photograph, 100, 200) > 0).mean() < 0.3  # there was something to get wrong


def test_every_size_gives_opencvs_bytes() -> None:
    rng = np.random.default_rng(0)
    for height in (1, 2, 3, 63, 64, 65, 66, 128, 129, 130):  # around the strips' ends
        for width in (1, 2, 7, 8, 9, 33, 100):
            picture = rng.integers(0, 256, (height, width, 3), np.uint8)
            picture[::3] //= 4  # calmer rows, where the thresholds decide
            for low, high in THRESHOLDS:
                expected = cv2.Canny(picture, low, high)
                assert np.array_equal(canny_edges(picture, low=low, high=high), expected), (height, width)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_nothing(threads: int) -> None:
    photograph = np.tile(data.astronaut(), (2, 2, 1))[:1003, :997]
    expected = cv2.Canny(photograph, 100, 200)
    before = cv2.getNumThreads()
    cv2.setNumThreads(threads)
    try:
        assert np.array_equal(canny_edges(photograph, low=100, high=200), expected)
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize(("height", "width"), [(17, 9000), (33, 4096), (300, 3000), (2100, 31), (1025, 64)])
def test_strips_of_any_shape_give_opencvs_bytes(height: int, width: int) -> None:
    photograph = np.resize(data.coffee(), (height, width, 3))
    assert np.array_equal(canny_edges(photograph, low=100, high=200), cv2.Canny(photograph, 100, 200))


def test_a_picture_that_is_not_contiguous() -> None:
    flipped = data.astronaut()[::-1, ::-1]
    expected = cv2.Canny(np.ascontiguousarray(flipped), 100, 200)
    assert np.array_equal(preprocessors.get("canny")(flipped).image[..., 0], expected)


def test_the_strongest_channel_decides() -> None:
    # Red and green have the same grey value here, so that a detector on grey levels would see no edge.
    picture = np.zeros((40, 40, 3), np.uint8)
    picture[:, :20], picture[:, 20:] = (196, 0, 0), (0, 100, 0)
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    assert np.ptp(grey) <= 1
    assert (preprocessors.get("canny")(picture).image[10:30, 18:22] == 255).any()


def test_the_map_says_what_it_is() -> None:
    made = preprocessors.get("canny", low=50)(data.cat())
    assert (made.kind, made.polarity, made.model, made.poses) == ("canny", "white-on-black", None, None)
    assert made.params == {"low": 50, "high": 200}
    assert made.image.shape == data.cat().shape
    assert made.image.dtype == np.uint8
    assert set(np.unique(made.image)) == {0, 255}
    assert (made.image == made.image[..., :1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 200, "high": 100}, "low threshold 200 is above its high threshold 100"),
        ({"low": -1}, "low threshold is -1"),
        ({"high": float("inf")}, "high threshold is inf"),
        ({"low": float("nan")}, "low threshold is nan"),
        ({"low": "50x"}, "canny's low is '50x'; it must be a number or a range"),
        ({"low": None}, "canny's low is None; it must be a number"),
        ({"high": 10**400}, "it must be a number"),
        ({"high": "1" * 400}, "high threshold is inf"),
        ({"lo": 3}, r"unknown canny option 'lo' \(did you mean 'low'\?\); choose from: .*high"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessors.get("canny", **options)


@pytest.mark.parametrize("high", [2039, 2040, 3000, 2**31, 1e300])
def test_no_edge_is_stronger_than_the_strongest(high: float) -> None:
    black_and_white = np.zeros((40, 40, 3), np.uint8)
    black_and_white[:, 20:] = 255
    black_and_white[20:, 20:] = 0
    assert not preprocessors.get("canny", low=high, high=high)(black_and_white).image.any()


def test_numbers_may_be_text_but_text_is_no_number() -> None:
    assert preprocessors.get("canny", low="50", high="1e2")(data.cat()).params == {"low": 50, "high": 100}
    with pytest.raises(ValueError, match="openpose's style is 3; it must be text"):
        preprocessors.get("openpose", style=3)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown map 'cany' \(did you mean 'canny'\?\)"):
        preprocessors.get("cany")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        preprocessors.nothing  # noqa: B018


def test_canny_imports_no_network_library() -> None:
    code = (
        "import sys, numpy; from controlkit import preprocessors;"
        "preprocessors.get('canny')(numpy.zeros((8, 8, 3), 'uint8'));"
        "print([name for name in ('torch', 'transformers', 'diffusers', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("aperture", [3, 5, 7])
@pytest.mark.parametrize("l2", [False, True])
def test_apertures_and_norms_are_opencvs(aperture: int, l2: bool) -> None:
    photograph = data.rocket()
    for low, high in [(100, 200), (300.5, 900), (2000, 9000)]:
        expected = cv2.Canny(photograph, low, high, apertureSize=aperture, L2gradient=l2)
        made = preprocessors.get("canny", low=low, high=high, aperture=aperture, l2=l2)(photograph)
        assert np.array_equal(made.image[..., 0], expected)
        nothing = preprocessors.get("canny", low=1e8, high=1e12, aperture=aperture, l2=l2)(photograph)
        assert not nothing.image.any()


def test_blur_comes_first() -> None:
    photograph = data.astronaut()
    expected = cv2.Canny(cv2.GaussianBlur(photograph, (0, 0), 2.5), 100, 200)
    assert np.array_equal(preprocessors.get("canny", blur=2.5)(photograph).image[..., 0], expected)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "cat", "rocket", "coins", "moon", "page", "gravel"])
def test_auto_follows_its_rule_and_finds_edges_anywhere(name: str) -> None:
    photograph = getattr(data, name)()
    made = preprocessors.get("canny", auto=True)(photograph)
    rgb = np.stack([photograph] * 3, axis=2) if photograph.ndim == 2 else photograph
    padded = cv2.copyMakeBorder(rgb, 1, 1, 1, 1, cv2.BORDER_REPLICATE).astype(np.int32)
    smooth_y = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    smooth_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    gradient = np.abs(smooth_y[:, 2:] - smooth_y[:, :-2]) + np.abs(smooth_x[2:] - smooth_x[:-2])
    high = max(40.0, float(np.quantile(gradient.max(axis=2), 0.9)))
    assert made.params["high"] == pytest.approx(high, abs=0.06)
    assert made.params["low"] == pytest.approx(0.4 * high, abs=0.06)
    assert 0.03 < (made.image[..., 0] > 0).mean() < 0.3  # 0.004 to 0.31 at 100 and 200
    assert np.array_equal(made.image[..., 0], cv2.Canny(rgb, made.params["low"], made.params["high"]))


def test_auto_sees_no_edges_in_noise() -> None:
    noisy = np.clip(np.random.default_rng(0).normal(128, 1.5, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert (preprocessors.get("canny", auto=True)(noisy).image > 0).mean() < 0.001


def test_drawn_thresholds_repeat_and_vary() -> None:
    pictures = [data.astronaut()[:200, i : i + 200] for i in range(0, 300, 15)]
    extract = preprocessors.get("canny", low="50..150", high=(150, 300), seed=1)
    drawn = [extract(picture).params for picture in pictures]
    assert [extract(picture).params for picture in reversed(pictures)] == drawn[::-1]  # whatever the order
    lows, highs = np.array([[p["low"], p["high"]] for p in drawn], dtype=float).T
    assert ((lows >= 50) & (lows <= 150) & (highs >= 150) & (highs <= 300)).all()
    assert np.ptp(lows) > 50  # of 20 draws from a range of 100
    assert np.ptp(highs) > 75
    other = preprocessors.get("canny", low="50..150", high=(150, 300), seed=2)
    assert [other(picture).params for picture in pictures] != drawn
    for picture, params in zip(pictures, drawn, strict=True):
        expected = cv2.Canny(np.ascontiguousarray(picture), params["low"], params["high"])
        assert np.array_equal(extract(picture).image[..., 0], expected)
    crossing = preprocessors.get("canny", low=(100, 200), high=(100, 200))
    for picture in pictures:
        params = crossing(picture).params
        assert float(params["low"]) <= float(params["high"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": "150..50"}, r"range 150\.\.50: it goes upwards"),
        ({"low": (50, 300)}, "low threshold 300 is above its high threshold 200"),
        ({"low": (-1, 5)}, "low threshold is -1"),
        ({"auto": True, "low": 40}, "auto chooses the thresholds itself"),
        ({"auto": True, "l2": True}, "auto is defined for aperture 3"),
        ({"aperture": 4}, "aperture is 4; it must be 3, 5 or 7"),
        ({"blur": -0.5}, "blur is -0.5"),
        ({"seed": -3}, "seed is -3"),
    ],
)
def test_new_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preprocessors.get("canny", **options)

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
        ({"low": "50x"}, "canny's low is '50x'; it must be a number"),
        ({"low": None}, "canny's low is None; it must be a number"),
        ({"high": 10**400}, "it must be a number"),
        ({"high": "1" * 400}, "high threshold is inf"),
        ({"lo": 3}, r"unknown canny option 'lo' \(did you mean 'low'\?\); choose from: high, low"),
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
    assert preprocessors.names() == ["canny", "depth", "openpose"]
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

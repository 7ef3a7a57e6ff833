"""The geometry of visits: shapes, views, and that picture and map stay in register whatever their sizes."""

import itertools
import math

import cv2
import numpy as np
import pytest
from skimage import data as photographs

from controlkit import images
from controlkit.preprocessors import get
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.views import View, look, make_views, nearest_shape, shapes

BUCKETS = [(512, 64, 2.0), (1024, 64, 2.0), (128, 8, 2.0), (128, 64, 2.0), (192, 8, 8.0), (520, 64, 1.5)]
# width and height of a picture, and the shape it is cut to: shrunk, grown, neither, odd, narrow, wide
GEOMETRIES = [
    ((701, 403), (256, 256)),
    ((403, 701), (256, 192)),
    ((151, 173), (256, 256)),
    ((256, 256), (256, 256)),
    ((257, 300), (256, 256)),
]


@pytest.mark.parametrize(("resolution", "step", "ratio"), BUCKETS)
def test_buckets_are_all_the_shapes_of_about_the_area(resolution: int, step: int, ratio: float) -> None:
    data = DataRecipe(buckets=True, bucket_step=step, bucket_ratio=ratio)
    found = shapes(data, resolution=resolution)
    area, side = resolution**2, resolution // step * step
    sides = range(step, area // step + 1, step)

    def fits(width: int, height: int) -> bool:
        return width * height <= area

    wanted = [
        (w, h)
        for w, h in itertools.product(sides, sides)
        if fits(w, h)
        and max(w, h) <= ratio * min(w, h)
        and (w == h == side or not (fits(w + step, h) or fits(w, h + step)))
    ]
    assert found == sorted(wanted)
    assert (side, side) in found
    assert set(found) == {(h, w) for w, h in found}


def test_without_buckets_there_is_one_square() -> None:
    assert shapes(DataRecipe(), resolution=512) == [(512, 512)]
    assert shapes(DataRecipe(buckets=True, bucket_step=1024), resolution=512) == [(512, 512)]  # no step fits


def test_the_nearest_shape_has_the_nearest_aspect() -> None:
    found = shapes(DataRecipe(buckets=True), resolution=512)
    rng = np.random.default_rng(0)
    for width, height in rng.integers(20, 3000, (200, 2)).tolist():
        distances = [abs(math.log(w / h * height / width)) for w, h in found]
        chosen = nearest_shape((width, height), found)
        assert distances[chosen] == pytest.approx(min(distances), abs=1e-8)
        backwards = found[::-1]
        assert backwards[nearest_shape((width, height), backwards)] == found[chosen]
    assert found[nearest_shape((9000, 10), found)] == (640, 384)


def test_of_equally_near_shapes_the_larger_and_then_the_first() -> None:
    assert nearest_shape((10, 10), [(64, 64), (128, 128)]) == 1
    assert nearest_shape((10, 10), [(64, 128), (128, 64)]) == 0
    assert nearest_shape((10, 10), [(128, 64), (64, 128)]) == 0


@pytest.mark.parametrize(("size", "shape"), [*GEOMETRIES, ((3000, 2), (64, 64)), ((1, 999), (64, 128))])
@pytest.mark.parametrize("crop", ["centre", "random"])
def test_views_cover_their_shape_and_keep_the_aspect(size: tuple, shape: tuple, crop: str) -> None:
    for view in make_views(size, shape, data=DataRecipe(crop=crop, flip=0.5), key="x"):
        assert (view.width, view.height) == shape
        assert view.resized_width == shape[0] or view.resized_height == shape[1]
        exact = max(shape[0] / size[0], shape[1] / size[1])
        assert abs(view.resized_width - size[0] * exact) <= 0.5 + 1e-9
        assert abs(view.resized_height - size[1] * exact) <= 0.5 + 1e-9
        assert 0 <= view.left <= view.resized_width - view.width
        assert 0 <= view.top <= view.resized_height - view.height
        if crop == "centre":
            assert abs((view.resized_width - view.width) - 2 * view.left) <= 1
            assert abs((view.resized_height - view.height) - 2 * view.top) <= 1


def test_random_places_are_drawn_from_the_key_alone_and_numbered() -> None:
    recipe = DataRecipe(crop="random", crops=6, flip=0.5)
    views = make_views((900, 300), (256, 256), data=recipe, key="a")
    assert views == make_views((900, 300), (256, 256), data=recipe, key="a")
    assert views != make_views((900, 300), (256, 256), data=recipe, key="b")
    assert len({view.left for view in views}) == 6
    for plain, mirror in zip(views[::2], views[1::2], strict=True):
        assert (plain.left, plain.top) == (mirror.left, mirror.top)
        assert (plain.mirrored, mirror.mirrored) == (False, True)
    fewer = make_views((900, 300), (256, 256), data=DataRecipe(crop="random", crops=2, flip=0.5), key="a")
    assert fewer == views[:4]


def test_places_reach_all_of_the_room() -> None:
    recipe = DataRecipe(crop="random", crops=400)
    lefts = [view.left for view in make_views((300, 256), (256, 256), data=recipe, key=0)]
    assert (min(lefts), max(lefts)) == (0, 44)
    assert len(make_views((256, 256), (256, 256), data=recipe, key=0)) == 1  # no room: one view


@pytest.mark.parametrize(("flip", "faces"), [(0.0, [False]), (0.3, [False, True]), (1.0, [True])])
def test_faces(flip: float, faces: list[bool]) -> None:
    views = make_views((300, 300), (256, 256), data=DataRecipe(flip=flip), key=0)
    assert [view.mirrored for view in views] == faces


def all_views(size: tuple[int, int], shape: tuple[int, int]) -> list[View]:
    return make_views(size, shape, data=DataRecipe(crop="random", crops=2, flip=0.5), key=size)


def spot(size: tuple[int, int], at: tuple[float, float], spread: float) -> np.ndarray:
    """A bright spot, float32, whose middle is the place (x, y); pixel i spans i to i + 1."""
    x, y = (np.arange(side) + 0.5 for side in size)
    squares = (x[None] - at[0]) ** 2 + (y[:, None] - at[1]) ** 2
    return np.exp(-squares / (2 * spread**2)).astype(np.float32)


@pytest.mark.parametrize(("size", "shape"), GEOMETRIES)
@pytest.mark.parametrize("factor", [1.0, 0.5, 1.83])
def test_a_place_lands_where_the_view_says_in_picture_and_map(
    size: tuple, shape: tuple, factor: float
) -> None:
    for view in all_views(size, shape):
        scale = view.resized_width / size[0], view.resized_height / size[1]
        target = np.array([view.width * 0.41, view.height * 0.63])
        place = np.add(target, (view.left, view.top)) / scale  # in the picture
        expected = (view.width - target[0] if view.mirrored else target[0], target[1])
        map_size = tuple(max(1, round(side * factor)) for side in size)
        drawn = spot(map_size, tuple(place * map_size / size), 6 * factor / scale[0])
        seen = look((drawn * 255).astype(np.uint8), view).astype(np.float64)
        y, x = np.indices(seen.shape) + 0.5
        found = (x * seen).sum() / seen.sum(), (y * seen).sum() / seen.sum()
        assert np.allclose(found, expected, atol=0.1), (found, expected, view)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How far the lines of one binary map lie from those of another, in pixels, a number for each pixel."""
    to_other = cv2.distanceTransform((other == 0).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return to_other[one > 0]


def drawing(size: tuple[int, int]) -> np.ndarray:
    """Flat shapes with curved and straight outlines, anti-aliased."""
    width, height = size
    picture = np.full((4 * height, 4 * width, 3), (40, 60, 90), np.uint8)
    for k, (x, y) in enumerate([(0.3, 0.3), (0.65, 0.35), (0.4, 0.7), (0.75, 0.75)]):
        middle = int(4 * width * x), int(4 * height * y)
        axes = int(0.56 * width), int(0.4 * height)
        cv2.ellipse(picture, middle, axes, 30 * k, 0, 360, (255 - 40 * k, 80 * k, 200), -1)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize(("size", "shape"), GEOMETRIES)
@pytest.mark.parametrize("factor", [1.0, 0.61, 1.83])
def test_the_edges_of_the_view_lie_on_the_view_of_the_edges(size: tuple, shape: tuple, factor: float) -> None:
    picture, canny = drawing(size), get("canny")
    map_size = round(size[0] * factor), round(size[1] * factor)
    edges = canny(drawing(map_size)).image
    for view in all_views(size, shape):
        lines = look(edges, view, sampling="lines")
        assert set(np.unique(lines)) == {0, 255}
        of_view = canny(look(picture, view)).image[..., 0]
        away = distances(of_view, lines[..., 0])
        assert np.median(away) <= 1.0
        assert np.quantile(away, 0.9) <= 2.0
        # the wrong half of the views is told apart: this test can fail
        assert np.quantile(distances(of_view, lines[:, ::-1, 0]), 0.9) > 4.0


def test_an_inverted_picture_seen_is_the_view_inverted() -> None:
    picture = photographs.cat()[:, :-7]
    for view in all_views((picture.shape[1], picture.shape[0]), (192, 256)):
        assert np.abs(look(255 - picture, view).astype(int) + look(picture, view) - 255).max() <= 1


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000), (700, 5), (300, 9)])
def test_a_part_of_a_strip_is_the_part_of_the_strip_enlarged(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    strip = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    for view in all_views(size, (64, 64)):
        rows, columns = slice(view.top, view.top + 64), slice(view.left, view.left + 64)
        resized = view.resized_width, view.resized_height
        turn = slice(None, None, -1 if view.mirrored else 1)
        smooth = images.resize(strip, *resized)[rows, columns][:, turn]
        assert np.abs(look(strip, view).astype(int) - smooth).max() <= 2
        nearest = images.resize(strip, *resized, nearest=True)[rows, columns][:, turn]
        assert np.array_equal(look(strip, view, sampling="nearest"), nearest)
        lines = np.repeat((strip[..., :1] > 128) * np.uint8(255), 3, axis=2)
        assert set(np.unique(look(lines, view, sampling="lines"))) <= {0, 255}


def test_a_huge_enlargement_is_never_made() -> None:
    picture = np.full((1, 60000, 3), 7, np.uint8)  # enlarged whole: 512 x 30,720,000 pixels
    (view,) = make_views((60000, 1), (512, 512), data=DataRecipe(), key=0)
    assert np.array_equal(look(picture, view), np.full((512, 512, 3), 7, np.uint8))


def test_black_lines_on_white_stay_lines() -> None:
    edges = get("canny")(photographs.astronaut()).image
    (view,) = make_views((512, 512), (320, 320), data=DataRecipe(), key=0)
    assert np.array_equal(
        look(255 - edges, view, sampling="lines"), 255 - look(edges, view, sampling="lines")
    )


def test_what_is_seen_lies_together_in_memory() -> None:
    picture = photographs.cat()
    for view in all_views((picture.shape[1], picture.shape[0]), (192, 256)):
        seen = look(picture, view)
        assert seen.flags.c_contiguous
        assert seen.shape == (256, 192, 3)
        assert seen.dtype == np.uint8
    same = View(451, 300, 451, 300, 0, 0, mirrored=False)
    assert np.array_equal(look(picture, same), picture)


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_cut_off_at_the_left_is_told_of_the_picture_as_it_is_shown(mirrored: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    view = View(48, 64, 96, 64, 16, 0, mirrored)
    shown = image[:, ::-1] if mirrored else image
    assert np.array_equal(look(image, view), shown[:, view.seen_left : view.seen_left + 48])

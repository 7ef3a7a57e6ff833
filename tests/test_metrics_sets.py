"""Measures over many pictures, against other implementations or values known by hand."""

import contextlib
import io
import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import scipy.stats
import torch
from skimage.metrics import structural_similarity

from controlkit.figures import render
from controlkit.metrics import average_precision, interval, matches, mean_interval, ms_ssim, ssim
from controlkit.metrics.intervals import LEAST, RESAMPLES
from controlkit.metrics.pose_ap import Matches, Ranked, person_area
from controlkit.metrics.similarity import MS_SSIM_LEAST


@pytest.fixture(scope="module")
def greys():
    """A picture, it with noise, another one: (192, 192) in [0, 1]."""
    one, other = (render(k, split="validation", size=192).picture.mean(axis=2) / 255 for k in (0, 1))
    noise = np.random.default_rng(0).normal(0, 0.05, one.shape)
    return one, np.clip(one + noise, 0, 1), other


def test_ssim_is_scikit_images(greys):
    one, noisy, other = greys
    for pair in ((one, noisy), (one, other)):
        theirs = structural_similarity(
            *pair, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert ssim(*pair) == pytest.approx(theirs, abs=1e-9)
    assert ssim(one, one) == pytest.approx(1)


def test_ms_ssim_is_the_papers(greys):
    """Wang et al. 2003, equation 7, with scipy's convolution over windows that fit inside."""
    axis = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window = np.outer(axis, axis) / axis.sum() ** 2

    def blur(image):
        return scipy.signal.convolve2d(image, window, mode="valid")

    def theirs(x, y):
        product = 1.0
        for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mx, my = blur(x), blur(y)
            cov = 2 * (blur(x * y) - mx * my) + 0.03**2
            var = blur(x * x) - mx**2 + blur(y * y) - my**2 + 0.03**2
            light = (2 * mx * my + 0.01**2) / (mx**2 + my**2 + 0.01**2) if scale == 4 else 1
            product *= float((light * cov / var).mean()) ** weight
            x, y = (sum(i[a::2, b::2] for a in (0, 1) for b in (0, 1)) / 4 for i in (x, y))
        return product

    one, noisy, other = greys
    for pair in ((one, noisy), (one, other)):
        assert ms_ssim(*pair) == pytest.approx(theirs(*pair), abs=1e-9)
    assert ms_ssim(one, one) == pytest.approx(1)


def test_a_map_too_small_for_five_scales_is_refused():
    small = np.zeros((MS_SSIM_LEAST - 1, 400))
    with pytest.raises(ValueError, match="sides of 176 or more"):
        ms_ssim(small, small)
    levels = np.zeros((176, 176), np.uint8)
    for measure in (ssim, ms_ssim):
        with pytest.raises(ValueError, match=r"ssim: wanted are floats in \[0, 1\], not uint8$"):
            measure(levels, 255 - levels)
        for beyond, ends in ((255.0, "from 0 to 255"), (np.nan, "from nan to nan")):
            wrong = np.zeros((176, 176))
            wrong[0, 0] = beyond
            with pytest.raises(ValueError, match=rf"ssim: wanted are floats in \[0, 1\], not {ends}$"):
                measure(levels / 255, wrong)
    assert ms_ssim(np.zeros((176, 176)), np.zeros((176, 176))) == pytest.approx(1)


def test_a_picture_and_its_negative_have_nothing_in_common(greys):
    assert ms_ssim(greys[0], 1 - greys[0]) == 0


def people(random, count, *, sure=True):
    """Poses in COCO's order, (count, 17, 3), within 400 x 400 pixels."""
    poses = np.zeros((count, 17, 3))
    for pose in poses:
        pose[:, :2] = random.uniform(40, 360, 2) + random.uniform(-40, 40, (17, 2))
        pose[:, 2] = 1 if sure else random.uniform(0.2, 1, 17)
    return poses


def coco_precision(wanted, found, scores):
    """The reference: pycocotools on the same people, with our areas."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, detections = [], []
    for image, (true, seen, sure) in enumerate(zip(wanted, found, scores, strict=True), start=1):
        for pose in true:
            marks = np.where(pose[:, 2:] > 0, 2, 0)
            box = [*pose[:, :2].min(axis=0), *np.ptp(pose[:, :2], axis=0)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 1,
                    "keypoints": np.hstack([pose[:, :2], marks]).reshape(-1).tolist(),
                    "num_keypoints": int((pose[:, 2] > 0).sum()),
                    "area": person_area(pose),
                    "bbox": [float(x) for x in box],
                    "iscrowd": 0,
                }
            )
        for pose, score in zip(seen, sure, strict=True):
            points = np.hstack([pose[:, :2], np.ones((17, 1))])
            detections.append(
                {
                    "image_id": image,
                    "category_id": 1,
                    "keypoints": points.reshape(-1).tolist(),
                    "score": score,
                }
            )
    truth = COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": k + 1} for k in range(len(wanted))],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "keypoints")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.evaluate()
        evaluation.accumulate()
    return float(evaluation.eval["precision"].mean())


@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_cocos(seed):
    random = np.random.default_rng(seed)
    wanted, found = [], []
    for _ in range(12):
        true = people(random, random.integers(1, 5))
        seen = [pose + random.normal(0, random.choice([0.5, 2, 6]), pose.shape) * [1, 1, 0] for pose in true]
        seen = [pose for pose in seen if random.random() < 0.8]
        seen += list(people(random, random.integers(0, 3)))
        for pose in seen:
            pose[:, 2] = random.uniform(0.2, 1, 17)
        wanted.append(true)
        found.append(np.array(seen).reshape(-1, 17, 3))
    compared = [matches(seen, true) for seen, true in zip(found, wanted, strict=True)]
    ours = average_precision(compared)
    theirs = coco_precision(wanted, found, [one.scores.tolist() for one in compared])
    assert 0.05 < ours < 0.95
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_average_precision_by_hand():
    right = Matches(np.array([[0.97]]), np.array([0.9]))
    nobody = Matches(np.zeros((0, 1)), np.zeros(0))
    one_too_many = Matches(np.zeros((1, 0)), np.array([0.95]))
    assert average_precision([right]) == pytest.approx(1)
    assert average_precision([nobody]) == 0
    assert average_precision([right, nobody]) == pytest.approx(51 / 101)  # recalls up to a half
    assert average_precision([right, one_too_many]) == pytest.approx(0.5)  # the surer one is wrong
    assert math.isnan(average_precision([one_too_many]))
    half_like = Matches(np.array([[0.72]]), np.array([0.9]))
    assert average_precision([half_like]) == pytest.approx(0.5)  # of ten thresholds, .50 to .70
    at_a_threshold = Matches(np.array([[0.5]]), np.array([0.9]))
    assert average_precision([at_a_threshold]) == pytest.approx(0.1)
    crowd = Matches(np.array([[0.0]] * 20 + [[0.97]]), np.linspace(0.9, 0.1, 21))
    assert average_precision([crowd]) == 0  # 20 of a picture count, the surest
    alike = Matches(np.array([[0.97, 0.97], [0.97, 0.2]]), np.array([0.9, 0.8]))
    assert average_precision([alike]) == pytest.approx(1)  # the first takes the last of equals


def test_average_precision_says_what_it_takes():
    pose = np.stack([np.arange(18) * 5.0, np.arange(18) * 3.0, np.ones(18)], axis=1)
    picture = matches([pose.tolist()], [pose.tolist()])  # lists are what their arrays are
    assert picture.similarity == matches(pose[None], pose[None]).similarity == 1
    for given in (picture, iter([picture]), [pose]):
        with pytest.raises(ValueError, match="pictures is a list"):
            average_precision(given)
    for thresholds in ([], 0.5):
        with pytest.raises(ValueError, match="thresholds is a list of numbers"):
            average_precision([picture], thresholds=thresholds)


@pytest.mark.parametrize(
    ("name", "given"), [("resamples", 0), ("resamples", 9.5), ("seed", -1), ("seed", 0.5), ("level", "0.9")]
)
def test_an_interval_takes_whole_numbers(name, given):
    with pytest.raises(ValueError, match=f"{name} of an interval"):
        mean_interval(range(9), **{name: given})


def test_joints_that_are_not_there_count_for_nothing():
    """Neither in how sure a pose is nor in its area, which one joint alone has, too."""
    true, found = np.zeros((1, 17, 3)), np.zeros((1, 17, 3))
    true[0, 3] = 40, 50, 1
    found[0, 3], found[0, 4] = (40, 50, 0.9), (10, 10, 0.5)
    compared = matches(found, true)
    assert compared.scores.tolist() == pytest.approx([0.7])
    assert compared.similarity.tolist() == [[1.0]]
    assert person_area(true[0]) == 1
    assert person_area(found[0]) == pytest.approx(0.53 * 30 * 40)


def test_intervals_of_few_values_are_students():
    """Hesterberg 2015, section 4.2: the share of resamples left out at either end, of eight values."""
    values = np.random.default_rng(3).normal(size=8)
    tail = scipy.stats.norm.cdf(math.sqrt(8 / 7) * scipy.stats.t.ppf(0.025, 7))
    means = values[np.random.default_rng(9).integers(8, size=(500_000, 8))].mean(axis=1)
    low, high = np.quantile(means, [tail, 1 - tail])
    found = mean_interval(values, resamples=500_000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.025 * means.std())


def test_intervals_are_scipys():
    values = np.random.default_rng(3).gamma(2.0, size=60)
    ours = mean_interval(values, resamples=20_000)
    level = 1 - 2 * scipy.stats.norm.cdf(-math.sqrt(60 / 59) * scipy.stats.t.ppf(0.975, 59))  # Hesterberg
    theirs = scipy.stats.bootstrap(
        *((values,), np.mean),
        n_resamples=20_000,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(9),
    ).confidence_interval
    spread = values.std() / math.sqrt(60)
    assert ours.value == values.mean()
    assert ours.low == pytest.approx(theirs.low, abs=0.1 * spread)
    assert ours.high == pytest.approx(theirs.high, abs=0.1 * spread)
    assert mean_interval(values) == mean_interval(values)
    other = interval(lambda chosen: float(values[chosen].mean()), 60)
    assert other.low == pytest.approx(ours.low, abs=0.2 * spread)


@pytest.mark.parametrize("count", [LEAST, 10, 40])
def test_intervals_hold_what_they_promise(count):
    """Of 600 repetitions, about 95 % have the true mean; Efron's own of 8 values miss it twice as often."""
    random = np.random.default_rng(5)
    inside = efrons = 0
    for _ in range(600):
        values = random.normal(1.0, 2.0, size=count)
        found = mean_interval(values, resamples=400)
        inside += found.low <= 1.0 <= found.high
        means = values[random.integers(count, size=(1000, count))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        efrons += low <= 1.0 <= high
    assert 555 <= inside <= 585
    assert count > LEAST or 600 - efrons >= 2 * 30  # 30 of 600 are the 5 % that they promise


def test_what_has_no_interval():
    for found in (mean_interval(np.arange(7.0)), interval(lambda chosen: float(chosen.mean()), 7)):
        assert found.value == 3
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    assert math.isfinite(mean_interval(np.arange(8.0)).low)
    assert mean_interval(list(range(8))) == mean_interval(np.arange(8.0))
    for missing in (math.nan, math.inf):
        unsure = mean_interval([*range(8), missing])
        assert not math.isfinite(unsure.value)
        assert math.isnan(unsure.low)
        assert math.isnan(unsure.high)
        assert unsure.resamples == 0
    with pytest.raises(ValueError, match=r"one value per pair, \(N,\), not \(4, 2\)"):
        mean_interval(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval(np.zeros(0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        mean_interval(np.ones(3), level=95)


def test_resamples_without_a_number_are_left_out():
    values = np.random.default_rng(2).normal(size=20)
    some = interval(lambda chosen: values[chosen].mean() if chosen[0] else math.nan, 20)
    assert math.isfinite(some.low)
    assert some.low < some.high
    assert 0.9 * RESAMPLES < some.resamples < RESAMPLES


def test_an_interval_too_far_out_is_none_and_costs_nothing():
    """Of 8 pairs, 28 comparisons would want 800 million resamples."""
    never = np.random.default_rng(0).normal(size=8)
    for comparisons in (6, 28, 10_000):
        level = 1 - 0.05 / comparisons
        mean = mean_interval(never, level=level)
        other = interval(lambda chosen: float(never[chosen].mean()), 8, level=level)
        assert mean.value == other.value == never.mean()
        assert math.isnan(mean.low)
        assert math.isnan(other.high)
        assert mean.resamples == other.resamples == 0
    three = mean_interval(never, level=1 - 0.05 / 3)
    assert math.isfinite(three.low)
    assert RESAMPLES < three.resamples < 100_000
    assert mean_interval(np.arange(40.0), resamples=3000).resamples == 3000


def test_precision_of_many_choices_is_that_of_each():
    """People by pair, some found twice and some never, and nobody asked for in one of them."""
    random = np.random.default_rng(6)
    sizes = [(2, 1), (0, 2), (1, 0), (3, 3), (25, 2), (1, 1)]
    pictures = [Matches(random.random(size) ** 0.2, random.random(size[0])) for size in sizes]
    groups = [pictures[:2], *([one] for one in pictures[2:])]
    chosen = random.integers(len(groups), size=(60, len(groups)))
    chosen[0] = 1  # where nobody is asked for
    found = Ranked(groups).precisions(chosen)
    alone = [average_precision([one for k in row for one in groups[k]]) for row in chosen]
    assert math.isnan(found[0])
    assert found == pytest.approx(alone, abs=1e-12, nan_ok=True)
    assert len(set(found[1:])) > 20


def features(seed, shift=0.0, count=60, width=16):
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(width, width)) if seed % 2 else np.eye(width)
    return (random.normal(size=(count, width)) @ mixed + shift).astype(np.float32)


def test_the_frechet_distance_is_the_papers():
    """Heusel et al. 2017, equation 6, by scipy's matrix square root."""
    from controlkit.training.evaluation.inception import frechet_distance

    real, fake = features(0).astype(np.float64), features(1, 0.3).astype(np.float64)
    (m, c), (n, d) = ((x.mean(axis=0), np.cov(x, rowvar=False)) for x in (real, fake))
    theirs = ((m - n) ** 2).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(real, fake) == pytest.approx(theirs, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_the_kernel_distance_is_the_papers():
    """Bińkowski et al. 2018, equation 4: the unbiased estimate with the kernel (x.y / d + 1)^3."""
    from controlkit.training.evaluation.inception import kernel_distance

    x, y = features(0).astype(np.float64), features(2, 0.4).astype(np.float64)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    n = len(x)
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kernel(x, x), kernel(y, y)))
    theirs = within - 2 * kernel(x, y).mean()
    mean, spread = kernel_distance(x, y)  # every subset is the whole set: there is no spread
    assert mean == pytest.approx(theirs, rel=1e-9)
    assert math.isnan(spread)
    assert kernel_distance(x[::-1], y) == (pytest.approx(mean, rel=1e-9), pytest.approx(spread, nan_ok=True))


def test_the_kernel_distance_is_torchmetrics_where_that_takes_all():
    from torchmetrics.image.kid import poly_mmd

    from controlkit.training.evaluation.inception import kernel_distance

    x, y = features(0).astype(np.float64), features(2, 0.4).astype(np.float64)
    theirs = float(poly_mmd(torch.from_numpy(x), torch.from_numpy(y)))
    assert kernel_distance(x, y)[0] == pytest.approx(theirs, rel=1e-9)


def test_the_kernel_distance_of_sets_of_two_sizes_takes_all_pictures_of_both():
    """It is unbiased at any sizes: the mean over halves of one set, each against the whole other, comes near
    it, and no picture is left out.
    """
    from controlkit.training.evaluation.inception import kernel_distance

    x, y = features(0).astype(np.float64), features(2, 0.4).astype(np.float64)
    part = y[: len(y) // 2]
    n, m, count = len(x), len(part), x.shape[1]
    total = 0.0
    for a, b, weight in ((x, x, 1 / (n * (n - 1))), (part, part, 1 / (m * (m - 1))), (x, part, -2 / (n * m))):
        for i in range(len(a)):
            for j in range(len(b)):
                if a is not b or i != j:
                    total += weight * (a[i] @ b[j] / count + 1) ** 3
    assert kernel_distance(x, part)[0] == pytest.approx(total, rel=1e-9)
    changed = part.copy()
    changed[-1] += 1
    assert kernel_distance(x, changed)[0] != kernel_distance(x, part)[0]


def test_the_spread_of_a_kernel_distance_is_of_subsets(monkeypatch):
    from controlkit.training.evaluation import inception

    monkeypatch.setattr(inception, "SUBSET", 20)
    x, y = features(0), features(2, 0.4)
    mean, spread = inception.kernel_distance(x, y)
    assert spread > 0
    monkeypatch.undo()
    assert mean == pytest.approx(inception.kernel_distance(x, y)[0], rel=1e-9)


def test_the_resizing_is_clean_fids():
    """It averages where it shrinks, keeps what is flat, and is the same for each channel by itself."""
    from controlkit.training.evaluation.inception import clean_resize

    picture = render(3, size=598).picture
    small = clean_resize(picture)
    assert small.shape == (299, 299, 3)
    assert small.dtype == np.float32
    assert small.mean() == pytest.approx(picture.mean(), abs=0.05)
    stripes = np.zeros((598, 598, 3), np.uint8)
    stripes[:, ::2] = 255  # what a filter that does not average turns black or white
    inner = clean_resize(stripes)[20:-20, 20:-20]
    assert np.abs(inner - 127.5).max() < 1
    flat = clean_resize(np.full((70, 90, 3), 200, np.uint8))
    assert np.allclose(flat, 200, atol=1e-3)
    reversed_channels = clean_resize(picture[..., ::-1])
    assert np.array_equal(reversed_channels, small[..., ::-1])
    assert np.unique(small % 1).size > 1000  # not rounded to 8 bits

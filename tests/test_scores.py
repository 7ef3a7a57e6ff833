"""Scores of control on held-out pairs: every kind knows a right picture from a wrong one."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.figures import render
from controlkit.metrics import ssim
from controlkit.preprocessors import Poses, get
from controlkit.training.reporting.measures import joints_right, measure_of
from controlkit.training.reporting.scores import Pair, Scorer
from controlkit.training.world import exact_map


@pytest.fixture(scope="module")
def scenes():
    return [render(seed, split="validation", size=128) for seed in range(2)]


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


def pairs_of(kind, scenes):
    return [Pair(s.picture, exact_map(kind, s.picture, s.joints, s.inverse_depth), s.caption) for s in scenes]


def random_states():
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def test_the_bundled_adapter_lies_between_floor_and_ceiling(base, scenes):
    controlnet = load_adapter("canny", base=base).controlnet.train()
    scorer = Scorer(base, pairs_of("canny", scenes), kind="canny", steps=4)
    before = random_states()
    scores = scorer.score(controlnet)
    assert random_states() == before
    assert all(module.training for module in controlnet.modules())
    floor, ours, ceiling = (table["edge F1"] for table in (scores.floor, scores.control, scores.ceiling))
    assert floor < ours - 0.05 < ours < ceiling <= 1
    again = scorer.score(controlnet)
    assert again == scores
    assert again.floor is scores.floor  # measured once
    assert scores.row() == {"edge F1": ours, "edge F1 floor": floor, "edge F1 ceiling": ceiling}
    assert scores.to_json()["pairs"] == 2
    scorer.pairs = scorer.pairs[:1]
    assert scorer.score(controlnet, base_changed=True).floor is not scores.floor


def test_a_copy_in_full_precision_is_scored_as_it_is_used(base, scenes):
    """With a half-precision base, in the base's precision, and itself untouched."""
    half = load_base("tiny", dtype=torch.bfloat16)
    controlnet = load_adapter("canny", base=base).controlnet
    scores = Scorer(half, pairs_of("canny", scenes[:1]), kind="canny", steps=2).score(controlnet)
    assert 0 <= scores.control["edge F1"] <= 1
    assert controlnet.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "name", "lower"),
    [("canny", "edge F1", False), ("depth", "depth error", True), ("openpose", "joints", False)],
)
def test_the_right_picture_scores_better_than_another(kind, name, lower, scenes):
    preprocessor = get(kind) if kind == "canny" else get(kind, model="tiny")
    measure = measure_of(kind)(pairs_of(kind, scenes), preprocessor)
    right = [measure(scenes[k].picture, k)[name] for k in (0, 1)]
    wrong = [measure(scenes[1 - k].picture, k)[name] for k in (0, 1)]
    assert all(r < w for r, w in zip(right, wrong, strict=True)) if lower else min(right) > max(wrong)
    if kind == "canny":
        assert right == [1, 1]


def test_other_kinds_are_compared_as_maps(scenes):
    """Soft edges, in 8 and in 16 bits, of three channels and of one."""
    preprocessor = get("softedge")
    made = [preprocessor(scene.picture).image for scene in scenes]
    pairs = [Pair(s.picture, m, s.caption) for s, m in zip(scenes, made, strict=True)]
    deep = [replace(pair, map=pair.map[..., :1].astype(np.uint16) * 257) for pair in pairs]
    for given in (pairs, deep):
        measure = measure_of("softedge")(given, preprocessor)
        right, wrong = measure(scenes[0].picture, 0), measure(scenes[1].picture, 0)
        assert right == pytest.approx({"map SSIM": 1, "map error": 0}, abs=1e-6)
        assert wrong["map SSIM"] < 0.9
        assert wrong["map error"] > 0.01


def test_known_joints_count_and_people_without_joints_do_not(scenes):
    """Joints from a file decide, and a picture in which nobody is to be found is left out of the mean."""
    preprocessor = get("openpose", model="tiny")
    scene = scenes[0]
    pair = pairs_of("openpose", scenes)[0]
    true = Poses(scene.joints[None].astype(np.float64), 128, 128)
    elsewhere = scene.joints.astype(np.float64).copy()
    elsewhere[:, 0] += 60
    moved = replace(pair, poses=Poses(elsewhere[None], 128, 128))
    empty = replace(pair, poses=Poses(np.zeros((0, 18, 3)), 128, 128))
    measure = measure_of("openpose")([replace(pair, poses=true), moved, empty], preprocessor)
    assert measure(scene.picture, 0)["joints"] > 0.8
    assert measure(scene.picture, 1)["joints"] < 0.3
    assert measure(scene.picture, 2) == {}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("sketches", {}, "no preprocessor is known that makes sketches maps"),
        ("depth", {}, "no preprocessor is known that makes depth maps"),
        ("shuffle", {}, "no layout"),
        ("canny", {"map": np.zeros((128, 128, 6), np.uint8)}, "stacks of several maps"),
    ],
)
def test_what_cannot_be_scored_says_why(base, scenes, kind, change, reason):
    pairs = [replace(pair, **change) for pair in pairs_of("canny", scenes)]
    scorer = Scorer(base, pairs, kind=kind)
    assert reason in scorer.why_not
    assert scorer.score(None) is None
    assert "held out" in Scorer(base, [], kind="canny").why_not


def test_pictures_without_people_have_no_joints_to_score(base, scenes):
    nobody = Poses(np.zeros((0, 18, 3)), 128, 128)
    pairs = [replace(pair, poses=nobody) for pair in pairs_of("openpose", scenes)]
    assert (
        "nobody" in Scorer(base, pairs, kind="openpose", preprocessor=get("openpose", model="tiny")).why_not
    )


def test_people_are_paired_whatever_their_order():
    rng = np.random.default_rng(0)
    one = np.concatenate([rng.uniform(0, 50, (18, 2)), np.ones((18, 1))], axis=1)
    two = one + np.array([100, 0, 0])
    wanted = np.stack([one, two])
    assert joints_right(wanted[::-1], wanted) == 1
    assert joints_right(wanted[:1], wanted) == 0.5
    assert joints_right(np.stack([one, one]), wanted) == 0.5  # nobody vouches for two
    assert joints_right(np.zeros((0, 18, 3)), wanted) == 0
    half = one.copy()
    half[:9, 2] = 0
    assert joints_right(half[None], one[None]) == 0.5


def test_ssim_is_that_of_scikit_image():
    rng = np.random.default_rng(0)
    a = rng.random((40, 56))
    for b in (a, 1 - a, np.clip(a + rng.normal(0, 0.1, a.shape), 0, 1)):
        expected = structural_similarity(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0
        )
        assert ssim(a, b) == pytest.approx(expected, abs=1e-6)

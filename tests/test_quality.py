"""Scores of pictures against scenes: known for true pictures, for wrong ones, and for the bundled models."""

import numpy as np
import pytest

from controlkit.figures import COLOURS, render
from controlkit.training.quality import Examination, colours_right, silhouette


@pytest.fixture(scope="module")
def scenes():
    return [render(seed, split="validation") for seed in range(12)]


def test_a_true_picture_has_every_colour_right(scenes):
    for scene in scenes:
        assert all(colours_right(scene.picture, scene).values()), scene.caption


def test_a_recoloured_part_is_found(scenes):
    scene = scenes[0]
    other = next(name for name in COLOURS if name not in scene.colours.values())
    picture = scene.picture.copy()
    inside = scene.masks["floor"]
    picture[inside] = (scene.shade[inside][:, None] * COLOURS[other]).astype(np.uint8)
    right = colours_right(picture, scene)
    assert not right["floor"]
    assert right["sky"]
    assert right["figure"]


def test_the_silhouette_of_a_true_picture_is_the_figure(scenes):
    overlaps = []
    for scene in scenes:
        found, true = silhouette(scene.picture, scene), scene.masks["figure"]
        overlaps.append((found & true).sum() / (found | true).sum())
    assert np.mean(overlaps) > 0.88  # a white figure in the shade has the grey of a grey sky
    assert min(overlaps) > 0.6
    assert not silhouette(np.full_like(scenes[0].picture, COLOURS[scenes[0].colours["sky"]]), scenes[0]).any()


def test_shares_of_the_ceiling_know_errors_from_scores():
    scores = {"canny": {"edge F1": 0.4, "depth RMSE": 0.2}, "ceiling": {"edge F1": 0.8, "depth RMSE": 0.1}}
    examination = Examination(1, scores)
    assert examination.of_ceiling("canny", "edge F1") == pytest.approx(0.5)
    assert examination.of_ceiling("canny", "depth RMSE") == pytest.approx(0.5)
    blind = Examination(1, {"canny": {"edge F1": 0.4}, "ceiling": {"edge F1": 0.0}})
    assert np.isnan(blind.of_ceiling("canny", "edge F1"))

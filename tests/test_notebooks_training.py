"""Notebooks 05 and 06, executed: what their readers are told is so."""

import ast
import json
import math

import nbformat
import pytest
from notebook_runs import FOLDER, execute
from PIL import Image

from controlkit.figures import render

pytestmark = pytest.mark.slow


def kept(name):
    """The results as the committed notebook shows them."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    shown = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    return ast.literal_eval(shown)


def test_an_adapter_is_trained_measured_and_used_in_diffusers(tmp_path):
    _, results = execute(FOLDER / "05_train_your_own.ipynb", folder=tmp_path)
    assert (results["faults_found"], results["faults_left"]) == (1, 0)
    assert results["last_gap"] > results["first_gap"] + 0.1
    floor, ours, ceiling = (results[f"edge_f1{end}"] for end in ("_without_control", "", "_ceiling"))
    assert floor + 0.1 < ours < ceiling
    assert results["reach"] == pytest.approx((ours - floor) / (ceiling - floor))
    assert results["pairs_measured"] == 8
    assert results["levels_apart_from_diffusers"] < 2
    assert results["edge_f1"] == pytest.approx(kept("05_train_your_own")["edge_f1"], abs=0.1)


def test_own_pictures_are_only_read_and_few_of_them_are_said_to_be_few(tmp_path):
    (own := tmp_path / "own").mkdir()
    for number, suffix in enumerate(["jpg", "JPG", "webp", "bmp"] * 3):
        Image.fromarray(render(number).picture).save(own / f"{number} [x].{suffix}")
    for name in ("again.png", "broken.png"):
        Image.fromarray(render(30 + len(name)).picture).save(own / name)
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    changes = {"PICTURES = None": f"PICTURES = {str(own)!r}", "STEPS = 60": "STEPS = 12"}
    notebook, results = execute(FOLDER / "05_train_your_own.ipynb", folder=tmp_path, changes=changes)
    assert {file.name: file.read_bytes() for file in own.iterdir()} == before
    assert (results["faults_found"], results["faults_left"]) == (1, 0)
    assert (results["pairs_measured"], results["reach"]) == (3, None)
    assert "of 3 held-out pairs it cannot be told" in nbformat.writes(notebook)


def test_a_pose_adapter_is_measured_by_joints_and_shown_poses(tmp_path):
    changes = {'RECIPE = "tiny-canny"': 'RECIPE = "tiny-openpose"', "STEPS = 60": "STEPS = 12"}
    notebook, results = execute(FOLDER / "05_train_your_own.ipynb", folder=tmp_path, changes=changes)
    assert results["joints_without_control"] < results["joints_ceiling"]
    assert results["levels_apart_from_diffusers"] < 2
    assert "map: openpose" in nbformat.writes(notebook)


def test_the_variants_are_the_benchmarks():
    told = json.loads((FOLDER.parent / "tests/benchmarks/variants.json").read_text(encoding="utf-8"))
    results = kept("06_compare_and_choose")
    for name, values in results["variants"].items():
        variant, steps, pictures = told["variants"][name], told["steps"], told["pictures"]
        costs = (steps[name] / steps["controlnet"], pictures[name] / pictures["none"])
        f1 = variant["scores"]["canny"]["edge F1"]
        assert values == pytest.approx([variant["trained"] / 1e6, *costs, f1], abs=0.006), name
        floor, ceiling = (variant["scores"][end]["edge F1"] for end in ("floor", "ceiling"))
        assert results["variants_floor_and_ceiling"] == pytest.approx([floor, ceiling], abs=0.001)


def test_four_pairs_are_said_to_be_too_few(tmp_path):
    changes = {"PAIRS, STEPS = 12, 8": "PAIRS, STEPS = 4, 2"}
    notebook, results = execute(FOLDER / "06_compare_and_choose.ipynb", folder=tmp_path, changes=changes)
    assert "4 pairs are too few to tell" in nbformat.writes(notebook)
    assert math.isnan(results["interval_of_one"])


def test_adapters_are_compared(tmp_path):
    _, results = execute(FOLDER / "06_compare_and_choose.ipynb", folder=tmp_path)
    f1 = results["edge_f1"]
    order = ["no control", "canny (mode prompt)", "canny (scale 0.5)", "canny", "autoencoder", "pictures"]
    assert sorted(order, key=f1.__getitem__) == order
    assert f1["no control"] < f1["rank8"] < f1["canny"]
    assert results["interval_of_difference"] < results["interval_of_one"]
    needed = results["pairs_needed"]
    assert needed["a difference, paired"] < needed["a difference, unpaired"] / 4
    assert results["f1_by_tolerance"] == sorted(results["f1_by_tolerance"])
    assert results["strict_ceiling"] < f1["autoencoder"] - 0.2
    joints, depth = results["joints"], results["depth_error"]
    assert joints["no control"] < joints["openpose"] < joints["pictures"]
    assert depth["pictures"] <= depth["depth"] < depth["no control"]
    assert results["skipped"] == ["CLIP score", "FID and KID", "LPIPS between seeds"]
    assert results["f1_by_tolerance"][2] == pytest.approx(0.86, abs=0.03)  # the arm at full strength
    for name, value in kept("06_compare_and_choose")["edge_f1"].items():
        assert f1[name] == pytest.approx(value, abs=0.02)

"""Notebooks 03 and 04, executed: what they find, and that it is what the committed ones show."""

import ast

import nbformat
import pytest
from notebook_runs import FOLDER, execute


def shown(name):
    """The results that the committed notebook shows: the value of its last cell."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    return ast.literal_eval(notebook.cells[-1].outputs[0]["data"]["text/plain"])


def near(ours, theirs, *, by):
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[key] - theirs[key]) <= by for key in ours)


@pytest.mark.slow
def test_conditioning_maps(tmp_path):
    name = "03_conditioning_maps"
    _, results = execute(FOLDER / f"{name}.ipynb", folder=tmp_path)
    committed = shown(name)

    assert results["canny_equal_bytes"]
    for exact in ("share_above_low", "share_thinned", "share_of_edges_saved", "density", "findings"):
        assert results[exact] == committed[exact], exact
    density = results["density"]
    falling = [
        density[f"low {low}, high {high}"] for low, high in ((20, 200), (60, 200), (100, 200), (150, 400))
    ]
    assert falling == sorted(falling, reverse=True)
    assert results["share_thinned"] < results["share_above_low"] / 2

    assert results["joints_right"] >= 0.9
    assert results["flipped_pixels_wrong"] > 0.5
    assert results["depth_levels"]["8"] < 40 < 200 < results["depth_levels"]["16"]
    assert results["level_of_median_distance"] == committed["level_of_median_distance"]
    assert all(results["findings"].values())
    assert results["holes_found"] == committed["holes_found"] == ["holes"]
    assert results["good_maps_with_findings"] == 0
    assert results["mended_f1"] > 0.99

    without, with_map, broken = results["without_map"], results["with_map"], results["broken_map"]
    assert with_map["canny"] > without["canny"] + 0.4
    assert with_map["openpose"] > without["openpose"] + 0.4
    assert with_map["depth"] < without["depth"] / 2
    assert broken["inverted edges"] < broken["blurred edges"] < with_map["canny"]
    assert broken["drawn large, then shrunk"] < with_map["openpose"] - 0.4
    assert broken["far is white"] > without["depth"]
    near(with_map, committed["with_map"], by=3.0)


@pytest.mark.slow
def test_inside_controlnet(tmp_path):
    name = "04_inside_controlnet"
    _, results = execute(FOLDER / f"{name}.ipynb", folder=tmp_path)
    committed = shown(name)

    assert results["parameters"] == committed["parameters"]
    assert results["connections"] == 13
    assert results["copy_equals_base"]
    assert results["tensors_compared"] > 200
    assert results["zero_sum"] == 0
    assert results["same_prediction"]
    assert results["same_picture"]
    first, second, _ = results["gradients"]
    assert first["copy"] == first["hint encoder"] == 0 < first["zero convolutions"]
    assert min(second.values()) > 0

    gap = {int(step): value for step, value in results["gap"].items()}
    last = max(gap)
    assert gap[0] == 0
    assert max(abs(value) for step, value in gap.items() if step <= last // 4) < 0.005
    assert gap[last] > 0.2
    residuals = {int(step): values for step, values in results["residuals"].items()}
    assert set(residuals[0]) == {0.0}
    assert all(min(values) > 0 for step, values in residuals.items() if step)
    here, bundled = (results["told_by_map"][name] for name in ("here", "bundled"))
    assert min(here[9:12]) > 1  # here[12], the beginner's middle block, is another on another processor
    assert bundled[12] == min(bundled)
    assert max(bundled[9:]) < min(bundled[:9])
    assert results["f1_in_training"]["0"] == results["no_control"] < results["f1_in_training"][str(last)]

    scale = list(results["scale"].values())
    assert results["no_control"] < scale[0] < scale[1] < scale[2]
    window = results["window"]
    assert max(window["steps 0 to 0.2"], window["steps 0.8 to 1"]) < window["steps 0 to 0.5"]
    assert window["steps 0 to 0.5"] < window["steps 0.5 to 1"] < window["steps 0.2 to 1"]
    layers = results["layers"]
    assert layers["only_mid"] < layers["the deep half"] < layers['layers="soft"'] < layers["the shallow half"]
    mode = results["mode"]
    assert max(mode["prompt"], mode["more-prompt"]) < mode["guess"] < mode["balanced"]
    assert mode["balanced"] < min(mode["unbalanced"], mode["paper"])
    assert results["prompt"]["no prompt, unbalanced"] > results["prompt"]["no prompt, balanced"]
    assert results["two_controls"]["depth"] > results["two_controls"]["openpose"]
    for knob in ("scale", "window", "layers", "mode"):
        near(results[knob], committed[knob], by=0.05)

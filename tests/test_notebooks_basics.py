"""Notebooks 01 and 02 executed: what they say is measured, and the committed outputs are of the same code."""

import itertools
import re

import nbformat
import pytest
from notebook_runs import FOLDER, execute

pytestmark = pytest.mark.slow


def executed(name, folder):
    """What the notebook's `results` held, and its committed printed output as one text."""
    path = FOLDER / f"{name}.ipynb"
    _, results = execute(path, folder=folder)
    committed = nbformat.read(path, as_version=4)
    outputs = [o for cell in committed.cells if cell.cell_type == "code" for o in cell.outputs]
    return results, "".join(o.text for o in outputs if o.output_type == "stream")


def numbers(text, start):
    """The numbers on the first line of a text that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[-+]\d+)?", line[len(start) :])]


def falls(values):
    return all(later < earlier for earlier, later in itertools.pairwise(values))


def test_01_diffusion_from_noise(tmp_path):
    results, text = executed("01_diffusion_from_noise", tmp_path)
    shares = results["last_signal_share"]
    assert shares["scaled linear, zero terminal SNR"] == 0
    assert shares["scaled linear"] == pytest.approx(0.00466, abs=1e-5)
    assert shares["linear"] == pytest.approx(4.04e-5, abs=1e-7)
    assert results["conversion_round_trip"] < 1e-5
    assert falls(results["error_of_epsilon"])
    assert results["error_of_x0"][-1] > 10 * results["error_of_x0"][0]
    assert results["ddpm_and_ddim_differ"] < 1e-5
    assert results["time_waves_differ"] < 1e-3
    loss = results["toy_loss"]
    assert falls([loss["no time"], loss["time"], loss["time and class"]])
    distance = results["toy_energy_distance"]
    assert distance["time"] < distance["no time"] / 2
    shares_asked = results["toy_on_the_asked_moon"]
    assert 0.35 < shares_asked[0] < 0.65
    assert min(shares_asked[1:]) > 0.95
    assert results["toy_off_the_moon"][-1] > results["toy_off_the_moon"][1]
    solvers = results["solver_distance"]
    assert all(falls(solvers[name]) for name in ("ddim", "pndm", "dpm++"))
    assert solvers["dpm++"][-1] < solvers["ddim"][-1] < solvers["ddpm"][-1] / 4
    assert results["solver_from_ddim"]["dpm++"] < 2 < 10 < results["solver_from_ddim"]["ddpm"]
    assert solvers["ddim"] == pytest.approx(numbers(text, "ddim  ")[:5], abs=0.3)
    details = results["detail_by_temperature"]
    assert details["ddpm"][0] < details["ddpm"][-1]
    assert falls(details["ddim, 8 steps"])
    assert results["detail_by_guidance"][-1] > 1.3 * results["detail_by_guidance"][1]
    assert min(results["moved_by_negative_prompt"][1:]) > 5


def test_02_latents_and_text(tmp_path):
    results, text = executed("02_latents_and_text", tmp_path)
    assert results["psnr"] == pytest.approx(numbers(text, "PSNR of the mean")[0], abs=0.02)
    assert 0 < results["psnr"] - results["psnr_of_a_draw"] < 0.5
    assert results["latents_std"] == pytest.approx(1, abs=0.1)
    errors = results["error_by_scaling"]
    assert min(errors, key=errors.get) == "1.0"
    assert falls(results["psnr_by_noise"])
    assert 8 < results["reach_of_a_cell"] < 128
    spread = results["std_of_noise_between"]
    assert spread["lerp"] == pytest.approx(0.5**0.5, abs=0.05)
    assert spread["slerp"] == pytest.approx(1, abs=0.05)
    assert results["detail_between"]["lerp"] < results["detail_between"]["slerp"]
    assert results["tokens"] == 77
    assert results["ids"][:4] == [605, 320, 542, 524]
    moved = results["vector_moved"]
    assert moved["before"] < 1e-6
    assert min(moved["at"], moved["noun"]) > 0.5 > 5 * moved["sky"]
    assert moved["white"] > 0.4  # of the floor, which the text speaks of
    finest = results["attention_on_own_mask"]["finest of the decoder"]
    assert finest["noun of the figure"] > 2
    assert results["attention_above_1"]["noun of the figure"] == 8
    figure = results["figure_noun_on_masks"]
    assert max(figure) == figure[0]
    assert results["object_noun_on_masks"][1] < 1 < results["object_noun_on_masks"][0]  # as the text says
    for name, kept in results["outlines_kept"].items():
        assert 0.4 < kept["new prompt"] < kept["old maps"] < 1, name

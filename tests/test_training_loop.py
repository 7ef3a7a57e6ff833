"""The loop on a real adapter and real files, at a few steps: what may and what may not change the result."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from killed_runs import prepared_for_module, recipe
from killed_runs import weights as kept_weights
from safetensors.torch import load_file

from controlkit.adapters import MAPS, AdapterInfo, read_info, save_adapter
from controlkit.base import load_base
from controlkit.controlnet import from_base
from controlkit.processes import Processes
from controlkit.training import loop, train_recipe
from controlkit.training.adapter import ControlNetTask
from controlkit.training.adapter_inputs import Inputs
from controlkit.training.config import load_recipe
from controlkit.training.data.feeds import StoredFeed
from controlkit.training.machine import Machine
from controlkit.training.reporting.measured import scores_of
from controlkit.training.stepping import Seen, culprits


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, and a cache for the runs of this module."""
    with prepared_for_module(tmp_path_factory.mktemp("loop")) as folder:
        yield folder


def run(place: Path, name: str, **changes):
    """Train a few steps; returns the run's folder and what was said."""
    settings = {"steps": 3, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99}
    settings |= {"log_every": 1, "ema": 0.0, **changes}
    said = []
    path = recipe(place / name, place / "pictures", **settings)
    train_recipe(str(path), progress=lambda step: said.append(step.message) if step.message else None)
    return place / name, said


def weights(folder: Path):
    (path,) = (folder / "checkpoints").glob("*/weights.safetensors")
    return {name: tensor for name, tensor in load_file(path).items() if name.startswith("model.")}


def rows(folder: Path):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if "event" not in row]


def losses(folder: Path):
    return [row["loss"] for row in rows(folder)]


def distance(first, second):
    """How far two sets of weights are apart (root mean square), in units of what a step of 1e-3 moves them.

    Adam divides a gradient by its size, and where it is all but zero rounding decides: hence not the maximum.
    """
    assert first.keys() == second.keys()
    squares = sum(float((first[name] - second[name]).square().sum()) for name in first)
    return math.sqrt(squares / sum(tensor.numel() for tensor in first.values())) / 1e-3


@pytest.fixture(scope="module")
def plain(place):
    return run(place, "plain")[0]


def test_the_cache_changes_nothing(place, plain):
    live, _ = run(place, "live", data_cache=False)
    assert losses(live) == losses(plain)
    assert distance(weights(live), weights(plain)) == 0
    kept = sum(1 for _ in (place / "cache" / "latents").rglob("*.safetensors"))
    slower, _ = run(place, "slower", learning_rate=1e-5)
    assert sum(1 for _ in (place / "cache" / "latents").rglob("*.safetensors")) == kept
    assert losses(slower)[0] == losses(plain)[0]


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 5])
def test_threads_change_nothing(place, plain, workers):
    other, _ = run(place, f"workers-{workers}", data_workers=workers)
    assert distance(weights(other), weights(plain)) == 0


def test_a_script_that_builds_no_graphs_trains_all_the_same(place, plain):
    with torch.inference_mode():
        within, _ = run(place, "within")
    assert distance(weights(within), weights(plain)) == 0


def test_accumulation_is_a_larger_batch(place):
    one_size = {"data_buckets": False, "data_crop": "centre"}
    many, _ = run(place, "many", accumulation=4, batch_size=1, **one_size)
    once, _ = run(place, "once", accumulation=1, batch_size=4, **one_size)
    np.testing.assert_allclose(losses(many), losses(once), rtol=1e-5)
    assert distance(weights(many), weights(once)) < 0.01


def test_a_step_that_does_not_fit_is_taken_in_pieces(place, plain, monkeypatch):
    real = ControlNetTask.losses

    def small_device(self, whole, part):
        if len(part) > 1 and self.controlnet.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, whole, part)

    monkeypatch.setattr(ControlNetTask, "losses", small_device)
    pieces, said = run(place, "pieces")
    assert any("from step 1 on 1 at once, with the same batch" in line for line in said), said
    assert "at once" in (pieces / "metrics.jsonl").read_text()
    np.testing.assert_allclose(losses(pieces), losses(plain), rtol=1e-5)
    assert distance(weights(pieces), weights(plain)) < 0.01


def test_one_pair_that_does_not_fit_ends_the_run_with_a_cure(place, monkeypatch):
    def no_device(self, whole, part):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ControlNetTask, "losses", no_device)
    with pytest.raises(
        ValueError, match=r"one pair does not fit in the memory of cpu.*gradient_checkpointing"
    ):
        run(place, "too-large")


@pytest.mark.slow
def test_a_run_in_pieces_goes_on_in_pieces(place, monkeypatch):
    real, full = ControlNetTask.losses, [True]

    def full_once(self, whole, part):
        if part.step == 0 and full:
            full.clear()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, whole, part)

    monkeypatch.setattr(ControlNetTask, "losses", full_once)
    folder, _ = run(place, "goes-on", steps=2, checkpoint_every=1)
    before = kept_weights(folder, step=2)
    shutil.rmtree(folder / "checkpoints" / "step-000002")
    _, said = run(place, "goes-on", steps=2, checkpoint_every=1)
    assert "resumed at step 1" in said
    after = kept_weights(folder, step=2)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_steps_without_a_finite_gradient_change_nothing_and_name_their_pairs(place, monkeypatch):
    real = ControlNetTask.losses
    before, after = {}, {}

    def overflowing(self, whole, part):
        found = real(self, whole, part)
        if part.step == 1:
            before.update({k: v.clone() for k, v in self.controlnet.state_dict().items()})
            found.each[0].data.fill_(math.nan)
            found = type(found)(found.each * math.nan, found.timesteps, found.levels)
        if part.step == 2 and not after:
            after.update({k: v.clone() for k, v in self.controlnet.state_dict().items()})
        return found

    monkeypatch.setattr(ControlNetTask, "losses", overflowing)
    folder, said = run(place, "one-bad", log_every=3, checkpoint_every=2)
    (line,) = [line for line in said if "changed nothing" in line]
    assert "step 2" in line
    assert ".png" in line
    assert "timesteps" in line
    assert all(torch.equal(before[key], after[key]) for key in before)
    kept = kept_weights(folder, step=3).values()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept)
    state = folder / "checkpoints" / "step-000002" / "state.json"
    (window,) = json.loads(state.read_text(), parse_constant=pytest.fail)["windows"]
    assert window["samples"] == 4  # those of the first step: it counts in no mean
    assert math.isfinite(losses(folder)[0])


def test_of_several_processes_those_whose_losses_are_not_finite_are_named():
    good, bad = Seen(True, "losses 0.1; a.png"), Seen(False, "losses nan; b.png")
    assert culprits([bad]) == bad.words
    assert culprits([good, bad, good]) == "process 1: losses nan; b.png"
    overflown = culprits([good, good])  # in the gradient alone, which is the sum of theirs
    assert overflown == "process 0: losses 0.1; a.png; process 1: losses 0.1; a.png"


def test_a_run_in_which_no_step_was_taken_has_no_result(place):
    with pytest.raises(ValueError, match="none of the 2 steps had a finite gradient, so nothing was learned"):
        run(place, "standstill", steps=2, noise_offset=1e30, bad_steps=9)
    assert not (place / "standstill" / "controlnet").exists()


@pytest.mark.slow
def test_a_device_that_passes_steps_over_by_itself_gives_the_same_run(place, monkeypatch):
    """What is done on a GPU, where the host reads norms later, on a processor."""
    real = ControlNetTask.losses

    def overflowing(self, whole, part):
        found = real(self, whole, part)
        return type(found)(found.each * (math.inf if part.step in (0, 2) else 1.0), found.timesteps, 1000)

    monkeypatch.setattr(ControlNetTask, "losses", overflowing)
    settings = {"steps": 4, "ema": 0.9, "log_every": 3, "checkpoint_every": 3}
    prompt, said = run(place, "prompt", **settings)
    monkeypatch.setattr(loop, "can_read_late", lambda run: True)
    late, said_late = run(place, "late", **settings)
    assert losses(late) == losses(prompt)
    assert [row["grad_norm"] for row in rows(late)] == [row["grad_norm"] for row in rows(prompt)]
    for file in ("weights", "optimizer"):
        one, other = (
            load_file(folder / f"checkpoints/step-000004/{file}.safetensors") for folder in (prompt, late)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert {float(tensor) for name, tensor in one.items() if name.endswith("/step")} == {2.0}
    changed = [[line for line in lines if "changed nothing" in line] for lines in (said, said_late)]
    assert changed[0] == changed[1]
    assert len(changed[0]) == 2


@pytest.mark.parametrize("late", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_too_many_bad_steps_end_the_run_and_leave_the_last_good_checkpoint(place, monkeypatch, late):
    monkeypatch.setattr(loop, "can_read_late", lambda run: late)
    name = f"bad-{late}"
    real = ControlNetTask.losses

    def broken_from_three(self, whole, part):
        found = real(self, whole, part)
        factor = math.inf if part.step >= 3 else 1.0
        return type(found)(found.each * factor, found.timesteps, found.levels)

    monkeypatch.setattr(ControlNetTask, "losses", broken_from_three)
    with pytest.raises(
        ValueError, match=r"training stopped at step 6: 3 steps in a row .* checkpoints are good"
    ):
        run(place, name, steps=9, bad_steps=3, checkpoint_every=3, log_every=4)
    saved = load_file(place / name / "checkpoints" / "step-000003" / "weights.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in saved.values())


def test_a_disk_that_is_full_says_where_the_run_can_go_on(place, monkeypatch):
    from controlkit.training import saving

    real = saving.save_checkpoint

    def full_after_two(folder, step, **parts):
        if step > 2:
            raise OSError(28, "No space left on device")
        return real(folder, step, **parts)

    monkeypatch.setattr(saving, "save_checkpoint", full_after_two)
    with pytest.raises(
        ValueError, match="the disk is full: make room, and the same command goes on from step 2"
    ):
        run(place, "full-disk", steps=4, checkpoint_every=1)
    monkeypatch.undo()
    monkeypatch.setenv("CONTROLKIT_CACHE", str(place / "cache"))
    _, said = run(place, "full-disk", steps=4, checkpoint_every=1)
    assert "resumed at step 2" in said


def test_the_header_says_what_the_maps_were_made_with(place):
    drawn, _ = run(place, "drawn", steps=1)
    assert read_info(drawn / "controlnet").map.thresholds == {}  # they were ranges


@pytest.mark.slow
def test_looking_and_showing_disturb_nothing(place, plain):
    watched, _ = run(place, "watched", monitor_every=1, sample_every=1, score_every=2)
    assert losses(watched) == losses(plain)
    assert distance(weights(watched), weights(plain)) == 0
    last = rows(watched)[-1]
    assert {"loss_map", "loss_no_map", "loss_other_map", "gap", "peak_mb", "grad_norm"} <= last.keys()
    assert "edge F1" in rows(watched)[1]
    assert len(list((watched / "samples").iterdir())) == 3


OTHER_WAYS = {
    "contiguous": {"channels_last": False},
    "rewarded": {"reward": 0.5, "reward_below": 1.0, "data_map_blur": 0.0, "optimizer": "schedule-free"},
    "uncached": {"data_cache": False},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [way if way == "contiguous" else pytest.param(way, marks=pytest.mark.slow) for way in OTHER_WAYS]
)
def test_a_picture_moves_no_weight_to_where_another_was(place, way):
    """Fused optimizers pair weights with their moments by address; other sums round differently."""
    if way == "rewarded":
        pytest.importorskip("schedulefree")
    hidden, _ = run(place, f"{way}-hidden", **OTHER_WAYS[way])
    shown, _ = run(place, f"{way}-shown", sample_every=2, **OTHER_WAYS[way])
    assert len(list((shown / "samples").iterdir())) == 2
    assert losses(shown) == losses(hidden)
    assert distance(weights(shown), weights(hidden)) == 0


@pytest.mark.slow
def test_scores_in_between_are_of_the_averaged_weights(place, monkeypatch):
    seen = []
    real = ControlNetTask.scores

    def remember(self):
        seen.append({name: tensor.clone() for name, tensor in self.controlnet.state_dict().items()})
        return real(self)

    monkeypatch.setattr(ControlNetTask, "scores", remember)
    folder, _ = run(place, "scored", score_every=3, ema=0.9)
    result = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")  # the average, too
    assert all(torch.equal(seen[-1][name].half(), tensor) for name, tensor in result.items())


def test_a_base_that_cannot_be_sampled_has_a_result_all_the_same(place):
    """It predicts the noise, and its schedule ends in nothing else: what starts there is not finite."""
    base = tiny_models.build(place / "blind", "sd1")
    file = base / "scheduler" / "scheduler_config.json"
    told = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    folder, said = run(place, "blind-run", base=str(base), steps=2, score_every=1, sample_every=2)
    assert any("its schedule ends in nothing else" in note for note in said)
    assert not any("edges are grey" in note for note in said), "map_blur is meant"
    assert any(note.startswith("no scores of control: the latents ") for note in said)
    assert any(note.startswith("no samples at step 2") for note in said)
    assert (folder / "controlnet" / "diffusion_pytorch_model.safetensors").is_file()
    assert not (folder / "scores.json").exists()


def test_samples_that_cannot_be_made_do_not_end_the_run(place, plain, monkeypatch):
    def fail(self):
        raise RuntimeError("cuDNN is unwell\nand says so at length")

    monkeypatch.setattr(ControlNetTask, "sample", fail)
    unlucky, said = run(place, "unlucky", sample_every=1)
    assert "no samples at step 1: cuDNN is unwell" in said
    assert losses(unlucky) == losses(plain)


@pytest.mark.slow
def test_bf16_trains_like_fp32(place, plain):
    full, _ = run(place, "full", steps=12, learning_rate=3e-4)
    half, _ = run(place, "half", steps=12, learning_rate=3e-4, precision="bf16")
    np.testing.assert_allclose(losses(half), losses(full), rtol=0.02)
    saved = load_file(half / "checkpoints" / "step-000012" / "weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}, "masters are kept"


@pytest.mark.slow
def test_gradient_checkpointing_gives_the_same_gradient(place, plain):
    other, _ = run(place, "checkpointed", gradient_checkpointing=True)
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-5)
    assert distance(weights(other), weights(plain)) < 0.01


@pytest.mark.slow
def test_the_layout_in_memory_changes_rounding_only(place, plain):
    other, _ = run(place, "first-channels", channels_last=False)
    np.testing.assert_allclose(losses(other), losses(plain), rtol=1e-4)


@pytest.mark.slow
def test_only_the_middle_residual_is_trained_where_that_is_asked(place):
    folder, _ = run(place, "middle", only_mid_control=True)
    names = weights(folder)
    assert not [name for name in names if "controlnet_down_blocks" in name]
    result = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert all(not t.any() for name, t in result.items() if name.startswith("controlnet_down_blocks"))
    assert any(t.any() for name, t in result.items() if name.startswith("controlnet_mid_block"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_an_unlocked_decoder_is_trained_and_written(place, precision):
    from diffusers import UNet2DConditionModel

    from controlkit import load_base

    folder, _ = run(place, f"unlocked-{precision}", sd_locked=False, precision=precision)
    before = load_base(str(place / "base")).unet.state_dict()
    after = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    moved = {name for name in before if not torch.equal(before[name].half().float(), after[name].float())}
    assert moved
    assert all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in moved)
    card = (folder / "controlnet" / "README.md").read_text()
    assert 'unet = UNet2DConditionModel.from_pretrained("unet"' in card
    assert "unet=unet" in card
    assert "in several shapes of the area of 64×64" in card


def test_the_base_of_an_unlocked_run_is_told_as_it_was(place):
    folder, _ = run(place, "unlocked", steps=1, sd_locked=False)
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["base_sha256"] == load_base(str(place / "base")).digest()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_result_may_keep_every_bit(place, precision):
    folder, _ = run(place, f"whole-{precision}", steps=1, export_dtype="fp32", precision=precision)
    result = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    trained = {name.removeprefix("model.controlnet."): t for name, t in weights(folder).items()}
    assert result.keys() == trained.keys()
    assert all(torch.equal(result[name], tensor) for name, tensor in trained.items())


@pytest.mark.slow
def test_of_several_captions_each_visit_is_told_one(place, monkeypatch):
    """The cache holds all of them, and the result is that without it."""
    pictures = place / "captioned" / "pictures"
    shutil.copytree(place / "pictures", pictures)
    shutil.copytree(place / "base", place / "captioned" / "base")
    table = [{"file_name": f"{n:02d}.png", "text": [f"red {n}", f"blue {n}"]} for n in range(14)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, table)))
    told, real = [], Inputs._captions
    monkeypatch.setattr(Inputs, "_captions", lambda self, part: told.append(real(self, part)) or told[-1])
    settings = {"steps": 6, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99}
    settings |= {"log_every": 1, "caption_dropout": 0.0, "ema": 0.0}
    found = []
    for name, cached in (("cached", True), ("not", False)):
        train_recipe(str(recipe(place / "captioned" / name, pictures, data_cache=cached, **settings)))
        found.append(losses(place / "captioned" / name))
    assert found[0] == found[1]
    words = [caption.split()[0] for part in told for caption in part]
    assert len(words) == 2 * 6 * 4
    assert 12 <= words.count("red") <= 36


def test_a_run_does_not_go_on_with_other_data(place):
    """Held-out pairs would be drawn anew, and the report would be of what is there now. What a run writes
    into a folder among its pictures is none of them.
    """
    pictures = place / "changing" / "pictures"
    shutil.copytree(place / "pictures", pictures)
    shutil.copytree(place / "base", place / "changing" / "base")
    settings = {"warmup": 0, "sample_every": 1, "monitor_every": 0, "checkpoint_every": 1, "log_every": 1}
    path = str(recipe(pictures / "run", pictures, steps=3, **settings))

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_recipe(path, progress=stop)
    caption = (pictures / "05.txt").read_text()
    (pictures / "05.txt").write_text("another caption")
    with pytest.raises(
        ValueError, match=r"has changed since this run stopped \(there are 11 pairs as before"
    ):
        train_recipe(path)
    (pictures / "05.txt").write_text(caption)
    train_recipe(path)
    assert len(rows(pictures / "run")) == 3
    assert len(list((pictures / "run" / "samples").iterdir())) == 3
    with pytest.raises(ValueError, match=r"is the folder of the data set: choose another"):
        train_recipe(path, overrides=[f"out={pictures}"])


def test_a_run_does_not_go_on_with_more_or_fewer_pairs_without_a_cache_either(place, sd1):
    """Their number is known of any data; it draws their order and those that are held out."""
    pictures = place / "fewer" / "pictures"
    shutil.copytree(place / "pictures", pictures)
    settings = load_recipe(str(recipe(pictures.parent / "run", pictures, data_cache=False)))

    def feed():
        return StoredFeed(settings, sd1, Processes(), report=lambda _: None)

    state = feed().state(0)
    feed().restore(state)
    (pictures / "05.png").unlink()
    with pytest.raises(ValueError, match=r"\(then 11 pairs to train on, now 10\): bring it back"):
        feed().restore(state)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_goes_on_where_its_data_lie_now(place, cache):
    """Whether they are the same tells the cache; without one nobody knows, and they may not move."""
    pictures, moved = (place / f"moving-{cache}" / name for name in ("pictures", "elsewhere"))
    shutil.copytree(place / "pictures", pictures)
    shutil.copytree(place / "base", pictures.parent / "base")
    settings = {"warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 1, "log_every": 1}
    settings |= {"schedule": "constant", "data_cache": cache}
    short = str(recipe(pictures.parent / "run", pictures, steps=1, **settings))
    train_recipe(short)
    whole = str(recipe(pictures.parent / "whole", pictures, steps=2, **settings))
    train_recipe(whole)
    pictures.rename(moved)
    longer = str(recipe(pictures.parent / "run", moved, steps=2, **settings))
    if not cache:
        with pytest.raises(ValueError, match=r"another recipe \(data\.source .*pictures -> .*elsewhere\)"):
            train_recipe(longer)
        return
    with pytest.raises(ValueError, match=r"another recipe \(data\.source .*pictures -> .*elsewhere\)"):
        train_recipe(longer, ["data.cache=false"])
    caption = (moved / "05.txt").read_text()
    (moved / "05.txt").write_text("another caption")
    with pytest.raises(ValueError, match="the data set has changed since this run stopped"):
        train_recipe(longer)
    (moved / "05.txt").write_text(caption)
    train_recipe(longer)
    mine, theirs = (kept_weights(pictures.parent / name, step=2) for name in ("run", "whole"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    told = read_info(pictures.parent / "run" / "controlnet").training["recipe"]
    assert (told["data"]["source"], told["steps"]) == ("elsewhere", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "v_prediction"},
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ({"min_snr_gamma": 0.01}, {"layout_steps": 0})
        ),
    ],
)
def test_objectives_and_weights_change_the_loss(place, plain, change):
    other, _ = run(place, "-".join(change), steps=1, **change)
    assert losses(other)[0] != losses(plain)[0]


@pytest.mark.parametrize("family", [pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_every_family_trains_and_diffusers_loads_the_result(place, family):
    from diffusers import ControlNetModel
    from tiny_models import build

    build(place / family, family)
    folder, _ = run(place, f"of-{family}", base=str(place / family), sample_every=3)
    network = ControlNetModel.from_pretrained(folder / "controlnet")
    assert all(bool(torch.isfinite(p).all()) for p in network.parameters())
    assert any(bool(p.any()) for name, p in network.named_parameters() if "controlnet_mid" in name)
    assert (folder / "samples" / "step-000003.png").is_file()
    live, _ = run(place, f"live-{family}", base=str(place / family), data_cache=False)
    assert losses(live) == losses(folder)


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_is_not_measured_again(place, monkeypatch):
    from controlkit.training.adapter import ControlNetTask

    measured, scored = [], ControlNetTask.final_scores
    monkeypatch.setattr(ControlNetTask, "final_scores", lambda task: measured.append(1) or scored(task))
    folder, _ = run(place, "again", score_scenes=2)
    scores = (folder / "scores.json").read_bytes()
    report = (folder / "report.html").read_bytes()
    run(place, "again", score_scenes=2)
    assert len(measured) == 1
    assert ((folder / "scores.json").read_bytes(), (folder / "report.html").read_bytes()) == (scores, report)
    (folder / "scores.json").write_text('{"of": ')  # damaged
    run(place, "again", score_scenes=2)
    assert len(measured) == 2
    assert (folder / "scores.json").read_bytes() == scores
    run(place, "again", score_scenes=1)
    assert len(measured) == 3, "other pairs are asked for"


def test_a_longer_run_keeps_no_scores_of_the_shorter_one(place):
    """Where it is not measured itself: report and card would tell them as its own."""
    folder, _ = run(place, "longer", steps=1, schedule="constant")
    scores_of(folder, folder / "controlnet", 1, lambda: {"control": {"edge F1": 0.5}})
    run(place, "longer", steps=2, schedule="constant")
    assert not (folder / "scores.json").exists()
    assert "edge F1" not in (folder / "controlnet" / "README.md").read_text()
    assert "edge F1" not in (folder / "report.html").read_text()


def test_a_finished_run_tells_its_whole_story(place):
    folder, _ = run(place, "told", sample_every=3, monitor_every=1, score_scenes=2)
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64" in page
    assert (folder / "controlnet" / "README.md").is_file()
    facts = json.loads((folder / "facts.json").read_text())
    assert len(facts["base_sha256"]) == len(facts["data_sha256"]) == 64
    scores = json.loads((folder / "scores.json").read_text())
    assert {"floor", "control", "ceiling"} <= scores.keys()
    info = read_info(folder / "controlnet")
    assert info.training["data_sha256"] == facts["data_sha256"]
    assert info.training["recipe"]["learning_rate"] == 1e-3
    assert info.base == "base"  # and not where it lies


def test_how_many_pairs_were_left_out_is_told_with_the_result(place):
    pictures = place / "torn" / "pictures"
    shutil.copytree(place / "pictures", pictures)
    shutil.copytree(place / "base", place / "torn" / "base")
    for number in (3, 8):
        torn = pictures / f"{number:02d}.png"
        torn.write_bytes(torn.read_bytes()[:-200])
    settings = {"steps": 1, "warmup": 0, "sample_every": 0, "monitor_every": 0, "data_bad": "skip"}
    train_recipe(str(recipe(place / "torn" / "run", pictures, **settings)))
    facts = json.loads((place / "torn" / "run" / "facts.json").read_text())
    assert (facts["data_left_out"], facts["data_pairs"], facts["data_held_out"]) == (2, 9, 3)
    assert "| data_left_out | 2 |" in (place / "torn" / "run" / "controlnet" / "README.md").read_text()


def test_rates_of_the_parts_are_their_own(place):
    rates = {"zero_convolution_rate": 20.0, "hint_encoder_rate": 3.0, "learning_rate": 1e-4}
    folder, _ = run(place, "rates", schedule="constant", steps=1, **rates)
    expected = {"trunk": 1e-4, "zero_convolutions": 2e-3, "hint_encoder": 3e-4}
    assert rows(folder)[0]["learning_rates"] == pytest.approx(expected)


@pytest.mark.slow
def test_adafactor_runs_and_resumes(place):
    folder, _ = run(place, "adafactor", optimizer="adafactor", steps=2)
    assert (folder / "controlnet").is_dir()


@pytest.mark.slow
def test_the_middle_residual_alone_is_what_an_adapter_is_trained_on_for(place):
    """What it had for the others would act in every use of the result, and did not in the training."""
    first, _ = run(place, "all", steps=1)
    folder, _ = run(place, "then-middle", steps=1, only_mid_control=True, init=str(first / "controlnet"))
    result = load_file(folder / "controlnet" / "diffusion_pytorch_model.safetensors")
    before = load_file(first / "controlnet" / "diffusion_pytorch_model.safetensors")
    down = [name for name in result if name.startswith("controlnet_down_blocks")]
    assert any(before[name].any() for name in down)
    assert not any(result[name].any() for name in down)


@pytest.mark.slow
def test_a_schedule_free_result_is_the_optimizers_own_average(place):
    pytest.importorskip("schedulefree")
    results = [
        run(place, f"free-{ema}", optimizer="schedule-free", ema=ema, export_dtype="fp32")[0]
        for ema in (0.0, 0.99)
    ]
    plain, also = (load_file(f / "controlnet" / "diffusion_pytorch_model.safetensors") for f in results)
    assert all(torch.equal(plain[name], tensor) for name, tensor in also.items())


@pytest.mark.parametrize("name", ["lion", "prodigy", "schedule-free", "adamw8bit"])
@pytest.mark.slow
def test_other_optimizers_run_or_say_what_is_missing(place, name):
    from importlib.util import find_spec

    from controlkit.training.optimizers import PACKAGES

    if find_spec(PACKAGES[name]) is None:
        with pytest.raises(
            ValueError, match=rf"optimizer '{name}' needs the package .*uv sync --extra optimizers"
        ):
            run(place, name, optimizer=name)
        assert not (place / name).exists()
    elif name == "adamw8bit" and not torch.cuda.is_available():
        pytest.skip("8-bit moments are CUDA's")
    else:
        rate = {"learning_rate": 1.0} if name == "prodigy" else {}
        folder, _ = run(place, name, optimizer=name, steps=2, sample_every=2, **rate)
        assert all(math.isfinite(loss) for loss in losses(folder))


def test_adamw8bit_lays_no_weight_out_anew(place):
    """A run that goes on has the layout of the beginning, and sums in another order round differently."""
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw8bit", "channels_last": True, "warmup": 0}
    loaded = load_recipe(str(recipe(place / "eight-bit", place / "pictures", **settings)))
    machine, said = Machine(loaded), []
    task = ControlNetTask(loaded, machine, said.append)
    begun = loop.open_run(task, loaded, place / "eight-bit", machine, lambda _: None)
    before = {name: weight.stride() for name, weight in begun.weights.parameters.items()}
    loop.train_step(begun)
    task.close()
    assert {name: weight.stride() for name, weight in begun.weights.parameters.items()} == before
    assert any(line.startswith("channels_last is for the locked weights alone") for line in said)
    assert task.base.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_base_that_is_told_a_picture_is_refused_and_nothing_is_written(place, goes_on):
    base = tiny_models.build_unclip(place / "unclip")
    own = load_base(str(tiny_models.build(place / "sd2", "sd2", sample_size=8)))
    save_adapter(from_base(own), place / "adapter", info=AdapterInfo(map=MAPS["canny"], family="sd2"))
    init = {"init": str(place / "adapter")} if goes_on else {}
    with pytest.raises(ValueError, match=r"told a class or a picture .* train the adapter on"):
        run(place, "told-a-picture", base=str(base), **init)
    assert not (place / "told-a-picture" / "checkpoints").exists()


def test_fp16_without_a_gpu_is_refused_before_anything_is_loaded(place):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"fp16 needs a CUDA device.*precision=bf16"):
        run(place, "fp16", precision="fp16")

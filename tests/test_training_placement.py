"""Training on a GPU without one: the real step on a device whose tensors have places but no numbers, and
whole trainings on one that is made of the processor.
"""

import json

import numpy as np
import pytest
import torch
from fake_device import fake_device, move
from killed_runs import recipe, sample_in, write_pictures
from pretended_gpu import pretended_gpu, with_driver
from tiny_models import build

from controlkit.base import load_base
from controlkit.training import adapter, train_recipe
from controlkit.training.adapter import ControlNetTask
from controlkit.training.config import load_recipe
from controlkit.training.data import encoding
from controlkit.training.data.encoding import encode_captions, encode_pictures
from controlkit.training.hint_start import start_hint_encoder
from controlkit.training.loop import forward_backward, open_run, train_step
from controlkit.training.machine import Machine
from controlkit.training.reporting.monitor import Monitor


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("placement")
    write_pictures(folder / "pictures", count=8)
    for name, family, layers in (("base", "sd1", 1), ("sdxl", "sdxl", 1), ("two-layers", "sd1", 2)):
        build(folder / name, family, layers=layers)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def opened(place, name, **changes):
    """A run on the CPU before its first step. Files are read by the loader's thread and here, on the CPU."""
    if "base" in changes:
        changes["base"] = str(place / changes["base"])
    settings = {"accumulation": 1, "data_workers": 1, **changes}
    path = recipe(place / name, place / "pictures", **settings)
    table = load_recipe(str(path))
    machine = Machine(table)
    task = ControlNetTask(table, machine, lambda _: None)
    run = open_run(task, table, place / name, machine, lambda _: None)
    task.controlnet.train()
    if table.data.cache:
        task.encoded.text(["", *(example.caption for example in task.encoded.examples)])
    return run


VARIANTS = {
    "usual": ("cuda", {"accumulation": 2}),
    "half": ("cuda", {"precision": "bf16", "input_perturbation": 0.1}),
    "resident": ("cuda", {"data_resident": True, "data_map_blur": 0.0, "low": 50, "high": 160}),
    "live": ("cuda", {"data_cache": False}),
    "sdxl": ("cuda", {"base": "sdxl", "data_map_mode": "grey"}),
    "half backward": ("meta", {"precision": "bf16"}),
    "unlocked": ("meta", {"sd_locked": False, "objective": "v_prediction", "min_snr_gamma": 5.0}),
    "checkpointed": ("meta", {"gradient_checkpointing": True, "only_mid_control": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_mixes_no_devices(place, variant):
    device, changes = VARIANTS[variant]
    run = opened(place, variant, **changes)
    with fake_device(device) as reads:
        move(run, device)
        reads.count.clear()
        if device == "cuda":
            run.machine.backward = lambda loss: _gradients(run, loss)
            if variant == "live":
                _as_of_a_stream(run.task)
            train_step(run)
            expected = {"copies"} if variant == "live" else set()  # what was just encoded is taken back
            assert {name for name, count in reads.count.items() if count} == expected
        else:
            (losses, *_) = forward_backward(run)
            assert losses.each.device.type == device
    assert {master.device.type for master in run.weights.masters.values()} == {device}
    if device == "meta":
        without = [name for name, master in run.weights.masters.items() if master.grad is None]
        assert without == []
        assert sum(reads.count.values()) == 0


@pytest.mark.slow
def test_what_a_graph_records_stays_on_the_device(place):
    changes = {"objective": "v_prediction", "min_snr_gamma": 5.0, "input_perturbation": 0.1}
    run = opened(place, "recorded", base="sdxl", precision="bf16", **changes)
    (part,) = run.task.parts(0)
    with fake_device("cuda") as reads:
        move(run, "cuda")
        given = run.task.inputs(part)
        assert {tensor.device.type for tensor in given.values()} == {"cuda"}
        reads.count.clear()
        reads.moved = 0
        assert run.task.errors(run.whole, given).requires_grad
        assert not reads.count
        assert reads.moved == 0


def _as_of_a_stream(task):
    """A stream encodes on the spot whatever the recipe says of a cache: the encoders must stay."""
    data = task.recipe.data.model_copy(update={"cache": True})
    task.recipe = task.recipe.model_copy(update={"data": data})
    task._make_room()


def _gradients(run, loss):
    """What stands for the backward pass where there is none."""
    assert loss.requires_grad
    assert loss.device.type == "cuda"
    for parameter in run.weights.parameters.values():
        parameter.grad = torch.empty_like(parameter)


@pytest.mark.slow
def test_a_look_and_the_start_mix_no_devices(place):
    run = opened(place, "look", precision="bf16")
    maps = torch.rand(3, 3, 64, 64)
    pictures = [np.zeros((64, 64, 3), np.uint8)] * 2
    with fake_device("cuda") as reads:
        move(run, "cuda")
        latents = torch.randn(3, 4, 8, 8)
        text = torch.randn(3, 77, run.task.base.unet.config.cross_attention_dim).to("cuda")
        monitor = Monitor(run.task.shown.base, latents, maps, text, seed=1)
        assert monitor.look(run.task.controlnet).row()
        assert reads.count["cuda"] == 0  # the rows come to the CPU first, all at once
        start_hint_encoder(run.task.controlnet, maps, seed=1)
        assert encode_pictures(run.task.base, pictures).mean.device.type == "cpu"
        assert encode_captions(run.task.base, ["a word"]).encoder_hidden_states.device.type == "cpu"
        assert reads.count["cuda"] == 0


RUNS = {
    "usual": ({}, 1e-4),
    "interrupted": ({"ema": 0.9, "checkpoint_every": 1}, 1e-4),
    "resident": ({"data_map_blur": 0.0, "low": 50, "high": 160, "attention": "auto"}, 1e-4),
    "pictures": ({"sample_every": 2, "score_scenes": 2, "score_every": 2, "monitor_every": 1}, 1e-4),
    "reward": ({"reward": 0.5, "reward_below": 0.9}, 1e-4),
    "adafactor": ({"optimizer": "adafactor", "gradient_checkpointing": True}, 1e-4),
    "sdxl": ({"base": "sdxl", "precision": "bf16"}, 1e-2),
    "fp16": ({"precision": "fp16"}, 1e-2),
    **{kind: ({"adapter": kind}, 1e-4) for kind in ("control-lora", "t2i-adapter", "lite")},
    "controlnet-xs": ({"adapter": "controlnet-xs", "base": "two-layers"}, 1e-4),
}


def interrupt(progress):
    if progress.step == 2:
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_training_on_a_gpu_is_that_on_the_processor(place, monkeypatch, name):
    changes, tolerance = RUNS[name]
    if "base" in changes:
        changes = {**changes, "base": str(place / changes["base"])}
    settings = {"steps": 3, "log_every": 1, "checkpoint_every": 2, "attention": "torch", "monitor_every": 0}
    settings |= {"sample_every": 0, "hint_channels": [4, 8, 8, 8]} | changes
    sample_in(2, monkeypatch)

    def losses(folder, progress=lambda _: None, **more):
        path = recipe(place / folder, place / "pictures", **{**settings, **more})
        train_recipe(str(path), progress=progress)
        rows = [json.loads(line) for line in (place / folder / "metrics.jsonl").read_text().splitlines()]
        return [row[key] for row in rows for key in ("loss", "grad_norm") if key in row]

    here = {"precision": "fp32"} if name == "fp16" else {}
    expected = losses(f"{name}-cpu", **here)
    with_driver(monkeypatch)
    with pretended_gpu():
        if name == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                losses(f"{name}-gpu", progress=interrupt, device="cuda")
        found = losses(f"{name}-gpu", device="cuda")
    assert len(found) >= 6
    assert found == pytest.approx(expected, rel=tolerance)


def test_the_unet_comes_to_the_device_when_the_data_is_encoded(place, monkeypatch):
    real, seen = adapter.open_feed, []

    def opens(recipe, base, *rest, **options):
        seen.extend(part.device.type for part in (base.unet, base.vae, *base.text_encoders))
        return real(recipe, load_base(recipe.base), *rest, **options)

    monkeypatch.setattr(adapter, "open_feed", opens)
    settings = {"data_workers": 0, "precision": "bf16", "data_cache": False}
    table = load_recipe(str(recipe(place / "late", place / "pictures", **settings)))
    machine = Machine(table)
    machine.device = torch.device("meta")
    task = ControlNetTask(table, machine, lambda _: None)
    task.close()
    assert seen == ["cpu", "meta", "meta"]
    assert {p.device.type for part in (task.controlnet, task.base.unet) for p in part.parameters()} == {
        "meta"
    }
    assert task.base.unet.dtype == torch.bfloat16


@pytest.mark.slow
def test_pictures_that_do_not_fit_at_once_are_encoded_in_smaller_batches(place, monkeypatch):
    run = opened(place, "fewer", data_cache=False)
    run.task.close()
    tried, said = [], []

    def moments(base, pictures):
        tried.append(len(pictures))
        if len(pictures) > 2:
            raise RuntimeError("CUDA error: out of memory")
        return encoding.Moments(*(torch.tensor([[float(p[0, 0, 0])] for p in pictures]) for _ in range(2)))

    monkeypatch.setattr(encoding, "_moments", moments)
    monkeypatch.setattr(type(run.task.base.vae), "device", torch.device("cuda"))
    encoded = run.task.encoded
    encoded.report = said.append
    pictures = [np.full((8, 8, 3), k, np.uint8) for k in range(5)]
    assert encoded._encoded(pictures).mean[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert tried == [5, 4, 2, 2, 1]
    assert said[-1].endswith("from now on 2 at once")
    encoded._encoded(pictures)
    assert tried[5:] == [2, 2, 1]
    assert len(said) == 2
    monkeypatch.setattr(encoding, "_moments", lambda base, pictures: torch.ones(1, 2) @ torch.ones(1, 2))
    with pytest.raises(RuntimeError, match="shapes"):
        encoded._encoded(pictures)

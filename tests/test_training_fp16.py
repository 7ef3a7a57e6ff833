"""precision=fp16 as a GPU runs it, on the CPU: its autocast, scaler and precisions; not its speed."""

import functools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killed_runs import prepared, recipe

from controlkit.training import loop, machine, planning, previews, runs
from controlkit.training.adapter import ControlNetTask
from controlkit.training.config import load_recipe
from controlkit.training.draws import Draws
from controlkit.training.reporting import scores, showing
from controlkit.training.task import DrawnPart, DrawnTask

KINDS = ("controlnet-xs", "control-lora", "t2i-adapter", "lite")


class Accelerator:
    """What trainings in fp16 ask of accelerate's."""

    def __init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def autocast(self) -> Any:
        return torch.autocast("cpu", dtype=torch.float16)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def prepare_model(self, module: torch.nn.Module, **_: Any) -> torch.nn.Module:
        return module


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("fp16"))


@pytest.fixture
def fp16(place, monkeypatch):
    """Opens a run in fp16."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(place / "cache"))
    monkeypatch.setattr(machine, "check_precision", lambda *_: None)
    monkeypatch.setattr(machine.Machine, "accelerator", functools.cached_property(lambda _: Accelerator()))
    machine.Machine.accelerator.__set_name__(machine.Machine, "accelerator")
    for module in (showing, scores):  # one step: what matters is that it can be taken
        monkeypatch.setattr(module, "generate", _one_step(module.generate))

    def opened(name: str, **changes: object) -> loop.Run:
        settings = {"precision": "fp16", "batch_size": 2, "accumulation": 1, "data_buckets": False}
        settings |= {"data_workers": 0, "data_holdout": 2, **changes}
        told = load_recipe(str(recipe(place / name, place / "pictures", **settings)))
        here = machine.Machine(told)
        task = ControlNetTask(told, here, lambda _: None)
        run = loop.open_run(task, told, place / name, here, lambda _: None)
        for part in task.modules().values():
            part.train()
        return run

    return opened


def _one_step(generate):
    return lambda *given, **told: generate(*given, **{**told, "steps": 1})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"sd_locked": False}, marks=pytest.mark.slow),
        *(pytest.param({"adapter": kind}, marks=pytest.mark.slow) for kind in KINDS),
    ],
    ids=lambda changes: str(*changes.values()),
)
def test_what_is_trained_in_fp16_is_looked_at_scored_and_drawn(fp16, changes):
    run = fp16("-".join(["shown", *map(str, changes.values())]), **changes)
    loop.train_step(run)
    assert math.isfinite(run.grad_norm)
    before = {name: master.clone() for name, master in run.weights.masters.items()}
    assert {"loss_map", "gap"} <= run.task.look(4).keys()
    with loop.averaged(run), torch.no_grad():
        assert run.task.sample().any()
        assert run.task.scores()
    assert all(torch.equal(before[name], master) for name, master in run.weights.masters.items())
    assert {master.dtype for master in run.weights.masters.values()} == {torch.float32}


@pytest.mark.slow
def test_trying_batches_in_fp16_leaves_the_weights_as_they_are(place, fp16, monkeypatch):
    real, opened = loop.open_run, []

    def opens(*given):
        run = real(*given)
        run.machine.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        opened.append((run, {name: master.clone() for name, master in run.weights.masters.items()}))
        return run

    monkeypatch.setattr(loop, "open_run", opens)
    monkeypatch.setattr(planning, "batch_need", lambda *_, **__: lambda size: 0)
    monkeypatch.setattr(previews, "_LARGEST_ON_CPU", 2)
    path = recipe(place / "tried", place / "pictures", precision="fp16", data_workers=0)
    assert any("largest: 2" in line for line in previews.find_batch_for(str(path)))
    ((run, before),) = opened
    assert all(torch.equal(before[name], master) for name, master in run.weights.masters.items())


def test_a_batch_is_tried_as_it_is_trained_and_leaves_no_gradients_where_it_does_not_fit(
    place, fp16, monkeypatch
):
    real, update, tried, networks = ControlNetTask.losses, torch.optim.AdamW.step, [], []

    def losses(self, whole, part):
        networks.append(self.controlnet)
        tried.append((len(part), torch.is_autocast_enabled("cpu")))
        return real(self, whole, part)

    def step(self):
        if tried[-1][0] == 2:  # a first step makes room for the moments, beside all gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return update(self)

    monkeypatch.setattr(ControlNetTask, "losses", losses)
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(planning, "batch_need", lambda *_, **__: lambda size: 0)
    monkeypatch.setattr(previews, "_LARGEST_ON_CPU", 2)
    settings = {"precision": "fp16", "data_workers": 0, "data_buckets": False}
    path = recipe(place / "too large", place / "pictures", **settings)
    assert any("largest: 1" in line for line in previews.find_batch_for(str(path)))
    assert tried == [(1, True), (1, True), (2, True)]
    assert all(p.grad is None for p in networks[-1].parameters())


class Drawn(DrawnTask):
    """A task whose loss is what its network gives."""

    def __init__(self, precision: str) -> None:
        self.recipe = SimpleNamespace(precision=precision)
        self.network = torch.nn.Linear(3, 3)

    def modules(self) -> dict[str, torch.nn.Module]:
        return {"network": self.network}

    def loss(self, draws: Draws) -> torch.Tensor:
        self.seen = self.network(torch.ones(2, 3))
        return self.seen.float().mean()


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_tasks_that_draw_their_batch_compute_in_their_precision(name):
    task = Drawn(name)
    outer = torch.autocast("cpu", dtype=torch.float16, enabled=name == "fp16")  # Machine.autocast
    with outer:
        losses = task.losses(task.whole(), DrawnPart(Draws(1, 0), 2))
    assert task.seen.dtype == machine.DTYPES[name]
    assert losses.each.dtype == torch.float32


@pytest.mark.parametrize(
    ("precision", "there", "said"), [("bf16", False, 1), ("bf16", True, 0), ("fp16", False, 0)]
)
def test_a_gpu_that_has_no_bf16_is_told_of(monkeypatch, precision, there, said):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2060")
    told = load_recipe("tiny-canny", [f"precision={precision}"])
    heard = []
    monkeypatch.setattr("controlkit.training.adapter.ControlNetTask", lambda *_: None)
    here = SimpleNamespace(device=torch.device("cuda"))
    runs.build_task(told, here, lambda progress: heard.append(progress.message))
    assert len(heard) == said
    assert all("RTX 2060" in line and "precision=fp16" in line for line in heard)
    assert not machine.remarks(told, torch.device("cpu"))

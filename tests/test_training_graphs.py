"""Recorded graphs, on a device without any: what they compute, when they are made and given up."""

import json
from pathlib import Path

import pytest
import torch
from killed_runs import recipe, write_pictures
from recorders import Counting, Deaf, Failing, Repeater
from safetensors.torch import load_file
from tiny_models import build

from controlkit.training import graphs, train_recipe
from controlkit.training.adapter import ControlNetTask
from controlkit.training.pair import Pair
from controlkit.training.weights import Weights


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    write_pictures(folder / "pictures")
    for name, family in (("base", "sd1"), ("sdxl", "sdxl")):
        build(folder / name, family, layers=1)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place: Path, name: str, **changes):
    settings = {"steps": 4, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99, "log_every": 1}
    path = recipe(place / name, place / "pictures", **{**settings, **changes})
    said = []
    train_recipe(str(path), progress=lambda step: said.append(step.message) if step.message else None)
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (place / name / "checkpoints").glob("*/weights.safetensors")
    losses = [row["loss"] for row in lines if "loss" in row]
    return losses, load_file(weights), [line for line in said if "CUDA graph" in line]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Forgetful(Repeater):
    """Gives the losses and forgets the gradients."""

    def __init__(self, parameters) -> None:
        self.parameters = parameters

    def record(self, work):
        again, result = super().record(work)

        def forgetful() -> None:
            again()
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()

        return forgetful, result


@pytest.fixture
def recorder(monkeypatch):
    """Puts a recorder where a GPU has CUDA graphs."""

    def put(made):
        monkeypatch.setattr(graphs, "_recorder_for", lambda device: made)
        return made

    return put


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"precision": "bf16", "sd_locked": False}, marks=pytest.mark.slow),
        pytest.param(
            {"base": "sdxl", "input_perturbation": 0.1, "only_mid_control": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["fp32", "bf16, unlocked", "SDXL"],
)
def test_graphs_change_nothing(place, recorder, changes):
    name = "-".join(map(str, changes))
    if "base" in changes:
        changes = {**changes, "base": str(place / changes["base"])}
    losses, weights, _ = run(place, f"{name}-eager", **changes)
    made = recorder(Counting())
    recorded, moved, said = run(place, f"{name}-graphs", cuda_graph=True, **changes)
    assert recorded == losses
    assert same(moved, weights)
    assert said == []
    assert 1 < made.recorded <= 3  # a graph for each bucket
    assert made.repeated == 4 * 2  # micro-batches


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["deaf", "failing", "forgetful"])
def test_a_graph_that_is_wrong_is_dropped_and_the_run_is_as_without(place, recorder, monkeypatch, kind):
    losses, weights, _ = run(place, f"right-{kind}")
    seen = []
    real = graphs.Graphs.__init__
    monkeypatch.setattr(
        graphs.Graphs, "__init__", lambda self, run, made: (seen.append(run), real(self, run, made))[1]
    )
    parameters = lambda: seen[0].weights.parameters.values()  # noqa: E731
    recorder({"deaf": Deaf, "forgetful": lambda: Forgetful(parameters), "failing": Failing}[kind]())
    found, moved, said = run(place, kind, cuda_graph=True)
    assert found == losses
    assert same(moved, weights)
    (line,) = said
    assert line.startswith("no CUDA graph from step 1 on: ")
    assert ("not permitted" if kind == "failing" else "away from what it should compute") in line
    assert seen[0].graphs is None


@pytest.mark.slow
def test_a_graph_is_not_trusted_on_a_step_that_is_not_finite(place, recorder, monkeypatch):
    real, made = ControlNetTask.inputs, recorder(Counting())

    def broken_at_first(self, part):
        given = real(self, part)
        return {**given, "noise": given["noise"] * torch.inf} if part.step == 0 else given

    monkeypatch.setattr(ControlNetTask, "inputs", broken_at_first)
    losses, _, said = run(place, "unsure", cuda_graph=True, bad_steps=3)
    assert said == []
    assert losses[0] is None
    assert all(loss is not None for loss in losses[1:])
    assert made.repeated == 8


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, "this run is on cpu"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing computes twice"),
        ({"compile": True}, "this run is on cpu"),
    ],
)
def test_where_graphs_cannot_be_it_is_said(place, changes, why, monkeypatch):
    monkeypatch.setattr(Pair, "compile", lambda self, **_: None)  # it takes minutes
    _, _, said = run(place, "-".join([why[:4], *changes]), cuda_graph=True, steps=1, warmup=0, **changes)
    assert len(said) == 1
    assert said[0].startswith(f"no CUDA graph: {why}")


@pytest.mark.slow
def test_a_step_that_does_not_fit_goes_on_in_pieces_without_graphs(place, recorder, monkeypatch):
    recorder(Repeater())
    real = ControlNetTask.errors

    def small_device(self, whole, given):
        if len(given["mean"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, whole, given)

    monkeypatch.setattr(ControlNetTask, "errors", small_device)
    losses, _, _ = run(place, "small", cuda_graph=True)
    assert len(losses) == 4


@pytest.mark.slow
def test_gradients_are_kept_for_the_graphs_of_a_compiler(place, recorder, monkeypatch):
    modes = []
    monkeypatch.setattr(Pair, "compile", lambda self, **given: modes.append(given))
    recorder(Repeater())
    losses, weights, _ = run(place, "uncompiled")
    found, moved, said = run(place, "compiled", cuda_graph=True, compile=True)
    assert modes == [{"dynamic": False, "mode": None}]  # reduce-overhead is for CUDA
    assert found == losses
    assert same(moved, weights)
    assert len(said) == 1
    assert said[0].startswith("CUDA graphs are the compiler's own")


@pytest.mark.slow
def test_a_compilers_graphs_keep_their_gradients_when_a_step_does_not_fit(place, recorder, monkeypatch):
    real, kept = ControlNetTask.errors, []

    def small_device(self, whole, given):
        if len(given["mean"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, whole, given)

    keep = Weights.keep_gradients
    monkeypatch.setattr(Weights, "keep_gradients", lambda self: (kept.append(self), keep(self))[1])
    monkeypatch.setattr(ControlNetTask, "errors", small_device)
    monkeypatch.setattr(Pair, "compile", lambda self, **_: None)
    recorder(Repeater())
    run(place, "compiled in pieces", cuda_graph=True, compile=True, steps=1, warmup=0)
    (weights,) = kept
    assert weights.keeps_gradients
    assert all(p.grad is not None for p in weights.parameters.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "marks"), [({}, 4), ({"reward": 0.5}, 0)], ids=["compiled", "reward, which has no graphs"]
)
def test_a_compilers_graphs_are_told_where_each_micro_batch_begins(place, monkeypatch, changes, marks):
    modes, marked = [], []
    monkeypatch.setattr(Pair, "compile", lambda self, **given: modes.append(given["mode"]))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    monkeypatch.setattr(ControlNetTask, "_on_gpu", True)
    run(place, f"marked-{marks}", cuda_graph=True, compile=True, steps=2, warmup=0, **changes)
    assert modes == ["reduce-overhead" if marks else None]
    assert len(marked) == marks


@pytest.mark.slow
def test_a_traced_pair_equals_the_other_and_is_traced_once_for_each_size(tmp_path):
    """The compiler's front half, forward and backward; what its C++ half makes of that takes minutes."""
    from diffusers import UNet2DConditionModel
    from torch._dynamo.utils import counters

    from controlkit.controlnet import from_base, trainable_parameters
    from controlkit.training.config import load_recipe

    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (8, 16)}
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**blocks, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4)
    controlnet = from_base(unet, hint_channels=(4, 4, 8, 8))
    parameters = trainable_parameters(controlnet, unet)
    controlnet.train()
    pair = Pair(controlnet, unet, load_recipe(str(recipe(tmp_path / "run", tmp_path / "pictures"))))

    def step(height, width):
        torch.manual_seed(height)
        inputs = torch.randn(2, 4, height, width), torch.tensor([9, 500]), torch.randn(2, 77, 8)
        model_pred = pair(*inputs, torch.rand(2, 3, 8 * height, 8 * width))
        model_pred.square().mean().backward()
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        return [model_pred.detach(), *gradients]

    sizes = [(8, 8), (4, 8), (8, 8), (4, 8)]
    usual = [step(*size) for size in sizes]
    counters.clear()
    pair.compile(dynamic=False, backend="aot_eager")
    for expected, size in zip(usual, sizes, strict=True):
        torch.testing.assert_close(step(*size), expected, rtol=1e-3, atol=1e-5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2

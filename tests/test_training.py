"""Training: recipes, draws, checkpoints and the loop, on real tasks at a few steps."""

import copy
import json
import math
import os
import re
import shutil
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import controlkit
from controlkit.figures import render
from controlkit.training import runs, saving, train_recipe, world
from controlkit.training.checkpoints import clear, latest_state, load_latest, save_checkpoint
from controlkit.training.config import (
    TextRecipe,
    VaeRecipe,
    find_recipe,
    given_keys,
    load_recipe,
    overridden_keys,
    parse_recipe,
    recipe_names,
    to_toml,
)
from controlkit.training.data import pairs
from controlkit.training.draws import Draws
from controlkit.training.going_on import as_begun
from controlkit.training.loop import forward_backward, open_run, train, train_step
from controlkit.training.machine import Machine
from controlkit.training.optimizers import averages_of, learning_rate, restore_state, state_of
from controlkit.training.reporting.run_record import read_run
from controlkit.training.saving import Saver, refuse_changes, write_recipe
from controlkit.training.task import DrawnTask, Losses
from controlkit.training.text import ATTRIBUTES, attributes, build_tokenizer
from controlkit.training.weights import Weights
from controlkit.training.world import load_world

TEXT = (
    'task = "text"\nout = "{out}"\nsteps = 8\nbatch_size = 4\nlearning_rate = 1e-3\nscenes = 60\nema = 0.9\n'
)
TEXT += (
    "warmup = 2\nlog_every = 1\ncheckpoint_every = 3\nhidden_size = 16\nlayers = 1\nheads = 2\nthreads = 1\n"
)


@pytest.fixture(scope="module", autouse=True)
def world_cache(tmp_path_factory):
    """Scenes are rendered once for this module, outside the user's cache, and not 250 where 60 are used."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.setattr(world, "CHUNK", 64)
    for module in (runs, pairs):  # one chunk: a second one is rendered by a process of its own, in 250s
        patch.setattr(module, "VALIDATION_SCENES", 64)
    yield
    patch.undo()


@pytest.fixture
def text_recipe(tmp_path):
    path = tmp_path / "text.toml"
    path.write_text(TEXT.format(out=tmp_path / "run"))
    return path


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "event" not in row]


# --- recipes ----


@pytest.mark.parametrize("name", recipe_names())
def test_bundled_recipes_parse_and_repeat_themselves(name):
    recipe = load_recipe(name)
    assert parse_recipe(tomllib.loads(to_toml(recipe)), where="x") == recipe
    assert f"controlkit train {name}\n" in find_recipe(name).read_text()


def test_overrides_are_typed_like_toml():
    recipe = load_recipe(
        "tiny-canny", ["steps=3", "warmup=1", "learning_rate = 1e-5", "out=a=b c", "base=some/folder"]
    )
    assert (recipe.steps, recipe.learning_rate, recipe.out, recipe.base) == (3, 1e-5, "a=b c", "some/folder")
    assert load_recipe("tiny-canny", ["out=2026-11-20"]).out == "2026-11-20"  # no date: a folder


@pytest.mark.parametrize("text", ['a "quoted" \\ name', "two\nlines\ttab", "Zürich\x7f\x00"])
def test_any_text_survives_the_run_folders_recipe(text):
    recipe = load_recipe("tiny-canny").model_copy(update={"out": text})
    assert parse_recipe(tomllib.loads(to_toml(recipe)), where="x") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("step=3", r"^step=3: unknown key 'step' \(did you mean 'steps'\?\)$"),
        ("data.sorce=x", r"^data.sorce=x: unknown key 'sorce' in \[data\] \(did you mean 'source'\?\)$"),
        ("dta.source=x", r"^dta.source=x: unknown key 'dta' \(did you mean 'data'\?\)$"),
        ("source=photos", r"^source=photos: unknown key 'source' \(did you mean 'data.source'\?\)$"),
        (
            "data.steps=3",
            r"unknown key 'steps' in \[data\] \(it is a key of the recipe itself, outside data",
        ),
        ("lr_warmup_steps=3", r"unknown key 'lr_warmup_steps' \(did you mean 'warmup'\?\)$"),
        ("lr=1e-4", r"unknown key 'lr' \(did you mean 'learning_rate'\?\)$"),
        ("max_train_steps=5", r"\(did you mean 'steps'\?\)$"),
        ("data.conditioning_image_column=a", r"in \[data\] \(did you mean 'data.map_column'\?\)$"),
        ("data=photos", "^data=photos: data is a table, not 'photos': give its keys, such as data.source="),
        ("hint_channels=[16,32]", r"hint_channels: a longer list is wanted, not \[16, 32\]$"),
        ("steps=3.5", "^steps=3.5: steps: a whole number is wanted, not 3.5$"),
        ("learning_rate=fast", "learning_rate: a number is wanted, not 'fast'$"),
        ("data.buckets=2", "data.buckets: true or false is wanted, not 2$"),
        ("data.options=3", "data.options: a table is wanted, not 3$"),
        ("betas=0.9", "betas: a list is wanted, not 0.9$"),
        ("steps=0", "steps: input should be greater than 0, not 0"),
        ("steps=many", "steps: .* not 'many'"),
        ("learning_rate=nan", "learning_rate"),
        ("learning_rate=-1", "learning_rate"),
        ("caption_dropout=1.5", "caption_dropout"),
        ("map=cany", r"unknown kind of map 'cany' \(did you mean 'canny'\?\)"),
        ("steps", "key=value"),
        ("task=controlnets", "did you mean 'controlnet'"),
        ("task=[1]", "unknown task"),
        ("out=", "out: "),
        ("hint_channels=[8,16,32]", "hint_channels"),
        ("zero_convolution_rate=inf", "zero_convolution_rate"),
        ("seed=-1", "seed"),
    ],
)
def test_bad_overrides_are_one_plain_line(override, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("tiny-canny", [override])
    assert "\n" not in str(caught.value)


def test_missing_and_broken_recipes(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'tiny-canny'"):
        load_recipe("tiny-cany")
    with pytest.raises(ValueError, match="no recipe file"):
        load_recipe(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("steps = [")
    with pytest.raises(ValueError, match="not valid TOML"):
        load_recipe(str(broken))
    broken.write_text("")
    with pytest.raises(ValueError, match="task"):
        load_recipe(str(broken))


# --- draws ----


def test_each_epoch_visits_each_item_once_in_its_own_order():
    batches = [Draws(5, step).indices(10, 4) for step in range(5)]  # two epochs of ten
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert Draws(6, 0).indices(10, 4) != batches[0]


def test_draws_depend_on_seed_and_step_alone():
    first, again = Draws(1, 7), Draws(1, 7)
    torch.randn(3)
    assert torch.equal(first.normal(2, 3), again.normal(2, 3))
    assert torch.equal(first.timesteps(5, 1000), again.timesteps(5, 1000))
    assert not torch.equal(Draws(1, 8).normal(2, 3), Draws(1, 7).normal(2, 3))
    assert Draws(1, 0).chosen(20000, 0.1).float().mean() == pytest.approx(0.1, abs=0.01)


def test_learning_rate_warms_up_and_falls():
    recipe = VaeRecipe(task="vae", out="x", steps=110, batch_size=1, learning_rate=1e-3, warmup=10)
    assert learning_rate(recipe, 0) == pytest.approx(1e-4)
    assert learning_rate(recipe, 10) == pytest.approx(1e-3)
    assert learning_rate(recipe, 60) == pytest.approx(1e-3 * 0.51)
    assert learning_rate(recipe, 110) == pytest.approx(2e-5)
    constant, line, root = (
        recipe.model_copy(update={"schedule": s}) for s in ("constant", "linear", "rsqrt")
    )
    assert learning_rate(constant, 109) == 1e-3
    assert learning_rate(line, 60) == pytest.approx(1e-3 * 0.51)
    assert learning_rate(line, 35) == pytest.approx(1e-3 * (0.02 + 0.98 * 0.75))  # a cosine falls later
    assert learning_rate(recipe, 35) == pytest.approx(1e-3 * (0.02 + 0.98 * (0.5 + 8**-0.5)))
    assert learning_rate(root, 19) == 1e-3  # twice the warmup
    assert learning_rate(root, 79) == pytest.approx(5e-4)


# --- checkpoints ----


def checkpoint(folder, step):
    tensors = {"a": torch.full((3,), float(step))}
    return save_checkpoint(folder, step, weights=tensors, optimizer=tensors, state={})


def test_the_newest_good_checkpoint_is_loaded(tmp_path):
    for step in (5, 10, 15):
        checkpoint(tmp_path, step)
    (tmp_path / "step-final").mkdir()
    (tmp_path / "step-000099.tmp").mkdir()
    assert sorted(path.name for path in tmp_path.glob("step-0000??")) == ["step-000010", "step-000015"]
    (weights, _, state), refused = load_latest(tmp_path)
    assert (state["step"], weights["a"].tolist(), refused) == (15, [15.0] * 3, [])


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, name, damage):
    checkpoint(tmp_path, 5)
    path = checkpoint(tmp_path, 10) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[-2] ^= 64
        path.write_bytes(data)
    (_, _, state), refused = load_latest(tmp_path)
    assert state["step"] == 5
    assert len(refused) == 1
    assert "step-000010" in refused[0]


def test_the_checkpoint_just_written_outlives_damaged_later_ones(tmp_path):
    for step in (10, 15):
        (checkpoint(tmp_path, step) / "manifest.json").write_text("{}")
    checkpoint(tmp_path, 3)
    (_, _, state), refused = load_latest(tmp_path)
    assert state["step"] == 3
    assert len(refused) == 2
    checkpoint(tmp_path, 6)
    checkpoint(tmp_path, 9)
    assert sorted(path.name[-2:] for path in tmp_path.iterdir()) == ["06", "09", "10", "15"]


def test_a_checkpoint_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    """Its files and their list before it has its name, and that name before older ones are removed."""
    for step in (5, 10):
        checkpoint(tmp_path, step)
    done, fsync, replace, rmtree = [], os.fsync, os.replace, shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_ino) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("named") or replace(*paths))
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: done.append("removed") or rmtree(*a, **k))
    path = checkpoint(tmp_path, 1_000_000)
    named, removed = done.index("named"), done.index("removed")
    assert {file.stat().st_ino for file in [path, *path.iterdir()]} <= set(done[:named])
    assert tmp_path.stat().st_ino in done[named:removed]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert load_latest(tmp_path)[0][2]["step"] == 1_000_000


@pytest.mark.parametrize("manifest", ["[]", "3", '{"weights.safetensors": 5}', "null"])
def test_a_manifest_that_says_nothing_is_a_fault(tmp_path, manifest):
    (checkpoint(tmp_path, 5) / "manifest.json").write_text(manifest)
    assert load_latest(tmp_path) == (None, ["step-000005: no readable manifest.json"])


def test_no_checkpoint_at_all(tmp_path):
    assert load_latest(tmp_path / "none") == (None, [])
    assert latest_state(tmp_path / "none") == {}


@pytest.mark.parametrize("state", ["[]", "3", "{", None])
def test_what_the_newest_says_of_itself_is_that_of_the_newest_that_can_be_read(tmp_path, state):
    checkpoint(tmp_path, 5)
    path = checkpoint(tmp_path, 10) / "state.json"
    assert latest_state(tmp_path) == {"step": 10}
    path.unlink() if state is None else path.write_text(state)
    assert latest_state(tmp_path) == {"step": 5}


def test_a_state_that_is_no_json_is_not_written(tmp_path):
    checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match="JSON compliant"):
        save_checkpoint(tmp_path, 10, weights={}, optimizer={}, state={"loss": math.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def test_only_what_was_left_half_written_is_cleared(tmp_path):
    left = f".{'0f' * 16}.tmp"
    kept = [f"{left}.mine", ".0f.tmp", "step-000005.tmp", f"a{left}"]
    for name in (left, *kept):
        (tmp_path / name).mkdir()
    (tmp_path / left.replace("0f0f", "abcd")).write_text("cut short")
    clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    clear(tmp_path / "none")


# --- the loop ----


@pytest.mark.slow
def test_a_training_that_is_made_short_warms_up_shortly():
    from controlkit.training.config import load_recipe

    assert load_recipe("tiny-canny").warmup == 25
    assert load_recipe("tiny-canny", ["steps=20"]).warmup == 4
    assert load_recipe("tiny-canny", ["steps=25"]).warmup == 25
    assert load_recipe("tiny-canny", ["steps=1"]).warmup == 0
    assert load_recipe("tiny-canny", ["steps=20", "warmup=20"]).warmup == 20
    with pytest.raises(ValueError, match="warmup=30 is longer than the training, steps=20"):
        load_recipe("tiny-canny", ["steps=20", "warmup=30"])
    with pytest.raises(ValueError, match="steps"):
        load_recipe("tiny-canny", ["steps=-3"])


def test_a_short_recipe_without_a_warmup_warms_up_shortly(tmp_path):
    path = tmp_path / "short.toml"
    given = {"task": '"controlnet"', "map": '"canny"', "out": '"x"', "steps": 10, "batch_size": 1}
    lines = [f"{key} = {value}\n" for key, value in (given | {"learning_rate": 1e-4}).items()]
    path.write_text("".join(lines))
    assert load_recipe(str(path)).warmup == 2
    assert load_recipe(str(path), ["steps=60"]).warmup == 50
    path.write_text(path.read_text() + "warmup = 30\n")
    with pytest.raises(ValueError, match="warmup=30 is longer than the training, steps=10"):
        load_recipe(str(path))


def test_a_stopped_run_equals_an_uninterrupted_one(tmp_path, text_recipe):
    whole = train_recipe(str(text_recipe), [f"out={tmp_path / 'whole'}"])

    class Stop(Exception):
        pass

    def stop_at_five(step):
        if step.step == 5:
            raise Stop

    parts = tmp_path / "parts"
    with pytest.raises(Stop):
        train_recipe(str(text_recipe), [f"out={parts}"], progress=stop_at_five)
    messages = []
    train_recipe(str(text_recipe), [f"out={parts}"], progress=lambda step: messages.append(step.message))
    assert "resumed at step 3" in messages
    assert (read_run(parts).resumed, read_run(whole.folder).resumed) == ([3], [])
    assert losses(parts) == losses(whole.folder)
    result = "result/text_encoder/model.safetensors"
    mine, theirs = load_file(parts / result), load_file(whole.folder / result)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    optimizer = "checkpoints/step-000008/optimizer.safetensors"
    assert (parts / optimizer).read_bytes() == (whole.folder / optimizer).read_bytes()


class Line(DrawnTask):
    """A task that is one matrix and its bias, which learns at another rate."""

    def __init__(self, recipe, half=None):
        self.recipe, self.half = recipe, half
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.net = torch.nn.Linear(3, 2)

    def modules(self):
        return {"net": self.net}

    def parameter_groups(self):
        return [{"params": [self.net.weight], "rate": 1.0}, {"params": [self.net.bias], "rate": 6.0}]

    def loss(self, draws):
        assert self.net.training
        return (self.net(3 * draws.normal(4, 3).to(self.net.weight.dtype)).float() - 5).square().mean()

    def sample(self):
        assert not self.net.training

    def export(self, folder, weights):
        assert not self.net.training
        assert torch.equal(self.net.weight, weights["net.weight"].to(self.net.weight.dtype))
        save_file(dict(weights), folder / "line.safetensors")


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_run_is_the_plain_loop_that_its_recipe_says(tmp_path, text_recipe, half):
    """In half precision of weights that are moved in fp32, and rounded for every step."""
    changes = ["betas=[0.8, 0.9]", "weight_decay=0.3", "clip=20.0", "sample_every=3", "learning_rate=0.1"]
    recipe, run = load_recipe(str(text_recipe), changes), tmp_path / "line"
    task = Line(recipe, half)
    theirs = copy.deepcopy(task)
    used = list(theirs.net.parameters())
    masters = [torch.nn.Parameter(p.detach().clone()) for p in used]
    averages, rows = [p.detach().clone() for p in masters], []
    theirs.net.to(half)
    optimizer = torch.optim.AdamW([{"params": [p]} for p in masters], betas=(0.8, 0.9), weight_decay=0.3)
    for step, rate in enumerate(learning_rate(recipe, step) for step in range(8)):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 6 * rate
        theirs.net.zero_grad()
        with torch.no_grad():
            for mine, master in zip(used, masters, strict=True):
                mine.copy_(master)
        loss = theirs.loss(Draws(recipe.seed, step))
        loss.backward()
        for mine, master in zip(used, masters, strict=True):
            master.grad = mine.grad.float()
        norm = torch.nn.utils.clip_grad_norm_(masters, 20.0)
        optimizer.step()
        decay = min(0.9, 1 - 1 / (1 + 0.3 * (step + 1)))  # a young average reaches back over a quarter
        for average, p in zip(averages, masters, strict=True):
            average.lerp_(p.detach(), 1 - decay)
        rows.append((rate, pytest.approx(float(norm)), pytest.approx(float(loss.detach()))))
    assert 0 < sum(norm.expected > 20 for _, norm, _ in rows) < 8  # some are clipped

    train(task, recipe, run)
    found = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [(row["learning_rate"], row["grad_norm"], row["loss"]) for row in found] == rows
    result = load_file(run / "result" / "line.safetensors")
    checkpoint = load_file(run / "checkpoints/step-000008/weights.safetensors")
    for name, average, p in zip(("net.weight", "net.bias"), averages, masters, strict=True):
        torch.testing.assert_close(result[name], average)
        torch.testing.assert_close(checkpoint[f"average.{name}"], average)
        torch.testing.assert_close(checkpoint[f"model.{name}"], p.detach())
        torch.testing.assert_close(dict(task.net.named_parameters())[name[4:]].detach(), p.detach().to(half))


def test_gradients_of_micro_batches_add_up_in_full_precision():
    net = torch.nn.Linear(1, 1, bias=False)
    weights = Weights({"net": net}, half=torch.bfloat16)
    for gradient in (256.0, 1.0, 1.0):  # whose sum bf16 does not have
        net.weight.grad = torch.full((1, 1), gradient, dtype=torch.bfloat16)
        weights.take_gradients()
        assert net.weight.grad is None
    assert weights.masters["net.weight"].grad.item() == 258


class Few(tuple):
    """A micro-batch of numbers."""

    def halves(self):
        return [Few(self[:2]), Few(self[2:])] if len(self) > 2 else [self]


def test_pieces_of_a_micro_batch_weigh_as_many_pairs_as_they_have(tmp_path, text_recipe, monkeypatch):
    run = opened(text_recipe, tmp_path / "line")
    values = torch.tensor([1.0, 5.0, 30.0])

    def losses(whole, part):
        return Losses(values[list(part)] * run.task.net.bias.float().sum())

    monkeypatch.setattr(run.task, "parts", lambda step: [Few(range(3))])
    monkeypatch.setattr(run.task, "losses", losses)
    for pieces in (1, 2):
        run.cut(pieces)
        forward_backward(run)
        assert run.weights.masters["net.bias"].grad.tolist() == [12.0] * 2
        run.weights.drop_gradients()


class Averaging(torch.optim.SGD):
    """An optimizer with averages of its own, whose way back from them is not to the bit."""

    def eval(self):
        for p in self.param_groups[0]["params"]:
            p.data.fill_(7)

    def train(self):
        for p in self.param_groups[0]["params"]:
            p.data.add_(1e-3)


def test_averages_of_an_optimizer_are_taken_and_left_to_the_bit():
    net = torch.nn.Linear(2, 2)
    weights = Weights({"net": net}, half=torch.bfloat16)
    before = {name: master.detach().clone() for name, master in weights.masters.items()}
    with averages_of(Averaging(weights.masters.values()), weights):
        assert all((tensor == 7).all() for tensor in (*weights.masters.values(), *net.parameters()))
    for name, master in weights.masters.items():
        assert torch.equal(master, before[name])
        assert torch.equal(weights.parameters[name], before[name].to(torch.bfloat16))


def opened(text_recipe, folder):
    recipe = load_recipe(str(text_recipe))
    return open_run(Line(recipe, torch.bfloat16), recipe, folder, Machine(recipe), lambda _: None)


def test_what_a_run_knows_of_itself_is_there_when_it_goes_on(tmp_path, text_recipe):
    run = opened(text_recipe, tmp_path / "line")
    train_step(run)
    train_step(run)
    run.bad_steps = 2
    run.cut(4)
    with Saver(run) as saver:
        saver.save()
    left = [run.folder / place / f".{'0f' * 16}.tmp" for place in ("", "checkpoints")]
    for path in left:
        path.mkdir()
    again = opened(text_recipe, run.folder)
    assert (again.step, again.bad_steps, again.pieces) == (2, 2, 4)
    assert (again.window, again.window.steps) == (run.read_losses(), 2)
    assert again.weights.average.keys() == run.weights.masters.keys()
    for mine, theirs in zip(
        (again.weights.parameters, again.weights.masters, again.weights.average),
        (run.weights.parameters, run.weights.masters, run.weights.average),
        strict=True,
    ):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert not any(path.exists() for path in left)


def test_a_checkpoint_that_cannot_be_written_is_never_passed_over(tmp_path, text_recipe, monkeypatch):
    """Not by the one after it either, nor by the end of the training."""
    run, may_go = opened(text_recipe, tmp_path / "line"), threading.Event()

    def fail(*_, **__):
        may_go.wait(10)
        raise OSError("no disk")

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with Saver(run) as saver:
        saver.save()
        saver.check()  # it is not done, and nothing is known of it
        may_go.set()
        with pytest.raises(OSError, match="no disk"):
            saver.save()
    last = Saver(run)
    last.save()
    with pytest.raises(OSError, match="no disk"):
        last.__exit__(None, None, None)


def test_the_run_folder_is_complete_and_repeats_itself(text_recipe, tmp_path):
    run = train_recipe(str(text_recipe)).folder
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "result",
    ]
    again = train_recipe(str(run / "config.toml"), [f"out={tmp_path / 'again'}"]).folder
    assert losses(again) == losses(run)
    before = (run / "metrics.jsonl").read_text()
    train_recipe(str(text_recipe))  # a finished run is not trained further
    assert (run / "metrics.jsonl").read_text() == before


def test_a_folder_of_another_recipe_is_refused(text_recipe):
    train_recipe(str(text_recipe), ["steps=2"])
    with pytest.raises(ValueError, match=r"another recipe \(learning_rate 0.001 -> 0.002, steps 2 -> 3\)"):
        train_recipe(str(text_recipe), ["steps=3", "learning_rate=2e-3"])


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_a_run_that_is_made_longer_equals_one_that_was_long_from_the_start(tmp_path, text_recipe, schedule):
    whole = train_recipe(str(text_recipe), [f"out={tmp_path / 'whole'}", f"schedule={schedule}"]).folder
    run = train_recipe(str(text_recipe), ["steps=4", f"schedule={schedule}"]).folder
    said = []
    train_recipe(str(run / "config.toml"), ["steps=8"], progress=lambda step: said.append(step.message))
    assert said[:2] == ["resumed at step 4", "it goes on to step 8, not to 4 as it was begun"]
    assert tomllib.loads((run / "config.toml").read_text())["steps"] == 8
    assert losses(run) == losses(whole)
    for name in ("weights", "optimizer"):
        last = f"checkpoints/step-000008/{name}.safetensors"
        assert (run / last).read_bytes() == (whole / last).read_bytes()
    result = "result/text_encoder/model.safetensors"
    assert (run / result).read_bytes() == (whole / result).read_bytes()
    with pytest.raises(
        ValueError, match=r"another recipe \(steps 8 -> 6\): .*steps can become more, not fewer"
    ):
        train_recipe(str(text_recipe), ["steps=6", f"schedule={schedule}"])


def test_what_a_result_depends_on_may_not_change(tmp_path):
    begun = {("steps",): 10, ("schedule",): "cosine", ("optimizer",): "adamw", ("data", "cache"): True}

    def refuses(key, value, **more):
        before = begun | {(name,): other for name, other in more.items()}
        try:
            refuse_changes({key: "old"} | before, before | {key: value}, [key], tmp_path)
        except ValueError as error:
            return f"another recipe ({'.'.join(key)} " in str(error)
        return False

    decides = "seed batch_size learning_rate betas weight_decay clip ema warmup schedule optimizer precision"
    assert all(refuses((name,), "new") for name in (*decides.split(), "base", "init", "map", "accumulation"))
    assert all(refuses(("data", name), "new") for name in ("source", "resolution", "flip", "crop", "holdout"))
    assert not any(refuses((name,), "new") for name in ("out", "checkpoint_every", "device", "threads"))
    assert not refuses(("data", "workers"), 9)
    # More steps, where none before depends on how many there are.
    assert [refuses(("steps",), 20, **how) for how in ({}, {"schedule": "rsqrt"})] == [True, False]
    free = {"optimizer": "schedule-free"}
    assert [refuses(("steps",), steps, **free) for steps in (20, 5)] == [False, True]


def test_the_numbers_of_an_optimizer_come_back_and_no_infinity_among_them():
    net = torch.nn.Linear(2, 2)
    names = {id(p): name for name, p in net.named_parameters()}

    def optimizer(**numbers):
        return torch.optim.AdamW([{"params": [p], **numbers} for p in net.parameters()], lr=1e-3)

    before, after = (
        optimizer(k=5, weight_sum=0.25, lr_max=math.inf),
        optimizer(k=0, weight_sum=0.0, lr_max=1.0),
    )
    net(torch.ones(1, 2)).sum().backward()
    before.step()
    tensors, groups = state_of(before, names)
    assert all("lr_max" not in group for group in json.loads(json.dumps(groups, allow_nan=False)))
    restore_state(after, names, tensors, groups)
    assert [(group["k"], group["weight_sum"], group["lr_max"]) for group in after.param_groups] == [
        (5, 0.25, 1)
    ] * 2
    assert {key: value.tolist() for key, value in state_of(after, names)[0].items()} == {
        key: value.tolist() for key, value in tensors.items()
    }


def test_a_rate_that_falls_until_the_last_step_keeps_their_number(text_recipe):
    train_recipe(str(text_recipe), ["steps=2"])
    with pytest.raises(
        ValueError, match=r"\(steps 2 -> 3\): .*with schedule=cosine every step's rate"
    ) as caught:
        train_recipe(str(text_recipe), ["steps=3"])
    assert "begin another run with this one's result as its init" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def defaults(monkeypatch):
    """Call it with keys of the text encoder's recipe, and what another version might give them."""

    def changed(**new):
        for key, default in new.items():
            monkeypatch.setattr(TextRecipe.model_fields[key], "default", default)
        TextRecipe.model_rebuild(force=True)

    yield changed
    monkeypatch.undo()
    TextRecipe.model_rebuild(force=True)


def test_a_run_goes_on_as_it_was_begun_when_defaults_change(tmp_path, text_recipe, defaults):
    whole = train_recipe(str(text_recipe), [f"out={tmp_path / 'whole'}"]).folder
    run = tmp_path / "run"

    def stop_at_five(step):
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_recipe(str(text_recipe), progress=stop_at_five)
    before = tomllib.loads((run / "config.toml").read_text())
    defaults(weight_decay=0.3, clip=0.001, checkpoints_kept=5)
    assert load_recipe(str(text_recipe)).weight_decay == 0.3
    said = []
    train_recipe(str(text_recipe), progress=lambda step: said.append(step.message))
    assert "resumed at step 3" in said
    note = f"the run in {run} goes on; as it was begun: checkpoints_kept 2, clip 1.0, weight_decay 0.01"
    assert said[0] == note
    assert losses(run) == losses(whole)
    assert tomllib.loads((run / "config.toml").read_text()) == before
    for given, message in (
        (["weight_decay=0.3"], r"another recipe \(weight_decay 0.01 -> 0.3\): choose another folder"),
        (["clip=0.001", "steps=9"], r"another recipe \(clip 1.0 -> 0.001, steps 8 -> 9\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train_recipe(str(text_recipe), given)
    train_recipe(str(text_recipe), ["weight_decay=0.01", "checkpoints_kept=3", "log_every=2"])
    after = tomllib.loads((run / "config.toml").read_text())
    assert after == before | {"checkpoints_kept": 3, "log_every": 2}
    again = train_recipe(str(run / "config.toml"), [f"out={tmp_path / 'again'}", "log_every=1"]).folder
    assert losses(again) == losses(whole)


def test_what_was_given_once_need_not_be_given_again(text_recipe):
    run = train_recipe(str(text_recipe), ["warmup=2", "betas=[0.8, 0.9]"]).folder
    said = []
    train_recipe(str(text_recipe), progress=lambda step: said.append(step.message))
    recorded = tomllib.loads((run / "config.toml").read_text())
    assert recorded["betas"] == [0.8, 0.9]
    assert any("as it was begun: betas [0.8, 0.9]" in (line or "") for line in said)
    with pytest.raises(ValueError, match=r"\(betas \[0.8, 0.9\] -> \[0.9, 0.99\]\)"):
        train_recipe(str(text_recipe), ["betas=[0.9, 0.99]"])


def test_a_run_goes_on_when_a_key_was_added_or_taken_away(text_recipe):
    run = train_recipe(str(text_recipe)).folder
    config = (run / "config.toml").read_text()
    assert "weight_decay = 0.01\n" in config
    (run / "config.toml").write_text(config.replace("weight_decay = 0.01\n", ""))  # as if it were new
    with pytest.raises(ValueError, match=r"another recipe \(weight_decay 0.01 -> 0.3\)"):
        train_recipe(str(text_recipe), ["weight_decay=0.3"])
    said = []
    train_recipe(str(text_recipe), progress=lambda step: said.append(step.message))
    assert said[0] == f"the run in {run} goes on; new keys: weight_decay 0.01"
    assert (run / "config.toml").read_text() == config
    (run / "config.toml").write_text("heaviness = 3\n" + config)
    with pytest.raises(
        ValueError, match=r"damaged or of another version \(unknown key 'heaviness'\): choose"
    ):
        train_recipe(str(text_recipe))


def test_an_adapters_run_goes_on_by_its_own_tables(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    first = ["data.source=photos", "data.flip=0.5", "trackers=tensorboard", f"out={run}"]
    write_recipe(load_recipe("sd15-canny", first), run)
    moved = tmp_path / "moved"
    run.rename(moved)
    for again in (["data.source=photos"], ["data.source=photos", "data.flip=0.5", "data.workers=3"]):
        given = [*again, f"out={moved}"]
        recipe, note = as_begun(load_recipe("sd15-canny", given), given_keys("sd15-canny", given))
        workers = 3 if "data.workers=3" in again else 8
        data = {"source": "photos", "flip": 0.5, "workers": workers}
        assert data.items() <= recipe.data.model_dump().items()
        assert recipe.data.options == {"low": "50..150", "high": "150..300"}
        assert (recipe.trackers, recipe.out) == (("tensorboard",), str(moved))
        assert note.endswith("as it was begun: trackers ['tensorboard']")
    for given, change in (
        (["data.source=other"], "data.source photos -> other"),
        (["data.source=photos", "data.crop=random"], "data.crop centre -> random"),
        (["data.source=photos", "data.options.low=60"], "data.options.low 50..150 -> 60"),
    ):
        given = [*given, f"out={moved}"]
        with pytest.raises(ValueError, match=re.escape(f"another recipe ({change})")):
            as_begun(load_recipe("sd15-canny", given), given_keys("sd15-canny", given))
    given = [f"out={moved}"]
    with pytest.raises(ValueError, match=r"map canny -> depth"):
        as_begun(load_recipe("tiny-depth", given), given_keys("tiny-depth", given))


def test_a_short_run_becomes_longer_with_the_warmup_that_it_had(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    short = [f"out={folder}", "steps=20"]
    (folder / "config.toml").write_text(to_toml(load_recipe("tiny-canny", short)))
    for steps, further in ((24, []), (250, []), (250, ["warmup=4"])):
        given = [f"out={folder}", f"steps={steps}", *further]
        begun = (load_recipe("tiny-canny", given), given_keys("tiny-canny", given))
        recipe, _ = as_begun(*begun, overridden=overridden_keys(given))
        assert (recipe.steps, recipe.warmup) == (steps, 4)
    given = [f"out={folder}", "steps=250", "warmup=25"]
    begun = (load_recipe("tiny-canny", given), given_keys("tiny-canny", given))
    with pytest.raises(ValueError, match=r"another recipe \(warmup 4 -> 25\)"):
        as_begun(*begun, overridden=overridden_keys(given))


def test_losses_that_were_not_yet_logged_survive_a_stop(tmp_path, text_recipe):
    whole = train_recipe(str(text_recipe), [f"out={tmp_path / 'whole'}", "log_every=4"])
    parts = tmp_path / "parts"

    def stop_at_four(step):
        if step.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_recipe(str(text_recipe), [f"out={parts}", "log_every=4"], progress=stop_at_four)
    train_recipe(str(text_recipe), [f"out={parts}", "log_every=4"])  # goes on at step 3
    assert losses(parts) == losses(whole.folder)
    assert len(losses(parts)) == 2


def test_the_recipe_of_a_run_that_was_moved_is_of_the_place_where_it_lies(tmp_path, text_recipe):
    before = train_recipe(str(text_recipe), [f"out={tmp_path / 'before'}", "schedule=constant"]).folder
    moved = before.rename(tmp_path / "moved")
    shutil.copy(moved / "config.toml", tmp_path / "config.toml")
    lines = []
    train_recipe(
        str(moved / "config.toml"), ["steps=14"], progress=lambda step: lines.append(str(step.message))
    )
    assert lines[0].startswith(f"{moved} goes on where it lies, and not in {before}, which its config.toml")
    assert any("resumed at step" in line for line in lines), lines
    assert not before.exists()
    assert (moved / "checkpoints/step-000014").is_dir()
    assert load_recipe(str(moved / "config.toml")).out == str(moved)
    assert load_recipe(str(tmp_path / "config.toml")).out == str(before)  # a recipe, and no run's


@pytest.mark.parametrize(
    ("prepare", "out", "message"),
    [
        (lambda folder: (folder / "run").write_text(""), "run", "there is a file of that name"),
        (lambda folder: (folder / "run").write_text(""), "run/deeper", "(?i)not a directory"),
        (lambda folder: (folder / "mine" / "result").mkdir(parents=True), "mine", "not the folder of a run"),
        (lambda folder: (folder / "report.html").write_text("evaluation"), ".", "has report.html in it"),
        (lambda folder: (folder / "metrics.jsonl").write_text('{"mine": 1}'), ".", "not the folder of a run"),
        (lambda folder: (folder / "config.toml").write_text("= 3"), ".", r"config\.toml.* is damaged"),
    ],
)
def test_a_folder_that_cannot_hold_the_run_is_refused_before_any_work(
    tmp_path, text_recipe, monkeypatch, prepare, out, message
):
    monkeypatch.setattr("controlkit.training.runs.build_task", lambda *_: pytest.fail("the task was built"))
    place = tmp_path / "place"
    place.mkdir()
    prepare(place)
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        train_recipe(str(text_recipe), [f"out={place / out}"])
    assert "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before


def test_a_full_disk_stops_with_a_plain_line(text_recipe, monkeypatch):
    from controlkit.training import saving

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(ValueError, match=r"the disk is full: make room, and the same command begins anew"):
        train_recipe(str(text_recipe))


def test_a_full_disk_is_said_of_the_lock_which_does_not_stay(tmp_path, monkeypatch):
    from controlkit.training import lock

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock.os, "ftruncate", full)
    with pytest.raises(ValueError, match=r"cannot write .*\.lock: the disk is full"), lock.locked(tmp_path):
        pytest.fail("locked")
    assert not list(tmp_path.iterdir())


def test_missing_parts_are_named_before_training(tmp_path):
    recipe = tmp_path / "base.toml"
    lines = ['task = "base"', f'out = "{tmp_path / "run"}"', "steps = 1", "batch_size = 1", "scenes = 2"]
    lines += ["learning_rate = 1e-3", f'vae = "{tmp_path / "vae"}"', f'text = "{tmp_path / "text"}"']
    recipe.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"vae/config\.json is missing"):
        train_recipe(str(recipe))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_changes_no_weight(text_recipe, tmp_path, monkeypatch):
    from controlkit.training.text import TextTask

    train_recipe(str(text_recipe), ["steps=8", f"out={tmp_path / 'good'}"])
    real, seen = TextTask.loss, {}

    def overflow_at_five(self, draws):
        seen["weights"] = {k: v.clone() for k, v in self.encoder.state_dict().items()}
        seen["task"] = self
        return real(self, draws) * (math.inf if draws.step == 5 else 1.0)

    monkeypatch.setattr(TextTask, "loss", overflow_at_five)
    with pytest.raises(ValueError, match=r"stopped at step 6: .* no weight was changed"):
        train_recipe(str(text_recipe))
    after = seen["task"].encoder.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in seen["weights"].items())


def test_a_batch_that_cannot_be_halved_and_does_not_fit_ends_the_run(text_recipe, monkeypatch):
    from controlkit.training.text import TextTask

    def no_room(self, draws):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TextTask, "loss", no_room)
    with pytest.raises(ValueError, match="4 pairs at once do not fit in the memory of cpu"):
        train_recipe(str(text_recipe))


def test_cuda_without_cuda_is_said_before_anything_is_loaded(text_recipe):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="device=cpu"):
        train_recipe(str(text_recipe), ["device=cuda"])


# --- the world's text ----


def test_the_tokenizer_takes_any_text_and_words_of_the_world_whole():
    captions = [render(number, size=16, split="train").caption for number in range(250)]
    tokenizer = build_tokenizer(captions)
    assert len(tokenizer.tokenize(captions[0])) == len(captions[0].split())
    for text in ("héllo 世界 42!", "مرحبا", "🙂 ok", "zürich"):
        tokens = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in tokens[1:-1] or tokenizer.unk_token == tokenizer.eos_token
        assert tokenizer.decode(tokens, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    empty = tokenizer("", padding="max_length", max_length=77).input_ids
    assert empty == [len(tokenizer) - 2] + [len(tokenizer) - 1] * 76


def test_scenes_end_where_they_were_asked_to():
    world = load_world("train", 60)
    assert len(list(world.picture)) == len(world) == 60
    np.testing.assert_array_equal(world.picture[-1], world.picture[59])
    with pytest.raises(IndexError):
        world.picture[60]


def test_scenes_that_cannot_be_kept_are_a_plain_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match=r"cannot keep rendered scenes .*CONTROLKIT_CACHE") as caught:
        load_world("train", 1, folder=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_attributes_read_a_caption():
    caption = "an orange figure with raised arms next to a red cube and a blue ball"
    caption += " on a grey floor under a pink sky"
    names = {
        key: choices[k] for (key, choices), k in zip(ATTRIBUTES.items(), attributes(caption), strict=True)
    }
    assert names == {
        "figure": "orange",
        "action": "with raised arms",
        "colour": "red",
        "object": "cube",
        "colour2": "blue",
        "object2": "ball",
        "floor": "grey",
        "sky": "pink",
    }


# --- the autoencoder ----


def test_normalised_latents_decode_to_the_same_picture():
    from controlkit import images
    from controlkit.training.vae import _build, normalise_latents

    recipe = VaeRecipe(
        task="vae", out="x", steps=1, batch_size=1, learning_rate=1e-3, block_out_channels=(8, 8, 16, 16)
    )
    vae = _build(recipe).eval()
    pictures = [load_world("train", 60).picture[i] for i in range(40)]
    x = images.picture_to_tensor(pictures[:4])
    with torch.no_grad():
        before, logvar = vae.encode(x).latent_dist.mean, vae.encode(x).latent_dist.logvar
        decoded = vae.decode(before).sample
        normalise_latents(vae, pictures, torch.device("cpu"))
        after = vae.encode(x).latent_dist
        again = vae.decode(after.mean).sample
        latents = torch.cat([vae.encode(images.picture_to_tensor([p])).latent_dist.mean for p in pictures])
    np.testing.assert_allclose(latents.mean(dim=(0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(latents.std(dim=(0, 2, 3)), 1, atol=1e-4)
    torch.testing.assert_close(again, decoded, atol=1e-4, rtol=1e-4)
    spread, unscaled = (0.5 * after.logvar).exp(), (0.5 * logvar).exp()
    ratio = (before - before.mean(dim=(0, 2, 3), keepdim=True)).std(dim=(0, 2, 3)) / after.mean.std(
        dim=(0, 2, 3)
    )
    torch.testing.assert_close(spread * ratio[None, :, None, None], unscaled, rtol=0.02, atol=1e-6)


# --- training on from what there is ----


def started(init, **lines):
    """A recipe of one step so small that half precision does not see it."""
    return "\n".join(
        f"{key} = {json.dumps(value)}"
        for key, value in {
            "init": str(init),
            "steps": 1,
            "batch_size": 2,
            "scenes": 4,
            "learning_rate": 1e-9,
            "warmup": 0,
            "weight_decay": 0.0,
            "sample_every": 99,
            **lines,
        }.items()
    )


TINY = Path(controlkit.__file__).parent / "tiny"
STARTS = {
    "base": {"vae": str(TINY / "base" / "vae"), "text": str(TINY / "base")},
    "controlnet": {"map": "canny", "score_scenes": 0},
    "pose": {"autoencoder": "tiny"},
    "depth": {},
}


@pytest.mark.parametrize(
    ("task", "init", "weights"),
    [
        ("base", "base", "unet/diffusion_pytorch_model.safetensors"),
        ("controlnet", "controlnet-canny", "diffusion_pytorch_model.safetensors"),
        ("pose", "pose", "model.safetensors"),
        ("depth", "depth", "model.safetensors"),
    ],
)
@pytest.mark.slow
def test_a_training_goes_on_from_the_weights_of_init(tmp_path, task, init, weights):
    (tmp_path / "recipe.toml").write_text(
        started(TINY / init, task=task, out=str(tmp_path / "run"), **STARTS[task])
    )
    result = train_recipe(str(tmp_path / "recipe.toml")).result
    before, after = load_file(TINY / init / weights), load_file(result / weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_base_to_go_on_from_must_fit_the_text(tmp_path):
    from diffusers import UNet2DConditionModel

    from controlkit.training.base_model import _build

    recipe = load_recipe("bundled-base")
    assert isinstance(_build(recipe, 64, 16), UNet2DConditionModel)
    _build(recipe, 64, 16).save_pretrained(tmp_path / "other" / "unet")
    (tmp_path / "recipe.toml").write_text(
        started(tmp_path / "other", task="base", out=str(tmp_path / "run"), **STARTS["base"])
    )
    with pytest.raises(ValueError, match="text of width 64; here latents have 4 and the text 96"):
        train_recipe(str(tmp_path / "recipe.toml"))
    assert not (tmp_path / "run").exists()


def test_pictures_passed_through_the_autoencoder_are_kept_and_stay_the_same_scenes(monkeypatch):
    from controlkit import load_base
    from controlkit.training import cache

    world, vae = load_world("train", 6), load_base("tiny").vae
    clean = cache.cached_passed(world, vae, latent_noise=0.0, report=print)
    noisy = cache.cached_passed(world, vae, latent_noise=0.3, report=print)
    true = np.stack([world.picture[i] for i in range(6)]).astype(float)
    far, farther, other = (
        np.abs(a.astype(float) - b).mean()
        for a, b in ((clean, true), (noisy, true), (np.roll(clean, 1, axis=0), true))
    )
    assert 0 < far < 8 < other
    assert far < farther < other / 2
    monkeypatch.setattr(type(vae), "decode", None)  # the second time nothing is decoded
    again = cache.cached_passed(world, vae, latent_noise=0.3, report=print)
    np.testing.assert_array_equal(again, noisy)

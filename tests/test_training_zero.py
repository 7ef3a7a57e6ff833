"""DeepSpeed: its configuration against the recipe; and several processes under it, where it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from killed_runs import distance, losses, prepared, recipe, settings, start, train_together, weights, zero
from safetensors.torch import load_file

from controlkit.training import zero_config
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.config_bundled import VaeRecipe
from controlkit.training.machine import Machine
from controlkit.training.zero import Share, ZeroWeights

ROOT = Path(__file__).parents[1]
YAML = ROOT / "training" / "recipes" / "deepspeed.yaml"
installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def made(**changes):
    few = {
        "task": "controlnet",
        "map": "canny",
        "out": "x",
        "steps": 100,
        "batch_size": 3,
        "learning_rate": 1e-4,
    }
    return ControlNetRecipe(**few | {"accumulation": 2, **changes})


@pytest.fixture
def launched(monkeypatch):
    """Sets what `accelerate launch` tells."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)

    def launch(stage=2, **more):
        for name, value in zero(stage, **more).items():
            monkeypatch.setenv(name, value)

    return launch


def read(**changes):
    return zero_config.read(made(**changes), processes=2)


# --- the configuration ---


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_recipe_decides_and_the_launcher_shares(launched, stage):
    launched(stage, GRADIENT_ACCUMULATION_STEPS="1")  # as the launcher says where nobody has said anything
    config = read(clip=0.5)
    assert config["zero_optimization"]["stage"] == stage
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 12
    assert config["gradient_clipping"] == 0.5
    assert "bf16" not in config
    assert "auto" not in json.dumps(config)


def test_half_precision_keeps_sums_in_full(launched):
    launched(MIXED_PRECISION="bf16")
    config = read(precision="bf16")
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    assert config["communication_data_type"] == "fp32"


def test_offloading(launched):
    launched(3, DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu", DEEPSPEED_OFFLOAD_PARAM_DEVICE="cpu")
    sharing = read()["zero_optimization"]
    assert sharing["offload_optimizer"] == sharing["offload_param"] == {"device": "cpu"}


def test_a_file_of_deepspeeds_own(launched, tmp_path):
    file = tmp_path / "zero.json"
    auto = {"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    sharing = {"stage": 3, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": "auto"}
    file.write_text(json.dumps(auto | {"zero_optimization": sharing}))
    launched(3, DEEPSPEED_CONFIG_FILE=str(file))
    config = read(precision="bf16")
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 1000}
    assert config["bf16"]["enabled"] is True


CONTRADICTIONS = [
    (
        {"GRADIENT_ACCUMULATION_STEPS": "4"},
        {},
        "gradient_accumulation_steps 4, and the recipe's accumulation is 2",
    ),
    (
        {"GRADIENT_ACCUMULATION_STEPS": "1", "CONFIG_DS_FIELDS": "gradient_accumulation_steps,zero_stage"},
        {},
        "gradient_accumulation_steps 1, and the recipe's accumulation is 2",
    ),
    ({"GRADIENT_CLIPPING": "0.5"}, {}, "gradient_clipping 0.5, and the recipe's clip is 1.0"),
    ({"MIXED_PRECISION": "bf16"}, {}, "mixed_precision bf16, and the recipe's precision is fp32"),
    ({"stage": 0}, {}, "shares nothing"),
    ({"DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"}, {}, "offload_optimizer nvme is not supported"),
    ({"DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, {}, "offload_param needs zero_stage 3"),
    ({"stage": 1}, {"precision": "bf16"}, "zero_stage 1 does not go with precision bf16"),
    ({}, {"precision": "fp16"}, "fp16 does not go with DeepSpeed"),
    ({}, {"optimizer": "adafactor"}, "'adafactor' does not go with DeepSpeed: use adamw or lion"),
    ({}, {"compile": True}, "use compile=false"),
]


@pytest.mark.parametrize(("told", "changes", "message"), CONTRADICTIONS)
def test_what_does_not_go_together_is_one_line_that_names_both(launched, told, changes, message):
    launched(**told)
    with pytest.raises(ValueError, match=message) as refused:
        read(**changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"type": "AdamW"}}, "setting optimizer is not one that this training knows"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow is not one"),
        ({"train_batch_size": 8}, "train_batch_size 8, and the recipe's batch_size .* is 12"),
        ({"fp16": {"enabled": True}}, "sets fp16, and the recipe's precision is fp32"),
    ],
)
def test_files_of_deepspeeds_own_are_checked(launched, tmp_path, changes, message):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}} | changes))
    launched(DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(ValueError, match=message):
        read()


def test_other_trainings_are_refused(launched):
    launched()
    other = VaeRecipe(task="vae", out="x", steps=1, batch_size=1, learning_rate=1e-4)
    with pytest.raises(ValueError, match="this recipe's is vae"):
        zero_config.read(other, processes=2)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_a_missing_package_is_one_line_with_the_cure(launched):
    launched()
    with pytest.raises(ValueError, match="not installed: uv sync --extra deepspeed, or pip install"):
        Machine(made())


def test_one_version_is_named_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["optional-dependencies"]["deepspeed"] == [f"deepspeed>={zero_config.OLDEST}"]
    assert f"deepspeed=={zero_config.OLDEST}" in project["tool"]["uv"]["constraint-dependencies"]
    assert project["tool"]["uv"]["dependency-metadata"][0]["version"] == zero_config.OLDEST


def test_the_example_goes_with_the_recipe_that_it_names(launched):
    example = yaml.safe_load(YAML.read_text())
    told = example["deepspeed_config"]
    launched(
        told["zero_stage"],
        DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=told["offload_optimizer_device"],
        DEEPSPEED_OFFLOAD_PARAM_DEVICE=told["offload_param_device"],
        MIXED_PRECISION=example["mixed_precision"],
    )
    named = YAML.read_text().split("-m controlkit.training ")[1].split()[0]
    table = tomllib.loads((YAML.parent / f"{named}.toml").read_text())
    config = zero_config.read(ControlNetRecipe(**table), processes=example["num_processes"])
    assert config["zero_optimization"]["stage"] == 2


# --- several processes ---

WAYS = {
    "1": zero(1),
    "2, offloaded": zero(2, DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"),
    "3": zero(3),
}
SHORT = {"accumulation": 2, "channels_last": False, "ema": 0.9, "sd_locked": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def alone(place):
    """One process with the batch of two."""
    return by_one(place, "alone")


def by_one(place, name, *, ends=0, **changes):
    folder = place / name
    process = start(recipe(folder, place / "pictures", **settings(4, **SHORT | changes)), place / "cache")
    process.join()
    assert process.exitcode == ends
    return folder


def by_two(place, name, launched, *, ends=0, **changes):
    folder = place / name
    path = recipe(folder, place / "pictures", **settings(2, **SHORT | changes))
    assert train_together(path, place / "cache", count=2, launched=launched) == [ends, ends]
    return folder


@pytest.fixture(scope="module", params=list(WAYS))
def shared(place, request):
    """Two processes under DeepSpeed."""
    name = request.param.replace(", ", "-")
    return by_two(place, f"zero-{name}", WAYS[request.param]), WAYS[request.param]


@installed
@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(alone, shared):
    two, _ = shared
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    assert distance(weights(two), weights(alone)) < 1e-5  # a step moves weights by 1e-3 and more
    assert distance(weights(two, "optimizer"), weights(alone, "optimizer")) < 1e-5
    for network in ("controlnet", "unet"):  # of the U-Net the decoder is trained
        files = [run / network / "diffusion_pytorch_model.safetensors" for run in (two, alone)]
        assert distance(*map(load_file, files)) < 1e-4
    looks = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert any("gap" in look for look in looks), looks


def resumed(before, place, name, launched):
    """A run from its checkpoint of step 2, in a folder of its own."""
    after = place / f"{before.name}-{name}"
    shutil.copytree(before, after)
    shutil.rmtree(after / "checkpoints" / "step-000004")
    config = after / "config.toml"
    config.write_text(config.read_text().replace(str(before), str(after)))
    middle = (after / "checkpoints" / "step-000002").stat()
    assert train_together(config, place / "cache", count=2, launched=launched) == [0, 0]
    assert (after / "checkpoints" / "step-000002").stat().st_ino == middle.st_ino  # it was not made again
    return after


@installed
@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_been_stopped(place, shared):
    before, launched = shared
    after = resumed(before, place, "again", launched)
    assert distance(weights(after), weights(before)) == 0
    assert distance(weights(after, "optimizer"), weights(before, "optimizer")) == 0


@installed
@pytest.mark.slow
@pytest.mark.parametrize("shared", ["3"], indirect=True)
def test_a_run_goes_on_without_deepspeed(place, shared):
    """A checkpoint does not depend on how the weights were shared."""
    before, _ = shared
    after = resumed(before, place, "plain", {"ACCELERATE_USE_DEEPSPEED": "false"})
    assert distance(weights(after), weights(before)) < 1e-5


@installed
@pytest.mark.slow
def test_a_picture_is_made_by_all_processes(place):
    folder = by_two(place, "pictured", zero(3), steps=2, sample_every=2)
    assert (folder / "samples" / "step-000002.png").is_file()


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_a_gradient_that_is_not_finite_changes_nothing(place, stage, precision):
    unfit = {"noise_offset": 1e30, "bad_steps": 10, "precision": precision, "monitor_every": 0}
    one = by_one(place, f"unfit-one-{precision}", ends=1, **unfit)  # nothing was learned, and that is said
    two = by_two(place, f"unfit-{precision}", zero(stage), ends=1, **unfit)
    assert "changed nothing" in (two / "metrics.jsonl").read_text()
    assert distance(weights(two), weights(two, step=2)) == 0
    assert distance(weights(two), weights(one)) < 1e-7  # both are as they began: bf16 has rounded no master


@installed
@pytest.mark.slow
def test_the_example_trains_in_half_precision(place):
    """By the real launcher, and against one process."""
    one = by_one(place, "half-one", precision="bf16")
    two = place / "half-two"
    path = recipe(two, place / "pictures", **settings(2, **SHORT, precision="bf16"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(YAML)]
    told = os.environ | {"CONTROLKIT_CACHE": str(place / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*launcher, "-m", "controlkit.training", str(path)], env=told, check=True, timeout=600)
    assert losses(two) == pytest.approx(losses(one), rel=0.02)
    assert distance(weights(two), weights(one)) < 1e-3
    assert all(tensor.dtype == torch.float32 for tensor in weights(two).values())


def test_what_is_saved_of_a_share_is_the_whole_tensor(monkeypatch):
    others = torch.tensor([0.0, 0.0, 3.0, 4.0])  # what the other process has
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda whole: whole.add_(others))
    flat = torch.tensor([1.0, 2.0])
    shared = object.__new__(ZeroWeights)
    shared.shares = {"net.w": Share(flat, 0, 0, 2, torch.Size([2, 2]), torch.device("cpu"))}
    shared.masters, shared.average = {"net.w": flat}, {"net.w": flat.clone()}
    whole = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(shared.whole()["net.w"], whole)
    saved = shared.tensors()
    assert saved.keys() == {"model.net.w", "average.net.w"}
    assert all(torch.equal(tensor, whole) for tensor in saved.values())

"""Several processes that train together: the weights of one process with their batches as one."""

import json
import math
import shutil
from pathlib import Path

import pytest
from killed_runs import (
    FSDP,
    distance,
    losses,
    prepared,
    recipe,
    settings,
    start,
    train_as,
    train_together,
    weights,
)
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return prepared(folder)


@pytest.fixture(scope="module", params=[2, 1])
def alone(place, request):
    """One process with the batch of two, and its accumulation."""
    folder = place / f"one-{request.param}"
    changes = settings(4, accumulation=request.param)
    process = start(recipe(folder, place / "pictures", **changes), place / "cache")
    process.join()
    assert process.exitcode == 0
    return folder, request.param


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_give_the_weights_of_one_with_twice_the_batch(place, alone, sharded):
    one, accumulation = alone
    two = place / f"two-{accumulation}-{sharded}"
    changes = settings(2, accumulation=accumulation, channels_last=not sharded)
    path = recipe(two, place / "pictures", **changes)
    assert train_together(path, place / "cache", count=2, launched=FSDP if sharded else None) == [0, 0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert distance(weights(two), weights(one)) < 1e-5  # a step moves weights by 1e-3 and more
    assert not (two / ".lock").exists()
    network = "controlnet/diffusion_pytorch_model.safetensors"
    first, second = load_file(two / network), load_file(one / network)
    assert distance(first, second) < 1e-4


def test_masters_of_two_processes_get_all_their_micro_batches(place):
    """bf16 rounds by micro-batch: so one process has the same ones, four in a step."""
    one, two = place / "one-bf16", place / "two-bf16"
    process = start(
        recipe(one, place / "pictures", **settings(2, accumulation=4, precision="bf16")), place / "cache"
    )
    process.join()
    assert process.exitcode == 0
    path = recipe(two, place / "pictures", **settings(2, accumulation=2, precision="bf16"))
    assert train_together(path, place / "cache", count=2) == [0, 0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert distance(weights(two), weights(one)) < 1e-5


def test_shared_weights_resume(place):
    folder = place / "resumed"
    changes = settings(2, accumulation=2, channels_last=False, sd_locked=False)
    path = recipe(folder, place / "pictures", **changes)
    assert train_together(path, place / "cache", count=2, launched=FSDP) == [0, 0]
    before = weights(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    assert train_together(path, place / "cache", count=2, launched=FSDP) == [0, 0]
    assert distance(weights(folder), before) == 0


def train_with_a_bad_loss(path, cache, rank, count, port, launched):
    """One of the processes; the second one's loss is not finite in the second step."""
    from controlkit.training.adapter import ControlNetTask

    real = ControlNetTask.losses

    def losses(self, whole, part):
        found = real(self, whole, part)
        if (rank, part.step) != (1, 1):
            return found
        Path(path).with_suffix(".bad").write_text(part.describe())
        return type(found)(found.each * math.nan, found.timesteps, found.levels)

    ControlNetTask.losses = losses
    train_as(path, cache, rank, count, port, launched)


def test_the_pairs_of_the_process_whose_loss_is_not_finite_are_named(place):
    folder = place / "bad"
    path = recipe(folder, place / "pictures", **settings(2))
    assert train_together(path, place / "cache", count=2, target=train_with_a_bad_loss) == [0, 0]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (said,) = [row["event"] for row in rows if "changed nothing" in row.get("event", "")]
    assert "step 2" in said
    assert "(process 1: losses nan, nan; timesteps" in said
    assert said.endswith(f"; {path.with_suffix('.bad').read_text()})")

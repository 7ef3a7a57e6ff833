"""A run that is stopped, killed or starved goes on as if nothing had been: faults injected for real."""

import json
import random
import signal
from pathlib import Path

import pytest
from killed_runs import kill, prepared, recipe, start, wait_for

KILLS = 20


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, and a cache that all runs of this module share."""
    folder = tmp_path_factory.mktemp("never-lose")
    return prepared(folder)


@pytest.fixture(scope="module")
def whole(place):
    """The run that nobody disturbs."""
    process = start(recipe(place / "whole", place / "pictures"), place / "cache")
    process.join()
    assert process.exitcode == 0
    return place / "whole"


def rows(folder):
    """The metrics without what the clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"samples_per_s", "seconds", "peak_mb"}
    return [{k: v for k, v in row.items() if k not in timed} for row in lines if "event" not in row]


def same(folder: Path, other: Path) -> None:
    """Losses, weights, averages, optimizer, samples and result: equal to the last bit."""
    assert rows(folder) == rows(other)
    last = max((other / "checkpoints").iterdir()).name
    names = [f"checkpoints/{last}/{part}.safetensors" for part in ("weights", "optimizer")]
    names += [f"samples/{path.name}" for path in (other / "samples").iterdir()]
    names += [f"controlnet/{name}" for name in ("diffusion_pytorch_model.safetensors", "config.json")]
    assert len(names) >= 5
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def until_finished(path: Path, cache: Path, *, after: int, sampled_in: int | None = None) -> None:
    """Start the same command until it has come to its end, killing it at most `after` times."""
    process = start(path, cache, sampled_in=sampled_in)
    process.join()
    assert process.exitcode == 0, after


def test_a_run_killed_at_chance_moments_equals_the_uninterrupted_one(place):
    shorter = {"steps": 6, "sample_every": 6}  # pictures take most of the time
    short = recipe(place / "short", place / "pictures", **shorter)
    until_finished(short, place / "cache", after=0, sampled_in=3)
    killed, in_a_save = interrupted(place, "killed", kills=2, seed=1, sampled_in=3, **shorter)
    assert killed == 2
    same(place / "killed", place / "short")
    assert in_a_save >= 1


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_the_uninterrupted_one(place):
    longer = {"steps": 60, "sample_every": 20}
    until_finished(recipe(place / "long", place / "pictures", **longer), place / "cache", after=0)
    killed, in_a_save = interrupted(place, "killed-often", kills=KILLS, seed=2, **longer)
    assert killed == KILLS
    assert in_a_save >= 3
    same(place / "killed-often", place / "long")


def interrupted(
    place: Path, name: str, *, kills: int, seed: int, sampled_in: int | None = None, **changes
) -> tuple[int, int]:
    """A run killed so many times; returns how often it was, and how often in the middle of a save."""
    chance, folder = random.Random(seed), place / name
    path = recipe(folder, place / "pictures", **changes)
    killed = in_a_save = 0
    while killed < kills:
        process = start(path, place / "cache", sampled_in=sampled_in)
        if killed % 2:  # some in the middle of a save: as soon as a half-written checkpoint is there
            wait_for_half_written(folder / "checkpoints", process)
        else:
            wait_for(folder / ".lock", process)
            process.join(chance.uniform(0.0, 1.5))
        if not process.is_alive():
            break
        kill(process)
        killed += 1
        in_a_save += bool(list((folder / "checkpoints").glob(".*.tmp")))
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / f".{'0a' * 16}.tmp").write_bytes(b"")  # as a kill in the middle of a picture
    until_finished(path, place / "cache", after=killed, sampled_in=sampled_in)
    assert not list(folder.rglob(".*")), "what was half written is cleared away"
    return killed, in_a_save


def wait_for_half_written(folder: Path, process) -> None:
    import time

    while process.is_alive() and not list(folder.glob(".*.tmp/weights.safetensors")):
        time.sleep(0.0005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_ends_a_run_after_a_checkpoint(place, whole, number):
    folder = place / f"signalled-{number.name}"
    path = recipe(folder, place / "pictures", checkpoint_every=100)
    process = start(path, place / "cache")
    wait_for(folder / "metrics.jsonl", process)
    kill(process, number)
    assert process.exitcode == 0
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert not (folder / "controlnet").exists()
    assert 0 < int(checkpoint.name[-6:]) < 10
    until_finished(path, place / "cache", after=1)
    same(folder, whole)


def test_a_second_run_in_the_folder_is_refused(place):
    folder = place / "busy"
    path = recipe(folder, place / "pictures", steps=500)
    process = start(path, place / "cache")
    wait_for(folder / ".lock", process)
    from controlkit.training import train_recipe

    try:
        with pytest.raises(ValueError, match=rf"another training \(process {process.pid}\) is running in"):
            train_recipe(str(path))
    finally:
        kill(process)
    assert not process.is_alive()


def test_what_is_no_lock_in_its_place_is_told(tmp_path):
    from controlkit.training.lock import locked

    (tmp_path / ".lock").mkdir()
    with pytest.raises(ValueError, match=r"^cannot write \S+/\.lock: Is a directory$"), locked(tmp_path):
        pass

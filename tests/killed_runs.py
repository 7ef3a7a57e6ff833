"""A process that trains and can be killed: forked from a server that has the libraries loaded already."""

import json
import math
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["killed_preload"])


@cache
def start_server() -> None:
    """Start what processes are forked from, with the libraries in it.

    Python 3.11 does not tell it the path that modules are found by; its environment does. What it cannot
    import it passes over, and every process imports the libraries anew.
    """
    known = filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")])
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(known)}):
        forkserver.ensure_running()


def write_base(folder: Path) -> None:
    """A base of the real classes with random weights, of which steps take a moment."""
    from tiny_models import build

    build(folder, "sd1")


def write_pictures(folder: Path, count: int = 14) -> None:
    """Pictures of three shapes with captions: enough for three buckets."""
    from controlkit.figures import render
    from controlkit.images import write_png

    folder.mkdir()
    for number in range(count):
        scene = render(number)
        top = 0 if number % 3 else 40
        left = 0 if number % 3 != 1 else 44
        write_png(folder / f"{number:02d}.png", np.ascontiguousarray(scene.picture[top:, left:]))
        (folder / f"{number:02d}.txt").write_text(scene.caption)


def prepared(folder: Path) -> Path:
    """A folder with pictures and a base, for `recipe`."""
    write_pictures(folder / "pictures")
    write_base(folder / "base")
    return folder


def recipe(folder: Path, pictures: Path, **changes: object) -> Path:
    """A recipe with everything on that draws at random."""
    settings = {
        "task": "controlnet", "map": "canny", "base": str(pictures.parent / "base"),
        "out": str(folder), "steps": 10,
        "batch_size": 2, "accumulation": 2, "learning_rate": 1e-3, "warmup": 2, "ema": 0.9,
        "checkpoint_every": 1, "sample_every": 5, "log_every": 2, "monitor_every": 4,
        "score_scenes": 0, "caption_dropout": 0.3,
        "noise_offset": 0.05, "timesteps": "logit-normal", "device": "cpu", "threads": 1,
    }  # fmt: skip
    data = {
        "source": str(pictures), "maps": "made", "resolution": 64, "buckets": True, "bucket_step": 16,
        "crop": "random", "crops": 3, "flip": 0.5, "map_blur": 0.3, "holdout": 3, "workers": 2,
    }  # fmt: skip
    options = {"low": changes.pop("low", "50..150"), "high": changes.pop("high", "160..250")}
    settings |= {key: value for key, value in changes.items() if not key.startswith("data_")}
    data |= {key.removeprefix("data_"): value for key, value in changes.items() if key.startswith("data_")}

    def line(key: str, value: object) -> str:
        text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
        return f"{key} = {text}\n"

    path = folder.parent / f"{folder.name}.toml"
    tables = [line(key, value) for key, value in settings.items()] + ["[data]\n"]
    tables += [line(key, value) for key, value in data.items()]
    tables += ["[data.options]\n", *(line(key, value) for key, value in options.items())]
    path.write_text("".join(tables))
    return path


def sample_in(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Show pictures, and score them, of so many denoising steps instead of 20 and 12: for runs whose pictures
    are compared with each other, or with nothing.
    """
    from controlkit.training.reporting import showing

    patch.setattr(showing, "generate", partial(showing.generate, steps=steps))
    patch.setattr(showing, "_SCORED_STEPS", steps)


def train(path: str, cache: str, sampled_in: int | None = None) -> None:
    """What the process does; the group is its own, so that a signal to it reaches nobody else."""
    os.setpgrp()
    os.environ |= {"CONTROLKIT_CACHE": cache, "HF_HUB_OFFLINE": "1"}
    import torch

    from controlkit.training import train_recipe

    torch.set_num_threads(1)
    if sampled_in:
        sample_in(sampled_in, pytest.MonkeyPatch())
    train_recipe(path)


def start(path: Path, cache: Path, *, sampled_in: int | None = None) -> multiprocessing.process.BaseProcess:
    """A process that trains by a recipe. ``sampled_in``: see `sample_in`; None: as users get them."""
    start_server()
    process = CONTEXT.Process(target=train, args=(str(path), str(cache), sampled_in))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process.start()
    return process


def kill(process: multiprocessing.process.BaseProcess, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to a process, wherever it is."""
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()


def wait_for(path: Path, process: multiprocessing.process.BaseProcess, *, seconds: float = 300) -> None:
    """Wait until a file or folder is there, or the process has ended."""
    until = time.monotonic() + seconds
    while not path.exists() and process.is_alive():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.01)


def train_as(path: str, cache: str, rank: int, count: int, port: int, launched: dict[str, str]) -> None:
    """One of several processes that train together, as `accelerate launch` starts them."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= launched
    train(path, cache)


FSDP = {"ACCELERATE_USE_FSDP": "true"}


def zero(stage: int, **more: str) -> dict[str, str]:
    """What `accelerate launch` tells of DeepSpeed."""
    given = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": str(stage), **more}
    return {f"ACCELERATE_{key}": value for key, value in given.items()}


def train_together(
    path: Path,
    cache: Path,
    *,
    count: int,
    launched: dict[str, str] | None = None,
    target: Callable[..., None] = train_as,
) -> list[int | None]:
    """Train with several processes; their exit codes. ``launched``: what the launcher tells beside.

    ``target``: what each of them does, told what `train_as` is.
    """
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start_server()
    processes = [
        CONTEXT.Process(target=target, args=(str(path), str(cache), rank, count, port, launched or {}))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)  # DeepSpeed compiles something when it is first used
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()  # one that waits for another in vain
    return codes


def settings(batch_size: int, **changes: object) -> dict[str, object]:
    """Of short runs that are compared with each other."""
    one_size = {
        "data_buckets": False,
        "steps": 4,
        "checkpoint_every": 2,
        "accumulation": 1,
        "sample_every": 0,
    }
    return {"batch_size": batch_size, **one_size, **changes}


def losses(folder: Path) -> list[float]:
    """The losses that a run has logged."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "event" not in row]


def weights(folder: Path, name: str = "weights", *, step: int = 4) -> dict[str, Any]:
    """What a run's checkpoint holds, the last one or another."""
    from safetensors.torch import load_file

    return load_file(folder / "checkpoints" / f"step-{step:06d}" / f"{name}.safetensors")


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Root mean square of what two sets of weights differ by."""
    assert first.keys() == second.keys()
    squares = sum(float((first[name].float() - second[name].float()).square().sum()) for name in first)
    return math.sqrt(squares / sum(tensor.numel() for tensor in first.values()))


@contextmanager
def prepared_for_module(folder: Path) -> Iterator[Path]:
    """Within the block pictures lie in a folder, and the cache of the runs that train on them, whose samples
    take few steps: what those show is no matter.
    """
    prepared(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
        sample_in(3, patch)
        yield folder

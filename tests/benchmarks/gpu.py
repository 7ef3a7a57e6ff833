"""What only a GPU can show, in some minutes: each way of computing that is its own, beside the usual one.

`uv run python tests/benchmarks/gpu.py` says a line for each check, and ends with 1 where one of them failed;
names behind it choose some. Models are the bundled ones, on little data: nothing here is about speed (that is
`train.py` and `sample.py`). `--device cpu` tries the script itself, without what asks CUDA.
"""

import argparse
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from controlkit import sampling
from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.memory import Memory
from controlkit.memory_plan import _CUDA_CONTEXT, Estimate, Request
from controlkit.recording import CudaRecorder, fault
from controlkit.training import previews, train_recipe
from controlkit.training.adapter import ControlNetTask
from controlkit.training.config import load_recipe
from controlkit.training.loop import open_run, train_step
from controlkit.training.machine import Machine
from controlkit.training.memory import free_memory

STEPS = 8
CLOSE = 0.02  # of losses, as a share of them: kernels round differently
LEVELS = 2  # of a picture's 255
LITTLE = 3 * 10**9  # bytes of the device that `find-batch` may take


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Within the block it is an error where the host waits for the device."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def settings(device: str, folder: Path, *more: str) -> list[str]:
    """Those of a short training."""
    usual = f"steps={STEPS} scenes=16 batch_size=4 accumulation=2 warmup=2 score_scenes=0 sample_every=0"
    usual += f" monitor_every=0 log_every=1 data.holdout=2 device={device} out={folder}"
    return [*usual.split(), *more]


def losses(device: str, *more: str) -> list[float]:
    """Of a short training, in which nothing was given up."""
    with tempfile.TemporaryDirectory() as folder:
        said: list[str] = []
        run = Path(folder) / "run"
        train_recipe(
            "tiny-canny", settings(device, run, *more), progress=lambda p: said.append(p.message or "")
        )
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert device == "cpu" or not [line for line in said if "no CUDA graph" in line], said
    return [row["loss"] for row in rows if "loss" in row]


def trained(device: str, *more: str, beside: tuple[str, ...] = (), close: float = CLOSE) -> str:
    """Losses of one training beside those of another."""
    found, expected = losses(device, *more), losses(device, *beside)
    assert len(found) == len(expected) == STEPS
    off = max(abs(one - other) / other for one, other in zip(found, expected, strict=True))
    assert off <= close, f"losses differ by {off:.2g} of them: {found} and {expected}"
    return f"{STEPS} steps, losses within {off:.1g} of those of {' '.join(beside) or 'the usual way'}"


def steps_wait_for_nothing(device: str) -> str:
    """A training's steps, of which the middle ones may not wait."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("tiny-canny", settings(device, Path(folder) / "run"))
        machine = Machine(recipe)
        task = ControlNetTask(recipe, machine, lambda _: None)
        run = open_run(task, recipe, Path(folder) / "run", machine, lambda _: None)
        for _ in range(2):
            train_step(run)
        with no_waiting(device):
            for _ in range(2):
                train_step(run)
        assert run.read_losses().samples
        task.close()
    return f"data {'on the device' if task.resident else 'from the cache'}, reads late: {run.reads_late}"


def pictures(device: str, waits: bool = True, **more: object) -> list[np.ndarray]:
    """Two under control, of seeds one and two."""
    base = load_base("tiny", device=device)
    control = Control(load_adapter("canny", base=base), 255 * np.eye(128, dtype=np.uint8))

    def look(done: int, _: int, latents: torch.Tensor) -> None:
        if device == "cuda" and not waits and done in (3, STEPS - 1):
            torch.cuda.set_sync_debug_mode("error" if done == 3 else "default")

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        told = {"controls": [control], "seeds": (1, 2), "steps": STEPS, "batch_size": 1, "callback": look}
        return sampling.generate(base, "a red cube", **{**told, **more})  # type: ignore[arg-type]


def made(device: str, **more: object) -> str:
    """Pictures made in one way beside the usual ones."""
    plain = {name: value for name, value in more.items() if name == "scheduler"}
    found, expected = (np.stack(pictures(device, **way)).astype(int) for way in (more, plain))
    off = int(np.abs(found - expected).max())
    assert off <= LEVELS, f"levels differ by up to {off}"
    return f"levels differ by up to {off}"


def a_step_of_sampling_waits_for_nothing(device: str) -> str:
    """Steps in the middle of a generation."""
    try:
        pictures(device, waits=False)
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    return f"steps 4 to {STEPS - 1}"


def a_capture_that_fails(device: str) -> str:
    """It is told, and neither stream nor memory is lost by it."""
    if device != "cuda":
        return "not tried"
    recorder, x = CudaRecorder(torch.device("cuda")), torch.ones(2**22, device="cuda")
    free_memory()
    stream, held = torch.cuda.current_stream(), torch.cuda.memory_reserved()

    def reads() -> torch.Tensor:
        return x * (2 * x).sum().item()

    try:
        recorder.record(reads)
    except RuntimeError as error:
        told = fault(error)
    else:
        raise AssertionError("it did not fail")
    assert torch.cuda.current_stream() == stream
    free_memory()
    left = torch.cuda.memory_reserved() - held
    replay, result = CudaRecorder(torch.device("cuda")).record(lambda: 3 * x)
    replay()
    assert float(result.sum()) == 3 * 2**22
    return f"{told!r}; {left / 1e6:.0f} MB more are held"


def find_batch(device: str) -> str:
    """With little of the device, so that something does not fit."""
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(LITTLE / torch.cuda.mem_get_info()[1])
    else:
        previews._LARGEST_ON_CPU = 2
    try:
        lines = previews.find_batch_for("tiny-canny", settings(device, Path("unused")))
    finally:
        if device == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
    return "; ".join(lines)


def memory(device: str) -> str:
    """What a generation was reckoned to take, and what its tensors took."""
    if device != "cuda":
        return "not tried: tests/memory_trial.py is for processors"
    base, side, least = load_base("tiny", device=device), 512, Memory(1, sliced_vae=True, offload=True)
    foretold = Estimate(base, [], Request(side, side)).total(least)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    sampling.generate(base, "a cube", steps=2, width=side, height=side, memory=least)
    used = torch.cuda.max_memory_allocated()
    said = f"{used / 1e6:.0f} MB, foretold {foretold / 1e6:.0f} MB with {_CUDA_CONTEXT / 1e6:.0f} MB of CUDA"
    assert used <= foretold, said
    return said


GRAPH, COMPILED = sampling.Execution(cuda_graph=True), sampling.Execution(compiled=True)
BOTH = sampling.Execution(compiled=True, cuda_graph=True)
CHECKS: dict[str, Callable[[str], str]] = {
    "steps wait for nothing": steps_wait_for_nothing,
    "cuda_graph": lambda device: trained(device, "cuda_graph=true"),
    "cuda_graph bf16": lambda d: trained(d, "cuda_graph=true", "precision=bf16", beside=("precision=bf16",)),
    "fp16": lambda d: trained(d, *(["precision=fp16"] if d == "cuda" else []), close=5 * CLOSE),
    "attention": lambda device: trained(device, "attention=torch"),
    "resident": lambda device: trained(device, "data.resident=true", beside=("data.resident=false",)),
    "sampling waits for nothing": a_step_of_sampling_waits_for_nothing,
    "sampling cuda_graph": lambda device: made(device, execution=GRAPH),
    "sampling cuda_graph dpm++": lambda device: made(device, execution=GRAPH, scheduler="dpm++"),
    "sampling compile": lambda device: made(device, execution=COMPILED),
    "sampling compile cuda_graph": lambda device: made(device, execution=BOTH),
    "compile": lambda device: trained(device, "compile=true"),
    "compile cuda_graph": lambda device: trained(device, "compile=true", "cuda_graph=true"),
    "sampling offload": lambda device: made(device, memory=Memory(1, offload=True)),
    "a capture that fails": a_capture_that_fails,
    "find-batch": find_batch,
    "memory": memory,
}


def main() -> int:
    """How many checks failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("names", nargs="*", help="of the checks: " + ", ".join(CHECKS))
    given, failed = parser.parse_args(), 0
    for name in given.names or CHECKS:
        try:
            line = CHECKS[name](given.device)
        except Exception:  # noqa: BLE001 - the others tell, too
            failed, line = failed + 1, f"FAILED\n{traceback.format_exc()}"
        sys.stdout.write(f"{name}: {line}\n")
        sys.stdout.flush()
        free_memory()
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))

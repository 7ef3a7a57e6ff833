"""What a step costs with its data read from the cache and with its data on the device, on a CPU.

`uv run python tests/benchmarks/resident.py` takes about a minute. The bundled base on rendered scenes at 128
pixels, batch 4, one thread; CPU time of all threads, medians over paired steps in alternating order. On a CPU
the gain is that of reading and unpacking; that of not copying shows on a GPU only.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from train_models import write, write_data
from train_ours import recipe_for
from train_script import Setting

from controlkit.figures import render
from controlkit.preprocessors import get
from controlkit.training.adapter import ControlNetTask
from controlkit.training.loop import Run, open_run, train_step
from controlkit.training.machine import Machine

ROUNDS = 60


def open_both(folder: Path) -> dict[bool, Run]:
    """A run that reads its data, and one that has it."""
    write("tiny", folder)
    pictures = [render(seed, size=128, split="train").picture for seed in range(32)]
    data = write_data(pictures, [get("canny")(picture).image for picture in pictures], folder / "data")
    recipe, runs = recipe_for("tiny", folder, data, Setting(4)), {}
    for resident in (False, True):
        table = recipe.data.model_copy(update={"resident": resident, "workers": 2})
        recipe = recipe.model_copy(update={"data": table})
        machine = Machine(recipe)
        task = ControlNetTask(recipe, machine, lambda _: None)
        runs[resident] = open_run(task, recipe, folder / f"run-{resident}", machine, lambda _: None)
        task.controlnet.train()
    return runs


def compared(runs: dict[bool, Run], work: Callable[[Run], object]) -> tuple[float, float, float]:
    """Milliseconds of CPU with data read, with it there, and the median of their paired differences."""
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS):
        for resident in (False, True) if number % 2 else (True, False):
            started = time.process_time()
            work(runs[resident])
            spent[resident].append(1000 * (time.process_time() - started))
    gains = [read - there for read, there in zip(spent[False], spent[True], strict=True)]
    return statistics.median(spent[False]), statistics.median(spent[True]), statistics.median(gains)


def _inputs(run: Run) -> None:
    for part in run.task.parts(run.step):
        run.task.inputs(part)  # type: ignore[attr-defined]
    run.step += 1


def main() -> None:
    """Print both figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONTROLKIT_CACHE"] = folder + "/cache"
        runs = open_both(Path(folder))
        for name, work in (("whole step", train_step), ("its inputs alone", _inputs)):
            read, there, gain = compared(runs, work)
            print(f"{name}: {read:.2f} ms read, {there:.2f} ms on the device, {gain:.2f} ms less (paired)")
        for run in runs.values():
            run.task.close()


if __name__ == "__main__":
    main()

"""Before a training: what it will need, and the largest batch that fits."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from controlkit.folders import quiet_libraries
from controlkit.training.config import ControlNetRecipe, load_recipe
from controlkit.training.machine import Machine, device_name
from controlkit.training.optimizers import set_rates
from controlkit.training.runs import check_models, set_threads
from controlkit.training.watch import Progress

_LARGEST, _LARGEST_ON_CPU = 1024, 64  # batches beyond are not tried: a processor gains nothing by them
Report = Callable[[Progress], None]


def plan_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> list[str]:
    """What the training of a recipe will need of memory and time, in lines: see `planning.plan`.

    Nothing is loaded on a device. Raises ValueError, one line, for recipes that are none of an adapter's.
    """
    from controlkit.training.data.sources import recognise
    from controlkit.training.planning import plan

    recipe = _adapters(name_or_path, overrides)
    check_models(recipe)
    if recipe.data.source != "world":
        recognise(recipe.data)  # that it is there; nothing of it is opened
    set_threads(recipe)
    return plan(recipe, device=device_name(recipe), pictures=_views(recipe)).lines()


def find_batch_for(
    name_or_path: str, overrides: Sequence[str] = (), *, progress: Report = lambda _: None
) -> list[str]:
    """Try real steps of a recipe's training at growing batch sizes; says in lines which fit and how fast they
    are.

    The data is opened and encoded as for the training; nothing is written into the run's folder.
    """
    import torch

    from controlkit.free_memory import available_memory
    from controlkit.training.adapter import ControlNetTask
    from controlkit.training.loop import open_run
    from controlkit.training.planning import batch_need
    from controlkit.training.planning_batch import try_batches

    recipe = _adapters(name_or_path, overrides)
    check_models(recipe)
    set_threads(recipe)
    machine = Machine(recipe)

    def report(message: str) -> None:
        progress(Progress(0, recipe.steps, math.nan, 0.0, math.nan, message))

    with quiet_libraries(), tempfile.TemporaryDirectory() as folder:
        task = ControlNetTask(recipe, machine, report)
        run = open_run(task, recipe, Path(folder), machine, lambda _: None)
        size = task.first_size()
        set_rates(run.optimizer, 0.0)  # the same work, and weights that stay what they are

        def step(pairs: int) -> None:
            report(f"trying {pairs} pairs at once")
            try:
                with machine.autocast():
                    losses = task.losses(run.whole, task.part_of(pairs))
                machine.backward(losses.each.mean())
                run.weights.take_gradients()
                if machine.scaler is not None:  # infinite ones make no numbers, even at a rate of 0
                    masters = run.weights.masters.values()
                    torch._foreach_zero_([m.grad for m in masters if m.grad is not None])
                run.optimizer.step()
                losses.each.sum().item()  # the device has done it all
            finally:  # gradients of what did not fit, too: the next size would have less room
                run.weights.drop_gradients()

        on_cpu = machine.device.type == "cpu"
        need = batch_need(recipe, size=size, device=str(machine.device)) if on_cpu else None
        available = available_memory("cpu") if on_cpu else None
        try:
            limit = _LARGEST_ON_CPU if on_cpu else _LARGEST
            return try_batches(step, start=1, limit=limit, need=need, available=available).lines()
        finally:
            task.close()


def _adapters(name_or_path: str, overrides: Sequence[str]) -> ControlNetRecipe:
    recipe = load_recipe(name_or_path, overrides)
    if not isinstance(recipe, ControlNetRecipe):
        raise ValueError(
            f'{name_or_path} trains a {recipe.task}: this is there for adapters (task = "controlnet")'
        )
    return recipe


def _views(recipe: ControlNetRecipe) -> int | None:
    """How many views are encoded first, where that is known without opening the data."""
    from controlkit.training.data.views import make_views

    if not recipe.data.cache or recipe.data.source != "world":
        return None
    scenes = min(recipe.scenes, recipe.data.limit or recipe.scenes) + recipe.data.holdout
    square = (1, 1)  # as the world's pictures are, and what is seen of them: nothing is cut off
    return scenes * len(make_views(square, square, data=recipe.data, key=""))

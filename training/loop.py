"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from controlkit import files, images
from controlkit.folders import quiet_libraries
from controlkit.notices import reason
from controlkit.training import zero
from controlkit.training.config_base import Recipe
from controlkit.training.graphs import Graphs, open_graphs
from controlkit.training.interrupts import Interrupts, watched
from controlkit.training.machine import Machine
from controlkit.training.optimizers import (
    averages_itself,
    averages_of,
    learning_rate,
    make_optimizer,
    set_rates,
)
from controlkit.training.reporting.measured import forget_others, scores_of
from controlkit.training.saving import Saver, check_folder, restore, stopped_by, write_recipe
from controlkit.training.stepping import Taken, can_read_late, is_finite, update
from controlkit.training.task import Losses, Part, Task
from controlkit.training.watch import Progress, Watch, Window, read_rows
from controlkit.training.weights import Weights


@dataclass
class Run:
    """The state of a training: everything that the next step depends on, and the tools to take it."""

    task: Task
    recipe: Recipe
    folder: Path
    machine: Machine
    whole: nn.Module
    weights: Weights
    optimizer: torch.optim.Optimizer
    watch: Watch
    step: int = 0
    window: Window = field(default_factory=Window)
    unread: list[Taken] = field(default_factory=list)
    """Steps that are not in the window yet: reading their losses waits for the device."""
    reads_late: bool = False
    """Whether it is then, too, that the host learns whether these steps had a finite gradient."""
    grad_norm: float = 0.0
    bad_steps: int = 0
    """How many steps in a row changed nothing, for want of a finite gradient."""
    stopped_by: int = 0
    """The signal that asked it to stop."""
    graphs: Graphs | None = None
    pieces: int = 1
    """Into how many each micro-batch is cut, since it did not fit in one: see `cut`."""

    def cut(self, pieces: int) -> None:
        """Cut each micro-batch into so many pieces from now on."""
        self.pieces = pieces
        if self.graphs is not None:  # a compiler's own go on, and write over gradients that are not kept
            self.graphs, self.weights.keeps_gradients = None, False

    def read_losses(self) -> Window:
        """The window, with every step until now that was not passed over.

        Raises ValueError where too many of them were not finite.
        """
        taken, self.unread = self.unread, []
        for step in taken:
            if self.reads_late:
                is_finite(self, step)
            if step.counts:
                missed = [m for loss in step.losses if loss.missed is not None for m in loss.missed.tolist()]
                self.window.add(*_per_pair(step.losses), missed)
        return self.window

    @property
    def finished(self) -> bool:
        """Whether every step was taken."""
        return self.step >= self.recipe.steps


def train(
    task: Task,
    recipe: Recipe,
    folder: Path,
    *,
    machine: Machine | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    result: str = "result",
) -> Run:
    """Train until `recipe.steps`, resuming from the newest checkpoint; write the result to `folder/result`.

    A signal to stop ends it after the step at hand, with a checkpoint and without a result: `Run.finished`
    says so. Raises ValueError where too many steps in a row have no finite gradient (none of them changed a
    weight), where one pair is too much for the device's memory, where the folder cannot be written or holds a
    run of another recipe, and where a checkpoint does not fit the task.
    """
    check_folder(recipe, folder, result=result)
    try:
        run = open_run(task, recipe, folder, machine or Machine(recipe), progress)
        with _tracked(run), Saver(run) as saver:
            _train_steps(run, saver)
        if run.finished:
            _refuse_standstill(run)
            _export(run, folder / result)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise ValueError(stopped_by(folder, error)) from error
    finally:
        task.close()
    return run


def _refuse_standstill(run: Run) -> None:
    """Raise ValueError where no step of all changed anything, which is no training."""
    run.read_losses()
    if run.bad_steps >= run.step:
        raise ValueError(
            f"none of the {run.step} steps had a finite gradient, so nothing was learned and no result is"
            " written: look at noise_offset, input_perturbation, the data and the base's weights"
        )


def _export(run: Run, result: Path) -> None:
    """Write the result, and what is known of it."""
    with averaged(run), quiet_libraries():
        weights = run.weights.whole()  # every process gives its share
        if run.machine.processes.is_first:
            with files.replace_folder(result) as target:
                run.task.export(target, weights)
            forget_others(run.folder, result)  # of a shorter run: nothing may be measured now, or fail
    if run.machine.processes.is_first and not run.machine.sharded:
        _write_facts(run, result)


def _write_facts(run: Run, result: Path) -> None:
    """What is known of the finished training beside its figures, for the report: under the weights
    exported.
    """
    scenes = getattr(run.recipe, "score_scenes", 0)  # adapters alone are scored
    if scenes:
        with averaged(run):
            scores_of(run.folder, result, scenes, run.task.final_scores)
    facts = run.task.facts()
    if facts:
        files.write_json(run.folder / "facts.json", facts)


def _train_steps(run: Run, saver: Saver) -> None:
    recipe = run.recipe
    for module in run.task.modules().values():
        module.train()
    if _sample_due(run) and not _sample_path(run).is_file():
        _write_sample(run)  # the run was stopped between a checkpoint and its picture
    with watched() as interrupts:
        while not run.finished:
            train_step(run)
            saver.check()
            _report(run)
            stop = _stops(run, interrupts)
            if run.step % recipe.checkpoint_every == 0 or run.finished or stop:
                saver.save()  # first: a picture that cannot be made or written costs no steps
            if stop and not run.finished:
                run.stopped_by = interrupts.number
                run.watch.say(run.step, f"stopped at step {run.step}, as asked; the same command goes on")
                return
            if _sample_due(run):
                _write_sample(run)


def train_step(run: Run) -> None:
    """One optimizer step: forward, backward, clip, update, average."""
    set_rates(run.optimizer, learning_rate(run.recipe, run.step))
    update(run, _within_memory(run))
    run.weights.drop_gradients()
    run.step += 1
    run.weights.update_average(_decay(run.recipe, run.step))


def forward_backward(run: Run) -> list[Losses]:
    """The gradient of this step's mean loss, in the optimizer's parameters; the losses, without graphs."""
    pieces = [piece for part in run.task.parts(run.step) for piece in _cut(part, run.pieces)]
    pairs = sum(map(len, pieces))
    seen = []
    for number, piece in enumerate(pieces, start=1):
        with run.machine.quiet(run.whole, last=number == len(pieces)):
            losses = _of_piece(run, piece, len(piece) / pairs)
        run.weights.take_gradients()
        seen.append(replace(losses, each=losses.each.detach()))
    if run.machine.processes.count > 1:
        run.weights.reduce_gradients()
    return seen


def _of_piece(run: Run, piece: Part, share: float) -> Losses:
    """The losses of one piece, after a backward pass of their mean times its share of the step."""
    if run.graphs is not None:
        return run.graphs.forward_backward(piece, share)
    with run.machine.autocast():
        losses = run.task.losses(run.whole, piece)
    run.machine.backward(losses.each.mean() * share)
    return losses


def open_run(
    task: Task, recipe: Recipe, folder: Path, machine: Machine, progress: Callable[[Progress], None]
) -> Run:
    """A fresh run, or the one in `folder` (see `check_folder`) at its newest good checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, weights, optimizer = zero.start(task, machine) if machine.zero else _started(task, machine)
    batch = recipe.batch_size * getattr(recipe, "accumulation", 1) * machine.processes.count
    run = Run(
        task,
        recipe,
        folder,
        machine,
        whole,
        weights,
        optimizer,
        Watch(folder, steps=recipe.steps, batch=batch, progress=progress),
    )
    run.reads_late = can_read_late(run)
    run.graphs = open_graphs(run)
    if recipe.ema and not averages_itself(optimizer):
        weights.start_average()
    restore(run)
    if recipe.ema and averages_itself(optimizer) and not run.step:
        run.watch.say(0, "a schedule-free optimizer averages the weights by itself: ema is not used")
    if machine.processes.is_first:
        run.watch.open_log(run.step)
        write_recipe(recipe, folder)
    return run


def _started(task: Task, machine: Machine) -> tuple[nn.Module, Weights, torch.optim.Optimizer]:
    """What a task trains as the processes share it, its weights, and their optimizer."""
    whole = task.whole()
    if machine.fsdp:
        whole = machine.shared(whole)  # makes new parameters, so it comes first
    weights = Weights(task.modules(), half=None if machine.fsdp else task.half)
    if weights.has_masters and machine.processes.count > 1:
        weights.agree()
    elif not machine.fsdp:
        whole = machine.shared(whole)
    masters = {id(p): weights.masters[name] for name, p in weights.parameters.items()}
    groups = task.parameter_groups()
    tables = [{**group, "params": [masters[id(p)] for p in group["params"]]} for group in groups]
    return whole, weights, make_optimizer(machine.recipe, tables)


@contextmanager
def _tracked(run: Run) -> Iterator[None]:
    """Within the block the recipe's trackers get what metrics.jsonl gets."""
    names = getattr(run.recipe, "trackers", ())
    if not names or not run.machine.processes.is_first or run.finished:
        yield
        return
    from controlkit.training.reporting.trackers import open_trackers

    config = run.recipe.model_dump(mode="json")
    project = getattr(run.recipe, "project", "controlkit")
    run.watch.trackers = open_trackers(
        names,
        run_folder=run.folder,
        config=config,
        project=project,
        step=run.step,
        report=lambda line: run.watch.say(run.step, line),
    )
    try:
        yield
    finally:
        run.watch.trackers.finish()


def _within_memory(run: Run) -> list[Losses]:
    """This step's `forward_backward`; in smaller pieces where it does not fit, with the same result."""
    from controlkit.training.memory import free_memory, is_out_of_memory

    while True:
        try:
            return forward_backward(run)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            largest, smaller = _largest(run, run.pieces), _largest(run, 2 * run.pieces)
            if smaller == largest or run.machine.processes.count > 1 or run.machine.sharded:
                raise ValueError(_too_much(run, largest)) from error
        run.cut(2 * run.pieces)
        run.weights.drop_gradients()
        free_memory()
        message = f"{largest} pairs at once do not fit in memory: from step {run.step + 1} on"
        run.watch.say(run.step, f"{message} {smaller} at once, with the same batch", keep=True)


def _largest(run: Run, pieces: int) -> int:
    """Pairs in the largest piece of this step, were its micro-batches cut into so many."""
    return max(len(piece) for part in run.task.parts(run.step) for piece in _cut(part, pieces))


def _too_much(run: Run, pairs: int) -> str:
    at_once = "one pair does" if pairs == 1 else f"{pairs} pairs at once do"
    return (
        f"{at_once} not fit in the memory of {run.machine.device}; the checkpoints are good: try"
        " gradient_checkpointing=true, precision=bf16, a smaller batch_size with a larger accumulation,"
        " or a smaller data.resolution, in another folder (out=FOLDER)"
    )


def _cut(part: Part, pieces: int) -> Sequence[Part]:
    """A micro-batch in so many pieces, or as many as it has pairs."""
    cut: list[Part] = [part]
    while len(cut) < pieces:
        halves = [half for piece in cut for half in piece.halves()]
        if len(halves) == len(cut):
            break
        cut = halves
    return cut


def _decay(recipe: Recipe, step: int) -> float:
    """Of the moving average after a step: a young one reaches back over about a quarter of the steps so
    far.
    """
    return min(recipe.ema, 1 - 1 / (1 + 0.3 * step))


def _per_pair(losses: Sequence[Losses]) -> tuple[list[float], list[float]]:
    """Each pair's loss and noise level, in [0, 1)."""
    values = [value for loss in losses for value in loss.each.tolist()]
    places = []
    for loss in losses:
        if loss.timesteps is None:
            places += [math.nan] * len(loss.each)
        else:
            places += [t / loss.levels for t in loss.timesteps.tolist()]
    return values, places


def _stops(run: Run, interrupts: Interrupts) -> bool:
    """Whether any process was asked to stop."""
    processes = run.machine.processes
    return interrupts.wanted if processes.count == 1 else any(processes.gather([interrupts.wanted]))


def _report(run: Run) -> None:
    """A row of metrics where one is due: after so many steps, after a look, and at the end."""
    started = time.perf_counter()
    looked, is_look = _looked(run)
    scored = run.task.scores_due(run.step)
    due = is_look or scored  # and not what came of it, which processes may not share
    if scored:
        with averaged(run):
            looked |= run.task.scores()
    run.watch.pause(time.perf_counter() - started)
    if not (due or run.step % run.recipe.log_every == 0 or run.finished):
        return
    windows = run.machine.processes.gather([run.read_losses()])
    run.window = Window()
    if not run.machine.processes.is_first:
        return
    rates = {group["name"]: group["lr"] for group in run.optimizer.param_groups if "name" in group}
    row = {
        **windows[0].merge(windows[1:]).row(),
        "learning_rate": learning_rate(run.recipe, run.step - 1),
        **({"learning_rates": rates} if rates else {}),
        "grad_norm": run.grad_norm,
        **looked,
        **_memory(run),
    }
    run.watch.after_step(run.step, row)
    remark = run.task.remark(read_rows(run.folder)) if looked else None
    if remark is not None:
        run.watch.say(run.step, remark, keep=True)


def _looked(run: Run) -> tuple[dict[str, float], bool]:
    """What a look says, and whether one was due. One that fails is said, and the training goes on."""
    from controlkit.training.memory import free_memory

    try:
        looked = run.task.look(run.step)
    except (ValueError, RuntimeError) as error:
        if run.machine.sharded:  # the others wait for this process's share
            raise
        said = f"no look at whether the map is used at step {run.step}: {reason(error)}"
    else:
        return looked, bool(looked)
    free_memory()
    run.watch.say(run.step, said, keep=True)
    return {}, True


def _memory(run: Run) -> dict[str, float]:
    from controlkit.training.memory import peak_mb

    return {"peak_mb": peak_mb(run.machine.device)}


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Within the block the task's modules hold the averaged weights, in evaluation mode."""
    modules = run.task.modules().values()
    for module in modules:
        module.eval()
    try:
        with averages_of(run.optimizer, run.weights) if run.step else nullcontext(), run.weights.averaged():
            yield
    finally:
        for module in modules:
            module.train()


def _sample_due(run: Run) -> bool:
    every = run.recipe.sample_every
    return bool(every and run.step) and (run.step % every == 0 or run.finished)


def _sample_path(run: Run) -> Path:
    return run.folder / "samples" / f"step-{run.step:06d}.png"


def _write_sample(run: Run) -> None:
    """A picture of what was learned. One that cannot be made is said, and the training goes on."""
    first = run.machine.processes.is_first
    if not (first or run.machine.sharded):  # a shared network computes on all processes or on none
        return
    started = time.perf_counter()
    try:
        with averaged(run), torch.no_grad():
            picture = run.task.sample()
        if picture is not None and first:
            _sample_path(run).parent.mkdir(exist_ok=True)
            images.write_png(_sample_path(run), picture)
            if run.watch.trackers is not None:
                run.watch.trackers.log_picture("samples", picture, run.step)
    except (ValueError, RuntimeError, OSError) as error:
        run.watch.say(run.step, f"no samples at step {run.step}: {reason(error)}", keep=True)
    run.watch.pause(time.perf_counter() - started)

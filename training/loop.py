"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor, nn

from controlkit import files, images
from controlkit.devices import check_device
from controlkit.folders import quiet_libraries
from controlkit.training.checkpoints import Tensors, load_latest, save_checkpoint
from controlkit.training.config import Recipe, to_toml
from controlkit.training.draws import Draws

_LAST_RATE = 0.02  # of the learning rate, at the end of the cosine schedule


@dataclass(frozen=True)
class Progress:
    """What a training tells whoever watches it; `message` is a line worth keeping, else None."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    eta_s: float
    message: str | None = None


class Task(Protocol):
    """What is trained: the loop asks for nothing else."""

    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name; their parameters that require a gradient are optimised and saved."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: `params` and `rate`, the factor on the recipe's learning rate."""

    def loss(self, draws: Draws) -> Tensor:
        """The loss of one batch, a scalar with a graph."""

    def sample(self) -> NDArray[np.uint8] | None:
        """A picture that shows what has been learned so far, uint8 H×W×3."""

    def export(self, folder: Path) -> None:
        """Write the result, for others to load, into an empty folder."""


@dataclass
class Run:
    """The state of a training: everything that the next step depends on."""

    task: Task
    recipe: Recipe
    folder: Path
    device: torch.device
    optimizer: torch.optim.AdamW
    average: Tensors
    step: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norm: float = 0.0


def train(
    task: Task, recipe: Recipe, folder: Path, *, progress: Callable[[Progress], None], result: str = "result"
) -> Run:
    """Train until `recipe.steps`, resuming from the newest checkpoint; write the result to `folder/result`.

    Raises ValueError where a step's loss or gradient is not finite (before any weight changes), where the
    folder cannot be written or holds a run of another recipe, and where a checkpoint does not fit the task.
    """
    check_folder(recipe, folder, result=result)
    try:
        run = open_run(task, recipe, folder, progress)
        _train_steps(run, _Watch(run, progress))
        with averaged(run), quiet_libraries(), files.replace_folder(folder / result) as target:
            task.export(target)
    except (OSError, SafetensorError) as error:  # safetensors has its own error for a full disk
        raise ValueError(f"the training in {folder} stopped, its checkpoints are good: {error}") from error
    return run


def _train_steps(run: Run, watch: _Watch) -> None:
    for module in run.task.modules().values():
        module.train()
    while run.step < run.recipe.steps:
        train_step(run)
        watch.after_step()
        last = run.step == run.recipe.steps
        if run.step % run.recipe.checkpoint_every == 0 or last:
            _save(run)  # first: a picture that cannot be made or written costs no steps
        if run.step % run.recipe.sample_every == 0 or last:
            _write_sample(run)


def train_step(run: Run) -> None:
    """One optimizer step: draw, forward, backward, clip, update, average."""
    recipe = run.recipe
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(recipe, run.step) * group["rate"]
    loss = forward_backward(run)
    norm = nn.utils.clip_grad_norm_(_trained(run.optimizer), recipe.clip)
    run.losses.append(loss.item())
    run.grad_norm = float(norm)
    if not (math.isfinite(run.losses[-1]) and math.isfinite(run.grad_norm)):
        raise ValueError(
            f"training stopped before step {run.step + 1}: the loss is {run.losses[-1]:.4g}, the norm of its"
            f" gradient {run.grad_norm:.4g}; no weight was changed, checkpoints are good; try a lower"
            " learning_rate, in another folder (out=FOLDER)"
        )
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    _update_average(run)


def forward_backward(run: Run) -> Tensor:
    """The gradient of this step's loss, in the parameters' `.grad`; returns the loss."""
    draws = Draws(run.recipe.seed, run.step)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=run.recipe.precision == "bf16"):
        loss = run.task.loss(draws)
    loss.backward()
    return loss.detach()


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warmup, then constant or a half cosine."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    done = (step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    return recipe.learning_rate * (
        _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    )


def open_run(task: Task, recipe: Recipe, folder: Path, progress: Callable[[Progress], None]) -> Run:
    """A fresh run, or the one in `folder` (see `check_folder`) at its newest good checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device_name(recipe))
    groups = [
        {"params": group["params"], "rate": group["rate"], "lr": recipe.learning_rate}
        for group in task.parameter_groups()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=recipe.weight_decay, fused=True)
    run = Run(task, recipe, folder, device, optimizer, average={})
    if recipe.ema:
        run.average = {name: p.detach().clone() for name, p in _named(task)}
    checkpoint, refused = load_latest(folder / "checkpoints")
    for line in refused:
        progress(Progress(0, recipe.steps, math.nan, 0.0, math.nan, f"passed over checkpoint {line}"))
    if checkpoint is not None:
        try:
            _restore(run, *checkpoint)
        except (KeyError, RuntimeError) as error:  # a model that the recipe names by its path has changed
            raise ValueError(
                f"the checkpoint of step {run.step} in {folder} does not fit the model that the recipe now"
                " makes: choose another folder with out=FOLDER"
            ) from error
        progress(Progress(run.step, recipe.steps, math.nan, 0.0, math.nan, f"resumed at step {run.step}"))
    files.write_text(folder / "config.toml", to_toml(recipe))
    return run


def device_name(recipe: Recipe) -> str:
    """The recipe's device, "auto" resolved. Raises ValueError where it is unknown or absent."""
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(check_device(recipe.device))
    except ValueError as error:
        raise ValueError(f"{error} (device=cpu)") from error


# What may differ when a run goes on: where and how it runs, what it shows, what is done with the result.
_MAY_CHANGE = {"out", "checkpoint_every", "sample_every", "log_every", "threads", "device"}
_MAY_CHANGE |= {"decoder", "score_scenes"}


def check_folder(recipe: Recipe, folder: Path, *, result: str = "result") -> None:
    """Refuse a run folder before any work: one that cannot be written, or that holds something else.

    Raises ValueError for a file, no permission, a run of another recipe, and a folder that is no run's but
    has a folder of the result's name, which the result would replace. Leaves nothing behind.
    """
    try:
        if not folder.is_dir():
            first = folder  # the first folder that would have to be made
            while not first.parent.exists():
                first = first.parent
            files.check_writable(first, folder=True)
            return
        files.check_writable(folder / "config.toml")
        if (folder / "config.toml").is_file():
            _check_same_recipe(recipe, folder)
        elif (folder / result).exists():
            raise ValueError(
                f"{folder} has {result} in it but no config.toml, so it is not the folder of a run:"
                " choose another with out=FOLDER"
            )
    except OSError as error:
        raise ValueError(f"cannot use {folder} as the run's folder: {error.strerror or error}") from error


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    path = folder / "config.toml"
    try:
        old = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}, the recipe of the run in this folder, is damaged ({error}):"
            " choose another folder with out=FOLDER"
        ) from error
    new = tomllib.loads(to_toml(recipe))
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    changed = [key for key in changed if key not in _MAY_CHANGE]
    if changed:
        listed = ", ".join(f"{key} {old.get(key)} -> {new.get(key)}" for key in changed)
        raise ValueError(
            f"{folder} holds a run of another recipe ({listed}): choose another folder with out=FOLDER"
        )


def _named(task: Task) -> Iterable[tuple[str, nn.Parameter]]:
    """Trained parameters by `module.parameter` name."""
    for prefix, module in task.modules().items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{prefix}.{name}", parameter


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _update_average(run: Run) -> None:
    """Exponential moving average; a young average follows quickly: decay min(ema, (1 + step) / (10 +
    step)).
    """
    if not run.average:
        return
    decay = min(run.recipe.ema, (1 + run.step) / (10 + run.step))
    with torch.no_grad():
        pairs = [(run.average[name], parameter) for name, parameter in _named(run.task)]
        torch._foreach_lerp_([a for a, _ in pairs], [p for _, p in pairs], 1 - decay)


@contextmanager
def averaged(run: Run) -> Iterator[None]:
    """Within the block the task's modules hold the averaged weights, in evaluation mode."""
    modules = run.task.modules().values()
    for module in modules:
        module.eval()
    _swap_average(run)
    try:
        yield
    finally:
        _swap_average(run)
        for module in modules:
            module.train()


def _swap_average(run: Run) -> None:
    for name, parameter in _named(run.task):
        if name in run.average:
            parameter.data, run.average[name] = run.average[name], parameter.data


def _write_sample(run: Run) -> None:
    with averaged(run), torch.no_grad():
        picture = run.task.sample()
    if picture is not None:
        folder = run.folder / "samples"
        folder.mkdir(exist_ok=True)
        images.write_png(folder / f"step-{run.step:06d}.png", picture)


def _save(run: Run) -> None:
    names = {id(parameter): name for name, parameter in _named(run.task)}
    weights = {f"model.{name}": p.detach() for name, p in _named(run.task)}
    weights |= {f"average.{name}": tensor for name, tensor in run.average.items()}
    optimizer: Tensors = {}
    for parameter, state in run.optimizer.state.items():
        optimizer |= {f"{names[id(parameter)]}/{key}": torch.as_tensor(value) for key, value in state.items()}
    save_checkpoint(
        run.folder / "checkpoints",
        run.step,
        weights=weights,
        optimizer=optimizer,
        state={"task": run.recipe.task, "losses": run.losses},
    )


def _restore(run: Run, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
    run.step = int(state["step"])
    run.losses = list(state.get("losses", []))  # those since the last row of metrics.jsonl
    for name, parameter in _named(run.task):
        parameter.data.copy_(weights[f"model.{name}"])
        keys = [key for key in optimizer if key.rpartition("/")[0] == name]
        run.optimizer.state[parameter] = {
            # AdamW keeps its step count on the CPU unless it is fused on a CUDA device
            key.rpartition("/")[2]: optimizer[key].to(parameter.device)
            for key in keys
        }
    run.average = (
        {name: weights[f"average.{name}"].to(p.device) for name, p in _named(run.task)} if run.average else {}
    )


class _Watch:
    """Turns steps into progress reports and lines of metrics.jsonl."""

    def __init__(self, run: Run, progress: Callable[[Progress], None]) -> None:
        self.run, self.progress = run, progress
        self.started, self.first = time.perf_counter(), run.step
        self.log = run.folder / "metrics.jsonl"
        _truncate_after(self.log, run.step)

    def after_step(self) -> None:
        run, recipe = self.run, self.run.recipe
        if run.step % recipe.log_every and run.step != recipe.steps:
            return
        seconds = time.perf_counter() - self.started
        loss, run.losses = sum(run.losses) / len(run.losses), []
        per_s = (run.step - self.first) / seconds
        row = {
            "step": run.step,
            "loss": loss,
            "learning_rate": learning_rate(recipe, run.step - 1),
            "grad_norm": run.grad_norm,
            "samples_per_s": per_s * recipe.batch_size,
            "seconds": seconds,
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        eta = (recipe.steps - run.step) / per_s
        self.progress(Progress(run.step, recipe.steps, loss, per_s * recipe.batch_size, eta))


def _truncate_after(log: Path, step: int) -> None:
    """Drop rows of steps that a resumed run will repeat, and a row that was cut short."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    files.write_text(log, "".join(kept))

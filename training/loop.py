"""The training loop, in three levels: `train`, `train_step`, `forward_backward`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import files, images
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

    Raises ValueError where a step's loss or gradient is not finite (before any weight changes), or where
    the folder holds a run of another recipe.
    """
    run = open_run(task, recipe, folder, progress)
    watch = _Watch(run, progress)
    for module in task.modules().values():
        module.train()
    while run.step < recipe.steps:
        train_step(run)
        watch.after_step()
        if run.step % recipe.sample_every == 0 or run.step == recipe.steps:
            _write_sample(run)
        if run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps:
            _save(run)
    with averaged(run), quiet_libraries(), files.replace_folder(folder / result) as target:
        task.export(target)
    return run


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
            f" gradient {run.grad_norm:.4g}; no weight was changed, the last checkpoint is good; try a lower"
            " learning_rate"
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
    """A fresh run, or the one in `folder` at its newest good checkpoint."""
    files.check_writable(folder / "config.toml") if folder.is_dir() else folder.mkdir(parents=True)
    _check_same_recipe(recipe, folder)
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
        _restore(run, *checkpoint)
        progress(Progress(run.step, recipe.steps, math.nan, 0.0, math.nan, f"resumed at step {run.step}"))
    files.write_text(folder / "config.toml", to_toml(recipe))
    return run


def device_name(recipe: Recipe) -> str:
    """The recipe's device, "auto" resolved. Raises ValueError where it is asked for and absent."""
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if recipe.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"device {recipe.device!r} was asked for, but torch finds no CUDA device; use device=cpu"
        )
    return recipe.device


_MAY_CHANGE = {"out", "checkpoint_every", "sample_every", "log_every", "threads", "device", "decoder"}


def _check_same_recipe(recipe: Recipe, folder: Path) -> None:
    path = folder / "config.toml"
    if not path.is_file():
        return
    import tomllib

    old = tomllib.loads(path.read_text(encoding="utf-8"))
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


class averaged:
    """Within the block the task's modules hold the averaged weights, in evaluation mode."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> None:
        for module in self.run.task.modules().values():
            module.eval()
        self._swap()

    def __exit__(self, *_: object) -> None:
        self._swap()
        for module in self.run.task.modules().values():
            module.train()

    def _swap(self) -> None:
        for name, parameter in _named(self.run.task):
            if name in self.run.average:
                parameter.data, self.run.average[name] = self.run.average[name], parameter.data


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
        state={"task": run.recipe.task},
    )


def _restore(run: Run, weights: Tensors, optimizer: Tensors, state: dict[str, Any]) -> None:
    run.step = int(state["step"])
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
    """Drop rows of steps that a resumed run will repeat."""
    if not log.is_file():
        return
    rows = [line for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    kept = [line for line in rows if json.loads(line)["step"] <= step]
    files.write_text(log, "".join(line + "\n" for line in kept))

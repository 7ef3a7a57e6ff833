"""A run's state on disk: the folder it may use, its recipe, its checkpoints, and going on from them."""

from __future__ import annotations

import math
import os
import tomllib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import files
from controlkit.training.checkpoints import clear, latest_state, listed, load_latest, save_checkpoint
from controlkit.training.config import parse_recipe, to_toml
from controlkit.training.config_base import Recipe
from controlkit.training.watch import Window

if TYPE_CHECKING:
    from controlkit.training.loop import Run

MAY_CHANGE = {"out", "checkpoint_every", "checkpoints_kept", "sample_every", "threads", "device", "decoder"}
MAY_CHANGE |= {
    "log_every",
    "monitor_every",
    "score_scenes",
    "score_every",
    "trackers",
    "project",
    "export_dtype",
    "push_to_hub",
    "bad_steps",
}
MAY_CHANGE |= {
    "data.workers",
    "data.cache",
    "data.check",  # where it leaves pairs out (data.bad=skip) it cannot be off
    "data.resident",
    "gradient_checkpointing",
    "compile",
}
"""What may differ when a run goes on: where and how it runs, what it shows, what is done with the result. Two
keys more may at times, and belong to what a result is said to be of: see `refuse_changes`."""
_LEFT = ("checkpoints", "samples", "metrics.jsonl", "facts.json", "scores.json", "report.html")
"""What a run writes beside its result, once its config.toml is there."""
_ENDLESS = {"constant", "rsqrt"}  # schedules that do not ask how many steps there will be

Keys = dict[tuple[str, ...], Any]
"""A recipe's values by key, with the names of the tables it is in."""


class Saver:
    """Writes checkpoints beside the training: the state is copied, and a thread puts the copy on disk."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._thread = ThreadPoolExecutor(1)
        self._saving: Future[Path] | None = None

    def save(self) -> None:
        """Begin to save the present state, once the state before it is on disk."""
        self.wait()
        run = self.run
        windows = run.machine.processes.gather([asdict(run.read_losses())])
        if not (run.machine.processes.is_first or run.machine.sharded):
            return
        weights, (tensors, groups) = run.weights.tensors(), run.weights.state_of(run.optimizer)
        if not run.machine.processes.is_first:
            return
        state: dict[str, Any] = {
            "task": run.recipe.task,
            "windows": windows,
            "bad_steps": run.bad_steps,
            "pieces": run.pieces,
            "optimizer": groups,
            "pairs_per_step": run.watch.batch,
            "task_state": run.task.state(run.step),
        }
        if run.machine.scaler is not None:
            state["scaler"] = run.machine.scaler.state_dict()
        self._saving = self._thread.submit(
            save_checkpoint,
            run.folder / "checkpoints",
            run.step,
            weights={name: tensor.to("cpu", copy=True) for name, tensor in weights.items()},
            optimizer={name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()},
            state=state,
            keep=run.recipe.checkpoints_kept,
        )

    def check(self) -> None:
        """Raise what went wrong in writing, as soon as it is known."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until what was begun is on disk. Raises what went wrong there."""
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)


def stopped_by(folder: Path, error: Exception) -> str:
    """What to say of a run that the disk stopped: from where it can go on, and what is in the way."""
    steps = [step for step, _ in listed(folder / "checkpoints")]
    full = "No space left" in str(error) or "os error 28" in str(error)
    reason = "the disk is full: make room, and" if full else f"{error}; once that is mended,"
    after = f"goes on from step {max(steps)}" if steps else "begins anew, for there is no checkpoint yet"
    return f"the training in {folder} stopped: {reason} the same command {after}"


def restore(run: Run) -> None:
    """Put a run where its newest good checkpoint is, if there is one.

    Raises ValueError where that one does not fit what the recipe makes now.
    """
    if run.machine.processes.is_first:
        for place in (run.folder, run.folder / "checkpoints", run.folder / "samples"):
            clear(place)
    checkpoint, refused = load_latest(run.folder / "checkpoints")
    for line in refused:
        run.watch.say(0, f"passed over checkpoint {line}")
    if checkpoint is None:
        return
    weights, optimizer, state = checkpoint
    step = int(state["step"])
    try:
        run.weights.restore(weights)
        run.weights.restore_state(run.optimizer, optimizer, state["optimizer"])
        windows = state["windows"]
        index = run.machine.processes.index
        run.window = Window(**windows[index]) if index < len(windows) else Window()
        if not math.isfinite(run.window.loss):  # older checkpoints count steps that were passed over
            run.window = Window()
        if run.machine.scaler is not None and "scaler" in state:
            run.machine.scaler.load_state_dict(state["scaler"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise ValueError(  # a model that the recipe names by its path has changed
            f"the checkpoint of step {step} in {run.folder} does not fit the model that the recipe now makes:"
            " choose another folder with out=FOLDER"
        ) from error
    run.task.restore(state.get("task_state", {}))
    run.step, run.bad_steps = step, int(state["bad_steps"])
    pieces = int(state.get("pieces", 1))  # older checkpoints do not know
    if pieces > 1 and run.machine.processes.count == 1 and not run.machine.sharded:
        run.cut(pieces)
    run.watch.say(step, f"resumed at step {step}")
    _say_longer(run, step)
    before = state.get("pairs_per_step", run.watch.batch)
    if before != run.watch.batch:
        run.watch.say(
            step, f"a step had {before} pairs and has {run.watch.batch} now: from here on it is another run"
        )


def _say_longer(run: Run, step: int) -> None:
    """Say that a run goes on for more steps than it was begun with."""
    if run.machine.processes.is_first and (run.folder / "config.toml").is_file():
        before = recorded(run.folder)[0].get(("steps",))
        if before != run.recipe.steps:
            run.watch.say(step, f"it goes on to step {run.recipe.steps}, not to {before} as it was begun")


def write_recipe(recipe: Recipe, folder: Path) -> None:
    """Keep the complete recipe in the run's folder."""
    files.write_text(folder / "config.toml", to_toml(recipe))


def check_folder(recipe: Recipe, folder: Path, *, result: str = "result") -> None:
    """Refuse a run folder before any work: one that cannot be written, or that holds something else.

    Raises ValueError for a file, no permission, a run of another recipe, and a folder that is no run's but
    has something of a name that the run writes to, such as the report of an evaluation. Leaves nothing
    behind.
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
            (begun, _), now = recorded(folder), flat_recipe(recipe)
            refuse_changes(begun, now, begun.keys() | now.keys(), folder)
        elif taken := [name for name in _written(recipe, result) if os.path.lexists(folder / name)]:
            raise ValueError(
                f"{folder} has {taken[0]} in it but no config.toml, so it is not the folder of a run:"
                " choose another with out=FOLDER"
            )
    except OSError as error:
        raise ValueError(f"cannot use {folder} as the run's folder: {error.strerror or error}") from error


def _written(recipe: Recipe, result: str) -> list[str]:
    """What a run writes beside its config.toml."""
    return [result, *([] if getattr(recipe, "sd_locked", True) else ["unet"]), *_LEFT]


def recorded(folder: Path) -> tuple[Keys, Keys]:
    """The recipe of the run in a folder, and what of it stands in its config.toml.

    That is all but keys that are newer than the run, which have their defaults.

    Raises ValueError, one line, where the file is damaged, or has a key that there is no more.
    """
    path = folder / "config.toml"
    try:
        written = tomllib.loads(path.read_text(encoding="utf-8"))
        return flat_recipe(parse_recipe(written, where="here")), flat(written)
    except ValueError as error:
        raise ValueError(
            f"{path}, the recipe of the run in this folder, is damaged or of another version"
            f" ({str(error).removeprefix('here: ')}): choose another folder with out=FOLDER"
        ) from error


def refuse_changes(begun: Keys, now: Keys, compared: Iterable[tuple[str, ...]], folder: Path) -> None:
    """Raise ValueError, naming them, where any of the compared keys differs and may not (`MAY_CHANGE`).

    Steps may become more where no step before depends on how many there are. Data may lie elsewhere where
    the newest checkpoint knows its content: a run that goes on compares that (`StoredFeed.restore`).
    """
    changed = sorted(key for key in compared if begun.get(key) != now.get(key))
    named = {".".join(key): f"{begun.get(key)} -> {now.get(key)}" for key in changed}
    refused = {
        name: change
        for name, change in named.items()
        if name not in MAY_CHANGE and not _may_now(name, begun, now, folder)
    }
    if refused:
        listed = ", ".join(f"{name} {change}" for name, change in refused.items())
        raise ValueError(
            f"{folder} holds a run of another recipe ({listed}): choose another folder with out=FOLDER, or go"
            f" on with that one by its own: controlkit train {folder / 'config.toml'}"
            + (_about_steps(begun) if "steps" in refused else "")
        )


def _may_now(name: str, begun: Keys, now: Keys, folder: Path) -> bool:
    """Whether a key may differ that usually may not."""
    if name == "steps":
        return bool(now.get(("steps",), 0) > begun.get(("steps",), 0)) and _is_endless(begun)
    if name == "data.source" and now.get(("data", "cache")):
        known = latest_state(folder / "checkpoints").get("task_state") or {}
        return bool(known.get("data_sha256"))
    return False


def _is_endless(recipe: Keys) -> bool:
    return recipe.get(("schedule",)) in _ENDLESS or recipe.get(("optimizer",)) == "schedule-free"


def _about_steps(begun: Keys) -> str:
    """Why a run cannot be given other steps, and what can be done."""
    if _is_endless(begun):
        return " (steps can become more, not fewer)"
    return (
        f" (with schedule={begun.get(('schedule',))} every step's rate depends on steps: to train longer,"
        " begin another run with this one's result as its init)"
    )


def flat_recipe(recipe: Recipe) -> Keys:
    """A recipe's keys, as its config.toml has them; those that are None are left out."""
    return flat(tomllib.loads(to_toml(recipe)))


def flat(table: Mapping[str, Any], above: tuple[str, ...] = ()) -> Keys:
    """A table's keys, those of tables in it with the tables' names in front."""
    found: Keys = {}
    for key, value in table.items():
        found |= flat(value, (*above, key)) if isinstance(value, dict) else {(*above, key): value}
    return found

"""The trainings in a folder: begun, watched, stopped, gone on with; their state is read from the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from controlkit.training.lock import holder
from controlkit.training.reporting.run_record import RunRecord, read_run

if TYPE_CHECKING:
    pass

LOG = "train.log"  # in the run's folder: what the training says
WARMUP_SHARE = 5  # a short training warms up over a fifth of its steps at most
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_children: list[subprocess.Popen[bytes]] = []  # those begun here, so that none is left a zombie


@dataclass(frozen=True)
class Run:
    """A training as its folder has it. state: starting, running, stopped, failed or finished."""

    record: RunRecord
    state: str
    pid: int | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.record.folder.name

    @property
    def steps(self) -> int:
        """How many there shall be; 0 where the folder does not say."""
        steps = self.record.config.get("steps", 0)
        return steps if isinstance(steps, int) else 0

    @property
    def line(self) -> str:
        """The run in one line."""
        if self.state in ("running", "stopped") and self.steps:
            return f"{self.name}: {self.state}, step {self.record.step} of {self.steps}"
        return f"{self.name}: {self.state}"


def found(runs: Path) -> list[Run]:
    """The runs in a folder, the one that was written to last first."""
    _reap()
    folders = [path for path in runs.iterdir() if is_run(path)] if runs.is_dir() else []
    return [look(folder) for folder in sorted(folders, key=_written, reverse=True)]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training."""
    return (folder / "config.toml").is_file() or (folder / LOG).is_file()


def look(folder: Path) -> Run:
    """The state of one run."""
    record = read_run(folder)
    pid = holder(folder)
    if pid is not None:
        return Run(record, "running", pid)
    child = next((child for child in _children if child.args[-1] == _out(folder)), None)  # type: ignore[index]
    if child is not None:
        return Run(record, "starting", child.pid)
    if record.result is not None:
        return Run(record, "finished")
    return Run(record, "stopped" if (folder / "checkpoints").is_dir() else "failed")


def _written(folder: Path) -> float:
    files = [folder / name for name in (LOG, "metrics.jsonl", "config.toml")]
    return max(path.stat().st_mtime for path in files if path.is_file())


def recipes(base: str) -> dict[str, str]:
    """The bundled recipes of adapters for a base: their names, and what each says of itself."""
    from controlkit.training.config import ControlNetRecipe, find_recipe, load_recipe, recipe_names

    names = [name for name in recipe_names() if not name.startswith("bundled-")]
    loaded = {name: load_recipe(name) for name in names}
    found = {name: one for name, one in loaded.items() if isinstance(one, ControlNetRecipe)}
    fitting = [name for name, one in found.items() if one.base == base] or [*found]
    return {
        name: find_recipe(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name in fitting
    }


def begin(runs: Path, *, name: str, recipe: str, base: str, steps: int, source: str = "") -> Path:
    """Begin a training in a process of its own, which outlives this one; returns its folder.

    source: a folder of pictures on this machine; "" is the bundled world. Raises ValueError for a name or a
    folder that cannot be taken, or for what the recipe makes impossible.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"a run's name has letters, digits, - and _ alone, and begins with no sign: not {name!r}"
        )
    folder = runs / name
    if folder.exists():
        raise ValueError(f"there is a run {name} already: choose another name, or go on with that one")
    settings = [f"base={base}", f"steps={steps}"]
    if source:
        place = Path(os.path.abspath(os.path.expanduser(source.strip())))
        if not place.is_dir():
            raise ValueError(f"{place} is not a folder on the machine that serves this page")
        settings.append(f"data.source={place}")
    warmup = _checked(recipe, settings, steps)
    _begun(folder, [recipe, *settings, f"warmup={warmup}"])
    return folder


def _checked(recipe: str, settings: Sequence[str], steps: int) -> int:
    """The warmup that fits the steps. Raises ValueError for settings that the recipe does not take."""
    from controlkit.training.config import given_keys, load_recipe

    usual = int(given_keys(recipe).get("warmup", 0))
    warmup = min(usual, max(steps // WARMUP_SHARE, 0))
    load_recipe(recipe, [*settings, f"warmup={warmup}"])
    return warmup


def go_on(folder: Path) -> None:
    """Go on with a run that was stopped, by its own recipe. Raises ValueError where it cannot."""
    run = look(folder)
    if run.state not in ("stopped", "failed") or not (folder / "config.toml").is_file():
        raise ValueError(f"the run {run.name} is {run.state}: there is nothing to go on with")
    _begun(folder, [str(folder / "config.toml")])


def stop(folder: Path) -> None:
    """Ask a run to save where it is and to end. Raises ValueError where it does not run."""
    run = look(folder)
    if run.pid is None:
        raise ValueError(f"the run {run.name} is {run.state}: there is nothing to stop")
    os.kill(run.pid, signal.SIGTERM)


def log_lines(folder: Path, most: int = 40) -> list[str]:
    """The last lines that a run said."""
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-most:]


def _begun(folder: Path, words: Sequence[str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / LOG).open("ab")
    except OSError as error:
        raise ValueError(f"cannot use the folder {folder}: {error.strerror}") from error
    command = [sys.executable, "-m", "controlkit", "train", *words, _out(folder)]
    apart = (
        {"start_new_session": True} if os.name != "nt" else {}
    )  # Ctrl-C at the page is not for the training
    with log:
        _children.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **apart)  # type: ignore[call-overload]
        )


def _out(folder: Path) -> str:
    return f"out={folder}"


def _reap() -> None:
    """Forget those that have ended."""
    _children[:] = [child for child in _children if child.poll() is None]

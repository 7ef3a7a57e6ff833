"""The trainings in a folder: begun, watched, stopped, gone on with; their state is read from the disk."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from controlkit.files import is_half_written
from controlkit.studio.server import KEPT
from controlkit.studio.wording import about_settings
from controlkit.training import lock
from controlkit.training.reporting.run_record import RunRecord, read_run

if TYPE_CHECKING:
    from controlkit.training.config_adapter import DataRecipe

LOG = "train.log"  # in the run's folder: what the training says
ERROR = "error: "  # how the command line begins its last line where it fails
ALIVE = ("starting", "running")
LONGEST = 64  # of names
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9_-]{{0,{LONGEST - 1}}}")
_children: list[subprocess.Popen[bytes]] = []  # those begun here, so that none is left a zombie
_beginning = threading.Lock()  # two who begin at once must see each other's training
_listing = threading.Lock()  # of `_children`


@dataclass(frozen=True)
class Run:
    """A training as its folder has it.

    state: starting, running, stopped, failed (it ended by an error before anything was saved) or finished.
    saved: there is a checkpoint to go on from. error: what it said at its end, if that was an error.
    """

    record: RunRecord
    state: str
    pid: int | None = None
    saved: bool = False
    error: str = ""

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
    def kinds(self) -> list[str]:
        """The kinds of maps that its adapter follows."""
        config = self.record.config
        data = config.get("data")
        columns = data.get("map_column") if isinstance(data, dict) else None
        if config.get("adapter") == "controlnet-union" and isinstance(columns, list):
            return [str(column) for column in columns]
        return [str(config.get("map"))]

    @property
    def can_go_on(self) -> bool:
        """Whether it ended before its end, and has a recipe to go on by."""
        return self.state in ("stopped", "failed") and (self.record.folder / "config.toml").is_file()

    @property
    def line(self) -> str:
        """The run in one line."""
        if self.state in ("running", "stopped") and self.steps:
            return f"{self.name}: {self.state}, step {self.record.step} of {self.steps}"
        return f"{self.name}: {self.state}"


def found(runs: Path) -> list[Run]:
    """The runs in a folder, the one that was written to last first."""
    try:
        folders = [path for path in runs.iterdir() if is_run(path)]
    except OSError:  # there is none yet
        return []
    seen = []
    for folder in sorted(folders, key=_written, reverse=True):
        with suppress(OSError, ValueError):  # one that is being deleted
            seen.append(look(folder))
    return seen


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training."""
    # os.path answers for folders that may not be read, too, where pathlib raises
    return any(os.path.isfile(folder / name) for name in ("config.toml", LOG))


def look(folder: Path) -> Run:
    """The state of one run."""
    _reap()
    record = read_run(folder)
    pid = lock.holder(folder)
    if pid is not None:
        return Run(record, "running", pid)
    with _listing:
        child = next((child for child in _children if child.args[-1] == _out(folder)), None)  # type: ignore[index]
    if record.result is None:  # else it is about to end
        if child is not None:
            return Run(record, "starting", child.pid)
        if _is_held(folder / LOG):  # by a training that another page began, which has died since
            return Run(record, "starting")
    if record.result is not None:
        return Run(record, "finished")
    error, saved = _error(folder), (folder / "checkpoints").is_dir()
    return Run(record, "failed" if error and not saved else "stopped", saved=saved, error=error)


def _error(folder: Path) -> str:
    """The error that a run ended by; "" where it was stopped, which leaves none."""
    last = log_lines(folder, most=1)
    return last[0].removeprefix(ERROR) if last and last[0].startswith(ERROR) else ""


def _written(folder: Path) -> float:
    """When a run was written to last; long ago where it is being deleted."""
    times = [0.0]
    for name in (LOG, "metrics.jsonl", "config.toml"):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times)


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


def begin(
    runs: Path, *, name: str, recipe: str, base: str, steps: int, source: str = "",
    within: Sequence[Path] | None = None,
) -> Path:  # fmt: skip
    """Begin a training in a process of its own, which outlives this one; returns its folder.

    source: a folder of pictures on this machine; "" is the bundled world. within: the folders in which it has
    to lie; None is anywhere. Raises ValueError for a name or a folder that cannot be taken, for what the
    recipe makes impossible, and while another training runs.
    """
    from controlkit.training.config import ControlNetRecipe, load_recipe

    if not _NAME.fullmatch(name):
        raise ValueError(
            f"Name: 1 to {LONGEST} letters, digits, - and _, the first no sign: not {name[: LONGEST + 1]!r}"
        )
    if name.lower() == KEPT:
        raise ValueError(f"the folder {KEPT} is for the pictures of the page: choose another name")
    settings = [f"base={base}", f"steps={steps}"]
    if source:
        settings.append(f"data.source={_anywhere(source) if within is None else _within(source, within)}")
    loaded = load_recipe(recipe, settings)
    if source and isinstance(loaded, ControlNetRecipe):
        _check_pictures(loaded.data, loaded.map)
    with _beginning:
        folder = runs / name
        if folder.exists() and not _never_began(folder):
            raise ValueError(f"there is a run {name} already: choose another name, or go on with that one")
        _check_free(runs)
        _begun(folder, [recipe, *settings])
    return folder


def _check_pictures(data: DataRecipe, kind: str) -> None:
    """Raise ValueError for what is plain from the names in a folder; other data sets take longer to open."""
    from controlkit.training.data.sources import open_examples, recognise

    try:
        if recognise(data)[0] == "paired":
            open_examples(data, kind=kind)
    except ValueError as error:
        raise ValueError(". ".join(filter(None, (str(error), about_settings(str(error)))))) from error


def _anywhere(source: str) -> str:
    """The folder that was typed in, whole. Raises ValueError where there is none."""
    place = os.path.abspath(os.path.expanduser(source.strip()))
    if not os.path.isdir(place):
        raise ValueError(f"{place} is not a folder on the machine that serves this page")
    return place


def _within(source: str, folders: Sequence[Path]) -> str:
    """The folder that was typed in, whole or as it is called within one of `folders`, without links.

    Raises one ValueError for all others: it must not tell what there is on the machine.
    """
    for folder in folders:
        try:
            place = os.path.realpath(folder / source.strip())
        except ValueError:  # a name that no file can have
            continue
        if any(Path(place).is_relative_to(one) for one in folders) and os.path.isdir(place):
            return place
    allowed = f"a folder within {called(folders)}" if folders else "the bundled world"
    raise ValueError(f"the trainings of this page cannot use that folder: choose {allowed}")


def called(folders: Sequence[Path]) -> str:
    """The folders that may be trained on, by the names that they have, without the places where they lie."""
    return " or ".join(folder.name or str(folder) for folder in folders)


def _never_began(folder: Path) -> bool:
    """Whether a folder holds nothing but what a training said that could not begin: its name is free.

    One that was killed leaves its lock, too, and what was half written.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in names - {LOG, lock.NAME} if not is_half_written(name)}
    return LOG in names and not others and look(folder).state not in ALIVE


def _check_free(runs: Path) -> None:
    """Raise ValueError while a training runs: two would share one device, and its memory."""
    busy = next((run for run in found(runs) if run.state in ALIVE), None)
    if busy is not None:
        raise ValueError(f"the training {busy.name} is {busy.state}: wait until it has ended, or stop it")


def go_on(folder: Path) -> None:
    """Go on with a run that was stopped, by its own recipe. Raises ValueError where it cannot."""
    with _beginning:
        run = look(folder)
        if not run.can_go_on:
            raise ValueError(f"the run {run.name} is {run.state}: there is nothing to go on with")
        _check_free(folder.parent)
        _begun(folder, [str(folder / "config.toml")])


def stop(folder: Path) -> None:
    """Ask a run to save where it is and to end. Raises ValueError where it does not run."""
    run = look(folder)
    if run.pid is None:
        done = "wait until it runs" if run.state in ALIVE else "there is nothing to stop"
        raise ValueError(f"the run {run.name} is {run.state}: {done}")
    try:
        os.kill(run.pid, signal.SIGTERM)
    except ProcessLookupError:
        return  # it has just ended
    except OSError as error:
        raise ValueError(f"cannot stop the run {run.name}: {error.strerror}") from error


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
    with log, _listing:
        _hold(log)
        _children.append(
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **apart)  # type: ignore[call-overload]
        )


def _hold(log: BinaryIO) -> None:
    """Lock a log; whoever has it as its output has the lock, too, as long as it lives: also without the page
    that began it. There is none on Windows, and on a disk without locks.
    """
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX)  # waits only for those who are looking


def _is_held(log: Path) -> bool:
    """Whether a training that was begun by a page has its log."""
    try:
        import fcntl

        with log.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _out(folder: Path) -> str:
    return f"out={folder}"


def _reap() -> None:
    """Forget those that have ended."""
    with _listing:
        _children[:] = [child for child in _children if child.poll() is None]

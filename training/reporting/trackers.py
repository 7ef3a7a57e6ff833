"""TensorBoard, Weights & Biases and others, through accelerate's tracker classes.

metrics.jsonl is the record; trackers are windows on it. So a tracker that is misspelt or not installed stops
the run before anything is loaded, and one that fails later is told once and never stops anything.
"""

from __future__ import annotations

import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit import files
from controlkit.naming import unknown

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aim": ("aim",),
    "clearml": ("clearml",),
    "comet_ml": ("comet_ml",),
    "dvclive": ("dvclive",),
    "mlflow": ("mlflow",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Trackers by accelerate's names, and the packages of which one must be installed."""

_PATIENCE = 5  # failures in a row after which a tracker is left alone: each may have waited for a network
Report = Callable[[str], None]
Setting = str | int | float | bool


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that does not exist or is not installed, without importing any.

    Raises ValueError, one line naming it (accelerate itself leaves both out without a word).
    """
    for name in names:
        if name not in PACKAGES:
            raise unknown("tracker", name, PACKAGES)
        if not any(_is_installed(package) for package in PACKAGES[name]):
            raise ValueError(
                f"tracker {name!r} needs a package that is not installed: pip install {PACKAGES[name][0]},"
                " or leave it out of trackers"
            )


class Trackers:
    """Open trackers, each of which gets everything that is logged."""

    def __init__(self, trackers: Sequence[GeneralTracker], *, report: Report = lambda _: None) -> None:
        """`report` gets a line the first time that a tracker fails, and when it is given up."""
        self._trackers, self._report = list(trackers), report
        self._failures = {id(tracker): 0 for tracker in self._trackers}
        self._told: set[int] = set()

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Numbers by name, as in a row of metrics.jsonl; nested tables are joined by "/", the rest is left
        out.
        """
        numbers = {name: value for name, value in flattened(row).items() if _is_number(value)}
        numbers.pop("step", None)
        for tracker in list(self._trackers) if numbers else []:
            with _Spared(self, tracker):
                tracker.log(numbers, step=step)

    def log_picture(self, name: str, picture: NDArray[np.uint8], step: int) -> None:
        """A picture, uint8 H×W×3, to the trackers that show pictures."""
        for tracker in list(self._trackers):
            if hasattr(tracker, "log_images"):
                with _Spared(self, tracker):
                    _log_picture(tracker, name, picture, step)

    def finish(self) -> None:
        """Close every tracker."""
        for tracker in list(self._trackers):
            with _Spared(self, tracker):
                tracker.finish()
        self._trackers = []

    def _failed(self, tracker: GeneralTracker, error: Exception) -> None:
        key = id(tracker)
        self._failures[key] += 1
        if key not in self._told:
            self._told.add(key)
            self._report(f"tracker {tracker.name} fails ({_said(error)}); the training goes on")
        if self._failures[key] == _PATIENCE and tracker in self._trackers:
            self._trackers.remove(tracker)
            self._report(f"tracker {tracker.name} failed {_PATIENCE} times in a row and is given up")

    def _worked(self, tracker: GeneralTracker) -> None:
        self._failures[id(tracker)] = 0


def open_trackers(
    names: Sequence[str],
    *,
    run_folder: Path,
    config: Mapping[str, Any],
    project: str = "controlkit",
    step: int = 0,
    report: Report = lambda _: None,
) -> Trackers:
    """Open trackers for a run, on the main process alone, after the accelerator (if any) is there.

    What they keep on disk lies in `run_folder/trackers`; a resumed run goes on in the same run of wandb.
    `step` is the last one that the run has behind it: what tensorboard has of later ones comes again.
    `config` is stored with nested keys joined by "/" and values that are no numbers as text.

    Raises ValueError, one line, as `check_trackers`, and for a tracker that cannot be opened (not logged in,
    no network: WANDB_MODE=offline keeps a wandb run on disk).
    """
    check_trackers(names)
    if not names:
        return Trackers([])
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the trackers' own messages need it
    folder = run_folder / "trackers"
    opened: list[GeneralTracker] = []
    for name in dict.fromkeys(names):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kind = LOGGER_TYPE_TO_CLASS[name]
            opened.append(_open(kind, name, folder, config=config, project=project, step=step))
        except Exception as error:  # every library raises its own
            Trackers(opened).finish()
            raise ValueError(
                f"tracker {name!r} cannot be opened: {_said(error)} (or leave it out of trackers)"
            ) from error
    return Trackers(opened, report=report)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Setting]:
    """Nested tables as one, keys joined by "/"; what is no str, int, float or bool becomes text."""
    flat: dict[str, Setting] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}/")
        elif isinstance(value, str | int | float | bool):
            flat[prefix + str(key)] = value
        else:
            flat[prefix + str(key)] = _as_text(value)
    return flat


def _as_text(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _is_number(value: Setting) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_installed(package: str) -> bool:
    # A folder of that name in the current one (wandb makes one) is no package.
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def _open(
    kind: type[GeneralTracker],
    name: str,
    folder: Path,
    *,
    config: Mapping[str, Any],
    project: str,
    step: int,
) -> GeneralTracker:
    settings: dict[str, Any] = {}
    if kind.requires_logging_directory:
        settings["logging_dir"] = str(folder)
    if name == "wandb":
        settings |= {"dir": str(folder), "name": folder.parent.name, "id": _run_id(folder), "resume": "allow"}
    elif name == "dvclive":
        settings |= {"dir": str(folder / "dvclive"), "resume": True}
    elif name == "tensorboard":
        settings["purge_step"] = step + 1  # the first one that it hides
    tracker = kind(project, **settings)
    tracker.start()
    tracker.store_init_configuration(flattened(config))
    return tracker


def _run_id(folder: Path) -> str:
    """The run's name for services that can take a run up again: made once, kept in the run's folder."""
    path = folder / "id"
    if not path.is_file():
        files.write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def _log_picture(tracker: GeneralTracker, name: str, picture: NDArray[np.uint8], step: int) -> None:
    if tracker.name == "tensorboard":
        tracker.log_images({name: picture[None]}, step=step, dataformats="NHWC")
    elif tracker.name in ("aim", "clearml"):  # one picture, where the others take a list
        from PIL import Image

        shown = Image.fromarray(picture) if tracker.name == "aim" else picture
        tracker.log_images({name: shown}, step=step)
    else:
        tracker.log_images({name: [picture]}, step=step)


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}".removesuffix(": ")


class _Spared:
    """Whatever a tracker raises within the block is told to `Trackers`, and the run goes on."""

    def __init__(self, trackers: Trackers, tracker: GeneralTracker) -> None:
        self.trackers, self.tracker = trackers, tracker

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Forgive an Exception; Ctrl-C and the end of the process are none."""
        if error is None:
            self.trackers._worked(self.tracker)
            return False
        if not isinstance(error, Exception):
            return False
        self.trackers._failed(self.tracker, error)
        return True

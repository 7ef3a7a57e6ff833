"""What a run folder says of its run, read with patience: whatever is missing or broken is left out."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from platform import python_version
from typing import Any

from controlkit import files
from controlkit.training.reporting.convergence import ON_TRAINED

LIBRARIES = ("controlkit", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
RESULTS = ("controlnet", "unet", "result")
_SAMPLE = re.compile(r"step-(\d+)\.png")


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it. See `read_run`."""

    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    """metrics.jsonl without events, in the order of steps; each has a step."""
    events: list[tuple[int, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """By what was looked at: floor, the adapter (by its kind, or "control"), ceiling, true."""
    samples: list[tuple[int, Path]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """facts.json: whatever is known beside, such as the data's and the base's hash."""

    @property
    def step(self) -> int:
        """The last step that left a trace."""
        seen = [row["step"] for row in self.rows] + [step for step, _ in [*self.events, *self.samples]]
        return max(seen, default=0)

    @property
    def span(self) -> tuple[float, float]:
        """First and last step of the curves."""
        steps = [row["step"] for row in self.rows] or [0]
        return min(steps), max(steps)

    @property
    def seconds(self) -> float:
        """The time of all stretches together: a resumed run counts from zero again."""
        total, last, before = 0.0, 0.0, 0.0
        for step, seconds in self.curve("seconds"):
            if seconds < last or any(before <= resumed < step for resumed in self.resumed):
                total += last
            last, before = seconds, step
        return total + last

    @property
    def watched(self) -> str:
        """What the pairs are that were shown along the way: "held-out", or "trained"."""
        trained = self.facts.get("data_held_out") == 0 or any(row.get(ON_TRAINED) for row in self.rows)
        return "trained" if trained else "held-out"

    @property
    def scored(self) -> str:
        """What the pairs of the scores are; those of the bundled base's adapters are scenes of its world."""
        return self.watched if "control" in self.scores else "held-out"

    @property
    def result(self) -> Path | None:
        """The folder of the result, once there is one."""
        return next((self.folder / name for name in RESULTS if (self.folder / name).is_dir()), None)

    @property
    def resumed(self) -> list[int]:
        """The steps at which the run was taken up again."""
        return [step for step, text in self.events if "resume" in text.lower()]

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) wherever a row has the number `name`."""
        return [(row["step"], row[name]) for row in self.rows if is_number(row.get(name))]

    def table(self, name: str) -> dict[str, list[tuple[float, float]]]:
        """Curves of a nested entry, such as the learning rates of several parts."""
        keys = {key: None for row in self.rows for key in (row.get(name) or {}) if _is_table(row.get(name))}
        return {
            key: [(row["step"], row[name][key]) for row in self.rows if _has_number(row.get(name), key)]
            for key in keys
        }

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file of the result, by its path within the run folder."""
        found = sorted(path for path in self.result.rglob("*") if path.is_file()) if self.result else []
        return {path.relative_to(self.folder).as_posix(): files.sha256_file(path) for path in found}


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises ValueError where there is none."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a run (with metrics.jsonl)")
    entries = [entry for line in _lines(folder / "metrics.jsonl") if (entry := _entry(line)) is not None]
    entries.sort(key=lambda entry: entry["step"])  # stable: a row stays before the event that follows it
    config_text = _text(folder / "config.toml")
    return RunRecord(
        folder=folder,
        rows=[entry for entry in entries if "event" not in entry],
        events=[(entry["step"], str(entry["event"])) for entry in entries if "event" in entry],
        config=_toml(config_text),
        config_text=config_text,
        scores=_scores(json_of(folder / "scores.json")),
        samples=_samples(folder / "samples"),
        facts=json_of(folder / "facts.json"),
    )


def versions(*more: str) -> dict[str, str]:
    """The versions of Python and of the libraries that decide a training's numbers, and of `more`."""
    found = {"python": python_version()}
    for name in (*LIBRARIES, *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def is_number(value: Any) -> bool:
    """Whether a value of a row can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping)


def _has_number(table: Any, key: str) -> bool:
    return isinstance(table, Mapping) and is_number(table.get(key))


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:  # the last line of a run that was killed
        return None
    usable = isinstance(entry, dict) and is_number(entry.get("step"))
    return entry | {"step": int(entry["step"])} if usable else None


def _lines(path: Path) -> list[str]:
    return _text(path).split("\n")  # as training.watch.lines_of


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def json_of(path: Path) -> dict[str, Any]:
    """The object in a file; {} where there is none, or it cannot be read."""
    try:
        value = json.loads(_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _scores(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    tables = {name: table for name, table in found.items() if isinstance(table, dict)}
    return {
        name: {measure: value for measure, value in table.items() if is_number(value)}
        for name, table in tables.items()
    }


def _samples(folder: Path) -> list[tuple[int, Path]]:
    found = [(match, path) for path in folder.glob("*.png") if (match := _SAMPLE.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in found)

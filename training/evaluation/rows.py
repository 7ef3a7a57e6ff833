"""What each picture got, kept line by line, so that an evaluation that was stopped goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from controlkit.metrics.pose_ap import Matches

Key = tuple[str, int, int]
"""The arm's folder, the pair's number, the seed."""


@dataclass(frozen=True, eq=False)
class Row:
    """One picture of one arm: its scores by kind of map, and what else it got under the kind ""."""

    arm: str
    number: int
    seed: int
    scores: dict[str, dict[str, float]]
    people: Matches | None = None
    seconds: float | None = None
    """That generating it took."""

    @property
    def key(self) -> Key:
        """What it is of."""
        return self.arm, self.number, self.seed

    def to_line(self) -> str:
        """The row as one line of JSON."""
        told: dict[str, Any] = {"arm": self.arm, "number": self.number, "seed": self.seed}
        told["scores"] = self.scores
        if self.people is not None:
            found, wanted = self.people.similarity.shape
            told["people"] = {
                "found": found,
                "wanted": wanted,
                "similarity": self.people.similarity.round(6).tolist(),
                "scores": self.people.scores.round(6).tolist(),
            }
        if self.seconds is not None:
            told["seconds"] = round(self.seconds, 4)
        return json.dumps(told, allow_nan=False)


@dataclass
class Rows:
    """The rows of an evaluation's folder. Every process adds to a file of its own."""

    folder: Path
    process: int = 0
    found: dict[Key, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there."""
        own = self.folder / f"rows-{self.process}.jsonl"
        held = own.read_bytes() if own.is_file() else b""
        self._before = "\n" if held and not held.endswith(b"\n") else ""  # after a line that was cut short
        self.read()

    def read(self) -> None:
        """Read all processes' rows again. A line that was cut short is no row."""
        for file in sorted(self.folder.glob("rows-*.jsonl")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                row = _row(line)
                if row is not None and set(row.scores) >= set(self._known(row)):  # the newer one has more
                    self.found[row.key] = row

    def _known(self, row: Row) -> dict[str, dict[str, float]]:
        return self.found[row.key].scores if row.key in self.found else {}

    def add(self, row: Row) -> None:
        """Keep a row. Raises ValueError where it cannot be written."""
        path = self.folder / f"rows-{self.process}.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(self._before + row.to_line() + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
        self._before = ""
        self.found[row.key] = row

    def of_arm(self, arm: str) -> Iterator[Row]:
        """One arm's rows, in the order of numbers and seeds."""
        return iter(sorted((row for row in self.found.values() if row.arm == arm), key=lambda row: row.key))


def _row(line: str) -> Row | None:
    try:
        told = json.loads(line)
        people = told.get("people")
        scores = {
            kind: {name: float(value) for name, value in values.items()}
            for kind, values in told["scores"].items()
        }
        if not all(math.isfinite(value) for values in scores.values() for value in values.values()):
            return None
        return Row(
            str(told["arm"]),
            int(told["number"]),
            int(told["seed"]),
            scores,
            None if people is None else _people(people),
            told.get("seconds"),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _people(told: dict[str, Any]) -> Matches:
    similarity = np.array(told["similarity"], dtype=np.float64)
    return Matches(
        similarity.reshape(told["found"], told["wanted"]), np.array(told["scores"], dtype=np.float64)
    )

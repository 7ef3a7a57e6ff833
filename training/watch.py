"""What a run says of itself as it goes: rows of metrics.jsonl, progress for whoever watches."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import files

if TYPE_CHECKING:
    from controlkit.training.reporting.trackers import Trackers

QUARTERS = 4  # of the noise levels, whose losses are told apart: one figure hides what control learns


@dataclass(frozen=True)
class Progress:
    """What a training tells whoever watches it; `message` is a line worth keeping, else None."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    eta_s: float
    message: str | None = None
    gap: float | None = None
    """How much worse the loss is with another picture's map, as a share of it; None where nobody looked."""


@dataclass
class Window:
    """What happened since the last row: sums that a checkpoint keeps, so that no step is lost to a stop."""

    steps: int = 0
    loss: float = 0.0
    samples: int = 0
    quarter_loss: list[float] = field(default_factory=lambda: [0.0] * QUARTERS)
    quarter_samples: list[int] = field(default_factory=lambda: [0] * QUARTERS)
    missed: float = 0.0
    looked_at: int = 0

    def add(self, losses: Iterable[float], places: Iterable[float], missed: Sequence[float] = ()) -> None:
        """Count a step: each pair's loss, and its noise level in [0, 1) (NaN where there is none); what a
        reward missed in the pairs that it looked at.
        """
        self.steps += 1
        self.missed += sum(missed)
        self.looked_at += len(missed)
        for loss, place in zip(losses, places, strict=True):
            self.loss += loss
            self.samples += 1
            if not math.isnan(place):
                quarter = min(int(place * QUARTERS), QUARTERS - 1)
                self.quarter_loss[quarter] += loss
                self.quarter_samples[quarter] += 1

    def merge(self, others: Iterable[Window]) -> Window:
        """This and the other processes' windows as one."""
        whole = Window(self.steps)
        for window in (self, *others):
            whole.loss += window.loss
            whole.samples += window.samples
            whole.missed += window.missed
            whole.looked_at += window.looked_at
            for k in range(QUARTERS):
                whole.quarter_loss[k] += window.quarter_loss[k]
                whole.quarter_samples[k] += window.quarter_samples[k]
        return whole

    def row(self) -> dict[str, float]:
        """The mean loss, NaN of no step, and by quarter of the noise levels (q0: least noise) where any was
        seen; the mean of what a reward missed, before it is weighted.
        """
        row = {"loss": self.loss / self.samples if self.samples else math.nan}
        for k, (loss, samples) in enumerate(zip(self.quarter_loss, self.quarter_samples, strict=True)):
            if samples:
                row[f"loss_q{k}"] = loss / samples
        if self.looked_at:
            row["map_missed"] = self.missed / self.looked_at
        return row


class Watch:
    """Turns steps into progress reports and rows of metrics.jsonl."""

    def __init__(self, folder: Path, *, steps: int, batch: int, progress: Callable[[Progress], None]) -> None:
        """``batch``: pairs per step, over all processes."""
        self.log, self.steps, self.batch, self.progress = folder / "metrics.jsonl", steps, batch, progress
        self.started, self.first = time.perf_counter(), 0
        self.idle = 0.0
        self.writes = False
        self.gap: float | None = None
        self.trackers: Trackers | None = None

    def open_log(self, step: int) -> None:
        """Begin to write, at a step; of several processes one does. Rows of later steps come again: they are
        dropped, and it is noted that the run was taken up again.
        """
        self.started, self.first, self.writes = time.perf_counter(), step, True
        truncate_after(self.log, step)
        if 0 < step < self.steps:
            self.write({"step": step, "event": f"resumed at step {step}"})

    def pause(self, seconds: float) -> None:
        """Do not count these seconds as training."""
        self.idle += seconds

    def say(self, step: int, message: str, *, keep: bool = False) -> None:
        """Tell a line; ``keep`` writes it down, too."""
        self.progress(Progress(step, self.steps, math.nan, 0.0, math.nan, message))
        if keep:
            self.write({"step": step, "event": message})

    def after_step(self, step: int, row: Mapping[str, Any]) -> None:
        """Write a row of figures, and report how far the training is."""
        seconds = time.perf_counter() - self.started
        per_s = (step - self.first) / max(seconds - self.idle, 1e-9)
        whole = {"step": step, **row, "samples_per_s": per_s * self.batch, "seconds": seconds}
        self.gap = row.get("gap", self.gap)
        self.write(whole)
        if self.trackers is not None:
            self.trackers.log(whole, step)
        eta = (self.steps - step) / per_s
        self.progress(Progress(step, self.steps, float(row["loss"]), per_s * self.batch, eta, gap=self.gap))

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row, if this process writes; numbers that are not finite become null, which JSON has."""
        if not self.writes:
            return
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain, ensure_ascii=False) + "\n")


def lines_of(log: Path) -> list[str]:
    """A file's lines: names of pairs may hold what Python's splitlines, too, takes for the end of one."""
    return log.read_text(encoding="utf-8", errors="replace").split("\n")


def truncate_after(log: Path, step: int) -> None:
    """Drop rows of steps that a resumed run will repeat, and a row that was cut short."""
    if not log.is_file():
        return
    kept = []
    for line in lines_of(log):
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    files.write_text(log, "".join(kept))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, without damaged ones."""
    rows = []
    with suppress(OSError):
        for line in lines_of(folder / "metrics.jsonl"):
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    rows.append(row)
    return rows

"""What a person asked for on the page, as `controlkit generate` would be told it."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit import files, generate_job
from controlkit.arguments import control_text
from controlkit.images import encode_png
from controlkit.rules import USUAL_MODE
from controlkit.settings import USUAL_SCHEDULER, USUAL_STEPS

if TYPE_CHECKING:
    from controlkit.generate_plan import Plan

MOST_PICTURES = 16  # of one request: others wait
MOST_STEPS = 100  # of a slider
DIGITS = 4  # of numbers that come from sliders
GIVEN = (
    *("prompt", "negative_prompt", "prompt_syntax", "base"),
    *("seed", "count", "steps", "scheduler", "device"),
)  # always; the others where a person gives them
TOLD = 40  # characters of a wrong number that its error repeats


@dataclass(frozen=True, eq=False)
class AskedControl:
    """One control: the map, uint8 (H, W, 3), how it acts, and its adapter ("" for the base's own)."""

    kind: str
    map: np.ndarray
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mode: str = USUAL_MODE
    adapter: str = ""


@dataclass(frozen=True, eq=False)
class Asked:
    """The pictures that are wanted. guidance, width, height: None is the base's own. dtype: None is usual."""

    prompt: str
    base: str
    controls: Sequence[AskedControl] = ()
    negative_prompt: str | None = None
    seed: int = 0
    count: int = 1
    steps: int = USUAL_STEPS
    guidance: float | None = None
    scheduler: str = USUAL_SCHEDULER
    prompt_syntax: str = "plain"
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    dtype: str | None = None

    def plan(self, keep: Path) -> Plan:
        """The checked plan, its maps written into the folder `keep`, where the pictures will be, too.

        Raises ValueError as `generate_plan.plan`, for too many pictures, and where nothing can be written.
        """
        if not 1 <= self.count <= MOST_PICTURES:
            raise ValueError(f"the page makes 1 to {MOST_PICTURES} pictures at once, not {self.count}")
        _make(keep)
        given = {name: getattr(self, name) for name in GIVEN}
        for name in ("guidance", "width", "height", "dtype"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        return generate_job.plan(
            given,
            maps=[_written(control, keep) for control in self.controls],
            adapters=[f"{control.kind}={control.adapter}" for control in self.controls if control.adapter],
            output=str(keep / f"picture-{uuid.uuid4().hex[:10]}.png"),
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from error


def _written(control: AskedControl, keep: Path) -> str:
    """The control as an argument of --map, its map in a file that is named by what is in it."""
    data = encode_png(control.map)
    path = keep / f"{control.kind}-{hashlib.sha256(data).hexdigest()[:12]}.png"
    if not path.is_file():
        files.write_bytes(path, data)
    return control_text(control.kind, str(path), vars(control))


def between(value: Any, low: float, high: float, what: str) -> float:
    """What a slider or its field holds. Raises ValueError for nothing, and for what lies outside."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        given = "nothing" if value is None else str(value)[:TOLD]
        raise ValueError(f"{what}: a number from {low:,.10g} to {high:,.10g}, not {given}")
    return round(float(value), DIGITS)


def count_of(value: Any, most: int, what: str) -> int:
    """A whole number from 1 on that a slider or its field holds. Raises ValueError for anything else."""
    number = between(value, 1, most, what)
    if not number.is_integer():
        raise ValueError(f"{what}: a whole number from 1 to {most:,}, not {value:g}")
    return int(number)


def whole(text: str | None, what: str) -> int | None:
    """A whole number that was typed in, None for nothing. Raises ValueError for anything else."""
    given = (text or "").strip()
    try:
        return int(given) if given else None
    except ValueError:
        raise ValueError(f"{what} must be a whole number, or empty, not {given[:TOLD]!r}") from None


def real(text: str | None, what: str) -> float | None:
    """A number that was typed in, None for nothing. Raises ValueError for anything else."""
    given = (text or "").strip()
    try:
        return float(given) if given else None
    except ValueError:
        raise ValueError(f"{what} must be a number, or empty, not {given[:TOLD]!r}") from None

"""`controlkit generate --grid`: one picture for every combination of two settings, on a labelled sheet."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import arguments, images, sheets
from controlkit.generate_job import Session
from controlkit.generate_like import temperature_fits
from controlkit.generate_notes import Variant
from controlkit.generate_plan import Plan
from controlkit.infotext import GRID_CHUNK, ControlRecord, PictureRecord
from controlkit.limits import check_count
from controlkit.naming import unknown
from controlkit.rules import check_rule
from controlkit.startup import nothing_collected

MOST = 400  # pictures of a grid

_PICTURE_KEYS: Mapping[str, Callable[[str], Any]] = {
    "seed": int,
    "steps": int,
    "guidance": float,
    "guidance_rescale": float,
    "clip_skip": int,
    "scheduler": str,
    "temperature": float,
    "strength": float,
    "hires_strength": float,
    "control_every": int,
    "features_every": int,
    "guidance_until": float,
    "image_noise": int,
    "class_label": int,
    "clip_guidance": float,
    "merge_tokens": float,
}
_CONTROL_KEYS = ("scale", "start", "end", "gate", "mode", "layers", "only_mid")


@dataclass(frozen=True)
class Axis:
    """One setting and its values. A control's setting may name one kind: canny.scale."""

    key: str
    values: tuple[Any, ...]

    def label(self, value: Any) -> str:
        """How a value is named on the sheet."""
        shown = "..".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value
        return f"{self.key}={shown:g}" if isinstance(shown, float) else f"{self.key}={shown}"


def split_words(words: Sequence[str], grid: Sequence[str]) -> tuple[str | None, list[str]]:
    """The prompt and the settings of a grid, from the words on the command line: `--grid` may be followed by
    two settings, of which the shell gives the second as a word of its own.

    Raises ValueError for more than one word that is no setting.
    """
    settings = [word for k, word in enumerate(words) if grid and _is_setting(word, first=k == 0)]
    others = [word for word in words if word not in settings]
    if len(others) > 1:
        raise ValueError(f"unexpected extra argument {others[1]!r}: put quotes around the prompt")
    return (others[0] if others else None), [*grid, *settings]


def _is_setting(word: str, *, first: bool) -> bool:
    """Whether a word is a setting of a grid; the first word, which may be the prompt, only if it looks whole
    like one."""
    match = re.match(r"([a-z_.]+)=", word)
    if match is None or not first:
        return match is not None
    known = match[1].rpartition(".")[2] in (*_PICTURE_KEYS, *_CONTROL_KEYS)
    several = "," in word or ".." in word  # misspelt, then
    return not re.search(r"\s", word) and (known or several)


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Read one or two KEY=VALUE,VALUE,... or, for whole numbers, KEY=FIRST..LAST.

    Raises ValueError for an unknown key, a value that is none, the same key twice, or too many pictures.
    """
    axes = [_axis(text) for text in texts]
    if not 1 <= len(axes) <= 2:
        raise ValueError(f"--grid varies one setting or two, not {len(axes)}")
    if len({axis.key for axis in axes}) < len(axes):
        raise ValueError(f"--grid varies {axes[0].key} twice")
    count = int(np.prod([len(axis.values) for axis in axes]))
    if count > MOST:
        raise ValueError(f"--grid would make {count} pictures; {MOST} is the most")
    return axes


def _axis(text: str) -> Axis:
    key, equals, rest = text.partition("=")
    name = key.rpartition(".")[2]
    known = (*_PICTURE_KEYS, *_CONTROL_KEYS)
    if not (equals and rest):
        raise ValueError(f"--grid {text!r} must be KEY=VALUE,VALUE or KEY=FIRST..LAST, as scale=0.5,1")
    if name not in known or (name != key and name in _PICTURE_KEYS):
        raise unknown("setting of a grid", key, known)
    try:
        return Axis(key, tuple(_values(name, rest)))
    except ValueError as error:
        raise ValueError(f"--grid {text!r}: {error}") from None


def _values(name: str, rest: str) -> list[Any]:
    if name not in _PICTURE_KEYS:
        return [arguments.parse_control_setting(name, part) for part in rest.split(",")]
    read = _PICTURE_KEYS[name]
    first, dots, last = rest.partition("..")
    if dots and read is int:
        start, end = _value(name, first), _value(name, last)
        if end < start:
            raise ValueError(f"{first}..{last} runs backwards")
        check_count(end - start + 1)
        return list(range(start, end + 1))
    return [_value(name, part) for part in rest.split(",")]


def _value(name: str, text: str) -> Any:
    read = _PICTURE_KEYS[name]
    try:
        return read(text)
    except ValueError:
        allowed = "whole numbers, as 1,2,4 or 1..4" if read is int else "numbers, as 0.5,1"
        raise ValueError(f"{name} cannot be {text!r}: it takes {allowed}") from None


def check(job: Plan, axes: Sequence[Axis]) -> None:
    """Raise ValueError for a combination that cannot be made, before anything is loaded."""
    kinds = {source.record.kind for source in job.sources}
    if job.options.count != 1:
        raise ValueError("a grid makes one picture for each combination: vary seed instead of -n")
    for axis in axes:
        kind, dot, name = axis.key.rpartition(".")
        if name in _CONTROL_KEYS and not job.sources:
            raise ValueError(f"--grid varies {axis.key}, and there is no control")
        if dot and kind not in kinds:
            raise unknown("control", kind, sorted(kinds))
        _check_belongs(job, name)
    for options, controls in variants(job, axes):
        options.check()
        for control in controls:
            check_rule(control.scale, control.start, control.end, control.gate, control.mode, control.layers)


def _check_belongs(job: Plan, name: str) -> None:
    """Raise ValueError for a setting of something that is not there."""
    missing = {
        "strength": (job.beginning is None, "there is no picture to start from: add --from"),
        "image_noise": (job.additions.shown is None, "the base is told no picture: add --image"),
        "hires_strength": (job.options.hires == 1, "there is no second stage: add --hires 2"),
        "control_every": (not job.sources, "there is no control"),
    }
    absent, why = missing.get(name, (False, ""))
    if absent:
        raise ValueError(f"--grid varies {name}, and {why}")


def variants(job: Plan, axes: Sequence[Axis]) -> list[Variant]:
    """The options and the controls of every picture; without axes of the one that is asked for."""
    controls = tuple(source.record for source in job.sources)
    return [
        (replace(job.options, **_of_picture(job, settings)), _with_settings(controls, settings))
        for settings in _combinations(axes)
    ]


def _of_picture(job: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are no control's; another scheduler drops a temperature that nobody gave."""
    told = {key: value for key, value in settings.items() if key in _PICTURE_KEYS}
    given = {*told, *job.given}
    if "temperature" not in given and not temperature_fits(
        job.options.temperature, told.get("scheduler", job.options.scheduler)
    ):
        told["temperature"] = None
    return told


def run(job: Plan, axes: Sequence[Axis], report: Any, *, preview: Path | None = None) -> list[PictureRecord]:
    """Make all pictures and write the sheet, with the settings in its text; returns the records.

    The sheet is written anew after every picture, so that an interruption keeps what is finished.
    """
    by_clip = any(options.clip_guidance for options, _ in variants(job, axes))
    with nothing_collected():
        session = Session(job, report, preview=preview, by_clip=by_clip)
    columns, rows = axes[0], axes[1] if len(axes) == 2 else None
    records: list[PictureRecord] = []
    cells: list[list[sheets.Cell]] = []
    total = len(columns.values) * (len(rows.values) if rows else 1)
    for row in rows.values if rows else (None,):
        cells.append([])
        for column in columns.values:
            settings = {columns.key: column, **({rows.key: row} if rows else {})}
            label = ", ".join(axis.label(settings[axis.key]) for axis in axes)
            report.status(f"picture {len(records) + 1} of {total}: {label}")
            record = _with(job, session.first, settings)
            session.make([record], lambda _, picture, label=label: cells[-1].append((picture, label)))  # type: ignore[misc]
            records.append(record)
            _write(job.outputs[0], cells, records, session.first.prompt)
    return records


def _write(
    output: Path, cells: Sequence[Sequence[sheets.Cell]], records: Sequence[PictureRecord], title: str
) -> None:
    side = max(max(picture.shape[:2]) for row in cells for picture, _ in row)
    sheet = sheets.contact_sheet(cells, title=title, cell=min(max(side, 192), 512))
    told = json.dumps([asdict(record) for record in records], ensure_ascii=False)
    images.write_png(output, sheet, text={GRID_CHUNK: told})


def _combinations(axes: Sequence[Axis]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for axis in axes:
        found = [{**settings, axis.key: value} for settings in found for value in axis.values]
    return found


def _with(job: Plan, record: PictureRecord, settings: Mapping[str, Any]) -> PictureRecord:
    told = _of_picture(job, settings)
    if "strength" in told:
        assert record.start is not None
        told["start"] = replace(record.start, strength=told.pop("strength"))
    return replace(record, **told, controls=_with_settings(record.controls, settings))


def _with_settings(
    controls: Sequence[ControlRecord], settings: Mapping[str, Any]
) -> tuple[ControlRecord, ...]:
    """The controls with the settings that are theirs."""
    changed = []
    for control in controls:
        own = {
            key.rpartition(".")[2]: value
            for key, value in settings.items()
            if key not in _PICTURE_KEYS and key.rpartition(".")[0] in ("", control.kind)
        }
        changed.append(replace(control, **own))
    return tuple(changed)

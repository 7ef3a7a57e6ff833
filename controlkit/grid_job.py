"""`controlkit generate --grid`: one picture for every combination of two settings, on a labelled sheet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import images, sheets
from controlkit.arguments import is_none, numbered_outputs
from controlkit.generate_job import Session, check_fits, check_names
from controlkit.generate_like import OF_THE_BASE, temperature_fits
from controlkit.generate_models import Models
from controlkit.generate_notes import Variant
from controlkit.generate_plan import (
    TAKEN_AWAY,
    Options,
    Plan,
    Source,
    adapted,
    check_fit,
    check_outputs,
    check_text,
)
from controlkit.grid_axes import Axis
from controlkit.infotext import GRID_CHUNK, PictureRecord, chunks
from controlkit.limits import check_lora_weight, check_picture_scale
from controlkit.naming import unknown
from controlkit.notices import Report
from controlkit.rules import check_rule
from controlkit.startup import nothing_collected

_BLANK = np.full((1, 1, 3), 255, np.uint8)
_LARGEST = 512  # pixels of a picture's longer side on the sheet
_PART = 0.1  # of the time that the pictures took, after which the sheet is written again


@dataclass(frozen=True, eq=False)
class _Cell:
    """One picture of the sheet: its plan, its label, and what is loaded for it, as settings."""

    job: Plan
    label: tuple[str, ...]
    loads: tuple[tuple[str, Any], ...]


def first_prompt(axes: Sequence[Axis], prompt: str | None) -> str | None:
    """The prompt of the first picture: of an axis, or the one that is given.

    Raises ValueError where there are both.
    """
    found = next((axis.values[0] for axis in axes if axis.key == "prompt"), prompt)
    if prompt is not None and found != prompt:
        raise ValueError(f"--grid varies the prompt: leave out {prompt!r}, or make it one of the grid's")
    return found


def check(job: Plan, axes: Sequence[Axis]) -> None:
    """Raise ValueError for a combination that cannot be made, before anything is loaded."""
    kinds = {source.record.kind for source in job.sources}
    if job.options.count != 1:
        raise ValueError("a grid makes one picture for each combination: vary seed instead of -n")
    for axis in axes:
        if axis.is_of_controls and not job.sources:
            raise ValueError(f"--grid varies {axis.key}, and there is no control")
        if axis.kind and axis.kind not in kinds:
            raise unknown("control", axis.kind, sorted(kinds))
        _check_belongs(job, axis.name, {axis.key for axis in axes})
    for cell in _cells(job, axes):
        try:
            _check_job(cell.job)
        except ValueError as error:
            raise ValueError(f"--grid, {', '.join(cell.label)}: {error}") from error


def _check_job(job: Plan) -> None:
    """Raise ValueError for a picture that cannot be made."""
    job.options.check()
    check_text(job.options, job.sources, job.additions.texts())
    for lora, _ in job.additions.loras:
        check_lora_weight(lora.weight)
    for told in job.additions.ip_adapters:
        check_picture_scale(told.record.scale)
    for control in (source.record for source in job.sources):
        rule = (control.scale, control.start, control.end, control.gate, control.mode, control.layers)
        check_rule(*rule, control.fit)
        check_fit(control)


def _check_belongs(job: Plan, name: str, varied: set[str]) -> None:
    """Raise ValueError for a setting of something that is not there."""
    loras, told = len(job.additions.loras), len(job.additions.ip_adapters)
    two_stages = job.options.hires != 1 or "hires" in varied
    missing = {
        "strength": (job.beginning is None, "there is no picture to start from: add --from"),
        "image_noise": (job.additions.shown is None, "the base is told no picture: add --image"),
        "hires_strength": (not two_stages, "there is no second stage: add --hires 2"),
        "control_every": (not job.sources, "there is no control"),
        "lora": (loras != 1, f"there are {loras} LoRAs: it is the weight of the one that --lora names"),
        "ip_adapter": (told != 1, f"there are {told}: it is the scale of the one that --ip-adapter names"),
    }
    absent, why = missing.get(name, (False, ""))
    if absent:
        raise ValueError(f"--grid varies {name}, and {why}")


def kept_files(job: Plan, axes: Sequence[Axis]) -> list[Path]:
    """Where the pictures go that are kept beside the sheet, row by row: out-1.png, out-2.png ...

    Raises ValueError where one would replace what it is made from, or cannot be written.
    """
    count = len(_cells(job, axes))
    outputs = numbered_outputs(str(job.outputs[0]), max(count, 2))[:count]  # none of them is the sheet
    check_outputs(outputs, job.read)
    return outputs


def variants(job: Plan, axes: Sequence[Axis]) -> list[Variant]:
    """The options and the controls of every picture; without axes of the one that is asked for."""
    jobs = [cell.job for cell in _cells(job, axes)]
    return [(one.options, tuple(source.record for source in one.sources)) for one in jobs]


def run(
    job: Plan,
    axes: Sequence[Axis],
    report: Report,
    *,
    preview: Path | None = None,
    kept: Sequence[Path] = (),
    finished: Callable[[int], None] = lambda k: None,
) -> list[PictureRecord]:
    """Make all pictures and write the sheet, with the settings in its text; returns the records, row by row.

    kept: of `kept_files`, where each picture is written as well, with what made it. finished: called with a
    picture's number as soon as it is made and kept. What is loaded serves as many pictures as it can. The
    sheet is written now and then, and also where something ends it early.
    """
    cells, models = _cells(job, axes), Models()
    options = [cell.job.options for cell in cells]
    records: dict[int, PictureRecord] = {}
    sheet = _Sheet(job.outputs[0], [cell.label for cell in cells], len(axes[0].values), _title(job, axes))
    report.status("loading the libraries")
    with nothing_collected():
        loaded = {cell.loads: cell.job for cell in cells}.values()
        for one in loaded:
            check_names(one, options)
        for one in loaded:
            check_fits(one)

    def made(k: int, _: int, picture: np.ndarray) -> None:
        sheet.add(k, picture, records[k])
        if kept:
            images.write_png(kept[k], picture, text=chunks(records[k]))
        finished(k)

    session, loads = None, None
    try:
        for number, k in enumerate(_in_order(cells)):
            cell = cells[k]
            if session is None or cell.loads != loads:
                session, loads = None, cell.loads  # given back before the next one takes memory
                with nothing_collected():
                    session = Session(cell.job, report, preview=preview, models=models, also=options)
                session.check_told()
            records[k] = session.decided(cell.job)
            report.status(f"picture {number + 1} of {len(cells)}: {', '.join(cell.label)}")
            session.make([records[k]], partial(made, k))
            sheet.write_now_and_then()
    except BaseException:
        with suppress(ValueError):  # what ended it is what is told
            sheet.write()
        raise
    sheet.write()
    return [records[k] for k in range(len(cells))]


class _Sheet:
    """The sheet's file, and what stands on it so far: pictures as small as they are shown."""

    def __init__(self, output: Path, labels: Sequence[Sequence[str]], columns: int, title: str) -> None:
        self._output, self._labels, self._columns, self._title = output, labels, columns, title
        self._pictures: list[np.ndarray | None] = [None] * len(labels)
        self._records: dict[int, PictureRecord] = {}
        self._is_written = True
        self._started = self._last = time.monotonic()

    def add(self, k: int, picture: np.ndarray, record: PictureRecord) -> None:
        """Lay a picture in its place; the file has it when it is written."""
        is_large = max(picture.shape[:2]) > _LARGEST
        self._pictures[k] = sheets.fitted(picture, _LARGEST) if is_large else picture
        self._records[k], self._is_written = record, False

    def write_now_and_then(self) -> None:
        """Write it where a part of the time has gone by since it was: drawing it takes longer and longer."""
        now = time.monotonic()
        if now - self._last >= _PART * (now - self._started):
            self.write()

    def write(self) -> None:
        """Write what is new. Raises ValueError where the file cannot be written."""
        if self._is_written:
            return
        rows = _rows(self._pictures, self._labels, columns=self._columns)
        _write(self._output, rows, [self._records[k] for k in sorted(self._records)], self._title)
        self._is_written, self._last = True, time.monotonic()


def _cells(job: Plan, axes: Sequence[Axis]) -> list[_Cell]:
    """Every picture, row by row; the first axis is that of the columns."""
    found = []
    for told in _combinations(axes):
        texts_last = sorted(told, key=lambda axis: axis.is_text)  # which may be cut off
        label = tuple(axis.label(told[axis]) for axis in texts_last)
        loads = tuple((axis.key, value) for axis, value in told.items() if axis.is_of_session)
        found.append(_Cell(_planned(job, told), label, loads))
    return found


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[Axis, Any]]:
    """The values of the axes, the first one varying fastest."""
    if not axes:
        yield {}
        return
    *others, last = axes
    for value in last.values:
        for before in _combinations(others):
            yield {**before, last: value}


def _planned(job: Plan, told: Mapping[Axis, Any]) -> Plan:
    """The plan with settings of a grid."""
    settings = {axis.key: value for axis, value in told.items() if not axis.is_of_controls}
    options = replace(job.options, **_of_picture(job, settings))
    beginning, added = job.beginning, replace(job.additions, vae=options.vae)
    if beginning is not None and "strength" in settings:
        record = replace(beginning.record, strength=settings["strength"])
        beginning = replace(beginning, record=record)
    if "lora" in settings:
        ((lora, place),) = added.loras
        added = replace(added, loras=((replace(lora, weight=settings["lora"]), place),))
    if "ip_adapter" in settings:
        (one,) = added.ip_adapters
        scaled = replace(one, record=replace(one.record, scale=settings["ip_adapter"]))
        added = replace(added, ip_adapters=(scaled,))
    sources = tuple(_source(source, told) for source in job.sources)
    return replace(job, options=options, sources=sources, beginning=beginning, additions=added)


def _of_picture(job: Plan, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options that settings stand for; what nobody gave and another scheduler or base does not take is
    left out.
    """
    told = {key: value for key, value in settings.items() if key not in ("lora", "ip_adapter")}
    if told.get("negative_prompt") == "":
        told["negative_prompt"] = None
    if "size" in told:
        told["width"], told["height"] = told.pop("size")
    told |= {name: "" for name in TAKEN_AWAY if is_none(told.get(name, ""))}
    given = {*told, *job.given}
    if told.get("base", job.options.base) != job.options.base:
        told |= {name: Options.__dataclass_fields__[name].default for name in OF_THE_BASE - given}
    if "temperature" not in given and not temperature_fits(
        job.options.temperature, told.get("scheduler", job.options.scheduler)
    ):
        told["temperature"] = None
    return told


def _source(source: Source, told: Mapping[Axis, Any]) -> Source:
    """A control with the settings that are its own."""
    own = {
        axis.name: value
        for axis, value in told.items()
        if axis.is_of_controls and axis.kind in ("", source.record.kind)
    }
    if "adapter" in own:
        source = adapted(source, own.pop("adapter"))
    return replace(source, record=replace(source.record, **own)) if own else source


def _in_order(cells: Sequence[_Cell]) -> list[int]:
    """The order in which the least is loaded: base by base, and all pictures of what is loaded."""
    bases = [cell.job.options.base for cell in cells]
    loads = [cell.loads for cell in cells]
    return sorted(range(len(cells)), key=lambda k: (bases.index(bases[k]), loads.index(loads[k])))


def _rows(
    pictures: Sequence[np.ndarray | None], labels: Sequence[Sequence[str]], *, columns: int
) -> list[list[sheets.Cell]]:
    """The sheet's rows as far as there are pictures; blank where one is still to be made."""
    count = max(k + 1 for k, picture in enumerate(pictures) if picture is not None)
    cells = [
        (_BLANK, "") if picture is None else (picture, label)
        for picture, label in zip(pictures[:count], labels, strict=False)
    ]
    return [cells[first : first + columns] for first in range(0, count, columns)]


def _title(job: Plan, axes: Sequence[Axis]) -> str:
    return "" if any(axis.key == "prompt" for axis in axes) else job.options.prompt


def _write(
    output: Path, cells: Sequence[Sequence[sheets.Cell]], records: Sequence[PictureRecord], title: str
) -> None:
    side = max(max(picture.shape[:2]) for row in cells for picture, _ in row)
    sheet = sheets.contact_sheet(cells, title=title, cell=min(max(side, 192), _LARGEST))
    told = json.dumps([asdict(record) for record in records], ensure_ascii=False)
    images.write_png(output, sheet, text={GRID_CHUNK: told})

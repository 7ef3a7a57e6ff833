"""`controlkit preprocess` for many pictures: a data set of pictures, maps and captions.

A map that is there is not made again, so a job that was stopped goes on. Several processes, started by
`accelerate launch`, take a share each.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from controlkit import limits, preprocessors
from controlkit.map_folder import (
    METADATA,
    SHEET,
    MapFolder,
    folders_of_maps,
    is_sheet,
    without_second_names,
)
from controlkit.map_pipeline import MapPipeline, Outcome
from controlkit.notices import Report
from controlkit.picture_files import (
    DEPTH_SUFFIXES,
    SUFFIXES,
    Picture,
    find_pictures,
    unread_below,
    unread_lines,
)
from controlkit.preprocess_job import Beside, reads_depth, settings_of_kinds
from controlkit.preprocessors import Preprocessor
from controlkit.processes import Processes

Todo = Mapping[Picture, list[str]]
"""The kinds of maps that each picture lacks."""
DEFAULT_BATCH = 4
BLACK_NAMED = 10  # so many black maps are named one by one; all are counted


@dataclass(frozen=True)
class Plan:
    """What `run` needs, checked."""

    folder: MapFolder
    workers: int
    batch: int
    overwrite: bool
    sheet: bool
    unread: Mapping[str, int] = field(default_factory=dict)
    """Files of the folders that are pictures of formats that are not read, by suffix."""


@dataclass
class Result:
    """What became of the pictures."""

    made: int = 0
    """Maps that were made now."""
    kept: int = 0
    """Maps that were there."""
    black: list[Path] = field(default_factory=list)
    """Maps that were made now and show nothing."""
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Pictures without their maps, and why."""
    complete: int = 0
    """Pictures with all their maps: rows of the metadata file."""
    without_caption: int = 0
    written: list[Path] = field(default_factory=list)
    is_mine: bool = True
    """Whether this process is the one that tells the user."""

    def summary(self) -> str:
        """One line: what was made, what was there, what failed."""
        parts = [f"{self.made} maps made"]
        if self.kept:
            parts.append(f"{self.kept} were there")
        parts.append(f"{self.complete} pictures complete")
        if self.black:
            parts.append(f"{len(self.black)} maps black")
        if self.without_caption:
            parts.append(f"{self.without_caption} without a caption")
        if self.failed:
            parts.append(f"{len(self.failed)} FAILED")
        return ", ".join(parts)


class FolderReport(Report, Protocol):
    """How the job tells what it is doing."""

    def note(self, text: str) -> None:
        """Something worth knowing, in one line, beside the progress."""


def plan(
    kinds: Sequence[str],
    sources: Sequence[str],
    settings: Mapping[str, str],
    *,
    output: str,
    workers: int | None = None,
    batch: int | None = None,
    device: str | None = None,
    overwrite: bool = False,
    sheet: bool = False,
    beside: Beside | None = None,
) -> Plan:
    """Check a request and find its pictures.

    ``settings`` are options of every kind that has them, or of one (``canny.low``). Raises ValueError: an
    unknown kind or option, no picture, an output that cannot be written or would overwrite an input, maps
    from other settings in the output folder.
    """
    limits.check_shares(workers, batch)
    beside = beside or Beside()
    beside.check(tuple(kinds))
    place = Path(output)
    of_kinds = settings_of_kinds(kinds, settings, device=device)
    of_files = all(reads_depth(options) for options in of_kinds.values())
    suffixes = DEPTH_SUFFIXES if of_files else SUFFIXES
    own_sheet = [place / SHEET] if is_sheet(place / SHEET) else []
    if sheet and (place / SHEET).exists() and not own_sheet:
        raise ValueError(
            f"{place / SHEET} is there, and no sheet of maps: "
            "rename it, choose another -o, or leave --sheet out"
        )
    of_maps = folders_of_maps(sources)
    made = [path for paths in of_maps.values() for path in paths]
    pictures = find_pictures(
        sources,
        leave_out=[place, *own_sheet, *(place / kind for kind in preprocessors.names()), *made],
        suffixes=suffixes,
    )
    pictures = without_second_names(pictures, of_maps)
    folder = MapFolder(place, of_kinds, pictures, beside)
    folder.check(overwrite=overwrite)
    unread = unread_below(sources, suffixes)
    return Plan(folder, workers or _cores(), batch or DEFAULT_BATCH, overwrite, sheet, unread)


def run(job: Plan, report: FolderReport) -> Result:
    """Make the maps that are missing and write the metadata; returns what became of the pictures.

    A picture that cannot be read is reported and left out. Raises ValueError when a file cannot be written.
    """
    processes = Processes()
    result = Result(is_mine=processes.is_first)
    todo = _missing(job, processes, result)
    extractors = _loaded(job, todo, processes, report)  # first: where one cannot be had, no folder is made
    if processes.is_first:
        job.folder.prepare()
        for line in unread_lines(job.unread):
            report.note(line)
    processes.wait()
    _make_maps(job, todo, extractors, result, report, share=len(_share(job, processes)))
    shares = processes.gather([result])
    result.made, result.kept = sum(share.made for share in shares), sum(share.kept for share in shares)
    result.black = [path for share in shares for path in share.black]
    result.failed = [failure for share in shares for failure in share.failed]
    if processes.is_first:
        _finish(job, result, report)
    processes.wait()
    return result


def _share(job: Plan, processes: Processes) -> Sequence[Picture]:
    """The pictures of this process."""
    return job.folder.pictures[processes.index :: processes.count]


def _missing(job: Plan, processes: Processes, result: Result) -> Todo:
    """What this process has to make: of its share of the pictures the kinds that are not there."""
    kinds = job.folder.kinds
    missing = {
        picture: list(kinds) if job.overwrite else job.folder.missing_kinds(picture)
        for picture in _share(job, processes)
    }
    result.kept = sum(len(kinds) - len(missing_kinds) for missing_kinds in missing.values())
    return {picture: missing_kinds for picture, missing_kinds in missing.items() if missing_kinds}


def _loaded(job: Plan, todo: Todo, processes: Processes, report: FolderReport) -> dict[str, Preprocessor]:
    """The preprocessors of the kinds that are missing."""
    extractors = {}
    for kind in job.folder.kinds:
        if any(kind in missing_kinds for missing_kinds in todo.values()):
            report.status(f"loading the {kind} preprocessor")
            extractors[kind] = preprocessors.get(kind, **_options(job, kind, processes.device))
    return extractors


def _make_maps(
    job: Plan,
    todo: Todo,
    extractors: dict[str, Preprocessor],
    result: Result,
    report: FolderReport,
    *,
    share: int,
) -> None:
    """Make the maps of this process's share of the pictures, so many."""
    if not todo:
        return
    report.status(f"{', '.join(extractors)}: {len(todo)} of {share} pictures")
    done = 0

    def finished(picture: Picture, outcome: Outcome) -> None:
        nonlocal done
        done += 1
        result.made += outcome.made
        for kind in outcome.black:
            result.black.append(job.folder.map_path(kind, picture))
            if len(result.black) <= BLACK_NAMED:
                report.note(f"{result.black[-1]} is black: nothing was found that a picture could follow")
        if outcome.failure:
            result.failed.append((picture.path, outcome.failure))
            report.note(f"skipped: {outcome.failure}")
        report.progress(done, len(todo), f"{len(result.failed)} failed" if result.failed else "")

    pipeline = MapPipeline(job.folder, extractors, workers=job.workers, batch=job.batch)
    pipeline.run(todo, finished)


def _options(job: Plan, kind: str, device: str) -> dict[str, str]:
    """A kind's options; of several processes, each has its own device."""
    options = dict(job.folder.settings[kind])
    if device != "auto" and "device" in preprocessors.options_of(kind):
        options["device"] = device
    return options


def _finish(job: Plan, result: Result, report: FolderReport) -> None:
    """Write what there is one of."""
    if job.folder.has_pictures:
        counts = job.folder.write_metadata()
        for _, why in counts.failed:
            report.note(f"left out of {METADATA}: {why}")
        result.complete, result.without_caption = counts.complete, counts.without_caption
        result.failed += counts.failed
        result.written.append(job.folder.place / METADATA)
    else:
        result.complete = sum(not job.folder.missing_kinds(picture) for picture in job.folder.pictures)
    sheet = job.folder.write_sheet() if job.sheet else None
    if sheet is not None:
        result.written.append(sheet)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

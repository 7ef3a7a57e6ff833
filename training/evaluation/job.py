"""`controlkit evaluate`: from a checked request to report.html and report.json.

    request -> base and kinds -> pairs -> pictures and their scores -> summary -> report

Every picture and every score is kept when it is made, so the same command goes on where it stopped. Several
processes (`accelerate launch -m controlkit evaluate ...`) share the pairs; the first one writes the report.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from controlkit import files, images, known_adapters
from controlkit.adapters import load_adapter
from controlkit.base import Base, load_base
from controlkit.devices import pick_device
from controlkit.picture_sizes import MOST_CUT
from controlkit.processes import Processes
from controlkit.training.checkpoints import clear
from controlkit.training.evaluation import request as requests
from controlkit.training.evaluation.arms import Arm, arms_of
from controlkit.training.evaluation.estimating import (
    estimators,
    options_of,
    reasons_against,
    stated_options,
)
from controlkit.training.evaluation.held_out import HeldOut
from controlkit.training.evaluation.map_scores import LINES
from controlkit.training.evaluation.opening import open_held_out
from controlkit.training.evaluation.pass_over import Pass, asked_path, picture_path
from controlkit.training.evaluation.picture_scores import Shot, Shots, picture_scores
from controlkit.training.evaluation.request import TRUE, Compared, Request
from controlkit.training.evaluation.rows import Rows
from controlkit.training.evaluation.summary import Summary, summarise
from controlkit.training.evaluation.telling import sizes_told, table
from controlkit.training.evaluation.trained_on import trained_there
from controlkit.training.lock import locked
from controlkit.training.reporting.measures import EDGE_KINDS
from controlkit.training.reporting.showing import visible
from controlkit.training.reporting.wrong_maps import LOOKED_AT, wrong_maps

if TYPE_CHECKING:
    from controlkit.formats.description import AdapterInfo

PATIENCE = timedelta(hours=12)  # for processes that have more to do


class Report(Protocol):
    """How the job tells what it is doing."""

    def status(self, text: str) -> None:
        """What happens now."""

    def note(self, text: str) -> None:
        """Something worth knowing."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far it is."""


@dataclass(frozen=True, eq=False)
class Result:
    """What an evaluation gave. is_mine: whether this process, of several, tells it."""

    summary: Summary | None
    written: list[Path]
    is_mine: bool = True

    @property
    def lines(self) -> list[str]:
        """The summary for a terminal."""
        return [] if self.summary is None else table(self.summary)


def evaluate(request: Request, report: Report) -> Result:
    """Measure the request's adapters.

    Raises ValueError, one line: a model or data that is not there, an adapter that does not fit the base,
    maps whose kind cannot be told, or a folder that holds another evaluation, or in which one is running.
    """
    with ExitStack() as held:
        return _evaluate(request, Processes(patience=PATIENCE), held, report)


def _evaluate(request: Request, processes: Processes, held: ExitStack, report: Report) -> Result:
    """The same. held: until the end; the first process locks the folder there."""
    report.status(f"loading the libraries and the base {request.base}")
    base = _load_base(request, processes)
    request, infos, warnings = _with_kinds(request, base)
    specs = [info.map for info in infos]
    kinds = list(dict.fromkeys(one.kind for one in request.adapters))
    stated = {
        kind: stated_options(kind, request.base, [spec for spec in specs if spec.kind == kind])
        for kind in kinds
    }
    held_out = open_held_out(request, kinds, resolution=base.resolution, options=stated, report=report.note)
    skipped = reasons_against(kinds)
    options = {
        kind: options_of(kind, request, held_out, stated[kind], device=str(base.device))
        for kind in kinds
        if kind not in skipped
    }
    makers = estimators(options)
    arms = arms_of(list(request.adapters))
    if processes.is_first:
        request.output.mkdir(exist_ok=True)
        held.enter_context(locked(request.output, what="evaluation", instead="another -o"))
        clear(request.output)
        _begin(request, base, held_out, options)
    processes.wait()
    rows = Rows(request.output, processes.index)
    places = range(processes.index, len(held_out), processes.count)
    compared = f"{_many(len(arms) - 3, 'adapter')} on {held_out.title}, {sizes_told(held_out.sizes())}"
    report.status(f"{compared}, {_many(request.seeds, 'seed')}, on {base.device}")
    warnings += _cut(held_out)
    warnings += trained_there(request, infos)
    warnings += _wrong_maps(held_out) if processes.is_first else []
    for line in warnings if processes.is_first else ():
        report.note(line)
    mute = sum(not held_out.caption(place) for place in range(len(held_out)))
    if mute and processes.is_first:
        report.note(f"{mute} of {len(held_out)} pairs have no caption, and are drawn of an empty prompt")
    Pass(request, base, held_out, places, makers, rows, report.progress).run(arms)
    processes.wait()
    if not processes.is_first:
        processes.wait()
        return Result(None, [], is_mine=False)
    rows.read()
    result = _report(request, base, held_out, arms, rows, list(makers), skipped, options, warnings, report)
    processes.wait()
    return result


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + "s" * (count != 1)


def _load_base(request: Request, processes: Processes) -> Base:
    wanted = processes.device if request.device == "auto" else request.device
    device, dtype = pick_device(wanted, request.dtype, base=request.base)
    return load_base(request.base, device=device, dtype=dtype)


def _with_kinds(request: Request, base: Base) -> tuple[Request, list[AdapterInfo], list[str]]:
    """The request with the kind of every adapter's map, what the adapters say of themselves, and a line for
    each that learned another kind.
    """
    known: list[Compared] = []
    infos, lines = [], []
    for one in request.adapters:
        info = load_adapter(one.name, base=base).info  # that it fits is checked before the first picture
        kind = one.kind or info.map.kind
        if not kind or " + " in kind:
            raise ValueError(
                f"{one.name} takes {kind or 'maps of a kind that its file does not tell'}: say which maps it"
                f" is to be measured with, as --adapter canny={one.name}"
            )
        lines.append(known_adapters.learned_other(one.name, info.map.kind, kind))
        known.append(replace(one, kind=kind))
        infos.append(replace(info, map=replace(info.map, kind=kind)))
    return replace(request, adapters=tuple(known)), infos, [line for line in dict.fromkeys(lines) if line]


def _wrong_maps(held_out: HeldOut) -> list[str]:
    """A line for each thing that is wrong with maps from files: pictures are measured against them."""
    kinds = [kind for kind in held_out.kinds if kind not in held_out.settled]  # and not made of the pictures
    pairs = [held_out[place] for place in range(min(len(held_out), LOOKED_AT) if kinds else 0)]
    lines = []
    for kind in kinds:
        meant = {"empty"} if kind in (*EDGE_KINDS, *LINES) else set()  # black ones are counted in the end
        is_drawn = kind == "openpose" and any(pair.joints is not None for pair in pairs)
        maps = [] if is_drawn else [visible(pair.maps[kind]) for pair in pairs]
        lines += wrong_maps(kind, maps, meant=meant)
    return lines


def _black_maps(request: Request, held_out: HeldOut, numbers: Sequence[int]) -> list[str]:
    """A line for each kind of lines in whose maps there is none to follow, which lowers every mean alike."""
    lines = []
    for kind in (kind for kind in held_out.kinds if kind in (*EDGE_KINDS, *LINES)):
        paths = [asked_path(request, kind, number) for number in numbers]
        black = sum(path.is_file() and not images.load_map(path).any() for path in paths)
        if black:
            lines.append(
                f"{black} of {len(numbers)} {kind} maps are black: a picture with any line scores 0 there,"
                " whatever drew it"
            )
    return lines


def _cut(held_out: HeldOut) -> list[str]:
    """A line where more than a little of pictures lies outside of what is drawn and measured."""
    cuts = {place: held_out.cut(place) for place in range(len(held_out))}
    count, most = sum(cut > MOST_CUT for cut in cuts.values()), max(cuts, key=cuts.__getitem__)
    if not count:
        return []
    cure = "a smaller bucket_step or a larger bucket_ratio" if held_out.buckets else "buckets=true"
    return [
        f"{count} of {len(held_out)} pictures are cut to the sizes that are drawn ({cuts[most]:.0%} of"
        f" {held_out.name(most)} lies outside): {cure} keeps more of their shape"
    ]


def _begin(request: Request, base: Base, held_out: HeldOut, options: dict[str, dict[str, Any]]) -> None:
    """Write down what decides pictures and scores; refuse a folder in which something else decided."""
    told: dict[str, Any] = {
        "base": base.digest(),
        "device": f"{base.device.type}, {str(base.dtype).removeprefix('torch.')}",
        "pairs": held_out.marks(),
        "maps": {kind: held_out.map_marks(kind) for kind in held_out.kinds},
        "estimators": {
            kind: {key: str(value) for key, value in given.items() if key != "device"}
            for kind, given in options.items()
        },
    }
    before = requests.earlier(request)
    if before is not None:
        told = requests.joined(request, before, told)
    files.write_json(request.output / "settings.json", {"decides": request.decides, **told})


def _report(
    request: Request,
    base: Base,
    held_out: HeldOut,
    arms: Sequence[Arm],
    rows: Rows,
    kinds: list[str],
    skipped: dict[str, str],
    options: dict[str, dict[str, Any]],
    warnings: list[str],
    report: Report,
) -> Result:
    from controlkit.training.evaluation.page import write_page
    from controlkit.training.evaluation.record import record

    wanted = {held_out.number(place) for place in range(len(held_out))}
    found = {
        arm.folder: [
            row for row in rows.of_arm(arm.folder) if row.number in wanted and row.seed < request.seeds
        ]
        for arm in arms
    }
    pairs = held_out.told()
    shots: Shots = {
        arm.folder: [
            Shot(
                picture_path(request.output, arm, row.number, row.seed), row.number, pairs[row.number].caption
            )
            for row in found[arm.folder]
        ]
        for arm in arms
    }
    pictures = picture_scores(
        shots,
        true=next(arm.folder for arm in arms if arm.label == TRUE),
        folder=request.output / "features",
        features=request.features,
        clip=request.clip,
        device=base.device,
        report=report.status,
    )
    report.status("writing the report")
    summary = summarise(arms, found, kinds, pictures, skipped)
    black = _black_maps(request, held_out, sorted(wanted))
    for line in black:
        report.note(line)
    warnings = [*warnings, *black]
    told = record(request, base, held_out, summary, options, pairs, warnings)
    json_path = request.output / "report.json"
    files.write_text(json_path, json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    page = write_page(request, held_out, summary, told, pairs)
    return Result(summary, [page, json_path])

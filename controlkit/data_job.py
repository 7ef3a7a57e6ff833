"""`controlkit data check`: what a data set holds, and what of it cannot be trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from controlkit import files
from controlkit.silence import Silent

if TYPE_CHECKING:
    import numpy as np

    from controlkit.training.config_adapter import DataRecipe
    from controlkit.training.data.check import Check
    from controlkit.training.data.examples import Example, Examples, Piece
    from controlkit.training.data.map_use import MapUse

SHEET_PAIRS, SHEET_COLUMNS = 12, 6
NAMES = 5
"""How many pairs of each finding are named."""


class Report(Protocol):
    """Where progress goes."""

    def note(self, text: str) -> None:
        """Say something."""

    def progress(self, done: int, total: int) -> None:
        """Say how far it is."""


@dataclass(frozen=True)
class Result:
    """What a check gave: lines for the reader, the files written, the exit code."""

    lines: list[str]
    written: list[Path]
    code: int
    """0 where every pair can be used, else 1."""


def check_data(
    source: str,
    *,
    report: Report | None = None,
    kind: str = "",
    settings: Mapping[str, str] | None = None,
    sheet: str | None = None,
    json: str | None = None,
    lint: bool = True,
) -> Result:
    """Look at every pair of a data set.

    source: as `data.source` in a recipe. kind: of its maps, "" guesses. settings: further keys of the
    recipe's [data]. sheet, json: files for a contact sheet of some pairs, and for all findings.

    Raises ValueError, one line: no such data set, it is empty or its listing is broken, an unknown or wrong
    setting, or an output that cannot be written.
    """
    if source == "world":
        raise ValueError("the bundled world is drawn, not read: there is nothing to check")
    from controlkit.training.data.source_recipe import recipe_of

    report = report or Silent()
    if settings and "map" in settings:
        raise ValueError(f"the kind of map is given as an option here: --map {settings['map']}")
    data = recipe_of(source, kind, settings or {}, where="data check")
    for output in (sheet, json):
        if output:
            files.check_writable(output)
    if sheet and Path(sheet).suffix.lower() != ".png":
        raise ValueError(f"the contact sheet {sheet} must end in .png")
    from controlkit.training.data.check import check_examples
    from controlkit.training.data.sources import open_examples

    examples = open_examples(data, kind=kind, report=report.note)
    _check_kind(kind, examples, data, lint=lint, report=report)
    check = check_examples(
        examples, data=data, kind=kind, lint=lint, report=lambda _: None, progress=report.progress
    )
    written = []
    if sheet and write_sheet(sheet, examples, check, data=data, kind=kind):
        written.append(Path(sheet))
    if json:
        files.write_json(json, as_json(check))
        written.append(Path(json))
    lines = [*check.table(NAMES), "", _verdict(check, data)]
    return Result(lines, written, 1 if check.errors else 0)


def _check_kind(kind: str, examples: Examples, data: DataRecipe, *, lint: bool, report: Report) -> None:
    """Refuse a kind whose maps are not there and cannot be made; say if they cannot be looked through."""
    from controlkit import naming, preprocessors
    from controlkit.preprocessors.linting import KINDS

    if kind and not examples[0].maps and kind not in preprocessors.names():
        problem = naming.unknown("map", kind, preprocessors.names())
        raise ValueError(f"{data.source} has no maps, and none can be made: {problem}")
    if kind and lint and kind not in KINDS:
        report.note(f"note: mistakes in {kind} maps are not known; the maps are only opened")


def as_json(check: Check) -> dict[str, Any]:
    """Return all that was found, as JSON."""
    return {
        "pairs": len(check.sizes),
        "usable": len(check.usable),
        "captioned": check.captioned,
        "mapped": check.mapped,
        "seconds": round(check.seconds, 3),
        "counts": check.counts,
        "findings": [asdict(found) for found in check.findings],
    }


def write_sheet(path: str, examples: Examples, check: Check, *, data: DataRecipe, kind: str) -> bool:
    """Write a contact sheet of some of the pairs, picture beside map; False where none can be shown."""
    from controlkit.images import write_png
    from controlkit.sheets import contact_sheet

    step = max(1, -(-len(check.usable) // SHEET_PAIRS))
    pairs = [_cells(examples[index], data, kind) for index in check.usable[::step]]
    if not pairs:
        return False
    beside = max(1, SHEET_COLUMNS // max(map(len, pairs)))  # pairs in a row
    rows = [list(chain(*pairs[start : start + beside])) for start in range(0, len(pairs), beside)]
    write_png(path, contact_sheet(rows))
    return True


def _cells(example: Example, data: DataRecipe, kind: str) -> list[tuple[np.ndarray, str]]:
    """The picture above its file's name, then its maps, the first above the caption."""
    from controlkit import images
    from controlkit.training.data.check import uses_for

    picture = images.load_picture(example.picture.read())
    uses = uses_for(example, data, kind)
    maps = [_map_pixels(piece, use, picture) for piece, use in zip(example.maps, uses, strict=True)]
    labels = [
        Path(example.name).name,
        example.caption,
        *(Path(piece.name).name for piece in example.maps[1:]),
    ]
    return list(zip([picture, *maps], labels, strict=False))


def _map_pixels(piece: Piece, use: MapUse, picture: np.ndarray) -> np.ndarray:
    from controlkit import images, preprocessors
    from controlkit.training.data.map_files import is_json, is_numbers, read_joints

    content = piece.read()
    if is_numbers(content):
        return replace(use, grey=False).levels(content, piece.name)
    if isinstance(content, bytes) and is_json(content):
        height, width = picture.shape[:2]
        return preprocessors.poses_to_map(read_joints(content, piece.name, width=width, height=height)).image
    return images.load_picture(content)


def _verdict(check: Check, data: DataRecipe) -> str:
    count, bad = len(check.sizes), len(check.sizes) - len(check.usable)
    rate = f" in {check.seconds:.1f} s"
    if not bad:
        return f"looked at {count:,} pairs{rate}: all can be used"
    if bad == count:
        return f"looked at {count:,} pairs{rate}: none of them can be used"
    left_out = "leaves" if data.bad == "skip" else "would leave"
    return f"looked at {count:,} pairs{rate}: {bad:,} cannot be used (data.bad=skip {left_out} them out)"

"""Splits that are folders of pictures: train/ is not trained on together with the test/ beside it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from controlkit.naming import did_you_mean
from controlkit.training.config_adapter import DataRecipe

_NAMES = {
    "train": ("train", "training", "trainset"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "testset", "eval", "evaluation"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_YEAR = re.compile(r"[-_]?\d{4}$")  # COCO's train2017


def split_named(folder: str) -> str:
    """The split that a folder's name says it holds: "train", "validation" or "test"; "" for none."""
    return _SPLITS.get(_YEAR.sub("", folder.casefold()), "")


def folders_of(split: str, folders: Iterable[str]) -> list[str]:
    """The folders that hold a split: those of its name, whatever their case, or else of a name for it."""
    names = list(folders)
    same = [name for name in names if name.casefold() == split.casefold()]
    return same or [name for name in names if split_named(name) == split_named(split) != ""]


def is_named(data: DataRecipe) -> bool:
    """Whether a recipe names a split other than the one that is meant unless something is said."""
    return data.split != DataRecipe.model_fields["split"].default


def take_split(
    names: Sequence[str], data: DataRecipe, where: Path, report: Callable[[str], None]
) -> Sequence[str]:
    """The pictures of the split that is wanted, of names below a folder: those in its folder, where folders
    of other splits stand beside it, here or in the one folder that holds all (data/train/). A split that is
    named (`data.split`) has a folder.

    Raises ValueError, one line: it has none.
    """
    above = _above(names, data.split)
    tops = [_top(name.removeprefix(above)) for name in names]
    folders = sorted({top for top in tops if top})
    wanted = folders_of(data.split, folders)
    if is_named(data) and not wanted:
        hint = did_you_mean(data.split, folders)
        raise ValueError(
            f"data.split: {where / above} has no folder {data.split!r} with pictures{hint}; folders: "
            f"{', '.join(folders[:8]) or 'none'}"
        )
    if is_named(data):
        left = {*tops} - {*wanted}
    else:
        left = {top for top in folders if wanted and top not in wanted and split_named(top)}
    kept = [name for name, top in zip(names, tops, strict=True) if top not in left]
    if left:
        listed = ", ".join(f"{top}/" if top else "no folder" for top in sorted(left)[:8])
        count = len(names) - len(kept)
        report(f"{where / above}: of the split {data.split}; {count:,} pictures in {listed} are left out")
    return kept


def _above(names: Sequence[str], split: str) -> str:
    """The folder that holds all pictures and is no split, as "data/"; "" where there is none."""
    above = ""
    while True:
        tops = {_top(name.removeprefix(above)) for name in names}
        top = tops.pop() if len(tops) == 1 else ""
        if not top or split_named(top) or folders_of(split, [top]):
            return above
        above += f"{top}/"


def _top(name: str) -> str:
    """The first folder of a name, "" where it has none."""
    return name.partition("/")[0] if "/" in name else ""

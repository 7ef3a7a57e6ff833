"""Paired folders (kohya's layout): pictures with captions beside them, and maps of the same names elsewhere.

ROOT/a.jpg, or ROOT/images/a.jpg     the pictures, in folders below that, too
ROOT/a.txt, ROOT/a.caption           their captions, beside them
ROOT/conditioning/a.png              their maps: the same name, in a folder named so, or after their kind

A map may be a picture, depth in numbers (a.npy, a.exr ...), or a pose (a.json, or a_keypoints.json, as
OpenPose names it).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from controlkit import preprocessors
from controlkit.naming import did_you_mean
from controlkit.picture_files import CAPTION_SUFFIXES, DEPTH_SUFFIXES, SUFFIXES
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Piece
from controlkit.training.data.source_columns import about_maps
from controlkit.training.data.source_files import (
    InsideFile,
    LazyExamples,
    Leftover,
    RefusedPiece,
    read_caption,
    walk,
)

PICTURE_FOLDERS = ("images", "image", "pictures", "photos", "img", "imgs", "target", "targets")
MAP_FOLDERS = (
    "conditioning",
    "conditioning_images",
    "conditioning_image",
    "conditioning_data",
    "conditioning_data_dir",
    "control",
    "controls",
    "control_images",
    "maps",
    "map",
    "hint",
    "hints",
    "cond",
    "source",
    "sources",
)
POSES = ".json"
_SORTS = (SUFFIXES, DEPTH_SUFFIXES, {POSES})
_OPENPOSE = "_keypoints"
"""What OpenPose adds to a picture's name."""
SHEET = "sheet.png"
"""The contact sheet that `controlkit preprocess --sheet` leaves at the top: no picture of the data set."""

_REPEATS = re.compile(r"[1-9]\d{0,2}_[^/]+/")


def open_pairs(
    root: Path, *, data: DataRecipe, kind: str, report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open a folder of pictures and, if there is one, its folder of maps; reads nothing but names.

    A picture's map has its name (and folder below), with the suffix of a picture, of depth in numbers, or of
    a pose. Captions are read when the example is asked for, and kept.

    Raises ValueError, one line: a folder that is named is not there, maps of several kinds stand side by
    side and none was named, a folder is a link that leads out, or maps are wanted and there are none.
    """
    folders = _folders(root)
    place = _picture_folder(folders, data, root)
    maps = _map_folders([name for name in folders if name != place], data=data, kind=kind, root=root)
    pictures = _pictures(root, place, folders, maps)
    report(f"{root}: {len(pictures):,} pictures, {about_maps([f'{name}/' for name in maps], kind)}")
    repeated = next((name for name in pictures if _REPEATS.match(name)), None)
    if repeated is not None:
        report(
            f"{root}: {repeated.partition('/')[0]}/ is named as kohya's folders with repeats are; here every"
            " picture is seen once in an epoch"
        )
    if not pictures:
        return LazyExamples(0, _no_example)
    if not maps and not place:
        _refuse_unknown_maps(root, pictures, kind)
    stems = Counter(_stem(Path(name).name) for name in pictures)
    known = {*stems, *map(_stem, pictures)}
    partners = [(name, _by_stem(walk(root / name, root), known)) for name in maps]
    captions: dict[int, str] = {}

    def make(index: int) -> Example:
        name = pictures[index]
        picture: Piece = InsideFile(root / place / name, root)
        found = tuple(
            _partner(name, files, root / folder, root, alone=stems[_stem(Path(name).name)] == 1)
            for folder, files in partners
        )
        try:
            if index not in captions:
                captions[index] = _caption_beside(root / place / name, root)
        except ValueError as error:
            picture = RefusedPiece(name, str(error))
        shown = f"{place}/{name}" if place else name
        return Example(shown, picture, captions.get(index, "") or data.caption, found)

    def leftovers() -> list[Leftover]:
        return [left for folder, files in partners for left in _orphans(folder, files, pictures, stems)]

    return LazyExamples(len(pictures), make, leftovers)


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except OSError as error:
        raise ValueError(f"the folder {root} cannot be read: {error.strerror}") from error


def _no_example(index: int) -> Example:
    raise IndexError(index)


def _picture_folder(folders: Sequence[str], data: DataRecipe, root: Path) -> str:
    """The folder with the pictures, relative to the root; "" is the root itself."""
    if data.picture_column:
        return _named(folders, data.picture_column, "picture_column", root)
    return next((name for name in PICTURE_FOLDERS if name in folders), "")


def _map_folders(folders: Sequence[str], *, data: DataRecipe, kind: str, root: Path) -> tuple[str, ...]:
    if data.maps == "made":
        return ()
    if data.map_column:
        return tuple(_named(folders, name, "map_column", root) for name in data.map_column)
    if kind and kind in folders:
        return (kind,)
    kinds = [name for name in folders if name in preprocessors.names()]
    usual = [name for name in folders if name.casefold() in MAP_FOLDERS]
    found = usual or ([] if kind else kinds)
    if len(found) > 1:
        raise ValueError(
            f"{root} has several folders that may hold the maps: name one with data.map_column: "
            f"{', '.join(found)}"
        )
    if not found and data.maps == "files":
        raise ValueError(
            f"{root} has no folder with maps{f' of {kind}' * bool(kind)}: name it with data.map_column, or "
            f"have maps made with data.maps=made; folders: {', '.join(folders) or 'none'}"
        )
    return tuple(found)


def _named(folders: Sequence[str], name: str, option: str, root: Path) -> str:
    if name.strip("/") not in folders:
        hint = did_you_mean(name, folders)
        listed = ", ".join(folders) or "none"
        raise ValueError(f"data.{option}: {root} has no folder {name!r}{hint}; folders: {listed}")
    return name.strip("/")


def _pictures(root: Path, place: str, folders: Sequence[str], maps: Sequence[str]) -> list[str]:
    """Names of the pictures, relative to their folder, sorted. Folders of maps do not count."""
    closed = {
        *maps,
        *(name for name in folders if name.casefold() in MAP_FOLDERS or name in preprocessors.names()),
    }
    names = walk(root / place, root)
    return sorted(
        name
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES
        and (place or (name.partition("/")[0] not in closed and name != SHEET))
    )


def _refuse_unknown_maps(root: Path, pictures: Sequence[str], kind: str) -> None:
    """Refuse a folder beside the pictures that has their names and no captions, where they have captions: it
    holds their maps, more likely than more pictures.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in pictures:
        folder, _, rest = name.rpartition("/")
        groups.setdefault(folder, {})[_stem(rest)] = name
    if len(groups) == 1:  # nothing lies beside them, and captions need not be looked for
        return
    captioned = [folder for folder, names in groups.items() if _has_caption(root, names.values())]
    for folder, names in groups.items():
        whose = next((one for one in captioned if names.keys() <= groups[one].keys()), None)
        if folder and whose is not None and folder not in captioned:
            shown = f"{whose}/" if whose else "its pictures"
            raise ValueError(
                f"{root}: {folder}/ has pictures named like {shown} and no captions: if these are the maps"
                f"{f' of {kind}' * bool(kind)}, say so with data.map_column={folder}; if not, move it away"
            )


def _has_caption(root: Path, names: Iterable[str]) -> bool:
    places = ((root / name).with_suffix(suffix) for name in names for suffix in CAPTION_SUFFIXES)
    return any(map(os.path.isfile, places))  # pathlib raises for a name that is too long


def _stem(name: str) -> str:
    """A name without suffix, to be compared: one system writes ü as a letter, another as u and two dots."""
    return unicodedata.normalize("NFC", os.path.splitext(name)[0])


def _by_stem(names: Iterable[str], pictures: set[str]) -> dict[str, list[str]]:
    """The files of a folder of maps by the name without suffix that their pictures have; of several sorts,
    pictures go before depth in numbers, and these before poses.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if _rank(name) < len(_SORTS):
            stem = _stem(name)
            if name.lower().endswith(f"{_OPENPOSE}{POSES}") and stem not in pictures:
                stem = stem[: -len(_OPENPOSE)]
            found.setdefault(stem, []).append(name)
    for stem, files in found.items():
        first = min(map(_rank, files))
        found[stem] = [name for name in files if _rank(name) == first]
    return found


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return next((rank for rank, suffixes in enumerate(_SORTS) if suffix in suffixes), len(_SORTS))


def _partner(name: str, files: dict[str, list[str]], folder: Path, root: Path, *, alone: bool) -> Piece:
    """The map of a picture: of its name and folder below; where only one picture has the name, of that."""
    stem = _stem(name)
    found = files.get(_key(name, files, alone=alone), [])
    if len(found) == 1:
        return InsideFile(folder / found[0], root)
    where = f"{folder / stem}"
    if found:
        return RefusedPiece(where, f"{folder} has several maps for {name}: {', '.join(found)}")
    problem = (
        f"{folder} has no map for {name}: a file {stem}.png, .jpg ... is wanted (for depth .npy, .exr"
        " ..., for poses .json, too)"
    )
    cure = "bring the maps, take the pictures out, or have maps made of the pictures (data.maps=made)"
    return RefusedPiece(where, problem, "no map", cure)


def _key(name: str, files: dict[str, list[str]], *, alone: bool) -> str:
    """Under which name without suffix the map of a picture lies, if there is one."""
    stem = _stem(name)
    return _stem(Path(name).name) if alone and stem not in files else stem


def _orphans(
    folder: str, files: dict[str, list[str]], pictures: Sequence[str], stems: Counter[str]
) -> list[Leftover]:
    """The maps of a folder that belong to no picture."""
    taken = {_key(name, files, alone=stems[_stem(Path(name).name)] == 1) for name in pictures}
    names = [f"{folder}/{name}" for stem, found in files.items() if stem not in taken for name in found]
    cure = "bring its picture back, or delete the map"
    return [Leftover(name, True, f"{name} is the map of no picture", cure) for name in names]


def _caption_beside(picture: Path, root: Path) -> str:
    for suffix in CAPTION_SUFFIXES:
        beside = picture.with_suffix(suffix)
        if beside.is_file():
            return read_caption(InsideFile(beside, root))
    return ""

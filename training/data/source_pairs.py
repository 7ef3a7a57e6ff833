"""Paired folders (kohya's layout): pictures with captions beside them, and maps of the same names elsewhere.

ROOT/a.jpg, or ROOT/images/a.jpg     the pictures, in folders below that, too
ROOT/a.txt, ROOT/a.caption           their captions, beside them
ROOT/conditioning/a.png              their maps: the same name, in a folder named so, or after their kind
ROOT/a_canny.png                     or beside them, the name followed by the kind

A map may be a picture, depth in numbers (a.npy, a.exr ...), or a pose (a.json, or a_keypoints.json, as
OpenPose names it).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlkit import preprocessors
from controlkit.map_sizes import sense_of
from controlkit.naming import did_you_mean
from controlkit.picture_files import DEPTH_SUFFIXES, SUFFIXES, caption_file, stem_of
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Piece
from controlkit.training.data.source_columns import about_maps
from controlkit.training.data.source_doubts import (
    MAP_FOLDERS,
    PICTURE_FOLDERS,
    REPEATS,
    choose_ending,
    find_folder,
    is_ending,
    refuse_folders_of_maps,
    refuse_unknown_maps,
    usual_endings,
    with_ending,
)
from controlkit.training.data.source_files import (
    InsideFile,
    LazyExamples,
    Leftover,
    RefusedPiece,
    is_run,
    leads_out,
    read_caption,
    walk,
)
from controlkit.training.data.source_splits import folders_of, is_named, split_named, take_split

POSES = ".json"
_SORTS = (SUFFIXES, DEPTH_SUFFIXES, {POSES})
_OPENPOSE = "_keypoints"
"""What OpenPose adds to a picture's name."""
SHEET = "sheet.png"
"""The contact sheet that `controlkit preprocess --sheet` leaves at the top: no picture of the data set."""


def open_pairs(
    root: Path, *, data: DataRecipe, kind: str, report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open a folder of pictures and, if there is one, its folder of maps; reads nothing but names.

    A picture's map has its name (and folder below), with the suffix of a picture, of depth in numbers, or of
    a pose. Captions are read when the example is asked for, and kept.

    A folder of the split's name (`data.split`), or the only one, is opened itself where the folders of
    pictures and maps lie in it; of pictures in folders of several splits those of `data.split` are taken
    (`take_split`). Maps may lie beside their pictures, too, told apart by the end of their names, which
    `map_column` may name (a_canny.png: "_canny"; a.jpg and a.png: ".png").

    Raises ValueError, one line: a folder that is named is not there, a column of captions is named, maps of
    several kinds stand side by side and none was named, a folder is a link that leads out, maps are wanted
    and there are none, or pictures may be the maps of others.
    """
    if data.caption_column:
        raise ValueError(
            f"data.caption_column={data.caption_column}: {root} is a folder of pictures, whose captions are"
            " read from files beside them (NAME.txt, NAME.caption): bring them there, and leave it out"
        )
    root, is_split = _folder_of_split(root, data, kind)
    folders = _folders(root)
    place = _picture_folder(folders, data, root)
    rest = [name for name in folders if name != place]
    maps = _map_folders(rest, data=data, kind=kind, root=root)
    in_folders = [name for name in maps if name in rest]
    files = _files(root, place, folders, in_folders, report)
    pictures = [name for name in files if _rank(name) == 0]
    if not maps and data.maps != "made":
        candidates = [name for name in files if _rank(name) == 1] if sense_of(kind) == "depth" else []
        end = choose_ending([*pictures, *candidates], kind=kind, root=root / place)
        maps = (end,) if end else ()
    if not maps and data.maps == "files":
        _refuse_none(folders, kind, root)
    ends = [name for name in maps if name not in in_folders]
    beside = {end: with_ending(pictures, end) or with_ending(files, end) for end in ends}
    unused = _unused_maps(rest, pictures, kind) if data.maps == "made" else []
    pictures, left_out = _without_maps(pictures, beside.values(), all_kinds=not in_folders)
    shown = [f"{name}/" if name in in_folders else f"files that end in {name}" for name in maps]
    report(f"{root}: {len(pictures):,} pictures, {about_maps(shown, kind, unused)}")
    if left_out and not unused:
        report(
            f"{root}: {len(left_out):,} are left out as maps of others by their names, such as {left_out[0]}"
        )
    _say_repeats(root, pictures, report)
    _say_unused(root, place, report)
    is_split = is_split or bool(folders_of(data.split, [place]))
    chosen = pictures if is_split else take_split(pictures, data, root / place, report)
    if not pictures:
        return LazyExamples(0, _no_example)
    if not maps:
        if data.maps != "made":
            used = set() if place else {name.partition("/")[0] for name in pictures}
            refuse_folders_of_maps(root, place, [name for name in rest if name not in used], pictures, kind)
        refuse_unknown_maps(root / place, chosen, data=data, kind=kind)
    partners = [
        _beside(place, beside[name]) if name in beside else _in_folder(root, name, pictures, kind)
        for name in maps
    ]
    return _pairs(root, place, chosen, partners, data, named=pictures)


@dataclass(frozen=True)
class _Partners:
    """Maps of pictures."""

    folder: str
    files: dict[str, list[str]]
    """By the name without suffix that their pictures have."""
    stems: Counter[str] | None
    """How many pictures have a name, whatever their folder; None where a map lies beside its picture."""

    def key(self, name: str) -> str:
        """Under which name without suffix the map of a picture lies, if there is one."""
        stem = stem_of(name)
        bare = stem_of(Path(name).name)
        is_alone = self.stems is not None and self.stems[bare] == 1
        return bare if is_alone and stem not in self.files else stem


def _beside(place: str, files: Mapping[str, str]) -> _Partners:
    return _Partners(place, {stem: [name] for stem, name in files.items()}, None)


def _in_folder(root: Path, folder: str, pictures: Sequence[str], kind: str) -> _Partners:
    stems = Counter(stem_of(Path(name).name) for name in pictures)
    known = {*stems, *map(stem_of, pictures)}
    ends = tuple(f"{mark}{word}" for mark in "_-" for word in {kind, folder.casefold()} if word)
    return _Partners(folder, _by_stem(walk(root / folder, root), known, ends), stems)


def _pairs(
    root: Path,
    place: str,
    pictures: Sequence[str],
    partners: Sequence[_Partners],
    data: DataRecipe,
    *,
    named: Sequence[str],
) -> LazyExamples:
    """Pictures with their captions and maps. named: all pictures that maps may belong to."""
    captions: dict[int, str] = {}

    def make(index: int) -> Example:
        name = pictures[index]
        picture: Piece = InsideFile(root / place / name, root)
        found = tuple(_partner(name, maps, root) for maps in partners)
        try:
            if index not in captions:
                captions[index] = _caption_beside(root / place / name, root)
        except ValueError as error:
            picture = RefusedPiece(name, str(error))
        shown = f"{place}/{name}" if place else name
        return Example(shown, picture, captions.get(index, "") or data.caption, found)

    def leftovers() -> list[Leftover]:
        return [left for maps in partners for left in _orphans(maps, named)]

    return LazyExamples(len(pictures), make, leftovers)


def _folder_of_split(root: Path, data: DataRecipe, kind: str) -> tuple[Path, bool]:
    """The folder that holds those of pictures and maps: the one given, or the one of the split in it; and
    whether it is that of the split.
    """
    folders = _folders(root)
    columns = (name.strip("/") for name in (data.picture_column, *data.map_column))
    named = [name for name in columns if name and not is_ending(name)]
    known = named or [*PICTURE_FOLDERS, *MAP_FOLDERS, *([kind] if kind else [])]
    if find_folder(known, folders) or any(_is_picture(name) for name in os.listdir(root)):
        return root, False
    of_split = folders_of(data.split, folders)
    alone = [name for name in folders if len(folders) == 1 and not (is_named(data) and split_named(name))]
    inside = next(iter(of_split or alone), "")
    wanted = named or [*MAP_FOLDERS, *([kind] if kind else preprocessors.names())]
    if not inside or leads_out(root / inside, root) or not find_folder(wanted, _folders(root / inside)):
        return root, False
    return root / inside, bool(of_split)


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES and name != SHEET and not name.startswith(".")


def _folders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.is_dir() and not entry.name.startswith(".") and not is_run(Path(entry.path))
            )
    except OSError as error:
        raise ValueError(f"the folder {root} cannot be read: {error.strerror}") from error


def _say_repeats(root: Path, pictures: Sequence[str], report: Callable[[str], None]) -> None:
    repeated = next((name for name in pictures if REPEATS.match(name)), None)
    if repeated is not None:
        report(
            f"{root}: {repeated.partition('/')[0]}/ is named as kohya's folders with repeats are; here every"
            " picture is seen once in an epoch"
        )


def _say_unused(root: Path, place: str, report: Callable[[str], None]) -> None:
    beside = sorted(filter(_is_picture, os.listdir(root))) if place else []
    if beside:
        report(
            f"{root}: {len(beside):,} pictures beside the folder {place}/ are not used, such as {beside[0]}"
        )


def _no_example(index: int) -> Example:
    raise IndexError(index)


def _picture_folder(folders: Sequence[str], data: DataRecipe, root: Path) -> str:
    """The folder with the pictures, relative to the root; "" is the root itself."""
    if data.picture_column:
        return _named(folders, data.picture_column, "picture_column", root)
    return find_folder(PICTURE_FOLDERS, folders)


def _map_folders(folders: Sequence[str], *, data: DataRecipe, kind: str, root: Path) -> tuple[str, ...]:
    """The folders with the maps; of what the recipe names also ends of files' names."""
    if data.maps == "made":
        return ()
    if data.map_column:
        return tuple(
            name if is_ending(name) and name not in folders else _named(folders, name, "map_column", root)
            for name in data.map_column
        )
    found = _usual_folders(folders, kind)
    if len(found) > 1:
        raise ValueError(
            f"{root} has several folders that may hold the maps: name one with data.map_column: "
            f"{', '.join(found)}"
        )
    return tuple(found)


def _usual_folders(folders: Sequence[str], kind: str) -> list[str]:
    """The folders that hold maps by their names: one of the kind, or those of usual names."""
    if kind and (of_kind := find_folder([kind], folders)):
        return [of_kind]
    usual = [name for name in folders if name.casefold() in MAP_FOLDERS]
    return usual or ([] if kind else [name for name in folders if name.casefold() in preprocessors.names()])


def _refuse_none(folders: Sequence[str], kind: str, root: Path) -> None:
    raise ValueError(
        f"{root} has no folder with maps{f' of {kind}' * bool(kind)}: name it with data.map_column, or "
        f"have maps made with data.maps=made; folders: {', '.join(folders) or 'none'}"
    )


def _unused_maps(folders: Sequence[str], pictures: Sequence[str], kind: str) -> list[str]:
    """Maps that are there, for messages, where the recipe has maps made."""
    of_kind = [end for end in usual_endings(pictures) if not kind or end[1:] not in preprocessors.names()]
    of_kind += [end for end in usual_endings(pictures) if kind and end[1:] == kind]
    return [
        *(f"{name}/" for name in _usual_folders(folders, kind)),
        *(f"what ends in {end}" for end in of_kind),
    ]


def _without_maps(
    names: Sequence[str], beside: Iterable[Mapping[str, str]], *, all_kinds: bool
) -> tuple[list[str], list[str]]:
    """The pictures that are no maps, and the maps that are not taken: of other kinds, as their names say.

    all_kinds: whether such ends of names are looked for.
    """
    taken = {name for files in beside for name in files.values()}
    others = usual_endings(names) if all_kinds else []
    left_out = {name for end in others for name in with_ending(names, end).values()} - taken
    return [name for name in names if name not in taken | left_out], sorted(left_out)


def _named(folders: Sequence[str], name: str, option: str, root: Path) -> str:
    if name.strip("/") not in folders:
        hint = did_you_mean(name, folders)
        listed = ", ".join(folders) or "none"
        raise ValueError(f"data.{option}: {root} has no folder {name!r}{hint}; folders: {listed}")
    return name.strip("/")


def _files(
    root: Path, place: str, folders: Sequence[str], maps: Sequence[str], report: Callable[[str], None]
) -> list[str]:
    """Names of the pictures, and of what else may be a map beside them, relative to their folder, sorted.
    Folders of maps do not count, nor what trainings wrote, which is told.
    """
    closed = {
        *maps,
        *(name for name in folders if name.casefold() in (*MAP_FOLDERS, *preprocessors.names())),
    }
    runs: list[str] = []
    found = sorted(
        name
        for name in walk(root / place, root, run=runs.append)
        if _rank(name) < len(_SORTS) and (place or (name.partition("/")[0] not in closed and name != SHEET))
    )
    if runs:
        more = f" and {len(runs) - 1:,} more" if len(runs) > 1 else ""
        report(f"{root / place}: {min(runs)}{more} left out: trainings wrote them (a config.toml is there)")
    return found


def _by_stem(names: Iterable[str], pictures: set[str], ends: tuple[str, ...]) -> dict[str, list[str]]:
    """The files of a folder of maps by the name without suffix that their pictures have; of several sorts,
    pictures go before depth in numbers, and these before poses. ends: what may follow the picture's name.
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if _rank(name) < len(_SORTS):
            stem = stem_of(name)
            if name.lower().endswith(f"{_OPENPOSE}{POSES}") and stem not in pictures:
                stem = stem[: -len(_OPENPOSE)]
            bare = (stem[: -len(end)] for end in ends if stem.casefold().endswith(end))
            if stem not in pictures:
                stem = next((name for name in bare if name in pictures), stem)
            found.setdefault(stem, []).append(name)
    for stem, files in found.items():
        first = min(map(_rank, files))
        found[stem] = [name for name in files if _rank(name) == first]
    return found


def _rank(name: str) -> int:
    suffix = os.path.splitext(name)[1].lower()
    return next((rank for rank, suffixes in enumerate(_SORTS) if suffix in suffixes), len(_SORTS))


def _partner(name: str, maps: _Partners, root: Path) -> Piece:
    """The map of a picture: of its name and folder below; where only one picture has the name, of that."""
    stem, folder = stem_of(name), root / maps.folder
    found = maps.files.get(maps.key(name), [])
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


def _orphans(maps: _Partners, pictures: Sequence[str]) -> list[Leftover]:
    """The maps of a folder that belong to no picture."""
    taken = {maps.key(name) for name in pictures}
    left = [name for stem, found in maps.files.items() if stem not in taken for name in found]
    names = [f"{maps.folder}/{name}" if maps.folder else name for name in left]
    cure = "bring its picture back, or delete the map"
    return [Leftover(name, True, f"{name} is the map of no picture", cure) for name in names]


def _caption_beside(picture: Path, root: Path) -> str:
    beside = caption_file(picture)
    return "" if beside is None else read_caption(InsideFile(beside, root))

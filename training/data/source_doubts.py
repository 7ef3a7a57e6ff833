"""Pictures that may be the maps of others: told apart by their names where these leave no doubt, else asked
about.

Maps that are taken for pictures are trained on as such, and maps that are passed over are made anew: neither
shows in the result for a long time.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from controlkit import preprocessors
from controlkit.map_sizes import sense_of
from controlkit.picture_files import DEPTH_SUFFIXES, SUFFIXES, caption_file, stem_of
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.source_columns import MAP_FILES
from controlkit.training.data.source_files import walk

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
REPEATS = re.compile(r"[1-9]\d{0,2}_[^/]+/")
"""A folder named as kohya's with repeats."""
_MAP_ENDS = ("conditioning_image", "conditioning", "cond", "control_image", "control", "hint", "map")
_MAYBE_ENDS = (
    "condition",
    "edge",
    "edges",
    "label",
    "labels",
    "mask",
    "masks",
    "seg",
    "segmentation",
    "sketch",
)
_MAP_WORDS = {
    *" ".join((*_MAP_ENDS, *_MAYBE_ENDS, *MAP_FOLDERS)).replace("_", " ").split(),
    "annotations",
} - {*("data", "dir", "image", "images")}
_PICTURE_WORDS = {*PICTURE_FOLDERS, "color", "colour", "original", "originals", "photo", "picture", "rgb"}
_MOST = 0.5  # of a folder's files that are named like pictures: then they belong to these


# --- maps beside their pictures, told apart by the end of their names ---


def is_ending(name: str) -> bool:
    """Whether a name that a recipe gives for the maps is the end of their files' names: "_canny", ".png"."""
    return name[:1] in ("_", "-", ".") and "/" not in name


def with_ending(names: Sequence[str], ending: str) -> dict[str, str]:
    """The files whose names are those of pictures with this end, by the picture's name without suffix.

    An end that is a suffix takes all files that have it.
    """
    wanted = ending.casefold()
    if wanted in MAP_FILES:
        return {stem_of(name): name for name in names if os.path.splitext(name)[1].lower() == wanted}
    stems = {stem_of(name): name for name in names}
    cut = len(ending)
    return {
        stem[:-cut]: name
        for stem, name in stems.items()
        if stem[-cut:].casefold() == wanted and stem[:-cut] in stems
    }


def usual_endings(names: Sequence[str]) -> list[str]:
    """The ends of names that only maps have, among pictures that lie together."""
    return _endings(names, (*preprocessors.names(), *_MAP_ENDS))


def choose_ending(names: Sequence[str], *, kind: str, root: Path) -> str:
    """The end of names that the maps of a kind have; "" where there is none.

    Raises ValueError, one line with what decides it: pictures lie beside others of their names, and it cannot
    be told whether they are the maps.
    """
    usual = usual_endings(names)
    of_kind = [end for end in usual if end[1:] == kind or end[1:] in _MAP_ENDS or not kind]
    of_kind.sort(key=lambda end: end[1:] != kind)
    if of_kind and (of_kind[0][1:] == kind or len(of_kind) == 1):
        taken = with_ending(names, of_kind[0])
        others = {name for end in usual for name in with_ending(names, end).values()}
        if len(taken) >= _MOST * len(set(names) - others):
            return of_kind[0]
    for end in [*of_kind, *_endings(names, _MAYBE_ENDS)]:
        stem, name = next(iter(with_ending(names, end).items()))
        picture = next(other for other in names if stem_of(other) == stem)
        made = "to leave them out" if end in of_kind else "if all are pictures"
        raise ValueError(_asked(f"{root}: {name} lies beside {picture}", end, kind, made))
    for first, second in _twins(names):
        end = os.path.splitext(second)[1].lower()
        raise ValueError(
            _asked(f"{root}: {first} and {second} have one name", end, kind, "if all are pictures")
        )
    return ""


def _asked(what: str, end: str, kind: str, made: str) -> str:
    return (
        f"{what}: if what ends in {end} are the maps{f' of {kind}' * bool(kind)}, say so with"
        f" data.map_column={end}; {made}, with data.maps=made"
    )


def _endings(names: Sequence[str], words: Iterable[str]) -> list[str]:
    """Which of these words, after "_" or "-", end names that are those of other files before that."""
    shape = re.compile(rf"[_-](?:{'|'.join(map(re.escape, words))})\Z", re.IGNORECASE)
    stems = {stem_of(name) for name in names}
    found = (match for stem in stems if (match := shape.search(stem)))
    return sorted({match[0].casefold() for match in found if match.string[: match.start()] in stems})


def _twins(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Files that differ in their suffix only, the one that is more likely the map last."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(stem_of(name), name)
        if other is name:
            continue
        suffixes = [os.path.splitext(one)[1].lower() for one in (other, name)]
        if suffixes[0] != suffixes[1]:
            yield (name, other) if suffixes[0] == ".png" else (other, name)


# --- maps in a folder of another name ---


def refuse_folders_of_maps(
    root: Path, place: str, others: Iterable[str], pictures: Sequence[str], kind: str
) -> None:
    """Refuse a folder beside that of the pictures, or beside these, which has their names and is of no known
    name. Numbers are maps of depth alone: what else lies in such files is somebody's cache.

    others: the folders that hold no pictures that are trained on.
    """
    stems = {stem_of(name) for name in pictures}
    suffixes = DEPTH_SUFFIXES if sense_of(kind) == "depth" or not kind else SUFFIXES
    whose = f"{place}/" if place else "its pictures"
    for folder in others:
        if folder.casefold() in (*MAP_FOLDERS, *preprocessors.names()):
            continue  # of another kind, as its name says
        if os.path.samefile(root / folder, root / place):
            continue  # a link to the pictures themselves
        try:
            files = list(walk(root / folder, root))
        except ValueError:  # a link that leads out, which is not followed
            continue
        names = [name for name in files if os.path.splitext(name)[1].lower() in suffixes]
        if _belong([stem_of(name) for name in names], stems) and not _has_caption(root / folder, names):
            are_pictures = any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names)
            raise ValueError(
                f"{root}: {folder}/ has {'pictures' if are_pictures else 'numbers'} named like {whose} and no"
                f" captions: if these are the maps{f' of {kind}' * bool(kind)}, say so with"
                f" {shlex.quote(f'data.map_column={folder}')}; to have maps made of the pictures, with"
                " data.maps=made"
            )


def refuse_unknown_maps(root: Path, pictures: Sequence[str], *, data: DataRecipe, kind: str) -> None:
    """Refuse a folder among the pictures' that has the names of another one, and so holds its maps, more
    likely than more pictures: no captions where the other has some; or none has, and its name says so.

    root: the folder of the pictures. Where the recipe has maps made, folders none of which has captions hold
    pictures.
    """
    groups: dict[str, dict[str, str]] = {}
    for name in pictures:
        folder, _, rest = name.rpartition("/")
        groups.setdefault(folder, {})[stem_of(rest)] = name
    if len(groups) == 1:  # nothing lies beside them, and captions need not be looked for
        return
    captioned = [folder for folder, names in groups.items() if _has_caption(root, names.values())]
    for folder, names in groups.items():
        whose = next((one for one in captioned if names.keys() <= groups[one].keys()), None)
        if folder and whose is not None and folder not in captioned:
            what, cure = _named_like(root, folder, whose), _cure(root, folder, whose, data, kind)
            raise ValueError(f"{what} and no captions: {cure}; if not, move it away")
    if captioned or data.maps == "made":
        return
    for whose, folder in _likely_maps(pictures):
        what, cure = _named_like(root, folder, whose), _cure(root, folder, whose, data, kind)
        raise ValueError(f"{what}, and none has captions: {cure}; if all are pictures, with data.maps=made")


def _named_like(root: Path, folder: str, whose: str) -> str:
    return f"{root}: {folder}/ has pictures named like {f'{whose}/' if whose else 'its pictures'}"


def _cure(root: Path, folder: str, whose: str, data: DataRecipe, kind: str) -> str:
    """What to say if a folder holds the maps of another one's pictures."""
    above, _, name = folder.rpartition("/")
    beside = whose.rpartition("/")[0] == above
    if_so = f"if these are the maps{f' of {kind}' * bool(kind)}"
    if above and whose != above and not beside:
        return f"{if_so}, move them to {root / 'conditioning'}"
    source = Path(os.path.expanduser(data.source))
    settings = [f"data.source={root / above}"] if root / above != source else []
    settings += [f"data.picture_column={whose.rpartition('/')[2]}"] if above and whose != above else []
    return f"{if_so}, say so with {shlex.join([*settings, f'data.map_column={name}'])}"


def _likely_maps(pictures: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Folders of pictures and, beside or below them, folders that by their names hold the maps of these."""
    for above, folders in _side_by_side(pictures).items():
        telling = [name for name in folders if _sounds_of(name)]
        pairs = [
            (a, b) for b in folders for a in (folders if b in telling else telling) if b and _sounds(b, a)
        ]
        if not pairs and len(folders) == 2 and not all(REPEATS.match(f"{name}/") for name in folders):
            first, second = sorted(folders)
            pairs = [(first, second)] if folders[first] == folders[second] and len(folders[first]) > 1 else []
        for whose, folder in pairs:
            if _belong(folders[folder], folders[whose]):
                yield f"{above}{whose}".rstrip("/"), f"{above}{folder}"


def _side_by_side(pictures: Sequence[str]) -> dict[str, dict[str, set[str]]]:
    """By folder ("a/b/", "" for the top) what lies in it: folders, "" for its own pictures, and in each the
    names without suffix; only where there are several.
    """
    found: dict[str, dict[str, set[str]]] = {}
    for name in pictures:
        parts = stem_of(name).split("/")
        for depth in range(len(parts)):
            above = "".join(f"{part}/" for part in parts[:depth])
            folder, rest = (
                (parts[depth], parts[depth + 1 :]) if depth + 1 < len(parts) else ("", parts[depth:])
            )
            found.setdefault(above, {}).setdefault(folder, set()).add("/".join(rest))
    return {above: folders for above, folders in found.items() if len(folders) > 1}


def _sounds(folder: str, other: str) -> bool:
    """Whether, by their names, one folder holds the maps of the pictures in the other."""
    this, that = _sounds_of(folder), _sounds_of(other)
    return this != that and (this == "maps" or that == "pictures")


def _sounds_of(folder: str) -> str:
    """What a folder holds by its name: "maps", "pictures", or "" if it does not say."""
    words = set(re.findall("[a-z]+", folder.casefold()))
    if words & (_MAP_WORDS | set(preprocessors.names())):
        return "maps"
    return "pictures" if words & _PICTURE_WORDS else ""


def _belong(names: Collection[str], pictures: Collection[str]) -> bool:
    """Whether files are named like pictures, most of them or for most of these."""
    shared = len(set(names) & set(pictures))
    return bool(shared) and shared >= _MOST * min(len(names), len(pictures))


def _has_caption(root: Path, names: Iterable[str]) -> bool:
    return any(caption_file(root / name) is not None for name in names)


def likely_map(names: Sequence[str]) -> str:
    """A file, or a folder with "/", that by its name holds maps of others of these pictures; "" for none."""
    for end in usual_endings(names):
        return next(iter(with_ending(names, end).values()))
    for whose, folder in _likely_maps(names):
        if _sounds(folder.rpartition("/")[2], whose.rpartition("/")[2]):
            return f"{folder}/"
    return ""


def find_folder(names: Iterable[str], folders: Iterable[str]) -> str:
    """The first of some names that a folder has, whatever its case; "" for none."""
    by_folded: Mapping[str, str] = {folder.casefold(): folder for folder in sorted(folders, reverse=True)}
    return next((by_folded[name.casefold()] for name in names if name.casefold() in by_folded), "")

"""Pictures given as files, folders and patterns: which there are, their names, their captions."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

_PICTURES = "avif bmp gif jfif jpe jpeg jpg pgm png pnm ppm tif tiff webp"
SUFFIXES = frozenset(f".{name}" for name in _PICTURES.split())
"""What counts as a picture in a folder; a file named one by one is always tried."""

CAPTION_SUFFIXES = (".txt", ".caption")
_CAPTION_KEYS = ("text", "caption", "prompt")
_METADATA = ("metadata.jsonl", "metadata.csv")


def as_spelt(name: str) -> str:
    """A name to be compared: one system writes ü as a letter, another as u and two dots."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def stem_of(name: str) -> str:
    """A name without suffix, to be compared (`as_spelt`)."""
    return as_spelt(os.path.splitext(name)[0])


@dataclass(frozen=True)
class Picture:
    """A picture's file, and its name without suffix among all that were given, with ``/`` between folders."""

    path: Path
    name: str


_UNREAD = "heic heif jp2 j2k jxl ico svg psd tga dds dng cr2 cr3 nef arw raw hdr exr pfm"
DEPTH_SUFFIXES = SUFFIXES | {".npy", ".npz", ".pfm", ".exr"}
"""What counts in a folder of depth files."""
DEEP = "-16bit"
"""Ends the name of a map that `preprocess` keeps in 16 bits beside the one in 8."""


def find_pictures(
    arguments: Sequence[str],
    *,
    leave_out: Iterable[Path] = (),
    suffixes: frozenset[str] = SUFFIXES,
    own_names: bool = True,
) -> list[Picture]:
    """Return the pictures that files, folders (with all below them) and glob patterns stand for.

    Each once, in the order given, folders sorted. In a folder, hidden files and those of other ``suffixes``
    are left out, and so is what ``leave_out`` names (files, or folders with all below them), except where an
    argument leads into it. With ``own_names``, pictures that differ in their suffix only keep it in their
    names, and two that would still share one are refused.

    Raises ValueError: an argument stands for nothing, a folder cannot be listed, or two pictures would have
    the same name.
    """
    barred = frozenset(os.path.abspath(path) for path in leave_out)
    found: dict[str, Picture] = {}
    for argument in arguments:
        pictures = list(_expand(argument, barred, suffixes))
        if not pictures:
            raise ValueError(f"{argument}: no picture is there ({_what_was_looked_for(argument, suffixes)})")
        for picture in pictures:
            found.setdefault(os.path.abspath(picture.path), picture)
    return _with_own_names(list(found.values())) if own_names else list(found.values())


def unread_below(arguments: Sequence[str], suffixes: frozenset[str] = SUFFIXES) -> dict[str, int]:
    """How many pictures of formats that are not read lie in the folders among arguments, by suffix."""
    unread = frozenset(f".{name}" for name in _UNREAD.split()) - suffixes
    folders = [name for name in arguments if os.path.isdir(name)]
    found = (file.suffix.lower() for name in folders for file in _files_below(name, frozenset(), unread))
    return dict(sorted(Counter(found).items()))


def unread_lines(found: Mapping[str, int]) -> list[str]:
    """What `unread_below` found, a line for each format."""
    return [f"left out, for that format is not read: {count} of {suffix}" for suffix, count in found.items()]


def _what_was_looked_for(argument: str, suffixes: frozenset[str]) -> str:
    if os.path.isdir(argument):
        return f"files that end in {' '.join(sorted(suffixes))}"
    return "no such file or folder" if not glob.has_magic(argument) else "nothing matches the pattern"


def _expand(argument: str, barred: frozenset[str], suffixes: frozenset[str]) -> Iterator[Picture]:
    if os.path.isdir(argument):
        for file in _files_below(argument, barred, suffixes):
            yield Picture(file, file.relative_to(argument).with_suffix("").as_posix())
    elif os.path.exists(argument):
        yield Picture(Path(argument), Path(argument).stem)
    else:
        fixed = _fixed_part(argument) or "."
        start = os.path.abspath(fixed)
        closed = [path for path in barred if not _is_within(start, path)]
        for match in matches(argument, recursive=True):
            file = Path(match)
            inside = os.path.abspath(match)
            if (
                _is_picture(file.name, suffixes)
                and file.is_file()
                and not any(_is_within(inside, c) for c in closed)
            ):
                yield Picture(file, Path(os.path.relpath(file, fixed)).with_suffix("").as_posix())


def matches(pattern: str, *, recursive: bool = False) -> list[str]:
    """What a pattern stands for, sorted. The folder that it starts in may have brackets in its name."""
    fixed = _fixed_part(pattern)
    return sorted(glob.glob(glob.escape(fixed) + pattern[len(fixed) :], recursive=recursive))


def _fixed_part(pattern: str) -> str:
    """The folder that a pattern starts in, as it is written there; "" for the one at hand."""
    fixed = os.path.dirname(pattern)
    while glob.has_magic(fixed) and not os.path.isdir(fixed):
        fixed = os.path.dirname(fixed)
    return fixed


def _files_below(folder: str, barred: frozenset[str], suffixes: frozenset[str]) -> Iterator[Path]:
    top, linked = os.path.realpath(folder), set()

    def leads_on(path: str) -> bool:
        """Whether a folder is one of its own, or a link to one that is looked into nowhere else."""
        target = os.path.realpath(path)
        if not os.path.islink(path):
            return True
        if _is_within(target, top) or _is_within(top, target) or target in linked or target in barred:
            return False
        linked.add(target)
        return True

    for place, folders, names in walked(folder, onerror=_refuse_closed, followlinks=True):
        absolute = os.path.abspath(place)

        def is_open(name: str, absolute: str = absolute) -> bool:
            return not name.startswith(".") and os.path.join(absolute, name) not in barred

        folders[:] = sorted(name for name in folders if is_open(name) and leads_on(os.path.join(place, name)))
        yield from (
            Path(place, name) for name in sorted(filter(is_open, names)) if _is_picture(name, suffixes)
        )


def walked(
    folder: str, *, onerror: Callable[[OSError], object] | None = None, followlinks: bool = False
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, which before Python 3.12 calls itself for each folder in a folder: ValueError, one line,
    where that is too deep.
    """
    try:
        yield from os.walk(folder, onerror=onerror, followlinks=followlinks)
    except RecursionError as error:
        raise ValueError(f"{folder} has more folders in each other than can be looked into") from error


def _refuse_closed(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def _is_picture(name: str, suffixes: frozenset[str]) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + os.sep)


def _with_own_names(pictures: list[Picture]) -> list[Picture]:
    """Tell pictures of the same name apart by their suffix. Names are compared as case-blind disks do."""
    shared = _shared_names(pictures)
    named = [
        Picture(picture.path, picture.name + picture.path.suffix.lower().replace(".", "-"))
        if picture.name.casefold() in shared
        else picture
        for picture in pictures
    ]
    for first, second in _shared_names(named).values():
        whole = "" if first.path.parent == second.path.parent else "give the folder that holds both, or "
        raise ValueError(f"{first.path} and {second.path} would both become {first.name}: {whole}rename one")
    return named


def _shared_names(pictures: Iterable[Picture]) -> dict[str, tuple[Picture, Picture]]:
    first: dict[str, Picture] = {}
    shared: dict[str, tuple[Picture, Picture]] = {}
    for picture in pictures:
        name = picture.name.casefold()
        if first.setdefault(name, picture) is not picture:
            shared.setdefault(name, (first[name], picture))
    return shared


def caption_file(picture: Path) -> Path | None:
    """The file beside a picture with its caption, whatever its suffix's case and how umlauts are spelt."""
    for suffix in CAPTION_SUFFIXES:
        beside = picture.with_suffix(suffix)
        if os.path.isfile(beside):  # pathlib raises for a name that is too long
            return beside
    folder = os.path.dirname(picture)
    changed = os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0
    name = _captions_in(folder, changed).get(stem_of(os.path.basename(picture)))
    return None if name is None else Path(folder, name)


@lru_cache(maxsize=8)
def _captions_in(folder: str, changed: int) -> dict[str, str]:
    """A folder's files with captions, by the name without suffix. changed: when the folder was."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    found: dict[str, str] = {}
    for suffix in CAPTION_SUFFIXES:
        for name in names:
            if os.path.splitext(name)[1].lower() == suffix and os.path.isfile(os.path.join(folder, name)):
                found.setdefault(stem_of(name), name)
    return found


class Captions:
    """Captions of pictures: from a ``.txt`` or ``.caption`` file beside each, or from a metadata file.

    The metadata file (``metadata.jsonl`` or ``.csv``, Hugging Face's imagefolder layout) stands in the
    picture's folder or one above it, and names it by ``file_name``; the caption is its ``text``, ``caption``
    or ``prompt``.
    """

    def __init__(self, levels: int = 8) -> None:
        """Look for metadata files up to ``levels`` folders above a picture."""
        self._levels = levels
        self._files: dict[Path, _Metadata | None] = {}

    def of(self, picture: Path) -> str:
        """Return a picture's caption, "" where it has none.

        Raises ValueError: a caption or metadata file cannot be read; one line with its name.
        """
        beside = caption_file(picture)
        if beside is not None:
            return " ".join(read_text(beside).split())
        path = Path(os.path.abspath(picture))
        for folder in path.parents[: self._levels]:
            metadata = self._metadata(folder)
            if metadata is not None:
                return metadata.captions.get(as_spelt(path.relative_to(folder).as_posix()), "")
        return ""

    def _metadata(self, folder: Path) -> _Metadata | None:
        if folder not in self._files:
            file = next((folder / name for name in _METADATA if (folder / name).is_file()), None)
            self._files[folder] = None if file is None else _Metadata(file)
        return self._files[folder]


class _Metadata:
    """A metadata file, read when it is first needed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @cached_property
    def captions(self) -> dict[str, str]:
        rows = self._csv() if self._path.suffix == ".csv" else read_jsonl(self._path)
        captions = {}
        for row in rows:
            name = row.get("file_name")
            caption = next((row[key] for key in _CAPTION_KEYS if isinstance(row.get(key), str)), "")
            if isinstance(name, str):
                captions[as_spelt(Path(name).as_posix())] = " ".join(caption.split())
        return captions

    def _csv(self) -> Iterator[dict[str, Any]]:
        yield from csv.DictReader(io.StringIO(read_text(self._path), newline=""))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one JSON object on each line; blank lines are skipped.

    Raises ValueError: one line with the file's name and the line's number.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: this is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: this is not a JSON object")
        yield row


def read_text(path: Path) -> str:
    """A file's text, UTF-8 with or without a byte order mark. Raises ValueError, one line with its name."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error

"""The folder of a data set: pictures, their maps, captions, and what made the maps.

OUT/images/NAME.jpg      the pictures (hard links, or copies on another disk), unless they lie in OUT already
OUT/KIND/NAME.png        their maps, for each kind; a pose's joints beside it as NAME.json
OUT/metadata.jsonl       a row per picture, as Hugging Face's imagefolder reads it
OUT/preprocess.json      what made the maps
OUT/sheet.png            on request, some pictures beside their maps
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit import files, images, preprocessors
from controlkit.picture_files import Captions, Picture, read_jsonl, walked
from controlkit.preprocess_job import Beside, outputs_of, reads_depth

SHEET_ROWS = 12
_SHEET_NOTE = "controlkit sheet"  # the keyword of a text chunk, which says of what it is
_PIECE = 65536  # bytes by which a picture and its copy are compared
RECORD, METADATA, SHEET = "preprocess.json", "metadata.jsonl", "sheet.png"


@dataclass(frozen=True)
class MapFolder:
    """Where everything of a data set goes."""

    place: Path
    settings: Mapping[str, Mapping[str, str]]
    """The kinds of maps, and each kind's options."""
    pictures: Sequence[Picture]
    beside: Beside

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of maps."""
        return tuple(self.settings)

    @property
    def has_pictures(self) -> bool:
        """Whether the inputs are pictures; otherwise they hold depth, and no data set is made of them."""
        return not all(reads_depth(options) for options in self.settings.values())

    def map_path(self, kind: str, picture: Picture) -> Path:
        """Where a picture's map goes."""
        return self.place / kind / f"{picture.name}.png"

    def picture_path(self, picture: Picture) -> Path:
        """Where a picture stands in the data set: where it is, if that is inside the folder."""
        if Path(os.path.abspath(picture.path)).is_relative_to(os.path.abspath(self.place)):
            return picture.path
        return self.place / "images" / f"{picture.name}{picture.path.suffix.lower()}"

    def missing_kinds(self, picture: Picture) -> list[str]:
        """The kinds whose map, or what belongs beside it, is not there or older than its picture."""
        with suppress(OSError):
            changed = picture.path.stat().st_mtime_ns
            return [kind for kind in self.kinds if not self._is_made(kind, picture, changed)]
        return list(self.kinds)

    def _is_made(self, kind: str, picture: Picture, changed: int) -> bool:
        outputs = outputs_of(kind, self.map_path(kind, picture), self.beside)
        return all(_is_newer(path, changed) for path in outputs)

    def check(self, *, overwrite: bool) -> None:
        """Refuse, before any work, what would lose or mix data.

        Raises ValueError: the place is a file, an output would replace an input, or (unless ``overwrite``)
        there are maps made with other settings or of other pictures of these names; or metadata or the record
        of the settings cannot be read.
        """
        if self.place.exists() and not self.place.is_dir():
            raise ValueError(f"{self.place} is a file: for several pictures or kinds, -o names a folder")
        inputs = {os.path.abspath(picture.path) for picture in self.pictures}
        for picture in self.pictures:
            for kind in self.kinds:
                for path in outputs_of(kind, self.map_path(kind, picture), self.beside):
                    if os.path.abspath(path) in inputs:
                        raise ValueError(f"{path} is an input: choose another output folder")
        self._earlier_rows()
        if not overwrite:
            self._check_record()
            for picture in self.pictures:
                self._check_is_its_own(picture)

    def prepare(self) -> None:
        """Make the folders and write down the settings. Raises ValueError where that is not possible."""
        folders = {self.map_path(kind, picture).parent for kind in self.kinds for picture in self.pictures}
        if self.has_pictures:
            folders |= {self.picture_path(picture).parent for picture in self.pictures}
        try:
            for folder in sorted(folders):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {error.filename}: {error.strerror}") from error
        with files.one_at_a_time(self.place):
            maps: dict[str, Any] = {}
            with suppress(ValueError):  # a damaged one was refused, or is to be overwritten
                maps = self._record()
            maps |= {kind: _settings_that_count(self.settings[kind]) for kind in self.kinds}
            files.write_json(self.place / RECORD, {"maps": maps})

    def keep_picture(self, picture: Picture) -> None:
        """Put a picture into the data set: a second name of the same file, or on another disk a copy."""
        target = self.picture_path(picture)
        if target == picture.path or (target.exists() and os.path.samefile(target, picture.path)):
            return
        with files.temporary_beside(target) as temporary:
            try:
                os.link(os.path.realpath(picture.path), temporary)
            except OSError:  # another disk, or one without links
                files.write_bytes(target, _bytes_of(picture.path))
                return
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise ValueError(f"cannot write {target}: {error.strerror}") from error

    def write_metadata(self) -> Counts:
        """Write a row for each picture that has all its maps; rows of other pictures stay."""
        captions, told, counts = Captions(), dict[str, tuple[Picture, str]](), Counts()
        for picture in self.pictures:
            kept = self.picture_path(picture)
            if self.missing_kinds(picture):
                continue
            name = self._relative(kept)
            try:
                _check_is_text(name, picture)
                if self.has_pictures and not kept.exists():  # a kill came between its maps and the picture
                    self.keep_picture(picture)
                caption = captions.of(picture.path)
            except ValueError as error:
                counts.failed.append((picture.path, str(error)))
                continue
            if not kept.exists():
                continue
            counts.complete += 1
            counts.without_caption += not caption
            told[name] = picture, caption
        with files.one_at_a_time(self.place):  # another job may add its kinds, or its pictures
            rows = self._earlier_rows()
            rows |= {name: self._row(*what, rows.get(name, {})) for name, what in told.items()}
            lines = [json.dumps(row, ensure_ascii=False) for row in rows.values()]
            files.write_text(self.place / METADATA, "".join(f"{line}\n" for line in lines))
        return counts

    def write_sheet(self) -> Path | None:
        """Write a contact sheet of some pictures and their maps; returns it, None where there is nothing."""
        from controlkit.sheets import contact_sheet

        shown = [picture for picture in self.pictures if not self.missing_kinds(picture)]
        shown = shown[:: max(1, -(-len(shown) // SHEET_ROWS))]
        if not shown:
            return None
        rows = []
        for picture in shown:
            cells = [(images.load_picture(self.map_path(kind, picture)), kind) for kind in self.kinds]
            if self.has_pictures:
                cells.insert(0, (images.load_picture(picture.path), picture.name))
            rows.append(cells)
        images.write_png(self.place / SHEET, contact_sheet(rows), text={_SHEET_NOTE: ", ".join(self.kinds)})
        return self.place / SHEET

    def _row(self, picture: Picture, caption: str, earlier: Mapping[str, Any]) -> dict[str, Any]:
        """A picture's row of the metadata; columns that end in _file_name are pictures to Hugging Face."""
        maps = {kind: self.map_path(kind, picture) for kind in self.kinds}
        row = dict(earlier)
        row |= {
            "file_name": self._relative(self.picture_path(picture)),
            "text": caption or earlier.get("text", ""),
        }
        row |= {f"{kind}_file_name": self._relative(path) for kind, path in maps.items()}
        if "openpose" in maps:
            row["openpose_json"] = self._relative(maps["openpose"].with_suffix(".json"))
        row.setdefault("conditioning_image_file_name", self._relative(maps[self.kinds[0]]))
        return row

    def _earlier_rows(self) -> dict[str, dict[str, Any]]:
        """The metadata that is there, by the picture's name, without rows of ours whose picture is gone."""
        path = self.place / METADATA
        rows: dict[str, dict[str, Any]] = {}
        ours = {f"{kind}_file_name" for kind in preprocessors.names()}
        for number, row in enumerate(read_jsonl(path) if path.exists() else ()):
            name = str(row.get("file_name", f"row {number}"))
            if not ours & row.keys() or (self.place / name).is_file():
                rows[name] = row
        return rows

    def _record(self) -> dict[str, Any]:
        path = self.place / RECORD
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["maps"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged: remove it and use --overwrite, or choose another -o"
            ) from error

    def _check_record(self) -> None:
        record = self._record()
        for kind in self.kinds:
            now = _settings_that_count(self.settings[kind])
            if record.get(kind, now) != now:
                before = " ".join(f"{key}={value}" for key, value in record[kind].items()) or "defaults"
                raise ValueError(
                    f"{self.place} has {kind} maps made with {before}: give the same settings, another -o, "
                    "or --overwrite"
                )

    def _check_is_its_own(self, picture: Picture) -> None:
        """Refuse a picture whose name another one has here: that one's maps would pass for its own.

        What has changed since it was put here takes its place: the maps are older, and nothing else in the
        file system is a name of what was there.
        """
        kept = self.picture_path(picture)
        with suppress(OSError):  # what is not there or cannot be read is told in its turn
            if not self.has_pictures or _is_same(kept, picture.path):
                return
            if len(self.missing_kinds(picture)) < len(self.kinds) or kept.stat().st_nlink > 1:
                raise ValueError(
                    f"{kept} is another picture than {picture.path}: "
                    "rename it, choose another -o, or --overwrite"
                )

    def _relative(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.place)).as_posix()


class Counts:
    """What the metadata says of the pictures."""

    def __init__(self) -> None:
        """Start at nothing."""
        self.complete = self.without_caption = 0
        self.failed: list[tuple[Path, str]] = []


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:  # it has gone since its maps were made
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def _is_newer(path: Path, time_ns: int) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_mtime_ns >= time_ns and status.st_size > 0  # empty: the power failed


def _is_same(path: Path, other: Path) -> bool:
    """Whether two names are of one file, or of copies, by their sizes and a piece of each."""
    if os.path.samefile(path, other):
        return True
    size = path.stat().st_size
    return size == other.stat().st_size and _piece(path, size // 2) == _piece(other, size // 2)


def _piece(path: Path, start: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(_PIECE)


def _settings_that_count(settings: Mapping[str, str]) -> dict[str, str]:
    """The options that change a map: not where it is computed."""
    return {key: value for key, value in sorted(settings.items()) if key != "device"}


def folders_of_maps(sources: Iterable[str]) -> dict[Path, list[Path]]:
    """The folders among sources, and below them, that hold maps made here, and what is no picture in each."""
    found = {}
    for source in sources:
        for place, folders, names in walked(source):
            folders[:] = [name for name in folders if not name.startswith(".")]
            if RECORD in names:
                kinds: dict[str, Any] = {}
                with suppress(OSError, ValueError, KeyError, TypeError):
                    kinds = {**json.loads(Path(place, RECORD).read_text(encoding="utf-8"))["maps"]}
                sheets = [SHEET] if is_sheet(Path(place, SHEET)) else []
                found[Path(place)] = [Path(place, name) for name in (*kinds, *sheets)]
    return found


def is_sheet(path: Path) -> bool:
    """Whether a file is a sheet that was written here, and no picture of that name."""
    try:
        return _SHEET_NOTE in images.read_png_text(path)
    except ValueError:
        return False


def without_second_names(pictures: Sequence[Picture], folders: Iterable[Path]) -> list[Picture]:
    """The pictures without those that folders of maps keep as second names of files that are there, too."""
    kept = [os.path.join(os.path.abspath(folder), "images", "") for folder in folders]
    if not kept:
        return list(pictures)
    second = {picture for picture in pictures if os.path.abspath(picture.path).startswith(tuple(kept))}
    first = {_identity(picture) for picture in pictures if picture not in second}
    return [picture for picture in pictures if picture not in second or _identity(picture) not in first]


def _check_is_text(name: str, picture: Picture) -> None:
    """Raise ValueError for a file's name that no metadata can say, as archives from elsewhere have them."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{picture.path}: its name is not UTF-8, which {METADATA} is: rename it") from error


def _identity(picture: Picture) -> tuple[int, int]:
    status = os.stat(picture.path)
    return status.st_dev, status.st_ino

"""`controlkit lint`: which maps, of which kinds, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from controlkit import images, naming, preprocessors
from controlkit.picture_files import find_pictures
from controlkit.preprocessors import Finding
from controlkit.preprocessors.linting import KINDS


@dataclass(frozen=True)
class MapFile:
    """A map's file, and what says which kind it is."""

    path: Path
    kind: str
    """One of `KINDS`, or "" where it is to be guessed."""
    said_by: str
    """"--kind", "the file" (its own note), "its name" (or its folder's), or ""."""
    has_style: bool = False
    """Whether the file's note names the style it was drawn in."""


@dataclass(frozen=True)
class Plan:
    """The maps to look at, and the picture that they belong to, if it was given."""

    maps: tuple[MapFile, ...]
    picture: Path | None


@dataclass(frozen=True)
class Verdict:
    """What was found in one map; `kind` may be a guess, and is "" where none was safe."""

    path: Path
    kind: str
    guessed: bool
    findings: tuple[Finding, ...]

    def lines(self) -> list[str]:
        """Return one line for each finding: file, kind, what is wrong, what cures it."""
        kind = f"{self.kind or 'unknown kind'}{' (guessed)' if self.guessed and self.kind else ''}"
        return [f"{self.path}: {kind}: {found.message}. Cure: {found.cure}." for found in self.findings]

    @property
    def is_open(self) -> bool:
        """Whether nothing but the size could be looked at, for want of a kind."""
        return not self.kind and all(found.code in ("size", "aspect") for found in self.findings)


@dataclass(frozen=True)
class Result:
    """The verdict on each map, in the order of the plan."""

    verdicts: tuple[Verdict, ...]

    @property
    def findings(self) -> int:
        """How many things are wrong."""
        return sum(len(verdict.findings) for verdict in self.verdicts)

    def summary(self) -> str:
        """Return one line that says how many maps were looked at, and how many have something wrong."""
        count = len(self.verdicts)
        looked = f"looked at {count} map{'s' * (count != 1)}"
        wrong = sum(bool(verdict.findings) for verdict in self.verdicts)
        found = f"{wrong} with findings, {count - wrong} without" if wrong else "nothing found"
        return f"{looked}: {found}{self._about_kinds()}"

    def _about_kinds(self) -> str:
        unknown = sum(verdict.is_open for verdict in self.verdicts)
        if not unknown:
            return ""
        whose = "its kind" if len(self.verdicts) == 1 else f"the kind of {unknown}"
        return f"; {whose} cannot be told, so only what holds for every map was checked: say it with --kind"


def plan(maps: Sequence[str], *, kind: str = "", picture: str = "") -> Plan:
    """Find the maps and their kinds.

    maps: files, folders and patterns. A map's kind is `kind`, else what its PNG notes of itself, else what
    its name (`a.canny.png`, `canny.png`) or a folder above it (`canny/a.png`) says, else left open.
    picture: the file that the maps were made from, to compare sizes with.

    Raises ValueError: an unknown kind, maps or a picture that do not exist, or a picture that cannot be read.
    """
    if kind and kind not in KINDS:
        raise naming.unknown("map", kind, KINDS)
    if picture:
        images.load_picture(picture)
    found = find_pictures(maps, own_names=False)
    return Plan(tuple(_map_file(file.path, kind) for file in found), Path(picture) if picture else None)


def run(job: Plan, progress: Callable[[int, int], None] = lambda done, total: None) -> Result:
    """Look at every map; one that cannot be read is a finding, too."""
    picture = None if job.picture is None else images.load_picture(job.picture)
    verdicts = []
    for file in job.maps:
        try:
            image = images.load_map(file.path)
            kind = file.kind or preprocessors.guess_kind(image)
            findings = preprocessors.lint(file.path, kind, picture)
        except ValueError as error:
            kind, findings = file.kind, [_unreadable(file.path, error)]
        if file.has_style:  # chosen on purpose
            findings = [found for found in findings if found.code != "style"]
        verdicts.append(Verdict(file.path, kind, not file.kind, tuple(findings)))
        progress(len(verdicts), len(job.maps))
    return Result(tuple(verdicts))


def _unreadable(path: Path, problem: ValueError) -> Finding:
    message = str(problem).removeprefix(f"{path} ")
    return Finding("unreadable", "error", message, "make the map anew, or leave the file out")


def _map_file(path: Path, kind: str) -> MapFile:
    noted, has_style = _note(path)
    if kind:
        return MapFile(path, kind, "--kind", has_style)
    if noted:
        return MapFile(path, noted, "the file", has_style)
    named = _named_kind(path)
    return MapFile(path, named, "its name" if named else "")


def _note(path: Path) -> tuple[str, bool]:
    """The kind that ControlKit's own note in a PNG names, or "", and whether it names a style of drawing."""
    if path.suffix.lower() != ".png":
        return "", False
    try:
        note = json.loads(images.read_png_text(path).get("controlkit", "{}"))
    except ValueError:  # no PNG, damaged, or no JSON; whatever it is, the map itself is looked at later
        return "", False
    if not isinstance(note, dict) or note.get("kind") not in KINDS:
        return "", False
    params = note.get("params")
    return note["kind"], isinstance(params, dict) and "style" in params


def _named_kind(path: Path) -> str:
    """The kind that stands in a file's name between dots, - or _, or that a folder is called, or ""."""
    stem = path.stem.lower()
    if stem in KINDS:
        return stem
    endings = [kind for kind in KINDS if stem.endswith((f".{kind}", f"-{kind}", f"_{kind}"))]
    if endings:
        return max(endings, key=len)  # lineart_anime, not anime's shorter namesake
    return next((part.lower() for part in reversed(path.absolute().parts[:-1]) if part.lower() in KINDS), "")

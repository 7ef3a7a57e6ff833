"""Looking at every pair of a data set before it is trained on: what cannot be used, and what looks wrong."""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PurePath

from controlkit.preprocessors.linting import KINDS
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.check_facts import UNKNOWN_KIND, Facts, look_at_map, look_at_picture
from controlkit.training.data.check_memory import Memory
from controlkit.training.data.check_result import UNPAIRED_MAP, UNPAIRED_PICTURE
from controlkit.training.data.check_result import Check as Check
from controlkit.training.data.check_result import Finding as Finding
from controlkit.training.data.examples import Example, Examples, Piece
from controlkit.training.data.map_use import MapUse, uses_of
from controlkit.training.data.source_files import LazyExamples, RefusedPiece
from controlkit.training.data.visits import FARTHEST_ASPECT

SMALLEST = 64
"""Pixels of the shorter side below which a picture is tiny, where the recipe says no resolution."""
REPORT_SECONDS = 10.0
_Found = tuple[str, str, str, str]  # severity, code, message, cure
_Look = Callable[[Piece], Facts]
_ROUNDED = 0.02  # of the aspect: what is taken for rounding, whatever was rounded to what
_STEPS = (8, 64)  # those who make maps round their sides to multiples of these


def check_examples(
    examples: Examples,
    *,
    data: DataRecipe,
    kind: str,
    report: Callable[[str], None] = lambda _: None,
    lint: bool = False,
    remember: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Check:
    """Open every pair once, in threads, and return what was found.

    Errors: a picture or map that is missing, no picture, damaged, cut off, too large or outside of the data
    set, a map of another aspect than its picture, a pose that is none, a caption that is none, a map that
    cannot be mirrored where `data.flip` mirrors it, a coloured one where `data.map_mode` is grey. Warnings:
    files that are in no pair; and, with `lint`, what `controlkit.preprocessors.lint` finds in maps of a
    `kind` that it knows ("": it guesses). Notes: a map whose kind cannot be guessed or of another size, the
    same picture twice, tiny and grey pictures, no caption.

    Without `lint`, PNG files are judged by their check sums and unpacked without being decoded, so that grey
    ones do not show.
    remember: keep what was found about each file in the cache folder, and do not look again at files that
    have not changed since. report: now and then a line, how far it is.
    """
    started = time.monotonic()
    memory = Memory(data.source) if remember else None
    look = partial(
        _look, data=data, map_kind=kind, lint_kind=_lint_kind(kind, lint), thorough=lint, memory=memory
    )
    seen: list[_Seen] = []
    told = started
    try:
        for number, result in enumerate(_in_threads(look, examples), start=1):
            seen.append(result)
            progress(number, len(examples))
            if time.monotonic() - told >= REPORT_SECONDS:
                told = time.monotonic()
                report(f"looked at {number:,} of {len(examples):,} pairs")
    finally:
        if memory is not None:
            try:
                memory.save()
            except ValueError as error:
                report(f"what the check found is not kept: {error}")
    unpaired = _unpaired(examples)
    return _summarise(seen, unpaired, time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a look at one pair gave."""

    name: str
    captioned: bool
    mapped: bool
    size: tuple[int, int] | None
    digest: str | None
    rest: tuple[str, ...]
    """The maps' digests and the caption."""
    findings: tuple[_Found, ...]


def _in_threads(look: Callable[[Example], _Seen], examples: Examples) -> Iterator[_Seen]:
    """Look at every example, a few ahead of the one that is asked for; yields what was seen, in order."""
    workers = min(32, _cores())
    pool = ThreadPoolExecutor(workers, thread_name_prefix="check")

    def start(number: int) -> Future[_Seen]:
        return pool.submit(lambda: look(examples[number]))

    futures = map(start, range(len(examples)))
    try:
        waiting = deque(itertools.islice(futures, 4 * workers))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _lint_kind(kind: str, lint: bool) -> str | None:
    return kind if lint and (not kind or kind in KINDS) else None


def _look(
    example: Example,
    *,
    data: DataRecipe,
    map_kind: str,
    lint_kind: str | None,
    thorough: bool,
    memory: Memory | None,
) -> _Seen:
    findings: list[_Found] = []
    look: _Look = partial(look_at_picture, thorough=thorough, alpha_mask=data.alpha_mask)
    role = "picture opaque" if data.alpha_mask else "picture"
    picture = _facts(example.picture, role, thorough, look, memory, findings)
    size = (picture.width, picture.height) if picture else None
    if picture and size:
        findings += _about_picture(example.name, picture, size, data)
    rest = []
    kind = _kind_to_lint(example, lint_kind)
    for piece, use in zip(example.maps, uses_for(example, data, map_kind), strict=True):
        look = partial(look_at_map, canvas=size, kind=kind, use=use)
        # A pose may have no canvas of its own, so what is found depends on the picture's size.
        what = f"pose {size}" if piece.name.endswith(".json") else "depth" * (use.sense == "depth") or "map"
        role = " ".join(part for part in (what, use.name, kind) if part)
        facts = _facts(piece, role, kind is not None, look, memory, findings)
        if facts:
            found = _about_map(piece, facts, size, use)
            # Of a stack, each has a kind of its own, which cannot be said.
            findings += [one for one in found if len(example.maps) == 1 or one[1] != UNKNOWN_KIND]
            rest.append(facts.digest)
    if not example.caption:
        findings.append(
            ("note", "no caption", f"{example.name} has no caption", "data.caption=TEXT is for these")
        )
    digest = picture.digest if picture else None
    return _Seen(
        example.name,
        bool(example.caption),
        bool(example.maps),
        size,
        digest,
        (*rest, example.caption),
        tuple(findings),
    )


def _facts(
    piece: Piece, role: str, thorough: bool, look: _Look, memory: Memory | None, findings: list[_Found]
) -> Facts | None:
    """The facts about a piece, from memory or from a look; None, and a finding, where it cannot be read."""
    key = memory.key(piece) if memory else None
    facts = memory.recall(key, role, thorough=thorough) if memory else None
    if facts is not None:
        return facts if thorough else replace(facts, lint=())
    try:
        facts = look(piece)
    except ValueError as error:
        findings.append(_unreadable(piece, error))
        return None
    if memory:
        memory.keep(key, role, facts, thorough=thorough)
    return facts


def _unreadable(piece: Piece, error: ValueError) -> _Found:
    message = " ".join(str(error).split())
    if isinstance(error.__cause__, FileNotFoundError):
        return "error", "missing", f"{piece.name} is not there", "bring the file back, or take the pair out"
    if isinstance(piece, RefusedPiece):
        return "error", piece.code, message, piece.cure
    if "leads out of the data set" in message:
        return "error", "refused", message, ""
    return "error", "broken", message, "fetch or make the file anew, or take the pair out"


def _about_picture(name: str, facts: Facts, size: tuple[int, int], data: DataRecipe) -> Iterator[_Found]:
    smallest = data.resolution or SMALLEST
    if min(size) < smallest:
        message = f"{name} is {size[0]} x {size[1]}: it is enlarged to at least {smallest} pixels"
        yield "note", "tiny", message, "take it out, or train at a lower data.resolution"
    if facts.grey:
        yield "note", "grey", f"{name} has no colour", ""


def uses_for(example: Example, data: DataRecipe, kind: str) -> list[MapUse]:
    """What visits ask of each map; of one whose kind nobody said, the name of its folder may tell it."""
    return uses_of(data, kind=kind or _folder(example), count=len(example.maps))


def _kind_to_lint(example: Example, asked: str | None) -> str | None:
    """What a map is looked through for: the kind asked for, else its folder's name; "" has it guessed."""
    if asked is None:
        return None
    if len(example.maps) != 1:
        return ""  # each of a stack is of its own kind
    folder = _folder(example)
    return asked or (folder if folder in KINDS else "")


def _folder(example: Example) -> str:
    """The name of the folder that the maps lie in; "" where there are none."""
    return PurePath(example.maps[0].name).parent.name if example.maps else ""


def _about_map(piece: Piece, facts: Facts, size: tuple[int, int] | None, use: MapUse) -> Iterator[_Found]:
    if use.name and facts.refused:
        yield "error", "unfit", facts.refused, ""
    for code, message, cure in facts.lint:
        severity = "note" if code == UNKNOWN_KIND else "warning"
        yield severity, code, f"{piece.name}: {message}", cure
    if facts.people == 0:
        yield "warning", "nobody", f"{piece.name} holds no person: its map is black", "take the pair out"
    if size is None or size == (facts.width, facts.height):
        return
    sizes = f"{piece.name} is {facts.width} x {facts.height}, its picture {size[0]} x {size[1]}"
    if not same_aspect(size, (facts.width, facts.height)):
        turned = " (turned by 90 degrees)" * (size == (facts.height, facts.width))
        cure = "make the map anew from this picture: controlkit preprocess gives it the picture's size"
        yield "error", "aspect", f"{sizes}: another shape{turned}, so the two do not lie on each other", cure
    elif facts.people is None:  # a pose is drawn at any size
        yield "note", "size", f"{sizes}: it is resized", ""


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes (width, height) have one shape, but for rounding.

    Each side may be off by a pixel. Where both sides of `other` are multiples of 8, as those who make maps
    like to round, the aspect may be off by 2 %; and by what rounding each side to multiples of 8 or 64 makes
    of it (controlnet-aux: 400 x 300 becomes 704 x 512), as far as visits take it.
    """
    scale = (other[0] / size[0] * other[1] / size[1]) ** 0.5
    if abs(other[0] - size[0] * scale) <= 1 and abs(other[1] - size[1] * scale) <= 1:
        return True
    ratio = (other[0] * size[1]) / (other[1] * size[0])
    if other[0] % 8 == other[1] % 8 == 0 and 1 - _ROUNDED <= ratio <= 1 + _ROUNDED:
        return True
    return max(ratio, 1 / ratio) <= FARTHEST_ASPECT and any(_is_rounded(size, other, step) for step in _STEPS)


def _is_rounded(size: tuple[int, int], other: tuple[int, int], step: int) -> bool:
    """Whether `other` is what rounding to multiples of a step makes of a size: of itself, each side down or
    to the nearest, or of the one whose shorter side is that of `other`, to the nearest.
    """
    if other[0] % step or other[1] % step:
        return False
    short = min(other) / min(size)
    return (
        all(0 <= side - rounded < step for side, rounded in zip(size, other, strict=True))
        or all(abs(side - rounded) < step / 2 for side, rounded in zip(size, other, strict=True))
        or all(abs(side * short - rounded) <= step / 2 for side, rounded in zip(size, other, strict=True))
    )


def _unpaired(examples: Examples) -> list[Finding]:
    """The files of a data set that are in none of its pairs."""
    try:
        left = examples.leftovers() if isinstance(examples, LazyExamples) else []
    except ValueError as error:  # a folder that cannot be listed
        return [Finding(None, "", "warning", "unread folder", str(error))]
    code = {True: UNPAIRED_MAP, False: UNPAIRED_PICTURE}
    return [Finding(None, one.name, "warning", code[one.is_map], one.problem, one.cure) for one in left]


def _summarise(seen: Sequence[_Seen], unpaired: Sequence[Finding], seconds: float) -> Check:
    findings, usable = [], []
    first: dict[str, int] = {}
    for index, one in enumerate(seen):
        findings += [Finding(index, one.name, *found) for found in one.findings]
        if not any(severity == "error" for severity, *_ in one.findings):
            usable.append(index)
        if one.digest is None:
            continue
        earlier = first.setdefault(one.digest, index)
        if earlier != index:
            what = "pair" if seen[earlier].rest == one.rest else "picture"
            message = f"{one.name} is the same {what} as {seen[earlier].name}"
            findings.append(Finding(index, one.name, "note", "duplicate", message))
    return Check(
        sizes=[one.size for one in seen],
        digests=[one.digest for one in seen],
        findings=[*findings, *unpaired],
        usable=usable,
        captioned=sum(one.captioned for one in seen),
        mapped=sum(one.mapped for one in seen),
        seconds=seconds,
    )

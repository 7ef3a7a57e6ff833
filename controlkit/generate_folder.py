"""`controlkit generate` for folders: a picture for each one there, by one request, with models loaded once.

Where a control's picture, a map, the picture to start from or a mask is a folder, each of its pictures has
its turn; several folders go together by their pictures' names. What is there already, made in the very same
way, stays, so that a job that was stopped goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from controlkit.arguments import check_not_inputs, is_none, numbered_outputs, split_control, split_mask
from controlkit.files import FULL_DISK, at_home
from controlkit.folder_job import FolderReport as Report
from controlkit.generate_job import Session, write_all
from controlkit.generate_plan import Plan, check_preview
from controlkit.limits import check_count
from controlkit.picture_files import (
    DEEP,
    DEPTH_SUFFIXES,
    SUFFIXES,
    as_spelt,
    find_pictures,
    unread_below,
    unread_lines,
)
from controlkit.startup import nothing_collected

USUAL_FOLDER = "out"
_NAMED = 3  # names in a message
_TRIED = 3  # faults that begin with no picture's name, after which it is the request that is wrong


@dataclass(frozen=True)
class Request:
    """What one picture is made from, as on the command line; output: its .png."""

    controls: tuple[str, ...]
    maps: tuple[str, ...]
    start: str | None
    mask: str | None
    output: str

    @property
    def files(self) -> list[str]:
        """The pictures, maps and masks that are named."""
        split = [split_control(text) for text in (*self.controls, *self.maps) if not is_none(text)]
        others = (self.start, self.mask, *(split_mask(how)[1] for _, _, how in split))
        return [path for _, path, _ in split] + [path for path in others if path and not is_none(path)]


@dataclass
class Result:
    """What became of the pictures: files that were written, those that were there, and what is left out."""

    made: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def summary(self, seconds: float) -> str:
        """What became of them, in a line."""
        made, kept, failed = len(self.made), len(self.kept), len(self.failed)
        place = os.path.commonpath([path.parent for path in (*self.made, *self.kept)]) or "."
        told = f"wrote {made:,} picture{'s' * (made != 1)} into {place}, in {seconds:.0f} s"
        told += f"; {kept:,} made in the same way {'was' if kept == 1 else 'were'} there" * (kept > 0)
        return told + f"; {failed:,} left out" * (failed > 0)


def requests(whole: Request, report: Report, *, usual: str = "", count: int = 1) -> list[Request]:
    """A request for each picture of the folders that are named; none where there is no folder.

    The output of ``whole``, or else ``usual``, is the folder of theirs, which keep the names that the
    pictures have below the first folder; ``count`` are made of each. Raises ValueError, one line: a folder
    has no picture, another one lacks one of its names, the output is no folder, or one of these, or a
    picture there would be written over.
    """
    folders = [place for place in dict.fromkeys(map(at_home, whole.files)) if os.path.isdir(place)]
    if not folders:
        return []
    check_count(count)
    whole = replace(whole, output=usual or whole.output)
    if not whole.output:
        raise ValueError("-o is empty: name the folder where the pictures are to be")
    output = Path(at_home(whole.output))
    if output.suffix.lower() == ".png" or output.is_file():
        raise ValueError(f"{folders[0]} is a folder, so that -o names one, too, and not {whole.output}")
    if os.path.realpath(output) in map(os.path.realpath, folders):
        raise ValueError(f"{whole.output} holds what is followed: -o names another folder")
    of_maps = {at_home(split_control(text)[1]) for text in whole.maps}
    found = {folder: _pictures(folder, output, report, is_map=folder in of_maps) for folder in folders}
    names = list(found[folders[0]])
    for folder in folders[1:]:
        found[folder] = _partners(folder, found[folder], folders[0], names, report)
    asked = [_of_picture(whole, {folder: str(found[folder][n]) for folder in folders}, n) for n in names]
    followed = [path for pictures in found.values() for path in pictures.values()]
    check_not_inputs((path for one in asked for path in numbered_outputs(one.output, count)), followed)
    return asked


def _pictures(folder: str, output: Path, report: Report, *, is_map: bool) -> dict[str, Path]:
    """The pictures of a folder by their names, without what such a job has written there.

    Of maps, a depth's values count where there are no pictures: `preprocess` writes both side by side.
    """
    suffixes = DEPTH_SUFFIXES if is_map else SUFFIXES
    for line in unread_lines(unread_below([folder], suffixes)):
        report.note(line)
    found = find_pictures([folder], leave_out=[output], suffixes=suffixes)
    pictures = [picture for picture in found if picture.path.suffix.lower() in SUFFIXES]
    if is_map and pictures and len(pictures) < len(found):
        found = find_pictures([folder], leave_out=[output], suffixes=SUFFIXES)
    names = {picture.name for picture in found} if is_map else set()
    made, here = (os.path.join(os.path.realpath(place), "") for place in (output, folder))
    return {
        picture.name: picture.path
        for picture in found
        if not (picture.name.endswith(DEEP) and picture.name.removesuffix(DEEP) in names)
        and (here.startswith(made) or not os.path.realpath(picture.path).startswith(made))
    }


def _partners(
    folder: str, found: dict[str, Path], first: str, names: Sequence[str], report: Report
) -> dict[str, Path]:
    """A folder's pictures by the names that those of the first folder have."""
    found = {as_spelt(name): path for name, path in found.items()} | found
    partners = {name: found.get(name) or found.get(as_spelt(name)) for name in names}
    missing = [name for name, path in partners.items() if path is None]
    if missing:
        shown = ", ".join(missing[:_NAMED]) + (f" and {len(missing) - _NAMED} more" * (len(missing) > _NAMED))
        raise ValueError(f"{folder} has no picture of the name that one in {first} has: {shown}")
    used = {name: path for name, path in partners.items() if path is not None}
    unused = set(found.values()) - set(used.values())
    if unused:
        report.note(f"{len(unused)} of {folder} are not used: {first} has none of their names")
    return used


def _of_picture(whole: Request, places: dict[str, str], name: str) -> Request:
    """The request for the pictures of one name."""

    def control(text: str) -> str:
        if is_none(text):
            return text
        before, path, how = split_control(text)
        between, mask, after = split_mask(how)
        return f"{before}{picture(path)}{between}{picture(mask)}{after}"

    def picture(path: str) -> str:
        return places.get(at_home(path), path)

    return Request(
        tuple(map(control, whole.controls)),
        tuple(map(control, whole.maps)),
        None if whole.start is None else picture(whole.start),
        None if whole.mask is None else picture(whole.mask),
        str(Path(at_home(whole.output)) / f"{name}.png"),
    )


def run(
    asked: Sequence[Request],
    plan: Callable[[Request], Plan],
    report: Report,
    *,
    preview: str | None = None,
    count: int = 1,
    notes: Callable[[Plan], Sequence[str]] = lambda job: job.notes,
) -> Result:
    """Make `count` pictures for each request, one request after the other.

    plan: checks a request. Faults of a picture are told, and the job goes on; those of the request are
    raised, and so is a full disk. notes: what is to be known of a plan; each line is told once.
    """
    outputs = (path for one in asked for path in numbered_outputs(one.output, count))
    if preview is not None and os.path.realpath(at_home(preview)) in map(os.path.realpath, outputs):
        raise ValueError(f"the preview {preview} is one of the pictures that are made: choose another file")
    result, session, told = Result(), None, set[str]()
    faults, doubts = list[ValueError](), 0
    for number, request in enumerate(asked):
        created = _with_folders(Path(request.output).parent)
        try:
            job = plan(request)
            for line in notes(job):
                if line not in told:
                    told.add(line)
                    report.note(f"note: {line}")
            session = _session(job, session, report, preview)
            report.status(f"picture {number + 1} of {len(asked)}: {request.output}")
            made = _written(session)
        except ValueError as error:
            for folder in created:
                with suppress(OSError):
                    folder.rmdir()  # only where nothing was put into it
            begun, is_last = bool(result.made or result.kept), number == len(asked) - 1
            doubts += not str(error).startswith(tuple(request.files))  # else it says which file is wrong
            if _is_of_request(error, faults, doubts, begun=begun, is_last=is_last):
                raise (error if begun or not faults else faults[0]) from None
            faults.append(error)
            result.failed.append(request.output)
            if begun:
                report.note(f"left out: {request.output}: {error}")
            continue
        if not (result.made or result.kept):  # so that it was not the request
            for output, fault in zip(result.failed, faults, strict=True):
                report.note(f"left out: {output}: {fault}")
        result.made += made
        result.kept += [output for output in job.outputs if output not in made]
    return result


def _is_of_request(
    error: ValueError, before: Sequence[ValueError], doubts: int, *, begun: bool, is_last: bool
) -> bool:
    """Whether a fault is more than one picture's: the disk is full, or nothing at all can be made.

    doubts: how many faults, with this one, do not say that a picture is wrong.
    """
    if getattr(error.__cause__, "errno", None) in FULL_DISK:
        return True
    again = any(str(error) == str(one) for one in before)
    return not begun and (again or is_last or doubts >= _TRIED)


def _session(job: Plan, before: Session | None, report: Report, preview: str | None) -> Session:
    """What makes the pictures of a plan, with the models of the one before."""
    shown = None if preview is None else check_preview(preview, job)
    if before is not None:
        return before.turned_to(job)
    with nothing_collected():
        session = Session(job, report, preview=shown, many=True)
    session.check_told()
    return session


def _written(session: Session) -> list[Path]:
    """Make the pictures that are not there; returns their files."""
    made: list[Path] = []
    write_all(session, finished=lambda k, _: made.append(session.job.outputs[k]), again=False)
    return made


def _with_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns which were not there, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror or error}") from error
    return missing

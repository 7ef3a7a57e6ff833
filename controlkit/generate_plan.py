"""What is asked of `controlkit generate`, checked before the models' libraries are loaded.

Numbers, kinds, files, the output: a mistake costs no waiting.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import (
    __version__,
    additions,
    arguments,
    files,
    images,
    infotext,
    limits,
    naming,
    preprocessors,
    prompt_syntax,
)
from controlkit.additions import Additions
from controlkit.infotext import ControlRecord, PictureRecord, StartRecord
from controlkit.settings import Settings

PREVIEW_CHUNK = "controlkit-preview"  # marks a PNG that a later preview may replace
INPAINT = "inpaint"  # the kind of control whose map is made of the picture to start from and its mask
DEFAULT_STRENGTH = 0.75  # of a start from a whole picture; a hole is filled from nothing


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What is asked for, with the defaults. None: decided by the base, the map or the device.

    seed: of the first picture; picture k of `count` has seed + k. memory_limit: the bytes within which the
    measures that save memory are chosen anew.
    """

    prompt: str = ""
    negative_prompt: str = ""
    base: str = "tiny"
    steps: int = 20
    scheduler: str = "ddim"
    seed: int = 0
    guidance: float | None = None
    count: int = 1
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    dtype: str | None = None
    strength: float | None = None
    memory_limit: int | None = None

    def check(self) -> None:
        """Raise ValueError for the first number outside its range, or an unknown scheduler."""
        if self.scheduler not in infotext.SAMPLER_NAMES:
            raise naming.unknown("scheduler", self.scheduler, infotext.SAMPLER_NAMES)
        super().check()
        limits.check_count(self.count)
        limits.check_seeds([self.seed + self.count - 1])
        limits.check_size(self.width, self.height)
        if self.guidance is not None:
            limits.check_guidance(self.guidance)
        if self.strength is not None:
            limits.check_strength(self.strength)


@dataclass(frozen=True, eq=False)
class Source:
    """One control's file: how it is recorded, its picture, uint8 (H, W, 3), and where that was found.

    `record.adapter` is "" until the base is known and decides it. mask: of the region, (H, W), or None.
    """

    record: ControlRecord
    picture: np.ndarray
    file: Path
    mask: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Beginning:
    """The picture that a generation starts from: how it is recorded, its pixels and its mask's."""

    record: StartRecord
    picture: np.ndarray
    mask: np.ndarray | None
    files: tuple[Path, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that `run` needs, checked."""

    options: Options
    sources: tuple[Source, ...]
    outputs: tuple[Path, ...]
    beginning: Beginning | None = None
    notes: tuple[str, ...] = ()
    additions: Additions = field(default_factory=Additions)


def plan(
    given: Mapping[str, Any],
    *,
    controls: Sequence[str] = (),
    maps: Sequence[str] = (),
    adapters: Sequence[str] = (),
    start: str | None = None,
    mask: str | None = None,
    loras: Sequence[str] = (),
    embeddings: Sequence[str] = (),
    ip_adapters: Sequence[str] = (),
    image_encoder: str | None = None,
    image: str | None = None,
    output: str,
    like: str | None = None,
) -> Plan:
    """Check a request and read its pictures.

    given: the fields of `Options` that were given. like: a picture made before, whose parameters fill in
    whatever is not given. controls, maps, adapters, start, mask, loras, embeddings, ip_adapters, image: as on
    the command line; controls or maps replace those of `like`, start its start, each other kind its own.
    Raises ValueError for anything that can be known to be wrong before the models are loaded.
    """
    remembered = None if like is None else infotext.parse(images.read_png_text(like), source=like)
    if remembered is None and "prompt" not in given:
        raise ValueError('give a prompt, as in: controlkit generate "a red figure" --control canny=photo.jpg')
    options = Options(**{**_options_of(remembered, given), **given})
    options.check()
    wanted = [arguments.parse_control(text, is_map=False) for text in controls]
    wanted += [arguments.parse_control(text, is_map=True) for text in maps]
    if wanted or remembered is None:
        sources = [_source(argument) for argument in wanted]
    else:
        sources = [_source_again(record, like=Path(str(like))) for record in remembered.controls]
        if options.base != remembered.base:
            sources = [adapted(source, "") for source in sources]  # the new base decides
    sources = _with_adapters(sources, arguments.parse_adapters(adapters))
    beginning = _beginning(start, mask, options, remembered, like)
    if any(s.record.kind == INPAINT for s in sources) and (beginning is None or beginning.mask is None):
        raise ValueError(
            f"an {INPAINT} control follows a picture with a hole: add --from PICTURE --mask MASK"
        )
    find = partial(_found, like=Path(str(like)))
    added = additions.asked(
        loras,
        embeddings,
        ip_adapters,
        image_encoder,
        remembered,
        find=find,
        image=image,
        base=options.base,
    )
    added = replace(added, vae=options.vae)
    if options.image_noise and added.shown is None:
        raise ValueError("--image-noise belongs to a picture that the base is told: add --image PICTURE")
    _check_text(options, sources, added.texts())
    outputs = arguments.numbered_outputs(output, options.count)
    read = [file for source in sources for file in (source.file, Path(source.record.mask or source.file))]
    read += [] if beginning is None else beginning.files
    read += added.places()
    _check_outputs(outputs, [*read, *([Path(like)] if like else [])])
    notes = [] if remembered is None else list(_version_notes(remembered))
    for text in (options.prompt, options.negative_prompt):
        notes += prompt_syntax.notes(text, options.prompt_syntax)
    notes += _map_notes(sources)
    return Plan(options, tuple(sources), tuple(outputs), beginning, tuple(notes), added)


def _options_of(record: PictureRecord | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that repeat a recorded picture, without those that another base or device decides anew."""
    if record is None:
        return {}
    dropped: set[str] = set()
    if given.get("base", record.base) != record.base:
        dropped |= {"guidance", "width", "height", "dtype", "memory", "vae", "image_noise", "class_label"}
    if given.get("device", record.device) != record.device:
        dropped |= {"dtype", "memory"}
    kept = Options.__dataclass_fields__.keys() - dropped
    return {name: value for name, value in vars(record).items() if name in kept}


def _source(argument: arguments.ControlArgument) -> Source:
    if not argument.is_map and argument.kind not in (*preprocessors.names(), INPAINT):
        preprocessors.get(argument.kind)  # raises, with the kinds there are
    picture, mask = images.load_picture(argument.path), _mask(argument.mask)
    record = ControlRecord(
        kind=argument.kind,
        path=argument.path,
        sha256=files.sha256_file(argument.path),
        is_map=argument.is_map,
        adapter="",
        scale=argument.scale,
        start=argument.start,
        end=argument.end,
        gate=argument.gate,
        mode=argument.mode,
        layers=argument.layers,
        mask=argument.mask,
        mask_sha256=files.sha256_file(argument.mask) if argument.mask else "",
        only_mid=argument.only_mid,
    )
    return Source(record, picture, Path(argument.path), mask)


def _mask(path: str) -> np.ndarray | None:
    """A mask's file as (H, W), uint8: white is where something happens."""
    return images.load_picture(path).max(axis=2) if path else None


def _beginning(
    start: str | None,
    mask: str | None,
    options: Options,
    remembered: PictureRecord | None,
    like: str | None,
) -> Beginning | None:
    """What is started from: what is given, or else what an earlier picture was made from."""
    before = None if remembered is None else remembered.start
    if start is not None:
        return _begun(start, mask, options.strength)
    if before is None:
        for name, value in (("--mask", mask), ("--strength", options.strength)):
            if value is not None:
                raise ValueError(f"{name} {value} belongs to a picture to start from: add --from PICTURE")
        return None
    place = Path(str(like))
    path = _found(before.path, before.sha256, like=place, option="--from")
    hole = _found(before.mask, before.mask_sha256, like=place, option="--mask") if before.mask else None
    strength = before.strength if options.strength is None else options.strength
    pixels = None if hole is None else _mask(str(hole))
    read = (path,) if hole is None else (path, hole)
    return Beginning(replace(before, strength=strength), images.load_picture(path), pixels, read)


def _begun(start: str, mask: str | None, strength: float | None) -> Beginning:
    picture, pixels = images.load_picture(start), _mask(mask or "")
    _check_mask(pixels, picture, str(mask), start)
    usual = DEFAULT_STRENGTH if mask is None else 1.0
    record = StartRecord(
        path=start,
        sha256=files.sha256_file(start),
        strength=usual if strength is None else strength,
        mask=mask or "",
        mask_sha256=files.sha256_file(mask) if mask else "",
    )
    return Beginning(record, picture, pixels, (Path(start),) if mask is None else (Path(start), Path(mask)))


def _check_mask(mask: np.ndarray | None, picture: np.ndarray, name: str, of: str) -> None:
    if mask is None:
        return
    if mask.shape != picture.shape[:2]:
        raise ValueError(
            f"the mask {name} is {mask.shape[1]}x{mask.shape[0]} and its picture {of}"
            f" {picture.shape[1]}x{picture.shape[0]}: they must have one size"
        )
    if mask.max() < 128:
        raise ValueError(f"the mask {name} is black: white is what is redrawn, and there is none")


def _source_again(record: ControlRecord, *, like: Path) -> Source:
    """The source of an earlier picture, found where it was or beside that picture, and unchanged."""
    option = f"{'--map' if record.is_map else '--control'} {record.kind}="
    found = _found(record.path, record.sha256, like=like, option=option)
    mask = _found(record.mask, record.mask_sha256, like=like, option=option) if record.mask else ""
    return Source(record, images.load_picture(found), found, _mask(str(mask)))


def _found(path: str, sha256: str, *, like: Path, option: str) -> Path:
    """A file that an earlier picture was made from, where it was or beside that picture, and unchanged."""
    places = [Path(path), like.parent / Path(path).name]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        raise ValueError(
            f"{like} was made from {path}, which is gone: put it back, or use {option.partition(' ')[0]}"
        )
    if files.sha256_file(found) != sha256:
        blank = "" if option.endswith("=") else " "
        raise ValueError(
            f"{like} was made from {found}, which has changed since; to use it as it is now, add"
            f" {option}{blank}{found}"
        )
    return found


def _with_adapters(sources: Sequence[Source], adapters: Mapping[str, str]) -> list[Source]:
    kinds = {source.record.kind for source in sources}
    for kind, name in adapters.items():
        if kind not in kinds:
            raise ValueError(f"--adapter {kind}={name} has no --control or --map {kind} to belong to")
    for source in sources:
        kind = source.record.kind
        if not (kind in preprocessors.names() or kind in adapters or source.record.adapter):
            raise ValueError(f"{naming.unknown('map', kind, preprocessors.names())}, or name its --adapter")
    return [adapted(source, adapters.get(source.record.kind, source.record.adapter)) for source in sources]


def adapted(source: Source, adapter: str) -> Source:
    """The source with an adapter named."""
    return replace(source, record=replace(source.record, adapter=adapter))


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    for output in outputs:
        arguments.check_not_input(output, inputs)
        files.check_writable(output)


def check_preview(preview: str, job: Plan) -> Path:
    """The file of a preview. Raises ValueError for one that is no PNG, is read or written otherwise, or
    exists and was never a preview."""
    path = Path(preview)
    if path.suffix.lower() != ".png":
        raise ValueError(f"the preview {preview} must end in .png")
    used = [*job.outputs, *(source.file for source in job.sources)]
    used += [] if job.beginning is None else job.beginning.files
    taken = path.resolve() in {file.resolve() for file in used}
    if taken or (path.exists() and PREVIEW_CHUNK not in images.read_png_text(path)):
        raise ValueError(
            f"the preview {preview} would replace a file: name another, which is removed at the end"
        )
    files.check_writable(path)
    return path


def _check_text(options: Options, sources: Sequence[Source], others: Sequence[str]) -> None:
    """Raise ValueError for a text that no PNG could record, as a file's name that is not Unicode."""
    texts = [options.prompt, options.negative_prompt, options.base, options.clip]
    texts += [text for source in sources for text in (source.record.path, source.record.adapter)]
    texts += others
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} is not valid Unicode and cannot be recorded in the PNG") from error


def versions() -> dict[str, str]:
    """Of this software and of what a picture depends on besides."""
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("diffusers", "torch", "transformers")}
    return {"controlkit": __version__, **libraries}


def _map_notes(sources: Sequence[Source]) -> Iterator[str]:
    """What is wrong with the maps that are used as they are, and the cure."""
    for source in sources:
        if source.record.is_map and source.record.kind in preprocessors.names():
            for finding in preprocessors.lint(source.picture, source.record.kind):
                yield f"{source.record.path}: {finding.message}; {finding.cure}"


def _version_notes(record: PictureRecord) -> tuple[str, ...]:
    here = versions()
    then = record.versions
    other = [f"{name} {then[name]} (here {here.get(name)})" for name in then if here.get(name) != then[name]]
    return (f"made with {', '.join(other)}: the picture may differ slightly",) if other else ()

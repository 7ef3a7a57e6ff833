"""`controlkit generate`: from what was asked for to files. Two stages, so that mistakes cost no waiting.

`plan` checks everything that can be checked without the models' libraries: numbers, kinds, pictures, the
output. `run` checks the models' names, loads them, extracts the maps, generates and writes. The torch-based
modules are imported by `run` only.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from controlkit import __version__, arguments, files, images, infotext, limits, naming, preprocessors
from controlkit.infotext import ControlRecord, PictureRecord

if TYPE_CHECKING:
    import torch

    from controlkit.base import Base
    from controlkit.control import Control


PRECISIONS = ("float32", "float16", "bfloat16")


class Report(Protocol):
    """How a job tells what it is doing; the command line shows it."""

    def status(self, text: str) -> None:
        """What happens now, in one line."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far the current part is."""


@dataclass(frozen=True)
class Options:
    """What is asked for, with the defaults. None: decided by the base, the map or the device.

    seed: of the first picture; picture k of `count` has seed + k.
    """

    prompt: str = ""
    negative_prompt: str = ""
    base: str = "tiny"
    steps: int = 20
    guidance: float | None = None
    scheduler: str = "ddim"
    seed: int = 0
    count: int = 1
    width: int | None = None
    height: int | None = None
    device: str = "auto"
    dtype: str | None = None

    def check(self) -> None:
        """Raise ValueError for the first number outside its range, or an unknown scheduler."""
        if self.scheduler not in infotext.SAMPLER_NAMES:
            raise naming.unknown("scheduler", self.scheduler, infotext.SAMPLER_NAMES)
        limits.check_steps(self.steps)
        limits.check_count(self.count)
        limits.check_seeds([self.seed, self.seed + self.count - 1])
        limits.check_size(self.width, self.height)
        if self.guidance is not None:
            limits.check_guidance(self.guidance)


@dataclass(frozen=True, eq=False)
class Source:
    """One control's file: how it is recorded, its picture, uint8 (H, W, 3), and where that was found.

    `record.adapter` is "" until the base is known and decides it.
    """

    record: ControlRecord
    picture: np.ndarray
    file: Path


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that `run` needs, checked."""

    options: Options
    sources: tuple[Source, ...]
    outputs: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def plan(
    given: Mapping[str, Any],
    *,
    controls: Sequence[str] = (),
    maps: Sequence[str] = (),
    adapters: Sequence[str] = (),
    output: str,
    like: str | None = None,
) -> Plan:
    """Check a request and read its pictures.

    given: the fields of `Options` that were given. like: a picture made before, whose parameters fill in
    whatever is not given. controls, maps, adapters: as on the command line; controls or maps replace
    those of `like`.
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
            sources = [_adapted(source, "") for source in sources]  # the new base decides
    sources = _with_adapters(sources, arguments.parse_adapters(adapters))
    _check_text(options, sources)
    outputs = arguments.numbered_outputs(output, options.count)
    _check_outputs(outputs, [*(source.file for source in sources), *([Path(like)] if like else [])])
    notes = () if remembered is None else _version_notes(remembered)
    return Plan(options, tuple(sources), tuple(outputs), (*notes, *_map_notes(sources)))


def run(job: Plan, report: Report) -> list[PictureRecord]:
    """Generate the pictures of a checked plan, each written when it is made; returns the records in them."""
    report.status(f"loading the libraries and the base {job.options.base}")
    from controlkit import sampling
    from controlkit.adapters import check_adapter
    from controlkit.base import check_base, load_base

    check_base(job.options.base)
    for source in job.sources:
        if source.record.adapter:
            check_adapter(source.record.adapter)  # before gigabytes of base are downloaded or loaded
    device, dtype = pick_device(job.options.device, job.options.dtype, base=job.options.base)
    base = load_base(job.options.base, device=device, dtype=dtype)
    first, sources = _decided(job, base)
    controls = [_control(source, base, first.width, first.height, report) for source in sources]
    seeds = [first.seed + k for k in range(job.options.count)]
    report.status(f"generating {len(seeds)} x {first.width}x{first.height}, {first.steps} steps, on {device}")
    records = [replace(first, seed=seed) for seed in seeds]

    def write(k: int, picture: np.ndarray) -> None:
        images.write_png(job.outputs[k], picture, text=infotext.chunks(records[k]))

    sampling.generate(
        base,
        first.prompt,
        negative_prompt=first.negative_prompt,
        controls=controls,
        steps=first.steps,
        guidance=first.guidance,
        scheduler=first.scheduler,
        seeds=seeds,
        width=first.width,
        height=first.height,
        callback=lambda done, total, _: report.progress(done, total),
        finished=write,
    )
    return records


def pick_device(name: str, dtype: str | None, *, base: str) -> tuple[str, torch.dtype]:
    """The device and precision to use.

    name: "auto" (a CUDA GPU if there is one, else the CPU) or a torch device. dtype: one of `PRECISIONS`;
    None is float32 on the CPU and for bundled models, else float16. Raises ValueError for another precision.
    """
    import torch

    from controlkit.base import BUNDLED

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "float32" if name == "cpu" or base in BUNDLED else "float16"
    if dtype not in PRECISIONS:
        raise naming.unknown("precision", dtype, PRECISIONS)
    return name, getattr(torch, dtype)


def extractor_options(kind: str, *, bundled: bool, device: str = "cpu") -> dict[str, str]:
    """How a preprocessor is set up beside a base: the bundled model for a bundled base, on its device."""
    if kind not in ("openpose", "depth"):
        return {}
    return {"device": device, **({"model": "tiny"} if bundled else {})}


def warn_if_black(image: np.ndarray, name: str) -> None:
    """Warn of a map that tells a network nothing: no edge, nobody, or one depth everywhere."""
    if not image.any():
        warnings.warn(f"{name} is black: nothing was found that a picture could follow", stacklevel=2)


def _options_of(record: PictureRecord | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that repeat a recorded picture, without those that another base or device decides anew."""
    if record is None:
        return {}
    dropped: set[str] = set()
    if given.get("base", record.base) != record.base:
        dropped |= {"guidance", "width", "height", "dtype"}
    if given.get("device", record.device) != record.device:
        dropped |= {"dtype"}
    kept = Options.__dataclass_fields__.keys() - dropped
    return {name: value for name, value in vars(record).items() if name in kept}


def _source(argument: arguments.ControlArgument) -> Source:
    if not argument.is_map and argument.kind not in preprocessors.names():
        preprocessors.get(argument.kind)  # raises, with the kinds there are
    picture = images.load_picture(argument.path)
    record = ControlRecord(
        kind=argument.kind,
        path=argument.path,
        sha256=files.sha256_file(argument.path),
        is_map=argument.is_map,
        adapter="",
        scale=argument.scale,
    )
    return Source(record, picture, Path(argument.path))


def _source_again(record: ControlRecord, *, like: Path) -> Source:
    """The source of an earlier picture, found where it was or beside that picture, and unchanged."""
    places = [Path(record.path), like.parent / Path(record.path).name]
    found = next((place for place in places if os.path.isfile(place)), None)
    if found is None:
        raise ValueError(f"{like} was made from {record.path}, which is gone: put it back, or use --control")
    if files.sha256_file(found) != record.sha256:
        raise ValueError(
            f"{like} was made from {found}, which has changed since; to use it as it is now, add "
            f"{'--map' if record.is_map else '--control'} {record.kind}={found}"
        )
    return Source(record, images.load_picture(found), found)


def _with_adapters(sources: Sequence[Source], adapters: Mapping[str, str]) -> list[Source]:
    kinds = {source.record.kind for source in sources}
    for kind, name in adapters.items():
        if kind not in kinds:
            raise ValueError(f"--adapter {kind}={name} has no --control or --map {kind} to belong to")
    for source in sources:
        kind = source.record.kind
        if not (kind in preprocessors.names() or kind in adapters or source.record.adapter):
            raise ValueError(f"{naming.unknown('map', kind, preprocessors.names())}, or name its --adapter")
    return [_adapted(source, adapters.get(source.record.kind, source.record.adapter)) for source in sources]


def _adapted(source: Source, adapter: str) -> Source:
    return replace(source, record=replace(source.record, adapter=adapter))


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    for output in outputs:
        arguments.check_not_input(output, inputs)
        files.check_writable(output)


def _check_text(options: Options, sources: Sequence[Source]) -> None:
    """Raise ValueError for a text that no PNG could record, as a file's name that is not Unicode."""
    texts = [options.prompt, options.negative_prompt, options.base]
    texts += [text for source in sources for text in (source.record.path, source.record.adapter)]
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} is not valid Unicode and cannot be recorded in the PNG") from error


def _decided(job: Plan, base: Base) -> tuple[PictureRecord, list[Source]]:
    """The first picture's record and the sources, with all that the base and the map's size decide."""
    from controlkit import sampling
    from controlkit.adapters import default_adapter

    sources = [
        source if source.record.adapter else _adapted(source, default_adapter(source.record.kind, base))
        for source in job.sources
    ]
    options = job.options
    map_size = (sources[0].picture.shape[1], sources[0].picture.shape[0]) if sources else None
    width, height = sampling.picture_size(base, map_size, options.width, options.height)
    record = PictureRecord(
        prompt=options.prompt,
        negative_prompt=options.negative_prompt,
        base=options.base,
        controls=tuple(source.record for source in sources),
        steps=options.steps,
        guidance=sampling.default_guidance(base) if options.guidance is None else options.guidance,
        scheduler=options.scheduler,
        seed=options.seed,
        width=width,
        height=height,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        versions=_versions(),
    )
    return record, sources


def _control(source: Source, base: Base, width: int, height: int, report: Report) -> Control:
    """The control of one source: its map extracted where it is a photo, its adapter loaded."""
    from controlkit.adapters import load_adapter
    from controlkit.base import BUNDLED
    from controlkit.control import SHARP_KINDS, Control

    record, image = source.record, source.picture
    report.status(f"loading the {record.kind} adapter {record.adapter}")
    adapter = load_adapter(record.adapter, base=base, device=base.device, dtype=base.dtype)
    learned = adapter.info.map.kind
    if learned not in ("", record.kind):
        warnings.warn(
            f"adapter {record.adapter} learned to follow {learned} maps, not {record.kind}", stacklevel=2
        )
    image = images.cover(image, width, height, nearest=record.is_map and record.kind in SHARP_KINDS)
    if not record.is_map:
        report.status(f"extracting the {record.kind} map from {record.path}")
        bundled = base.name in BUNDLED
        options = extractor_options(record.kind, bundled=bundled, device=str(base.device))
        image = preprocessors.get(record.kind, **options).extract([image])[0].image
        warn_if_black(image, f"the {record.kind} map of {record.path}")
    return Control(adapter, image, scale=record.scale, start=record.start, end=record.end)


def _versions() -> dict[str, str]:
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
    here = _versions()
    then = record.versions
    other = [f"{name} {then[name]} (here {here.get(name)})" for name in then if here.get(name) != then[name]]
    return (f"made with {', '.join(other)}: the picture may differ slightly",) if other else ()

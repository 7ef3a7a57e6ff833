"""`controlkit generate`: from what was asked for to files. Two stages, so that mistakes cost no waiting.

`plan` checks everything that can be checked without the models' libraries: numbers, kinds, pictures, the
output. `run` checks the models' names, loads them, extracts the maps, generates and writes. The torch-based
modules are imported by `run` only.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from controlkit import __version__, arguments, files, images, infotext, limits, naming, preprocessors
from controlkit.infotext import ControlRecord, PictureRecord, StartRecord

if TYPE_CHECKING:
    import torch

    from controlkit.adapters import Adapter
    from controlkit.base import Base
    from controlkit.control import Control
    from controlkit.sampling import Start


PRECISIONS = ("float32", "float16", "bfloat16")
INPAINT = "inpaint"  # the kind of control whose map is made of the picture to start from and its mask
DEFAULT_STRENGTH = 0.75  # of a start from a whole picture; a hole is filled from nothing
CONTROL_SETTINGS = ("scale", "start", "end", "gate", "mode", "layers", "only_mid")  # recorded as they are


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
    guidance_rescale: float = 0.0
    temperature: float | None = None
    strength: float | None = None
    hires: float = 1.0
    hires_strength: float = 0.5
    tile: int | None = None
    control_every: int = 1
    features_every: int = 1
    guidance_until: float = 1.0

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
        limits.check_rescale(self.guidance_rescale)
        limits.check_temperature(self.temperature, self.scheduler)
        limits.check_strength(self.hires_strength)
        if self.strength is not None:
            limits.check_strength(self.strength)
        if self.hires != 1:
            limits.check_factor(self.hires)
        if self.tile is not None:
            limits.check_tile(self.tile)
        limits.check_every("control_every", self.control_every)
        limits.check_every("features_every", self.features_every)
        limits.check_share("guidance_until", self.guidance_until)


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


def plan(
    given: Mapping[str, Any],
    *,
    controls: Sequence[str] = (),
    maps: Sequence[str] = (),
    adapters: Sequence[str] = (),
    start: str | None = None,
    mask: str | None = None,
    output: str,
    like: str | None = None,
) -> Plan:
    """Check a request and read its pictures.

    given: the fields of `Options` that were given. like: a picture made before, whose parameters fill in
    whatever is not given. controls, maps, adapters, start, mask: as on the command line; controls or maps
    replace those of `like`, and start its start.
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
    beginning = _beginning(start, mask, options, remembered, like)
    if any(s.record.kind == INPAINT for s in sources) and (beginning is None or beginning.mask is None):
        raise ValueError(
            f"an {INPAINT} control follows a picture with a hole: add --from PICTURE --mask MASK"
        )
    _check_text(options, sources)
    outputs = arguments.numbered_outputs(output, options.count)
    read = [file for source in sources for file in (source.file, Path(source.record.mask or source.file))]
    read += [] if beginning is None else beginning.files
    _check_outputs(outputs, [*read, *([Path(like)] if like else [])])
    notes = () if remembered is None else _version_notes(remembered)
    return Plan(options, tuple(sources), tuple(outputs), beginning, (*notes, *_map_notes(sources)))


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
    adapters = [_adapter(source, base, report) for source in sources]
    follow = partial(_controls, job, sources, adapters, base, report)
    controls = follow(first.width, first.height)
    seeds = [first.seed + k for k in range(job.options.count)]
    report.status(f"generating {len(seeds)} x {first.width}x{first.height}, {first.steps} steps, on {device}")
    records = [replace(first, seed=seed) for seed in seeds]

    options = _sampling_options(first, job.options)
    second = _second_stage(first, base, follow, options, report)

    def write(k: int, picture: np.ndarray) -> None:
        if second is not None:
            picture = second(picture, records[k].seed)
        images.write_png(job.outputs[k], picture, text=infotext.chunks(records[k]))

    sampling.generate(
        base,
        first.prompt,
        controls=controls,
        start=_start(job.beginning),
        seeds=seeds,
        width=first.width,
        height=first.height,
        callback=lambda done, total, _: report.progress(done, total),
        finished=write,
        **options,
    )
    return records


def _sampling_options(record: PictureRecord, options: Options) -> dict[str, Any]:
    """What both stages are told in the same words."""
    from controlkit.sampling import Savings, Tiles

    return {
        "negative_prompt": record.negative_prompt,
        "steps": record.steps,
        "guidance": record.guidance,
        "guidance_rescale": record.guidance_rescale,
        "scheduler": record.scheduler,
        "temperature": record.temperature,
        "savings": Savings(record.control_every, record.features_every, record.guidance_until),
        "tiles": None if options.tile is None else Tiles(options.tile),
    }


def _second_stage(
    first: PictureRecord,
    base: Base,
    follow: Callable[[int, int], list[Control]],
    options: Mapping[str, Any],
    report: Report,
) -> Callable[[np.ndarray, int], np.ndarray] | None:
    """Makes a picture larger and refines it, or None where there is one stage; maps are extracted anew."""
    if first.hires == 1:
        return None
    from controlkit import cascade

    controls = follow(*cascade.larger_size(first.width, first.height, first.hires))

    def refined(picture: np.ndarray, seed: int) -> np.ndarray:
        return cascade.refine(
            base,
            first.prompt,
            picture,
            factor=first.hires,
            strength=first.hires_strength,
            seed=seed,
            controls=controls,
            callback=lambda done, total, _: report.progress(done, total),
            **options,
        )

    return refined


def _start(beginning: Beginning | None) -> Start | None:
    if beginning is None:
        return None
    from controlkit.sampling import Start

    return Start(beginning.picture, beginning.record.strength, beginning.mask)


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
    if not argument.is_map and argument.kind not in (*preprocessors.names(), INPAINT):
        preprocessors.get(argument.kind)  # raises, with the kinds there are
    picture = images.load_picture(argument.path)
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
    return Source(record, picture, Path(argument.path), _mask(argument.mask))


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
    if start is None and before is not None:
        assert like is not None
        place = Path(like)
        path = _found(before.path, before.sha256, like=place, option="--from")
        hole = _found(before.mask, before.mask_sha256, like=place, option="--mask") if before.mask else None
        strength = before.strength if options.strength is None else options.strength
        record = replace(before, strength=strength)
    elif start is None:
        for name, value in (("--mask", mask), ("--strength", options.strength)):
            if value is not None:
                raise ValueError(f"{name} {value} belongs to a picture to start from: add --from PICTURE")
        return None
    else:
        path, hole = Path(start), None if mask is None else Path(mask)
        usual = DEFAULT_STRENGTH if mask is None else 1.0
        record = StartRecord(
            path=start,
            sha256=files.sha256_file(start),
            strength=usual if options.strength is None else options.strength,
            mask=mask or "",
            mask_sha256=files.sha256_file(mask) if mask else "",
        )
    picture, pixels = images.load_picture(path), None if hole is None else _mask(str(hole))
    _check_mask(pixels, picture, str(hole), str(path))
    return Beginning(record, picture, pixels, (path,) if hole is None else (path, hole))


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
    shaping = [source.picture for source in sources]
    shaping += [] if job.beginning is None else [job.beginning.picture]
    map_size = (shaping[0].shape[1], shaping[0].shape[0]) if shaping else None
    width, height = sampling.picture_size(
        base, map_size, options.width, options.height, any_area=options.tile is not None
    )
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
        guidance_rescale=options.guidance_rescale,
        temperature=options.temperature,
        start=None if job.beginning is None else job.beginning.record,
        hires=options.hires,
        hires_strength=options.hires_strength,
        tile=options.tile,
        control_every=options.control_every,
        features_every=options.features_every,
        guidance_until=options.guidance_until,
    )
    return record, sources


def _adapter(source: Source, base: Base, report: Report) -> Adapter:
    """The adapter of one source, loaded."""
    from controlkit.adapters import load_adapter

    record = source.record
    report.status(f"loading the {record.kind} adapter {record.adapter}")
    adapter = load_adapter(record.adapter, base=base, device=base.device, dtype=base.dtype)
    learned = adapter.info.map.kind
    if learned not in ("", record.kind):
        warnings.warn(
            f"adapter {record.adapter} learned to follow {learned} maps, not {record.kind}", stacklevel=2
        )
    return adapter


def _controls(
    job: Plan,
    sources: Sequence[Source],
    adapters: Sequence[Adapter],
    base: Base,
    report: Report,
    width: int,
    height: int,
) -> list[Control]:
    """The controls of a picture of some size, their maps extracted where they are photos."""
    from controlkit.control import Control

    controls = []
    for source, adapter in zip(sources, adapters, strict=True):
        record = source.record
        if record.kind == INPAINT:
            cond: Any = _inpaint_map(job.beginning, width, height)
        else:
            cond = _map_of(source, base, width, height, report)
        how = {name: getattr(record, name) for name in CONTROL_SETTINGS}
        controls.append(Control(adapter, cond, mask=_fitted(source.mask, width, height), **how))
    return controls


def _inpaint_map(beginning: Beginning | None, width: int, height: int) -> torch.Tensor:
    from controlkit.starting import inpaint_cond

    start = _start(beginning)
    assert start is not None
    fitted = start.fitted(width, height)
    return inpaint_cond(fitted.picture, fitted.hole())


def _fitted(mask: np.ndarray | None, width: int, height: int) -> np.ndarray | None:
    if mask is None:
        return None
    return images.cover(np.repeat(mask[..., None], 3, axis=2), width, height)[..., 0]


def _map_of(source: Source, base: Base, width: int, height: int, report: Report) -> np.ndarray:
    """One source's map at a size."""
    from controlkit.base import BUNDLED
    from controlkit.control import SHARP_KINDS

    record = source.record
    sharp = record.is_map and record.kind in SHARP_KINDS
    image = images.cover(source.picture, width, height, nearest=sharp)
    if not record.is_map:
        report.status(f"extracting the {record.kind} map from {record.path}")
        bundled = base.name in BUNDLED
        options = extractor_options(record.kind, bundled=bundled, device=str(base.device))
        image = preprocessors.get(record.kind, **options).extract([image])[0].image
        warn_if_black(image, f"the {record.kind} map of {record.path}")
    return image


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

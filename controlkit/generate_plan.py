"""What is asked of `controlkit generate`, checked before the models' libraries are loaded.

Numbers, kinds, files, the output: a mistake costs no waiting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from controlkit import (
    additions,
    arguments,
    files,
    generate_like,
    generate_notes,
    images,
    infotext,
    limits,
    naming,
    preprocessors,
    prompt_syntax,
)
from controlkit.additions import Additions
from controlkit.generate_like import Earlier
from controlkit.generate_notes import versions as versions
from controlkit.generate_start import Beginning as Beginning
from controlkit.generate_start import begun
from controlkit.infotext import ControlRecord
from controlkit.settings import Settings

PREVIEW_CHUNK = "controlkit-preview"  # marks a PNG that a later preview may replace
INPAINT = "inpaint"  # the kind of control whose map is made of the picture to start from and its mask


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What is asked for, with the defaults. None: decided by the base, the map or the device.

    seed: of the first picture; picture k of `count` has seed + k. memory_limit: the bytes within which the
    measures that save memory are chosen anew.
    """

    prompt: str = ""
    negative_prompt: str | None = None
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
        if self.hires != 1:
            limits.enlarged(self.width, self.height, self.hires)
        if self.guidance is not None:
            limits.check_guidance(self.guidance)
        if self.strength is not None:
            limits.check_strength(self.strength)


@dataclass(frozen=True, eq=False)
class Source:
    """One control's file: how it is recorded, its picture, uint8 (H, W, 3), and where that was found.

    `record.adapter` is "" until the base is known and decides it. mask: of the region, (H, W), or None.
    mask_file: where that was found.
    """

    record: ControlRecord
    picture: np.ndarray
    file: Path
    mask: np.ndarray | None = None
    mask_file: Path | None = None

    @property
    def files(self) -> list[Path]:
        """What is read."""
        return [self.file, *([self.mask_file] if self.mask_file else [])]


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that `run` needs, checked. given: the options that were given, and not filled in."""

    options: Options
    sources: tuple[Source, ...]
    outputs: tuple[Path, ...]
    beginning: Beginning | None = None
    notes: tuple[str, ...] = ()
    additions: Additions = field(default_factory=Additions)
    given: frozenset[str] = frozenset()


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
    the command line; controls or maps replace those of `like`, start its start, each other kind its own, and
    "none" takes it away.
    Raises ValueError for anything that can be known to be wrong before the models are loaded.
    """
    earlier = None if like is None else generate_like.read(like)
    if earlier is None and "prompt" not in given:
        raise ValueError('give a prompt, as in: controlkit generate "a red figure" --control canny=photo.jpg')
    given = {**given, **{name: "" for name in ("vae", "clip") if arguments.is_none(given.get(name, ""))}}
    filled_in = earlier.settings(given, Options.__dataclass_fields__) if earlier else {}
    options = Options(**{**filled_in, **given})
    options.check()
    sources = _with_adapters(
        _sources(controls, maps, earlier, options.base), arguments.parse_adapters(adapters)
    )
    beginning, notes = begun(start, mask, options.strength, earlier)
    if any(s.record.kind == INPAINT for s in sources) and (beginning is None or beginning.mask is None):
        raise ValueError(
            f"an {INPAINT} control follows a picture with a hole: add --from PICTURE --mask MASK"
        )
    added = additions.asked(
        loras,
        embeddings,
        ip_adapters,
        image_encoder,
        earlier,
        image=image,
        base=options.base,
    )
    added = replace(added, vae=options.vae)
    if options.image_noise and added.shown is None:
        raise ValueError("--image-noise belongs to a picture that the base is told: add --image PICTURE")
    started = [] if beginning is None else [beginning.record.path, beginning.record.mask]
    _check_text(options, sources, [*added.texts(), *started])
    outputs = arguments.numbered_outputs(output, options.count)
    read = [file for source in sources for file in source.files]
    read += [] if beginning is None else beginning.files
    _check_outputs(outputs, [*read, *added.places(), *([Path(like)] if like else [])])
    if earlier is not None:
        kinds = {"loras": loras, "embeddings": embeddings, "ip_adapters": ip_adapters}
        left_out = earlier.left_out(given, [kind for kind, texts in kinds.items() if texts])
        notes = [*generate_notes.of_versions(earlier.record), *left_out, *notes]
    for text in (options.prompt, options.negative_prompt or ""):
        notes += prompt_syntax.notes(text, options.prompt_syntax)
    notes += generate_notes.of_maps(sources)
    return Plan(options, tuple(sources), tuple(outputs), beginning, tuple(notes), added, frozenset(given))


def _sources(
    controls: Sequence[str], maps: Sequence[str], earlier: Earlier | None, base: str
) -> list[Source]:
    """The controls that are asked for, or else those of an earlier picture."""
    if controls or maps or earlier is None:
        wanted = [arguments.parse_control(text, is_map=False) for text in arguments.without_none(controls)]
        wanted += [arguments.parse_control(text, is_map=True) for text in arguments.without_none(maps)]
        return [_source(argument) for argument in wanted]
    sources = [_source_again(record, earlier) for record in earlier.record.controls]
    if base != earlier.record.base:
        return [adapted(source, "") for source in sources]  # the new base decides
    return sources


def _source(argument: arguments.ControlArgument) -> Source:
    if not argument.is_map and argument.kind not in (*preprocessors.names(), INPAINT):
        preprocessors.get(argument.kind)  # raises, with the kinds there are
    picture = (images.load_map if argument.is_map else images.load_picture)(argument.path)
    mask = images.load_mask(argument.mask) if argument.mask else None
    if mask is not None and not mask.any():
        raise ValueError(
            f"the mask {argument.mask} of the {argument.kind} control is black: it acts where the mask is"
            " white and not transparent, and that is nowhere"
        )
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
    return Source(record, picture, Path(argument.path), mask, Path(argument.mask) if argument.mask else None)


def _source_again(record: ControlRecord, earlier: Earlier) -> Source:
    """The source of an earlier picture, unchanged."""
    option = f"{'--map' if record.is_map else '--control'} {record.kind}="
    found = earlier.find(record.path, record.sha256, option=option)
    mask = earlier.find(record.mask, record.mask_sha256, option=option) if record.mask else None
    pixels = None if mask is None else images.load_mask(mask)
    picture = (images.load_map if record.is_map else images.load_picture)(found)
    return Source(record, picture, found, pixels, mask)


def _with_adapters(sources: Sequence[Source], adapters: Mapping[str, str]) -> list[Source]:
    kinds = {source.record.kind for source in sources}
    for kind, name in adapters.items():
        if kind not in kinds:
            raise ValueError(f"--adapter {kind}={name} has no --control or --map {kind} to belong to")
    for source in sources:
        kind = source.record.kind
        if kind in preprocessors.names() or kind in adapters or source.record.adapter:
            continue
        if kind == INPAINT:
            raise ValueError(f"an {INPAINT} control needs its adapter: add --adapter {INPAINT}=NAME")
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
    texts = [options.prompt, options.negative_prompt or "", options.base, options.clip]
    for source in sources:
        texts += [source.record.path, source.record.adapter, source.record.mask]
    texts += others
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{text!r} is not valid Unicode and cannot be recorded in the PNG") from error

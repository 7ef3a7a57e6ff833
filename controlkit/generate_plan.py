"""What is asked of `controlkit generate`, checked before the models' libraries are loaded.

Numbers, kinds, files, the output: a mistake costs no waiting.
"""

from __future__ import annotations

import os
import shlex
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
)
from controlkit.additions import Additions
from controlkit.formats.description import INPAINT as INPAINT
from controlkit.formats.finding import mark_of
from controlkit.generate_like import Earlier
from controlkit.generate_notes import versions as versions
from controlkit.generate_start import Beginning as Beginning
from controlkit.generate_start import begun
from controlkit.infotext import ControlRecord
from controlkit.known_adapters import kinds_known
from controlkit.map_sizes import sense_of
from controlkit.precisions import torch_name
from controlkit.rules import USUAL_FIT
from controlkit.settings import USUAL_SCHEDULER, USUAL_STEPS, Settings

TAKEN_AWAY = ("vae", "clip", "freeu", "original_size", "negative_original_size")  # where they are none
PREVIEW_CHUNK = "controlkit-preview"  # marks a PNG that a later preview may replace


@dataclass(frozen=True, kw_only=True)
class Options(Settings):
    """What is asked for, with the defaults. None: decided by the base, the map or the device.

    seed: of the first picture; picture k of `count` has seed + k. memory_limit: the bytes within which the
    measures that save memory are chosen anew.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    base: str = "tiny"
    steps: int = USUAL_STEPS
    scheduler: str = USUAL_SCHEDULER
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
    """Everything that `run` needs, checked. given: the options that were given, and not filled in. read: the
    files that it is made from.
    """

    options: Options
    sources: tuple[Source, ...]
    outputs: tuple[Path, ...]
    beginning: Beginning | None = None
    notes: tuple[str, ...] = ()
    additions: Additions = field(default_factory=Additions)
    given: frozenset[str] = frozenset()
    read: tuple[Path, ...] = ()


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
    given = {**given, **{name: "" for name in TAKEN_AWAY if arguments.is_none(given.get(name, ""))}}
    filled_in = earlier.settings(given, Options.__dataclass_fields__) if earlier else {}
    if given.get("dtype") is not None:
        given["dtype"] = None if arguments.is_none(given["dtype"]) else torch_name(given["dtype"])
    options = Options(**{**filled_in, **given})
    options.check()
    if earlier is not None:
        earlier.check_models(given, vae=options.vae)
    named = arguments.parse_adapters(adapters)
    sources = _sources(controls, maps, earlier, options.base, named)
    _check_adapters(sources, named)
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
    check_text(options, sources, [*added.texts(), *started])
    outputs = arguments.numbered_outputs(output, options.count)
    read = [file for source in sources for file in source.files]
    read += [] if beginning is None else beginning.files
    read += [*added.places(), *([earlier.file] if earlier else [])]
    check_outputs(outputs, read)
    if earlier is not None:
        kinds = {"loras": loras, "embeddings": embeddings, "ip_adapters": ip_adapters}
        left_out = earlier.left_out(given, [kind for kind, texts in kinds.items() if texts])
        notes = [*generate_notes.of_versions(earlier.record), *left_out, *notes]
    notes += generate_notes.of_maps(sources)
    return Plan(
        options,
        tuple(sources),
        tuple(outputs),
        beginning,
        tuple(notes),
        added,
        given=frozenset(given),
        read=tuple(read),
    )


def _sources(
    controls: Sequence[str],
    maps: Sequence[str],
    earlier: Earlier | None,
    base: str,
    adapters: Mapping[str, str],
) -> list[Source]:
    """The controls that are asked for, or else those of an earlier picture. adapters: named anew, by kind."""
    if controls or maps or earlier is None:
        wanted = [arguments.parse_control(text, is_map=False) for text in arguments.without_none(controls)]
        wanted += [arguments.parse_control(text, is_map=True) for text in arguments.without_none(maps)]
        own = [argument.adapter or adapters.get(argument.kind, "") for argument in wanted]
        return [adapted(_source(argument), name) for argument, name in zip(wanted, own, strict=True)]
    words = shlex.join(_asked(earlier))
    sources = [_source_again(record, earlier, words) for record in earlier.record.controls]
    decided = base != earlier.record.base  # by the new one, which adapters are usual
    for record in earlier.record.controls:
        if not decided and record.kind not in adapters:
            _check_unchanged(record, earlier, words)
    return [
        adapted(source, adapters.get(source.record.kind, "" if decided else source.record.adapter))
        for source in sources
    ]


def _source(argument: arguments.ControlArgument) -> Source:
    if not argument.is_map and argument.kind not in (*preprocessors.names(), INPAINT):
        if argument.kind in kinds_known():
            raise ValueError(
                f"--control {argument.kind}={argument.path}: no preprocessor makes {argument.kind} maps; give"
                f" the map itself, --map {argument.kind}={argument.path}, which for some kinds is the picture"
            )
        preprocessors.get(argument.kind)  # raises, with the kinds there are
    picture = _pixels(argument.path, argument.kind, is_map=argument.is_map)
    mask = images.load_mask(argument.mask) if argument.mask else None
    if mask is not None and mask.max() < limits.LEAST_WHITE:
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
        fit=argument.fit,
    )
    check_fit(record)
    return Source(record, picture, Path(argument.path), mask, Path(argument.mask) if argument.mask else None)


def check_fit(record: ControlRecord) -> None:
    """Raise ValueError where a control's map cannot be fitted in another way than its picture."""
    if record.kind == INPAINT and record.fit != USUAL_FIT:
        raise ValueError(
            f"--control {INPAINT}={record.path}: fit={record.fit} would move it off the picture that is"
            f" filled, which is cut (fit={USUAL_FIT})"
        )


def _asked(earlier: Earlier) -> list[str]:
    """The options that ask for all controls of an earlier picture, with files where they are now."""
    words: list[str] = []
    controls = earlier.record.controls
    adapters, apart = arguments.adapters_apart([(record.kind, record.adapter) for record in controls])
    for record, own in zip(controls, apart, strict=True):
        how = {**vars(record), "mask": record.mask and earlier.place(record.mask), "own_adapter": own}
        text = arguments.control_text(record.kind, earlier.place(record.path), how)
        words += ["--map" if record.is_map else "--control", text]
    return words + [word for kind, name in adapters.items() for word in ("--adapter", f"{kind}={name}")]


def _check_unchanged(record: ControlRecord, earlier: Earlier, words: str) -> None:
    """Raise ValueError where an earlier picture's adapter is another one by now. words: what asks for all of
    its controls anew.
    """
    if not record.adapter_mark:
        return
    kinds = [one.kind for one in earlier.record.controls if one.adapter != record.adapter]
    if record.kind not in kinds:  # where --adapter names no other control's
        words = shlex.join(["--adapter", f"{record.kind}={record.adapter}"])
    mark = mark_of(record.adapter)
    earlier.check_mark(record.adapter_mark, mark, "adapter", record.adapter, words=words)


def _source_again(record: ControlRecord, earlier: Earlier, words: str) -> Source:
    """The source of an earlier picture, unchanged. words: what asks for all of its controls anew."""
    option = "--map" if record.is_map else "--control"
    found = earlier.find(record.path, record.sha256, option=option, words=words)
    mask = earlier.find(record.mask, record.mask_sha256, option=option, words=words) if record.mask else None
    pixels = None if mask is None else images.load_mask(mask)
    return Source(record, _pixels(str(found), record.kind, is_map=record.is_map), found, pixels, mask)


def _pixels(path: str, kind: str, *, is_map: bool) -> np.ndarray:
    """A picture or a map, uint8 (H, W, 3); depth in more than 8 bits from black to white, as in training."""
    if not is_map:
        return images.load_picture(path)
    if sense_of(kind) != "depth" or not os.path.isfile(path):
        return images.load_map(path)
    from controlkit.training.data.map_files import read_levels

    return np.ascontiguousarray(read_levels(Path(path).read_bytes(), path, grey=False, depth=True))


def _check_adapters(sources: Sequence[Source], adapters: Mapping[str, str]) -> None:
    """Raise ValueError for an adapter that belongs to no control, and for a control that has none."""
    kinds = {source.record.kind for source in sources}
    for kind, name in adapters.items():
        if kind not in kinds:
            raise ValueError(f"--adapter {kind}={name} has no --control or --map {kind} to belong to")
    for source in sources:
        kind = source.record.kind
        if kind in (*preprocessors.names(), *kinds_known()) or source.record.adapter:
            continue
        if kind == INPAINT:
            raise ValueError(f"an {INPAINT} control needs its adapter: add --adapter {INPAINT}=NAME")
        raise ValueError(f"{naming.unknown('map', kind, preprocessors.names())}, or name its --adapter")


def adapted(source: Source, adapter: str) -> Source:
    """The source with an adapter named."""
    return replace(source, record=replace(source.record, adapter=adapter, adapter_mark=mark_of(adapter)))


def check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """Raise ValueError for a file that is made from itself, or cannot be written."""
    arguments.check_not_inputs(outputs, inputs)
    for output in outputs:
        files.check_writable(output)


def check_preview(preview: str, job: Plan, others: Sequence[Path] = ()) -> Path:
    """The file of a preview. others: what is written besides the outputs.

    Raises ValueError for one that is no PNG, is read or written otherwise, or exists and was never a preview.
    """
    path = Path(files.at_home(preview))
    if path.suffix.lower() != ".png":
        raise ValueError(f"the preview {preview} must end in .png")
    taken = os.path.realpath(path) in map(os.path.realpath, (*job.outputs, *others, *job.read))
    if taken or (path.exists() and PREVIEW_CHUNK not in images.read_png_text(path)):
        raise ValueError(
            f"the preview {preview} would replace a file: name another, which is removed at the end"
        )
    files.check_writable(path)
    return path


def check_text(options: Options, sources: Sequence[Source], others: Sequence[str]) -> None:
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

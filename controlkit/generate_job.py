"""`controlkit generate`: from a checked plan to files.

`generate_plan.plan` checks everything that can be checked without the models' libraries. `run` checks the
models' names, loads them, extracts the maps, generates and writes. The torch-based modules are imported by
`run` only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit import generate_notes, images, infotext, known_adapters, notices
from controlkit.base_structure import check_fits_at_hand
from controlkit.devices import multiplies_bfloat16, pick_device
from controlkit.families import BUNDLED
from controlkit.formats.finding import mark_of_vae
from controlkit.generate_controls import REGION_CURE, Controls, start_of
from controlkit.generate_models import Models
from controlkit.generate_plan import Options, Plan, Source, adapted, versions
from controlkit.generate_plan import plan as plan
from controlkit.generate_preview import Preview, Show
from controlkit.infotext import PictureRecord
from controlkit.notices import Report
from controlkit.picture_sizes import MOST_CUT, share_cut
from controlkit.rules import USUAL_FIT
from controlkit.settings import shared
from controlkit.startup import nothing_collected

if TYPE_CHECKING:
    from controlkit.adapters import Adapter
    from controlkit.base import Base
    from controlkit.class_labels import Told
    from controlkit.clip_guidance import Clip
    from controlkit.memory import Memory
    from controlkit.memory_plan import Request
    from controlkit.preprocessors import Preprocessor
    from controlkit.sampling import Start


def run(
    job: Plan,
    report: Report,
    *,
    preview: Path | Show | None = None,
    models: Models | None = None,
    finished: Callable[[int, PictureRecord], None] = lambda k, record: None,
) -> list[PictureRecord]:
    """Generate the pictures of a checked plan, each written when it is made; returns the records in them.


    preview: what is shown of the picture at hand, while it is made: a PNG, removed at the end, or a function
    that is called with uint8 (H, W, 3). models: those that were loaded before. finished: called with a
    picture's number and record as soon as its file is written.
    """
    with nothing_collected():
        session = Session(job, report, preview=preview, models=models)
    session.check_told()
    return write_all(session, finished=finished)


def write_all(
    session: Session, *, finished: Callable[[int, PictureRecord], None], again: bool = True
) -> list[PictureRecord]:
    """Make and write all pictures of a session's plan, as `run` does.

    again: also those that are there already and were made in the very same way.
    """
    job, report = session.job, session.report
    first, count = session.first, job.options.count
    records = [replace(first, seed=first.seed + k) for k in range(count)]
    todo = [k for k in range(count) if again or not infotext.is_of(job.outputs[k], records[k])]
    if not todo:
        return records
    size = f"{first.width}x{first.height}"
    report.status(f"generating {len(todo)} x {size}, {first.steps} steps, on {first.device}")

    def write(place: int, picture: np.ndarray) -> None:
        k = todo[place]
        images.write_png(job.outputs[k], picture, text=infotext.chunks(records[k]))
        finished(k, records[k])

    session.make([records[k] for k in todo], write)
    return records


class Session:
    """A base and its adapters, loaded for a plan; they make one picture after the other."""

    def __init__(
        self,
        job: Plan,
        report: Report,
        *,
        preview: Path | Show | None = None,
        also: Sequence[Options] = (),
        models: Models | None = None,
        many: bool = False,
    ) -> None:
        """Load everything. `first` is the record of the plan's first picture, with all that was decided.

        also: the options of further pictures that are to be made. models: what is loaded already. many: the
        session is turned to further plans, so that what extracts maps is kept, where memory is not scarce.
        """
        models = models or Models()
        report.status(f"loading the libraries and the base {job.options.base}")
        check_fits(job)
        check_names(job, also)
        device, dtype = pick_device(job.options.device, job.options.dtype, base=job.options.base)
        self.job, self.report = job, report
        vae_mark = mark_of_vae(job.options.vae) if job.options.vae else ""  # before it is read
        rests = bool(job.options.memory) or job.options.memory_limit is not None
        base = models.base(job.options.base, device=device, dtype=dtype, rests=rests)
        self._marks = {"base_mark": models.base_mark, "vae_mark": vae_mark}
        self.base = job.additions.onto(base)
        self._taught = [word for word in self.base.words if word not in base.words]
        self.picture_prompts = job.additions.picture_prompts(self.base)
        self.first, self.sources = _decided(job, self.base, self._marks)
        self.adapters = _adapters(self.sources, self.base, models, report, rests=rests)
        self.clip = _clip(job.options.clip if _asks_clip(job, also) else "", self.base, report, rests=rests)
        self.preview = None if preview is None else Preview(preview, self.base)
        self._prompts = {
            text or "" for one in (job.options, *also) for text in (one.prompt, one.negative_prompt)
        }
        self._warn()
        self._warn_of_pictures()
        self._doubted: set[str] = set()  # of a grid's pictures, each said once
        self._told_memory = ""
        self._fitting: dict[object, tuple[Memory, str]] = {}
        self._extractors: dict[str, Preprocessor] | None = {} if many and not rests else None
        self._controls = self._of_sources()
        self.first = self._within_memory(self.first)

    def turned_to(self, job: Plan) -> Session:
        """The same models for another plan, which differs in its pictures alone."""
        other = copy.copy(self)
        other.job = job = self._as_read(job)
        other.first, other.sources = _decided(job, self.base, self._marks)
        of = [[source.record.adapter for source in one.sources] for one in (self, other)]
        assert of[0] == of[1], f"other adapters: {of}"
        other._controls = other._of_sources()
        other._warn_of_pictures()
        other.first = other._within_memory(other.first)
        return other

    def _as_read(self, job: Plan) -> Plan:
        """Another plan, with what tells files that may have changed since from what was read."""
        sources = tuple(
            replace(source, record=replace(source.record, adapter_mark=read.record.adapter_mark))
            for source, read in zip(job.sources, self.sources, strict=True)
        )
        return replace(job, sources=sources, additions=self.job.additions)

    def decided(self, job: Plan) -> PictureRecord:
        """The record of the first picture of another plan, for which the same is loaded.

        Raises ValueError where it does not fit into the memory that is allowed.
        """
        return self._within_memory(_decided(job, self.base, self._marks)[0])

    def _of_sources(self) -> Controls:
        return Controls(
            self.base,
            self.sources,
            self.adapters,
            beginning=self.job.beginning,
            report=self.report,
            extractors=self._extractors,
        )

    def _start(self, record: PictureRecord) -> Start | None:
        beginning = self.job.beginning
        if beginning is None:
            return None
        assert record.start is not None
        return start_of(beginning, record.start.strength)

    def _warn(self) -> None:
        """Warn of what is not as it was asked for, now that the device is known."""
        options, device = self.job.options, self.base.device
        if options.cuda_graph and options.device == "auto" and device.type != "cuda":
            notices.warn(f"--cuda-graph has no effect on the device {device}", stacklevel=2)
        if device.type == "cpu" and self.first.dtype == "float16":
            line = "float16 is slow on a CPU: fp32 is faster, or bf16 where the processor computes in it"
            notices.warn(line, stacklevel=2)
        for line in generate_notes.of_words(self._taught, self._prompts):
            notices.warn(line, stacklevel=2)

    def _warn_of_pictures(self) -> None:
        """Warn of pictures that are cut or scaled, now that the size is known."""
        for line in self._cut():
            notices.warn(line, stacklevel=2)
        beginning = self.job.beginning
        scaled = None if beginning is None else beginning.scaled(self.first.width, self.first.height)
        if scaled is not None:
            notices.warn(scaled, stacklevel=2)

    def _cut(self) -> Iterator[str]:
        """Of which pictures, maps and regions more than a little lies outside what is generated."""
        width, height = self.first.width, self.first.height
        crops = [source for source in self.sources if source.record.fit == USUAL_FIT]
        seen = {source.record.path: source.picture for source in crops}
        regions = {one.record.mask: one.mask for one in crops if one.mask is not None}
        beginning = self.job.beginning
        if beginning is not None:
            seen.setdefault(beginning.record.path, beginning.picture)
        for path, picture in (*seen.items(), *regions.items()):
            size = picture.shape[1], picture.shape[0]
            if (cut := share_cut(size, width, height)) > MOST_CUT:
                yield (
                    f"{path} is {size[0]}x{size[1]}, and {cut:.0%} of it lies outside the {width}x{height}"
                    " that are generated: "
                    + (REGION_CURE if path in regions else "other --width and --height keep its shape")
                )

    def check_told(self) -> None:
        """Raise ValueError unless the base is told what it takes besides the text."""
        from controlkit.class_labels import check_told

        check_told(self.base, self._told(self.first))

    def _told(self, record: PictureRecord) -> Told:
        """What the base is told besides the text."""
        from controlkit.class_labels import Told

        shown = self.job.additions.shown
        return Told(
            None if shown is None else shown.picture,
            record.image_noise,
            record.class_label,
            sizes=record.sizes(),
            negative_sizes=record.sizes(negative=True),
        )

    def _within_memory(self, first: PictureRecord) -> PictureRecord:
        """The record with the measures under which both stages stay within the memory that is allowed.

        They are reckoned once for all pictures that need the same: that takes seconds.
        """
        limit = self.job.options.memory_limit
        if limit is None:
            return first
        from controlkit import cascade, memory_plan, sampling

        size = first.width, first.height
        if first.hires != 1:
            size = cascade.larger_size(*size, first.hires)
        request = self._memory_request(first, *size)
        key = (
            request,
            tuple(replace(one, path="", sha256="", mask="", mask_sha256="") for one in first.controls),
        )
        if key not in self._fitting:
            estimate = memory_plan.Estimate(self.base, self._controls.of(first, *size), request, self.clip)
            batch_size = sampling.default_batch(self.base)
            self._fitting[key] = memory_plan.fit(estimate, limit=limit, batch_size=batch_size)
        memory, told = self._fitting[key]
        if told != self._told_memory:  # of a grid's pictures, where it is another
            self._told_memory = told
            self.report.status(told)
        return replace(first, memory=memory.measures)

    def _memory_request(self, first: PictureRecord, width: int, height: int) -> Request:
        from controlkit import memory_plan, prompts

        texts = [first.prompt, first.negative_prompt or ""] if first.prompt_syntax == "a1111" else [""]
        return memory_plan.Request(
            width,
            height,
            pictures=self.job.options.count,
            guided=first.guidance > 1,
            tile=first.tile,
            tokens=prompts.tokens_of(self.base, texts),
            starts=first.start is not None or first.hires != 1,
            merge_tokens=first.merge_tokens,
            pag=first.pag,
        )

    def make(self, records: Sequence[PictureRecord], finished: Callable[[int, np.ndarray], None]) -> None:
        """Generate pictures that differ by their seeds alone; each is handed over as soon as it is made."""
        from controlkit import sampling
        from controlkit.schedulers import doubts

        first, options = records[0], self._options(records[0])
        networks = [adapter.controlnet for adapter in self.adapters]
        for line in (*doubts(first.scheduler, self.base), *generate_notes.of_networks(first, networks)):
            if line not in self._doubted:
                self._doubted.add(line)
                notices.warn(line, stacklevel=2)
        second = self._second_stage(first, options)

        def hand_over(k: int, picture: np.ndarray) -> None:
            finished(k, picture if second is None else second(picture, records[k].seed))

        try:
            sampling.generate(
                self.base,
                first.prompt,
                controls=self._controls.of(first, first.width, first.height),
                start=self._start(first),
                seeds=[record.seed for record in records],
                width=first.width,
                height=first.height,
                finished=hand_over,
                **options,
            )
        finally:
            if self.preview is not None:
                self.preview.close()

    def _options(self, record: PictureRecord) -> dict[str, Any]:
        """What both stages are told in the same words."""
        from controlkit.freeu import parse_freeu
        from controlkit.sampling import ClipGuidance, Execution, Memory, Savings, Tiles

        return {
            "negative_prompt": record.negative_prompt,
            "picture_prompts": self.picture_prompts,
            "told": self._told(record),
            "clip_guidance": None if self.clip is None else ClipGuidance(self.clip, record.clip_guidance),
            "prompt_syntax": record.prompt_syntax,
            "clip_skip": record.clip_skip,
            "steps": record.steps,
            "guidance": record.guidance,
            "guidance_rescale": record.guidance_rescale,
            "pag": record.pag,
            "freeu": parse_freeu(record.freeu) if record.freeu else None,
            "scheduler": record.scheduler,
            "temperature": record.temperature,
            "savings": Savings(
                record.control_every, record.features_every, record.guidance_until, record.merge_tokens
            ),
            "tiles": None if record.tile is None else Tiles(record.tile),
            "callback": lambda done, total, _: self.report.progress(done, total),
            "preview": self.preview,
            "execution": Execution(record.compile, record.cuda_graph),
            "memory": Memory.of(record.memory) if record.memory else None,
        }

    def _second_stage(
        self, first: PictureRecord, options: Mapping[str, Any]
    ) -> Callable[[np.ndarray, int], np.ndarray] | None:
        """Makes a picture larger and refines it, or None where there is one stage; maps are made anew."""
        if first.hires == 1:
            return None
        from controlkit import cascade

        controls = self._controls.of(first, *cascade.larger_size(first.width, first.height, first.hires))
        start = self._start(first)
        return lambda picture, seed: cascade.refine(
            self.base,
            first.prompt,
            picture,
            factor=first.hires,
            strength=first.hires_strength,
            seed=seed,
            controls=controls,
            start=start,
            **options,
        )


def check_names(job: Plan, also: Sequence[Options] = ()) -> None:
    """Raise ValueError for names of models that lead nowhere, before gigabytes are downloaded or loaded.

    also: the options of further pictures that are to be made.
    """
    for source in job.sources:
        known_adapters.check(source.record.kind, source.record.adapter, job.options.base)
    from controlkit.adapters import check_adapter
    from controlkit.base import check_base
    from controlkit.clip_guidance import check_clip

    if job.options.clip and (_asks_clip(job, also) or "clip" in job.given):
        check_clip(job.options.clip)
    check_base(job.options.base)
    job.additions.check_names()
    for source in job.sources:
        if source.record.adapter:
            check_adapter(source.record.adapter)


def check_fits(job: Plan) -> None:
    """Raise ValueError for an adapter at hand that is none, or does not fit the base, as early."""
    for source in job.sources:
        check_fits_at_hand(source.record.adapter, job.options.base)


def _asks_clip(job: Plan, also: Sequence[Options]) -> bool:
    """Whether a CLIP guides any of the pictures."""
    return any(one.clip_guidance for one in (job.options, *also))


def could_be_lower(job: Plan, record: PictureRecord) -> bool:
    """Whether a lower precision would be much faster where nobody chose one: of a large base, on a processor
    that multiplies in bfloat16 itself.
    """
    is_open = job.options.dtype is None and record.device == "cpu" and record.base not in BUNDLED
    return is_open and multiplies_bfloat16()


def _decided(job: Plan, base: Base, marks: Mapping[str, Any]) -> tuple[PictureRecord, list[Source]]:
    """The first picture's record and the sources, with all that the base and the map's size decide."""
    from controlkit import sampling
    from controlkit.adapters import default_adapter

    sources = [
        source if source.record.adapter else adapted(source, default_adapter(source.record.kind, base))
        for source in job.sources
    ]
    options = job.options
    shaping = [source.picture for source in sources]
    shaping += [] if job.beginning is None else [job.beginning.picture]
    map_size = (shaping[0].shape[1], shaping[0].shape[0]) if shaping else None
    width, height = sampling.picture_size(
        base,
        map_size,
        options.width,
        options.height,
        any_area=options.tile is not None and options.hires == 1,
    )
    record = PictureRecord(
        **shared(options),
        **marks,
        controls=tuple(source.record for source in sources),
        guidance=sampling.default_guidance(base) if options.guidance is None else options.guidance,
        width=width,
        height=height,
        device=str(base.device),
        dtype=str(base.dtype).removeprefix("torch."),
        versions=versions(),
        start=None if job.beginning is None else job.beginning.record,
        loras=tuple(lora for lora, _ in job.additions.loras),
        embeddings=tuple(word for word, _ in job.additions.embeddings),
        ip_adapters=tuple(told.record for told in job.additions.ip_adapters),
        image=None if job.additions.shown is None else job.additions.shown.record,
    )
    return record, sources


def _adapters(
    sources: Sequence[Source], base: Base, models: Models, report: Report, *, rests: bool
) -> list[Adapter]:
    """The adapter of every source, one loaded for all that name it."""
    loaded: dict[str, Adapter] = {}
    for record in (source.record for source in sources):
        if record.adapter not in loaded:
            report.status(f"loading the {record.kind} adapter {record.adapter}")
            loaded[record.adapter] = models.adapter(record.adapter, base, kind=record.kind, rests=rests)
        learned = loaded[record.adapter].info.map.kind
        if line := known_adapters.learned_other(record.adapter, learned, record.kind):
            notices.warn(line, stacklevel=2)
    return [loaded[source.record.adapter] for source in sources]


def _clip(name: str, base: Base, report: Report, *, rests: bool) -> Clip | None:
    """The CLIP that guides, loaded beside the base, or on the processor until it works."""
    if not name:
        return None
    from controlkit.clip_guidance import load_clip

    report.status(f"loading the CLIP {name}")
    return load_clip(name, device=base.unet.device if rests else base.device, dtype=base.dtype)

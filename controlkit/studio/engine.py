"""What the page asks for, done on the device: maps and pictures, one piece of work at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from controlkit import images, preprocessors
from controlkit.generate_models import Models
from controlkit.preprocessors.canny import HIGH, LOW

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.generate_plan import Plan
    from controlkit.generate_preview import Show
    from controlkit.infotext import PictureRecord
    from controlkit.preprocessors import Map, Preprocessor

ON_DEVICE = (
    "openpose",
    "depth",
)  # kinds of maps that a network makes; those of the bundled world are all here

_LOOK_SECONDS = 0.2  # between two looks, while the device is not free, at whether that is still wanted


@dataclass(frozen=True)
class Wish:
    """What a person wants of a map: its kind, and how edges are found.

    is_map: the picture is a map already. low, high: canny's thresholds.
    """

    kind: str
    is_map: bool = False
    low: float = LOW
    high: float = HIGH


class Stopped(Exception):
    """Somebody cancelled what was being made."""


class Telling:
    """A job's report: what happens now and how far it is, until somebody stops it."""

    def __init__(self, tell: Callable[[str, int, int], None], stop: threading.Event) -> None:
        self._tell, self._text, self.stop = tell, "", stop

    def status(self, text: str) -> None:
        """What happens now."""
        self._text = text
        self._check()
        self._tell(text, 0, 0)

    def waits(self) -> None:
        """The device is not free yet. Raises `Stopped` once that was asked for."""
        self._check()

    def progress(self, done: int, total: int, note: str = "") -> None:
        """How far it is. Raises `Stopped` once that was asked for."""
        self._check()
        self._tell(self._text, done, total)

    def _check(self) -> None:
        if self.stop.is_set():
            raise Stopped


class Engine:
    """The base, its adapters and the preprocessors, loaded once; whoever comes second waits.

    base: as `load_base` takes it. device: "auto" or torch's name. dtype: None is the usual one there.
    """

    def __init__(self, base: str, *, device: str = "auto", dtype: str | None = None) -> None:
        self.name, self.device, self.dtype = base, device, dtype
        self.models = Models()
        self._extractors: dict[str, Preprocessor] = {}
        self._busy = threading.Lock()
        self._stops: list[threading.Event] = []  # of what is in the making, or waits for that

    def load(self) -> Base:
        """The base, loaded. Raises ValueError as `load_base`."""
        from controlkit.base import check_base
        from controlkit.devices import pick_device
        from controlkit.startup import nothing_collected

        device, dtype = pick_device(self.device, self.dtype, base=self.name)
        check_base(self.name)
        with nothing_collected():
            return self.models.base(self.name, device=device, dtype=dtype)

    @cached_property
    def kinds(self) -> list[str]:
        """The kinds of maps that the base has adapters for and that can be made of a photo."""
        from controlkit.adapters import BUNDLED_ADAPTERS
        from controlkit.families import BUNDLED
        from controlkit.known_adapters import defaults

        known = BUNDLED_ADAPTERS if self.name in BUNDLED else defaults(self.load().family)
        return [kind for kind in known if kind in preprocessors.names()]

    def size(self, shape: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height that would be generated beside a photo of this width and height.

        Raises ValueError for a side that is not allowed.
        """
        from controlkit.picture_sizes import picture_size

        return picture_size(self.load(), shape, width, height)

    def map(self, picture: np.ndarray, wish: Wish, *, width: int, height: int) -> Map:
        """The map of a picture, at the size that is generated: exactly what the network will be shown."""
        from controlkit.map_sizes import cover_map
        from controlkit.preprocessors import Map

        if wish.is_map:
            fitted = cover_map(picture, width, height, kind=wish.kind)
            return Map(image=fitted, kind=wish.kind, polarity="colours")
        fitted = images.cover(picture, width, height)
        if wish.kind == "canny":
            return preprocessors.get("canny", low=wish.low, high=wish.high).extract([fitted])[0]
        with self._busy:
            return self._extractor(wish.kind).extract([fitted])[0]

    def _extractor(self, kind: str) -> Preprocessor:
        from controlkit.families import BUNDLED
        from controlkit.generate_controls import extractor_options

        if kind not in self._extractors:
            device = str(self.load().unet.device)
            options = extractor_options(kind, bundled=self.name in BUNDLED, device=device)
            self._extractors[kind] = preprocessors.get(kind, **options)
        return self._extractors[kind]

    def generate(
        self,
        job: Plan,
        report: Telling,
        *,
        preview: Show,
        finished: Callable[[int, PictureRecord], None],
        noted: Callable[[str], None],
    ) -> None:
        """Make a plan's pictures. Raises ValueError, and `Stopped`; what was finished stays on disk.

        noted: called with each line of what is to be known of them.
        """
        from controlkit import generate_job, grid_job, notices
        from controlkit.generate_notes import without_effect

        with self._free(report), notices.heard(noted):
            for line in (*job.notes, *without_effect(job, grid_job.variants(job, []))):
                noted(line)
            generate_job.run(job, report, preview=preview, models=self.models, finished=finished)

    @contextmanager
    def _free(self, report: Telling) -> Iterator[None]:
        """The device, once it is free; whoever waits for it can be stopped."""
        self._stops.append(report.stop)
        try:
            while not self._busy.acquire(timeout=_LOOK_SECONDS):
                report.waits()
            try:
                yield
            finally:
                self._busy.release()
        finally:
            self._stops.remove(report.stop)

    def stop(self) -> None:
        """Stop all that is in the making, and wait until it has ended."""
        for stop in [*self._stops]:
            stop.set()
        with self._busy:
            pass

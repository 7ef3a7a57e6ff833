"""The maps that are shown: what each is made of, and those that were made last, for whoever asks again."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from controlkit import images, preprocessors
from controlkit.preprocessors import Map
from controlkit.preprocessors.skeleton import Poses
from controlkit.studio.engine import ON_DEVICE, Engine, Wish
from controlkit.studio.uploads import read_upload
from controlkit.studio.wording import sentence

IS_MAP = "This picture is a map already"
MOST_MAPS = 8  # that are kept for whoever asks again


@dataclass(frozen=True)
class MadeOf:
    """What a map is made of: a picture's file, what is wanted, and width and height of the pictures."""

    path: str
    wish: Wish
    size: tuple[int, int]

    @property
    def on_device(self) -> bool:
        """Whether a network makes it."""
        return self.wish.kind in ON_DEVICE and not self.wish.is_map

    @property
    def name(self) -> str:
        """By which the browser's joints say whose they are."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A map that is shown, and what is to be known of it.

    photo: beside a pose, at its size, uint8 (H, W, 3). hand: joints were moved. found: the pose as it was
    found. kept: a pose of the same photo whose joints were moved, while another map is shown. hidden: nor is
    this one shown. A session keeps it for long: of other maps no photo, which may have 40 million pixels.
    """

    map: Map
    made_of: MadeOf
    photo: np.ndarray | None = None
    told: str = ""
    hand: bool = False
    found: Poses | None = None
    kept: Drawn | None = None
    hidden: bool = False

    @property
    def by_hand(self) -> Drawn | None:
        """The pose whose joints were moved."""
        return self if self.hand else self.kept


class Maps:
    """The maps that were made last: three controls ask for the same one, and so does a page loaded anew."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._made: OrderedDict[MadeOf, Future[Drawn]] = OrderedDict()

    def of(self, made_of: MadeOf) -> Drawn:
        """The map, made once however many ask. Raises ValueError for what cannot be read."""
        with self._lock:
            made, first = self._made.get(made_of), made_of not in self._made
            if made is None:
                made = self._made[made_of] = Future()
            self._made.move_to_end(made_of)
            while len(self._made) > MOST_MAPS:
                self._made.popitem(last=False)
        if first:
            try:
                made.set_result(self._make(made_of))
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                with self._lock:
                    self._made.pop(made_of, None)
                made.set_exception(error)
        return made.result()

    def _make(self, made_of: MadeOf) -> Drawn:
        picture = read_upload(made_of.path, is_map=made_of.wish.is_map)
        made = self.engine.map(picture, made_of.wish, width=made_of.size[0], height=made_of.size[1])
        photo = None if made.poses is None else images.cover(picture, *made_of.size)
        told = _told(picture if made_of.wish.is_map else made.image, made, is_map=made_of.wish.is_map)
        return Drawn(made, made_of, photo, told, found=made.poses)


def _told(image: np.ndarray, made: Map, *, is_map: bool) -> str:
    """What is wrong with a map, in plain words. image: it, or what was put in as one, at its own size."""
    if made.poses is not None and not len(made.poses.people):
        return "No person was found in this picture, so there is no pose to follow."
    if not is_map:
        return "" if made.image.any() else "Nothing was found: the map is black."
    found = preprocessors.lint(image, made.kind)
    return "\n\n".join(f"{sentence(one.message)}. {_cure(one.cure)}" for one in found)


def _cure(cure: str) -> str:
    """What cures a map, where the page has a shorter way than the command line."""
    elsewhere = cure.startswith(("make the map anew with", "extract the map first"))
    return f"Put the photo itself in, and leave “{IS_MAP}” off." if elsewhere else f"{sentence(cure)}."

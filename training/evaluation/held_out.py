"""The pairs that adapters are measured on: of the bundled world, or of a data set."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controlkit.figures import Scene, render
from controlkit.picture_sizes import share_cut
from controlkit.training.config_adapter import WORLD_KINDS, DataRecipe
from controlkit.training.data.visits import Visits
from controlkit.training.world import exact_map

if TYPE_CHECKING:
    from controlkit.training.data.examples import Example

Opened = dict[str, "tuple[Sequence[Example], Visits, DataRecipe]"]
"""By kind of map: the examples, what is seen of them, and the table of data that says how."""
Marks = dict[str, str]
"""By a pair's number, as JSON has it: what it is known by, equal for equal content."""


@dataclass(frozen=True, eq=False)
class Held:
    """One pair, all of one geometry, sides multiples of 8.

    number: in its data set; it decides the noise. picture: uint8 (H, W, 3). maps: of each kind, uint8 or
    uint16 (H, W, C). joints: float (P, 18, 3), where the data knows them. scene: of the bundled world.
    """

    number: int
    name: str
    picture: NDArray[np.uint8]
    caption: str
    maps: Mapping[str, NDArray[Any]]
    joints: NDArray[Any] | None = None
    scene: Scene | None = None


class Told(NamedTuple):
    """What a report says of a pair: its name, which of a data set is its picture's, and its caption."""

    name: str
    caption: str


class HeldOut(ABC):
    """Pairs by their place, each read when it is asked for."""

    title: str
    """What they are, in a phrase."""
    is_held_out: bool
    """Whether no training saw them: those of the bundled world and of a run. Of a folder nobody knows."""
    kinds: Sequence[str]
    """Of maps."""
    settled: Mapping[str, Mapping[str, Any]] = {}
    """By kind, where maps are made of the pictures: the options of the preprocessor."""
    buckets: bool = False
    """Whether they are drawn in several shapes."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, place: int) -> Held:
        """The pair at a place. Raises ValueError, one line, where a file of it cannot be read."""

    @abstractmethod
    def number(self, place: int) -> int:
        """The number of the pair at a place in its data set, which reads nothing."""

    @abstractmethod
    def caption(self, place: int) -> str:
        """The caption of the pair at a place, which reads no picture."""

    @abstractmethod
    def name(self, place: int) -> str:
        """What the pair at a place is called, which reads no picture."""

    @abstractmethod
    def size(self, place: int) -> tuple[int, int]:
        """Width and height at which the pair at a place is seen and drawn, which reads no picture."""

    def cut(self, place: int) -> float:
        """The share of its picture that lies outside of what is seen of it."""
        return 0.0

    def sizes(self) -> dict[tuple[int, int], int]:
        """How many pairs there are of each width and height."""
        return dict(sorted(Counter(self.size(place) for place in range(len(self))).items()))

    def told(self) -> dict[int, Told]:
        """Each pair's name and caption, by its number."""
        return {self.number(place): Told(self.name(place), self.caption(place)) for place in range(len(self))}

    @abstractmethod
    def marks(self) -> Marks:
        """What each pair is known by: its picture, its caption, what is seen of it."""

    @abstractmethod
    def map_marks(self, kind: str) -> Marks:
        """What each pair's map of a kind is known by, beside the pair itself."""

    def digest(self) -> str:
        """SHA-256 over all pairs and their maps."""
        told = [self.marks(), *(self.map_marks(kind) for kind in self.kinds)]
        return hashlib.sha256(repr(told).encode()).hexdigest()


class WorldScenes(HeldOut):
    """Scenes 0 to N - 1 of the bundled world's validation split, which no training sees.

    options: by kind of map, of the preprocessor: edges are found by it, joints are drawn in its style.
    """

    def __init__(self, count: int, options: Mapping[str, Mapping[str, Any]], *, size: int) -> None:
        for kind in options:
            if kind not in WORLD_KINDS:
                raise ValueError(f"the bundled world has {', '.join(WORLD_KINDS)} maps, and no {kind}")
        self.count, self.kinds, self.side, self.settled = count, tuple(options), size, options
        self.title = f"{count} held-out scenes of the bundled world"
        self.is_held_out = True

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Held:
        scene = render(place, split="validation", size=self.side)
        told = scene.picture, scene.joints, scene.inverse_depth
        return Held(
            place,
            self.name(place),
            scene.picture,
            scene.caption,
            {kind: exact_map(kind, *told, options=self.settled[kind]) for kind in self.kinds},
            scene.joints[None],
            scene,
        )

    def number(self, place: int) -> int:
        return place

    def name(self, place: int) -> str:
        return f"scene {place}"

    def caption(self, place: int) -> str:
        return render(place, split="validation", size=self.side).caption

    def size(self, place: int) -> tuple[int, int]:
        return self.side, self.side

    def marks(self) -> Marks:
        return {str(place): f"validation scene of {self.side} pixels" for place in range(self.count)}

    def map_marks(self, kind: str) -> Marks:
        told = str(sorted((name, str(value)) for name, value in self.settled[kind].items()))
        return {str(place): told for place in range(self.count)}


class DataSet(HeldOut):
    """Some pairs of a data set, as a training sees them at their first visit."""

    def __init__(
        self, opened: Opened, indices: Sequence[int], *, title: str, is_held_out: bool = False
    ) -> None:
        self._opened, self._indices, self.title = dict(opened), list(indices), title
        self.is_held_out = is_held_out
        self.kinds = tuple(opened)
        self._map_marks: dict[str, Marks] = {}
        self.buckets = next(iter(opened.values()))[2].buckets
        self.settled = {kind: data.options for kind, (_, visits, data) in opened.items() if visits.made}

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, place: int) -> Held:
        index = self._indices[place]
        examples, first, _ = next(iter(self._opened.values()))
        visit = first.visit(index, 0)
        view = first.views(index)[visit.view]
        picture = first.picture(index, view)
        maps, joints = {}, None
        for kind, (_, visits, _) in self._opened.items():
            maps[kind] = visits.map(index, view, seed=visit.seed, picture=picture)
            if kind == "openpose" and (poses := visits.poses(index, view)) is not None:
                joints = poses.people
        return Held(index, self.name(place), picture, examples[index].caption, maps, joints)

    def number(self, place: int) -> int:
        return self._indices[place]

    def name(self, place: int) -> str:
        examples, *_ = next(iter(self._opened.values()))
        return examples[self._indices[place]].name

    def caption(self, place: int) -> str:
        examples, *_ = next(iter(self._opened.values()))
        return examples[self._indices[place]].caption

    def size(self, place: int) -> tuple[int, int]:
        _, visits, _ = next(iter(self._opened.values()))
        return visits.shapes[visits.shape_of[self._indices[place]]]

    def cut(self, place: int) -> float:
        _, visits, _ = next(iter(self._opened.values()))
        return share_cut(visits.sizes[self._indices[place]], *self.size(place))

    def marks(self) -> Marks:
        return self._pair_marks

    @cached_property
    def _pair_marks(self) -> Marks:
        examples, visits, _ = next(iter(self._opened.values()))
        return {
            str(index): _mark(
                examples[index].caption.encode(),
                str(visits.views(index)).encode(),
                examples[index].picture.digest(),
            )
            for index in self._indices
        }

    def map_marks(self, kind: str) -> Marks:
        if kind not in self._map_marks:
            examples, visits, _ = self._opened[kind]
            self._map_marks[kind] = {
                str(index): _mark(
                    visits.map_settings.encode(),
                    *(piece.digest() for piece in (() if visits.made else examples[index].maps)),
                )
                for index in self._indices
            }
        return self._map_marks[kind]


def _mark(*content: bytes) -> str:
    total = hashlib.sha256()
    for part in content:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]

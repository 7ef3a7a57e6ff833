"""The pairs that adapters are measured on: of the bundled world, of a data set, or what a run held out."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit.figures import Scene, render
from controlkit.training.config import ControlNetRecipe, load_recipe
from controlkit.training.config_adapter import WORLD_KINDS, DataRecipe
from controlkit.training.data.examples import picture_size
from controlkit.training.data.source_recipe import recipe_of
from controlkit.training.data.visits import Visits
from controlkit.training.draws import derived_seed
from controlkit.training.evaluation.estimating import usual_options
from controlkit.training.evaluation.request import WORLD, Request
from controlkit.training.world import exact_map

if TYPE_CHECKING:
    from controlkit.training.data.examples import Example

Report = Callable[[str], None]
Opened = dict[str, "tuple[Sequence[Example], Visits, DataRecipe]"]
"""By kind of map: the examples, what is seen of them, and the table of data that says how."""
_NAMED = 3  # broken pairs in a message


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


class HeldOut(ABC):
    """Pairs by their place, each read when it is asked for."""

    title: str
    """What they are, in a phrase."""
    settled: Mapping[str, Mapping[str, Any]] = {}
    """By kind, where maps are made of the pictures: the options of the preprocessor."""

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
    def digest(self) -> str:
        """SHA-256 over everything in them."""


class WorldScenes(HeldOut):
    """Scenes 0 to N - 1 of the bundled world's validation split, which no training sees."""

    def __init__(self, count: int, kinds: Sequence[str], *, size: int) -> None:
        for kind in kinds:
            if kind not in WORLD_KINDS:
                raise ValueError(f"the bundled world has {', '.join(WORLD_KINDS)} maps, and no {kind}")
        self.count, self.kinds, self.size = count, tuple(kinds), size
        self.title = f"{count} held-out scenes of the bundled world"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Held:
        scene = render(place, split="validation", size=self.size)
        told = scene.picture, scene.joints, scene.inverse_depth
        return Held(
            place,
            f"scene {place}",
            scene.picture,
            scene.caption,
            {kind: exact_map(kind, *told) for kind in self.kinds},
            scene.joints[None],
            scene,
        )

    def number(self, place: int) -> int:
        return place

    def caption(self, place: int) -> str:
        return render(place, split="validation", size=self.size).caption

    def digest(self) -> str:
        return hashlib.sha256(f"world validation {self.count} {self.size}".encode()).hexdigest()


class DataSet(HeldOut):
    """Some pairs of a data set, as a training sees them at their first visit."""

    def __init__(self, opened: Opened, indices: Sequence[int], *, title: str) -> None:
        self._opened, self._indices, self.title = dict(opened), list(indices), title
        made = {kind: data for kind, (_, visits, data) in opened.items() if visits.made}
        self.settled = {
            kind: {key: value for key, value in data.options.items() if ".." not in str(value)}
            for kind, data in made.items()
        }

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
        return Held(index, examples[index].name, picture, examples[index].caption, maps, joints)

    def number(self, place: int) -> int:
        return self._indices[place]

    def caption(self, place: int) -> str:
        examples, *_ = next(iter(self._opened.values()))
        return examples[self._indices[place]].caption

    def digest(self) -> str:
        total = hashlib.sha256()
        for kind, (examples, visits, _) in self._opened.items():
            total.update(f"{kind} {visits.map_settings}".encode())
            for index in self._indices:
                example = examples[index]
                total.update(f"{index} {example.caption} {visits.views(index)}".encode())
                for piece in (example.picture, *example.maps):
                    total.update(piece.digest())
        return total.hexdigest()


def open_held_out(
    request: Request, kinds: Sequence[str], *, resolution: int, report: Report = lambda _: None
) -> HeldOut:
    """Open the pairs of a request. ``kinds``: of maps that are wanted. ``resolution``: the base's.

    Raises ValueError, one line: no such data, a pair that cannot be read (unless bad=skip leaves it out), or
    maps of one kind where several are wanted.
    """
    run = Path(os.path.expanduser(request.data)) / "config.toml"
    if run.is_file():
        return _of_run(request, run, kinds, resolution=resolution, report=report)
    if request.data == WORLD:
        if request.settings:
            raise ValueError(f"the bundled world has no settings, and given is {min(request.settings)}")
        if not request.count:
            raise ValueError("the bundled world has no end: say with -n how many of its scenes")
        return WorldScenes(request.count, kinds, size=resolution)
    data = recipe_of(request.data, kinds[0], request.settings, where="evaluate")
    opened = _opened(request, data, kinds, resolution=resolution, report=report)
    examples, visits, _ = next(iter(opened.values()))
    usable = [index for index, shape in enumerate(visits.shape_of) if shape >= 0]
    chosen = _looked_at(opened, _chosen(usable, request.count), report)
    title = f"{len(chosen)} of {len(examples)} pairs of {os.path.basename(data.source.rstrip('/'))}"
    return DataSet(opened, chosen, title=title)


def _of_run(
    request: Request, config: Path, kinds: Sequence[str], *, resolution: int, report: Report
) -> HeldOut:
    """What the run of a recipe held out."""
    recipe = load_recipe(str(config), [f"data.{key}={value}" for key, value in request.settings.items()])
    assert isinstance(recipe, ControlNetRecipe)
    if recipe.data.source == WORLD:
        return WorldScenes(request.count or 50, kinds, size=recipe.data.resolution or resolution)
    if recipe.data.streaming:
        raise ValueError(f"{request.data} was trained on a stream: name a data set to evaluate on")
    from controlkit.training.data.pairs import load_pairs

    pairs = load_pairs(recipe, report=report)
    kept = [index for index in pairs.shown if index not in set(pairs.trained)]
    if not kept:
        raise ValueError(
            f"{request.data} held no pairs out (data.holdout): name another data set to evaluate on"
        )
    opened: Opened = {}
    for kind in kinds:
        visits = _visits(recipe.data, pairs.examples, pairs.sizes, kind, resolution, recipe.seed)
        opened[kind] = pairs.examples, visits, recipe.data
    chosen = _chosen(kept, request.count)
    title = f"{len(chosen)} pairs that the run {config.parent.resolve().name} held out"
    return DataSet(opened, chosen, title=title)


def _opened(
    request: Request, data: DataRecipe, kinds: Sequence[str], *, resolution: int, report: Report
) -> Opened:
    from controlkit.training.data.sources import open_examples

    found: Opened = {}
    sizes: list[tuple[int, int] | None] = []
    for kind in kinds:
        options = usual_options(kind, request.base) | data.options | request.options.get(kind, {})
        told = data.model_copy(update={"options": options})
        examples = open_examples(data, kind=kind, report=report)
        sizes = sizes or _sizes(examples, data, report)
        if examples[0].maps and data.maps != "made":
            told = data  # options are of what makes maps of generated pictures
        found[kind] = examples, _visits(told, examples, sizes, kind, resolution), told
    _refuse_one_for_all(found, data.source)
    return found


def _visits(
    data: DataRecipe,
    examples: Sequence[Example],
    sizes: Sequence[tuple[int, int] | None],
    kind: str,
    resolution: int,
    seed: int = 0,
) -> Visits:
    side = data.resolution or resolution
    return Visits(examples, sizes, data=data, kind=kind, resolution=side, seed=seed)


def _sizes(examples: Sequence[Example], data: DataRecipe, report: Report) -> list[tuple[int, int] | None]:
    """The size of every picture; None for those that cannot be read and are left out."""
    sizes: list[tuple[int, int] | None] = []
    broken: list[str] = []
    for example in examples:
        try:
            sizes.append(picture_size(example))
        except ValueError as error:
            sizes.append(None)
            broken.append(str(error))
    if not broken:
        return sizes
    told = f"{len(broken)} of {len(examples)} pairs cannot be read: {'; '.join(broken[:_NAMED])}"
    if data.bad == "stop":
        raise ValueError(f"{told}: mend them, or leave them out with bad=skip")
    if len(broken) == len(examples):
        raise ValueError(told)
    report(f"{told}: they are left out")
    return sizes


def _looked_at(opened: Opened, chosen: Sequence[int], report: Report) -> list[int]:
    """Those of the chosen pairs that can be used, pictures and maps decoded once: before minutes of work."""
    from controlkit.training.data.check import check_examples

    left = list(chosen)
    for kind, (examples, _, data) in opened.items():
        check = check_examples(
            [examples[k] for k in left], data=data, kind=kind, lint=False, report=lambda _: None
        )
        if not check.errors:
            continue
        if data.bad == "stop" or not check.usable:
            raise ValueError(
                f"{data.source}: {check.problem(_NAMED)}: mend them, or leave them out: bad=skip"
            )
        report(f"{check.problem(_NAMED)}: they are left out")
        left = [left[k] for k in check.usable]
    return left


def _refuse_one_for_all(found: Opened, source: str) -> None:
    """Refuse to take the same files for maps of two kinds."""
    seen: dict[str, str] = {}
    for kind, (examples, visits, _) in found.items():
        if visits.made:
            continue
        name = examples[next(k for k, shape in enumerate(visits.shape_of) if shape >= 0)].maps[0].name
        if name in seen:
            raise ValueError(
                f"{source} has maps of one kind, and adapters of two are named ({seen[name]}, {kind}):"
                " evaluate them one after the other, or make the maps of the pictures with maps=made"
            )
        seen[name] = kind


def _chosen(usable: Sequence[int], count: int) -> list[int]:
    """Some of the pairs, drawn once and for all: more of them contain fewer."""
    if not count or count >= len(usable):
        return list(usable)
    order = np.random.default_rng(derived_seed(0, "evaluate")).permutation(len(usable))
    return sorted(usable[k] for k in order[:count])

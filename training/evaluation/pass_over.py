"""The one pass over arms, pairs and seeds: pictures made, written, and scored, where they are not yet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit import images, png
from controlkit.adapters import load_adapter
from controlkit.training.evaluation.arms import Arm, Draw, drawing
from controlkit.training.evaluation.map_scores import people_of, score_map, score_scene
from controlkit.training.evaluation.request import TRUE
from controlkit.training.evaluation.rows import Row, Rows
from controlkit.training.reporting.showing import visible

if TYPE_CHECKING:
    from controlkit.adapters import Adapter
    from controlkit.base import Base
    from controlkit.metrics.pose_ap import Matches
    from controlkit.preprocessors import Preprocessor
    from controlkit.training.evaluation.held_out import Held, HeldOut
    from controlkit.training.evaluation.request import Request

Progress = Callable[[int, int, str], None]
_ROOM = 2**30  # bytes of pairs that are kept


def asked_path(request: Request, kind: str, number: int) -> Path:
    """Where the map is that was asked for."""
    return request.output / "maps" / f"asked-{kind}" / f"{number:06d}.png"


@dataclass(eq=False)
class Pass:
    """Everything that the pass needs. places: of the pairs that are this process's share."""

    request: Request
    base: Base
    held_out: HeldOut
    places: range
    estimators: Mapping[str, Preprocessor]
    rows: Rows
    progress: Progress
    _kept: dict[int, tuple[Held, NDArray[Any] | None]] = field(default_factory=dict)
    _room: int = _ROOM

    def run(self, arms: list[Arm]) -> None:
        """Make and score what is missing, arm by arm; an adapter is loaded only where it is wanted."""
        wanted = {arm.label: self.missing(arm) for arm in arms}
        total, done = sum(map(len, wanted.values())), 0
        for arm in arms:
            draw: Draw | None = None
            for place, seeds in _by_place(wanted[arm.label]):
                pair, asked = self._pair(place)
                for seed in seeds:
                    path = picture_path(self.request.output, arm, pair.number, seed)
                    before = self.rows.found.get((arm.folder, pair.number, seed))
                    seconds, picture = before.seconds if before else None, _written(path)
                    if picture is None:
                        draw = draw or drawing(arm, self.base, self._adapter(arm), self.request)
                        started = time.perf_counter()
                        picture = draw(pair, seed)
                        seconds = time.perf_counter() - started
                        images.write_png(path, picture)
                    self.rows.add(self._scored(arm, pair, seed, picture, asked, seconds))
                    done += 1
                    self.progress(done, total, arm.label)
                if arm.label == TRUE:
                    self._write_maps(pair)

    def missing(self, arm: Arm) -> list[tuple[int, int]]:
        """Places and seeds of an arm's pictures not made, not whole, or not scored for every kind."""
        wanted = []
        for place in self.places:
            number = self.held_out.number(place)
            for seed in range(self.request.seeds if arm.seeded else 1):
                row = self.rows.found.get((arm.folder, number, seed))
                path = picture_path(self.request.output, arm, number, seed)
                if row is None or not set(self.estimators) <= set(row.scores) or not png.is_whole(path):
                    wanted.append((place, seed))
        return wanted

    def _pair(self, place: int) -> tuple[Held, NDArray[Any] | None]:
        """A pair, and the people that are asked for in it; kept for the other arms while there is room, since
        its map may be a network's.
        """
        if place in self._kept:
            return self._kept[place]
        pair = self.held_out[place]
        found = pair, self._people_asked_for(pair)
        size = sum(levels.nbytes for levels in (pair.picture, *pair.maps.values()))
        if size <= self._room:
            self._room -= size
            self._kept[place] = found
        return found

    def _adapter(self, arm: Arm) -> Adapter | None:
        if arm.compared is None:
            return None
        return load_adapter(arm.compared.name, base=self.base, kind=arm.compared.kind)

    def _people_asked_for(self, pair: Held) -> NDArray[Any] | None:
        maker = self.estimators.get("openpose")
        if maker is None:
            return None
        return people_of(pair, maker(pair.picture) if pair.joints is None else None)

    def _scored(
        self,
        arm: Arm,
        pair: Held,
        seed: int,
        picture: NDArray[np.uint8],
        asked: NDArray[Any] | None,
        seconds: float | None,
    ) -> Row:
        scores: dict[str, dict[str, float]] = {"": score_scene(picture, pair)}
        people: Matches | None = None
        for kind, maker in self.estimators.items():
            found = maker(picture)
            score = score_map(kind, found, pair, asked)
            scores[kind], people = score.values, score.people or people
            if arm.kind == kind or not arm.compared:
                images.write_png(map_path(self.request.output, arm, kind, pair.number, seed), found.image)
        return Row(arm.folder, pair.number, seed, scores, people, seconds)

    def _write_maps(self, pair: Held) -> None:
        """Write down the maps that were asked for."""
        for kind, levels in pair.maps.items():
            path = asked_path(self.request, kind, pair.number)
            path.parent.mkdir(parents=True, exist_ok=True)
            images.write_png(path, visible(levels))


def picture_path(folder: Path, arm: Arm, number: int, seed: int) -> Path:
    """Where an arm's picture is."""
    return _in_folder(folder / "pictures" / arm.folder, number, seed)


def map_path(folder: Path, arm: Arm, kind: str, number: int, seed: int) -> Path:
    """Where the map that was found in it is."""
    return _in_folder(folder / "maps" / f"{arm.folder}-{kind}", number, seed)


def _in_folder(folder: Path, number: int, seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{number:06d}-{seed}.png"


def _by_place(wanted: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    found: dict[int, list[int]] = {}
    for place, seed in wanted:
        found.setdefault(place, []).append(seed)
    return list(found.items())


def _written(path: Path) -> NDArray[np.uint8] | None:
    """A picture that is there and whole."""
    if not png.is_whole(path):  # decoders forgive a missing end
        return None
    try:
        return images.load_picture(path)
    except ValueError:
        return None

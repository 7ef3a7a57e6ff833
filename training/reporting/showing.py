"""What a training shows of itself on pairs that are held out: whether the map is used, samples, scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from controlkit import images
from controlkit.base import BUNDLED, Base
from controlkit.control import Control
from controlkit.sampling import generate
from controlkit.training.config_adapter import WORLD_KINDS, ControlNetRecipe
from controlkit.training.data.encoded import Encoded, Outline, Sample, levels_of
from controlkit.training.data.made_maps import range_ends
from controlkit.training.data.order import Turn
from controlkit.training.reporting.convergence import ON_TRAINED, advice_for, hold_told, took_hold
from controlkit.training.reporting.monitor import Monitor, look_at_all
from controlkit.training.reporting.scores import AS_PLANNED, ControlScores, Pair, Scorer, as_used

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from controlkit.preprocessors import Preprocessor

_COLUMNS = 4
_SEEDS = (0, 1)
_SCORED_STEPS = 12
AddedCond = Callable[[Tensor | None, Sequence[Outline]], Mapping[str, Tensor] | None]


def is_examined(recipe: ControlNetRecipe) -> bool:
    """Whether the result is measured on the bundled world's held-out scenes, between floor and ceiling."""
    kinds = examined_kinds(recipe)
    return bool(recipe.score_scenes and kinds) and recipe.base in BUNDLED and set(kinds) <= set(WORLD_KINDS)


def examined_kinds(recipe: ControlNetRecipe) -> tuple[str, ...]:
    """The kinds of maps that the result takes, each by itself; none where it wants several at once."""
    if recipe.adapter == "controlnet-union":
        return recipe.data.map_column
    return () if len(recipe.data.map_column) > 1 else (recipe.map,)


class Shown:
    """The pairs that a training shows, each as its first visit sees it."""

    def __init__(
        self,
        recipe: ControlNetRecipe,
        base: Base,
        encoded: Encoded,
        indices: Sequence[int],
        *,
        held_out: bool,
        alphas_cumprod: Tensor,
        added_cond: AddedCond,
        on_device: Callable[[], AbstractContextManager[None]],
        report: Callable[[str], None],
    ) -> None:
        """``held_out``: whether the pairs are kept from the training. ``on_device``: within its block all of
        the base's parts are on its device. ``report``: told, once, what is not watched.
        """
        self.recipe, self.base, self.encoded, self.indices = recipe, base, encoded, list(indices)
        self.alphas_cumprod, self.added_cond, self.on_device = alphas_cumprod, added_cond, on_device
        self.held_out, self.report = held_out, report

    def look(self, controlnet: ControlNetModel) -> dict[str, float]:
        """Whether the map is used: see `controlkit.training.reporting.monitor`."""
        if not self._monitors:
            return {}
        unet = None if self.recipe.sd_locked else self.base.unet
        found = look_at_all(self._monitors, as_used(controlnet, self.base), unet).row()
        return found if self.held_out else {**found, ON_TRAINED: 1}

    def remark(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """When control took hold, or what to look at when it does not."""
        looks = [row for row in rows if "gap" in row]
        now, before = took_hold(looks), took_hold(looks[:-1])
        if now is not None and before is None:
            return hold_told(looks)
        config = self.recipe.model_dump()
        said = advice_for(rows, config, finished=rows[-1]["step"] == self.recipe.steps)
        return said if said is None or advice_for(rows[:-1], config) is None else None

    def score(self, controlnet: ControlNetModel) -> ControlScores | None:
        """Scores of control, of the held-out pairs; None where their kind cannot be scored."""
        with self.on_device():
            return self._scorer.score(controlnet, base_changed=not self.recipe.sd_locked)

    @property
    def why_not_scored(self) -> str:
        """Why there are no scores; "" where there are."""
        return self._scorer.why_not

    def sample(self, controlnet: ControlNetModel) -> NDArray[np.uint8]:
        """Columns of map, picture, and samples under control."""
        columns, network = [], as_used(controlnet, self.base)
        with self.on_device():
            for index in self.indices[:_COLUMNS]:
                sample = self.encoded.sample(Turn(index, 0), whole=True)
                cond = images.levels_to_cond(images.maps_to_levels([sample.levels]))
                samples = generate(
                    self.base,
                    sample.example.caption,
                    controls=[Control(network, cond)],
                    seeds=_SEEDS,
                    width=sample.view.width,
                    height=sample.view.height,
                    execution=AS_PLANNED,
                )
                columns.append([visible(sample.levels), self._picture(sample), *samples])
        return np.hstack([np.vstack(column) for column in _of_one_height(columns)])

    @cached_property
    def _monitors(self) -> list[Monitor]:
        """One for each size that at least two of the pictures have: a picture is shown another's map."""
        by_shape: dict[tuple[int, ...], list[Sample]] = {}
        for index in self.indices:
            sample = self.encoded.sample(Turn(index, 0), whole=True)
            by_shape.setdefault(sample.levels.shape, []).append(sample)
        watched = [alike for alike in by_shape.values() if len(alike) > 1]
        if (count := sum(map(len, watched))) < len(self.indices):
            self.report(self._unwatched(count))
        return [self._monitor(alike, number) for number, alike in enumerate(watched)]

    def _unwatched(self, count: int) -> str:
        """What to say where so many of the pictures are watched, and not all."""
        of, pictures = len(self.indices), "held-out pictures" if self.held_out else "pictures that are shown"
        cure = "a larger data.holdout, or data.buckets=false, lets more be compared"
        if not count:
            return f"no look at whether the map is used: of {pictures} ({of}) no two have one size; {cure}"
        return f"{of - count} of {of} {pictures} are not compared: each has a size of its own; {cure}"

    def _monitor(self, alike: Sequence[Sample], number: int) -> Monitor:
        text = self.encoded.text([sample.example.caption for sample in alike])
        return Monitor(
            self.base,
            self.encoded.moments(alike).mean.float(),
            images.levels_to_cond(levels_of(alike)),
            text.encoder_hidden_states.to(self.base.device, self.base.dtype),
            self.added_cond(text.pooled, alike),
            seed=self.recipe.seed + number,  # each size has noise of its own
            alphas_cumprod=self.alphas_cumprod,
            only_mid_control=self.recipe.only_mid_control,
        )

    @cached_property
    def _scorer(self) -> Scorer:
        samples = [self.encoded.sample(Turn(index, 0), whole=True) for index in self.indices]
        pairs = [Pair(self._picture(s), s.levels, s.example.caption) for s in samples]
        maker = _preprocessor(self.recipe, made=self.encoded.visits.made)
        return Scorer(self.base, pairs, kind=self.recipe.map, preprocessor=maker, steps=_SCORED_STEPS)

    def _picture(self, sample: Sample) -> NDArray[np.uint8]:
        return self.encoded.visits.picture(sample.visit.index, sample.view)


def _preprocessor(recipe: ControlNetRecipe, *, made: bool) -> Preprocessor | None:
    """What makes such maps of generated pictures: for the bundled base its own estimators, else what made
    them.
    """
    from controlkit import preprocessors

    if recipe.base in BUNDLED and recipe.map in ("openpose", "depth"):
        return preprocessors.get(recipe.map, model="tiny")
    if not made:
        return None
    settled = {key: value for key, value in recipe.data.options.items() if range_ends(value) is None}
    return preprocessors.get(recipe.map, **settled)


def visible(levels: NDArray[Any]) -> NDArray[np.uint8]:
    """A map as a picture: its first three channels, or its only one thrice, in 8 bits."""
    if levels.dtype == np.uint16:
        levels = (levels >> 8).astype(np.uint8)
    return np.ascontiguousarray(levels[..., :3] if levels.shape[2] >= 3 else levels[..., [0, 0, 0]])


def _of_one_height(columns: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[list[NDArray[np.uint8]]]:
    """The columns with black below shorter cells, so that rows are level."""
    height = max(column[0].shape[0] for column in columns)
    for column in columns:
        yield [np.pad(cell, ((0, height - cell.shape[0]), (0, 0), (0, 0))) for cell in column]

"""Where a training's samples come from, by the number of a batch: stored pairs, or a stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from controlkit.base import Base, long_prompts_told_together
from controlkit.processes import Processes
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Encoded, Outline, Sample
from controlkit.training.data.order import Order, Turn
from controlkit.training.data.pairs import load_pairs
from controlkit.training.data.visits import Visits

Report = Callable[[str], None]
_LOOKED_AT = 100  # pictures, of which one should be transparent where that counts


class Feed(Protocol):
    """The samples of every batch."""

    encoded: Encoded
    """The pairs that are shown, and what encodes."""
    shown: list[int]
    """Their numbers in it."""
    held_out: bool
    """Whether these are kept from the training."""

    @property
    def pairs(self) -> int | None:
        """How many are trained on, where that is known."""

    @property
    def left_out(self) -> int | None:
        """How many cannot be used and were left out, where that is known."""

    def state(self, number: int) -> dict[str, Any]:
        """What a run that goes on at a batch need not find out again, as JSON has it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what the run that stopped knew; nothing changes but what is read."""

    def digest(self) -> str:
        """SHA-256 over everything that is trained on; "" where not all of it is known."""

    def held_out_digest(self) -> str:
        """The same of the pairs that are held out; "" where there are none."""

    def samples(self, number: int) -> list[Sample]:
        """The samples of a batch, prepared; threads may ask."""

    def first_maps(self, count: int) -> list[NDArray[np.uint8]]:
        """Some maps as they are trained on, to be looked through; none where they are no RGB pictures."""


def open_feed(recipe: ControlNetRecipe, base: Base, processes: Processes, *, report: Report) -> Feed:
    """Open the recipe's data, look at it, and encode what the cache lacks.

    Raises ValueError, naming them, for pairs that cannot be used, and for data that is not there.
    """
    if not recipe.data.streaming:
        return StoredFeed(recipe, base, processes, report=report)
    from controlkit.training.data.sources import open_stream
    from controlkit.training.data.streamed import StreamFeed

    return StreamFeed(open_stream(recipe.data, kind=recipe.map, report=report), base, recipe, report=report)


class StoredFeed:
    """The samples of pairs that can be asked for in any order."""

    def __init__(self, recipe: ControlNetRecipe, base: Base, processes: Processes, *, report: Report) -> None:
        """Look at every pair, and encode what the cache lacks, this process its share."""
        pairs = load_pairs(recipe, report=report)
        visits = Visits(
            pairs.examples,
            pairs.sizes,
            data=recipe.data,
            kind=recipe.map,
            resolution=recipe.data.resolution or base.resolution,
            seed=recipe.seed,
        )
        self.shown, self.trained, self.held_out = pairs.shown, pairs.trained, bool(pairs.held_out)
        self.encoded = Encoded(base, pairs.examples, visits, data=recipe.data, report=report)
        with long_prompts_told_together():
            self.encoded.fill([*pairs.trained, *pairs.shown], processes)
        about_opaque(self.encoded, pairs.trained, report)
        trained = set(pairs.trained)
        self.pairs, self.left_out = len(trained), pairs.sizes.count(None)
        self._all = self.encoded.digest([*pairs.trained, *pairs.shown])
        self._held_out = self.encoded.digest(pairs.held_out) if pairs.held_out else ""
        self.order = Order(
            [bucket if index in trained else -1 for index, bucket in enumerate(visits.shape_of)],
            batch_size=recipe.batch_size,
            seed=recipe.seed,
        )

    def state(self, number: int) -> dict[str, Any]:
        """What the data are: a run goes on with the same."""
        return {"pairs": self.pairs, "data_sha256": self._all, "held_out_sha256": self._held_out}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where pictures, maps, captions or their order are others than they were."""
        before, pairs = state.get("data_sha256", ""), state.get("pairs", self.pairs)
        is_other = before and self._all and before != self._all  # without a cache their number alone is known
        if is_other or pairs != self.pairs:
            raise ValueError(
                f"the data set has changed since this run stopped ({self._changed(pairs)}):"
                " bring it back as it was, or begin a new run with out=FOLDER"
            )

    def _changed(self, before: int) -> str:
        if before != self.pairs:
            return f"then {before:,} pairs to train on, now {self.pairs:,}"
        return f"there are {before:,} pairs as before; pictures, maps, captions or their order are others"

    def digest(self) -> str:
        """SHA-256 over every trained pair's picture, map and caption, in their order."""
        return self.encoded.digest(self.trained)

    def held_out_digest(self) -> str:
        """SHA-256 over the held-out pairs' pictures, maps and captions, by which an evaluation knows them."""
        return self._held_out

    def samples(self, number: int) -> list[Sample]:
        """The samples of a batch."""
        return [self.encoded.sample(turn) for turn in self.order.batch(number)]

    def outlines(self, number: int) -> list[Outline]:
        """The same, with nothing read: for data that is on the device already."""
        return [self.encoded.outline(turn) for turn in self.order.batch(number)]

    def first_maps(self, count: int) -> list[NDArray[np.uint8]]:
        """The maps of the first pairs."""
        return maps_of(self.encoded, self.trained[:count])


def about_opaque(encoded: Encoded, indices: Sequence[int], report: Report) -> None:
    """Say so where `data.alpha_mask` is asked for and none of the first pictures is transparent."""
    looked_at = indices[:_LOOKED_AT] if encoded.data.alpha_mask else []
    if looked_at and all(_is_opaque(encoded, index) for index in looked_at):
        report(
            f"data.alpha_mask has no effect so far: of {len(looked_at)} pictures that were looked at, none is"
            " transparent where it is seen"
        )


def _is_opaque(encoded: Encoded, index: int) -> bool:
    try:
        masks = [encoded.opaque(index, view) for view in encoded.visits.views(index)]
    except ValueError:  # of a stream: its visit says so
        return True
    return all(mask is None or bool((mask == 255).all()) for mask in masks)


def maps_of(encoded: Encoded, indices: list[int]) -> list[NDArray[np.uint8]]:
    """The maps of some pairs at their first visit, where they are RGB pictures."""
    if encoded.visits.channels != 3:
        return []
    maps = [encoded.sample(Turn(index, 0), whole=True).levels for index in indices]
    return [cast("NDArray[np.uint8]", levels) for levels in maps if levels.dtype == np.uint8]

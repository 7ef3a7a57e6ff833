"""Batches of a data set that is read from beginning to end: shuffled within windows, encoded on the spot.

A window of so many pairs is read, put in an order drawn from the seed and the window's number, and used up
before the next; so a batch is a function of its number here, too. Checkpoints keep where the window of the
next batch begins, so a run that resumes reads on there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit.base import Base
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Encoded, Sample
from controlkit.training.data.examples import Example, size_of_example
from controlkit.training.data.feeds import about_opaque, maps_of
from controlkit.training.data.order import Turn
from controlkit.training.data.pairs import SHOWN_TRAINED, held_of
from controlkit.training.data.source_streams import Stream
from controlkit.training.data.visits import Visits
from controlkit.training.draws import derived_seed

Report = Callable[[str], None]
_LOOKED_AT = 8  # pictures, each decoded, of which one should be transparent where that counts


class StreamFeed:
    """The samples of a stream's batches, by the batch's number; threads may ask."""

    def __init__(self, stream: Stream, base: Base, recipe: ControlNetRecipe, *, report: Report) -> None:
        """The first ``data.holdout`` pairs are not trained on, but shown; of few pairs fewer, or none."""
        self.stream, self.base, self.recipe, self.report = stream, base, recipe, report
        self._size = max(recipe.data.shuffle_window, recipe.batch_size, 2 * recipe.data.holdout)
        self._lock = threading.Lock()
        self._window = lru_cache(maxsize=3)(self._read)
        self.encoded = self._window(0)
        # by now the length is known wherever it is less than twice what is to be held out
        self._held = held_of(recipe.data.holdout, stream.length, report)
        self.shown = list(range(self._held or min(SHOWN_TRAINED, stream.length or self._size)))
        self.held_out = bool(self._held)
        about_opaque(self.encoded, self._first(_LOOKED_AT), report)

    @property
    def pairs(self) -> int | None:
        """How many there are, once the end was seen."""
        return None if self.stream.length is None else self.stream.length - self._held

    @property
    def left_out(self) -> None:
        """Not known: a pair that cannot be used comes by again."""

    def state(self, number: int) -> dict[str, Any]:
        """Where the stream is to be read for a batch, and how long it is, if that is known."""
        return self.stream.state(number * self.recipe.batch_size // self._size * self._size)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Read on where a run that stopped was."""
        if state:
            self.stream.restore(state)

    def digest(self) -> str:
        """Not known of a stream."""
        return ""

    def held_out_digest(self) -> str:
        """Nor is this."""
        return ""

    def samples(self, number: int) -> list[Sample]:
        """The samples of a batch. Raises ValueError, naming it, for a pair that cannot be read."""
        size = self.recipe.batch_size
        return [self._sample(position) for position in range(number * size, (number + 1) * size)]

    def first_maps(self, count: int) -> list[NDArray[np.uint8]]:
        """The maps of the first pairs that are trained on."""
        return maps_of(self.encoded, self._first(count))

    def _first(self, count: int) -> list[int]:
        """The numbers of the first pairs that are trained on."""
        end = min(self._held + count, self._size, self.stream.length or self._size)
        return list(range(self._held, end))

    def _sample(self, position: int) -> Sample:
        window, place = divmod(position, self._size)
        with self._lock:  # the stream has one reader
            encoded = self._window(window)
        random = np.random.default_rng(derived_seed(self.recipe.seed, "window", window))
        index = self._spared(window, int(random.permutation(self._size)[place]))
        for _ in range(self._size):
            try:
                return encoded.sample(Turn(index, window))
            except ValueError as error:
                if self.recipe.data.bad == "stop":
                    raise
                self.report(f"left out: {error}")
                index = self._spared(window, (index + 1) % self._size)
        raise ValueError(f"{self.recipe.data.source}: none of {self._size} pairs in a row can be used")

    def _spared(self, window: int, index: int) -> int:
        """The place itself, or another where that pair is held out."""
        start, length = window * self._size, self.stream.length
        while (start + index if length is None else (start + index) % length) < self._held:
            index = (index + self._held) % self._size  # past the window's end it may be one again
        return index

    def _read(self, number: int) -> Encoded:
        return encoded_live(self.stream.window(number, self._size), self.base, self.recipe, self.report)


def encoded_live(
    examples: Sequence[Example], base: Base, recipe: ControlNetRecipe, report: Report
) -> Encoded:
    """Examples whose sizes are found when they are looked at, encoded without a cache."""
    data = recipe.data.model_copy(update={"cache": False})
    visits = Visits(
        examples,
        [_size(example) for example in examples],
        data=data,
        kind=recipe.map,
        resolution=data.resolution or base.resolution,
        seed=recipe.seed,
    )
    return Encoded(base, examples, visits, data=data, report=report)


def _size(example: Example) -> tuple[int, int] | None:
    """Width and height of a picture, upright; None where it cannot be read, which its visit then says."""
    try:
        return size_of_example(example)
    except ValueError:
        return None

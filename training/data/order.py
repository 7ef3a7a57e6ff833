"""Which pairs make up which batch: a function of the seed and the batch's number alone.

Pairs of one bucket (of one size) have an endless order of their own, each lap a new permutation; a batch
takes the next pairs of its bucket's order. Which bucket comes when is drawn for each epoch, as often as it
has batches. So a run that stops knows what comes next, whatever it has seen, and no batch mixes sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from controlkit.training.draws import derived_seed


@dataclass(frozen=True)
class Turn:
    """A pair's turn: which one, and how often it was there before."""

    index: int
    lap: int


class Order:
    """The batches of a training, numbered from 0 on.

    ``buckets`` says of each pair which bucket it is in; pairs that are left out of training have -1.
    """

    def __init__(self, buckets: Sequence[int], *, batch_size: int, seed: int) -> None:
        of = np.asarray(buckets, dtype=np.int64)
        self.seed, self.batch_size = seed, batch_size
        self.members = [np.flatnonzero(of == bucket) for bucket in np.unique(of[of >= 0])]
        self.pairs = int((of >= 0).sum())
        if not self.pairs:
            raise ValueError("there is no pair to train on")
        batches = [-(-len(members) // batch_size) for members in self.members]
        self._which = np.repeat(np.arange(len(batches)), batches)  # bucket of each batch, sorted
        self._nth = np.concatenate(
            [np.arange(count) for count in batches]
        )  # and its number within the bucket
        self._batches = batches
        self._of_epoch = lru_cache(maxsize=2)(self._draw_epoch)
        self._of_lap = lru_cache(maxsize=4 * len(batches))(self._draw_lap)

    @property
    def per_epoch(self) -> int:
        """Batches until every pair had its turn (a bucket's last batch is filled from its next lap)."""
        return len(self._which)

    def batch(self, number: int) -> list[Turn]:
        """The turns of a batch: ``batch_size`` pairs of one bucket."""
        epoch, place = divmod(number, self.per_epoch)
        slot = int(self._of_epoch(epoch)[place])
        bucket = int(self._which[slot])
        start = (epoch * self._batches[bucket] + int(self._nth[slot])) * self.batch_size
        return [self._turn(bucket, position) for position in range(start, start + self.batch_size)]

    def _turn(self, bucket: int, position: int) -> Turn:
        lap, offset = divmod(position, len(self.members[bucket]))
        return Turn(int(self._of_lap(bucket, lap)[offset]), lap)

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        if len(self._batches) == 1:  # nothing to mix: the pairs' order is the batches' order
            return np.arange(self.per_epoch)
        return np.random.default_rng(derived_seed(self.seed, "batches", epoch)).permutation(self.per_epoch)

    def _draw_lap(self, bucket: int, lap: int) -> NDArray[np.int64]:
        members = self.members[bucket]
        name = ("order", lap) if len(self.members) == 1 else ("order", bucket, lap)
        return members[np.random.default_rng(derived_seed(self.seed, *name)).permutation(len(members))]

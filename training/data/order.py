"""Which pairs make up which batch: a function of the seed and the batch's number alone.

Pairs of one bucket (of one size) have an endless order of their own, each lap a new permutation; a batch
takes the next pairs of its bucket's order. Which bucket comes when is drawn for each epoch, as often as it
has batches that begin in that lap of its order: what the last one takes of the next lap is not given again,
so that pairs of a small bucket come as often as others. So a run that stops knows what comes next, whatever
it has seen, and no batch mixes sizes.
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
        self._sizes = np.array([len(members) for members in self.members])
        self._of_epoch = lru_cache(maxsize=8)(self._draw_epoch)
        self._of_lap = lru_cache(maxsize=4 * len(self.members))(self._draw_lap)

    @property
    def per_epoch(self) -> int:
        """Batches until every pair had its first turn (a bucket's last batch is filled from its next lap)."""
        return int(self._before(1).sum())

    def batch(self, number: int) -> list[Turn]:
        """The turns of a batch: ``batch_size`` pairs of one bucket."""
        epoch = self._epoch(number)
        bucket, nth = self._of_epoch(epoch)[number - int(self._before(epoch).sum())].tolist()
        return [self._turn(bucket, nth * self.batch_size + place) for place in range(self.batch_size)]

    def _before(self, epoch: int) -> NDArray[np.int64]:
        """How many batches of each bucket come before an epoch: those that begin in earlier laps."""
        before: NDArray[np.int64] = -(-epoch * self._sizes // self.batch_size)
        return before

    def _epoch(self, number: int) -> int:
        """The epoch of a batch: they differ in length, by less than a batch of each bucket."""
        epoch = max(0, (number - len(self.members)) * self.batch_size // self.pairs)
        while int(self._before(epoch + 1).sum()) <= number:
            epoch += 1
        return epoch

    def _turn(self, bucket: int, position: int) -> Turn:
        lap, offset = divmod(position, len(self.members[bucket]))
        return Turn(int(self._of_lap(bucket, lap)[offset]), lap)

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        """An epoch's batches, (batches, 2): the bucket of each, and its number among that bucket's."""
        first, after = self._before(epoch), self._before(epoch + 1)
        buckets = np.repeat(np.arange(len(self.members)), after - first)
        nth = np.concatenate([np.arange(*ends) for ends in zip(first, after, strict=True)])
        batches = np.stack([buckets, nth], axis=1)
        if len(self.members) == 1:  # nothing to mix: the pairs' order is the batches' order
            return batches
        return np.random.default_rng(derived_seed(self.seed, "batches", epoch)).permutation(batches)

    def _draw_lap(self, bucket: int, lap: int) -> NDArray[np.int64]:
        members = self.members[bucket]
        name = ("order", lap) if len(self.members) == 1 else ("order", bucket, lap)
        return members[np.random.default_rng(derived_seed(self.seed, *name)).permutation(len(members))]

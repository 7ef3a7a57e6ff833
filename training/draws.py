"""Every random choice of a training, as a function of (seed, step) alone.

Nothing carries over from step to step, so a run that stops and resumes draws what the uninterrupted run
draws, whatever happened in between.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any parts: distinct parts give unrelated seeds."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng(derived_seed(seed, "order", epoch)).permutation(count)


class Draws:
    """The random choices of one step."""

    def __init__(self, seed: int, step: int) -> None:
        self.seed, self.step = seed, step
        self.generator = torch.Generator().manual_seed(derived_seed(seed, "step", step))
        self.numpy = np.random.default_rng(derived_seed(seed, "numpy", step))

    def indices(self, count: int, batch_size: int) -> list[int]:
        """The step's batch out of `count` items: each epoch visits each item once, in an order of its own."""
        start = self.step * batch_size
        places = [divmod(position, count) for position in range(start, start + batch_size)]
        return [int(_order(self.seed, epoch, count)[offset]) for epoch, offset in places]

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal noise of the shape, float32, drawn on the CPU."""
        return torch.randn(shape, generator=self.generator)

    def timesteps(self, count: int, num_train_timesteps: int) -> torch.Tensor:
        """`count` uniform timesteps, int64."""
        return torch.randint(0, num_train_timesteps, (count,), generator=self.generator)

    def chosen(self, count: int, probability: float) -> torch.Tensor:
        """`count` independent yes/no choices, bool."""
        return torch.rand(count, generator=self.generator) < probability

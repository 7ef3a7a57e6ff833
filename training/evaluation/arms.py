"""What is compared: adapters, and beside them no control, the true pictures, and these through the
autoencoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from controlkit.control import Control
from controlkit.sampling import generate
from controlkit.training.draws import derived_seed
from controlkit.training.evaluation.request import CEILING, FLOOR, TRUE, Compared, Request, identity
from controlkit.training.quality import through_vae
from controlkit.training.reporting.monitor import as_cond

if TYPE_CHECKING:
    from controlkit.adapters import Adapter
    from controlkit.base import Base
    from controlkit.training.evaluation.held_out import Held

Draw = Callable[["Held", int], NDArray[np.uint8]]
"""The picture of a pair and a seed."""


@dataclass(frozen=True)
class Arm:
    """One of what is compared. folder: of its pictures. kind: of the map that it follows, "" for none."""

    label: str
    folder: str
    kind: str = ""
    compared: Compared | None = None

    @property
    def seeded(self) -> bool:
        """Whether its pictures differ by the seed."""
        return self.label not in (CEILING, TRUE)


def arms_of(adapters: list[Compared]) -> list[Arm]:
    """All that is compared, in the order in which it is shown."""
    compared = [Arm(one.label, identity(one), one.kind, one) for one in adapters]
    return [Arm(FLOOR, "no-control"), *compared, Arm(CEILING, "autoencoder"), Arm(TRUE, "true")]


def drawing(arm: Arm, base: Base, adapter: Adapter | None, request: Request) -> Draw:
    """What makes an arm's pictures."""
    if arm.label == TRUE:
        return lambda pair, _: pair.picture
    if arm.label == CEILING:
        return lambda pair, _: through_vae(base, pair.picture)

    def draw(pair: Held, seed: int) -> NDArray[np.uint8]:
        height, width = pair.picture.shape[:2]
        return generate(
            base,
            pair.caption,
            negative_prompt=request.negative_prompt,
            controls=[] if adapter is None else [control_of(arm, adapter, pair)],
            steps=request.steps,
            guidance=request.guidance,
            scheduler=request.scheduler,
            seeds=[noise_of(pair, seed)],
            height=height,
            width=width,
        )[0]

    return draw


def control_of(arm: Arm, adapter: Adapter, pair: Held) -> Control:
    """The adapter on a pair's map, as the arm says."""
    assert arm.compared is not None
    return Control(adapter, as_cond([pair.maps[arm.kind]]), kind=arm.kind, **arm.compared.how)


def noise_of(pair: Held, seed: int) -> int:
    """The seed of the noise: the same for every arm, so that pictures are compared one by one."""
    return derived_seed("evaluate", pair.number, seed) % 2**32

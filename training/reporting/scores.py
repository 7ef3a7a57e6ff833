"""How well a control network is obeyed, on held-out pairs of any data: from maps back to maps.

For each pair a picture is generated from its caption under its map; the map of that picture, extracted by the
preprocessor that made the pair's own, is compared with what was asked for. Three numbers belong together:

- the floor: the same captions and seeds without control, what chance and caption give;
- the adapter's;
- the ceiling: the pair's own picture through the autoencoder, the best that this base can draw.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from controlkit.control import Control
from controlkit.sampling import Execution, generate
from controlkit.training.draws import derived_seed
from controlkit.training.quality import through_vae
from controlkit.training.reporting.measures import Measure, Values, measure_of, true_poses
from controlkit.training.reporting.monitor import as_cond, evaluating

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from controlkit.base import Base
    from controlkit.preprocessors import Poses, Preprocessor

STEPS = 20
AS_PLANNED = Execution(packed=False)  # what a plan says of a training's memory counts no packed weights
_NO_LAYOUT = ("shuffle",)  # the map is a matter of chance: two of one picture differ


@dataclass(frozen=True, eq=False)
class Pair:
    """A held-out pair as it is trained on: one geometry, sides multiples of 8.

    picture: uint8 H×W×3. map: uint8 or uint16 H×W×C. poses: the joints that were drawn, where they are known.
    """

    picture: NDArray[np.uint8]
    map: NDArray[Any]
    caption: str
    poses: Poses | None = None


@dataclass(frozen=True)
class ControlScores:
    """Mean scores over pairs and seeds, by the measure's name; the first one names the kind."""

    pairs: int
    control: Values
    floor: Values
    ceiling: Values

    def row(self) -> dict[str, float]:
        """The entries of metrics.jsonl, nested names joined by a blank: "edge F1", "edge F1 floor" ..."""
        named = {"": self.control, " floor": self.floor, " ceiling": self.ceiling}
        return {name + end: value for end, values in named.items() for name, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """What scores.json holds."""
        return {"pairs": self.pairs, "floor": self.floor, "control": self.control, "ceiling": self.ceiling}


class Scorer:
    """Scores control networks of one kind on the same pairs; floor and ceiling are measured once."""

    def __init__(
        self,
        base: Base,
        pairs: Sequence[Pair],
        *,
        kind: str,
        preprocessor: Preprocessor | None = None,
        steps: int = STEPS,
        seeds: Sequence[int] = (0,),
        guidance: float | None = None,
    ) -> None:
        """Find out how this kind can be scored; `why_not` says why it cannot, and is "" where it can.

        preprocessor: the one that makes such maps of pictures; canny has one without being told. steps,
        guidance: of each generation. seeds: pictures per pair; pair and seed decide the noise.
        """
        self.base, self.pairs, self.kind = base, list(pairs), kind
        self.steps, self.seeds, self.guidance = steps, list(seeds), guidance
        self.why_not = self._reason(preprocessor)
        if self.why_not:
            return
        if preprocessor is None:
            from controlkit.preprocessors import get

            preprocessor = get(kind)
        self._measure: Measure = measure_of(kind)(self.pairs, preprocessor)
        self._bounds: tuple[Values, Values] | None = None

    def _reason(self, preprocessor: Preprocessor | None) -> str:
        if not self.pairs:
            return "no pairs are held out (data.holdout)"
        if self.kind in _NO_LAYOUT:
            return f"{self.kind} maps carry no layout that could be found again"
        if preprocessor is None and self.kind != "canny":
            return (
                f"the maps of pictures are needed, and no preprocessor is known that makes {self.kind} maps"
            )
        if self.kind == "openpose" and not true_poses(self.pairs, preprocessor):
            return "nobody is to be seen in the held-out pictures"
        if any(pair.map.shape[2] not in (1, 3) for pair in self.pairs):
            return "stacks of several maps cannot be found again in a picture"
        return ""

    def score(self, controlnet: ControlNetModel, *, base_changed: bool = False) -> ControlScores | None:
        """The scores of a control network, floor and ceiling beside them; None where `why_not` has a reason.

        base_changed: the U-Net was trained, too, so that the floor has to be measured again. Changes no
        global random state and leaves the networks in the mode they were in. Raises ValueError for latents
        that stop being finite.
        """
        if self.why_not:
            return None
        with torch.no_grad(), evaluating(controlnet, self.base.unet), _same_chance():
            if self._bounds is None or base_changed:
                floor = self._mean(lambda pair, seed: self._generate(pair, seed, None))
                ceiling = self._mean(lambda pair, _: through_vae(self.base, pair.picture), seeds=[0])
                self._bounds = floor, ceiling
            network = as_used(controlnet, self.base)
            control = self._mean(lambda pair, seed: self._generate(pair, seed, network))
        return ControlScores(len(self.pairs), control, *self._bounds)

    def _mean(
        self, draw: Callable[[Pair, int], NDArray[np.uint8]], *, seeds: Sequence[int] | None = None
    ) -> Values:
        rows = []
        for index, pair in enumerate(self.pairs):
            for seed in self.seeds if seeds is None else seeds:
                rows.append(self._measure(draw(pair, derived_seed("score", index, seed) % 2**32), index))
        rows = [row for row in rows if row]  # a picture without people has no joints to score
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}

    def _generate(self, pair: Pair, seed: int, network: ControlNetModel | None) -> NDArray[np.uint8]:
        height, width = pair.picture.shape[:2]
        controls = [] if network is None else [Control(network, as_cond([pair.map]))]
        return generate(
            self.base,
            pair.caption,
            controls=controls,
            steps=self.steps,
            guidance=self.guidance,
            seeds=[seed],
            height=height,
            width=width,
            execution=AS_PLANNED,
        )[0]


def as_used(controlnet: ControlNetModel, base: Base) -> ControlNetModel:
    """The network in the base's precision, in which it will be used; itself where that is its own."""
    if controlnet.dtype == base.dtype:
        return controlnet
    network, lowered = cast(nn.Module, controlnet), {}  # of tensors alone: the copy is never whole
    for p in network.parameters():
        lowered[id(p)] = nn.Parameter(p.detach().to(base.dtype), requires_grad=p.requires_grad)
    return cast("ControlNetModel", copy.deepcopy(network, lowered).to(base.dtype))


@contextmanager
def _same_chance() -> Iterator[None]:
    """Put the global generators back afterwards: estimators of other libraries may draw from them."""
    old = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(old[0])
        np.random.set_state(old[1])  # noqa: NPY002
        random.setstate(old[2])

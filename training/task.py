"""What the loop asks of whatever is trained, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit.training.draws import Draws
from controlkit.training.machine import DTYPES


@dataclass(frozen=True)
class Losses:
    """The losses of a micro-batch: ``each`` (B,) with a graph; ``timesteps`` (B,), out of ``levels``, if
    any; ``missed`` (n,), n <= B, what a reward found of the pairs it looked at: it is in ``each`` already.
    """

    each: Tensor
    timesteps: Tensor | None = None
    levels: int = 1
    missed: Tensor | None = None


class Part(Protocol):
    """A micro-batch: what one forward pass sees."""

    def __len__(self) -> int:
        """How many pairs."""

    def halves(self) -> Sequence[Part]:
        """The same pairs in two parts, or this one alone where there is one pair."""

    def describe(self) -> str:
        """The names of the pairs, for a message."""


class Task(Protocol):
    """What is trained."""

    half: torch.dtype | None
    """What trained modules compute in, beside fp32 masters; None leaves them in fp32."""

    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name; their parameters that require a gradient are optimised and saved."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups: `params`, and `rate`, the factor on the recipe's learning rate."""

    def whole(self) -> nn.Module:
        """The module whose forward pass computes the predictions: what processes share."""

    def parts(self, step: int) -> Sequence[Part]:
        """This process's micro-batches of a step, of equal numbers of pairs: a function of the step."""

    def losses(self, whole: nn.Module, part: Any) -> Losses:
        """The losses of a micro-batch, ``whole`` standing for the task's own."""

    def look(self, step: int) -> dict[str, float]:
        """Figures that say how the training does, beside the loss, where they are due; most often none."""

    def scores_due(self, step: int) -> bool:
        """Whether scores are to be taken after a step."""

    def scores(self) -> dict[str, float]:
        """Scores of what was learned, under the weights that the modules hold now."""

    def remark(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """What is to be said of the rows of metrics so far, the last of which is new."""

    def facts(self) -> dict[str, Any]:
        """What the training was made of, by digests and numbers, as JSON values."""

    def final_scores(self) -> dict[str, Any]:
        """Scores of the finished training, as scores.json has them; none where they cannot be taken."""

    def state(self, step: int) -> dict[str, Any]:
        """What a run that goes on after so many steps need not find out again, as JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Know what the run that stopped knew: what its `state` was, {} of old checkpoints."""

    def close(self) -> None:
        """End threads; nothing is asked for afterwards."""

    def sample(self) -> NDArray[np.uint8] | None:
        """A picture that shows what has been learned so far, uint8 H×W×3."""

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the result, for others to load, into an empty folder.

        ``weights``: the trained parameters by name, whole even where processes share the modules', and then
        the others of these modules, too.
        """


@dataclass(frozen=True)
class DrawnPart:
    """A micro-batch that is its draws: of tasks that make their batch themselves."""

    draws: Draws
    pairs: int

    def __len__(self) -> int:
        return self.pairs

    def halves(self) -> Sequence[DrawnPart]:
        """It cannot be halved."""
        return [self]

    def describe(self) -> str:
        """The step is all there is to tell."""
        return f"the batch of step {self.draws.step + 1}"


class DrawnTask(ABC):
    """Half of a task: one that makes a step's batch, and its mean loss, of the step's draws."""

    recipe: Any
    half: torch.dtype | None = None

    @abstractmethod
    def loss(self, draws: Draws) -> Tensor:
        """The loss of one batch, a scalar with a graph."""

    @abstractmethod
    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name."""

    def whole(self) -> nn.Module:
        """All trained modules; their forward passes are called one by one."""
        return nn.ModuleDict(self.modules())

    def parts(self, step: int) -> Sequence[DrawnPart]:
        """The one batch of a step."""
        return [DrawnPart(Draws(self.recipe.seed, step), self.recipe.batch_size)]

    def losses(self, whole: nn.Module, part: DrawnPart) -> Losses:
        """The batch's mean loss, as if it were each pair's."""
        dtype = DTYPES[self.recipe.precision]
        device = next(whole.parameters()).device.type
        with torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32):
            return Losses(self.loss(part.draws)[None])

    def look(self, step: int) -> dict[str, float]:
        """Nothing beside the loss."""
        return {}

    def scores_due(self, step: int) -> bool:
        """Never."""
        return False

    def scores(self) -> dict[str, float]:
        """None."""
        return {}

    def remark(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """Nothing."""
        return None

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def final_scores(self) -> dict[str, Any]:
        """None."""
        return {}

    def state(self, step: int) -> dict[str, Any]:
        """Nothing: a step's draws are all there is to it."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """There is nothing to know."""

    def close(self) -> None:  # noqa: B027
        """There is nothing to end."""

"""The end of a step: clip the gradient, see that it is finite, update.

A step whose gradient is not finite changes nothing. Where the optimizer can be told so on the device (torch's
fused AdamW takes ``found_inf``, by which GradScaler passes steps over, too), the host need not know at once:
it goes on to the next step, and reads norms and losses later, all together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit.training import zero
from controlkit.training.sharding import whole_tensor
from controlkit.training.task import Losses

if TYPE_CHECKING:
    from controlkit.training.loop import Run

_UNREAD = 32  # steps, at most, that the host is behind


@dataclass
class Taken:
    """A step as it was taken: ``norm`` () is its gradient's, before clipping, on the device."""

    step: int
    losses: Sequence[Losses]
    norm: Tensor
    counts: bool = True
    """Whether its losses are told: not of a step that changed nothing, unless it found fp16's scale."""


@dataclass(frozen=True)
class Seen:
    """What one process saw in a step: its losses, timesteps and pairs, in words."""

    is_finite: bool
    """Whether all of its losses were."""
    words: str


def update(run: Run, losses: Sequence[Losses]) -> None:
    """Clip and update, or pass the step over. Raises ValueError after too many of those in a row."""
    if run.machine.engine is not None:  # DeepSpeed's step does both
        taken = Taken(run.step, losses, torch.tensor(zero.step(run.machine.engine)))
        run.unread.append(taken)
        is_finite(run, taken)
        return
    taken = Taken(run.step, losses, _clip(run))
    run.unread.append(taken)
    if run.reads_late:
        _update_where_finite(run, taken.norm)
        if len(run.unread) >= _UNREAD:
            run.read_losses()
    elif is_finite(run, taken):
        _update(run)


def can_read_late(run: Run) -> bool:
    """Whether the host may go on before it knows whether a step was taken."""
    knows = getattr(run.optimizer, "_step_supports_amp_scaling", False)  # GradScaler asks for the same
    on_gpu = run.machine.device.type == "cuda"
    return on_gpu and knows and run.machine.scaler is None and not run.machine.sharded


def is_finite(run: Run, taken: Taken) -> bool:
    """Whether a step's gradient was finite, as all processes find; if not, say which pairs were seen.

    Raises ValueError after too many steps in a row that were not.
    """
    run.grad_norm = float(whole_tensor(taken.norm))
    if math.isfinite(run.grad_norm):
        run.bad_steps = 0
        return True
    seen = run.machine.processes.gather([_seen(run, taken)])
    if not _finds_scale(run, seen):
        taken.counts = False
        _complain(run, taken.step + 1, culprits(seen))
    return False


def culprits(seen: Sequence[Seen]) -> str:
    """What was seen where losses were not finite; by all processes, where only the gradient was not."""
    if len(seen) == 1:
        return seen[0].words
    at_fault = [not one.is_finite for one in seen]
    named = [k for k, is_at_fault in enumerate(at_fault) if is_at_fault or not any(at_fault)]
    return "; ".join(f"process {k}: {seen[k].words}" for k in named)


def _clip(run: Run) -> Tensor:
    """Scale the gradient down to the recipe's largest norm; returns the norm that it had."""
    if run.machine.scaler is not None:
        run.machine.scaler.unscale_(run.optimizer)
    return nn.utils.clip_grad_norm_(list(run.weights.masters.values()), run.recipe.clip)


def _update(run: Run) -> None:
    scaler = run.machine.scaler
    if scaler is None:
        run.optimizer.step()
    else:
        scaler.step(run.optimizer)
        scaler.update()
    run.weights.give()


def _update_where_finite(run: Run, norm: Tensor) -> None:
    """A step that the device itself passes over where the norm is not finite; then nothing is counted."""
    optimizer: Any = run.optimizer
    optimizer.found_inf = norm.isfinite().logical_not().float()
    optimizer.step()
    del optimizer.found_inf
    run.weights.give()


def _finds_scale(run: Run, seen: Sequence[Seen]) -> bool:
    """Whether only fp16's scale was too large, which its first steps find by overflowing."""
    scaler = run.machine.scaler
    if scaler is None:
        return False
    scaler.update()
    return all(one.is_finite for one in seen) and scaler.get_scale() >= 1


def _seen(run: Run, taken: Taken) -> Seen:
    values = [value for loss in taken.losses for value in loss.each.tolist()]
    times = [str(t) for loss in taken.losses if loss.timesteps is not None for t in loss.timesteps.tolist()]
    described = "; ".join(part.describe() for part in run.task.parts(taken.step))
    shown = ", ".join(f"{value:.4g}" for value in values)
    words = f"losses {shown}; timesteps {', '.join(times) or 'none'}; {described}"
    return Seen(all(map(math.isfinite, values)), words)


def _complain(run: Run, step: int, seen: str) -> None:
    run.bad_steps += 1
    message = f"step {step} changed nothing: its loss or gradient is not finite ({seen})"
    run.watch.say(step, message, keep=True)
    if run.bad_steps >= getattr(run.recipe, "bad_steps", 1):
        raise ValueError(
            f"training stopped at step {step}: {run.bad_steps} steps in a row had no finite"
            " gradient; no weight was changed by them, checkpoints are good; the last:"
            f" {message}; try a lower learning_rate, in another folder (out=FOLDER)"
        )

"""Optimizers by name, from the packages that keep them, and their state as tensors and numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from controlkit.training.config_base import Recipe
from controlkit.training.sharding import shared_like, whole_tensor

if TYPE_CHECKING:
    from controlkit.training.weights import Weights

_LAST_RATE = 0.02  # of the learning rate, at the end of the cosine and linear schedules
PACKAGES: Mapping[str, str] = {
    "adamw8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "prodigy": "prodigyopt",
    "schedule-free": "schedulefree",
}
"""What each optimizer that torch lacks is imported from; all are in the extra `optimizers`."""


def check_optimizer(name: str) -> None:
    """Raise ValueError, one line with the cure, where an optimizer's package is not installed."""
    package = PACKAGES.get(name)
    if package is not None and find_spec(package) is None:
        distribution = package.replace("_", "-")
        raise ValueError(
            f"optimizer {name!r} needs the package {distribution}, which is not installed:"
            f" uv sync --extra optimizers, or pip install {distribution}"
        )


def make_optimizer(recipe: Recipe, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The recipe's optimizer over groups of `params` and `rate`, the factor on the learning rate.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), fused; Adafactor (Shazeer & Stern 2018,
    arXiv:1804.04235); Lion (Chen et al. 2023, arXiv:2302.06675); Prodigy (Mishchenko & Defazio 2023,
    arXiv:2306.06101); schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682).

    Prodigy finds one rate for all groups by itself (learning_rate = 1.0). Raises ValueError where its package
    is missing.
    """
    name = getattr(recipe, "optimizer", "adamw")
    check_optimizer(name)
    lr, betas, decay = recipe.learning_rate, recipe.betas, recipe.weight_decay
    rates = [1.0 if name == "prodigy" else g["rate"] for g in groups]
    tables = [{**g, "rate": rate, "lr": lr * rate} for g, rate in zip(groups, rates, strict=True)]
    if name == "adafactor":
        return torch.optim.Adafactor(tables, lr=lr, weight_decay=decay)
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(tables, lr=lr, betas=betas, weight_decay=decay)
    if name == "lion":
        from lion_pytorch import Lion

        return Lion(tables, lr=lr, betas=betas, weight_decay=decay)
    if name == "prodigy":
        from prodigyopt import Prodigy

        with redirect_stdout(io.StringIO()):  # it prints that its weight decay is decoupled
            return Prodigy(tables, lr=lr, betas=betas, weight_decay=decay, safeguard_warmup=recipe.warmup > 0)
    if name == "schedule-free":
        from schedulefree import AdamWScheduleFree

        free = AdamWScheduleFree(
            tables, lr=lr, betas=betas, weight_decay=decay, warmup_steps=recipe.warmup, foreach=True
        )
        free.train()
        return free
    assert name == "adamw", name
    return torch.optim.AdamW(tables, betas=betas, weight_decay=decay, fused=True)


def keeps_layout(recipe: Recipe) -> bool:
    """Whether the network's trained weights stay laid out as they are.

    bitsandbytes makes those that it moves contiguous, which a run that goes on would undo; bf16's masters are
    moved beside the network.
    """
    return getattr(recipe, "optimizer", "adamw") != "adamw8bit" or recipe.precision == "bf16"


def averages_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps an average of the weights, which is then what counts: schedule-free ones."""
    return hasattr(optimizer, "eval")


@contextmanager
def averages_of(optimizer: torch.optim.Optimizer, weights: Weights) -> Iterator[None]:
    """Within the block weights are the averages of an optimizer that keeps them; afterwards what they were.

    To the bit, which the optimizer's own way there and back is not.
    """
    if not averages_itself(optimizer):
        yield
        return
    masters = list(weights.masters.values())
    before = [master.detach().clone() for master in masters]
    optimizer.eval()  # type: ignore[attr-defined]
    weights.give()
    try:
        yield
    finally:
        optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            torch._foreach_copy_(masters, before)
        weights.give()


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of step 0, 1, ...: a linear warmup, then the schedule.

    A schedule-free optimizer warms up by itself and needs no schedule: its rate is constant.
    """
    if getattr(recipe, "optimizer", "adamw") == "schedule-free":
        return recipe.learning_rate
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if recipe.schedule == "rsqrt":
        return recipe.learning_rate * min(1.0, math.sqrt(2 * max(recipe.warmup, 1) / (step + 1)))
    done = min((step - recipe.warmup) / max(recipe.steps - recipe.warmup, 1), 1.0)
    falling = 1 - done if recipe.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return recipe.learning_rate * (_LAST_RATE + (1 - _LAST_RATE) * falling)


def set_rates(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate"]


def state_of(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """An optimizer's state: tensors by `parameter/key`, and the numbers of each of its groups.

    ``names``: the name of each parameter by its id.
    """
    tensors: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if value is not None:
                tensors[f"{names[id(parameter)]}/{key}"] = whole_tensor(torch.as_tensor(value))
    return tensors, numbers_of(optimizer)


def numbers_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The numbers of each of an optimizer's groups."""
    return [{k: v for k, v in group.items() if _is_number(v)} for group in optimizer.param_groups]


def restore_state(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    tensors: Mapping[str, Tensor],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Put back what `state_of` gave; a parameter that it has no state of begins without.

    Raises ValueError where there are more or fewer groups.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition("/")
        by_name.setdefault(name, {})[key] = tensor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        k: {key: _laid_out_as(p, value) for key, value in by_name[names[id(p)]].items()}
        for k, p in enumerate(parameters)
        if names[id(p)] in by_name
    }
    table = optimizer.state_dict()
    for group, saved in zip(table["param_groups"], groups, strict=True):
        group |= saved
    optimizer.load_state_dict({"state": state, "param_groups": table["param_groups"]})


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A state in its parameter's layout: fused kernels pair the two by their addresses."""
    if value.shape != parameter.shape or hasattr(parameter, "full_tensor"):
        return shared_like(value, parameter)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) and not (
        isinstance(value, float) and not math.isfinite(value)
    )

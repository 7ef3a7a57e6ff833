"""What a training will need, before anything is loaded: memory, speed, hours, and whether it fits.

Memory is counted on fake tensors (`planning_memory`), to the byte, to which comes what allocators waste: on a
processor glibc's heap, whose share was measured. Speed is reckoned from a few operations that are run on the
device (`planning_speed`); other programs that run there change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from controlkit.free_memory import available_memory, resident_memory
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.machine import check_precision
from controlkit.training.memory import is_out_of_memory as is_out_of_memory
from controlkit.training.planning_batch import USABLE
from controlkit.training.planning_batch import Batches as Batches
from controlkit.training.planning_batch import find_batch as find_batch
from controlkit.training.planning_batch import try_batches as try_batches
from controlkit.training.planning_networks import (
    Networks,
    build,
    simulate_encoding,
    simulate_reward,
    simulate_step,
)
from controlkit.training.planning_parts import Memory, Place, count_memory, imported_bytes
from controlkit.training.planning_speed import Speed, bandwidth, measure_speed

_OPTIMIZER_MOVES = {
    "adamw": 38,
    "adamw8bit": 24,
    "adafactor": 32,
    "lion": 30,
    "prodigy": 58,
    "schedule-free": 54,
}
"""Bytes read and written for each weight in an update, the clipping included."""
_AVERAGE_MOVES = 12


@dataclass(frozen=True)
class Alternative:
    """A setting under which less memory is needed."""

    setting: str
    total: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What a training is predicted to need."""

    device: str
    width: int
    height: int
    batch_size: int
    accumulation: int
    parameters: dict[str, int]
    """By network; `trained` counts what the optimizer moves."""
    flops_per_sample: int
    memory: Memory
    resident: int
    """Bytes that this process holds already."""
    free: int | None
    """Bytes that are free on the device; None where that cannot be known."""
    step_s: float
    steps: int
    encoding_s: float | None
    """None: nothing is encoded ahead, or nobody said how many pictures there are."""
    rates: dict[str, float]
    alternatives: list[Alternative] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether it fits into the memory that is free; None where that cannot be known."""
        return self._within(1.0)

    @property
    def comfortable(self) -> bool | None:
        """Whether it fits with room for the prediction's error; None where that cannot be known."""
        return self._within(USABLE)

    def _within(self, share: float, total: int | None = None) -> bool | None:
        if self.free is None:
            return None
        return (self.memory.total if total is None else total) <= self.resident + share * self.free

    @property
    def hours(self) -> float:
        """Of all steps, without samples, scores and checkpoints."""
        return self.step_s * self.steps / 3600

    @property
    def samples_per_s(self) -> float:
        """Pairs per second."""
        return self.batch_size * self.accumulation / self.step_s

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {"fits": self.fits, "hours": self.hours, "samples_per_s": self.samples_per_s}
        return {**asdict(self), **derived, "total_bytes": self.memory.total}

    def lines(self) -> list[str]:
        """The plan in words and numbers."""
        sizes = ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in self.parameters.items())
        at_once = f"{self.batch_size} at once" + (f" x {self.accumulation}" if self.accumulation > 1 else "")
        rates = ", ".join(f"{kind} {_rate(kind, value)}" for kind, value in self.rates.items())
        gigaflops, time_taken = self.flops_per_sample / 1e9, _time(self.hours * 3600)
        return [
            f"{self.width}x{self.height} pixels, {at_once}, on {self.device}",
            f"parameters: {sizes}",
            f"memory: {_bytes(self.memory.total)} when {self.memory.phase}, within about 15 %",
            *(f"  {name:<34} {_bytes(part):>9}" for name, part in self.memory.parts.items() if part),
            *(f"  when {name}: {_bytes(total)}" for name, total in self.memory.phases.items()),
            *self._verdict(),
            f"work: {gigaflops:,.0f} GFLOP per pair and step" + (f"; measured: {rates}" if rates else ""),
            f"speed: {1 / self.step_s:.3g} steps/s, {self.samples_per_s:.3g} pairs/s: {time_taken}"
            f" for {self.steps} steps, samples and scores not counted; a guess within about a third",
            *(
                []
                if self.encoding_s is None
                else [f"before that: {_time(self.encoding_s)} to encode the data"]
            ),
        ]

    def _verdict(self) -> list[str]:
        if self.free is None:
            return ["how much memory is free cannot be known here"]
        spare = self.resident + self.free
        if self.comfortable:
            return [f"it fits: {_bytes(spare)} can be used"]
        if self.fits:
            return [f"it may just fit, or not: {_bytes(spare)} can be used", *self._others()]
        return [f"it does not fit: {_bytes(spare)} can be used", *self._others()]

    def _others(self) -> list[str]:
        return [
            f"  with {other.setting}: {_bytes(other.total)}, {'fits' if other.fits else 'does not fit'}"
            for other in self.alternatives
        ]


def plan(
    recipe: ControlNetRecipe,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    device: str = "cpu",
    pictures: int | None = None,
    processes: int = 1,
) -> Plan:
    """Predict what a training needs. No weights are read; of a base on the hub only configurations are
    fetched.

    ``sizes``: width and height in pixels of the pictures that are trained on, one for each bucket; none: a
    square of the recipe's or the base's resolution. The largest decides the memory, their mean the speed.
    ``pictures``: how many views have to be encoded first, if anyone knows. ``processes``: of the whole run.

    Raises ValueError, one line, for a base that is not there or not known.
    """
    check_precision(recipe, torch.device(device))
    imported = imported_bytes()  # before anything is built
    networks = build(recipe)
    side = recipe.data.resolution or networks.resolution
    chosen = list(sizes) or [(side, side)]
    largest = max(chosen, key=lambda size: size[0] * size[1])
    area = sum(w * h for w, h in chosen) / len(chosen) / (largest[0] * largest[1])
    step = simulate_step(networks, recipe, width=largest[0], height=largest[1])
    place = Place(device, imported, processes, *largest, pictures)
    speed = measure_speed(step, device)
    micro_s = (speed.total_s + _reward_seconds(networks, recipe, place)) * area
    result = Plan(
        device=device,
        width=largest[0],
        height=largest[1],
        batch_size=recipe.batch_size,
        accumulation=recipe.accumulation,
        parameters=_parameters(networks),
        flops_per_sample=sum(step.flops().values()) // recipe.batch_size,
        memory=count_memory(networks, recipe, step, place),
        resident=(resident_memory() or 0) if device == "cpu" else 0,
        free=available_memory(device),
        step_s=_step_seconds(networks, recipe, micro_s, device),
        steps=recipe.steps,
        encoding_s=_encoding_seconds(networks, recipe, speed, place, area, pictures),
        rates=speed.rates,
    )
    if result.comfortable is False:
        return replace(result, alternatives=_alternatives(recipe, place, result))
    return result


def batch_need(
    recipe: ControlNetRecipe, *, size: tuple[int, int], device: str = "cpu"
) -> Callable[[int], int]:
    """Predicted bytes beyond those that this process holds, as a function of the batch size.

    What `try_batches` takes as ``need``: it is reckoned from batches of one and two, since all that depends
    on the batch grows with it in proportion.
    """
    imported = imported_bytes()
    totals = []
    for batch_size in (1, 2):
        changed = recipe.model_copy(update={"batch_size": batch_size})
        totals.append(_total(changed, Place(device, imported, 1, *size)))
    held = (resident_memory() or 0) if device == "cpu" else 0
    one, two = totals
    return lambda batch_size: one + (batch_size - 1) * (two - one) - held


def _total(recipe: ControlNetRecipe, place: Place) -> int:
    networks = build(recipe)
    step = simulate_step(networks, recipe, width=place.width, height=place.height)
    return count_memory(networks, recipe, step, place).total


def _alternatives(recipe: ControlNetRecipe, place: Place, result: Plan) -> list[Alternative]:
    """Settings that need less, in the order in which they cost least; each alone, at last all together."""
    changes: list[dict[str, Any]] = []
    if not recipe.gradient_checkpointing:
        changes.append({"gradient_checkpointing": True})
    if recipe.batch_size > 1:
        smaller = max(k for k in range(1, recipe.batch_size // 2 + 1) if recipe.batch_size % k == 0)
        changes.append(
            {"batch_size": smaller, "accumulation": recipe.accumulation * recipe.batch_size // smaller}
        )
    if recipe.precision == "fp32":
        changes.append({"precision": "bf16"})
    if recipe.optimizer not in ("adamw8bit", "adafactor"):
        changes.append({"optimizer": "adamw8bit"})
    if len(changes) > 1:
        changes.append({key: value for change in changes for key, value in change.items()})
    found = []
    for change in changes:
        total = _total(recipe.model_copy(update=change), place)
        setting = " ".join(f"{key}={str(value).lower()}" for key, value in change.items())
        found.append(Alternative(setting, total, bool(result._within(USABLE, total))))
    return found


def _parameters(networks: Networks) -> dict[str, int]:
    modules = {"U-Net": networks.unet, "ControlNet": networks.controlnet, "autoencoder": networks.vae}
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()}
    return {**counts, "text encoders": networks.text_parameters, "trained": _trained_count(networks)}


def _trained_count(networks: Networks) -> int:
    modules = (networks.unet, networks.controlnet)
    return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)


def _step_seconds(networks: Networks, recipe: ControlNetRecipe, micro_s: float, device: str) -> float:
    """Seconds of a step: its micro-batches, then the update, which only memory holds up."""
    moved = _OPTIMIZER_MOVES[recipe.optimizer] + (_AVERAGE_MOVES if recipe.ema else 0)
    update_s = moved * _trained_count(networks) / bandwidth(device)
    return micro_s * recipe.accumulation + update_s


def _reward_seconds(networks: Networks, recipe: ControlNetRecipe, place: Place) -> float:
    """Seconds of a micro-batch's reward, at evenly drawn noise levels; a depth model's share is left out."""
    if not recipe.reward:
        return 0.0
    decoded = simulate_reward(networks, width=place.width, height=place.height)
    return recipe.batch_size * recipe.reward_below * measure_speed(decoded, place.device).total_s


def _encoding_seconds(
    networks: Networks,
    recipe: ControlNetRecipe,
    speed: Speed,
    place: Place,
    area: float,
    pictures: int | None,
) -> float | None:
    """Seconds to encode so many views, and a caption for each, ahead."""
    if pictures is None or not recipe.data.cache:
        return None
    size = {"width": place.width, "height": place.height}
    encoded = simulate_encoding(networks, **size, batch_size=place.encoded_at_once)
    per_picture = measure_speed(encoded, place.device).total_s * area / place.encoded_at_once
    return pictures * (per_picture + networks.text_flops / speed.rates["matmul"]) / place.processes


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _rate(kind: str, value: float) -> str:
    return f"{value / 1e9:,.0f} {'GB/s' if kind == 'pointwise' else 'GFLOP/s'}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Schedulers by name: diffusers' classes on the base's own noise schedule, and the noise that they inject."""

from __future__ import annotations

import contextlib
import inspect
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from controlkit import limits, naming

if TYPE_CHECKING:
    from controlkit.base import Base

NO_SIGNAL = 1e-6
"""ᾱ of a step that shows nothing but noise."""
PURE_NOISE = (
    "the base {base} predicts the noise, and its schedule ends in nothing else (rescale_betas_zero_snr): at"
    " that step no picture can be told, and what starts there may fail"
)
_PLAIN: Mapping[str, Any] = {f"use_{spacing}_sigmas": False for spacing in ("karras", "exponential", "beta")}
"""Noise levels are spaced in another way only where the name says so, whatever a base's file does."""
_DPM: Mapping[str, Any] = {**_PLAIN, "use_lu_lambdas": False, "solver_order": 2}
_UNIPC: Mapping[str, Any] = {  # diffusers' own; with others of a base's file some end in NaN
    **_PLAIN,
    "predict_x0": True,
    "solver_type": "bh2",
    "solver_order": 2,
    "lower_order_final": True,
}
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {  # our name -> (diffusers' class, what it is set to)
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {**_PLAIN}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {**_DPM, "algorithm_type": "dpmsolver++"}),
    "dpm++-karras": (
        "DPMSolverMultistepScheduler",
        {**_DPM, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {**_DPM, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {**_UNIPC}),
    "heun": ("HeunDiscreteScheduler", {**_PLAIN, "clip_sample": False}),
    "lms": ("LMSDiscreteScheduler", {**_PLAIN}),
    "lcm": ("LCMScheduler", {"clip_sample": False}),
    "tcd": ("TCDScheduler", {"clip_sample": False}),
}
NOT_OF_PICTURES = ("pndm", "euler-a")
"""Those whose diffusers' class takes no prediction of the picture itself ("sample")."""
_drawing = threading.Lock()  # guards the module-wide function through which diffusers' schedulers draw


@dataclass(frozen=True, eq=False)
class Schedule:
    """A scheduler that is set to a number of steps, and its timesteps from the noisiest on.

    timesteps: (n,) on the CPU, where schedulers look things up without waiting for a device. n is more than
    the steps asked for where the scheduler evaluates twice. first: how many it leaves out at the beginning,
    for a generation that starts from a picture.
    """

    scheduler: Any
    timesteps: Tensor
    first: int = 0

    @property
    def steps(self) -> int:
        """How many steps will be taken."""
        return len(self.timesteps)

    def add_noise(self, latents: Tensor, noise: Tensor, step: int) -> Tensor:
        """Latents as noisy as before step `step` (from 0); as they are, behind the last one."""
        if step >= len(self.timesteps):
            return latents
        return self.scheduler.add_noise(latents, noise, self.timesteps[step : step + 1])


def make_scheduler(name: str, base: Base) -> Any:
    """The named diffusers scheduler, built from the base's own schedule.

    name: one of `SCHEDULERS`. Latents are not pixels, so clipping to [-1, 1] is off whatever the base's
    file says, as in diffusers' pipelines. What a name says of the solver and of the spacing of noise levels
    holds, too, whatever that file says; all else is the base's. Raises ValueError for an unknown name, for
    one that does not take what the base predicts, or for lms without scipy.
    """
    if name not in SCHEDULERS:
        raise naming.unknown("scheduler", name, SCHEDULERS)
    if base.prediction_type == "sample" and name in NOT_OF_PICTURES:
        able = ", ".join(other for other in SCHEDULERS if other not in NOT_OF_PICTURES)
        raise ValueError(
            f"the base {base.name} predicts the picture itself (sample), which scheduler {name!r} does not"
            f" take: take one of {able}"
        )
    import diffusers
    from diffusers.utils import is_scipy_available

    if name == "lms" and not is_scipy_available():
        raise ValueError("scheduler 'lms' integrates with scipy, which is not installed: pip install scipy")
    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(base.scheduler_config, **settings)


def doubts(name: str, base: Base) -> Iterator[str]:
    """What does not go well together of a scheduler and a base's own schedule, a line each."""
    if float(base.alphas_cumprod[-1]) > NO_SIGNAL:
        return
    if base.prediction_type == "epsilon":
        yield PURE_NOISE.format(base=base.name)
    if float(make_scheduler(name, base).alphas_cumprod[-1]) > NO_SIGNAL:
        yield (
            f"the base {base.name} was trained down to pure noise, and diffusers' {name} does not start there"
            " (rescale_betas_zero_snr): very bright and very dark pictures come out grey; ddim and euler do"
        )


def make_schedule(name: str, base: Base, *, steps: int, strength: float = 1.0) -> Schedule:
    """The named scheduler set to `steps`, or to the last `strength` of them, rounded down, at least one.

    A part of the steps is what diffusers' pipelines take that start from a picture. Raises ValueError where
    the scheduler's spacing runs past the trained timesteps, or takes one of them twice, and for steps or a
    strength outside their ranges.
    """
    limits.check_steps(steps)
    limits.check_strength(strength)
    scheduler = make_scheduler(name, base)
    most = scheduler.config.get("original_inference_steps")  # of lcm and tcd: those of the distillation
    if most is not None and steps > most:
        raise ValueError(f"scheduler {name!r} takes at most {most} steps, not {steps}")
    try:
        scheduler.set_timesteps(steps, device="cpu")
    except (ValueError, IndexError) as error:  # limits of its own
        raise ValueError(f"scheduler {name!r} does not take {steps} steps: {_first_line(error)}") from error
    trained = scheduler.config.num_train_timesteps
    too_far = float(scheduler.timesteps.max()) > trained - 1  # "leading" spacing plus an offset of 1
    if too_far or _stands_still(scheduler):
        raise ValueError(f"{steps} steps do not fit into the base's {trained} timesteps: take fewer")
    taken = max(min(int(steps * strength), steps), 1)
    first = (steps - taken) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):  # else it looks the first timestep up, which may be there twice
        scheduler.set_begin_index(first)
    return Schedule(scheduler, scheduler.timesteps[first:], first)


def _stands_still(scheduler: Any) -> bool:
    """Whether two steps have one noise level, by whose distance solvers with a memory divide.

    The last one may be the end's; heun has each twice, and takes both into account.
    """
    levels = getattr(scheduler, "sigmas", None)
    return levels is not None and scheduler.order == 1 and bool((levels[1:-1] == levels[:-2]).any())


def step_options(
    scheduler: Any, *, temperature: float | None, generators: Sequence[torch.Generator] | None
) -> dict[str, Any]:
    """The keyword arguments that this scheduler's step understands, as in diffusers' pipelines."""
    understood = inspect.signature(scheduler.step).parameters
    offered = {
        "eta": (temperature or 0.0) if _has_eta(scheduler) else None,
        "generator": None if generators is None else list(generators),
    }
    return {name: value for name, value in offered.items() if name in understood and value is not None}


def _has_eta(scheduler: Any) -> bool:
    """Whether its step has a parameter of its own for how much noise it injects."""
    return type(scheduler).__name__ in ("DDIMScheduler", "TCDScheduler")


@contextlib.contextmanager
def scaled_noise(scheduler: Any, temperature: float | None) -> Iterator[None]:
    """Within the block what the scheduler draws is multiplied by `temperature`; None leaves it.

    DDIM and TCD are told their eta instead (`step_options`). The draws themselves stay the same, so that a
    seed is the same picture's at every temperature. One thread is in such a block at a time.
    """
    module = sys.modules[type(scheduler).__module__]
    with _drawing:
        drawn = getattr(module, "randn_tensor", None)
        if temperature in (None, 1) or drawn is None or _has_eta(scheduler):
            yield
            return

        def scaled(*args: Any, **kwargs: Any) -> Tensor:
            noise: Tensor = drawn(*args, **kwargs)
            return noise * temperature

        module.randn_tensor = scaled  # type: ignore[attr-defined]
        try:
            yield
        finally:
            module.randn_tensor = drawn  # type: ignore[attr-defined]


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0]

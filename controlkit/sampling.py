"""From noise and a prompt to pictures: the denoising loop.

One step, in the words of the papers (classifier-free guidance: Ho & Salimans 2022, arXiv:2207.12598):

    eps_u, eps_c  =  pair(x_t, t, [negative prompt, prompt], maps)
    eps           =  eps_u + guidance * (eps_c - eps_u)
    x_{t-1}       =  scheduler(eps, t, x_t)

The schedulers are diffusers' classes, and the result equals its ControlNet pipelines'
(tests/test_sampling.py). Done once instead of in every step: the hint encoder. Not done at all: a control
outside its window.

Every picture's noise comes from its own generator on the CPU, in float32, so that a seed means the same
noise on every device, alone or in a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from controlkit import images, limits, naming
from controlkit.adapters import check_fits
from controlkit.base import Conditioning
from controlkit.control import Control, EncodedControl, encode_controls, summed_residuals
from controlkit.controlnet import predict

if TYPE_CHECKING:
    from controlkit.base import Base

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {  # our name -> (diffusers' class, what it is set to)
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}
GUIDANCE = {"tiny": 2.0, "sd1": 7.5, "sd2": 7.5, "sdxl": 5.0}  # by bundled name or family
DEVICE_BATCH = 4  # pictures at once on a GPU: each one more needs more memory
AREA_FACTOR = 2.0  # a map whose area is within this factor of the base's native area keeps its size

Callback = Callable[[int, int, torch.Tensor], None]
"""Called after every step with the steps done, the steps in all, and the latents (B, C, h, w)."""


def make_scheduler(name: str, base: Base) -> Any:
    """The named diffusers scheduler, built from the base's own schedule.

    name: one of `SCHEDULERS`. Latents are not pixels, so clipping to [-1, 1] is off whatever the base's
    file says, as in diffusers' pipelines. Raises ValueError for an unknown name, or for lms without scipy.
    """
    if name not in SCHEDULERS:
        raise naming.unknown("scheduler", name, SCHEDULERS)
    import diffusers
    from diffusers.utils import is_scipy_available

    if name == "lms" and not is_scipy_available():
        raise ValueError("scheduler 'lms' integrates with scipy, which is not installed: pip install scipy")
    class_name, settings = SCHEDULERS[name]
    return getattr(diffusers, class_name).from_config(base.scheduler_config, **settings)


def default_guidance(base: Base) -> float:
    """The guidance scale that is used when none is given: the usual one of the base's family."""
    return GUIDANCE.get(base.name, GUIDANCE[base.family])


def picture_size(
    base: Base, map_size: tuple[int, int] | None, width: int | None = None, height: int | None = None
) -> tuple[int, int]:
    """Width and height to generate, in pixels.

    map_size: width and height of the first map, None without one. A given width or height is kept, and one
    that is given alone brings the other in the map's shape, to a multiple of 8. With neither given the map
    decides: its own size, to multiples of 8, when its area is within a factor of 2 of the base's native area,
    else its shape at the native area, to multiples of the U-Net's coarsest cell (64 pixels). Never a side
    outside `limits.SIZE_RANGE`, however thin the map is. Without a map the picture is the native square.
    Raises ValueError for a given side that is no multiple of 8.
    """
    limits.check_size(width, height)
    if map_size and width and not height:
        return width, _allowed_side(width * map_size[1] / map_size[0], base.vae_factor)
    if map_size and height and not width:
        return _allowed_side(height * map_size[0] / map_size[1], base.vae_factor), height
    native = base.resolution
    map_width, map_height = map_size or (native, native)
    ratio = (native * native / (map_width * map_height)) ** 0.5  # factor to the native area, per side
    if 1 / AREA_FACTOR <= ratio * ratio <= AREA_FACTOR:
        ratio, cell = 1.0, base.vae_factor
    else:
        cell = base.vae_factor * 2 ** (len(base.unet.config.block_out_channels) - 1)
    free_width, free_height = (_allowed_side(side * ratio, cell) for side in (map_width, map_height))
    return width or free_width, height or free_height


def _allowed_side(side: float, cell: int) -> int:
    """The multiple of `cell` nearest to a side, in pixels, within what is allowed."""
    low, high = limits.SIZE_RANGE
    return min(max(round(side / cell) * cell, cell, low), high)


@torch.no_grad()
def generate(
    base: Base,
    prompt: str,
    *,
    negative_prompt: str = "",
    controls: Sequence[Control] = (),
    steps: int = 20,
    guidance: float | None = None,
    scheduler: str = "ddim",
    seeds: Sequence[int] = (0,),
    height: int | None = None,
    width: int | None = None,
    eta: float = 0.0,
    callback: Callback | None = None,
    finished: Callable[[int, np.ndarray], None] | None = None,
    batch_size: int | None = None,
) -> list[np.ndarray]:
    """Pictures of a prompt that follow the controls' maps, one per seed: uint8 (height, width, 3) RGB each.

    controls: their residuals are summed. The first map decides the size where none is given (`picture_size`).
    steps: 1 to 1000. guidance: 0 to 100; at 1 or below the negative prompt is not used; None is the family's
    usual value. scheduler: one of `SCHEDULERS`. eta: 0 to 1, DDIM's share of fresh noise.
    height, width: multiples of 8.
    callback: see `Callback`; steps are counted over all pictures. finished: called with the index and the
    pixels of each picture as soon as it is made, so that an interruption loses only what is unfinished.
    batch_size: pictures denoised at once, by default one on the CPU and up to four elsewhere. On the CPU
    one at a time makes picture k of several equal, bit for bit, picture k alone; batched kernels round
    differently.

    Raises ValueError for a number outside its range, a control of another family, or latents that stop
    being finite.
    """
    guidance = default_guidance(base) if guidance is None else guidance
    _check_request(base, controls, steps=steps, guidance=guidance, seeds=seeds, eta=eta)
    width, height = picture_size(base, controls[0].size if controls else None, width, height)
    text = encode_text(base, prompt, negative_prompt, guidance=guidance)
    encoded = encode_controls(controls, width=width, height=height, pictures=len(seeds))
    batch_size = batch_size or (1 if base.device.type == "cpu" else DEVICE_BATCH)

    pictures: list[np.ndarray] = []
    for first in range(0, len(seeds), batch_size):
        chunk = seeds[first : first + batch_size]
        generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in chunk]
        last = first + len(generators)
        latents = denoise(
            base,
            text,
            draw_noise(base, generators, width=width, height=height),
            controls=[control.rows(first, last) for control in encoded],
            scheduler=make_scheduler(scheduler, base),
            steps=steps,
            guidance=guidance,
            eta=eta,
            generators=generators,
            callback=_counting(callback, batch=first // batch_size, batches=-(-len(seeds) // batch_size)),
        )
        for picture in images.tensor_to_pictures(base.decode_latents(latents)):
            pictures.append(picture)
            if finished is not None:
                finished(len(pictures) - 1, picture)
    return pictures


def draw_noise(base: Base, generators: Sequence[torch.Generator], *, width: int, height: int) -> torch.Tensor:
    """Unit Gaussian noise: float32 (B, C, height/8, width/8) on the base's device, one CPU generator each."""
    shape = (1, base.unet.config.in_channels, height // base.vae_factor, width // base.vae_factor)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    return torch.cat(noise).to(base.device)


def encode_text(base: Base, prompt: str, negative_prompt: str, *, guidance: float) -> Conditioning:
    """The text as `denoise` takes it: rows [negative prompt, prompt], or only the prompt when guidance <= 1.

    An SDXL takes an absent negative prompt as zeros, where it was trained so, not as the encoding of "".
    """
    if guidance <= 1:
        return base.encode_prompts([prompt])
    text = base.encode_prompts([negative_prompt, prompt])
    if base.family != "sdxl" or negative_prompt or not base.zeros_for_empty_negative:
        return text
    assert text.pooled is not None, "SDXL's text encoders give a pooled vector"
    keep = torch.tensor([0.0, 1.0], device=text.pooled.device, dtype=text.pooled.dtype)[:, None]
    return Conditioning(text.encoder_hidden_states * keep[..., None], text.pooled * keep)


def denoise(
    base: Base,
    text: Conditioning,
    noise: torch.Tensor,
    *,
    controls: Sequence[EncodedControl] = (),
    scheduler: Any,
    steps: int,
    guidance: float,
    eta: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callback | None = None,
) -> torch.Tensor:
    """The latents of B pictures: float32 (B, C, h, w), from unit Gaussian noise of that shape.

    text: what `encode_text` made with the same guidance, one row or two, shared by all pictures.
    controls: with the hint encoder's output already computed (`control.encode_controls`).
    scheduler: fresh from `make_scheduler`; it is set to `steps` and keeps its state.
    generators: one per picture, for schedulers that add noise. Latents stay in float32 between the steps
    whatever the networks' precision. Raises ValueError, naming the step, when they stop being finite.
    """
    pictures, _, h, w = noise.shape
    branches = len(text.encoder_hidden_states)
    encoder_hidden_states = text.encoder_hidden_states.repeat_interleave(pictures, dim=0)
    pooled = None if text.pooled is None else text.pooled.repeat_interleave(pictures, dim=0)
    added_cond = base.added_cond(pooled, height=h * base.vae_factor, width=w * base.vae_factor)

    _set_timesteps(scheduler, steps, device=noise.device)
    options = _step_options(scheduler, eta=eta, generators=generators)
    n = len(scheduler.timesteps)  # more than `steps` where the scheduler evaluates twice
    latents = noise * scheduler.init_noise_sigma
    health = _Health(n, noise.device)
    for i, t in enumerate(scheduler.timesteps):
        noisy_latents = scheduler.scale_model_input(torch.cat([latents] * branches), t).to(base.dtype)
        residuals = summed_residuals(
            controls,
            noisy_latents,
            t,
            encoder_hidden_states,
            step=i,
            steps=n,
            branches=branches,
            added_cond=added_cond,
        )
        model_pred = predict(
            base.unet, noisy_latents, t, encoder_hidden_states, residuals=residuals, added_cond=added_cond
        ).float()
        if branches == 2:
            uncond, cond = model_pred.chunk(2)
            model_pred = uncond + guidance * (cond - uncond)
        latents = scheduler.step(model_pred, t, latents, **options, return_dict=False)[0]
        health.check(latents)
        if callback is not None:
            callback(i + 1, n, latents)
    return latents


class _Health:
    """Finds the step at which latents stopped being finite, with one synchronisation per run on a GPU."""

    def __init__(self, steps: int, device: torch.device) -> None:
        self.steps = steps
        self.at_once = device.type == "cpu"
        self.finite: list[torch.Tensor] = []

    def check(self, latents: torch.Tensor) -> None:
        """Note one step; raise ValueError at once on the CPU, after the last step elsewhere."""
        self.finite.append(torch.isfinite(latents).all())
        if not self.at_once and len(self.finite) < self.steps:
            return
        finite = torch.stack(self.finite).tolist()
        if not all(finite):
            raise ValueError(
                f"the latents stopped being finite at step {finite.index(False) + 1} of {self.steps}: "
                "a control scale or guidance that is too large, damaged weights, or float16 overflow"
            )


def _check_request(
    base: Base,
    controls: Sequence[Control],
    *,
    steps: int,
    guidance: float,
    seeds: Sequence[int],
    eta: float,
) -> None:
    limits.check_steps(steps)
    limits.check_guidance(guidance)
    limits.check_seeds(seeds)
    limits.check_eta(eta)
    for control in controls:
        check_fits(control.controlnet, base)


def _set_timesteps(scheduler: Any, steps: int, *, device: torch.device) -> None:
    """Set the scheduler to `steps`; raise ValueError where its spacing runs past the trained timesteps."""
    scheduler.set_timesteps(steps, device=device)
    trained = scheduler.config.num_train_timesteps
    if float(scheduler.timesteps.max()) > trained - 1:  # "leading" spacing plus an offset of 1
        raise ValueError(f"{steps} steps do not fit into the base's {trained} timesteps: take fewer")


def _step_options(
    scheduler: Any, *, eta: float, generators: Sequence[torch.Generator] | None
) -> dict[str, Any]:
    """The keyword arguments that this scheduler's step understands, as in diffusers' pipelines."""
    understood = inspect.signature(scheduler.step).parameters
    offered = {"eta": eta, "generator": None if generators is None else list(generators)}
    return {name: value for name, value in offered.items() if name in understood}


def _counting(callback: Callback | None, *, batch: int, batches: int) -> Callback | None:
    """The callback with steps counted over all batches."""
    if callback is None:
        return None
    return lambda done, n, latents: callback(batch * n + done, batches * n, latents)

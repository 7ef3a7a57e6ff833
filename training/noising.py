"""What is drawn for each pair of a batch, and what the network is to make of it.

Every pair draws from a generator of its own visit, so that it sees the same noise whatever batch, process or
order it comes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from controlkit import diffusion
from controlkit.base import Base
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.draws import derived_seed
from controlkit.training.memory import put


def schedule(recipe: ControlNetRecipe, base: Base) -> Tensor:
    """ᾱ of every timestep: the base's, rescaled where the recipe asks for it.

    Raises ValueError where a base that predicts the noise is to have a last step of nothing else, and where
    a loss of the noise would have an infinite weight there.
    """
    alphas_cumprod = _schedule(recipe, base)
    objective = base.prediction_type if recipe.objective == "base" else recipe.objective
    if recipe.debiased and objective == "epsilon" and not alphas_cumprod.all():
        raise ValueError(
            "debiased weights a loss of the noise by 1 / sqrt(SNR), and the last step's SNR is 0: give"
            " objective=v_prediction or sample"
        )
    return alphas_cumprod


def _schedule(recipe: ControlNetRecipe, base: Base) -> Tensor:
    if not recipe.zero_terminal_snr:
        return base.alphas_cumprod
    if base.prediction_type == "epsilon":
        raise ValueError(
            f"zero_terminal_snr: the base {recipe.base!r} predicts the noise, which would be all it sees at"
            " the last step; it is for bases that predict v or the sample"
        )
    return diffusion.rescale_zero_terminal_snr(base.alphas_cumprod)


class Draw(NamedTuple):
    """One visit's choices: ``posterior``, ``noise``, ``perturbation`` (4, h, w), ``offset`` (4, 1, 1) and
    ``place`` (), uniform in [0, 1), float64; or those of several, with one more dimension in front.
    """

    posterior: Tensor
    noise: Tensor
    offset: Tensor
    perturbation: Tensor
    place: Tensor


class Noisy(NamedTuple):
    """A batch as the networks see it (B, 4, h, w), its timesteps (B,), and what it was made of."""

    noisy_latents: Tensor
    timesteps: Tensor
    latents: Tensor
    noise: Tensor


def draw(visit_seed: int, shape: Sequence[int], recipe: ControlNetRecipe) -> Draw:
    """A visit's choices for latents of a shape (4, h, w), float32 on the CPU."""
    generator = torch.Generator().manual_seed(derived_seed(visit_seed, "noise"))
    place = torch.rand((), generator=generator, dtype=torch.float64)
    posterior, noise = (torch.randn(tuple(shape), generator=generator) for _ in range(2))
    offset = torch.randn((shape[0], 1, 1), generator=generator)
    perturbation = torch.randn(tuple(shape), generator=generator)
    if levels := recipe.multires_noise_iterations:
        noise = diffusion.multires_noise(noise, levels, recipe.multires_noise_discount, generator)
    return Draw(posterior, noise, offset, perturbation, place)


def draw_batch(visit_seeds: Sequence[int], shape: Sequence[int], recipe: ControlNetRecipe) -> Draw:
    """The choices of several visits, stacked."""
    draws = [draw(seed, shape, recipe) for seed in visit_seeds]
    return Draw(*(torch.stack(column) for column in zip(*draws, strict=True)))


def used(drawn: Draw, recipe: ControlNetRecipe) -> dict[str, Tensor]:
    """Of what was drawn, by name, what makes noisy latents under a recipe."""
    found = {"posterior": drawn.posterior, "noise": drawn.noise}
    if recipe.noise_offset:
        found["offset"] = drawn.offset
    if recipe.input_perturbation:
        found["perturbation"] = drawn.perturbation
    return found


def drawn_of(found: Mapping[str, Tensor]) -> Draw:
    """What `used` gave, with noise in place of what is not used."""
    return Draw(*(found.get(name, found["noise"]) for name in Draw._fields))


def noised(
    mean: Tensor,
    std: Tensor,
    drawn: Draw,
    timesteps: Tensor,
    recipe: ControlNetRecipe,
    alphas_cumprod: Tensor,
) -> Noisy:
    """Noisy latents of a batch: DDPM's forward process (Ho et al. 2020, eq. 4), float32, on ``mean``'s
    device.

    ``mean``, ``std``: (B, 4, h, w), the moments of the scaled latents. ``timesteps``: (B,). Noise offset: N.
    Guttenberg 2023, "Diffusion with offset noise". Input perturbation: Ning et al. 2023, arXiv:2301.11706:
    the networks see more noise than they are to predict.
    """
    device = mean.device
    latents = mean.float() + std.float() * put(drawn.posterior, device)
    noise = put(drawn.noise, device)
    if recipe.noise_offset:
        noise = noise + recipe.noise_offset * put(drawn.offset, device)
    timesteps = put(timesteps, device)
    seen = noise
    if recipe.input_perturbation:
        seen = noise + recipe.input_perturbation * put(drawn.perturbation, device)
    return Noisy(diffusion.q_sample(latents, seen, timesteps, alphas_cumprod), timesteps, latents, noise)


def timesteps_of(places: Tensor, recipe: ControlNetRecipe, step: int, count: int) -> Tensor:
    """Timesteps (B,) out of ``count``, of uniform numbers ``places`` (B,) in [0, 1), float64, at a step.

    Over the first `layout_steps` a share of the pairs, all of them at first, is drawn where layout is
    decided.
    """
    settled = min(1.0, step / recipe.layout_steps) if recipe.layout_steps else 1.0
    within = (places / max(settled, 1e-9)).clamp(0, 1)
    usual = diffusion.place_timesteps(within, recipe.timesteps, num_train_timesteps=count)
    if settled == 1.0:
        return usual
    early = diffusion.place_timesteps(
        ((places - settled) / (1 - settled)).clamp(0, 1), "structure", num_train_timesteps=count
    )
    return torch.where(places < settled, usual, early)


def weighted_loss(
    model_pred: Tensor,
    noisy: Noisy,
    recipe: ControlNetRecipe,
    prediction_type: str,
    alphas_cumprod: Tensor,
    *,
    opaque: Tensor | None = None,
) -> Tensor:
    """Each pair's loss, (B,) float32: the mean square error of the objective, weighted.

    Where the objective is not what the base predicts, the prediction is turned into it at the same x_t
    (Salimans & Ho 2022, section 4). Weights: min-SNR, soft min-SNR, debiased estimation, of
    `controlkit.diffusion`. ``opaque``: (B, h, w) uint8, 255 where a square counts wholly; the mean is over
    all places, as kohya's masked loss takes it.
    """
    timesteps, latents, noise = noisy.timesteps, noisy.latents, noisy.noise
    objective = prediction_type if recipe.objective == "base" else recipe.objective
    pred = model_pred.float()
    if objective != prediction_type:
        x_0 = diffusion.predict_x0(prediction_type, pred, noisy.noisy_latents, timesteps, alphas_cumprod)
        eps = diffusion.predict_noise(prediction_type, pred, noisy.noisy_latents, timesteps, alphas_cumprod)
        pred = diffusion.target(objective, x_0, eps, timesteps, alphas_cumprod)
    target = diffusion.target(objective, latents, noise, timesteps, alphas_cumprod)
    squares = (pred - target).square()
    if opaque is not None:
        squares = squares * (opaque.unsqueeze(1).float() / 255)
    losses = squares.flatten(1).mean(dim=1)
    if recipe.min_snr_gamma or recipe.debiased:
        losses = losses * _weight(diffusion.snr(alphas_cumprod, timesteps), recipe, objective)
    return losses


def _weight(snr: Tensor, recipe: ControlNetRecipe, objective: str) -> Tensor:
    if recipe.debiased:
        return diffusion.debiased_weight(snr, objective)
    return diffusion.min_snr_weight(snr, recipe.min_snr_gamma, objective, soft=recipe.min_snr_soft)

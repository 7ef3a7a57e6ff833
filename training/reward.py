"""A reward for pictures that have the map they were given: ControlNet++, Li et al. 2024, arXiv:2404.07987.

Where a pair's noise is low, one step from the prediction leads to the clean latents (its eq. 8 and 9), which
are decoded; the picture's map is taken by differentiable means and compared with the one that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from controlkit import diffusion, latent_scale
from controlkit.base import BUNDLED, Base
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.made_maps import range_ends
from controlkit.training.noising import Noisy
from controlkit.training.soft_maps import depth_missed, edges_missed, soft_edges

Missed = Callable[[Tensor, Tensor], Tensor]
"""Pictures (B, 3, H, W) in [0, 1] and maps (B, H, W) in [0, 1] to how far they are apart, (B,): 0 is best."""


class Reward:
    """How much of its map each pair's picture misses; what the recipe's `reward` multiplies."""

    def __init__(self, recipe: ControlNetRecipe, base: Base, alphas_cumprod: Tensor) -> None:
        """Load what takes the map of a picture. Raises ValueError, one line, where that cannot be had."""
        self.recipe, self.base, self.alphas_cumprod = recipe, base, alphas_cumprod
        self.missed = map_missed(recipe, base)
        if recipe.gradient_checkpointing:
            base.vae.enable_gradient_checkpointing()

    def check(self, channels: int) -> None:
        """Raise ValueError where the data's maps are several, stacked into so many channels."""
        if channels > 3:
            raise ValueError(
                f"reward compares one map, and the data's have {channels} channels: set reward=0"
            )

    def rows(self, timesteps: Tensor, step: int) -> Tensor:
        """The numbers (n,) of the pairs that are looked at, at a step: those of low noise, once it begins."""
        limit = self.recipe.reward_below * len(self.alphas_cumprod)
        return ((timesteps < limit) & (step >= self.recipe.reward_from)).nonzero()[:, 0]

    def __call__(
        self, model_pred: Tensor, noisy: Noisy, controlnet_cond: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """The numbers (n,) of the pairs that are looked at, and what their pictures miss, (n,) with a
        graph.
        """
        rows = self.rows(noisy.timesteps, step)
        if not len(rows):
            return rows, noisy.latents.new_zeros(0)
        with torch.autocast(model_pred.device.type, enabled=False):  # fp16 is too narrow for some decoders
            x_0 = diffusion.predict_x0(
                self.base.prediction_type,
                model_pred[rows].to(noisy.latents.dtype),
                noisy.noisy_latents[rows],
                noisy.timesteps[rows],
                self.alphas_cumprod,
            )
            return rows, self.of_latents(x_0, controlnet_cond[rows])

    def of_latents(self, latents: Tensor, controlnet_cond: Tensor) -> Tensor:
        """What the pictures of scaled latents (B, 4, h, w) miss of maps (B, C, H, W) in [0, 1]: (B,).

        The gradient is taken at once and picture by picture, so that the graph of one decoding is all that
        is ever held in memory.
        """
        vae, wanted = self.base.vae, controlnet_cond.mean(dim=1)

        def one(row: Tensor, k: int) -> Tensor:
            decoded = vae.decode(latent_scale.unscaled(row.to(vae.dtype), vae)).sample
            return self.missed((decoded.clamp(-1, 1) + 1) / 2, wanted[k : k + 1].to(decoded.dtype))

        return _AtOnce.apply(latents, one)


def map_missed(recipe: ControlNetRecipe, base: Base) -> Missed:
    """The comparison for a recipe's kind of map.

    Canny's thresholds are those that the data's maps were made with (of ranges their middle, for what was
    drawn is not known later), and the usual ones for maps from files. Depth is estimated by the bundled
    model for the bundled base, else by what made the maps. Raises ValueError as `DepthNetwork` does.
    """
    options = recipe.data.options
    if recipe.map == "depth":
        return _depth(_depth_model(recipe), str(base.device))
    from controlkit.preprocessors.canny import HIGH, LOW

    usual = {"low": LOW, "high": HIGH}
    low, high = (_middle(name, options.get(name, usual[name])) for name in usual)

    def missed(pictures: Tensor, wanted: Tensor) -> Tensor:
        return edges_missed(soft_edges(pictures, low=low, high=high), wanted[:, 1:-1, 1:-1])

    return missed


def _depth(name: str, device: str) -> Missed:
    from controlkit.preprocessors.depthnet import DepthNetwork

    network = DepthNetwork(name, device=device, precision="fp32")
    if network.pads:
        raise ValueError(f"reward cannot follow the depth model {name!r}, which pads its pictures; others do")
    return lambda pictures, wanted: depth_missed(network.differentiable(pictures).to(wanted.dtype), wanted)


def _depth_model(recipe: ControlNetRecipe) -> str:
    from controlkit.preprocessors.depthnet import USUAL
    from controlkit.preprocessors.weights import BUNDLED as BUNDLED_MODEL

    return BUNDLED_MODEL if recipe.base in BUNDLED else str(recipe.data.options.get("model", USUAL))


def _middle(name: str, threshold: Any) -> float:
    ends = range_ends(threshold) or (threshold, threshold)
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in ends):
        raise ValueError(
            f"data.options.{name} is {threshold!r}; a threshold is a number or a range (50..150)"
        )
    return sum(ends) / 2


class _AtOnce(torch.autograd.Function):
    """A value for each row, (B,), whose gradient is taken in the forward pass, one row after another.

    Checkpointing would bound the memory as well, and compute every forward pass twice.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, value_of: Callable[[Tensor, int], Tensor]) -> Tensor:
        values, gradients = [], []
        for k in range(len(rows)):
            with torch.enable_grad():
                row = rows[k : k + 1].detach().requires_grad_()
                value = value_of(row, k)
                gradients.append(torch.autograd.grad(value.sum(), row)[0])
            values.append(value.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(values).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return grad_output[:, None, None, None] * gradients, None

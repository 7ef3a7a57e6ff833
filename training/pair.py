"""The locked U-Net and its trainable copy as one module, and the micro-batches that it sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from controlkit.controlnet import Residuals, control_residuals, encode_hint, predict
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Outline

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel


@dataclass(frozen=True)
class PairsPart:
    """A micro-batch: its samples, prepared or in outline, and where each stands in the step's whole batch."""

    samples: Sequence[Outline]
    rows: range
    step: int
    batch: int
    """Pairs of the whole step, over all processes."""

    def __len__(self) -> int:
        return len(self.samples)

    def halves(self) -> Sequence[PairsPart]:
        """The first and the second half; one pair cannot be halved."""
        if len(self.samples) == 1:
            return [self]
        middle = (len(self.samples) + 1) // 2
        return [
            PairsPart(self.samples[part], self.rows[part], self.step, self.batch)
            for part in (slice(None, middle), slice(middle, None))
        ]

    def describe(self) -> str:
        """The pairs' names."""
        return ", ".join(sample.example.name for sample in self.samples)


class Pair(nn.Module):
    """The locked U-Net and its trainable copy as one module, which processes share and compilers see."""

    def __init__(
        self, controlnet: ControlNetModel, unet: UNet2DConditionModel, recipe: ControlNetRecipe
    ) -> None:
        super().__init__()
        self.controlnet, self.unet = controlnet, unet
        self.sd_locked, self.only_mid_control = recipe.sd_locked, recipe.only_mid_control

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        added_cond: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """``model_pred`` (B, 4, h, w), in the U-Net's precision: see `controlkit.controlnet`."""
        copy, base = self.controlnet.dtype, self.unet.dtype
        hint = encode_hint(self.controlnet, controlnet_cond)
        residuals = control_residuals(
            self.controlnet,
            noisy_latents.to(copy),
            timesteps,
            encoder_hidden_states.to(copy),
            hint,
            added_cond=in_precision(added_cond, copy),
        )
        return predict(
            self.unet,
            noisy_latents.to(base),
            timesteps,
            encoder_hidden_states.to(base),
            residuals=Residuals(tuple(r.to(base) for r in residuals.down), residuals.mid.to(base)),
            added_cond=in_precision(added_cond, base),
            sd_locked=self.sd_locked,
            only_mid_control=self.only_mid_control,
        )


def in_precision(added_cond: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """SDXL's further conditioning in a network's precision; None for the other families."""
    return None if added_cond is None else {key: tensor.to(dtype) for key, tensor in added_cond.items()}

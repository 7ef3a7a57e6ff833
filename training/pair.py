"""The locked U-Net and its trainable copy as one module, and the micro-batches that it sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from controlkit.kinds import encode_hint, predict_pair
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Outline

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


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

    def __init__(self, controlnet: Any, unet: UNet2DConditionModel, recipe: ControlNetRecipe) -> None:
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
        return predict_pair(
            self.controlnet,
            self.unet,
            noisy_latents,
            timesteps,
            encoder_hidden_states,
            encode_hint(self.controlnet, controlnet_cond),
            added_cond=added_cond,
            sd_locked=self.sd_locked,
            only_mid_control=self.only_mid_control,
        )

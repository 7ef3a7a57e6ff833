"""The light network: one small encoder of the map, added once to the locked U-Net, in its units.

In the manner of ControlNeXt (Peng et al. 2024, arXiv:2408.06070): no copy of the base, and no zero
convolutions behind one. There, the map's features are brought to the mean and the spread of the U-Net's
before they are added ("cross normalization", section 3.3). Here they are brought to mean 0 and spread 1 once
for a picture, and multiplied by the spread of what they are added to in each step
(`controlnet.Residuals.first`); how much of each channel enters depends on the noise level, and is zero before
training, so that an untrained network leaves the base as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from diffusers import ConfigMixin, ModelMixin  # noqa: TID253
from diffusers.configuration_utils import register_to_config  # noqa: TID253
from diffusers.models.embeddings import TimestepEmbedding, Timesteps  # noqa: TID253
from torch import Tensor, nn

from controlkit.controlnet import Residuals, check_hint_size

WIDTHS = (32, 64, 128, 256)
"""Channels at the map's full size and after each of three halvings."""


class LightControl(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The network itself; `encode` once for a map, `residuals` once for a step.

    conditioning_channels: of the map. block_out_channels: the U-Net's, of which the first counts. widths: of
    the encoder. layers: residual blocks at the latents' size. family: of the U-Net. It sees no text.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        conditioning_channels: int = 3,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        widths: Sequence[int] = WIDTHS,
        layers: int = 4,
        family: str = "",
    ) -> None:
        super().__init__()
        first = block_out_channels[0]
        steps: list[nn.Module] = [nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)]
        for narrow, wide in itertools.pairwise(widths):
            steps += [_Residual(narrow), nn.Conv2d(narrow, wide, 3, padding=1, stride=2)]
        steps += [_Residual(widths[-1]) for _ in range(layers)]
        steps += [nn.SiLU(), nn.Conv2d(widths[-1], first, 3, padding=1)]
        self.encoder = nn.Sequential(*steps)
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, first)
        nn.init.zeros_(self.time_embedding.linear_2.weight)
        nn.init.zeros_(self.time_embedding.linear_2.bias)

    def encode(self, controlnet_cond: Tensor) -> Tensor:
        """(B, C, 8h, 8w) in [0, 1] to (B, C_0, h, w), every picture at mean 0 and spread 1."""
        x = self.encoder(controlnet_cond * 2 - 1)
        axes = (1, 2, 3)
        return (x - x.mean(axes, keepdim=True)) / (x.std(axes, keepdim=True) + 1e-6)

    def residuals(self, noisy_latents: Tensor, timesteps: Tensor, hint: Tensor) -> Residuals:
        """What is added behind the U-Net's first convolution, in units of the spread that it has there."""
        check_hint_size(hint, noisy_latents)
        timesteps = timesteps.to(hint.device).reshape(-1).expand(len(noisy_latents))
        share = self.time_embedding(self.time_proj(timesteps).to(hint.dtype))
        return Residuals(first=hint * share[:, :, None, None])

    def forward(self, *_: Any) -> None:
        """There is none: see `encode` and `residuals`."""
        raise AssertionError("a light network runs in parts: encode, residuals")


class _Residual(nn.Module):
    """x + conv(SiLU(conv(SiLU(norm(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(min(8, channels), channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        h = self.conv1(nn.functional.silu(self.norm(x)))
        out: Tensor = x + self.conv2(nn.functional.silu(h))
        return out


def from_base(base_or_unet: Any, *, conditioning_channels: int = 3, seed: int | None = None) -> LightControl:
    """An untrained light network for a base, float32, on its device."""
    from controlkit.controlnet import seeded, to_train
    from controlkit.families import family_of

    unet = getattr(base_or_unet, "unet", base_or_unet)
    with seeded(seed):
        network = LightControl(
            conditioning_channels, list(unet.config.block_out_channels), family=family_of(unet.config)
        )
    return to_train(network, unet)

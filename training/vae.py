"""Training the bundled autoencoder: pictures to 8 times smaller latents of 4 channels, and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import images
from controlkit.folders import load_part
from controlkit.training.config import VaeRecipe
from controlkit.training.draws import Draws
from controlkit.training.task import DrawnTask
from controlkit.training.world import World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_SHOWN = 8


class VaeTask(DrawnTask):
    """AutoencoderKL on the bundled world: L1 and L2 on pixels, L1 on neighbour differences, a little KL."""

    def __init__(self, recipe: VaeRecipe, world: World, validation: World, device: torch.device) -> None:
        self.recipe, self.world, self.device = recipe, world, device
        self.shown = [validation.picture[i] for i in range(_SHOWN)]
        self.vae = _build(recipe).to(device)
        if recipe.train == "decoder":
            self.vae.encoder.requires_grad_(False)
            self.vae.quant_conv.requires_grad_(False)

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": cast(nn.Module, self.vae)}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [p for p in self.vae.parameters() if p.requires_grad], "rate": 1.0}]

    def loss(self, draws: Draws) -> Tensor:
        indices = draws.indices(len(self.world), self.recipe.batch_size)
        pictures = [self._cut(i, draws) for i in indices]
        pixel_values = images.picture_to_tensor(pictures).to(self.device)
        if self.recipe.train == "decoder":
            with torch.no_grad():
                latents = self.vae.encode(pixel_values).latent_dist.mean.float()
            noise = draws.normal(*latents.shape).to(self.device)
            reconstruction = self.vae.decode(latents + self.recipe.latent_noise * noise).sample.float()
            return self._reconstruction_loss(reconstruction, pixel_values)
        posterior = self.vae.encode(pixel_values).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = draws.normal(*mean.shape).to(self.device)
        reconstruction = self.vae.decode(mean + (0.5 * logvar).exp() * noise).sample.float()
        # KL(N(mean, var) || N(0, 1)) per latent element: Kingma & Welling 2013, appendix B
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return self._reconstruction_loss(reconstruction, pixel_values) + self.recipe.kl_weight * kl

    def _cut(self, index: int, draws: Draws) -> NDArray[np.uint8]:
        """A scene's picture, or a square of it on the grid of latents: three times in four around the
        figure.
        """
        picture, side = self.world.picture[index], self.recipe.crop
        if not side:
            return picture
        height, width = picture.shape[:2]
        rows, columns = np.nonzero(self.world.figure[index])
        at = draws.numpy.integers(len(rows))
        y, x = int(rows[at]) - side // 2, int(columns[at]) - side // 2
        if draws.numpy.random() < 0.25:
            y, x = draws.numpy.integers(height - side + 1), draws.numpy.integers(width - side + 1)
        y, x = (8 * round(np.clip(v, 0, size - side) / 8) for v, size in ((y, height), (x, width)))
        return picture[y : y + side, x : x + side]

    def _reconstruction_loss(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        error = reconstruction - pixel_values
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + self.recipe.edge_weight * slopes

    def sample(self) -> NDArray[np.uint8]:
        """Pictures above their reconstructions."""
        pixel_values = images.picture_to_tensor(self.shown).to(self.device)
        decoded = self.vae.decode(self.vae.encode(pixel_values).latent_dist.mean).sample
        return np.vstack([np.hstack(self.shown), np.hstack(images.tensor_to_pictures(decoded.float().cpu()))])

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        if self.recipe.train == "all":
            count = min(512, len(self.world))
            normalise_latents(self.vae, [self.world.picture[i] for i in range(count)], self.device)
        self.vae.save_pretrained(folder)


def _build(recipe: VaeRecipe) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    if recipe.init is not None:
        return cast("AutoencoderKL", load_part(AutoencoderKL, Path(recipe.init), dtype=torch.float32))
    assert recipe.train == "all", "runs.check_models refuses a decoder alone"
    torch.manual_seed(recipe.seed)
    levels = len(recipe.block_out_channels)
    vae = AutoencoderKL(
        block_out_channels=recipe.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=recipe.layers_per_block,
        norm_num_groups=recipe.norm_num_groups,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=128,
        scaling_factor=1.0,
        force_upcast=False,
    )
    _start_linear(vae)
    return vae


@torch.no_grad()
def _start_linear(vae: AutoencoderKL) -> None:
    """Start near a linear autoencoder, which learns colours in tens of steps instead of thousands.

    Residual branches start at zero, downsampling as Haar wavelets (Haar 1910), upsampling as copying, and the
    latents' spread at e^-3: with the usual spread of about 1 the decoder sees noise until the encoder shouts.
    """
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight)
                nn.init.zeros_(module.conv_shortcut.bias)
        elif isinstance(module, Downsample2D):
            _haar(cast(nn.Conv2d, module.conv))
        elif isinstance(module, Upsample2D):
            nn.init.dirac_(module.conv.weight).add_(torch.randn_like(module.conv.weight), alpha=0.03)
            nn.init.zeros_(module.conv.bias)
    first = vae.encoder.conv_in
    first.weight *= 0.3
    nn.init.dirac_(first.weight[:3])  # red, green and blue pass through
    vae.quant_conv.weight[4:] *= 0.1
    vae.quant_conv.bias[4:] = -6.0


def _haar(conv: nn.Conv2d) -> None:
    """The first quarter of the channels to their four 2x2 Haar bands, averages first; a little noise on
    all.
    """
    bands = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) * 0.5
    quarter = conv.out_channels // 4
    conv.weight.copy_(torch.randn_like(conv.weight) * 0.02)
    nn.init.zeros_(cast(Tensor, conv.bias))
    for channel in range(4 * quarter):
        band, source = divmod(channel, quarter)
        conv.weight[channel, source, :2, :2] += bands[band].reshape(2, 2)


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: list[NDArray[np.uint8]], device: torch.device) -> None:
    """Give each latent channel mean 0 and variance 1 over `pictures`, without changing what is decoded.

    The affine map goes into `quant_conv` and its inverse into `post_quant_conv`, so the scaling factor is 1.
    """
    means = [
        vae.encode(images.picture_to_tensor(pictures[i : i + 32]).to(device)).latent_dist.mean
        for i in range(0, len(pictures), 32)
    ]
    latents = torch.cat(means).double()
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    weight, bias = encode.weight.double(), encode.bias.double()
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - mean) / std
    bias[channels:] -= 2.0 * std.log()  # the log variance shrinks with the mean
    encode.weight.copy_(weight)
    encode.bias.copy_(bias)
    decode.bias.copy_(
        decode.bias.double() + (decode.weight.double() * mean[None, :, None, None]).sum(dim=(1, 2, 3))
    )
    decode.weight.copy_(decode.weight.double() * std[None, :, None, None])

"""Training the bundled autoencoder: pictures to 8 times smaller latents of 4 channels, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import images
from controlkit.training.config import VaeRecipe
from controlkit.training.draws import Draws
from controlkit.training.world import World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_SHOWN = 8


class VaeTask:
    """AutoencoderKL on the bundled world: L1 on pixels and on neighbour differences, a little KL."""

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
        pixel_values = images.picture_to_tensor([self.world.picture[i] for i in indices]).to(self.device)
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

    def _reconstruction_loss(self, reconstruction: Tensor, pixel_values: Tensor) -> Tensor:
        error = reconstruction - pixel_values
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + self.recipe.edge_weight * slopes

    def sample(self) -> NDArray[np.uint8]:
        """Pictures above their reconstructions."""
        pixel_values = images.picture_to_tensor(self.shown).to(self.device)
        decoded = self.vae.decode(self.vae.encode(pixel_values).latent_dist.mean).sample
        return np.vstack([np.hstack(self.shown), np.hstack(images.tensor_to_pictures(decoded.float().cpu()))])

    def export(self, folder: Path) -> None:
        if self.recipe.train == "all":
            count = min(512, len(self.world))
            normalise_latents(self.vae, [self.world.picture[i] for i in range(count)], self.device)
        self.vae.save_pretrained(folder)


def _build(recipe: VaeRecipe) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    if recipe.init is not None:
        return cast("AutoencoderKL", AutoencoderKL.from_pretrained(recipe.init, local_files_only=True))
    if recipe.train == "decoder":
        raise ValueError('train = "decoder" needs init, the folder of the autoencoder whose decoder is trained')
    torch.manual_seed(recipe.seed)
    levels = len(recipe.block_out_channels)
    return AutoencoderKL(
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
    decode.bias.copy_(decode.bias.double() + (decode.weight.double() * mean[None, :, None, None]).sum(dim=(1, 2, 3)))
    decode.weight.copy_(decode.weight.double() * std[None, :, None, None])

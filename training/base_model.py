"""Training the bundled base: a U-Net on frozen latents and text, saved as a diffusers pipeline folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import diffusion, files
from controlkit.base import Base
from controlkit.base_parts import load_tokenizer, noise_schedule
from controlkit.controlnet import lock
from controlkit.folders import load_part
from controlkit.layouts import keep_layout
from controlkit.sampling import generate
from controlkit.training.cache import cached_latents, cached_text
from controlkit.training.config import BaseRecipe
from controlkit.training.draws import Draws
from controlkit.training.exporting import save_half
from controlkit.training.task import DrawnTask
from controlkit.training.world import World

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_SHOWN = 8
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


class BaseTask(DrawnTask):
    """v-prediction (Salimans & Ho 2022) on the bundled world's latents, with captions dropped now and
    then.
    """

    def __init__(
        self,
        recipe: BaseRecipe,
        world: World,
        validation: World,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        from diffusers import AutoencoderKL
        from transformers import CLIPTextModel

        self.recipe, self.device = recipe, device
        vae = lock(load_part(AutoencoderKL, Path(recipe.vae), dtype=torch.float32)).to(device)
        text = load_part(CLIPTextModel, Path(recipe.text) / "text_encoder", dtype=torch.float32)
        encoder = lock(text).to(device)
        tokenizer = load_tokenizer(Path(recipe.text) / "tokenizer")
        self.latents = cached_latents(world, vae, report=report)
        self.text = cached_text(world.captions, encoder, tokenizer, report=report)
        torch.manual_seed(recipe.seed)
        self.base = Base(
            name="tiny",
            family="sd2",
            unet=_start(recipe, encoder.config.hidden_size, self.latents.shape[-1]).to(device),
            vae=vae,
            text_encoders=[encoder],
            tokenizers=[tokenizer],
            scheduler_config=SCHEDULER,
            alphas_cumprod=noise_schedule(SCHEDULER),
            device=device,
            dtype=torch.float32,
        )
        keep_layout(self.base.unet, vae)
        self.shown = validation.captions[:_SHOWN]

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.base.unet}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.base.unet.parameters()), "rate": 1.0}]

    def loss(self, draws: Draws) -> Tensor:
        indices = torch.tensor(draws.indices(len(self.latents), self.recipe.batch_size))
        dropped = draws.chosen(len(indices), self.recipe.caption_dropout)
        encoder_hidden_states = (
            self.text[torch.where(dropped, len(self.text) - 1, indices)].float().to(self.device)
        )
        latents = self.latents[indices].float().to(self.device)
        noisy_latents, timesteps, target = noised(latents, draws, self.base)
        model_pred = self.base.unet(noisy_latents, timesteps, encoder_hidden_states).sample
        return nn.functional.mse_loss(model_pred.float(), target)

    def sample(self) -> NDArray[np.uint8]:
        """One picture for each of eight held-out captions."""
        return np.hstack([generate(self.base, caption, seeds=[k])[0] for k, caption in enumerate(self.shown)])

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        from diffusers import AutoencoderKL

        vae = self.base.vae
        if self.recipe.decoder:
            vae = load_part(AutoencoderKL, Path(self.recipe.decoder), dtype=torch.float32)
        save_pipeline(self.base, folder, vae=vae)


def noised(latents: Tensor, draws: Draws, base: Base) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and the regression target of one batch: DDPM's forward process (Ho et al.
    2020).
    """
    noise = draws.normal(*latents.shape).to(latents.device)
    timesteps = draws.timesteps(len(latents), len(base.alphas_cumprod)).to(latents.device)
    noisy_latents = diffusion.q_sample(latents, noise, timesteps, base.alphas_cumprod)
    target = diffusion.target(base.prediction_type, latents, noise, timesteps, base.alphas_cumprod)
    return noisy_latents, timesteps, target


def _start(recipe: BaseRecipe, text_width: int, side: int) -> UNet2DConditionModel:
    """A new U-Net, or the one that the recipe trains on. Raises ValueError where that one does not fit."""
    from diffusers import UNet2DConditionModel

    if recipe.init is None:
        return _build(recipe, text_width, side)
    folder = Path(recipe.init) / "unet"
    unet = cast("UNet2DConditionModel", load_part(UNet2DConditionModel, folder, dtype=torch.float32))
    if (unet.config.in_channels, unet.config.cross_attention_dim) != (4, text_width):
        raise ValueError(
            f"init: {folder} takes {unet.config.in_channels} channels and text of width"
            f" {unet.config.cross_attention_dim}; here latents have 4 and the text {text_width}"
        )
    return unet.requires_grad_(True)


def _build(recipe: BaseRecipe, text_width: int, side: int) -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    kinds = [("CrossAttn" if attends else "") for attends in recipe.attention_levels]
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        layers_per_block=2,
        block_out_channels=recipe.block_out_channels,
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        norm_num_groups=recipe.norm_num_groups,
        cross_attention_dim=text_width,
        attention_head_dim=recipe.heads,  # the library's name for the number of heads
        use_linear_projection=True,
    )


def save_pipeline(base: Base, folder: Path, *, vae: nn.Module) -> None:
    """Write a Stable Diffusion pipeline folder in half precision: `StableDiffusionPipeline` loads it as it
    is.
    """
    from diffusers import __version__

    half = {"unet": base.unet, "vae": vae, "text_encoder": base.text_encoders[0]}
    for name, module in half.items():
        save_half(module, folder / name)
    _restore_text_prefix(folder / "text_encoder" / "model.safetensors")
    base.tokenizers[0].save_pretrained(folder / "tokenizer")
    (folder / "scheduler").mkdir()
    scheduler = {**SCHEDULER, "_diffusers_version": __version__}
    files.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files.write_json(folder / "model_index.json", index)


def _restore_text_prefix(path: Path) -> None:
    """Store keys under `text_model.`: transformers before 5.6 fills a model saved without it with random
    weights.
    """
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    prefixed = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in tensors.items()}
    save_file(prefixed, path, metadata={"format": "pt"})

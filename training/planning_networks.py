"""The networks of a training, built from configurations alone, of fake tensors; no weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from controlkit.adapters import BUNDLED_ADAPTERS
from controlkit.base_parts import ALIASES, BUNDLED, family_of, find_base
from controlkit.checkpoints.kept import checkpoint_file
from controlkit.controlnet import HINT_CHANNELS, check_copyable
from controlkit.folders import quiet_libraries, read_json
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.hub import find_folder
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.machine import DTYPES
from controlkit.training.optimizers import keeps_layout
from controlkit.training.pair import Pair
from controlkit.training.planning_memory import Simulated, simulate
from controlkit.training.variants import make_network, mark_trained

TOKENS = 77
_SIDES = {"sd1": 64, "sd2": 64, "sdxl": 128}  # latents, where a U-Net's configuration does not say
_CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json")


@dataclass(frozen=True)
class Networks:
    """The pair and the autoencoder, of fake tensors; what the text encoders hold and compute."""

    unet: Any
    controlnet: Any
    vae: Any
    text_parameters: int
    text_flops: int
    """Of one caption."""
    family: str
    conditioning_channels: int
    mode: FakeTensorMode

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the base was trained on."""
        size = self.unet.config.sample_size or _SIDES[self.family]
        return int(max(size) if isinstance(size, list | tuple) else size) * self.factor


def config_folder(base: str) -> Path:
    """The base's folder, with at least the configurations: of a hub's base those alone are downloaded.

    Raises ValueError as `load_base` does.
    """
    if checkpoint_file(base) is not None:
        return find_base(base)
    return find_folder(
        base,
        what="base",
        top_file="model_index.json",
        complete=lambda folder: all((folder / name).is_file() for name in _CONFIGS),
        files=("model_index.json", "*/config.json", "scheduler/*.json"),
        bundled=BUNDLED,
        aliases=ALIASES,
    )


def build(recipe: ControlNetRecipe) -> Networks:
    """Build the recipe's networks. Raises ValueError, one line, for a base that is not there or not known."""
    folder = config_folder(recipe.base)
    unet_config = read_json(folder / "unet" / "config.json")
    try:
        check_copyable(unet_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    channels = (1 if recipe.data.map_mode == "grey" else 3) * max(len(recipe.data.map_column), 1)
    texts = [name for name in ("text_encoder", "text_encoder_2") if (folder / name / "config.json").is_file()]
    counted = [_text_encoder(read_json(folder / name / "config.json")) for name in texts]
    mode = FakeTensorMode()
    with quiet_libraries(), mode, torch.device("cpu"):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        unet = UNet2DConditionModel.from_config(unet_config).eval()
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json")).eval()
        controlnet = make_network(recipe, unet, channels, hint_channels=_hint_channels(recipe))
    networks = Networks(
        unet=unet,
        controlnet=controlnet,
        vae=vae.requires_grad_(False),
        text_parameters=sum(parameters for parameters, _ in counted),
        text_flops=sum(flops for _, flops in counted),
        family=family_of(unet_config),
        conditioning_channels=channels,
        mode=mode,
    )
    _prepare(networks, recipe)
    return networks


def _prepare(networks: Networks, recipe: ControlNetRecipe) -> None:
    """Precision, layout, and what is trained, as `ControlNetTask` and `Weights` leave them.

    The autoencoder and the text encoders stay in fp32: what they make is made once.
    """
    unet, controlnet, half = networks.unet, networks.controlnet, DTYPES[recipe.precision]
    mark_trained(controlnet, unet, recipe)
    stays_whole = recipe.precision == "fp16"  # of what is trained: autocast lowers it where it is used
    with networks.mode:
        for module in (unet, controlnet):
            trained = any(parameter.requires_grad for parameter in module.parameters())
            laid_out = recipe.channels_last and (keeps_layout(recipe) or not trained)
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.is_floating_point() and not (trained and stays_whole):
                    tensor.data = tensor.data.to(half)
                if laid_out and tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _hint_channels(recipe: ControlNetRecipe) -> tuple[int, ...]:
    if recipe.hint_channels:
        return recipe.hint_channels
    bundled = "canny" if recipe.init is None and recipe.base in BUNDLED else recipe.init or ""
    if Path(bundled).is_file():
        return tuple(
            open_adapter_file(bundled).config.get("conditioning_embedding_out_channels", HINT_CHANNELS)
        )
    config = BUNDLED_ADAPTERS.get(bundled, Path(bundled)) / "config.json"
    if not bundled or not config.is_file():  # an adapter on the hub has the usual widths
        return HINT_CHANNELS
    return tuple(read_json(config).get("conditioning_embedding_out_channels", HINT_CHANNELS))


def _text_encoder(config: Mapping[str, Any]) -> tuple[int, int]:
    """(Parameters, FLOPs per caption) of a CLIP text encoder, from its configuration."""
    width, inner = int(config.get("hidden_size", 512)), int(config.get("intermediate_size", 2048))
    layers = int(config.get("num_hidden_layers", 12))
    block = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    embedded = (int(config.get("vocab_size", 49408)) + TOKENS) * width
    architectures = config.get("architectures") or [""]
    projection = width * int(config.get("projection_dim", 0)) if "Projection" in architectures[0] else 0
    flops = layers * (2 * TOKENS * (4 * width * width + 2 * width * inner) + 4 * TOKENS**2 * width)
    return layers * block + embedded + 2 * width + projection, flops


def simulate_step(
    networks: Networks, recipe: ControlNetRecipe, *, width: int, height: int, batch_size: int | None = None
) -> Simulated:
    """Forward and backward of one micro-batch of pictures of ``width`` x ``height`` pixels."""
    pair = Pair(networks.controlnet, networks.unet, recipe)

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=recipe.precision == "fp16"):
            model_pred = pair(**inputs)
        return nn.functional.mse_loss(model_pred.float(), torch.empty(inputs["noisy_latents"].shape))

    with networks.mode, torch.device("cpu"):
        inputs = _inputs(networks, recipe, batch_size or recipe.batch_size, width, height)
        held = recipe.accumulation > 1 and recipe.precision != "bf16"  # bf16's go to the masters each time
        return simulate(forward, [networks.unet, networks.controlnet], gradients_there=held)


def simulate_encoding(networks: Networks, *, width: int, height: int, batch_size: int) -> Simulated:
    """The autoencoder's encoder on a batch of pictures."""
    pictures = (batch_size, 3, height, width)
    return _simulate_vae(networks, pictures, lambda x: networks.vae.encode(x).latent_dist.mean)


def simulate_decoding(networks: Networks, *, width: int, height: int, batch_size: int) -> Simulated:
    """The autoencoder's decoder on a batch of latents."""
    channels, factor = networks.vae.config.latent_channels, networks.factor
    latents = (batch_size, channels, height // factor, width // factor)
    return _simulate_vae(networks, latents, lambda x: networks.vae.decode(x).sample)


def simulate_reward(networks: Networks, *, width: int, height: int) -> Simulated:
    """One picture decoded and the gradient taken, as `Reward` does, picture by picture and in fp32.

    What takes the map of the picture is not counted: little for canny, the depth model's share for depth.
    """
    channels, factor = networks.vae.config.latent_channels, networks.factor
    with networks.mode, torch.device("cpu"):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_config(networks.vae.config).eval().requires_grad_(False)
        if networks.unet.is_gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        latents = torch.empty(1, channels, height // factor, width // factor, requires_grad=True)
        return simulate(lambda: vae.decode(latents).sample.sum(), [vae])


def _simulate_vae(networks: Networks, shape: tuple[int, ...], call: Callable[[Tensor], Tensor]) -> Simulated:
    with networks.mode, torch.device("cpu"), torch.no_grad():
        x = torch.empty(shape, dtype=networks.vae.dtype)
        return simulate(lambda: call(x), [networks.vae], backward=False)


def _inputs(
    networks: Networks, recipe: ControlNetRecipe, batch: int, width: int, height: int
) -> dict[str, Any]:
    """What `Pair` takes, of fake tensors."""
    config = networks.unet.config
    latents = (batch, config.in_channels, height // networks.factor, width // networks.factor)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    cond = (batch, networks.conditioning_channels, height, width)
    inputs: dict[str, Any] = {
        "noisy_latents": torch.empty(latents, memory_format=layout),
        "timesteps": torch.empty(batch, dtype=torch.int64),
        "encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim),
        "controlnet_cond": torch.empty(cond, memory_format=layout),
    }
    if networks.family == "sdxl":
        sizes = 6 * config.addition_time_embed_dim
        pooled = torch.empty(batch, config.projection_class_embeddings_input_dim - sizes)
        inputs["added_cond"] = {"text_embeds": pooled, "time_ids": torch.empty(batch, 6)}
    return inputs

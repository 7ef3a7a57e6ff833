"""Bases of several sizes, a ControlNet and data for each, in a folder, for measuring a step."""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from controlkit.base import load_base
from controlkit.controlnet import from_base, lock
from controlkit.folders import quiet_libraries

_STAGES: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Size:
    """What a base is made of. Without ``unet`` it is the bundled one, with its real weights.

    ``text_2`` makes it an SDXL, for sampling alone.
    """

    resolution: int
    hint_channels: tuple[int, int, int, int]
    unet: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] = field(default_factory=dict)
    text: Mapping[str, int] = field(default_factory=dict)
    text_2: Mapping[str, int] = field(default_factory=dict)


def _text(width: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (width, inner, layers, heads), strict=True))


SIZES = {
    "tiny": Size(128, (8, 16, 48, 96)),
    # A fifth of Stable Diffusion's width, hint encoder and VAE, too, so that each has its share of a step.
    "34M": Size(
        256,
        (4, 8, 24, 64),
        unet={"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256},
        vae={"block_out_channels": (28, 52, 108, 108), "norm_num_groups": 4},
        text=_text(256, 1024, 2, 4),
    ),
    "xl": Size(  # a fifth of SDXL's width, and fewer transformers in its last level (4 for 10)
        256,
        (4, 8, 24, 64),
        unet={
            "block_out_channels": (64, 128, 256),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 4),
            "attention_head_dim": (2, 4, 8),
            "use_linear_projection": True,
            "cross_attention_dim": 512,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 64,
            "projection_class_embeddings_input_dim": 6 * 64 + 256,
        },
        vae={"block_out_channels": (28, 52, 108, 108), "norm_num_groups": 4},
        text=_text(256, 1024, 2, 4),
        text_2=_text(256, 1024, 2, 4),
    ),
    "sd15": Size(
        512,
        (16, 32, 96, 256),
        unet={"cross_attention_dim": 768},
        vae={"block_out_channels": (128, 256, 512, 512)},
        text=_text(768, 3072, 12, 12),
    ),
}


TRAINED = tuple(name for name, size in SIZES.items() if not size.text_2)


@dataclass(frozen=True)
class Models:
    """What the script loads: a base, and a ControlNet that it goes on to train. All in float32 on the CPU."""

    size: Size
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    controlnet: ControlNetModel
    scheduler: DDPMScheduler

    def copy_trained(self) -> ControlNetModel:
        """A ControlNet of the same weights, to be trained apart from others."""
        return copy.deepcopy(self.controlnet).requires_grad_(True).train()


def write(name: str, folder: Path, *, hint_channels: Sequence[int] | None = None) -> Path:
    """Write a base and a ControlNet of a size: ``folder/base`` and ``folder/controlnet``."""
    size = SIZES[name]
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = _write_base(size, folder / "base") if size.unet else load_base(name).unet
        controlnet = lock(from_base(unet, hint_channels=hint_channels or size.hint_channels, seed=0))
        for name_of, parameter in controlnet.named_parameters():  # at first the map would change nothing
            hint = name_of.startswith("controlnet_cond_embedding")
            if parameter.dim() > 1 and (hint or not parameter.any()):
                parameter.normal_(std=(2 if hint else 0.5) * parameter[0].numel() ** -0.5)
        controlnet.save_pretrained(folder / "controlnet")
    return folder


def _write_base(size: Size, folder: Path) -> UNet2DConditionModel:
    tokenizer = _tokenizer()
    parts = {
        "unet": UNet2DConditionModel(**size.unet, sample_size=size.resolution // 8),
        "vae": AutoencoderKL(**_STAGES, **size.vae, sample_size=size.resolution),
        "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **size.text)),
        "tokenizer": tokenizer,
        "scheduler": DDPMScheduler(**SCHEDULE),
    }
    kind = "StableDiffusionPipeline"
    if size.text_2:
        kind = "StableDiffusionXLPipeline"
        config = CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=256, **size.text_2)
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(config), "tokenizer_2": tokenizer}
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0.38.0"}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
        library = "diffusers" if type(part).__module__.startswith("diffusers") else "transformers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return lock(parts["unet"])


def _tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with letters for words."""
    letters = [*map(chr, range(ord("!"), ord("~") + 1))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def base_of(name: str, folder: Path) -> str:
    """Where the base of a size lies, as a recipe names it."""
    return str(folder / "base") if SIZES[name].unet else name


def read(name: str, folder: Path) -> Models:
    """What `write` wrote, all of it locked."""
    base = load_base(base_of(name, folder))
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet")
    scheduler = DDPMScheduler(**SCHEDULE, prediction_type=base.prediction_type)
    text, tokenizer = base.text_encoders[0], base.tokenizers[0]
    return Models(SIZES[name], base.unet, base.vae, text, tokenizer, lock(controlnet), scheduler)


def write_data(
    pictures: Sequence[NDArray[np.uint8]], maps: Sequence[NDArray[np.uint8]], folder: Path
) -> Path:
    """Pairs as a data set holds them: pictures as JPEG, maps as PNG, captions of common length."""
    folder.mkdir()
    rows = []
    for index, (picture, conditioning) in enumerate(zip(pictures, maps, strict=True)):
        row = {"file_name": f"{index:04d}.jpg", "conditioning_image_file_name": f"{index:04d}.png"}
        Image.fromarray(picture).save(folder / row["file_name"], quality=92)
        Image.fromarray(conditioning).save(folder / row["conditioning_image_file_name"])
        rows.append({**row, "text": f"a picture of number {index} in a row of many"})
    (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder

"""The configurations of a checkpoint's parts, from the shapes of their tensors.

What no shape tells is taken from the published models of the family: how many heads attention has, how
latents are scaled, the scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from controlkit.formats.structure import Config, Shapes, encoder_config

_SCALING: Mapping[str, float] = {"sd1": 0.18215, "sd2": 0.18215, "sdxl": 0.13025}
_HEAD = 64  # numbers to a head of attention, in every text encoder and in the U-Nets of SD2 and SDXL
_HEADS_OF_SD1 = 8
_SIDES: Mapping[str, int] = {"sd1": 64, "sd2": 64, "sdxl": 128}  # of latents
_SIDE_OF_SD2_V = 96
_NOISE: Config = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
_SCHEDULERS: Mapping[str, Config] = {
    "sd1": {
        "_class_name": "PNDMScheduler",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "clip_sample": False,
    },
    "sd2": {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "clip_sample": False},
    "sdxl": {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"},
}


def unet_config(shapes: Shapes, *, family: str, prediction_type: str, pooled: int) -> Config:
    """A U-Net's configuration. ``pooled``: the width of SDXL's pooled text; 0 for the others."""
    config = encoder_config(shapes)
    widths, blocks = config["block_out_channels"], config["down_block_types"]
    sd2_v = family == "sd2" and prediction_type == "v_prediction"
    config |= {
        "_class_name": "UNet2DConditionModel",
        "out_channels": shapes.size("conv_out.weight", 0),
        "up_block_types": tuple(block.replace("Down", "Up") for block in reversed(blocks)),
        "sample_size": _SIDE_OF_SD2_V if sd2_v else _SIDES[family],
        "attention_head_dim": _HEADS_OF_SD1
        if family == "sd1"
        else tuple(max(width // _HEAD, 1) for width in widths),
    }
    if family == "sdxl":
        numbers = config["projection_class_embeddings_input_dim"]
        config["addition_time_embed_dim"] = (numbers - pooled) // 6
    return config


def vae_config(shapes: Shapes, *, scaling_factor: float) -> Config:
    """An autoencoder's configuration."""
    levels = shapes.count(r"encoder\.down_blocks\.(\d+)\.")
    return {
        "_class_name": "AutoencoderKL",
        "block_out_channels": tuple(
            shapes.size(f"encoder.down_blocks.{level}.resnets.0.conv1.weight", 0) for level in range(levels)
        ),
        "layers_per_block": shapes.count(r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "latent_channels": shapes.size("decoder.conv_in.weight", 1),
        "in_channels": shapes.size("encoder.conv_in.weight", 1),
        "out_channels": shapes.size("decoder.conv_out.weight", 0),
        "scaling_factor": scaling_factor,
    }


def scaling_factor(family: str) -> float:
    """What latents of a family are multiplied with."""
    return _SCALING[family]


def text_config(shapes: Shapes, *, from_open_clip: bool, projected: bool) -> Config:
    """A text encoder's configuration. ``projected``: whether it gives one vector of a prompt, too."""
    words = "text_model.embeddings.token_embedding.weight"
    width = shapes.size(words, 1)
    kind = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return {
        "architectures": [kind],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": shapes.size("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "num_hidden_layers": shapes.count(r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": max(width // _HEAD, 1),
        "max_position_embeddings": shapes.size("text_model.embeddings.position_embedding.weight", 0),
        "vocab_size": shapes.size(words, 0),
        "projection_dim": shapes.size("text_projection.weight", 0) if projected else width,
        "hidden_act": "gelu" if from_open_clip else "quick_gelu",
        # As published: 2 has the pooled text taken at the largest token, which is the end of the text.
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def scheduler_config(family: str, *, prediction_type: str, zero_snr: bool) -> Config:
    """The published scheduler's configuration, for what the U-Net was trained to predict."""
    config = {**_SCHEDULERS[family], **_NOISE, "prediction_type": prediction_type}
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def index(family: str) -> dict[str, Any]:
    """The list of the parts and their classes, as diffusers keeps it (``model_index.json``)."""
    is_sdxl = family == "sdxl"
    scheduler = _SCHEDULERS[family]["_class_name"]
    parts: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if is_sdxl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if not is_sdxl:
        return {**parts, "safety_checker": [None, None], "requires_safety_checker": False}
    return {
        **parts,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "force_zeros_for_empty_prompt": True,
    }

"""Random-weight Stable Diffusion folders of the real classes, tiny ones for every family and the real sizes.

``build(folder, "sd1" | "sd2" | "sdxl")`` writes a diffusers pipeline folder of about 4 megabytes in under a
second: the real block structure (13 residuals for SD1 and SD2, 10 for SDXL; VAE by 8), 16x16 latents by
default. The weights are torch's default initialisation under a fixed seed.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from controlkit.base import Base
from controlkit.controlnet import lock
from controlkit.folders import quiet_libraries

FAMILIES = ("sd1", "sd2", "sdxl")
PREDICTION_TYPES = {"sd1": "epsilon", "sd2": "v_prediction", "sdxl": "epsilon"}

_TEXT_WIDTH = 32
_CLIP_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": _TEXT_WIDTH,
}
_FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "cross_attention_dim": _TEXT_WIDTH, "attention_head_dim": 2},
    "sd2": {
        **_FOUR_LEVELS,
        "cross_attention_dim": _TEXT_WIDTH,
        "attention_head_dim": (2, 4, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2 * _TEXT_WIDTH,
        "attention_head_dim": (2, 4, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + _TEXT_WIDTH,
    },
}

# The published configurations, where they differ from the class's defaults.
SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
SD21_UNET: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE_LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SD15_VAE: dict[str, Any] = {
    **_VAE_LEVELS,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
SD15_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def tiny_unet(family: str, *, sample_size: int = 16, seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    """A U-Net of the family's structure, 0.8 million parameters, in evaluation mode."""
    config = {"norm_num_groups": 8, **UNETS[family], "sample_size": sample_size, **changes}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(**config).eval()


def randomize_zero_convs(
    controlnet: ControlNetModel, *, seed: int = 0, scale: float = 0.3
) -> ControlNetModel:
    """Give every all-zero tensor random weights, so that the control network does something, as after
    training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return controlnet


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with the 256 bytes as its vocabulary (so any UTF-8 text works) and no merges."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [256 + i for i in range(256 - len(printable))]
    letters = [chr(code) for code in printable + others]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=77)


def build(
    folder: Path,
    family: str,
    *,
    sample_size: int = 16,
    layers: int = 2,
    prediction_type: str | None = None,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Write a tiny pipeline folder and return it. SD2's default prediction type is v, the others' epsilon.

    ``layers`` per block of the U-Net: the families have 2. ``changes``: of the U-Net's configuration.
    """
    vae = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "sample_size": 8 * sample_size}
    text = {
        "hidden_size": _TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": _TEXT_WIDTH,
    }
    unet = {"norm_num_groups": 8, **UNETS[family], "sample_size": sample_size, "layers_per_block": layers}
    unet |= changes
    return _write(
        folder,
        family,
        unet=unet,
        vae={**_VAE_LEVELS, **vae},
        text=text,
        prediction_type=prediction_type or PREDICTION_TYPES[family],
        seed=seed,
    )


def build_unclip(folder: Path, *, sample_size: int = 8, seed: int = 0) -> Path:
    """Write a tiny folder for StableUnCLIPImg2ImgPipeline, an SD2 that is told a picture, and return it."""
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    told = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * _TEXT_WIDTH}
    build(folder, "sd2", sample_size=sample_size, seed=seed, **told)
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        normalizer = StableUnCLIPImageNormalizer(embedding_dim=_TEXT_WIDTH)
        normalizer.mean.data.normal_(std=0.2)
        normalizer.std.data.uniform_(0.5, 1.5)
        size = _CLIP_VISION["image_size"]
        parts = {
            "feature_extractor": CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**_CLIP_VISION)),
            "image_normalizer": normalizer,
            "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        }
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableUnCLIPImg2ImgPipeline"
    libraries = ("transformers", "transformers", "stable_diffusion", "diffusers")
    for library, (name, part) in zip(libraries, parts.items(), strict=True):
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


def build_clip(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny CLIP of random weights that looks at 32x32 pixels, and return its folder."""
    tokens = tokenizer()
    ids = {
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={**ids, **text, "pad_token_id": tokens.pad_token_id},
        vision_config=_CLIP_VISION,
        projection_dim=_TEXT_WIDTH,
    )
    size = _CLIP_VISION["image_size"]
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(config).save_pretrained(folder)
        tokens.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
    return folder


def replace_image_encoder(folder: Path, **changes: Any) -> None:
    """Put an image encoder of another configuration into an unCLIP's folder."""
    with quiet_libraries():
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**_CLIP_VISION, **changes}))
        encoder.save_pretrained(folder / "image_encoder")


def build_sd15(folder: Path, *, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """Write a folder of SD1.5's true sizes with random weights (2 GB in float16) and return it."""
    return _write(
        folder,
        "sd1",
        unet=SD15_UNET,
        vae=SD15_VAE,
        text=SD15_TEXT,
        prediction_type="epsilon",
        seed=seed,
        dtype=dtype,
    )


def _write(
    folder: Path,
    family: str,
    *,
    unet: dict[str, Any],
    vae: dict[str, Any],
    text: dict[str, Any],
    prediction_type: str,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> Path:
    tokens = tokenizer()
    ids = {
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    text_config = CLIPTextConfig(**ids, **text, pad_token_id=tokens.pad_token_id)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {
            "unet": UNet2DConditionModel(**unet).to(dtype),
            "vae": AutoencoderKL(**vae).to(dtype),
            "text_encoder": CLIPTextModel(text_config).to(dtype),
            "tokenizer": tokens,
            "scheduler": scheduler,
        }
        if family == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(text_config).to(dtype)
            parts["tokenizer_2"] = tokens
        for name, part in parts.items():
            part.save_pretrained(folder / name)
    write_index(folder, family, parts)
    return folder


def write_index(folder: Path, family: str, parts: dict[str, Any]) -> None:
    """Write the list of a folder's parts and their classes."""
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline",
        "_diffusers_version": "0.38.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
    }
    if family == "sdxl":
        index["force_zeros_for_empty_prompt"] = True
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    for name, part in parts.items():
        kind = type(part)
        library = "diffusers" if kind.__module__.startswith("diffusers") else "transformers"
        index[name] = [library, "CLIPTokenizer" if "tokenizer" in name else kind.__name__]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def nine_channels(base: Base) -> Base:
    """The same base with a U-Net that is shown a mask and a masked picture, too."""
    unet = UNet2DConditionModel.from_config({**base.unet.config, "in_channels": 9})
    weights = base.unet.state_dict()
    generator = torch.Generator().manual_seed(5)
    more = 0.1 * torch.randn((len(weights["conv_in.weight"]), 5, 3, 3), generator=generator)
    weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], more], dim=1)
    unet.load_state_dict(weights)
    return replace(base, unet=lock(unet))


def told_guidance(base: Base) -> Base:
    """The same base with a U-Net that is told the guidance, as latent consistency models are."""
    unet = UNet2DConditionModel.from_config({**base.unet.config, "time_cond_proj_dim": 24})
    weights = base.unet.state_dict()
    size = unet.time_embedding.cond_proj.weight.shape
    weights["time_embedding.cond_proj.weight"] = torch.randn(size, generator=torch.Generator().manual_seed(5))
    unet.load_state_dict(weights)
    return replace(base, unet=lock(unet))

"""Random-weight Stable Diffusions in one file, in the original project's names, and as diffusers' folders.

The names are made here by walking through the blocks as the original's classes build them, not by the
package's own table; `tests/test_checkpoints.py` compares both with diffusers' ``from_single_file``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_models
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.folders import quiet_libraries

_WIDTH = 64  # one head of attention in a text encoder
_SECOND_WIDTH = 128  # diffusers tells the two text encoders of a file apart by their widths
_FOUR: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": _WIDTH,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR, "attention_head_dim": 8, "sample_size": 64},
    "sd2": {**_FOUR, "attention_head_dim": (1, 1, 1, 1), "use_linear_projection": True, "sample_size": 96},
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": _WIDTH + _SECOND_WIDTH,
        "attention_head_dim": (1, 1, 1),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + _SECOND_WIDTH,
        "sample_size": 128,
    },
}
_VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)


def build(folder: Path, family: str, *, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """Write a base as diffusers' folder, of the published structure but narrow, and return its networks.

    ``changes``: of the U-Net's configuration.
    """
    words = tiny_models.tokenizer()
    text: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 1,
        "projection_dim": _WIDTH,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    first = CLIPTextConfig(**text, hidden_act="gelu" if family == "sd2" else "quick_gelu")
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**{**UNETS[family], **changes}),
            "vae": AutoencoderKL(**_VAE, scaling_factor=0.13025 if family == "sdxl" else 0.18215),
            "text_encoder": CLIPTextModel(first),
        }
        if family == "sdxl":
            wide = {"hidden_size": _SECOND_WIDTH, "projection_dim": _SECOND_WIDTH, "num_attention_heads": 2}
            second = CLIPTextConfig(**{**text, **wide}, hidden_act="gelu")
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
        for network in parts.values():  # norms begin at one and nought, which would not tell one from another
            for parameter in network.parameters():
                if parameter.ndim == 1:
                    parameter.data += 0.1 * torch.randn_like(parameter)
    saved = {**parts, "tokenizer": tokenizer(family), "scheduler": _scheduler(family)}
    if family == "sdxl":
        saved["tokenizer_2"] = tokenizer("sd2")
    with quiet_libraries():
        for name, part in saved.items():
            part.save_pretrained(folder / name)
    tiny_models.write_index(folder, family, saved)
    return parts


def tokenizer(family: str) -> Any:
    """The tiny models' words, padded as a family's first text encoder has them."""
    words = tiny_models.tokenizer()
    words.pad_token = "!" if family == "sd2" else words.eos_token
    return words


def _scheduler(family: str) -> Any:
    """The scheduler as the published model of the family has it."""
    noise: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    told = {**noise, "steps_offset": 1, "prediction_type": tiny_models.PREDICTION_TYPES[family]}
    if family == "sdxl":
        return EulerDiscreteScheduler(**told, timestep_spacing="leading")
    if family == "sd2":
        return DDIMScheduler(**told, clip_sample=False, set_alpha_to_one=False)
    return PNDMScheduler(**told, skip_prk_steps=True, set_alpha_to_one=False)


def original(parts: dict[str, Any], family: str, *, extra_layer: int = 3) -> dict[str, Tensor]:
    """The tensors of a base under the original's names.

    ``extra_layer``: the number of the layer of SD2's text encoder that its file has besides.
    """
    unet = parts["unet"].state_dict()
    found = {f"model.diffusion_model.{theirs}": unet[ours] for ours, theirs in _unet_names(parts["unet"])}
    vae = parts["vae"].state_dict()
    for ours, theirs in _vae_names(parts["vae"]):
        is_matrix = ".attn_1." in theirs and vae[ours].ndim == 2
        found[f"first_stage_model.{theirs}"] = vae[ours][..., None, None] if is_matrix else vae[ours]
    first = _whole_names(parts["text_encoder"].state_dict())
    if family == "sd2":
        extra = {  # the last layer, which is not read
            key.replace("layers.0.", f"layers.{extra_layer}."): value + 1
            for key, value in first.items()
            if "layers.0." in key
        }
        width = parts["text_encoder"].config.hidden_size
        projection = {"text_projection.weight": torch.randn(width, width)}
        found |= _open_clip({**first, **extra, **projection}, "cond_stage_model.model.")
        found["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    else:
        where = "cond_stage_model" if family == "sd1" else "conditioner.embedders.0"
        found |= {f"{where}.transformer.{key}": value for key, value in first.items()}
        ids = torch.arange(77)[None]
        found[f"{where}.transformer.text_model.embeddings.position_ids"] = ids
    if family == "sdxl":
        second = _whole_names(parts["text_encoder_2"].state_dict())
        found |= _open_clip(second, "conditioner.embedders.1.model.")
    found |= {"betas": torch.linspace(0.1, 0.2, 10), "model_ema.decay": torch.tensor(0.9999)}
    return {key: value.contiguous().clone() for key, value in found.items()}


def write(file: Path, tensors: dict[str, Tensor], *, dtype: torch.dtype | None = None, **said: str) -> Path:
    """Write them as one file: .safetensors, or a pickle as torch saves it. ``said``: of its header."""
    kept = {
        key: value.to(dtype) if dtype and value.is_floating_point() else value
        for key, value in tensors.items()
    }
    if file.suffix == ".safetensors":
        save_file(kept, file, metadata={f"modelspec.{key}": value for key, value in said.items()})
    else:
        torch.save({"state_dict": kept, "global_step": 3}, file)
    return file


def _unet_names(unet: UNet2DConditionModel) -> Iterator[tuple[str, str]]:
    """Each tensor's name, and the original's."""
    keys = list(unet.state_dict())
    pairs = [
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("add_embedding.linear_1.", "label_emb.0.0."),
        ("add_embedding.linear_2.", "label_emb.0.2."),
        ("conv_in.", "input_blocks.0.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
    ]
    pairs += [(f"mid_block.resnets.{i}.", f"middle_block.{2 * i}.") for i in range(2)]
    pairs += [("mid_block.attentions.0.", "middle_block.1.")]
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            pairs.append((f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{number}.0."))
            pairs.append((f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{number}.1."))
            number += 1
        pairs.append((f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{number}.0.op."))
        number += 1
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            pairs.append((f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{number}.0."))
            pairs.append((f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{number}.1."))
            number += 1
        behind = 2 if hasattr(block, "attentions") else 1
        pairs.append((f"up_blocks.{level}.upsamplers.0.conv.", f"output_blocks.{number - 1}.{behind}.conv."))
    for key in keys:
        ours, theirs = next(pair for pair in pairs if key.startswith(pair[0]))
        rest = key.removeprefix(ours)
        if ".resnets." in ours:
            inner, outer = next(pair for pair in _RESNET if rest.startswith(f"{pair[0]}."))
            rest = outer + rest.removeprefix(inner)
        yield key, theirs + rest


def _vae_names(vae: AutoencoderKL) -> Iterator[tuple[str, str]]:
    levels = len(vae.config.block_out_channels)
    pairs = []
    for level in range(levels):
        for way, side, number in (("down", "encoder", level), ("up", "decoder", levels - 1 - level)):
            ours = f"{side}.{way}_blocks.{level}"
            pairs += [(f"{ours}.resnets.{i}.", f"{side}.{way}.{number}.block.{i}.") for i in range(3)]
            pairs += [(f"{ours}.{way}samplers.0.", f"{side}.{way}.{number}.{way}sample.")]
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.mid_block.resnets.{i}.", f"{side}.mid.block_{i + 1}.") for i in range(2)]
        inner = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        pairs += [
            (f"{side}.mid_block.attentions.0.{ours}.", f"{side}.mid.attn_1.{theirs}.")
            for ours, theirs in zip(inner, ("norm", "q", "k", "v", "proj_out"), strict=True)
        ]
        pairs += [(f"{side}.conv_norm_out.", f"{side}.norm_out.")]
    for key in vae.state_dict():
        ours, theirs = next((pair for pair in pairs if key.startswith(pair[0])), ("", ""))
        yield key, theirs + key.removeprefix(ours).replace("conv_shortcut", "nin_shortcut")


def _whole_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors as files name them, whatever the installed transformers calls them."""
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in state.items()
        if "position_ids" not in key
    }


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """A text encoder's tensors as open_clip has them."""
    found = {
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "ln_final.weight": state["text_model.final_layer_norm.weight"],
        "ln_final.bias": state["text_model.final_layer_norm.bias"],
        "text_projection": state["text_projection.weight"].T,
    }
    for layer in range(sum("layer_norm1.weight" in key for key in state)):
        ours, theirs = f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for end in ("weight", "bias"):
            for a, b in (
                ("layer_norm1", "ln_1"),
                ("layer_norm2", "ln_2"),
                ("mlp.fc1", "mlp.c_fc"),
                ("mlp.fc2", "mlp.c_proj"),
                ("self_attn.out_proj", "attn.out_proj"),
            ):
                found[f"{theirs}.{b}.{end}"] = state[f"{ours}.{a}.{end}"]
            three = [state[f"{ours}.self_attn.{one}_proj.{end}"] for one in "qkv"]
            found[f"{theirs}.attn.in_proj_{end}"] = torch.cat(three)
    return {prefix + key: value for key, value in found.items()}

"""The names of a checkpoint's tensors: the original project's, and those of the parts that diffusers makes.

A checkpoint holds a U-Net, an autoencoder and one or two text encoders under prefixes of the original's
classes. The encoder's half of the U-Net is named as a ControlNet's (`formats/keys.py`); here stand the rest,
as pure functions over strings. (The original: github.com/CompVis/stable-diffusion,
``ldm/modules/diffusionmodules``; SDXL: github.com/Stability-AI/generative-models; the second text encoder:
github.com/mlfoundations/open_clip.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from controlkit.formats import keys

UNET, VAE, TEXT, SECOND_TEXT = PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""The parts by the names of their folders."""
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
SECOND_TEXT_PREFIX = "conditioner.embedders.1.model."
LEFT_OUT = ""
"""The name of a tensor that no part needs."""

_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.", SECOND_TEXT_PREFIX)
_CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
_IN_RESNET: Mapping[str, str] = {"nin_shortcut": "conv_shortcut"}
_IN_ATTENTION: Mapping[str, str] = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_IN_TEXT: Mapping[str, str] = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj": "self_attn.in_proj",
}
_TOP_OF_TEXT: Mapping[str, str] = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_NOT_NEEDED = ("logit_scale", "attn_mask")  # of open_clip's training, and of its causal attention
Namer = Callable[[str], str | None]


def part_of(key: str) -> tuple[str, str] | None:
    """The part that a tensor belongs to, and its prefix; None for one that is beside the parts."""
    if key.startswith(UNET_PREFIX):
        return UNET, UNET_PREFIX
    if key.startswith(VAE_PREFIX):
        return VAE, VAE_PREFIX
    for prefix in (*_OPEN_CLIP, *_CLIP):
        if key.startswith(prefix):
            return (SECOND_TEXT if prefix == SECOND_TEXT_PREFIX else TEXT), prefix
    return None


def namer(part: str, prefix: str, names: Iterable[str]) -> Namer:
    """What gives a tensor's name in its part.

    ``names``: all of the part's, without ``prefix``. The function answers `LEFT_OUT` for a tensor that is not
    needed, and None for a name that the part does not have.
    """
    own = list(names)
    if part == UNET:
        counts = keys.counts_of_original(own)
        return lambda name: in_unet(name, counts.layers)
    if part == VAE:
        levels = len({found[1] for name in own if (found := re.match(r"decoder\.up\.(\d+)\.", name))})
        return lambda name: in_vae(name, levels)
    return in_open_clip if prefix in _OPEN_CLIP else in_clip


def in_unet(name: str, layers: int) -> str | None:
    """diffusers' name of a U-Net's tensor; ``layers`` per level of the encoder.

    >>> in_unet("output_blocks.4.1.conv.weight", layers=1)
    'up_blocks.2.upsamplers.0.conv.weight'
    """
    place, _, parameter = name.rpartition(".")
    ends = {"out.0": "conv_norm_out", "out.2": "conv_out"}
    if place in ends:
        return f"{ends[place]}.{parameter}"
    found = re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name)
    if not found:
        return keys.to_diffusers(name, keys.Counts(layers))
    level, layer = divmod(int(found[1]), layers + 1)
    inner = found[3]
    if found[2] != "0" and inner in ("conv.weight", "conv.bias"):
        return f"up_blocks.{level}.upsamplers.0.{inner}"
    # What stands inside a block has the same names on either side: they are those of the encoder's first.
    same = keys.to_diffusers(f"input_blocks.1.{found[2]}.{inner}", keys.Counts(layers))
    kind = ("resnets", "attentions")[int(found[2])] if found[2] != "2" else ""
    start = f"down_blocks.0.{kind}.0."
    return f"up_blocks.{level}.{kind}.{layer}.{same.removeprefix(start)}" if kind and same else None


def in_vae(name: str, levels: int) -> str | None:
    """diffusers' name of an autoencoder's tensor; the original counts the decoder's ``levels`` from below.

    >>> in_vae("decoder.up.3.block.0.nin_shortcut.weight", levels=4)
    'decoder.up_blocks.0.resnets.0.conv_shortcut.weight'
    """
    if re.fullmatch(r"(quant_conv|post_quant_conv|(en|de)coder\.conv_(in|out))\.(weight|bias)", name):
        return name
    found = re.fullmatch(r"(encoder|decoder)\.(.+)\.(weight|bias)", name)
    if not found:
        return LEFT_OUT if name.startswith(("loss.", "model_ema.")) else None
    inner = _in_coder(found[2], levels)
    return inner and f"{found[1]}.{inner}.{found[3]}"


def _in_coder(name: str, levels: int) -> str | None:
    if name == "norm_out":
        return "conv_norm_out"
    if found := re.fullmatch(r"mid\.block_([12])\.(\w+)", name):
        return f"mid_block.resnets.{int(found[1]) - 1}.{_IN_RESNET.get(found[2], found[2])}"
    if found := re.fullmatch(r"mid\.attn_1\.(\w+)", name):
        return f"mid_block.attentions.0.{_IN_ATTENTION[found[1]]}" if found[1] in _IN_ATTENTION else None
    found = re.fullmatch(r"(down|up)\.(\d+)\.(?:block\.(\d+)\.(\w+)|(down|up)sample\.conv)", name)
    if not found:
        return None
    way = found[1]
    level = int(found[2]) if way == "down" else levels - 1 - int(found[2])
    if found[3] is None:
        return f"{way}_blocks.{level}.{way}samplers.0.conv" if found[5] == way else None
    return f"{way}_blocks.{level}.resnets.{found[3]}.{_IN_RESNET.get(found[4], found[4])}"


def in_clip(name: str) -> str | None:
    """transformers' name of a tensor of its own CLIP, which some merging tools robbed of its first word."""
    whole = name if name.startswith("text_model.") else f"text_model.{name}"
    if whole == "text_model.embeddings.position_ids":
        return LEFT_OUT
    known = r"text_model\.(embeddings|encoder\.layers\.\d+|final_layer_norm)\..+"
    return whole if re.fullmatch(known, whole) else None


def in_open_clip(name: str) -> str | None:
    """transformers' name of a tensor of open_clip's text tower; ``self_attn.in_proj`` is q, k and v in one.

    >>> in_open_clip("transformer.resblocks.3.attn.in_proj_weight")
    'text_model.encoder.layers.3.self_attn.in_proj.weight'
    """
    if name in _NOT_NEEDED:
        return LEFT_OUT
    if name in _TOP_OF_TEXT:
        return _TOP_OF_TEXT[name]
    found = re.fullmatch(r"transformer\.resblocks\.(\d+)\.([\w.]+)[._](weight|bias)", name)
    if not found or found[2] not in _IN_TEXT:
        return None
    return f"text_model.encoder.layers.{found[1]}.{_IN_TEXT[found[2]]}.{found[3]}"

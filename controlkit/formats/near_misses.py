"""What people hand in by mistake where an adapter is wanted, by its keys: each has its own line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from controlkit.formats.weight_file import Stored


class Mistake(NamedTuple):
    """What a file is instead (`sign`: a pattern that begins one of its keys), and what to do."""

    sign: str
    what: str


_LATER_FAMILIES = "which is for another family of models: controlkit runs SD1, SD2 and SDXL"
_MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        r"(controlnet_blocks|controlnet_x_embedder|controlnet_single_blocks|pos_embed_input|controlnet_mode)",
        f"a ControlNet for a transformer (Flux, SD3 or another), {_LATER_FAMILIES}",
    ),
    Mistake(
        r"down_blocks\.0\.motion_modules\.",
        "a SparseCtrl, which controls films of AnimateDiff: not supported",
    ),
    Mistake(
        r"base_conv_in\.",
        "a ControlNet-XS together with its base: give the ControlNetXSAdapter alone",
    ),
    Mistake(r"(style_embedding$|spatial_feat_mapping\.)", "a T2I style or fusing adapter: not supported"),
    Mistake(r"(image_proj\.|ip_adapter\.)", "an IP-Adapter: give it as --ip-adapter FILE=PICTURE"),
    Mistake(
        r"(.*\.)?(lora_(up|down|A|B)\b|lora\.(up|down)\.|hada_w|lokr_w)|lora_(unet|te\d?)_|.*_lora\.(up|down)\.",
        "a LoRA: give it as --lora FILE",
    ),
    Mistake(
        r"(string_to_param\.|emb_params$|<.+>$|clip_[lg]$)",
        "a textual inversion: give it as --embedding FILE",
    ),
    Mistake(
        r"(.*\.)?(double_blocks|joint_blocks|single_transformer_blocks)\.\d",
        f"a transformer (Flux, SD3 or another), {_LATER_FAMILIES}",
    ),
    Mistake(
        r"model\.diffusion_model\.",
        "a whole base model without a control network: give an adapter, and the base as --base",
    ),
    Mistake(
        r"(up_blocks\.\d|output_blocks\.\d)",
        "the U-Net of a base, without a control network: give an adapter, and the base as --base",
    ),
    Mistake(
        r"(first_stage_model\.)?(decoder|quant_conv)\.",
        "a VAE: give it as --vae",
    ),
    Mistake(r"(text_model\.|cond_stage_model\.|transformer\.text_model\.)", "a text encoder, not an adapter"),
)


def mistake_in(entries: Mapping[str, Stored]) -> str | None:
    """What a file without an adapter is, in words with what to do instead; None where it is not known."""
    for mistake in _MISTAKES:
        pattern = re.compile(mistake.sign)
        if any(pattern.match(key) for key in entries):
            return mistake.what
    if len(entries) == 1 and len(next(iter(entries.values())).shape) in (1, 2):  # one vector per token
        return "a textual inversion, by its single small tensor: give it as --embedding FILE"
    return None

"""What people hand in by mistake where an adapter is wanted, by its keys: each has its own line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from controlkit.formats.weight_file import Stored


class Mistake(NamedTuple):
    """What a file is instead (`sign`: a pattern that begins one of its keys), and what to do.

    ``alike``: whether it has an adapter's keys, too, and has to be told before any is looked for.
    """

    sign: str
    what: str
    alike: bool = False


_SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)")
_LATER_FAMILIES = "which is for another family of models: controlkit runs SD1, SD2 and SDXL"
_TRANSFORMER = Mistake(
    r"(.*\.)?(double_blocks|joint_blocks|single_transformer_blocks)\.\d|blocks\.\d+\.(self_attn|cross_attn)\.",
    f"a transformer (Flux, SD3 or another), {_LATER_FAMILIES}",
)
_MISTAKES: tuple[Mistake, ...] = (
    Mistake(
        r"(controlnet_blocks|controlnet_x_embedder|controlnet_single_blocks|pos_embed_input|controlnet_mode)",
        f"a ControlNet for a transformer (Flux, SD3 or another), {_LATER_FAMILIES}",
        alike=True,  # XLabs' have the original's hint encoder
    ),
    Mistake(
        r"(vace_blocks|control_layers|after_proj_list)\.\d|lllite_(dit|conditioning)",
        f"a control network for a transformer (Wan, Z-Image or another), {_LATER_FAMILIES}",
    ),
    Mistake(
        r"brushnet_(down|mid|up)_block",
        "a BrushNet, which fills holes by a network of another kind: not supported",
        alike=True,
    ),
    Mistake(
        r"(.*\.)?(local_adapter|global_adapter)\.",
        "a Uni-ControlNet, whose layout is its project's own: not supported",
        alike=True,
    ),
    Mistake(
        r"down_blocks\.0\.motion_modules\.",
        "a SparseCtrl or a motion module, which are of AnimateDiff's films: not supported",
    ),
    Mistake(
        r"base_conv_in\.",
        "a ControlNet-XS together with its base: give the ControlNetXSAdapter alone",
        alike=True,
    ),
    Mistake(
        r"(.*\.)?(enc|dec)_zero_convs_(in|out)\.",
        "a ControlNet-XS in its authors' layout, which is not read: give one as diffusers saves it"
        " (ControlNetXSAdapter)",
        alike=True,
    ),
    Mistake(
        r"(adapter\.)?body\.\d+\.(skep|down_opt)\.",
        "a T2I-Adapter with convolutions on its shortcuts or between its levels (sk=False or use_conv=True of"
        " the original class), which is not read: the original project's own code runs it",
        alike=True,
    ),
    Mistake(r"(style_embedding$|spatial_feat_mapping\.)", "a T2I style or fusing adapter: not supported"),
    Mistake(
        r"image_proj\.(perceiver_resampler\.|norm\.weight$)|ip_adapter\..*_lora\.",
        "an IP-Adapter FaceID, which reads faces by another network: not supported",
    ),
    Mistake(
        r"(image_proj|image_proj_model|ip_adapter|adapter_modules)\.",
        "an IP-Adapter: give it as --ip-adapter FILE=PICTURE",
    ),
    Mistake(
        r".*([._](hada_w|lokr_w|oft_|glora|a1\.weight$|b1\.weight$|on_input$)|dora_scale|lora_magnitude_vector)",
        "a LoHa, LoKr, DoRA or another relative of LoRA: only LoRA is supported",
    ),
    Mistake(
        r"lora_(unet|te\d?)_\w+\.(diff|diff_b|weight)$",
        "the difference to a base's whole layers, by the names of a LoRA: only LoRA is supported",
    ),
    Mistake(
        r"(.*\.)?(lora_(up|down|A|B)\b|lora\.(up|down)\.|hada_w|lokr_w)|lora_(unet|te\d?)_|.*_lora\.(up|down)\.",
        "a LoRA: give it as --lora FILE, in safetensors format",
    ),
    Mistake(
        r"(string_to_param\.|emb_params$|<.+>$|clip_[lg]$)",
        "a textual inversion: give it as --embedding FILE",
    ),
    _TRANSFORMER,
    Mistake(
        r"model\.diffusion_model\.",
        "a whole base model without a control network: give an adapter, and the base as --base",
    ),
    Mistake(
        r"(up_blocks\.\d|output_blocks\.\d)",
        "the U-Net of a base, without a control network: give an adapter, and the base as --base",
    ),
    Mistake(
        r"(taesd_(en|de)coder\.)?\d+\.conv\.[024]\.(weight|bias)$",
        "a taesd, or one half of it, in its author's names, which are not read: give --vae taesd, or the file"
        " with diffusers' names",
    ),
    Mistake(
        r"(first_stage_model\.)?(decoder|quant_conv)\.",
        "a VAE: give it as --vae",
    ),
    Mistake(
        r"(vision_model\.|visual\.(conv1|transformer)\.)",
        "CLIP's encoder of pictures: give the folder that holds it as --image-encoder, beside --ip-adapter",
    ),
    Mistake(
        r"(text_model\.|cond_stage_model\.|transformer\.text_model\.|embeddings\.token_embedding\.)",
        "a text encoder, not an adapter",
    ),
)


def scales_in(keys: Iterable[str]) -> str | None:
    """What is wrong with a file of 8-bit numbers with scales beside them, as ComfyUI writes it; else None."""
    found = next((key for key in keys if _SCALES.fullmatch(key)), None)
    if found is None:
        return None
    return f"holds {found}: numbers of 8 bits with scales of their own, which are not read; give it in fp16"


def transformer_in(entries: Mapping[str, Stored]) -> str | None:
    """What a network of a later family of models is, in words; None for anything else."""
    return _TRANSFORMER.what if any(re.match(_TRANSFORMER.sign, key) for key in entries) else None


def mistake_in(entries: Mapping[str, Stored], *, alike: bool = False) -> str | None:
    """What a file is instead of an adapter, in words with what to do; None where it is not known.

    ``alike``: of those alone that have an adapter's keys, too.
    """
    for mistake in _MISTAKES:
        if alike and not mistake.alike:
            continue
        pattern = re.compile(mistake.sign)
        if any(pattern.match(key) for key in entries):
            return mistake.what
    (key, entry), *more = entries.items()
    # A vector for each of its few tokens, by one name that is no layer's.
    if not (alike or more) and len(entry.shape) in (1, 2) and entry.shape[0] < 100 and "." not in key:
        return "a textual inversion, by its single small tensor: give it as --embedding FILE"
    return None

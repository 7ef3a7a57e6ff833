"""The tensors that a network must have, name by name and shape by shape, without building it: needs no torch.

For the structures that are common. `is_whole` is sure when it says yes; of anything else nothing is known
here, and `building.check_whole` decides, which takes the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from controlkit.formats import keys, lllite_keys
from controlkit.formats.weight_file import LORA_KEY

if TYPE_CHECKING:
    from controlkit.formats.adapter_file import AdapterFile

Tensors = dict[str, tuple[int, ...]]
COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "class_embedding.", "down_blocks.", "mid_block.")
"""Beginnings of diffusers' names of what a ControlNet copies from its base."""
_LEFT_OUT: Mapping[str, Any] = {"norm_num_groups": 32, "attention_head_dim": 8}  # diffusers' defaults
_HINT_WIDTHS = (16, 32, 96, 256)  # diffusers' own for a ControlNet
_USUAL: Mapping[str, tuple[Any, ...]] = {  # what else a configuration may say leads to further tensors
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "only_cross_attention": (False,),
    "dual_cross_attention": (False, None),
    "resnet_time_scale_shift": ("default", None),
    "time_embedding_type": ("positional", None),
    "time_embedding_dim": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3, None),
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
}


def is_whole(file: AdapterFile, unet: Mapping[str, Any] | None) -> bool:
    """Whether a file surely has every tensor of its network, and no others; False where that is not known.

    ``unet``: the configuration of the U-Net that it is for, which a Control-LoRA needs.
    """
    found = {key: entry.shape for key, entry in file.entries.items()}
    match file.kind:
        case "controlnet" | "controlnet-difference":
            return _same(found, controlnet_tensors(_as_told(file)))
        case "controlnet-union":
            return _same(found, union_tensors(_as_told(file)))
        case "t2i-adapter":
            return _same(found, t2i_tensors(file.config))
        case "lite":
            return _same(found, lite_tensors(file.config))
        case "lllite":
            return unet is not None and _is_whole_lllite(found, unet)
        case "control-lora":
            return unet is not None and _is_whole_lora(found, unet)
    return False


def count_unchanged(file: AdapterFile) -> int:
    """How many tensors a difference leaves out since they are its base's; 0 where that is not known."""
    wanted = controlnet_tensors(_as_told(file)) or {}
    return sum(key.startswith(COPIED) and key not in file.entries for key in wanted)


def _as_told(file: AdapterFile) -> Mapping[str, Any]:
    """A file's configuration: of one that is told, what it leaves out is diffusers' default."""
    return {**_LEFT_OUT, **file.config} if file.is_told else file.config


def controlnet_tensors(config: Mapping[str, Any]) -> Tensors | None:
    """A ControlNet's tensors; None for a structure that is not common."""
    encoder = encoder_tensors(config)
    if encoder is None:
        return None
    widths, layers = list(config["block_out_channels"]), config.get("layers_per_block", 2)
    connected = [widths[0]]
    for level, width in enumerate(widths):
        connected += [width] * (layers + (level + 1 < len(widths)))
    tensors = {**encoder, **_hint_encoder(config, widths[0])}
    for number, width in enumerate(connected):
        tensors |= _layer(f"controlnet_down_blocks.{number}", width, width, 1, 1)
    return tensors | _layer("controlnet_mid_block", widths[-1], widths[-1], 1, 1)


def union_tensors(config: Mapping[str, Any]) -> Tensors | None:
    """A ControlNet-Union's tensors; None for a structure that is not common."""
    tensors = controlnet_tensors(config)
    kinds, width = config["num_control_type"], config["num_trans_channel"]
    heads = config.get("num_trans_head", 8)
    if tensors is None or not heads or width % heads:
        return None
    told = 4 * config["block_out_channels"][0]
    tensors |= {"task_embedding": (kinds, width)}
    tensors |= _layer("spatial_ch_projs", config["num_proj_channel"], width)
    tensors |= _layer("control_add_embedding.linear_1", told, kinds * config["addition_time_embed_dim"])
    tensors |= _layer("control_add_embedding.linear_2", told, told)
    for number in range(config["num_trans_layer"]):
        where = f"transformer_layes.{number}"
        tensors |= {f"{where}.attn.in_proj_weight": (3 * width, width)}
        tensors |= {f"{where}.attn.in_proj_bias": (3 * width,)}
        tensors |= _layer(f"{where}.attn.out_proj", width, width)
        tensors |= {**_layer(f"{where}.ln_1", width), **_layer(f"{where}.ln_2", width)}
        tensors |= _layer(f"{where}.mlp.c_fc", 4 * width, width)
        tensors |= _layer(f"{where}.mlp.c_proj", width, 4 * width)
    return tensors


def t2i_tensors(config: Mapping[str, Any]) -> Tensors:
    """A T2I-Adapter's tensors."""
    widths, blocks = list(config["channels"]), config["num_res_blocks"]
    entering = config["in_channels"] * config["downscale_factor"] ** 2
    if config["adapter_type"] == "light_adapter":
        return _light_t2i(entering, widths, blocks)
    tensors = _layer("adapter.conv_in", widths[0], entering, 3, 3)
    widens = range(1, 3) if config["adapter_type"] == "full_adapter_xl" else range(1, len(widths))
    for level, width in enumerate(widths):
        before = widths[level - 1] if level in widens else width
        if before != width:
            tensors |= _layer(f"adapter.body.{level}.in_conv", width, before, 1, 1)
        for block in (f"adapter.body.{level}.resnets.{number}" for number in range(blocks)):
            tensors |= _layer(f"{block}.block1", width, width, 3, 3)
            tensors |= _layer(f"{block}.block2", width, width, 1, 1)
    return tensors


def _light_t2i(entering: int, widths: list[int], blocks: int) -> Tensors:
    tensors: Tensors = {}
    for level, (before, width) in enumerate(pairwise([entering, *widths, widths[-1]])):
        where, inner = f"adapter.body.{level}", width // 4
        tensors |= _layer(f"{where}.in_conv", inner, before, 1, 1)
        tensors |= _layer(f"{where}.out_conv", width, inner, 1, 1)
        for block in (f"{where}.resnets.{number}" for number in range(blocks)):
            tensors |= _layer(f"{block}.block1", inner, inner, 3, 3)
            tensors |= _layer(f"{block}.block2", inner, inner, 3, 3)
    return tensors


def lite_tensors(config: Mapping[str, Any]) -> Tensors | None:
    """The tensors of our light network, `controlkit.light.LightControl`; None for widths that it refuses."""
    widths, first = list(config["widths"]), config["block_out_channels"][0]
    if any(width % min(8, width) for width in widths):
        return None
    tensors = _layer("encoder.0", widths[0], config["conditioning_channels"], 3, 3)
    number = 1
    for narrow, wide in pairwise(widths):
        tensors |= _residual(f"encoder.{number}", narrow)
        tensors |= _layer(f"encoder.{number + 1}", wide, narrow, 3, 3)
        number += 2
    for block in range(number, number + config["layers"]):
        tensors |= _residual(f"encoder.{block}", widths[-1])
    number += config["layers"] + 1  # behind an activation
    tensors |= _layer(f"encoder.{number}", first, widths[-1], 3, 3)
    return tensors | _embedding("time_embedding", first, first)


def _residual(name: str, width: int) -> Tensors:
    convolutions = {
        **_layer(f"{name}.conv1", width, width, 3, 3),
        **_layer(f"{name}.conv2", width, width, 3, 3),
    }
    return {**_layer(f"{name}.norm", width), **convolutions}


def encoder_tensors(config: Mapping[str, Any]) -> Tensors | None:
    """What a ControlNet copies of a U-Net of this configuration; None for a structure that is not common."""
    if not _is_common(config):
        return None
    widths, types = list(config["block_out_channels"]), list(config["down_block_types"])
    layers, told = config.get("layers_per_block", 2), 4 * widths[0]
    depths = config.get("transformer_layers_per_block") or 1
    depths = [depths] * len(widths) if isinstance(depths, int) else list(depths)
    tensors = _layer("conv_in", widths[0], config.get("in_channels", 4), 3, 3)
    tensors |= _embedding("time_embedding", widths[0], told)
    if config.get("addition_embed_type"):
        tensors |= _embedding("add_embedding", config["projection_class_embeddings_input_dim"], told)
    before = widths[0]
    for level, (width, kind, depth) in enumerate(zip(widths, types, depths, strict=True)):
        where = f"down_blocks.{level}"
        for layer in range(layers):
            tensors |= _resnet(f"{where}.resnets.{layer}", before, width, told)
            if kind.startswith("CrossAttn"):
                tensors |= _transformer(f"{where}.attentions.{layer}", width, depth, config)
            before = width
        if level + 1 < len(widths):
            tensors |= _layer(f"{where}.downsamplers.0.conv", width, width, 3, 3)
    tensors |= _resnet("mid_block.resnets.0", before, before, told)
    if config.get("mid_block_type") != "UNetMidBlock2D":
        tensors |= _transformer("mid_block.attentions.0", before, depths[-1], config)
        tensors |= _resnet("mid_block.resnets.1", before, before, told)
    return tensors


def _is_common(config: Mapping[str, Any]) -> bool:
    if any(config.get(key, usual[0]) not in usual for key, usual in _USUAL.items()):
        return False
    if not set(config["down_block_types"]) <= {"CrossAttnDownBlock2D", "DownBlock2D"}:
        return False
    widths, groups = list(config["block_out_channels"]), config.get("norm_num_groups")
    groups = 1 if groups is None else groups
    heads = config.get("num_attention_heads")
    heads = config.get("attention_head_dim") if heads is None else heads
    heads = 1 if heads is None else heads
    counts = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if 0 in (groups, *counts):
        return False
    depths = config.get("transformer_layers_per_block") or 1
    if not isinstance(depths, int) and len(depths) != len(widths):
        return False
    told = (config.get("layers_per_block", 2), config.get("cross_attention_dim", 1280), groups)
    if len(counts) != len(widths) or not all(isinstance(number, int) for number in told):
        return False
    return all(width % count == width % groups == 0 for width, count in zip(widths, counts, strict=True))


def _layer(name: str, *shape: int) -> Tensors:
    """A layer's weight and its bias, which is as long as the weight's first side."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _embedding(name: str, entering: int, width: int) -> Tensors:
    return {**_layer(f"{name}.linear_1", width, entering), **_layer(f"{name}.linear_2", width, width)}


def _hint_encoder(config: Mapping[str, Any], width: int) -> Tensors:
    where, widths = "controlnet_cond_embedding", config.get("conditioning_embedding_out_channels")
    widths = list(widths or _HINT_WIDTHS)
    tensors = _layer(f"{where}.conv_in", widths[0], config.get("conditioning_channels", 3), 3, 3)
    for number, (before, after) in enumerate(pairwise(widths)):
        tensors |= _layer(f"{where}.blocks.{2 * number}", before, before, 3, 3)
        tensors |= _layer(f"{where}.blocks.{2 * number + 1}", after, before, 3, 3)
    return tensors | _layer(f"{where}.conv_out", width, widths[-1], 3, 3)


def _resnet(name: str, before: int, width: int, told: int) -> Tensors:
    tensors = {**_layer(f"{name}.norm1", before), **_layer(f"{name}.conv1", width, before, 3, 3)}
    tensors |= _layer(f"{name}.time_emb_proj", width, told)
    tensors |= {**_layer(f"{name}.norm2", width), **_layer(f"{name}.conv2", width, width, 3, 3)}
    return tensors if before == width else tensors | _layer(f"{name}.conv_shortcut", width, before, 1, 1)


def _transformer(name: str, width: int, depth: int, config: Mapping[str, Any]) -> Tensors:
    text, sides = (
        config.get("cross_attention_dim", 1280),
        () if config.get("use_linear_projection") else (1, 1),
    )
    tensors = _layer(f"{name}.norm", width)
    for projection in ("proj_in", "proj_out"):
        tensors |= _layer(f"{name}.{projection}", width, width, *sides)
    for block in (f"{name}.transformer_blocks.{number}" for number in range(depth)):
        for norm in ("norm1", "norm2", "norm3"):
            tensors |= _layer(f"{block}.{norm}", width)
        for attention, entering in (("attn1", width), ("attn2", text)):
            sizes = {"to_q": width, "to_k": entering, "to_v": entering}
            tensors |= {f"{block}.{attention}.{part}.weight": (width, size) for part, size in sizes.items()}
            tensors |= _layer(f"{block}.{attention}.to_out.0", width, width)
        tensors |= _layer(f"{block}.ff.net.0.proj", 8 * width, width)
        tensors |= _layer(f"{block}.ff.net.2", width, 4 * width)
    return tensors


def _same(found: Tensors, wanted: Tensors | None) -> bool:
    return (
        wanted is not None
        and found.keys() == wanted.keys()
        and all(_fits(found[key], shape) for key, shape in wanted.items())
    )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a tensor has a shape; a 1x1 convolution and a matrix are the same numbers."""
    alike = {len(found), len(wanted)} == {2, 4} and found[:2] == wanted[:2]
    return found == wanted or (alike and set(found[2:] + wanted[2:]) == {1})


def _is_whole_lllite(found: Tensors, unet: Mapping[str, Any]) -> bool:
    """Whether an LLLite's parts are whole, each as wide as the projection of such a U-Net that it is for."""
    parts: dict[str, Tensors] = {}
    for key, shape in found.items():
        name, _, inner = key.partition(".")
        parts.setdefault(name, {})[inner] = shape
    return all(_is_whole_part(name, own, unet) for name, own in parts.items())


def _is_whole_part(name: str, own: Tensors, unet: Mapping[str, Any]) -> bool:
    first, second, down = (
        own.get(f"{key}.weight", ()) for key in ("conditioning1.0", "conditioning1.2", "down.0")
    )
    if len(first) != 4 or len(second) != 4 or len(down) != 2:
        return False
    inner, tokens = down
    try:
        width = lllite_keys.width_at(lllite_keys.place(name), unet)
    except ValueError:
        return False
    depth = lllite_keys.depth_of(own)
    return width == tokens and own == lllite_keys.part_tensors(tokens, 2 * first[0], inner, depth)


def _is_whole_lora(found: Tensors, unet: Mapping[str, Any]) -> bool:
    """Whether a Control-LoRA's tensors are changes to such a U-Net's encoder and a ControlNet's own parts."""
    hint = sorted(
        (int(key.split(".")[1]), shape)
        for key, shape in found.items()
        if key.startswith("input_hint_block.") and key.endswith(".weight")
    )
    if not hint or any(len(shape) != 4 for _, shape in hint):
        return False
    own = {
        "in_channels": unet.get("out_channels", 4),  # of a base that fills holes, too
        "conditioning_channels": hint[0][1][1],
        "conditioning_embedding_out_channels": [hint[0][1][0], *(shape[0] for _, shape in hint[2:-1:2])],
    }
    wanted = controlnet_tensors({**unet, **own})
    if wanted is None:
        return False
    counts = keys.Counts(unet.get("layers_per_block", 2), len(hint))
    left = {name: shape for name, shape in found.items() if name != LORA_KEY}
    for key, shape in wanted.items():
        name = keys.to_original(key, counts)
        if name is None or not _is_given(name, shape, left, needed=not key.startswith(COPIED)):
            return False
    return not left


def _is_given(name: str, shape: tuple[int, ...], left: Tensors, *, needed: bool) -> bool:
    """Whether a weight stands whole in a file, or as its factors, or, where it is not needed, not at all."""
    stem = name.removesuffix(".weight")
    up, down = left.pop(f"{stem}.up", None), left.pop(f"{stem}.down", None)
    whole = left.pop(name, None)
    if up is None and down is None:
        return not needed if whole is None else _fits(whole, shape)
    if up is None or down is None or whole is not None or needed or not name.endswith(".weight"):
        return False
    return len(up) >= 2 <= len(down) and up[1] == down[0] and _fits(up[:1] + down[1:], shape)

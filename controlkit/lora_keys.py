"""The names in LoRA files, each layer's brought to diffusers' name of it.

A file names a layer, then what of it stands there: ``….lora_down.weight``, ``….lora_up.weight``, ``….alpha``.

    kohya                lora_unet_mid_block_attentions_0_proj_in, lora_te_…; LyCORIS: lycoris_…
    diffusers, peft      unet.mid_block.attentions.0.proj_in, also without unet., or with base_model.model.
    ComfyUI              diffusion_model.middle_block.1.proj_in, text_encoders.clip_l.transformer.…

Several of these may stand in one file. Taking kohya's names apart is diffusers' work.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit.formats import keys as original
from controlkit.hub import first_sentence

_FACTOR = re.compile(
    r"[._](lora|lora_linear_layer)[._](?P<part>down|up|A|B)(\.(?!weight)\w+)?\.weight$"  # peft names adapters
)
_ALPHA = re.compile(r"([._]lora(_linear_layer)?)?\.alpha$")
_PARTS = {"down": "down", "A": "down", "up": "up", "B": "up"}
_OTHER_PART = {"down": "up", "up": "down", "A": "B", "B": "A"}
_PEFT = "base_model.model."
_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_BEGINNINGS: Mapping[str, str] = {  # of a layer's name, and what it is replaced by, one after the other
    r"^((unet|text_encoder|text_encoder_2)\.)?base_model\.model\.": r"\1",
    r"^(?=encoder\.layers\.)": "text_encoder.",  # as transformers has CLIP since 5.6
    r"^lycoris_(?=text_model_)": "lora_te_",
    r"^lycoris_": "lora_unet_",
    r"^lora_unet_add_embedding_linear_1$": "lora_unet_label_emb_0_0",  # which diffusers knows
    r"^lora_unet_add_embedding_linear_2$": "lora_unet_label_emb_0_2",
    r"^text_encoders\.clip_[lh]\.transformer\.": "text_encoder.",
    r"^text_encoders\.clip_g\.transformer\.": "text_encoder_2.",
    r"^text_model\.": "text_encoder.text_model.",
}
_OTHER_NETWORKS: Mapping[str, str] = {
    r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d": "Flux or a network like it",
    r"joint_blocks[._]\d": "SD3",
    r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)": "Wan",
    r"(^|[._])transformer[._]transformer_blocks[._]\d": "a diffusion transformer like SD3 or Flux",
}


@dataclass(frozen=True, eq=False)
class Factors:
    """What a file holds of one layer. key: what the file calls it. alpha: None where it says none."""

    key: str
    down: Tensor
    up: Tensor
    alpha: float | None


def is_factor(key: str) -> bool:
    """Whether a key is that of one of a LoRA's two factors."""
    return _FACTOR.search(key) is not None


def is_peft(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a file as peft itself writes it, in which no alphas stand."""
    keys = list(keys)
    return any(key.startswith(_PEFT) for key in keys) and not any(key.endswith(".alpha") for key in keys)


def other_network(keys: Iterable[str]) -> tuple[str, str] | None:
    """What a LoRA was made for, and a key that tells it, if that is no U-Net of Stable Diffusion."""
    keys = list(keys)
    found = ((what, key) for sign, what in _OTHER_NETWORKS.items() for key in keys if re.search(sign, key))
    return next(found, None)


def by_layer(file: Path, state: Mapping[str, Tensor], unet_config: Any) -> dict[str, Factors]:
    """The factors of each layer, by diffusers' name of it, ``unet.mid_block.attentions.0.proj_in``.

    unet_config: of the base's U-Net. Raises ValueError, naming the file, for a layer without both factors or
    with a second one, an alpha that is no number, and a name that cannot be taken apart.
    """
    found: dict[str, Factors] = {}
    for stem, keys in _grouped(file, state).items():
        alpha = _alpha(file, keys["alpha"], state[keys["alpha"]]) if "alpha" in keys else None
        factors = Factors(stem, state[keys["down"]], state[keys["up"]], alpha)
        name = _layer_name(file, keys["down"], unet_config)
        if name in found:
            raise ValueError(f"{file} holds the layer {name} twice: as {found[name].key} and as {stem}")
        found[name] = factors
    return found


def _grouped(file: Path, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The keys of each layer, as "down", "up" and "alpha", by the file's name of it."""
    groups: dict[str, dict[str, str]] = {}
    for key in keys:
        factor = _FACTOR.search(key)
        stem, part = (
            (key[: factor.start()], _PARTS[factor["part"]]) if factor else (_ALPHA.sub("", key), "alpha")
        )
        if part in (group := groups.setdefault(stem, {})):
            raise ValueError(f"{file} holds more than one LoRA: {group[part]} and {key}")
        group[part] = key
    for stem, group in groups.items():
        missing = _missing(stem, group)
        if missing:
            raise ValueError(
                f"{file} is damaged: {stem} has not both factors of a LoRA: there is no {missing}"
            )
    return groups


def _missing(stem: str, group: Mapping[str, str]) -> str:
    """The key of the factor that a layer lacks, "" if it has both."""
    there = group.get("down") or group.get("up")
    if there is None:
        return f"{stem}.lora_down.weight"
    if "down" in group and "up" in group:
        return ""
    part = _FACTOR.search(there)
    assert part is not None, "only a factor is down or up"
    return there[: part.start("part")] + _OTHER_PART[part["part"]] + there[part.end("part") :]


def _alpha(file: Path, key: str, told: Tensor) -> float:
    if told.numel() != 1 or not torch.isfinite(told).all():
        raise ValueError(f"{file} is damaged: its {key} is no finite number")
    return float(told)


def _layer_name(file: Path, key: str, unet_config: Any) -> str:
    """diffusers' name of the layer whose first factor is `key`."""
    factor = _FACTOR.search(key)
    assert factor is not None, "the keys were grouped by it"
    stem, end = key[: factor.start()], key[factor.start() :]
    for sign, instead in _BEGINNINGS.items():
        stem = re.sub(sign, instead, stem)
    if stem.startswith("diffusion_model."):
        return "unet." + _from_original(stem.removeprefix("diffusion_model."), unet_config)
    if stem.startswith(_KOHYA):
        return _as_peft(_from_kohya(file, stem, unet_config))
    return _as_peft(stem + re.sub(r"\.lora_(down|A)\b.*", ".lora_A.weight", end))


def _as_peft(key: str) -> str:
    """The layer of a key in one of diffusers' own namings, in which peft's and this toolkit's is."""
    from diffusers.utils import state_dict_utils as names

    of_text = {**names.DIFFUSERS_OLD_TO_PEFT, **names.DIFFUSERS_TO_PEFT}
    prefix = "" if key.startswith(("unet.", "text_encoder")) else "unet."  # the oldest files name none
    mapping = of_text if key.startswith("text_encoder") else names.UNET_TO_DIFFUSERS
    (name,) = names.convert_state_dict({prefix + key: None}, mapping)
    return str(name).removesuffix(".lora_A.weight")


def _from_kohya(file: Path, stem: str, unet_config: Any) -> str:
    """diffusers' key for the first factor of a layer that kohya names."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin

    both = {f"{stem}.lora_{part}.weight": torch.zeros(1) for part in ("down", "up")}
    try:
        state, _ = StableDiffusionXLLoraLoaderMixin.lora_state_dict(both, unet_config=unet_config)
    except (ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{file} has a layer {stem}, which cannot be placed: {first_sentence(error)}"
        ) from error
    return next(str(key) for key in state if ".down." in key)


def _from_original(name: str, unet_config: Any) -> str:
    """diffusers' path of a layer of the U-Net that the original calls `name`; `name` if it is none of it."""
    layers = unet_config.layers_per_block
    if name == "out.2":
        return "conv_out"
    if found := re.fullmatch(r"output_blocks\.(\d+)\.([012])\.(.+)", name):
        # The original's outputs are cut as its inputs, but begin at 0 and go up: the rest has the same names.
        level, layer = divmod(int(found[1]), layers + 1)
        if found[3] == "conv":
            return f"up_blocks.{level}.upsamplers.0.conv"
        twin = original.to_diffusers(f"input_blocks.1.{found[2]}.{found[3]}.weight")
        kind = re.match(r"down_blocks\.0\.(\w+)\.0\.(.+)\.weight", twin or "")
        return f"up_blocks.{level}.{kind[1]}.{layer}.{kind[2]}" if kind else name
    path = original.to_diffusers(f"{name}.weight", original.Counts(layers))
    return path.removesuffix(".weight") if path else name

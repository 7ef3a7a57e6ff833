"""What kind of adapter a file holds, and in whose names: by keys and shapes, never by the file's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from controlkit.formats import keys, t2i_keys
from controlkit.formats.near_misses import mistake_in, scales_in
from controlkit.formats.weight_file import DIFFERENCE_KEY, LORA_KEY, MARKERS, Stored
from controlkit.naming import first_of

KINDS: Mapping[str, str] = {
    "controlnet": "a ControlNet",
    "controlnet-difference": "a ControlNet stored as the difference to its base",
    "control-lora": "a Control-LoRA",
    "controlnet-union": "a ControlNet-Union",
    "t2i-adapter": "a T2I-Adapter",
    "controlnet-xs": "a ControlNet-XS",
    "lllite": "a ControlNet-LLLite",
    "lite": "a light network of controlkit",
    "controlnext": "a ControlNeXt",
}
"""The kinds of adapters that are recognised, and what to call them."""
OF_BASE = ("controlnet-difference", "control-lora")
"""The kinds that are changes to a base: whichever base is at hand makes them whole."""
UNION_KEY = "task_embedding"  # a row for each kind of map that a ControlNet-Union knows

_WRAPPED = re.compile(  # before all names: DataParallel, torch.compile, a module that holds the network
    r"((module|_orig_mod|controlnet|ad|model(?!\.diffusion_model\.))\.)+"
)
_BESIDE = re.compile(
    r"(model\.)?(unet|vae|text_encoder\w*|tokenizer\w*|noise_scheduler)\."
)  # in a checkpoint of all
_ASIDE = re.compile(  # what training saves beside a network, and no weight of it
    r"(optimizers?|optimizer_state\w*|(lr_)?schedulers?|(lr_)?scheduler_state\w*|(grad_)?scaler)\."
    r"|(global_step|step|epoch|iteration|iter|current_iter)$"
)
_OF_TRAINING = ("average.controlnet.", "model.controlnet.")  # in checkpoints of ours: averages come first
_OF_BASES = re.compile(  # beside the control network, in the original's own checkpoints
    r"(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner|denoiser|model_ema)\."
    r"|(betas|logvar|scale_factor|alphas_cumprod\w*|sqrt_\w+|posterior_\w+|log_one_minus_\w+|lvlb_weights)$"
)


class Recognised(NamedTuple):
    """A file's kind (of `KINDS`), its layout ("diffusers", "original" or "kohya") and its tensors' names.

    ``names``: each key of the file to ours, which is diffusers', or its own where diffusers has no such
    network. Markers, the base that lies beside a control network and what its training left have none.
    """

    kind: str
    layout: str
    names: Mapping[str, str]


def recognise(entries: Mapping[str, Stored], where: object) -> Recognised:
    """Recognise a file by its entries. ``where`` names it in messages.

    Raises ValueError, one line, for a file that holds no adapter (and says what it holds instead), and for
    keys that its kind does not have (the first is named, the others are counted).
    """
    unprefixed = {_as_marker(key): entry for key, entry in entries.items()}
    bare = {key: entry for key, entry in unprefixed.items() if not _ASIDE.match(key)} or unprefixed
    if (scaled := scales_in(bare)) is not None:
        raise ValueError(f"{where} {scaled}")
    for prefix in _OF_TRAINING:
        if any(key.startswith(prefix) for key in bare):
            return _recognise_below(prefix, bare, where)
    own = [key for key in bare if key not in MARKERS and not _BESIDE.match(key)]
    found = _WRAPPED.match(next(iter(own), ""))
    if found and all(key.startswith(found[0]) for key in own):
        return _recognise_below(found[0], bare, where)
    if LORA_KEY in bare and all(key.startswith(keys.PREFIX) for key in own):
        return _recognise_below(keys.PREFIX, bare, where)
    return _recognise(bare, where)


def _as_marker(key: str) -> str:
    """A marker without the prefix that all keys of some files have; any other key as it is."""
    last = key.rpartition(".")[2]
    return last if last in MARKERS else key


def _recognise_below(prefix: str, entries: Mapping[str, Stored], where: object) -> Recognised:
    """The same of those names alone that begin so, and of markers, which have no prefix."""
    inner = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    inner |= {key: entry for key, entry in entries.items() if key in MARKERS}
    kind, layout, names = _recognise(inner, where)
    return Recognised(kind, layout, {prefix + key: name for key, name in names.items()})


def _recognise(entries: Mapping[str, Stored], where: object) -> Recognised:
    """The same of a network's own names."""
    kind, layout, prefix = _kind(entries, where)
    if kind == "controlnet" and DIFFERENCE_KEY in entries:
        kind = "controlnet-difference"
    own = [key for key in entries if key not in MARKERS]
    if prefix:
        own = [key for key in own if key.startswith(prefix) or not _OF_BASES.match(key)]
    renamer = _renamer(kind, layout, prefix, own)
    names = {key: renamer(key) for key in own}
    strange = [key for key, name in names.items() if name is None]
    if strange:
        raise ValueError(f"{where} holds {first_of(strange)}, which {KINDS[kind]} does not have")
    renamed = {key: name for key, name in names.items() if name is not None}
    if len(set(renamed.values())) != len(renamed):
        raise ValueError(f"{where} holds the same tensors twice, with and without a prefix")
    return Recognised(kind, layout, renamed)


def _kind(entries: Mapping[str, Stored], where: object) -> tuple[str, str, str]:
    """The kind, the layout and the prefix of the keys."""
    if (held := mistake_in(entries, alike=True)) is not None:
        raise ValueError(f"{where} is {held}")
    if LORA_KEY in entries:
        return "control-lora", "original", ""
    if any(key.startswith("lllite_unet") for key in entries):
        return "lllite", "kohya", ""
    if "control_to_base_for_conv_in.weight" in entries:
        return "controlnet-xs", "diffusers", ""
    if UNION_KEY in entries and any(key.startswith("control_add_embedding.") for key in entries):
        return "controlnet-union", "diffusers", ""
    motion = any("motion_modules" in key for key in entries)  # a SparseCtrl's, which is not ours
    for prefix in (keys.PREFIX, ""):
        if f"{prefix}input_hint_block.0.weight" in entries and not motion:
            return "controlnet", "original", prefix
    if "controlnet_cond_embedding.conv_in.weight" in entries and not motion:
        return "controlnet", "diffusers", ""
    if all(key in entries for key in ("encoder.0.weight", "time_embedding.linear_2.weight")):
        return "lite", "diffusers", ""
    if any(re.match(r"(mid_convs|down_res)\.", key) for key in entries):
        return "controlnext", "diffusers", ""
    for prefix in (t2i_keys.PREFIX, ""):
        if f"{prefix}body.0.resnets.0.block1.weight" in entries:
            return "t2i-adapter", "diffusers", prefix
        if any(f"{prefix}body.0.{inner}block1.weight" in entries for inner in ("", "body.0.")):
            return "t2i-adapter", "original", prefix
    held = mistake_in(entries)
    if held is not None:
        raise ValueError(f"{where} is {held}")
    raise ValueError(f"{where} is no adapter that controlkit knows: it holds {first_of(list(entries))}")


def _renamer(kind: str, layout: str, prefix: str, own: Sequence[str]) -> Callable[[str], str | None]:
    """What gives our name of a key, or None for a key that the kind does not have."""
    if kind == "t2i-adapter":
        light = any(re.match(rf"{prefix}body\.0\.in_conv\.", key) for key in own)
        if layout == "diffusers":
            return lambda key: t2i_keys.PREFIX + key.removeprefix(prefix)
        bare = [key.removeprefix(prefix) for key in own]
        blocks = t2i_keys.blocks_of_original(bare)
        return lambda key: t2i_keys.to_diffusers(key, light=light, blocks=blocks)
    if layout == "original" and kind != "control-lora":
        counts = keys.counts_of_original(key.removeprefix(prefix) for key in own)
        return lambda key: keys.to_diffusers(key.removeprefix(prefix), counts) if prefix in key else None
    return lambda key: key  # a network's own names: what it does not have is found where it is built

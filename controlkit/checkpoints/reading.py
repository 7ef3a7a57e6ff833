"""What a checkpoint file is, by its keys and shapes: its family, its parts, and what its U-Net predicts.

Of a .safetensors file the header is read alone, but for one small tensor of an SD2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.checkpoints import names, structure
from controlkit.families import FAMILY_TITLES, family_of
from controlkit.formats import near_misses, recognise
from controlkit.formats.structure import Config, Shapes, encoder_config
from controlkit.formats.weight_file import (
    Stored,
    WeightFile,
    check_floats,
    count_parameters,
    open_weights,
    precision,
)
from controlkit.naming import first_of

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
_TITLES: Mapping[str, str] = {
    names.UNET: "U-Net",
    names.VAE: "autoencoder",
    names.TEXT: "text encoder",
    names.SECOND_TEXT: "second text encoder",
}
_WHERE: Mapping[str, str] = {
    names.UNET: names.UNET_PREFIX,
    names.VAE: names.VAE_PREFIX,
    names.TEXT: "cond_stage_model.",
    names.SECOND_TEXT: names.SECOND_TEXT_PREFIX,
}
_REFINERS = "conditioner.embedders.0.model."
_BYTES: Mapping[str, int] = {"F64": 8, "F16": 2, "BF16": 2, "F8_E4M3": 2, "F8_E5M2": 2}  # as written
_IN_PROJECTION = "self_attn.in_proj."  # q, k and v, one above the other
_UNKNOWN_TO_US: Mapping[str, str] = {  # keys by which ComfyUI, too, tells how such models were trained
    "edm_mean": "with EDM's noise (as Playground 2.5)",
    "edm_vpred.sigma_max": "with EDM's noise",
}
_V_PREDICTION, _ZERO_SNR = "v_pred", "ztsnr"
_TELLING = f"{names.UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"
_MOST_OF_EPSILON = 0.09  # ComfyUI's bound for the spread of that bias, model_detection of SD2
_SAYING = ("modelspec.prediction_type", "modelspec.predict_key")  # ModelSpec's entry, and ComfyUI's for it
_V_WORDS = ("v", "v_prediction", "v-prediction")
_EPSILON_WORDS = ("epsilon", "eps")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A Stable Diffusion in one file. Build it with `open_checkpoint`.

    ``family``: "sd1", "sd2" or "sdxl". ``parts``: of each part every key of the file, with its name there.
    ``configs``: of each part, and of the "scheduler". ``prediction_type`` is what the U-Net was trained to
    output, and ``known_by`` says how that is known.
    """

    path: Path
    family: str
    weights: WeightFile = field(repr=False)
    parts: Mapping[str, Mapping[str, str]] = field(repr=False)
    configs: Mapping[str, Config] = field(repr=False)
    prediction_type: str
    known_by: str

    @property
    def size(self) -> int:
        """In bytes, of the parts: a file may hold more, as averages of a training."""
        return sum(math.prod(entry.shape) * _BYTES.get(entry.dtype, 4) for entry in self._own().values())

    def _own(self) -> dict[str, Stored]:
        return {key: self.weights.entries[key] for part in self.parts.values() for key in part}

    def summary(self) -> str:
        """What it is, in one line: its family, size and precision."""
        own = self._own()
        holes = " that fills holes" if self.configs[names.UNET]["in_channels"] == 9 else ""
        return (
            f"a whole Stable Diffusion ({FAMILY_TITLES[self.family]}){holes} in one file,"
            f" {count_parameters(own):,} parameters, {precision(own)}, {self.weights.size / 1e6:.1f} MB"
        )

    def tensors(self, part: str) -> dict[str, Tensor]:
        """A part's tensors by the names that diffusers and transformers give them, on the CPU.

        They keep the file's precision; 8-bit numbers become float16. Raises ValueError for a damaged file.
        """
        import torch

        found: dict[str, Tensor] = {}
        stored = self.weights.read(self.parts[part])
        for key, name in self.parts[part].items():
            tensor = stored[key]
            if tensor.element_size() == 1:
                tensor = tensor.to(torch.float16)
            found |= _as_stored_there(name, tensor)
        return found


def is_checkpoint(weights: WeightFile) -> bool:
    """Whether a file holds a whole Stable Diffusion and no control network beside it."""
    own = any(key.startswith(names.UNET_PREFIX) for key in weights.entries)
    return own and not any(key.startswith("control_model.") for key in weights.entries)


def open_checkpoint(path: Path, weights: WeightFile | None = None) -> Checkpoint:
    """Look into a checkpoint. ``weights``: the file, where it is open already.

    Raises ValueError, one line that names the file, for one that is missing or damaged, holds something else
    (and says what), lacks a part or a tensor, or was trained in a way that is not supported.
    """
    check_suffix(path, "base")
    weights = weights or open_weights(path, what="base")
    keys = list(weights.entries)
    if not any(key.startswith(names.UNET_PREFIX) for key in keys):
        raise ValueError(f"{path} is no base: it is {what_else(weights)}")
    parts = _parts(weights)
    shapes = {part: Shapes(_entries(weights, own), path) for part, own in parts.items()}
    family = _family(path, keys, shapes)
    for part in names.PARTS if family == "sdxl" else names.PARTS[:3]:
        if part not in shapes:
            where = "conditioner.embedders.0." if (part, family) == (names.TEXT, "sdxl") else _WHERE[part]
            raise ValueError(f"{path} holds no {_TITLES[part]} ({where}): give a checkpoint that is whole")
    predicted, zero_snr, known_by = _prediction(path, weights, family)
    configs = _configs(shapes, family, predicted, from_open_clip=_is_open_clip(keys))
    configs["scheduler"] = structure.scheduler_config(family, prediction_type=predicted, zero_snr=zero_snr)
    return Checkpoint(path, family, weights, parts, configs, predicted, known_by)


def check_suffix(path: Path, what: str) -> None:
    """Raise ValueError for a file that cannot hold weights, going by its name."""
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{what} {path}: this is a file; give the folder that holds the model, or one file of weights"
            f" ({', '.join(SUFFIXES[:2])})"
        )


def what_else(weights: WeightFile) -> str:
    """What a file is that is not what it was taken for, in words."""
    try:
        adapter = recognise.recognise(weights.entries, weights.path)
    except ValueError:
        if any(key.startswith("up_blocks.") for key in weights.entries):
            return (
                "the U-Net of a base alone, in diffusers' names: give the folder that holds all of its parts"
            )
        known = near_misses.mistake_in(weights.entries)
        return known or f"unknown: it holds {first_of(list(weights.entries))}"
    return f"{recognise.KINDS[adapter.kind]}: give it as --adapter KIND={weights.path}"


def _parts(weights: WeightFile) -> dict[str, dict[str, str]]:
    """Of each part its keys and their names there. Raises ValueError for a key that a part does not have."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for key in weights.entries:
        if (place := names.part_of(key)) is not None:
            grouped.setdefault(place, []).append(key)
    parts: dict[str, dict[str, str]] = {}
    for (part, prefix), keys in grouped.items():
        if part in parts:
            raise ValueError(f"{weights.path} holds its {_TITLES[part]} twice, under two names")
        parts[part] = named(weights, part, prefix, keys)
        check_floats({key: weights.entries[key] for key in parts[part]}, weights.path)
    if names.TEXT in parts and _is_open_clip(weights.entries):
        parts[names.TEXT] = _without_the_last_layer(parts[names.TEXT])
    return parts


def named(weights: WeightFile, part: str, prefix: str, keys: Sequence[str]) -> dict[str, str]:
    """A part's keys and their names there, without those that are not needed.

    Raises ValueError for a key that the part does not have.
    """
    name_of = names.namer(part, prefix, (key.removeprefix(prefix) for key in keys))
    found = {key: name_of(key.removeprefix(prefix)) for key in keys}
    strange = [key for key, name in found.items() if name is None]
    if strange:
        bare = {key.removeprefix(prefix): weights.entries[key] for key in strange}
        if part == names.UNET and (held := near_misses.transformer_in(bare)) is not None:
            raise ValueError(f"{weights.path} is no base: it is {held}")
        if (scaled := near_misses.scales_in(strange)) is not None:
            raise ValueError(f"{weights.path} {scaled}")
        raise ValueError(
            f"{weights.path} holds {first_of(strange)}, which no {_TITLES[part]} of SD1, SD2 or SDXL has"
        )
    return {key: name for key, name in found.items() if name}


def _without_the_last_layer(part: Mapping[str, str]) -> dict[str, str]:
    """Of SD2's text encoder what is read: it reads the last layer but one, and no pooled text."""
    start = "text_model.encoder.layers."
    layers = [name.removeprefix(start) for name in part.values() if name.startswith(start)]
    last = max((int(name.split(".")[0]) for name in layers), default=0)
    left = (f"{start}{last}.", "text_projection.")
    return {key: name for key, name in part.items() if not name.startswith(left)}


def _is_open_clip(keys: Any) -> bool:
    """Whether the first text encoder is open_clip's, as SD2's."""
    return any(key.startswith(("cond_stage_model.model.", _REFINERS)) for key in keys)


def _family(path: Path, keys: list[str], shapes: Mapping[str, Shapes]) -> str:
    """The family. Raises ValueError for models that stand beside the three."""
    two_texts = any(key.startswith(names.SECOND_TEXT_PREFIX) for key in keys)
    told_more = "add_embedding.linear_1.weight" in shapes[names.UNET]
    if told_more and not two_texts:
        if any(key.startswith(_REFINERS) for key in keys):
            raise ValueError(
                f"{path} is SDXL's refiner, which is not supported: give the base that it refines"
            )
        if any(key.startswith("cond_stage_model.") for key in keys):
            raise ValueError(f"{path} is told pictures (unCLIP): give its diffusers folder or hub id")
    config = encoder_config(shapes[names.UNET])
    if two_texts and family_of(config) != "sdxl":
        raise ValueError(f"{path} has two text encoders, but a U-Net that is not SDXL's")
    return family_of(config)


def _prediction(path: Path, weights: WeightFile, family: str) -> tuple[str, bool, str]:
    """What the U-Net predicts, whether the noise ends at zero signal, and how that is known.

    Raises ValueError for what is not supported.
    """
    for key, how in _UNKNOWN_TO_US.items():
        if key in weights.entries:
            raise ValueError(f"{path} was trained {how}, which is not supported")
    zero_snr = _ZERO_SNR in weights.entries
    if (beside := _by_the_yaml(path)) is not None:
        return beside, zero_snr, "its .yaml"
    said = next((weights.metadata[key].lower() for key in _SAYING if key in weights.metadata), "")
    if said in _V_WORDS + _EPSILON_WORDS:
        return _v_or_epsilon(said in _V_WORDS), zero_snr, "its header"
    if _V_PREDICTION in weights.entries:
        return "v_prediction", zero_snr, f"its key {_V_PREDICTION}"
    holes = weights.entries[f"{names.UNET_PREFIX}input_blocks.0.0.weight"].shape[1] != 4
    if family != "sd2" or holes or _TELLING not in weights.entries:
        return "epsilon", zero_snr, "its family"
    import torch

    spread = float(torch.std(weights.read([_TELLING])[_TELLING].float(), unbiased=False))
    return _v_or_epsilon(spread > _MOST_OF_EPSILON), zero_snr, "a guess from its weights, as ComfyUI's"


def _v_or_epsilon(is_v: bool) -> str:
    return "v_prediction" if is_v else "epsilon"


def _by_the_yaml(path: Path) -> str | None:
    """What a configuration beside the file, of the same name, says (A1111's custom); None without one.

    Raises ValueError for one that cannot be read.
    """
    beside = path.with_suffix(".yaml")
    if not beside.is_file():
        return None
    import yaml

    try:
        told = yaml.safe_load(beside.read_text(encoding="utf-8"))
        parameters = told["model"]["params"]
        said = parameters.get("parameterization", "eps")
        denoiser = parameters.get("denoiser_config", {}).get("params", {})  # how SDXL's code tells it
        scaling = str(denoiser.get("scaling_config", {}).get("target", ""))
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{beside} is no configuration of a Stable Diffusion") from error
    return _v_or_epsilon(said == "v" or scaling.endswith("VScaling"))


def _configs(
    shapes: Mapping[str, Shapes], family: str, prediction_type: str, *, from_open_clip: bool
) -> dict[str, Config]:
    """The configurations of the parts. Raises ValueError for missing tensors."""
    texts = {
        names.TEXT: structure.text_config(shapes[names.TEXT], from_open_clip=from_open_clip, projected=False)
    }
    if family == "sdxl":
        second = structure.text_config(shapes[names.SECOND_TEXT], from_open_clip=True, projected=True)
        texts[names.SECOND_TEXT] = second
    pooled = int(texts[names.SECOND_TEXT]["projection_dim"]) if family == "sdxl" else 0
    unet = structure.unet_config(
        shapes[names.UNET], family=family, prediction_type=prediction_type, pooled=pooled
    )
    vae = structure.vae_config(shapes[names.VAE], scaling_factor=structure.scaling_factor(family))
    return {names.UNET: unet, names.VAE: vae, **texts}


def _entries(weights: WeightFile, part: Mapping[str, str]) -> dict[str, Stored]:
    """A part's entries by their names there."""
    found: dict[str, Stored] = {}
    for key, name in part.items():
        entry = weights.entries[key]
        if _IN_PROJECTION in name:
            third = (entry.shape[0] // 3, *entry.shape[1:])
            found |= {one: Stored(entry.dtype, third) for one in _three(name)}
        else:
            turned = name == "text_projection.weight"
            found[name] = Stored(entry.dtype, entry.shape[::-1]) if turned else entry
    return found


def _as_stored_there(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A tensor as transformers stores it: open_clip has three projections in one, and one transposed."""
    if _IN_PROJECTION in name:
        return {one: part.clone() for one, part in zip(_three(name), tensor.chunk(3), strict=True)}
    return {name: tensor.T.contiguous() if name == "text_projection.weight" else tensor.contiguous()}


def _three(name: str) -> list[str]:
    return [name.replace(_IN_PROJECTION, f"self_attn.{one}_proj.") for one in "qkv"]

"""LoRA files on a base: small changes of its weights, trained apart (Hu et al. 2021, arXiv:2106.09685).

For a layer's weight W the file holds two factors, A (rank x in) and B (out x rank), and a number alpha:

    W'  =  W + weight * (alpha / rank) * B A

merged once, in float32, into a copy of the base. The base that was given stays as it is, and the copy shares
every tensor with it that no LoRA changes. The result equals diffusers' `load_lora_weights` and `fuse_lora`
(tests/test_loras.py); it needs no peft. `lora_keys` has the names of the layers in files.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit import limits, notices
from controlkit.base import FAMILY_TITLES, check_base_given
from controlkit.files import as_text
from controlkit.folders import alone, quiet_libraries, read_header, read_json, read_state
from controlkit.hub import LORA_FILE, PEFT_CONFIG, find_file, find_weight_file
from controlkit.lora_keys import Factors, by_layer, is_factor, is_peft, other_network
from controlkit.naming import check_list_of

if TYPE_CHECKING:
    from controlkit.base import Base

_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
METADATA_KEY = "lora_adapter_metadata"  # in the header of files that diffusers wrote

_OTHER_KINDS: Mapping[str, str] = {  # part of a key -> what it belongs to
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".oft_": "OFT",
    "lora_mid": "LoCon with a core tensor",
}
_TEXT_WIDTHS: Mapping[int, str] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Lora:
    """A LoRA to put onto a base.

    source: a .safetensors file, a folder that holds one, or a hub id, ``owner/name`` or
    ``owner/name/file.safetensors``. weight: factor on its change, from -10 to 10; 1 is as trained, and a
    negative one is away from it.

    Raises ValueError for a weight outside its range.
    """

    source: str | os.PathLike[str]
    weight: float = 1.0

    def __post_init__(self) -> None:
        limits.check_lora_weight(self.weight)


@dataclass(frozen=True, eq=False)
class Layer:
    """What a file changes in one layer.

    network: "unet", "text_encoder" or "text_encoder_2". path: of the layer in it. down: (rank, in) or (rank,
    in, kh, kw); up: (out, rank) or (out, rank, 1, 1). scale: alpha / rank.
    """

    network: str
    path: str
    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        return (len(self.up), *self.down.shape[1:])

    def delta(self, like: Tensor) -> Tensor:
        """scale * up @ down, float32, with the shape and on the device of a weight."""
        up, down = (factor.to(like.device, torch.float32).flatten(1) for factor in (self.up, self.down))
        return self.scale * (up @ down).reshape(like.shape)


@alone
def with_loras(base: Base, loras: Sequence[Lora]) -> Base:
    """A base whose weights hold the LoRAs; they add up, in any order. The given base is not changed.

    Raises ValueError, naming the file, for one that leads nowhere, is damaged or a pickle, holds something
    else than a LoRA of linear and convolution layers (DoRA, LoHa ...), numbers that are not finite, or was
    made for a base of another family (the sizes are named).
    """
    check_base_given(base)
    check_list_of("loras", loras, Lora, 'Lora("file.safetensors")')
    networks = _networks(base)
    changes: dict[str, dict[str, list[tuple[float, Layer]]]] = {}
    for lora in loras:
        for layer in read_lora(lora.source, base):
            of_network = changes.setdefault(layer.network, {})
            of_network.setdefault(layer.path, []).append((lora.weight, layer))
    merged = {name: _merged(networks[name], layers) for name, layers in changes.items()}
    texts = [name for name in networks if name != "unet"]
    return replace(
        base,
        unet=merged.get("unet", base.unet),
        text_encoders=[merged.get(name, networks[name]) for name in texts],
    )


def read_lora(source: str | os.PathLike[str], base: Base) -> list[Layer]:
    """The layers of a LoRA, checked against the base's. Raises ValueError as `with_loras`."""
    source = as_text("a LoRA", source)
    file = find_weight_file(source, what="LoRA", usual=LORA_FILE)
    header = read_header(file)
    told = header.pop("__metadata__", {})
    _check_network(file, header, base)
    _check_keys(file, header)
    _check_family(file, header, base)
    with quiet_libraries():
        found = by_layer(file, read_state(file, what="LoRA"), base.unet.config)
    rules = _rules(file, told) or (_peft_rules(source, file) if is_peft(header) else {})
    layers = [_layer(file, base, name, factors, rules) for name, factors in found.items()]
    if not layers:
        raise ValueError(f"{file} is empty: it holds no LoRA")
    return layers


def _networks(base: Base) -> dict[str, Any]:
    return dict(zip(_NETWORKS, [base.unet, *base.text_encoders], strict=False))


def _merged(network: Any, layers: Mapping[str, Sequence[tuple[float, Layer]]]) -> Any:
    """A copy of the network with other weights in these layers, and the same tensors everywhere else."""
    copied = shallow_copy(network)
    for path, terms in layers.items():
        module = copied.get_submodule(path)
        total = module.weight.float()
        for weight, layer in terms:
            total = total + weight * layer.delta(total)
        module.weight = nn.Parameter(total.to(module.weight.dtype), requires_grad=False)
    return copied


def shallow_copy(network: Any) -> Any:
    """A copy of a network's modules that shares all of its tensors."""
    return copy.deepcopy(network, {id(t): t for t in (*network.parameters(), *network.buffers())})


def _check_network(file: Path, keys: Iterable[str], base: Base) -> None:
    """Raise ValueError for a LoRA that was made for something else than a U-Net of Stable Diffusion."""
    other = other_network(keys)
    if other is not None:
        what, key = other
        raise ValueError(
            f"{file} is a LoRA for {what} ({key}), not for the {FAMILY_TITLES[base.family]} base {base.name}"
        )


def _check_keys(file: Path, keys: Iterable[str]) -> None:
    """Raise ValueError for a file in which anything but factors and alphas stands."""
    keys = list(keys)
    strange = next((key for key in keys if not (is_factor(key) or key.endswith(".alpha"))), None)
    if strange is None:
        return
    kind = next((kind for key in keys for part, kind in _OTHER_KINDS.items() if part in key), None)
    if kind is not None:
        first = next(key for key in keys if any(part in key for part in _OTHER_KINDS))
        raise ValueError(f"{file} is a {kind} ({first}); only LoRA is supported")
    if not any(is_factor(key) for key in keys):
        raise ValueError(f"{file} is not a LoRA: it holds {strange}")
    raise ValueError(f"{file} holds {strange}, which is no part of a LoRA of linear and convolution layers")


def _check_family(file: Path, header: Mapping[str, Any], base: Base) -> None:
    """Raise ValueError for a LoRA whose cross-attentions read a text of another width."""
    expected = base.unet.config.cross_attention_dim
    for key, entry in header.items():
        reads_text = "attn2" in key and re.search(r"to_[kv]", key)
        if not (reads_text and re.search(r"down|lora_A", key)) or len(entry["shape"]) < 2:
            continue
        width = entry["shape"][1]
        if width != expected:
            family = _TEXT_WIDTHS.get(width)
            made = f", as {FAMILY_TITLES[family]}" if family else ""
            raise ValueError(
                f"{file} was made for a base whose text is {width} wide{made}; that of the"
                f" {FAMILY_TITLES[base.family]} base {base.name} is {expected} wide"
            )
        return


def _rules(file: Path, told: Mapping[str, str]) -> Mapping[str, Any]:
    """What diffusers wrote into the header about alphas, if it did."""
    try:
        rules = json.loads(told.get(METADATA_KEY, "{}"))
        if not isinstance(rules, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise ValueError(f"{file}: its {METADATA_KEY} cannot be read: {error}") from error
    return rules


def _peft_rules(source: str, file: Path) -> Mapping[str, Any]:
    """The same from the configuration that peft writes beside a file: its file is of one network."""
    beside = file.with_name(PEFT_CONFIG)
    if not (beside.is_file() or Path(source).expanduser().exists()):
        owner, name, *rest = PurePosixPath(source).parts
        place = PurePosixPath(*rest[:-1], PEFT_CONFIG)
        with contextlib.suppress(ValueError):  # not there either, or not to be had
            beside = find_file(f"{owner}/{name}", str(place), hint="name that folder")
    if not beside.is_file():
        notices.warn(
            f"{file} says nothing of its strength, which peft writes into {PEFT_CONFIG} beside it, and that"
            " is not there: its rank is taken for its alpha"
        )
        return {}
    config = read_json(beside)
    return {f"{network}.{key}": value for network in _NETWORKS for key, value in config.items()}


def _layer(
    file: Path,
    base: Base,
    name: str,
    factors: Factors,
    rules: Mapping[str, Any],
) -> Layer:
    """One layer, checked against the base. Raises ValueError, naming the file and the layer."""
    network, _, path = name.partition(".")
    down, up = factors.down, factors.up
    for factor in (down, up):
        if not (factor.is_floating_point() and factor.ndim in (2, 4) and torch.isfinite(factor).all()):
            raise ValueError(f"{file} is damaged: {name} holds no finite matrix")
    if down.shape[0] != up.shape[1] or up[0, 0].numel() != 1 or len(down) == 0:
        raise ValueError(
            f"{file} is damaged: {name} has factors {_by(up.shape)} and {_by(down.shape)},"
            " which no product fits"
        )
    rank = len(down)
    alpha = factors.alpha
    scale = _scale_by_rules(rules, network, path, rank=rank) if alpha is None else alpha / rank
    if not math.isfinite(scale):
        raise ValueError(f"{file} is damaged: the alpha of {name} in its {METADATA_KEY} is no finite number")
    layer = Layer(network, _path(file, base, network, path, factors.key), down, up, scale)
    weight = _networks(base)[network].get_submodule(layer.path).weight
    if _without_ones(weight.shape) != _without_ones(layer.shape):
        raise ValueError(
            f"{file} was made for another base than {base.name}: {name} is {_by(layer.shape)} in it and"
            f" {_by(weight.shape)} in the base"
        )
    return layer


def _scale_by_rules(rules: Mapping[str, Any], network: str, path: str, *, rank: int) -> float:
    """alpha / rank as peft reads its configuration; 1 where there is none."""
    alpha = rules.get(f"{network}.lora_alpha", rank)
    for pattern, value in (rules.get(f"{network}.alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if rules.get(f"{network}.use_rslora") else rank)


def _path(file: Path, base: Base, network: str, path: str, key: str) -> str:
    """The layer's path in this version of the libraries, which move CLIP's ``text_model``.

    key: the file's own name of the layer.
    """
    modules = dict(_networks(base)[network].named_modules()) if network in _networks(base) else {}
    for name in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        if isinstance(modules.get(name), nn.Linear | nn.Conv2d):
            return name
    name = f"{network}.{path}" if "." in key else key  # without dots it was taken apart by guessing
    raise ValueError(f"{file} was made for another base than {base.name}, which has no layer {name}")


def _without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A linear layer's shape for a convolution of one pixel."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in _without_ones(shape))

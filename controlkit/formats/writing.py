"""Writing a network into one file: diffusers' names or the original's, and a header that says what it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlkit import files
from controlkit.folders import write_weights
from controlkit.formats import keys, t2i_keys
from controlkit.formats.building import check_finite
from controlkit.formats.description import AdapterInfo, header_entries
from controlkit.formats.structure import CLASS_NAMES
from controlkit.naming import first_of

LAYOUTS: Mapping[str, str] = {
    "diffusers": "a folder, as diffusers saves it",
    "single": "one file with diffusers' names",
    "original": "one file with the original project's names",
}
"""How an adapter can be written."""
SUFFIX = ".safetensors"

# A difference and a Control-LoRA become a ControlNet, which stands first in the table.
_KINDS = {name: kind for kind, name in reversed(list(CLASS_NAMES.items()))}


def kind_of(network: nn.Module) -> str:
    """The kind (of `recognise.KINDS`) of a network. Raises ValueError for one that is no adapter."""
    name = type(network).__name__
    if name == "LLLite":
        raise ValueError("a ControlNet-LLLite is read only: it cannot be written in any layout")
    if name not in _KINDS:
        raise ValueError(f"a {name} is no adapter that can be written; known are {', '.join(_KINDS)}")
    return _KINDS[name]


def config_of(network: Any) -> dict[str, Any]:
    """A network's configuration as JSON values, without the path on the machine that trained it."""
    config: dict[str, Any] = json.loads(network.to_json_string())
    config.pop("_name_or_path", None)
    return config


def check_single_name(path: str | Path) -> None:
    """Raise ValueError unless a path can be that of one weight file."""
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"cannot write {path}: the name of one file of weights must end with {SUFFIX}")


def stored(
    state: Mapping[str, Tensor], dtype: torch.dtype | None, what: str = "adapter"
) -> dict[str, Tensor]:
    """A network's tensors as they are stored, on the CPU. Raises ValueError if one is not finite then."""
    tensors = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in state.items()}
    as_type = f" as {str(dtype).removeprefix('torch.')}" if dtype else ""
    check_finite(tensors, f"cannot save the {what}{as_type}")
    return tensors


def write_file(
    network: nn.Module,
    path: str | Path,
    *,
    layout: str,
    info: AdapterInfo,
    dtype: torch.dtype | None = None,
    date: str = "",
) -> None:
    """Write a network into one safetensors file, all of it or nothing. Same arguments, same bytes.

    ``layout``: "single" or "original". ``dtype`` None keeps the network's precision. Raises ValueError for a
    layout that the kind does not have, a name without .safetensors, a weight that is not finite (in
    ``dtype``), or where it cannot be written.
    """
    kind = kind_of(network)
    check_single_name(path)
    names = original_names(network.state_dict(), kind) if layout == "original" else None
    tensors = stored(network.state_dict(), dtype)
    if names is not None:
        tensors = {names[key]: tensor for key, tensor in tensors.items()}
    write_tensors(
        path,
        tensors,
        header_entries(
            info,
            kind=kind,
            layout="original" if names else "diffusers",
            structure=config_of(network),
            date=date,
        ),
    )


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, atomically, with the mode that the umask gives. Raises ValueError."""
    with files.replace_file(path) as temporary:
        write_weights(temporary, tensors, metadata)


def original_names(ours: Iterable[str], kind: str) -> dict[str, str]:
    """The original project's name of every tensor. Raises ValueError for a kind or a tensor that it lacks."""
    ours = list(ours)
    if kind == "controlnet":
        counts = keys.counts_of_diffusers(ours)
        names = {key: keys.to_original(key, counts) for key in ours}
        prefix = keys.PREFIX  # the original's own loader wants it; others take it or leave it
    elif kind == "t2i-adapter":
        light = not any(key.startswith(f"{t2i_keys.PREFIX}conv_in.") for key in ours)
        blocks = t2i_keys.blocks_of_diffusers(ours)
        names = {key: t2i_keys.to_original(key, light=light, blocks=blocks) for key in ours}
        prefix = ""
    else:
        raise ValueError(f"a {CLASS_NAMES[kind]} has no original layout: write it as diffusers or single")
    without = [key for key, name in names.items() if name is None]
    if without:
        raise ValueError(f"the original layout has no place for {first_of(without)}")
    return {key: f"{prefix}{name}" for key, name in names.items()}

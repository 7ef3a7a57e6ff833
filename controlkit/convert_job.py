"""`controlkit convert`: an adapter file in another layout or precision, or made whole with its base."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from controlkit import files, limits, naming
from controlkit.base_structure import structure_at_hand
from controlkit.families import BUNDLED
from controlkit.formats.adapter_file import AdapterFile, is_pooled_by_name, open_adapter_file
from controlkit.formats.finding import BUNDLED_ADAPTERS, check_only_adapter
from controlkit.formats.fitting import BaseStructure, check_kind_fits
from controlkit.formats.weight_file import SUFFIXES
from controlkit.precisions import torch_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from controlkit.checkpoints.reading import Checkpoint
    from controlkit.formats.description import AdapterInfo

LAYOUTS = ("diffusers", "single", "original", "control-lora")
DEFAULT_RANK = 128


class Report(Protocol):
    """Who is told what happens."""

    def status(self, text: str) -> None:
        """What is being done now."""


@dataclass(frozen=True)
class Plan:
    """A checked conversion. ``dtype``: torch's name, "" for the file's own. ``rank``: None is the rank that
    the file was trained with, or `DEFAULT_RANK`."""

    source: str
    output: Path
    layout: str
    dtype: str
    base: str | None
    rank: int | None


def plan(
    source: str,
    output: str,
    *,
    to: str,
    dtype: str | None = None,
    base: str | None = None,
    rank: int | None = None,
) -> Plan:
    """Check what is asked for, before anything is loaded.

    Raises ValueError for an unknown layout or precision, a rank outside 1 to 1024 or of no Control-LoRA, one
    without a base, a name that does not suit the layout, or where nothing can be written.
    """
    if to not in LAYOUTS:
        raise naming.unknown("layout", to, LAYOUTS)
    precision = check_precision(dtype)
    if rank is not None and to != "control-lora":
        raise ValueError(f"--rank {rank} is a Control-LoRA's: it needs --to control-lora")
    limits.check_rank(DEFAULT_RANK if rank is None else rank)
    if to == "control-lora" and base is None:
        raise ValueError("a Control-LoRA holds changes to a base's weights: name that base (--base)")
    path = Path(output)
    if (path.suffix in SUFFIXES) == (to == "diffusers"):
        wanted = (
            "a folder: give a name without suffix" if to == "diffusers" else "one file: name it .safetensors"
        )
        raise ValueError(f"--to {to} writes {wanted}, not {output}")
    if path.suffix != ".safetensors" and to != "diffusers":
        raise ValueError(f"cannot write {output}: pickles are only read; name it .safetensors")
    check_apart(source, path, bundled=BUNDLED_ADAPTERS)
    if base is not None:
        check_apart(base, path, bundled=BUNDLED)
    files.check_writable(path, folder=to == "diffusers")
    check_replaceable(path)
    return Plan(source, path, to, precision, base, rank)


def run(plan: Plan, report: Report) -> list[str]:
    """Convert, and return lines that say what was written and how to use it.

    Raises ValueError, one line, for what `open_adapter_file`, `build_network` and `write_adapter` refuse.
    """
    from controlkit.info_job import how_to_use_file, opened_if_whole, summary

    report.status(f"reading {plan.source}")
    whole = opened_if_whole(plan.source)
    if whole is not None:
        return _write_parts(whole, plan, report)
    file = open_adapter_file(plan.source)
    unet = None if plan.base is None else _unet(plan.base, file, plan, report)
    report.status("loading the libraries")
    from controlkit.formats.building import build_network, heads_are_known

    if unet is None and plan.layout in ("single", "original") and not heads_are_known(file):
        notes = _rename(plan, file, report)
    else:
        network = build_network(file, unet=unet)
        report.status(f"writing {plan.output}")
        notes = _write(plan, file, network, unet)
    place = as_path(plan.output)
    written = open_adapter_file(place)
    return [
        f"wrote {plan.output}: {summary(written)}",
        *notes,
        *_of_pooling(file, written),
        *_of_size(file, written),
        *_of_readers(written, plan),
        "use it with:",
        f"  {how_to_use_file(written, place, plan.base)}",
    ]


def _of_pooling(file: AdapterFile, written: AdapterFile) -> list[str]:
    """What the file's name decided, and what its new one does, of pooling, which no shape tells."""
    from controlkit.info_job import POOLED_BY_NAME

    pooled, pools = (bool(one.config.get("global_pool_conditions")) for one in (file, written))
    lines = [f"{file.path.name} {POOLED_BY_NAME}"] if pooled and is_pooled_by_name(file) else []
    if pooled != pools:
        lines.append(
            f"{written.path.name} {'pools' if pools else 'does not pool'} what it adds, by its name, unlike"
            f" {file.path.name}: name it {'without' if pools else 'with'} the word shuffle, or give --base"
        )
    return lines


def _of_size(file: AdapterFile, written: AdapterFile) -> list[str]:
    """Whether a Control-LoRA, which is there to be small, is no smaller than what it was made from."""
    before, now = (one.weights.size for one in (file, written))
    if written.kind != "control-lora" or now < before:
        return []
    sizes = f"{now / 1e6:.1f} MB, from {before / 1e6:.1f} MB"
    return [f"it is not smaller than what it was made from ({sizes}): a lower --rank makes it so"]


def _of_readers(written: AdapterFile, plan: Plan) -> list[str]:
    """Who cannot read what was written: of a light T2I-Adapter others know the original's keys alone."""
    if plan.layout != "single" or written.config.get("adapter_type") != "light_adapter":
        return []
    return ["ComfyUI and sd-webui-controlnet read a light T2I-Adapter by the original's keys: --to original"]


def _write_parts(checkpoint: Checkpoint, plan: Plan, report: Report) -> list[str]:
    """Write the parts of a whole base as a folder; lines that say what was written."""
    import torch

    from controlkit.checkpoints.writing import write_folder
    from controlkit.info_job import how_to_use_base

    if plan.layout != "diffusers":
        raise ValueError(
            f"{plan.source} is a whole Stable Diffusion: its parts are written as a folder (--to diffusers)"
        )
    if plan.base is not None:
        raise ValueError(f"{plan.source} is a whole Stable Diffusion: it needs no --base")
    if (
        plan.output.is_dir()
        and any(plan.output.iterdir())
        and not (plan.output / "model_index.json").is_file()
    ):
        raise ValueError(f"cannot write {plan.output}: the folder holds something else than a base")
    report.status(f"writing {plan.output}")
    write_folder(checkpoint, plan.output, dtype=getattr(torch, plan.dtype) if plan.dtype else None)
    return [
        f"wrote {plan.output}: the parts of {checkpoint.summary()}",
        f"prediction type: {checkpoint.prediction_type} (by {checkpoint.known_by})",
        "use it with:",
        f"  {how_to_use_base(as_path(plan.output))}",
    ]


def check_precision(dtype: str | None) -> str:
    """torch's name of a precision; "" for None. Raises ValueError for an unknown one."""
    return "" if dtype is None else torch_name(dtype)


def as_path(path: Path) -> str:
    """A path as commands take it: never as the name of something bundled, which comes first."""
    return f"./{path}" if str(path) in (*BUNDLED_ADAPTERS, *BUNDLED) else str(path)


def check_replaceable(output: Path) -> None:
    """Raise ValueError where a folder that would be replaced holds files of others, or is the current one."""
    if not output.is_dir():
        return
    if Path(os.path.realpath(output)) in (here := Path(os.path.realpath(os.curdir)), *here.parents):
        raise ValueError(f"cannot write {output}: the command runs in it, and the folder would be replaced")
    check_only_adapter(output)


def check_apart(source: str, output: Path, *, bundled: Collection[str]) -> None:
    """Raise ValueError where writing would destroy what it is made from: an adapter, or a base.

    bundled: the names that stand for something bundled, whatever else has them here.
    """
    if source in bundled:
        return
    read, written = Path(os.path.realpath(os.path.expanduser(source))), Path(os.path.realpath(output))
    is_a_part = read.is_dir() and written.is_file() and (read in written.parents or _is_linked(read, written))
    if read.exists() and (read == written or written in read.parents or is_a_part):
        raise ValueError(f"{output} would overwrite {source}, which it is made from")


def _is_linked(folder: Path, file: Path) -> bool:
    """Whether a link in a folder leads to a file, as in the hub's cache."""
    return any(os.path.realpath(path) == str(file) for path in folder.iterdir())


def _unet(name: str, file: AdapterFile, plan: Plan, report: Report) -> Any:
    """The base's U-Net, which the file is checked against."""
    known = structure_at_hand(name)
    if known is not None:
        check_kind_fits(file.kind, file.config, file.family, known, name=plan.source)
    report.status(f"loading the U-Net of the base {name}")
    from controlkit.base_parts import load_unet

    unet = load_unet(name)
    check_kind_fits(file.kind, file.config, file.family, BaseStructure(name, unet.config), name=plan.source)
    return unet


def _write(plan: Plan, file: AdapterFile, network: nn.Module, unet: Any) -> list[str]:
    """Write the network; lines that say what was lost."""
    import torch

    from controlkit.adapters import write_adapter
    from controlkit.formats import writing
    from controlkit.formats.description import header_entries

    dtype: torch.dtype | None = getattr(torch, plan.dtype) if plan.dtype else own_dtype(file)
    if plan.layout != "control-lora":
        write_adapter(network, plan.output, layout=plan.layout, dtype=dtype, info=file.info)
        return []
    if writing.kind_of(network) != "controlnet":
        raise ValueError(f"{plan.source} is a {type(network).__name__}: only a ControlNet has a Control-LoRA")
    from controlkit.formats import control_lora
    from controlkit.formats.building import check_finite
    from controlkit.formats.structure import IN_NO_SHAPE

    whole, trunk = network.state_dict(), unet.state_dict()
    rank = plan.rank or _trained_rank(file.info) or DEFAULT_RANK
    tensors = control_lora.reduce(whole, trunk, rank)
    tensors = {key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}
    check_finite(tensors, f"cannot save the Control-LoRA as {str(dtype or 'it is').removeprefix('torch.')}")
    config: Any = network.config
    entries = header_entries(
        file.info,
        kind="control-lora",
        layout="original",
        structure={key: config[key] for key in IN_NO_SHAPE},
    )
    writing.write_tensors(plan.output, tensors, entries)
    kept = control_lora.kept_share(whole, trunk, tensors)
    return [f"rank {rank} keeps {kept:.1%} of what was changed in its base's weights"]


def _rename(plan: Plan, file: AdapterFile, report: Report) -> list[str]:
    """Write a file's tensors under other names or in another precision, as they lie there.

    That needs no network, and of its configuration the header then says as little as the file did.
    """
    import torch

    from controlkit.formats import writing
    from controlkit.formats.building import check_finite, check_whole
    from controlkit.formats.description import header_entries

    check_whole(file, None)
    state = file.tensors()
    check_finite(state, str(file.path))
    names = writing.original_names(state, file.kind) if plan.layout == "original" else {}
    report.status(f"writing {plan.output}")
    dtype: torch.dtype | None = getattr(torch, plan.dtype) if plan.dtype else None
    tensors = {names.get(key, key): tensor for key, tensor in writing.stored(state, dtype).items()}
    layout = "original" if names else "diffusers"
    writing.write_tensors(plan.output, tensors, header_entries(file.info, kind=file.kind, layout=layout))
    return []


def _trained_rank(info: AdapterInfo) -> int | None:
    """The rank of the updates that a Control-LoRA was trained as, by its header; None for other adapters."""
    recipe = info.training.get("recipe")
    if not isinstance(recipe, Mapping) or recipe.get("adapter") != "control-lora":
        return None
    rank = recipe.get("rank")
    return rank if isinstance(rank, int) and 1 <= rank <= limits.MAX_RANK else None


def own_dtype(file: AdapterFile) -> torch.dtype | None:
    """The file's one precision; None where it is mixed, and each tensor keeps its own."""
    import torch

    name = file.dtype
    return None if name.startswith("mixed") else getattr(torch, name)

"""Adapters: control networks on disk, what a file says of itself, and whether it fits a base.

On disk an adapter is the folder that ``diffusers.ControlNetModel.save_pretrained`` writes (``config.json``
and ``diffusion_pytorch_model.safetensors``), so other software loads it as it is, or one file in any of the
layouts that ``formats/`` knows. The header of the weight file says what the map is, which base family it is
for and how it was trained (``formats/description.py``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from controlkit import files, known_adapters, notices
from controlkit.base import BUNDLED as BUNDLED_BASES
from controlkit.base import Base, check_base_given
from controlkit.class_labels import check_labels_fit
from controlkit.controlnet import lock
from controlkit.devices import check_device, check_dtype
from controlkit.folders import (
    alone,
    is_pickle,
    load_part,
    read_header,
    read_json,
    weight_files,
    write_weights,
)
from controlkit.formats import writing
from controlkit.formats.adapter_file import (
    check_config,
    folder_config,
    hint_channels,
    is_as_saved,
    of_kind,
    open_adapter_file,
)
from controlkit.formats.building import build_network, check_finite
from controlkit.formats.description import MAPS as MAPS
from controlkit.formats.description import AdapterInfo as AdapterInfo
from controlkit.formats.description import MapSpec as MapSpec
from controlkit.formats.description import described_by_others, header_entries, read_description
from controlkit.formats.finding import BUNDLED_ADAPTERS as BUNDLED_ADAPTERS
from controlkit.formats.finding import check_adapter as check_adapter
from controlkit.formats.finding import check_only_adapter, find_adapter_file, find_adapter_folder
from controlkit.formats.fitting import BaseStructure, check_kind_fits, check_sizes, config_family
from controlkit.formats.hashing import check_hash
from controlkit.kinds import kind_of
from controlkit.naming import unknown

if TYPE_CHECKING:
    from diffusers import ControlNetModel
    from torch import nn

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: the control network, what it says of itself, and the name it was asked for by."""

    controlnet: Any = field(repr=False)
    info: AdapterInfo
    name: str


def default_adapter(kind: str, base: Base) -> str:
    """The adapter to use for a kind of map when none is named: bundled for a bundled base, else a hub id.

    Raises ValueError for a kind that has none.
    """
    names = {name: name for name in BUNDLED_ADAPTERS} if base.name in BUNDLED_BASES else None
    known = {kind: adapter.name for kind, adapter in known_adapters.defaults(base.family).items()}
    choices = names or known
    wanted = known_adapters.same_kind(kind)
    if wanted not in choices:
        raise unknown(f"control for the base {base.name}", kind, choices)
    return choices[wanted]


@alone
def load_adapter(
    name_or_path: str | os.PathLike[str],
    *,
    base: Base,
    kind: str = "",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> Adapter:
    """Load an adapter that fits ``base``: a bundled name, a folder, a hub id, or one file. It comes locked.

    A file may be of any kind and layout that `formats.adapter_file.open_adapter_file` reads, lie on the hub
    (``owner/name/path/to/file.safetensors``), or alone in a folder. Its network is of one of the kinds in
    `kinds.py`. ``kind``: of map that it is for, where the caller knows; a ControlNet in the original's layout
    does not say whether it pools its residuals, and one for "shuffle" does (what the file says comes first).
    ``device`` and ``dtype`` are the base's unless given. Warns when the adapter was trained for another
    prediction type than the base's.

    Raises ValueError, one line within about 5 seconds, for a name that leads nowhere, a folder or file that
    holds something else, damaged or non-finite weights, a network whose sizes are not the base's (both are
    named), a device that is not there, or an unknown precision.
    """
    check_base_given(base)
    name_or_path = files.as_text("an adapter", name_or_path)
    place = base.device if device is None else check_device(device)
    info, controlnet = _load(name_or_path, base, kind=kind, dtype=check_dtype(dtype or base.dtype))
    if info.prediction_type not in ("", base.prediction_type):
        notices.warn(
            f"adapter {name_or_path} was trained for {info.prediction_type} and the base {base.name} predicts"
            f" {base.prediction_type}: it may follow its map less well",
            stacklevel=2,
        )
    if not info.map.kind:
        info = replace(info, map=_published_map(name_or_path) or info.map)
    return Adapter(lock(controlnet).to(place), info, name_or_path)


def _load(name_or_path: str, base: Base, *, kind: str, dtype: torch.dtype) -> tuple[AdapterInfo, Any]:
    """What an adapter says of itself, and its network on the CPU; that it fits is checked before minutes of
    loading."""
    file = find_adapter_file(name_or_path)
    if file is None:
        folder = find_adapter_folder(name_or_path)
        config = folder_config(folder)
        if config["_class_name"] == "ControlNetModel" and is_as_saved(folder):
            try:
                _check_sizes(config, base, name=name_or_path)
                return read_info(folder), _load_network(folder, dtype=dtype)
            except ValueError:
                _check_config(name_or_path)
                raise
    opened = open_adapter_file(name_or_path)
    if file is None:
        check_config(opened)
    check_kind_fits(opened.kind, opened.config, opened.family, structure_of(base), name=name_or_path)
    channels = hint_channels(opened.config)
    if opened.info.map.channels != channels:
        raise ValueError(
            f"{name_or_path} says that its maps have {opened.info.map.channels} channels,"
            f" and its network takes {channels}"
        )
    return opened.info, build_network(of_kind(opened, kind), unet=base.unet, dtype=dtype)


def _check_config(folder: str) -> None:
    """Say more than that a folder cannot be loaded, where its config.json is another network's."""
    try:
        file = open_adapter_file(folder)
    except ValueError:
        return
    check_config(file)


def read_info(folder: Path) -> AdapterInfo:
    """What the adapter in ``folder`` says of itself; a file by other software leaves all but the structure
    open.

    Raises ValueError naming the file if its header or its description cannot be read.
    """
    config = read_json(folder / "config.json")
    file = weight_files(folder)[0]
    metadata = {} if is_pickle(file) else read_header(file).get("__metadata__", {})
    info, _ = read_description(metadata, file)
    return info or _info_of(config, metadata)


def _info_of(config: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> AdapterInfo:
    """What a network's configuration tells, and a header by others."""
    return described_by_others(metadata or {}, channels=hint_channels(config), family=config_family(config))


def save_adapter(
    controlnet: nn.Module,
    folder: str | Path,
    *,
    info: AdapterInfo,
    dtype: torch.dtype | None = torch.float16,
    date: str = "",
    replaces_all: bool = False,
) -> None:
    """Write an adapter folder, all of it or nothing. The same arguments give the same bytes.

    The network itself keeps its precision; ``dtype`` is the file's, and None keeps the network's. ``date``:
    ISO 8601, for the header; none is written unless given. A folder that already holds an adapter is
    replaced; ``replaces_all``: whatever else it holds, such as a model card.

    Raises ValueError if the folder holds something else, too, or cannot be written, or if a weight is not
    finite (in ``dtype``).
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()):
        try:
            folder_config(target)
        except ValueError as error:
            raise ValueError(f"cannot save the adapter over what is there: {error}") from error
        if not replaces_all:
            check_only_adapter(target)
    tensors = writing.stored(controlnet.state_dict(), dtype)
    with files.replace_folder(target) as temporary:
        files.write_json(temporary / "config.json", writing.config_of(controlnet))
        entries = header_entries(info, kind=writing.kind_of(controlnet), date=date)
        write_weights(temporary / WEIGHTS_NAME, tensors, entries)


def write_adapter(
    adapter_or_network: Adapter | nn.Module,
    path: str | Path,
    *,
    layout: str = "diffusers",
    dtype: str | torch.dtype | None = None,
    info: AdapterInfo | None = None,
    date: str = "",
) -> None:
    """Write an adapter in any layout, all of it or nothing. The same arguments give the same bytes.

    ``layout``: "diffusers" is the folder of `save_adapter`; "single" one .safetensors file with diffusers'
    names, which ComfyUI, sd-webui-controlnet (neither of light T2I-Adapters) and diffusers'
    ``from_single_file`` read; "original" one with the names of the
    original project (of ControlNets and T2I-Adapters), which its own code, ComfyUI, sd-webui-controlnet and,
    of SD1 and SD2 alone, ``from_single_file`` read. ``dtype``: of the file, also by its name; None keeps the
    network's. ``info``: what it says of itself; None takes the adapter's own. ``date``: ISO 8601, for the
    header; none is written unless given.

    Raises ValueError for an unknown layout or precision, a layout that the kind of network does not have, or
    as `save_adapter`.
    """
    if layout not in writing.LAYOUTS:
        raise unknown("layout", layout, writing.LAYOUTS)
    dtype, path = None if dtype is None else check_dtype(dtype), files.as_text("an adapter's place", path)
    network: Any = adapter_or_network
    if isinstance(network, Adapter):
        network, info = network.controlnet, info or network.info
    writing.kind_of(network)  # refuses what is none
    info = info or _info_of({**network.config, "_class_name": type(network).__name__})
    if layout == "diffusers":
        save_adapter(network, path, info=info, dtype=dtype, date=date)
    else:
        writing.write_file(network, path, layout=layout, info=info, dtype=dtype, date=date)


def check_fits(controlnet: nn.Module, base: Base) -> None:
    """Raise ValueError, one line with both networks' sizes, unless ``controlnet`` fits this base's U-Net."""
    network: Any = controlnet
    if kind_of(network).hooks:
        from controlkit import lllite

        lllite.check_fits(network, base.unet, base=base.name)
    else:
        _check_sizes(network.config, base, name="control network", class_name=kind_of(network).class_name)
        check_labels_fit(network, base)


def structure_of(base: Base) -> BaseStructure:
    """What an adapter has to fit of a base."""
    return BaseStructure(base.name, base.unet.config, base.prediction_type)


def _check_sizes(
    config: Mapping[str, Any], base: Base, *, name: str, class_name: str = "ControlNetModel"
) -> None:
    check_sizes({**config, "_class_name": class_name}, structure_of(base), name=name)


def _published_map(repo_id: str) -> MapSpec | None:
    """The map of an adapter of the table, whose file does not describe it; None for any other name."""
    known = known_adapters.find(repo_id)
    return known.map if known and known.map.kind else None


def _load_network(folder: Path, *, dtype: torch.dtype) -> ControlNetModel:
    from diffusers import ControlNetModel

    for file in weight_files(folder):
        if not is_pickle(file):
            check_hash(file, read_header(file).get("__metadata__", {}))
    controlnet = load_part(ControlNetModel, folder, dtype=dtype, exact=True)
    check_finite(controlnet.state_dict(), str(folder))
    return controlnet

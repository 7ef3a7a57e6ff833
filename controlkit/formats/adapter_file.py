"""An adapter file opened: what it is, what it says of itself, and its tensors by our networks' names."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.config_types import check_types
from controlkit.families import FAMILY_TITLES
from controlkit.files import as_text
from controlkit.folders import check_weights, is_pickle, read_json, weight_files
from controlkit.formats.description import AdapterInfo, described_by_others, read_description
from controlkit.formats.finding import (
    USUAL,
    find_adapter_file,
    find_adapter_folder,
    only_weights,
)
from controlkit.formats.fitting import DEFAULTS, config_family, plain
from controlkit.formats.recognise import recognise
from controlkit.formats.structure import (
    CLASS_NAMES,
    TEXT_FAMILIES,
    Config,
    Shapes,
    controlnet_config,
    union_config,
)
from controlkit.formats.structure_others import check_t2i, light_config, t2i_config, xs_config
from controlkit.formats.weight_file import (
    SUFFIXES,
    Stored,
    WeightFile,
    check_floats,
    count_parameters,
    open_weights,
    precision,
)

if TYPE_CHECKING:
    from torch import Tensor

_CONFIGS: Mapping[str, Callable[[Shapes], Config]] = {
    "controlnet": controlnet_config,
    "controlnet-difference": controlnet_config,
    "controlnet-union": union_config,
    "t2i-adapter": t2i_config,
    "controlnet-xs": xs_config,
    "lite": light_config,
}
_COMPARED = ("controlnet", "controlnet-difference", "controlnet-union")  # with a config.json beside them
_TOLD_BY_SHAPES = (
    *("in_channels", "block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim"),
    *("conditioning_channels", "conditioning_embedding_out_channels"),
    *("projection_class_embeddings_input_dim", "use_linear_projection"),
)


_UNTOLD = ("controlnet", "controlnet-difference")  # kinds whose files need not say how they take their map
_POOLING = re.compile(r"^\s*global_average_pooling:\s*(true|false)\b", re.IGNORECASE | re.MULTILINE)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.\w+$)")
_OTHER_CLASS_NAMES = ("ControlNetModel_Union",)  # as the first such network's own code calls it


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """One file, opened by `open_adapter_file`; of safetensors only its header has been read.

    ``kind``: of `recognise.KINDS`. ``layout``: whose names its tensors have, "diffusers", "original" or
    "kohya". ``family``: "sd1", "sd2", "sdxl", or "" where it fits two of them. ``config``: of the class that
    diffusers has for the kind, as the file says or its shapes tell. ``is_told``: whether it says all of it.
    ``names``: each of the file's keys to the network's.
    """

    weights: WeightFile
    kind: str
    layout: str
    family: str
    config: Mapping[str, Any]
    is_told: bool
    info: AdapterInfo
    names: Mapping[str, str]

    @property
    def path(self) -> Path:
        """Where it is."""
        return self.weights.path

    @property
    def metadata(self) -> Mapping[str, str]:
        """The entries of a safetensors header; of a pickle none."""
        return self.weights.metadata

    @property
    def entries(self) -> dict[str, Stored]:
        """The adapter's tensors by the network's names, without reading them."""
        return {name: self.weights.entries[key] for key, name in self.names.items()}

    @property
    def dtype(self) -> str:
        """The precision that it is stored in: torch's name, or "mixed (...)"."""
        return precision(self.entries)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return count_parameters(self.entries)

    @property
    def class_name(self) -> str | None:
        """diffusers' class for it; None where it has none."""
        return CLASS_NAMES.get(self.kind)

    def check_numbers(self) -> None:
        """Raise the ValueError that loading raises for numbers that are damaged or not finite."""
        self.weights.check_hash()
        for key in self.weights.not_finite(self.names):
            raise ValueError(f"{self.path}: the weights in {self.names[key]} are not all finite numbers")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the network's names, on the CPU, in the file's precision.

        Raises ValueError, naming the file, where its bytes are not those it was written with.
        """
        self.weights.check_hash()
        read = self.weights.read(self.names)
        return {name: read[key] for key, name in self.names.items()}


def open_adapter_file(path: str | os.PathLike[str]) -> AdapterFile:
    """Open an adapter's one weight file: named itself, in a folder, bundled, or on the hub.

    A config.json beside it is left aside where it contradicts the shapes. Raises ValueError, one line that
    names the file, for one that is missing or damaged, is no adapter (and what it is instead), or whose
    tensors are not those of its kind.
    """
    name = as_text("an adapter", path)
    named = find_adapter_file(name)
    if named is not None:
        _check_undivided(named)
    parts = [named] if named else _parts(find_adapter_folder(name))
    found, weights = parts[0], open_weights(*parts)
    kind, layout, names = recognise(weights.entries, found)
    entries = {name: weights.entries[key] for key, name in names.items()}
    check_floats(entries, found)
    info, structure = read_description(weights.metadata, found)
    shapes = Shapes(entries, found)
    own = structure or _own_config(found, kind, shapes)
    config = _config(kind, shapes, own)
    check_types(structure, found)
    said = info.family if info and info.family in FAMILY_TITLES else ""
    by_tensors = _family(kind, config, entries)
    # A T2I-Adapter reads no text: of which family it is its sizes can only suggest.
    family = (said or by_tensors) if kind == "t2i-adapter" else (by_tensors or said)
    info = info or described_by_others(weights.metadata, channels=hint_channels(config), family=family)
    if not own and kind in _UNTOLD and is_pooled(found, info.map.kind):
        config["global_pool_conditions"] = True
    return AdapterFile(
        weights,
        kind,
        layout,
        family=family,
        config=config,
        is_told=bool(own),
        info=info,
        names=names,
    )


def is_pooled(file: Path, kind: str) -> bool:
    """Whether a ControlNet that has no configuration of its own pools its residuals, which no shape tells.

    The original's description beside the file says so; else the kind of map: "shuffle" is the one published
    kind that does. ``kind`` "" is read from the file's name, as sd-webui-controlnet and ComfyUI do.
    """
    said = _pooling_beside(file)
    return is_shuffle(kind or file.stem) if said is None else said


def _pooling_beside(file: Path) -> bool | None:
    """Whether a ControlNet pools by the original's description beside it; None where that does not say."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = _POOLING.search(file.with_suffix(".yaml").read_text(encoding="utf-8"))
        if found:
            return found[1].lower() == "true"
    return None


def is_shuffle(text: str) -> bool:
    """Whether a kind of map, or a file's name, has the word "shuffle"."""
    return "shuffle" in re.split(r"[\W_]+", text.lower())


def is_pooled_by_name(file: AdapterFile) -> bool:
    """Whether nothing but a file's name says that it pools its residuals."""
    open_by_itself = not file.is_told and file.kind in _UNTOLD and not file.info.map.kind
    return open_by_itself and _pooling_beside(file.path) is None and is_shuffle(file.path.stem)


def of_kind(file: AdapterFile, kind: str) -> AdapterFile:
    """A file of which somebody knows for which kind of map it is, where it does not say so itself; "" changes
    nothing."""
    if not kind or file.is_told or file.kind not in _UNTOLD or file.info.map.kind:
        return file
    return replace(file, config={**file.config, "global_pool_conditions": is_pooled(file.path, kind)})


def hint_channels(config: Mapping[str, Any]) -> int:
    """The channels of the map that a network of this configuration takes."""
    of_t2i = config.get("in_channels", 3) if config.get("_class_name") == "T2IAdapter" else 3
    return int(config.get("conditioning_channels", of_t2i))


def check_config(file: AdapterFile) -> None:
    """Raise ValueError, one line, where the config.json of a ControlNet's folder is not that of its weights.

    A ControlNet that is named by its folder is built by it; one that is named by its file, by its shapes.
    """
    if file.class_name != "ControlNetModel" or file.kind not in _COMPARED:
        return
    shapes = Shapes(file.entries, file.path)
    said = _config_beside(file.path, file.class_name)
    contradiction = _contradiction(said, _as_it_looks(controlnet_config(shapes), shapes))
    if contradiction:
        raise ValueError(
            f"{file.path.with_name('config.json')} says {contradiction}: it is another network's"
            f" (the file {file.path.name} tells by itself)"
        )


def folder_config(folder: Path) -> dict[str, Any]:
    """The configuration of the network in a folder. Raises ValueError if the folder holds something else."""
    if not (folder / "config.json").is_file():
        _check_one(folder)
        raise ValueError(f"{folder} is not an adapter folder: it has no config.json{_inner(folder)}")
    config = read_json(folder / "config.json")
    check_types(config, folder / "config.json")
    if "_class_name" not in config:
        raise ValueError(
            f"{folder}/config.json does not say of which class it is (_class_name): give the file with the"
            f" weights, {weight_files(folder)[0].name}, which tells by itself"
        )
    if config.get("_class_name") not in (*CLASS_NAMES.values(), *_OTHER_CLASS_NAMES):
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, not a ControlNetModel")
    return config


def _check_undivided(file: Path) -> None:
    """Raise ValueError for one part of a network that was saved in several files."""
    found = _SHARD.search(file.name)
    if found is None or int(found[2]) < 2:
        return
    which = f"{file} is part {int(found[1])} of a set of {int(found[2])} files"
    if any(file.parent.glob("*.index*.json")):
        raise ValueError(f"{which}: give their folder, {file.parent}")
    index = f"{file.name[: found.start()]}{file.suffix}.index.json"
    raise ValueError(f"{which}, and {index}, which lists them, is missing beside it")


def _check_one(folder: Path) -> None:
    """Raise ValueError for a folder with several files of weights, of which none has the usual name."""
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    if len(found) < 2 or only_weights(folder) is not None or any(folder.glob("*.index*.json")):
        return
    with contextlib.suppress(ValueError):
        weight_files(folder)
        return
    for path in found:
        _check_undivided(path)
    names = ", ".join(path.name for path in found[:3])
    more = " and more" if len(found) > 3 else ""
    raise ValueError(f"{folder} holds several files of weights ({names}{more}): name the one{_inner(folder)}")


def _inner(folder: Path) -> str:
    """A hint at the adapter's folder within a run's or a pipeline's; "" where there is none."""
    found = (path.parent for path in sorted(folder.glob("*/config.json")) if "controlnet" in path.parent.name)
    inner = next(found, None)
    return f" (did you mean {inner}?)" if inner else ""


def is_as_saved(folder: Path) -> bool:
    """Whether the weights are a ControlNet's as diffusers writes it, whatever the configuration calls it.

    Raises ValueError, naming the file, for damaged ones, and for numbers that are no plain floats.
    """
    _check_one(folder)
    files = weight_files(folder)
    try:
        weights = open_weights(*files)
    except ValueError:
        check_weights(folder)  # which says what they are not, by their names
        raise
    kind, _, names = recognise(weights.entries, files[0])
    check_floats({name: weights.entries[key] for key, name in names.items()}, files[0])
    own = all(names.get(key) == key for key in weights.entries)
    usual = files[0].name.startswith(USUAL) and weights.is_pickle == is_pickle(files[0])
    return kind == "controlnet" and own and usual


def as_loaded(file: AdapterFile, name: str) -> AdapterFile:
    """A file with the configuration that loading takes which is given its name.

    A ControlNet's folder as diffusers writes it is built by its config.json alone.
    """
    if find_adapter_file(name) is not None:
        return file
    folder = find_adapter_folder(name)
    config = folder_config(folder)
    if config["_class_name"] != "ControlNetModel" or not is_as_saved(folder):
        return file
    return replace(file, config={**DEFAULTS, **config}, is_told=True)


def _parts(folder: Path) -> list[Path]:
    """The weight files of an adapter's folder. Raises ValueError if it holds something else."""
    if (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} is a whole base, as diffusers saves it: give it as --base{_inner(folder)}"
        )
    try:
        parts = weight_files(folder)
    except ValueError as error:
        _check_one(folder)
        raise ValueError(f"{error}{_inner(folder)}") from None
    folder_config(folder)
    return parts


def _own_config(file: Path, kind: str, shapes: Shapes) -> Config:
    """What a config.json beside a file says; {} where the file's shapes show that it is another network's."""
    said = _config_beside(file, CLASS_NAMES.get(kind))
    if not said or kind not in _COMPARED:
        return said
    read = _CONFIGS[kind](shapes)
    is_strange = _contradiction(said, read) and _contradiction(said, _as_it_looks(read, shapes))
    return {} if is_strange else said


def _contradiction(said: Config, read: Config) -> str:
    """What a configuration says otherwise than the shapes of the weights beside it, in words; or ""."""
    for key in _TOLD_BY_SHAPES:
        is_told = said.get(key) is not None and key in read
        if is_told and plain(said[key]) != plain(read[key]):
            return f"{key} {plain(said[key])}, and the weights beside it have {plain(read[key])}"
    return ""


def _as_it_looks(read: Config, shapes: Shapes) -> Config:
    """The configuration by the shapes as they are: a folder's matrices are what they look like."""
    if "use_linear_projection" not in read:
        return read
    projection = next(entry for key, entry in shapes.entries.items() if key.endswith(".proj_in.weight"))
    return {**read, "use_linear_projection": len(projection.shape) == 2}


def _config_beside(file: Path, class_name: str | None) -> Config:
    """The configuration in a config.json of the same folder, where it is surely this file's; else {}."""
    beside = file.with_name("config.json")
    is_its = file.name.startswith(USUAL) or only_weights(file.parent) is not None
    if not (is_its and beside.is_file()):
        return {}
    config = read_json(beside)
    if config.get("_class_name") != class_name:
        return {}
    check_types(config, beside)
    return config


def _config(kind: str, shapes: Shapes, own: Config) -> Config:
    if kind == "control-lora":
        channels = shapes.size("input_hint_block.0.weight", 1)  # the rest is its base's
        return {"_class_name": CLASS_NAMES[kind], "conditioning_channels": channels, **own}
    if kind not in _CONFIGS:
        return dict(own)
    told = {key: value for key, value in own.items() if not key.startswith("_")}
    read = _CONFIGS[kind](shapes)
    if kind == "t2i-adapter" and told:
        check_t2i(told, shapes)
        return {"_class_name": CLASS_NAMES[kind], **read, **told}
    # What shapes tell is certain; of the rest they tell nothing.
    return {"_class_name": CLASS_NAMES[kind], **told, **read}


def _family(kind: str, config: Config, entries: Mapping[str, Stored]) -> str:
    """The family that a file is for; of the kinds without a configuration of their own by their tensors."""
    if kind == "control-lora":
        width = next((e.shape[1] for key, e in entries.items() if key.endswith("attn2.to_k.down")), None)
        return "sdxl" if "label_emb.0.0.bias" in entries else TEXT_FAMILIES.get(width or 0, "")
    if kind == "lllite":  # SDXL's first level has no attention
        return "" if any("input_blocks_1_1" in key for key in entries) else "sdxl"
    return config_family(config) if config else ""

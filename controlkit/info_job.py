"""What `controlkit info` says of an adapter file: read from its header, at once and without torch.

Of a kind or a structure that is not common (`formats/expected.py`), and of a file with a fault, which is then
named as loading would, the libraries are loaded. The numbers are looked at where that is quick: of a small
file, whether they have the hash that its header tells, and are finite.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from controlkit import known_adapters, preprocessors
from controlkit.base_structure import read_base
from controlkit.checkpoints.kept import checkpoint_file
from controlkit.checkpoints.reading import SUFFIXES, Checkpoint, is_checkpoint, open_checkpoint
from controlkit.families import ALIASES, BUNDLED, FAMILY_TITLES, short_name
from controlkit.formats.adapter_file import (
    AdapterFile,
    as_loaded,
    check_config,
    hint_channels,
    is_pooled_by_name,
    open_adapter_file,
)
from controlkit.formats.description import INPAINT, AdapterInfo, kinds_at_once, map_in_words
from controlkit.formats.expected import count_unchanged, is_whole
from controlkit.formats.finding import find_adapter_file
from controlkit.formats.fitting import EITHER, BaseStructure, check_kind_fits
from controlkit.formats.recognise import KINDS, OF_BASE
from controlkit.formats.weight_file import open_weights
from controlkit.hub import is_hub_id

_USUAL_BASES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
_MOST_SHOWN = 300  # letters of one entry of a header by others
_NOT_RUN = ("controlnext",)
POOLED_BY_NAME = "pools what it adds, as ControlNets for shuffle do: its name alone says so"
_NO_BASE = "BASE"  # stands in a command where it is not known which
_QUICK = 100_000_000  # bytes of a file whose numbers are looked at


def describe(name: str, *, base: str | None = None) -> list[str]:
    """Lines that say what an adapter is and says of itself, whether it fits a base, and how to use it.

    ``name``: a file, a folder, a bundled name or a hub id. Of a base the configuration alone is read, and of
    the file its header and, where that is quick, its numbers. Raises ValueError, one line, for what is no
    adapter, and for a base that leads nowhere.
    """
    structure = None if base is None else read_base(base)
    whole = opened_if_whole(name)
    if whole is not None:
        return _describe_checkpoint(whole, name)
    file = _with_published_map(open_adapter_file(name), name)
    lines = [f"{name}: {summary(file)}", *_provenance(file.info)]
    if file.kind in _NOT_RUN:
        return [*lines, "controlkit does not run this kind"]
    if file.kind in OF_BASE:
        lines.append("its weights are changes to its base's: other software needs that base, too")
    if file.kind == "controlnet-difference" and (count := count_unchanged(file)):
        left_out = "a tensor, which is" if count == 1 else f"{count} tensors, which are"
        lines.append(f"it leaves out {left_out} the base's unchanged")
    if is_pooled_by_name(file):
        lines.append(f"{POOLED_BY_NAME}; --control or --map with another kind decides otherwise")
    why_not = _misfit(file, structure, name)
    if structure is not None:
        lines.append(f"fits {base}: {why_not or 'yes'}")
    elif why_not:
        lines.append(f"can be used: {why_not}")
    return lines if why_not else [*lines, "use it with:", f"  {how_to_use_file(file, name, base)}"]


def _with_published_map(file: AdapterFile, name: str) -> AdapterFile:
    """A file of a named adapter, which does not describe its map, with the map that is known of it."""
    known = known_adapters.find(name)
    if known is None or file.info.map.kind:
        return file
    spec = replace(known.map, channels=file.info.map.channels)
    return replace(file, info=replace(file.info, map=spec))


def opened_if_whole(name: str) -> Checkpoint | None:
    """A whole base in one file; None for anything else. Raises ValueError for a file that is damaged."""
    file = checkpoint_file(name)
    if file is None or file.suffix not in SUFFIXES:
        return None
    weights = open_weights(file)
    return open_checkpoint(file, weights) if is_checkpoint(weights) else None


def how_to_use_base(name: str) -> str:
    """The command that uses a base."""
    return f"controlkit generate PROMPT --base {shlex.quote(name)} --control canny=PICTURE"


def _describe_checkpoint(checkpoint: Checkpoint, name: str) -> list[str]:
    """The same of a whole base in one file."""
    said = checkpoint.weights.metadata
    told = {key: said.get(f"modelspec.{key}", "") for key in ("title", "license")}
    return [
        f"{name}: {checkpoint.summary()}",
        *(f"{key}: {_printable(_shortened(value))}" for key, value in told.items() if value),
        f"prediction type: {checkpoint.prediction_type} (by {checkpoint.known_by})",
        "use it with:",
        f"  {how_to_use_base(name)}",
    ]


def summary(file: AdapterFile) -> str:
    """What a file is, in one line: its kind, family, layout, size and precision."""
    family = FAMILY_TITLES.get(file.family, EITHER)
    channels = hint_channels(file.config)
    hint = "" if channels == 3 else f", maps of {channels} channel{'s' if channels > 1 else ''}"
    return (
        f"{KINDS[file.kind]}{_extent(file)} for {family}, {file.layout} keys{hint},"
        f" {file.parameters:,} parameters, {file.dtype}, {file.weights.size / 1e6:.1f} MB"
    )


def _extent(file: AdapterFile) -> str:
    """How many kinds of maps a ControlNet-Union takes, or the rank of a Control-LoRA."""
    if file.kind == "controlnet-union":
        return f" of {file.config['num_control_type']} kinds"
    downs = (entry.shape for key, entry in file.entries.items() if key.endswith(".down"))
    ranks = [shape[0] for shape in downs if shape]
    return f" of rank {max(ranks)}" if file.kind == "control-lora" and ranks else ""


def how_to_use(kind: str, adapter: str, base: str, *, at_once: bool = False) -> str:
    """The command that follows a map of a kind with an adapter. ``base`` "": leave it out.

    ``at_once``: whether a network for several kinds takes a map of each, as one input.
    """
    kinds = kind.split(" + ") if at_once else [kind.split(" + ")[0]]
    known = preprocessors.names()
    maps = [
        f"--control {one}=PICTURE" if one in (*known, INPAINT) else f"--map {shlex.quote(one)}=MAP"
        for one in kinds
    ]
    maps += ["--from PICTURE --mask MASK"] if INPAINT in kinds else []
    adapters = [f"--adapter {shlex.quote(f'{one}={adapter}')}" for one in kinds]
    where = "" if base in ("", "tiny") else f" --base {shlex.quote(base)}"
    prompt = '"a red figure"' if base == "tiny" else "PROMPT"
    return " ".join([f"controlkit generate {prompt}{where}", *maps, *adapters])


def how_to_use_file(file: AdapterFile, name: str, base: str | None) -> str:
    """The command that uses a file; KIND and BASE stand for what neither the file nor its sizes say."""
    where = base or _own_base(file)
    at_once = bool(kinds_at_once(file.info.map, is_union=file.kind == "controlnet-union"))
    if not at_once and file.info.map.channels not in (1, 3):
        return f"from Python: its maps have {file.info.map.channels} channels"
    return how_to_use(_printable(file.info.map.kind) or "KIND", name, where, at_once=at_once)


def _own_base(file: AdapterFile) -> str:
    """The base that a file names, or its family's usual one, if it is at hand and may fit; else BASE."""
    said = file.info.base
    if said and said not in (*BUNDLED, *ALIASES):
        known = is_hub_id(said) or os.path.exists(os.path.expanduser(said))
        return said if known and _may_fit(file, said) else _NO_BASE
    usual = said or _USUAL_BASES.get(file.family, "sd15")
    return usual if _may_fit(file, usual) else _NO_BASE


def _may_fit(file: AdapterFile, name: str) -> bool:
    """Whether nothing that is known here of a base speaks against it; nothing is downloaded."""
    name = short_name(name)
    if name not in (*BUNDLED, *ALIASES) and not os.path.exists(os.path.expanduser(name)):
        return True
    try:
        base = read_base(name)
        check_kind_fits(file.kind, file.config, file.family, base, name=str(file.path))
    except ValueError:
        return False
    return file.kind not in ("control-lora", "lllite") or is_whole(file, base.unet)


def _misfit(file: AdapterFile, base: BaseStructure | None, name: str) -> str:
    """Why it does not fit, or cannot be used at all, or a warning, in words; "" if all is well."""
    try:
        if find_adapter_file(name) is None:
            check_config(file)
        loaded = as_loaded(file, name)
        if base is not None:
            check_kind_fits(loaded.kind, loaded.config, loaded.family, base, name=name)
        _check_whole(loaded, base)
        if file.weights.size <= _QUICK:
            file.check_numbers()
    except ValueError as error:
        return f"no, {error}"
    if base is None:
        return ""
    trained = file.info.prediction_type
    if trained not in ("", base.prediction_type):
        return f"badly, it was trained for {trained} and the base predicts {base.prediction_type}"
    return ""


def _check_whole(file: AdapterFile, base: BaseStructure | None) -> None:
    """Raise the ValueError that loading raises for a file's names and shapes."""
    usual = base or read_base(_USUAL_BASES.get(file.family, "sd15"))
    if not is_whole(file, usual.unet):
        from controlkit.formats.building import check_whole

        check_whole(file, None if base is None else base.unet, name="" if base is None else base.name)


def _provenance(info: AdapterInfo) -> list[str]:
    """What a file says of itself, a line each."""
    told = {
        "title": info.title,
        "map": map_in_words(info.map),
        "base": info.base,
        "prediction type": info.prediction_type,
        "resolution": f"{info.resolution}x{info.resolution}" if info.resolution else "",
        **{name: _shortened(text) for name, text in info.about.items()},
        **{f"training, {key}": _in_words(value) for key, value in info.training.items()},
    }
    lines = [f"{key}: {_printable(str(value))}" for key, value in told.items() if value != ""]
    return lines or ["the file says nothing of its map, its base or its training"]


def _printable(text: str) -> str:
    """What a header says, as one line without characters that would steer the terminal."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def _shortened(text: str) -> str:
    """An entry of others without its end where it is endless, as a picture in letters."""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}… ({len(text):,} letters)"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_in_words(inner)}" for key, inner in value.items())
    return " ".join(map(_in_words, value)) if isinstance(value, list) else str(value)

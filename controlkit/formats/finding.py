"""Where an adapter is: bundled, a folder as diffusers writes it, one file, or on the hub. Needs no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from controlkit.families import BUNDLED
from controlkit.files import sampled
from controlkit.folders import read_json, weight_files
from controlkit.formats.weight_file import SUFFIXES
from controlkit.hub import LORA_FILE, PEFT_CONFIG, check_exists, find_file, find_folder, find_weight_file
from controlkit.known_adapters import revision_of

BUNDLED_ADAPTERS: Mapping[str, Path] = {
    kind: Path(__file__).parent.parent / "tiny" / f"controlnet-{kind}"
    for kind in ("canny", "openpose", "depth")
}
USUAL = "diffusion_pytorch_model"  # how diffusers calls the weights in a model's folder

_OF_ADAPTER = re.compile(rf"config\.json|{USUAL}[.\w-]*\.(safetensors|bin)(\.index[.\w]*\.json)?")
_OF_CHECKPOINT = {"weights.safetensors", "optimizer.safetensors"}
_HUB_FILES = (
    "config.json",
    f"{USUAL}*.safetensors",
    f"{USUAL}*.bin",
    f"{USUAL}*.index.*json",
)
_ADDRESS = re.compile(r"https?://[\w.-]+/([^/]+/[^/?]+)(?:/(?:resolve|blob|tree)/[^/]+/([^?]+))?/?(?:\?.*)?$")
_PLACES: Mapping[str, Any] = {"what": "adapter", "top_file": "config.json", "bundled": BUNDLED_ADAPTERS}


def find_adapter_folder(name: str) -> Path:
    """The folder of an adapter as diffusers writes it: bundled, a path, cached or downloaded.

    Raises ValueError, one line within about 5 seconds, for a name that leads nowhere.
    """
    return find_folder(name, complete=_is_complete, files=_HUB_FILES, revision=revision_of(name), **_PLACES)


def check_adapter(name: str) -> None:
    """Raise the error of loading for a name that leads nowhere, without loading anything. A single file is
    downloaded from the hub.
    """
    if find_adapter_file(name) is None:
        check_adapter_folder(name)


def check_adapter_folder(name: str) -> None:
    """Raise the error of `find_adapter_folder` for a name that leads nowhere, and download nothing."""
    check_exists(name, revision=revision_of(name), **_PLACES)


def find_adapter_file(name: str) -> Path | None:
    """The one file that a name means: a file, the only weights in a folder, or of a hub repository.

    ``name``: a path, or ``owner/name/path/to/file.safetensors``, which is downloaded where needed. None for
    anything else, a folder as diffusers writes it and ``owner/name`` among them. Raises ValueError, one line
    within about 5 seconds, for a hub's file that is not to be had.
    """
    if name in BUNDLED_ADAPTERS:
        return None
    if (address := _ADDRESS.match(name)) is not None:
        raise ValueError(
            f"{name} is an address: give the name that the hub has for it, {address[1]}"
            f"{f'/{address[2]}' if address[2] else ''}"
        )
    path = os.path.expanduser(name)  # os.path answers for names that are too long, where pathlib raises
    if os.path.isdir(path):
        return None if _is_diffusers(Path(path)) else only_weights(Path(path))
    if os.path.isfile(path):
        return Path(path)
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    if file and name.endswith(SUFFIXES) and not name.startswith((".", "/", "~")):
        return find_file(f"{owner}/{repository}", file, hint="name that file")
    return None


def mark_of(name: str) -> str:
    """What tells an adapter of this machine from what its place held before (`files.sampled`), in hex; "" for
    a bundled one, one of the hub, or one that cannot be read.
    """

    def found(place: Path) -> list[Path]:
        file = find_adapter_file(name)
        return [file] if file is not None else weight_files(place)

    return _mark(name, BUNDLED_ADAPTERS, found)


def mark_of_base(name: str) -> str:
    """The same of a base: of all files of its parts that are not hidden, or of its checkpoint."""

    def found(place: Path) -> list[Path]:
        parts = [place / part for part in read_json(place / "model_index.json")]
        found = (file for part in parts if part.is_dir() for file in part.iterdir() if file.is_file())
        return sorted(file for file in found if not file.name.startswith("."))  # as .DS_Store

    return _mark(name, BUNDLED, found)


def mark_of_vae(name: str) -> str:
    """The same of an autoencoder: in a folder, or in the folder vae/ there."""

    def found(place: Path) -> list[Path]:
        folder = place if (place / "config.json").is_file() else place / "vae"
        return [folder / "config.json", *weight_files(folder)]

    return _mark(name, {}, found)


def mark_of_lora(name: str) -> str:
    """The same of a LoRA."""

    def found(folder: Path) -> list[Path]:
        config = folder / PEFT_CONFIG
        file = find_weight_file(name, what="LoRA", usual=LORA_FILE)
        return [file, config] if config.is_file() else [file]

    return _mark(name, {}, found)


def _mark(name: str, bundled: Collection[str], found: Callable[[Path], list[Path]]) -> str:
    """The mark of a model by its name. found: the files of one that is a folder."""
    place = os.path.expanduser(name)
    if name in bundled or not os.path.exists(place):
        return ""
    try:
        files = [Path(place)] if os.path.isfile(place) else found(Path(place))
        return sha256(b"".join(map(sampled, files))).hexdigest()
    except (OSError, ValueError):  # who loads it will say so
        return ""


def check_only_adapter(folder: Path) -> None:
    """Raise ValueError where an adapter's folder holds other files, too, which replacing it would delete."""
    paths = sorted(folder.iterdir())
    others = [path.name for path in paths if not (_OF_ADAPTER.fullmatch(path.name) and path.is_file())]
    if others and (folder / "config.json").is_file():
        raise ValueError(
            f"cannot write {folder}: besides an adapter the folder holds {', '.join(others[:3])}"
            f"{' and more' if len(others) > 3 else ''}, which would be lost; choose another name"
        )


def only_weights(folder: Path) -> Path | None:
    """The weight file of a folder that holds exactly one, or is a checkpoint of a training of ours."""
    found = [file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file()]
    if {file.name for file in found} == _OF_CHECKPOINT:
        return folder / "weights.safetensors"
    return found[0] if len(found) == 1 else None


def _is_diffusers(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob(f"{USUAL}*"))


def _is_complete(folder: Path) -> bool:
    """Whether a cached copy has all of its files."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except ValueError:
        return False

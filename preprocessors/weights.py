"""The networks of detectors: bundled, in a folder, in the model cache, or on the hub."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from controlkit.folders import load_part, quiet_libraries, read_json
from controlkit.hub import find_folder

BUNDLED = "tiny"
"""The name under which a detector finds its bundled model."""

PROCESSOR_CONFIG = "preprocessor_config.json"

_FILES = ("config.json", PROCESSOR_CONFIG, "model.safetensors")


def find_model(kind: str, name: str, aliases: Mapping[str, str]) -> Path:
    """Return the transformers folder of a "pose" or "depth" or "person" model.

    ``name`` is "tiny" (bundled, ``controlkit/tiny/KIND``; there is none for "person"), a key of ``aliases``
    (short name to hub id), a hub id, or a folder. The model cache comes first, the network second.

    Raises:
        ValueError: one line, within 5 seconds: an unknown name (with a suggestion), a file where a folder is
            wanted, or a model that is neither in the cache nor to be had from the hub.
    """
    here = Path(str(files("controlkit"))) / "tiny" / kind
    bundled = {} if kind == "person" else {BUNDLED: here}
    try:
        return find_folder(
            name,
            what=f"{kind} model",
            top_file=_FILES[0],
            complete=lambda folder: all((folder / file).is_file() for file in _FILES),
            files=_FILES,
            bundled=bundled,
            aliases=aliases,
        )
    except ValueError as error:
        if bundled and (name in aliases or name.count("/") == 1):  # a hub id
            raise ValueError(f"{error}; the bundled model {BUNDLED!r} needs no network") from error
        raise


def load_model(model_class: Any, folder: Path, *, device: str) -> Any:
    """Return a transformers model from a folder: float32, evaluation mode, no gradients, on ``device``.

    Raises:
        ValueError: one line: the device is not there, or the weights are missing, damaged, incomplete or of
            another architecture.
    """
    import torch

    from controlkit.devices import check_device

    target = check_device(device)
    return load_part(model_class, folder, dtype=torch.float32).to(target).requires_grad_(False)


def load_processor(folder: Path) -> Any:
    """Return the transformers image processor that a folder's preprocessor_config.json describes.

    Raises:
        ValueError: one line: the file is missing, is not JSON, or names no processor that transformers has.
    """
    from transformers import AutoImageProcessor

    path = folder / PROCESSOR_CONFIG
    read_json(path)
    try:
        with quiet_libraries():
            return AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} does not describe an image processor: {reason}") from error

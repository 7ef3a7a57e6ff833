"""The networks of detectors: bundled, in a folder, in the model cache, or on the hub."""

import pickle
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.folders import (
    PICKLE_FAULTS,
    load_part,
    quiet_libraries,
    read_json,
    refuse_impostor,
    weight_files,
)
from controlkit.hub import find_folder, first_sentence

if TYPE_CHECKING:
    import torch

BUNDLED = "tiny"
"""The name under which a detector finds its bundled model."""

PROCESSOR_CONFIG = "preprocessor_config.json"
PRECISIONS = ("auto", "fp32", "fp16", "bf16")

_COUNTER = "num_batches_tracked"  # of batch norms, not used; files from before PyTorch 0.4.1 lack it
_CONFIGS = ("config.json", PROCESSOR_CONFIG)
_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


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
            top_file=_CONFIGS[0],
            complete=_is_complete,
            files=(*_CONFIGS, *_WEIGHTS),
            bundled=bundled,
            aliases=aliases,
        )
    except ValueError as error:
        if bundled and (name in aliases or name.count("/") == 1):  # a hub id
            raise ValueError(f"{error}; the bundled model {BUNDLED!r} needs no network") from error
        raise


def load_model(model_class: Any, folder: Path, *, device: str, precision: str = "fp32") -> Any:
    """Return a transformers model from a folder: evaluation mode, no gradients, on ``device``.

    ``precision`` is one of ``PRECISIONS``; "auto" is half precision (fp16) on CUDA and fp32 elsewhere.

    Raises:
        ValueError: one line: the device is not there, it cannot compute in that precision, or the weights are
            missing, damaged, incomplete or of another architecture.
    """
    from controlkit.devices import check_device

    target = check_device(device)
    dtype = _dtype(precision, target)
    return load_part(model_class, folder, dtype=dtype).to(target).requires_grad_(False)


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


def load_tensors(path: Path, *, key: str = "") -> "dict[str, torch.Tensor]":
    """Return the tensors of a ``.pth`` or ``.pt`` file by name, on the CPU. Nothing in it is run.

    ``key`` names the entry under which the file keeps them. What DataParallel put before every name
    ("module.") is taken off.

    Raises:
        ValueError: one line with the file's name: it is missing, empty, cut short, a Git LFS pointer or a web
            page, holds more than tensors, or they are not where ``key`` says.
    """
    import torch

    _refuse_no_weights(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is not a file of weights, or holds more than tensors (it could run code): not loaded"
        ) from error
    except (OSError, *PICKLE_FAULTS) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({first_sentence(error)}); fetch it again"
        ) from error
    if key and isinstance(held, dict):
        held = held.get(key)
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        place = f" under {key!r}" if key else ""
        raise ValueError(f"{path} holds no weights{place}: it belongs to something else")
    return {str(name).removeprefix("module."): value for name, value in held.items()}


def fill(network: "torch.nn.Module", tensors: "Mapping[str, torch.Tensor]", path: Path) -> None:
    """Put weights, by name, into a network, which then is in evaluation mode and without gradients.

    Raises:
        ValueError: one line with the file's name: a tensor is missing, is too many, has the wrong shape, or
            is not finite.
    """
    import torch

    wanted = network.state_dict()
    shapes = {
        "lack": [name for name in wanted if name not in tensors and not name.endswith(_COUNTER)],
        "have, beyond what the network takes,": [name for name in tensors if name not in wanted],
        "have the wrong shape for": [
            name for name in wanted if name in tensors and wanted[name].shape != tensors[name].shape
        ],
        "are not finite (NaN or infinity) in": [
            name for name in tensors if not bool(torch.isfinite(tensors[name]).all())
        ],
    }
    for problem, names in shapes.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights in {path} {problem} {names[0]}{more}")
    # The class's own method: one network of controlnet-aux overrides it with one that checks nothing.
    torch.nn.Module.load_state_dict(network, dict(tensors), strict=False)
    network.eval().requires_grad_(False)


def _is_complete(folder: Path) -> bool:
    try:
        weights = weight_files(folder)
    except ValueError:
        return False
    return all(file.is_file() for file in (*weights, *(folder / name for name in _CONFIGS)))


def _dtype(precision: str, device: "torch.device") -> "torch.dtype":
    import torch

    from controlkit.naming import unknown

    if precision == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision fp16 is for GPUs; on the CPU use fp32 or bf16")
    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def _refuse_no_weights(path: Path) -> None:
    try:
        with path.open("rb") as stream:
            refuse_impostor(path, stream.read(512))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error

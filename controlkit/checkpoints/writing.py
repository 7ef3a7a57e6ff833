"""A checkpoint's parts in a folder, as diffusers and `load_base` read them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import files
from controlkit.checkpoints import names, structure
from controlkit.checkpoints.reading import Checkpoint
from controlkit.checkpoints.vocabulary import find_tokenizer
from controlkit.folders import quiet_libraries, write_weights
from controlkit.formats.structure import Config, by

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OPENERS: Mapping[str, str] = {  # what pads a text, where the end of a text does not
    "sd2": "!",
    names.SECOND_TEXT: "!",
}


def write_folder(checkpoint: Checkpoint, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write a checkpoint's parts as a folder, all of it or nothing.

    ``dtype``: of the weights; None keeps the file's, tensor by tensor. What stands at ``folder`` is replaced.

    Raises ValueError, one line, for damaged or missing tensors, numbers that are not finite, a tokenizer that
    cannot be had, and where the folder cannot be written.
    """
    checkpoint.weights.check_hash()
    check_space(checkpoint, folder.parent)
    with files.replace_folder(folder) as temporary:
        _write_words(checkpoint, temporary)  # first: it may have to be fetched
        files.write_json(temporary / "model_index.json", structure.index(checkpoint.family))
        scheduler = temporary / "scheduler"
        scheduler.mkdir()
        files.write_json(scheduler / "scheduler_config.json", checkpoint.configs["scheduler"])
        for part in checkpoint.parts:
            if part in checkpoint.configs:
                _write_part(checkpoint, part, temporary / part, dtype)


def check_space(checkpoint: Checkpoint, folder: Path) -> None:
    """Raise ValueError where the disk is too small for a checkpoint's parts."""
    free = shutil.disk_usage(folder).free
    if free < checkpoint.size:
        raise ValueError(
            f"cannot write the parts of {checkpoint.path} to {folder}: they take"
            f" {checkpoint.size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )


def as_wanted(
    tensors: Mapping[str, Tensor], network: Any, where: object, *, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """A part's tensors in the shapes that the network gives them. 1x1 convolutions and matrices are alike.

    Raises ValueError, naming ``where`` they are from, for a tensor that is missing, has another shape, that
    the network does not have, or that holds a number that is not finite.
    """
    from controlkit.formats.building import check_finite

    stored, kind = _stored_names(network), type(network).__name__
    for name in stored:
        if name not in tensors:
            raise ValueError(f"{where} lacks what is {name} in {kind}: it is incomplete")
    for name, tensor in tensors.items():
        wanted = stored.get(name)
        if wanted is None:
            raise ValueError(f"{where} holds what would be {name}, which no such {kind} has")
        if _sides(tensor.shape) != _sides(wanted):
            raise ValueError(
                f"{where}: {name} has the shape {by(tuple(tensor.shape))}, and {by(tuple(wanted))} is wanted"
            )
    shaped = {
        name: tensor.reshape(stored[name]).to(dtype or tensor.dtype) for name, tensor in tensors.items()
    }
    check_finite(shaped, str(where))
    return shaped


def _stored_names(network: Any) -> dict[str, Sequence[int]]:
    """The shapes of a network's tensors, by the names that they have in files."""
    state = network.state_dict()
    # transformers since 5.6 leaves a word out in memory, and writes and reads it as ever.
    short = "embeddings.token_embedding.weight" in state
    return {f"text_model.{name}" if short else name: value.shape for name, value in state.items()}


def _sides(shape: Sequence[int]) -> list[int]:
    return [side for side in shape if side != 1]


def _write_part(checkpoint: Checkpoint, part: str, folder: Path, dtype: torch.dtype | None) -> None:
    config = checkpoint.configs[part]
    network = hollow(config)
    tensors = as_wanted(checkpoint.tensors(part), network, checkpoint.path, dtype=dtype)
    folder.mkdir()
    files.write_json(folder / "config.json", config)
    name = "model" if "architectures" in config else "diffusion_pytorch_model"
    write_weights(folder / f"{name}.safetensors", tensors, {"format": "pt"})


def hollow(config: Config) -> Any:
    """The network of a configuration, without numbers."""
    import diffusers
    import torch
    import transformers

    with torch.device("meta"), quiet_libraries():
        if "_class_name" in config:
            return getattr(diffusers, config["_class_name"]).from_config(config)
        kind = getattr(transformers, config["architectures"][0])
        return kind(transformers.CLIPTextConfig(**config))


def _write_words(checkpoint: Checkpoint, folder: Path) -> None:
    """The tokenizers, which a checkpoint leaves out: all three families speak CLIP's words."""
    for part in (names.TEXT, names.SECOND_TEXT):
        if part not in checkpoint.configs:
            continue
        tokenizer = find_tokenizer(checkpoint.path, checkpoint.configs[part]["vocab_size"])
        filler = _OPENERS.get(part) or _OPENERS.get(checkpoint.family)
        if filler:
            tokenizer.pad_token = filler
        with quiet_libraries():
            tokenizer.save_pretrained(folder / part.replace("text_encoder", "tokenizer"))

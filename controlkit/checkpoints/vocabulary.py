"""CLIP's words, which every Stable Diffusion speaks and no checkpoint holds: from wherever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlkit.families import ALIASES
from controlkit.hub import find_file

_FILES = ("vocab.json", "merges.txt")
_WHOLE = "tokenizer.json"
_BESIDE = "tokenizer"
_SMALLEST = "openai/clip-vit-large-patch14"  # which A1111, too, keeps in the hub's cache


def find_tokenizer(checkpoint: Path, words: int) -> Any:
    """A tokenizer of CLIP's words, which pads with the end of a text, as SD1's.

    It is looked for in a folder tokenizer/ beside the checkpoint, in the cached bases that have short names,
    and on the hub. ``words``: how many the text encoder knows.

    Raises ValueError, one line within about 5 seconds, where it cannot be had or knows other words.
    """
    from controlkit.base_parts import load_tokenizer

    folder = _beside(checkpoint) or _cached() or _fetched(checkpoint)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != words:
        raise ValueError(
            f"the tokenizer in {folder} knows {len(tokenizer)} tokens and the text encoder of {checkpoint}"
            f" {words}: put its own into {checkpoint.parent / _BESIDE}"
        )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 77
    return tokenizer


def _beside(checkpoint: Path) -> Path | None:
    folder = checkpoint.parent / _BESIDE
    return folder if any((folder / name).is_file() for name in (_WHOLE, _FILES[0])) else None


def _cached() -> Path | None:
    """The folder of a tokenizer that is here already."""
    from huggingface_hub import try_to_load_from_cache

    places = [(_SMALLEST, ""), *((repository, "tokenizer/") for repository in ALIASES.values())]
    for repository, folder in places:
        for wanted in (_FILES, (_WHOLE,)):
            found = [try_to_load_from_cache(repository, f"{folder}{name}") for name in wanted]
            if all(isinstance(path, str) for path in found):
                return Path(str(found[0])).parent
    return None


def _fetched(checkpoint: Path) -> Path:
    """The folder of the words, fetched from the hub. Raises ValueError."""
    hint = f"name that folder {checkpoint.parent / _BESIDE}"
    vocabulary, _ = (find_file(_SMALLEST, name, hint=hint) for name in _FILES)
    return vocabulary.parent

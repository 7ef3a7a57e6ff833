"""What is put onto a base for a generation: LoRAs, learned words, another autoencoder.

Read from the command line, or again from a picture, and checked before the models' libraries are loaded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from controlkit import arguments, files, hub, limits
from controlkit.infotext import EmbeddingRecord, LoraRecord, PictureRecord

if TYPE_CHECKING:
    from controlkit.base import Base


class Finder(Protocol):
    """Finds a file that an earlier picture was made from, unchanged, or raises ValueError."""

    def __call__(self, path: str, sha256: str, *, option: str) -> Path:
        """The file's place; `option` would name another."""


@dataclass(frozen=True)
class Additions:
    """What is put onto a base: as it is recorded, and the place where each was found.

    vae: another autoencoder's name, "" for the base's own.
    """

    loras: tuple[tuple[LoraRecord, str], ...] = ()
    embeddings: tuple[tuple[EmbeddingRecord, str], ...] = ()
    vae: str = ""

    def texts(self) -> list[str]:
        """All that is recorded as text."""
        words = [text for word, _ in self.embeddings for text in (word.file, word.token)]
        return [*(lora.source for lora, _ in self.loras), *words, self.vae]

    def places(self) -> list[Path]:
        """The files that are read."""
        return [Path(place) for _, place in (*self.loras, *self.embeddings)]

    def check_names(self) -> None:
        """Raise ValueError for a name that leads nowhere on this machine and on the hub, loading nothing."""
        if self.vae:
            from controlkit.vaes import check_vae

            check_vae(self.vae)

    def onto(self, base: Base) -> Base:
        """A base with all of it; the given one stays as it is. Raises ValueError for what does not fit."""
        if self.vae:
            from controlkit.vaes import with_vae

            base = with_vae(base, self.vae)
        if self.loras:
            from controlkit.loras import Lora, with_loras

            base = with_loras(base, [Lora(place, lora.weight) for lora, place in self.loras])
        if self.embeddings:
            from controlkit.embeddings import Embedding, with_embeddings

            base = with_embeddings(base, [Embedding(place, word.token) for word, place in self.embeddings])
        return base


def asked(
    loras: Sequence[str], embeddings: Sequence[str], remembered: PictureRecord | None, *, find: Finder
) -> Additions:
    """What is asked for, as on the command line, or else what an earlier picture had of its kind.

    Raises ValueError for a name that leads nowhere, a pickle as a LoRA, or a weight outside its range.
    """
    before = Additions()
    if remembered is not None:
        before = Additions(
            () if loras else tuple(_lora_again(lora, find) for lora in remembered.loras),
            () if embeddings else tuple(_word_again(word, find) for word in remembered.embeddings),
        )
    return Additions((*before.loras, *map(_lora, loras)), (*before.embeddings, *map(_embedding, embeddings)))


def _lora(text: str) -> tuple[LoraRecord, str]:
    source, weight = arguments.parse_weighted(text)
    limits.check_lora_weight(weight)
    hub.check_weight_file(source, what="LoRA")
    sha256 = files.sha256_file(source) if os.path.isfile(source) else ""
    return LoraRecord(source, weight, sha256), source


def _embedding(text: str) -> tuple[EmbeddingRecord, str]:
    token, file = arguments.parse_word(text)
    if not os.path.isfile(file):
        raise ValueError(f"there is no embedding {file}: give a file, or WORD=FILE")
    return EmbeddingRecord(file, token, files.sha256_file(file)), file


def _lora_again(lora: LoraRecord, find: Finder) -> tuple[LoraRecord, str]:
    place = str(find(lora.source, lora.sha256, option="--lora")) if lora.sha256 else lora.source
    return lora, place


def _word_again(word: EmbeddingRecord, find: Finder) -> tuple[EmbeddingRecord, str]:
    return word, str(find(word.file, word.sha256, option="--embedding"))

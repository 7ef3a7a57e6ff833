"""What is put onto a base for a generation: LoRAs, learned words, another autoencoder, pictures it is told.

Read from the command line, or again from a picture, and checked before the models' libraries are loaded.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit import arguments, files, hub, images, limits
from controlkit.formats.finding import mark_of_lora
from controlkit.generate_like import Earlier
from controlkit.infotext import (
    EmbeddingRecord,
    ImageRecord,
    LoraRecord,
    PromptPictureRecord,
)

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.ip_adapter import PicturePrompt


@dataclass(frozen=True, eq=False)
class Shown:
    """The picture that a base is told: how it is recorded, its pixels, (H, W, 3), where it was found."""

    record: ImageRecord
    picture: np.ndarray
    place: str


@dataclass(frozen=True)
class PromptPictures:
    """Pictures for an IP-Adapter: as they are recorded, the places of all files, and the pixels."""

    record: PromptPictureRecord
    source: str
    places: tuple[str, ...]
    pictures: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Additions:
    """What is put onto a base: as it is recorded, and the place where each was found.

    vae: another autoencoder's name, "" for the base's own.
    """

    loras: tuple[tuple[LoraRecord, str], ...] = ()
    embeddings: tuple[tuple[EmbeddingRecord, str], ...] = ()
    ip_adapters: tuple[PromptPictures, ...] = ()
    shown: Shown | None = None
    vae: str = ""

    def texts(self) -> list[str]:
        """All that is recorded as text."""
        words = [text for word, _ in self.embeddings for text in (word.file, word.token)]
        told = [(told.record.source, told.record.encoder, *told.record.pictures) for told in self.ip_adapters]
        pictures = [] if self.shown is None else [self.shown.record.path]
        loras = [lora.source for lora, _ in self.loras]
        return [*loras, *words, *(text for texts in told for text in texts), *pictures, self.vae]

    def places(self) -> list[Path]:
        """The files that are read."""
        told = [place for told in self.ip_adapters for place in (told.source, *told.places)]
        pictures = [] if self.shown is None else [self.shown.place]
        put = [place for _, place in (*self.loras, *self.embeddings)]
        return [Path(place) for place in (*put, *told, *pictures)]

    def check_names(self) -> None:
        """Raise ValueError for a name that leads nowhere on this machine and on the hub, loading nothing."""
        if self.vae:
            from controlkit.vaes import check_vae

            check_vae(self.vae)

    def onto(self, base: Base) -> Base:
        """A base with LoRAs, words and autoencoder; the given one stays as it is.

        Raises ValueError for what does not fit.
        """
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

    def picture_prompts(self, base: Base) -> list[PicturePrompt]:
        """What the base is told by pictures. Raises ValueError for adapters that do not fit."""
        if not self.ip_adapters:
            return []
        from controlkit.ip_adapter import picture_prompt

        return [
            picture_prompt(
                base,
                told.source,
                told.pictures,
                scale=told.record.scale,
                image_encoder=told.record.encoder or None,
            )
            for told in self.ip_adapters
        ]


def asked(
    loras: Sequence[str],
    embeddings: Sequence[str],
    ip_adapters: Sequence[str],
    image_encoder: str | None,
    earlier: Earlier | None,
    *,
    image: str | None = None,
    base: str,
) -> Additions:
    """What is asked for, as on the command line, or else what an earlier picture of `base` had of its kind.

    image: the picture that the base is told. "none" takes away what the earlier picture had. Raises
    ValueError for a name that leads nowhere, a pickle as a LoRA, or a weight outside its range.
    """
    before = Additions()
    if earlier is not None and earlier.record.base == base:
        had, (for_loras, for_words, for_told) = earlier.record, _words(earlier)
        before = Additions(
            () if loras else tuple(_lora_again(one, earlier, for_loras) for one in had.loras),
            () if embeddings else tuple(_word_again(one, earlier, for_words) for one in had.embeddings),
            () if ip_adapters else tuple(_told_again(one, earlier, for_told) for one in had.ip_adapters),
        )
    loras, embeddings, ip_adapters = map(arguments.without_none, (loras, embeddings, ip_adapters))
    if image_encoder is not None and not ip_adapters:
        raise ValueError(f"--image-encoder {image_encoder} belongs to an --ip-adapter, and there is none")
    return Additions(
        (*before.loras, *map(_lora, loras)),
        (*before.embeddings, *map(_embedding, embeddings)),
        (*before.ip_adapters, *(_told(text, files.at_home(image_encoder or "")) for text in ip_adapters)),
        _shown(image, earlier, base),
    )


def _shown(image: str | None, earlier: Earlier | None, base: str) -> Shown | None:
    if image is not None and arguments.is_none(image):
        return None
    if image is not None:
        image = files.at_home(image)
        picture = images.load_picture(image)  # which says what is wrong with the file
        return Shown(ImageRecord(image, files.sha256_file(image)), picture, image)
    if earlier is None or earlier.record.image is None or earlier.record.base != base:
        return None
    record = earlier.record.image
    place = earlier.find(record.path, record.sha256, option="--image")
    return Shown(record, images.load_picture(place), str(place))


def _lora(text: str) -> tuple[LoraRecord, str]:
    source, weight = arguments.parse_weighted(text)
    limits.check_lora_weight(weight)
    hub.check_weight_file(source, what="LoRA")
    mark = mark_of_lora(source) if os.path.isdir(source) else ""
    return LoraRecord(source, weight, _sha256(source), mark), source


def _embedding(text: str) -> tuple[EmbeddingRecord, str]:
    token, file = arguments.parse_word(text)
    if not os.path.isfile(file):
        raise ValueError(f"there is no embedding {file}: give a file, or WORD=FILE")
    return EmbeddingRecord(file, token, files.sha256_file(file)), file


def _told(text: str, encoder: str) -> PromptPictures:
    source, names, scale = arguments.parse_picture_prompt(text)
    limits.check_picture_scale(scale)
    if not (source.endswith(hub.PICKLES) and os.path.isfile(source)):
        hub.check_weight_file(source, what="IP-Adapter")
    if encoder and not os.path.isdir(encoder):
        raise ValueError(f"there is no folder {encoder}: --image-encoder is that of a CLIP picture encoder")
    pictures = tuple(images.load_picture(name) for name in names)
    sums = tuple(map(files.sha256_file, names))
    record = PromptPictureRecord(source, names, sums, scale, _sha256(source), encoder)
    return PromptPictures(record, source, names, pictures)


def _sha256(source: str) -> str:
    """Of a file's bytes; "" for a folder or a hub id."""
    return files.sha256_file(source) if os.path.isfile(source) else ""


def _words(earlier: Earlier) -> list[str]:
    """What asks for all LoRAs, words and IP-Adapters of an earlier picture, with files where they are now."""
    had, place, number = earlier.record, earlier.place, arguments.number_text
    loras = [("--lora", f"{place(lora.source)}:{number(lora.weight)}") for lora in had.loras]
    embeddings = [
        ("--embedding", f"{word.token}={place(word.file)}" if word.token else place(word.file))
        for word in had.embeddings
    ]
    told = [
        ("--ip-adapter", f"{place(one.source)}={','.join(map(place, one.pictures))}:{number(one.scale)}")
        for one in had.ip_adapters
    ]
    encoders = [("--image-encoder", one) for one in {one.encoder for one in had.ip_adapters} if one]
    kinds = (loras, embeddings, [*told, *encoders])
    return [shlex.join(word for pair in pairs for word in pair) for pairs in kinds]


def _lora_again(lora: LoraRecord, earlier: Earlier, words: str) -> tuple[LoraRecord, str]:
    """words: what asks for all LoRAs anew, and so below."""
    if lora.mark:
        earlier.check_mark(lora.mark, mark_of_lora(lora.source), "LoRA", lora.source, words=words)
    if not lora.sha256:
        return lora, lora.source
    return lora, str(earlier.find(lora.source, lora.sha256, option="--lora", words=words))


def _word_again(word: EmbeddingRecord, earlier: Earlier, words: str) -> tuple[EmbeddingRecord, str]:
    return word, str(earlier.find(word.file, word.sha256, option="--embedding", words=words))


def _told_again(told: PromptPictureRecord, earlier: Earlier, words: str) -> PromptPictures:
    def found(name: str, sha256: str) -> str:
        return str(earlier.find(name, sha256, option="--ip-adapter", words=words))

    source = found(told.source, told.sha256) if told.sha256 else told.source
    places = tuple(map(found, told.pictures, told.pictures_sha256))
    return PromptPictures(told, source, places, tuple(map(images.load_picture, places)))

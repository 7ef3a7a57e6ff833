"""What `controlkit generate --like` fills in: what of an earlier picture still applies."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit import files, images, infotext, limits
from controlkit.formats.finding import mark_of_base, mark_of_vae
from controlkit.infotext import PictureRecord

OF_THE_BASE = {
    *("guidance", "width", "height", "dtype", "memory", "vae", "image_noise", "class_label"),
    *("original_size", "negative_original_size"),
}
OF_THE_DEVICE = {"dtype", "memory"}
PUT_ON = {"loras": "LoRAs", "embeddings": "words", "ip_adapters": "IP-Adapters"}  # made for one base


@dataclass(frozen=True)
class Earlier:
    """A picture made before: its file, and what it says of itself."""

    file: Path
    record: PictureRecord

    def settings(self, given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
        """Those of its settings in `names` that repeat it, without what is given or thereby decided anew."""
        record, dropped = self.record, set(given)
        if given.get("base", record.base) != record.base:
            dropped |= OF_THE_BASE
        if given.get("device", record.device) != record.device:
            dropped |= OF_THE_DEVICE
        if given.get("clip") == "":
            dropped |= {"clip_guidance"}
        if not temperature_fits(record.temperature, given.get("scheduler", record.scheduler)):
            dropped |= {"temperature"}
        return {name: value for name, value in vars(record).items() if name in set(names) - dropped}

    def place(self, path: str) -> str:
        """Where a file that it was made from is now: where it was, or else beside the picture."""
        beside = self.file.parent / Path(path).name
        return str(beside) if os.path.isfile(beside) and not os.path.isfile(path) else path

    def find(self, path: str, sha256: str, *, option: str, words: str = "") -> Path:
        """A file that it was made from, where it was or beside the picture.

        option: what would name another. words: all that has to be given then, where that is more.
        Raises ValueError for a file that is gone or has changed.
        """
        places = [Path(path), self.file.parent / Path(path).name]
        there = [place for place in places if os.path.isfile(place)]
        found = next((place for place in there if files.sha256_file(place) == sha256), None)
        if found is not None:
            return found
        if not there:
            raise ValueError(f"{self.file} was made from {path}, which is gone: put it back, or use {option}")
        raise ValueError(
            f"{self.file} was made from {there[0]}, which has changed since; to use it as it is now, add"
            f" {words or shlex.join([option, str(there[0])])}"
        )

    def check_models(self, given: Collection[str], *, vae: str) -> None:
        """Raise ValueError where the base or the autoencoder that are repeated are others by now.

        given: the options that are asked for anew. vae: the one that is used.
        """
        record = self.record
        if "base" not in given and record.base_mark:
            name, words = record.base, shlex.join(["--base", record.base])
            self.check_mark(record.base_mark, mark_of_base(name), "base", name, words=words)
        if "vae" not in given and record.vae_mark and vae == record.vae:
            name, words = record.vae, shlex.join(["--vae", record.vae])
            self.check_mark(record.vae_mark, mark_of_vae(name), "autoencoder", name, words=words)

    def check_mark(self, before: str, mark: str, title: str, name: str, *, words: str) -> None:
        """Raise ValueError for a model that is another one by now, as far as can be told.

        title: what it is. words: what asks for it as it is now.
        """
        if mark not in ("", before):
            raise ValueError(
                f"{self.file} was made with the {title} {name}, which has changed since; to use it as it is"
                f" now, add {words}"
            )

    def left_out(self, given: Mapping[str, Any], kinds: Collection[str]) -> Iterator[str]:
        """What is not repeated, and why. kinds: those of `PUT_ON` that are asked for anew."""
        record = self.record
        scheduler, base = given.get("scheduler", record.scheduler), given.get("base", record.base)
        if "temperature" not in given and not temperature_fits(record.temperature, scheduler):
            yield (
                f"the temperature {record.temperature:g} of {self.file} is left out: {scheduler} does not"
                " take it"
            )
        for kind, name in PUT_ON.items():
            if base != record.base and kind not in kinds and getattr(record, kind):
                yield f"the {name} of {self.file} are left out: they were made for its base, {record.base}"


def read(like: str) -> Earlier:
    """The picture of that name. Raises ValueError for one that says nothing of itself."""
    like = files.at_home(like)
    return Earlier(Path(like), infotext.parse(images.read_png_text(like), source=like))


def temperature_fits(temperature: float | None, scheduler: str) -> bool:
    """Whether a scheduler takes a temperature; any takes None."""
    try:
        limits.check_temperature(temperature, scheduler)
    except ValueError:
        return False
    return True

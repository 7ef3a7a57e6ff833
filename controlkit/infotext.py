"""What a generated PNG says of itself: enough to make it again, byte for byte.

Two text chunks: `parameters` in the AUTOMATIC1111 infotext format, which galleries and other interfaces
read, and `controlkit`, a JSON object with everything, which `controlkit generate --like` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from controlkit.rules import USUAL_FIT, USUAL_GATE, USUAL_MODE
from controlkit.settings import Settings

JSON_CHUNK = "controlkit"
INFOTEXT_CHUNK = "parameters"
GRID_CHUNK = "controlkit-grid"  # of a sheet: a JSON list with every picture's

SAMPLER_NAMES = {  # our scheduler -> the name that A1111 uses for it
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "euler": "Euler",
    "euler-a": "Euler a",
    "dpm++": "DPM++ 2M",
    "dpm++-karras": "DPM++ 2M Karras",
    "dpm++-sde": "DPM++ 2M SDE",
    "unipc": "UniPC",
    "heun": "Heun",
    "lms": "LMS",
    "lcm": "LCM",
    "tcd": "TCD",
}


CONTROL_MODES = {  # our mode -> the name that A1111 uses for it
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
}
RESIZE_MODES = {"crop": "Crop and Resize", "stretch": "Just Resize", "fill": "Resize and Fill"}  # of our fits


@dataclass(frozen=True)
class ControlRecord:
    """One control of a picture.

    kind: canny, openpose, depth. path: of the source picture, as it was given. sha256: of that file's
    bytes, in hex. is_map: whether the file already was the map. adapter: name, folder or hub id;
    adapter_mark: its `finding.mark_of`. mask: the file of the region, "" for none. The rest is as in
    `control.Control`.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str
    path: str
    sha256: str
    is_map: bool
    adapter: str
    adapter_mark: str = ""
    scale: float | tuple[float, ...] = 1.0
    start: float = 0.0
    end: float = 1.0
    gate: str = USUAL_GATE
    mode: str = USUAL_MODE
    layers: str | tuple[float, ...] | None = None
    mask: str = ""
    mask_sha256: str = ""
    only_mid: bool = False
    fit: str = USUAL_FIT


@dataclass(frozen=True)
class StartRecord:
    """The picture that a picture was made from: files as they were given, "" for no mask, and their bytes'
    SHA-256."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str
    sha256: str
    strength: float
    mask: str = ""
    mask_sha256: str = ""


@dataclass(frozen=True)
class ImageRecord:
    """The picture that the base was told besides the text: the file as it was given, its bytes' SHA-256."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    path: str
    sha256: str


@dataclass(frozen=True)
class LoraRecord:
    """A LoRA on the base: file, folder or hub id as it was given; the SHA-256 of a file's bytes, else ""; the
    `finding.mark_of_lora` of a folder, else "".
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str
    weight: float = 1.0
    sha256: str = ""
    mark: str = ""


@dataclass(frozen=True)
class EmbeddingRecord:
    """A word that the base was taught: the file as it was given, its bytes' SHA-256, the word or ""."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    file: str
    token: str
    sha256: str


@dataclass(frozen=True)
class PromptPictureRecord:
    """Pictures that the base was told through an IP-Adapter.

    source: the adapter's file or hub id as it was given; pictures: files as they were given. sha256: of each
    file's bytes, "" for a hub id. encoder: the picture encoder's folder, "" for the one beside the adapter.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str
    pictures: tuple[str, ...]
    pictures_sha256: tuple[str, ...]
    scale: float = 1.0
    sha256: str = ""
    encoder: str = ""


@dataclass(frozen=True, kw_only=True)
class PictureRecord(Settings):
    """Everything that determines one generated picture.

    width, height: pixels, of the first stage where there are two. dtype: the networks' precision ("float32").
    versions: of the software that made it. base_mark, vae_mark: `finding.mark_of_base` and `mark_of_vae` of
    these, "" in older pictures.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    controls: tuple[ControlRecord, ...]
    guidance: float
    width: int
    height: int
    device: str
    dtype: str
    versions: dict[str, str]
    start: StartRecord | None = None
    loras: tuple[LoraRecord, ...] = ()
    embeddings: tuple[EmbeddingRecord, ...] = ()
    ip_adapters: tuple[PromptPictureRecord, ...] = ()
    image: ImageRecord | None = None
    base_mark: str = ""
    vae_mark: str = ""


def chunks(record: PictureRecord) -> dict[str, str]:
    """The PNG's text chunks for a record: the infotext and the JSON."""
    return {
        INFOTEXT_CHUNK: infotext(record),
        JSON_CHUNK: json.dumps(asdict(record), ensure_ascii=False, sort_keys=True, separators=(",", ":")),
    }


def infotext(record: PictureRecord) -> str:
    """The record in A1111's format: the prompt, the negative prompt, and one line of `Name: value` pairs.

    A value with a comma, a colon or a line break is quoted as a JSON string, as A1111 does.
    """
    fields: dict[str, object] = {
        "Steps": record.steps,
        "Sampler": SAMPLER_NAMES.get(record.scheduler, record.scheduler),
        "CFG scale": f"{record.guidance:g}",
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        "Model": record.base,
    }
    if record.clip_skip != 1:
        fields["Clip skip"] = record.clip_skip
    if record.start is not None:
        fields["Denoising strength"] = f"{record.start.strength:g}"
    if record.hires != 1:
        fields["Hires upscale"] = f"{record.hires:g}"
        # A1111 has one key for both strengths, as it starts from a picture or makes two stages, never both.
        key = "Denoising strength" if record.start is None else "Hires strength"
        fields[key] = f"{record.hires_strength:g}"
    if record.vae:
        fields["VAE"] = record.vae
    if record.merge_tokens:
        fields["Token merging ratio"] = f"{record.merge_tokens:g}"
    text = record.prompt + (record.negative_prompt or "")
    if record.prompt_syntax == "plain" and any(sign in text for sign in "()[]"):
        fields["Emphasis"] = "None"  # to A1111, too, its brackets are letters
    for i, control in enumerate(record.controls):
        fields[f"ControlNet {i}"] = _pairs(_unit(control))
    fields["Version"] = f"controlkit {record.versions.get('controlkit', '')}".strip()
    # A1111 names LoRAs in the prompt, and reads them there.
    loras = [f"<lora:{Path(lora.source).stem}:{lora.weight:g}>" for lora in record.loras]
    lines = [" ".join([record.prompt, *loras])]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    return "\n".join([*lines, _pairs(fields)])


def _unit(control: ControlRecord) -> dict[str, object]:
    """A control as A1111 writes one. It has one weight; of a schedule that is the first."""
    scale = control.scale if isinstance(control.scale, int | float) else control.scale[0]
    return {
        "Module": "none" if control.is_map else control.kind,
        "Model": control.adapter,
        "Weight": f"{scale:g}",
        "Resize Mode": RESIZE_MODES[control.fit],
        "Guidance Start": f"{control.start:g}",
        "Guidance End": f"{control.end:g}",
        **({"Control Mode": CONTROL_MODES[control.mode]} if control.mode in CONTROL_MODES else {}),
    }


def parse(text: Mapping[str, str], *, source: str | Path) -> PictureRecord:
    """The record in a PNG's text chunks (`images.read_png_text`).

    Raises ValueError, naming `source`, when there is none, or one that this version cannot read.
    """
    if GRID_CHUNK in text:
        raise ValueError(
            f"{source} is a sheet of several pictures (--grid): only a single one can be repeated"
        )
    if JSON_CHUNK not in text:
        raise ValueError(f"{source} {_foreign(text)}: it was not made by `controlkit generate`")
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(PictureRecord).validate_json(text[JSON_CHUNK])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the JSON"
        raise ValueError(f"{source}: its parameters cannot be read: {where}: {first['msg']}") from None


def is_of(file: Path, record: PictureRecord) -> bool:
    """Whether a PNG is there whose parameters are these to the last one, as far as an older one has marks."""
    from controlkit.images import read_png_text

    try:
        if not file.is_file():
            return False
        found = parse(read_png_text(file), source=file)
    except ValueError:
        return False
    return found == _marked_as(record, found)


def _marked_as(record: PictureRecord, found: PictureRecord) -> PictureRecord:
    """A record without the marks that another one lacks."""
    loras = [
        replace(lora, mark=lora.mark if before.mark else "")
        for lora, before in zip(record.loras, found.loras, strict=False)
    ]
    return replace(
        record,
        loras=(*loras, *record.loras[len(loras) :]),
        base_mark=record.base_mark if found.base_mark else "",
        vae_mark=record.vae_mark if found.vae_mark else "",
    )


def _foreign(text: Mapping[str, str]) -> str:
    """What a picture of another program carries, in a few words."""
    if INFOTEXT_CHUNK in text:
        prompt = text[INFOTEXT_CHUNK].partition("\n")[0]
        shown = prompt if len(prompt) <= 60 else f"{prompt[:60]} ..."
        return f"carries parameters as A1111 writes them (its prompt: {shown!r}), which are not repeated here"
    if {"prompt", "workflow"} & set(text):
        return "carries a workflow of ComfyUI, which is not repeated here"
    return "carries no parameters"


def _pairs(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ",:\n") else value

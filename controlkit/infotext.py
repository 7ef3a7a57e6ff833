"""What a generated PNG says of itself: enough to make it again, byte for byte.

Two text chunks: `parameters` in the AUTOMATIC1111 infotext format, which galleries and other interfaces
read, and `controlkit`, a JSON object with everything, which `controlkit generate --like` reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

JSON_CHUNK = "controlkit"
INFOTEXT_CHUNK = "parameters"

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


@dataclass(frozen=True)
class ControlRecord:
    """One control of a picture.

    kind: canny, openpose, depth. path: of the source picture, as it was given. sha256: of that file's
    bytes, in hex. is_map: whether the file already was the map. adapter: name, folder or hub id.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: str
    path: str
    sha256: str
    is_map: bool
    adapter: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class PictureRecord:
    """Everything that determines one generated picture.

    width, height: pixels. dtype: the networks' precision ("float32"). versions: of the software that made it.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    prompt: str
    negative_prompt: str
    base: str
    controls: tuple[ControlRecord, ...]
    steps: int
    guidance: float
    scheduler: str
    seed: int
    width: int
    height: int
    device: str
    dtype: str
    versions: dict[str, str]


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
    for i, control in enumerate(record.controls):
        fields[f"ControlNet {i}"] = _pairs(
            {
                "Module": "none" if control.is_map else control.kind,
                "Model": control.adapter,
                "Weight": f"{control.scale:g}",
                "Resize Mode": "Crop and Resize",
                "Guidance Start": f"{control.start:g}",
                "Guidance End": f"{control.end:g}",
            }
        )
    fields["Version"] = f"controlkit {record.versions.get('controlkit', '')}".strip()
    lines = [record.prompt]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    return "\n".join([*lines, _pairs(fields)])


def parse(text: Mapping[str, str], *, source: str | Path) -> PictureRecord:
    """The record in a PNG's text chunks (`images.read_png_text`).

    Raises ValueError, naming `source`, when there is none, or one that this version cannot read.
    """
    if JSON_CHUNK not in text:
        raise ValueError(f"{source} carries no parameters: it was not made by `controlkit generate`")
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(PictureRecord).validate_json(text[JSON_CHUNK])
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the JSON"
        raise ValueError(f"{source}: its parameters cannot be read: {where}: {first['msg']}") from None


def _pairs(fields: Mapping[str, object]) -> str:
    return ", ".join(f"{name}: {_quoted(str(value))}" for name, value in fields.items())


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(sign in value for sign in ",:\n") else value

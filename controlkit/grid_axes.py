"""The settings that a grid varies, as they are written: `scale=0.5,1`, `seed=1..4`, `prompt=a cat|a dog`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, takewhile
from typing import Any

import numpy as np

from controlkit import arguments
from controlkit.files import at_home
from controlkit.limits import check_count
from controlkit.naming import unknown
from controlkit.precisions import DTYPES, torch_name

MOST = 400  # pictures of a grid
Size = tuple[int, int]


def _size(text: str) -> Size:
    width, height = map(int, re.split("[x×]", text))
    return width, height


_TAKES = {  # by how a value is read
    int: "whole numbers, as 1,2,4 or 1..4",
    float: "numbers, as 0.5,1",
    _size: "sizes in pixels, as 512x512,512x768",
    torch_name: f"precisions, as {','.join(DTYPES)}",
}
_PICTURE_KEYS: Mapping[str, Callable[[str], Any]] = {
    "prompt": str,
    "negative_prompt": str,
    "prompt_syntax": str,
    "clip_skip": int,
    "seed": int,
    "steps": int,
    "guidance": float,
    "guidance_rescale": float,
    "pag": float,
    "scheduler": str,
    "temperature": float,
    "strength": float,
    "hires_strength": float,
    "control_every": int,
    "features_every": int,
    "guidance_until": float,
    "merge_tokens": float,
    "image_noise": int,
    "class_label": int,
    "clip_guidance": float,
    "original_size": str,
    "negative_original_size": str,
}
_SESSION_KEYS: Mapping[str, Callable[[str], Any]] = {  # of what is loaded, and of the size, which maps have
    "base": at_home,
    "vae": at_home,
    "dtype": torch_name,
    "lora": float,
    "ip_adapter": float,
    "width": int,
    "height": int,
    "size": _size,
    "hires": float,
    "tile": int,
}
_CONTROL_KEYS = ("scale", "start", "end", "gate", "mode", "layers", "only_mid", "fit", "adapter")
_TEXTS = ("prompt", "negative_prompt")
_MOST_SHARED = 12  # letters with which all texts of an axis begin, and that their labels repeat
_ALSO = {"negative": "negative_prompt"}  # as the option is called, too
_KNOWN = (*_PICTURE_KEYS, *_SESSION_KEYS, *_CONTROL_KEYS)


@dataclass(frozen=True)
class Axis:
    """One setting and its values. A control's setting may name one kind: canny.scale.

    lora and ip_adapter are the weight of the LoRA and of the IP-Adapter that there is.
    """

    key: str
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The setting, without the control that it is of."""
        return self.key.rpartition(".")[2]

    @property
    def kind(self) -> str:
        """The control that it is of, "" for all or none."""
        return self.key.rpartition(".")[0]

    @property
    def is_of_controls(self) -> bool:
        """Whether it is a control's setting."""
        return self.name in _CONTROL_KEYS

    @property
    def is_of_session(self) -> bool:
        """Whether it decides what is loaded, or the pictures' size, which the maps have."""
        return self.name in _SESSION_KEYS or self.name == "adapter"

    @property
    def is_text(self) -> bool:
        """Whether its values are texts, which may be long."""
        return self.key in _TEXTS

    @cached_property
    def _shared(self) -> str:
        """The words with which all texts begin: a label has room for what tells them apart."""
        rows = zip(*(value.split(" ")[:-1] for value in self.values), strict=False)
        return "".join(f"{row[0]} " for row in takewhile(lambda row: len({*row}) == 1, rows))

    def label(self, value: Any) -> str:
        """How a value is named on the sheet."""
        if self.is_text:
            told = f"...{value[len(self._shared) :]}" if len(self._shared) > _MOST_SHARED else value
            return told if self.key == "prompt" else f"negative: {told}"
        if self.key == "size":
            return f"{value[0]}x{value[1]}"
        shown = "..".join(f"{number:g}" for number in value) if isinstance(value, tuple) else value
        return f"{self.key}={shown:g}" if isinstance(shown, float) else f"{self.key}={shown}"


def split_words(words: Sequence[str], grid: Sequence[str]) -> tuple[str | None, list[str]]:
    """The prompt and the settings of a grid, from the words on the command line: `--grid` may be followed by
    two settings, of which the shell gives the second as a word of its own.

    Raises ValueError for more than one word that is no setting.
    """
    settings = [word for k, word in enumerate(words) if grid and _is_setting(word, first=k == 0)]
    others = [word for word in words if word not in settings]
    if len(others) > 1:
        raise ValueError(f"unexpected extra argument {others[1]!r}: put quotes around the prompt")
    return (others[0] if others else None), [*grid, *settings]


def _is_setting(word: str, *, first: bool) -> bool:
    """Whether a word is a setting of a grid; the first word, which may be the prompt, only if it looks whole
    like one."""
    match = re.match(r"([a-z_.]+)=", word)
    if match is None or not first:
        return match is not None
    if _ALSO.get(match[1], match[1]) in _TEXTS:
        return "|" in word
    known = match[1].rpartition(".")[2] in _KNOWN
    several = "," in word or ".." in word  # misspelt, then
    return not re.search(r"\s", word) and (known or several)


def parse_axes(texts: Sequence[str]) -> list[Axis]:
    """Read one or two KEY=VALUE,VALUE,... or KEY=VALUE|VALUE|... or, for whole numbers, KEY=FIRST..LAST.

    Raises ValueError for an unknown key, a value that is none, the same key twice, or too many pictures.
    """
    axes = [_axis(text) for text in texts]
    if not 1 <= len(axes) <= 2:
        raise ValueError(f"--grid varies one setting or two, not {len(axes)}")
    keys = {axis.key for axis in axes}
    if len(keys) < len(axes):
        raise ValueError(f"--grid varies {axes[0].key} twice")
    for one, other in permutations(axes, 2):
        if one.name == one.key == other.name:
            raise ValueError(f"--grid varies {other.key} twice: {one.key} is that of every control")
    if "size" in keys and keys & {"width", "height"}:
        raise ValueError("--grid varies the size twice: give size alone, or width and height")
    count = int(np.prod([len(axis.values) for axis in axes]))
    if count > MOST:
        raise ValueError(f"--grid would make {count} pictures; {MOST} is the most")
    return axes


def _axis(text: str) -> Axis:
    key, equals, rest = text.partition("=")
    key = _ALSO.get(key, key)
    name = key.rpartition(".")[2]
    if not (equals and rest):
        raise ValueError(f"--grid {text!r} must be KEY=VALUE,VALUE or KEY=FIRST..LAST, as scale=0.5,1")
    if name not in _KNOWN or (name != key and name not in _CONTROL_KEYS):
        raise unknown("setting of a grid", key, _KNOWN)
    try:
        return Axis(key, tuple(_values(name, rest)))
    except ValueError as error:
        raise ValueError(f"--grid {text!r}: {error}") from None


def _values(name: str, rest: str) -> list[Any]:
    if name in _TEXTS and "|" not in rest:
        raise ValueError("texts are parted by |, as prompt=a red cube|a blue cube")
    parts = [part.strip() for part in rest.split("|" if "|" in rest else ",")]
    if name in _CONTROL_KEYS and name != "adapter":
        return [arguments.parse_control_setting(name, part) for part in parts]
    first, dots, last = rest.partition("..")
    if dots and _reader(name) is int:
        start, end = _value(name, first), _value(name, last)
        if end < start:
            raise ValueError(f"{first}..{last} runs backwards")
        check_count(end - start + 1)
        return list(range(start, end + 1))
    return [_value(name, part) for part in parts]


def _reader(name: str) -> Callable[[str], Any]:
    return {**_PICTURE_KEYS, **_SESSION_KEYS, "adapter": at_home}[name]


def _value(name: str, text: str) -> Any:
    read = _reader(name)
    if read not in _TAKES and not text and name != "negative_prompt":
        raise ValueError(f"one {name} is empty")
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"{name} cannot be {text!r}: it takes {_TAKES[read]}") from None

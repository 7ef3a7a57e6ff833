"""The small grammars of the command line: KIND=PATH:SCALE, KIND=NAME, KEY=VALUE."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlkit.files import at_home
from controlkit.naming import unknown
from controlkit.picture_files import SUFFIXES
from controlkit.rules import USUAL_FIT, USUAL_GATE, USUAL_MODE, check_rule

_SETTING = re.compile(r"[a-z][a-z_0-9]*(\.[a-z][a-z_0-9]*)?=")
_CONTROL_SETTING = re.compile(r":([^\W\d][\w-]*)=")


NONE = "none"
"""Given to an option, it takes away what an earlier picture had."""

Scale = float | tuple[float, ...]
"""A control's strength; several numbers are a schedule over the steps."""


@dataclass(frozen=True)
class ControlArgument:
    """One --control or --map: the kind of map, the file as it was written, how the control acts.

    mask: the file of the region in which it acts, "" for everywhere. layers: weights, or a curve's name.
    adapter: its own, where several of one kind have one each; "" is that of its kind.
    """

    kind: str
    path: str
    scale: Scale
    is_map: bool
    start: float = 0.0
    end: float = 1.0
    gate: str = USUAL_GATE
    mode: str = USUAL_MODE
    layers: str | tuple[float, ...] | None = None
    mask: str = ""
    only_mid: bool = False
    fit: str = USUAL_FIT
    adapter: str = ""


def parse_control(text: str, *, is_map: bool) -> ControlArgument:
    """Read KIND=PATH, KIND=PATH:SCALE or KIND=PATH:KEY=VALUE:..., the keys being those of ControlArgument.

    The scale is whatever follows the path's last colon and reads as a number, so `canny=C:\\a.png` and
    `canny=a:b.png` are paths alone; a file whose whole name ends in `:0.5` is that file if it exists. A
    schedule is written 1..0.2, or with more points 0..1..0.
    Raises ValueError when a part is missing, a key unknown or a number outside its range.
    """
    option = "--map" if is_map else "--control"
    kind, equals, rest = text.partition("=")
    if not (kind and equals and rest):
        raise ValueError(f"{option} {text!r} must be KIND=PICTURE or KIND=PICTURE:SCALE, as canny=a.jpg:0.8")
    try:
        rest, settings = _split_control_settings(rest)
        path, scale = _split_scale(rest, what=_BEHIND)
        if path != rest and "scale" in settings:
            raise ValueError("scale is given twice")
        if not path:
            raise ValueError("it names no picture: KIND=PICTURE or KIND=PICTURE:SCALE")
        found = ControlArgument(kind.strip(), at_home(path), **{"scale": scale, **settings}, is_map=is_map)
        check_rule(*(getattr(found, key) for key in _RULE))
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {error}") from None
    return found


def split_control(text: str) -> tuple[str, str, str]:
    """What stands before the picture of KIND=PATH:HOW, the path, and what stands behind it, as written.

    Raises ValueError for a setting that a control does not have.
    """
    kind, equals, rest = text.partition("=")
    try:
        path, _ = _split_scale(_split_control_settings(rest)[0], what=_BEHIND)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None
    return kind + equals, path, rest[len(path) :]


def split_mask(how: str) -> tuple[str, str, str]:
    """What stands before the mask's file in the how of a control (see `split_control`), the file as it was
    written, "" where there is none, and what stands behind it.
    """
    before, key, rest = how.partition(":mask=")
    path = _split_strength(_split_control_settings(rest)[0])[0]
    return before + key, path, rest[len(path) :]


def _split_control_settings(rest: str) -> tuple[str, dict[str, Any]]:
    """Take KEY=VALUE parts off the end, and a strength behind one; a file's name in them may have colons."""
    settings: dict[str, Any] = {}
    while not os.path.exists(rest) and (found := [*_CONTROL_SETTING.finditer(rest)]):
        value, strength = _split_strength(rest[found[-1].end() :])
        rest = rest[: found[-1].start()]
        for key, text in ((found[-1][1], value), ("scale", strength)):
            if text is None:
                continue
            if key in settings:
                raise ValueError(f"{key} is given twice")
            settings[key] = _checked_setting(key, text)
    return rest, settings


def _split_strength(value: str) -> tuple[str, str | None]:
    """A file or another value, and the strength that stands behind it, None where there is none."""
    before, colon, tail = value.rpartition(":")
    if not colon or os.path.exists(at_home(value)):  # Path.exists raises for a name that is too long
        return value, None
    try:
        parse_scale(tail)
    except ValueError:
        return value, None
    return before, tail


def _checked_setting(key: str, text: str) -> Any:
    if key in _CONTROL_KEYS:
        return parse_control_setting(key, text)
    if difflib.get_close_matches(key, ("strength", "weight"), n=1):  # as A1111 and ComfyUI call it
        raise ValueError(f"unknown setting of a control {key!r} (did you mean 'scale'?)")
    raise unknown("setting of a control", key, _CONTROL_KEYS)


def parse_control_setting(key: str, text: str) -> Any:
    """Read the value of one of a control's settings. Raises ValueError where it is none."""
    try:
        return _CONTROL_KEYS[key](text)
    except ValueError:
        raise ValueError(f"{key} must be {_ALLOWED[key]}, not {text!r}") from None


def parse_scale(text: str) -> Scale:
    """Read a number, or a schedule of numbers, as 1..0.2. Raises ValueError for anything else."""
    numbers = tuple(float(part) for part in text.split(".."))
    return numbers if len(numbers) > 1 else numbers[0]


def control_text(kind: str, path: str, how: Mapping[str, Any]) -> str:
    """KIND=PATH:SCALE and what differs from the defaults, as `parse_control` reads it.

    how: the settings by the names of `ControlArgument`; those that are absent are the defaults. Its adapter
    is "own_adapter", and only where it is another than its kind's.
    """
    usual = ControlArgument(kind, path, 1.0, is_map=True)
    parts = [f"{kind}={path}", _joined(how["scale"], "..")]
    for key in ("start", "end", "gate", "mode", "layers", "mask", "fit"):
        if how.get(key, own := getattr(usual, key)) != own:
            parts.append(f"{key}={_joined(how[key], ',')}")
    parts += ["only_mid=true"] if how.get("only_mid") else []
    return ":".join([*parts, *([f"adapter={how['own_adapter']}"] if how.get("own_adapter") else [])])


def adapters_apart(named: Sequence[tuple[str, str]]) -> tuple[dict[str, str], list[str]]:
    """Of the kinds and adapters of controls, each kind's first adapter, and every control's own one ("" where
    it is its kind's).
    """
    first = dict(reversed(named))
    return first, ["" if adapter == first[kind] else adapter for kind, adapter in named]


def number_text(value: float) -> str:
    """A number as it is written on a command line: 1, 0.75; it is read as the same number."""
    value = float(value)
    return str(int(value)) if value.is_integer() else repr(value)


def _joined(value: Any, between: str) -> str:
    if isinstance(value, int | float):
        return number_text(value)
    return value if isinstance(value, str) else between.join(_joined(one, between) for one in value)


def _layers(text: str) -> str | tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        if "," in text:
            raise
        return text


def _file(text: str) -> str:
    if not text:
        raise ValueError
    return at_home(text)


def _yes(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


_BEHIND = "a strength, as 0.8 or 1..0.2, or a setting, as mode=prompt"
_RULE = ("scale", "start", "end", "gate", "mode", "layers", "fit")  # in the order of `check_rule`
_CONTROL_KEYS: dict[str, Callable[[str], Any]] = {
    "scale": parse_scale,
    "start": float,
    "end": float,
    "gate": str,
    "mode": str,
    "layers": _layers,
    "mask": _file,
    "only_mid": _yes,
    "fit": str,
    "adapter": _file,
}
_ALLOWED: Mapping[str, str] = {
    "scale": "a number, or several as a schedule: 1..0.2",
    "start": "a number from 0 to 1",
    "end": "a number from 0 to 1",
    "layers": "a curve's name, or numbers with commas",
    "mask": "a file",
    "only_mid": "true or false",
    "adapter": "a name, a folder or a file",
}


def is_none(text: str) -> bool:
    """Whether nothing is asked for; a file called none is a file."""
    return text == NONE and not os.path.exists(text)


def without_none(texts: Sequence[str]) -> list[str]:
    """What is asked for by an option that may be repeated."""
    return [text for text in texts if not is_none(text)]


def parse_number(text: str, option: str, *, whole: bool = False) -> float | None:
    """Read a number, or none. Raises ValueError for anything else."""
    if text == NONE:
        return None
    try:
        return int(text) if whole else float(text)
    except ValueError:
        kind = "whole number" if whole else "number"
        raise ValueError(f"{option} must be a {kind}, or none, not {text!r}") from None


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Read several KIND=NAME_OR_PATH into a mapping.

    Raises ValueError for a missing part, or two names for one kind.
    """
    adapters: dict[str, str] = {}
    for text in texts:
        kind, equals, name = text.partition("=")
        if not (kind and equals and name):
            raise ValueError(
                f"--adapter {text!r} must be KIND=NAME, KIND=FOLDER or KIND=FILE, as canny=run/controlnet"
            )
        kind = kind.strip()
        if adapters.setdefault(kind, name) != name:
            raise ValueError(
                f"--adapter gives two adapters for {kind}: {adapters[kind]} and {name} (for each control its"
                f" own: --control {kind}=PICTURE:adapter=NAME)"
            )
    return adapters


def parse_compared(text: str) -> tuple[str, str, dict[str, Any]]:
    """Read [KIND=]NAME[:SCALE][:KEY=VALUE...], an adapter and how it acts, as kind or "", name, settings.

    The settings are those of `parse_control` but the mask, and only those that are given. Raises ValueError,
    as there, and for a missing name.
    """
    kind, equals, rest = text.partition("=")
    if not equals or not kind.strip().replace("_", "").isalnum() or os.path.exists(text):
        kind, rest = "", text
    try:
        rest, settings = _split_control_settings(rest)
        name, scale = _split_scale(rest)
        if name != rest:
            if "scale" in settings:
                raise ValueError("scale is given twice")
            settings = {"scale": scale, **settings}
        if not name:
            raise ValueError("it names no adapter: NAME, KIND=NAME or KIND=NAME:SCALE")
        if "mask" in settings:
            raise ValueError("mask is of one picture, and many are compared")
        if "fit" in settings:
            raise ValueError("fit is of one map: those of the data are cut as their pictures are")
        if "adapter" in settings:
            raise ValueError("adapter is what is named here: each one has an --adapter of its own")
        usual = ControlArgument(kind, name, 1.0, is_map=True)
        rule = {key: settings.get(key, getattr(usual, key)) for key in _RULE}
        check_rule(*rule.values())
    except ValueError as error:
        raise ValueError(f"--adapter {text!r}: {error}") from None
    return kind.strip(), name, settings


def parse_weighted(text: str) -> tuple[str, float]:
    """Read SOURCE or SOURCE:WEIGHT; a file whose whole name ends in `:0.5` is that file if it exists."""
    text = at_home(text)
    source, scale = _split_scale(text)
    return (text, 1.0) if isinstance(scale, tuple) else (source, scale)


def parse_picture_prompt(text: str) -> tuple[str, tuple[str, ...], float]:
    """Read ADAPTER=PICTURE, or ADAPTER=PICTURE,PICTURE:SCALE, as its three parts.

    A file whose name has a comma, or ends like a scale, is that file if it exists. Raises ValueError where a
    part is missing.
    """
    source, _, rest = text.partition("=")
    rest, scale = parse_weighted(rest)
    pictures = (rest,) if os.path.exists(rest) else tuple(rest.split(","))
    if not (source and all(pictures)):
        raise ValueError(
            f"--ip-adapter {text!r} must be FILE=PICTURE or FILE=PICTURE:SCALE, as a.safetensors=b.jpg:0.6"
        )
    return at_home(source), tuple(map(at_home, pictures)), scale


def parse_word(text: str) -> tuple[str, str]:
    """Read FILE or WORD=FILE, as the word, or "", and the file; a file whose name has a = is that file."""
    word, _, file = text.rpartition("=")
    whole = at_home(text)
    return ("", whole) if os.path.exists(whole) else (word, at_home(file))


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Read several KEY=VALUE into a mapping.

    Raises ValueError for a missing part or a key given twice.
    """
    settings: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ValueError(f"{text!r} must be KEY=VALUE, as in low=50")
        if key in settings:
            raise ValueError(f"{key} is given twice")
        settings[key] = value
    return settings


def split_settings(texts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Tell files from KEY=VALUE among several arguments; a file whose name looks like a setting is a file.

    Raises ValueError as `parse_settings`.
    """
    is_setting = [bool(_SETTING.match(text)) and not os.path.exists(text) for text in texts]
    paths = [text for text, setting in zip(texts, is_setting, strict=True) if not setting]
    settings = [text for text, setting in zip(texts, is_setting, strict=True) if setting]
    return paths, parse_settings(settings)


def is_one_map(kinds: Sequence[str], paths: Sequence[str], output: str | None) -> bool:
    """Whether a picture's one map is asked for, and not a folder of maps.

    Raises ValueError for several maps whose output is the name of a picture.
    """
    one = len(kinds) == len(paths) == 1 and not os.path.isdir(paths[0])
    one = one and (os.path.exists(paths[0]) or not glob.has_magic(paths[0]))
    suffix = "" if output is None else os.path.splitext(output)[1].lower()
    is_file = suffix in SUFFIXES and not os.path.isdir(str(output))
    if is_file and len(paths) == 1 and os.path.isdir(paths[0]):
        raise ValueError(f"{paths[0]} is a folder: its maps go into a folder, which -o names, not {output}")
    if is_file and not one:
        raise ValueError(f"there are several maps, and {output} is one picture: -o must name a folder")
    return one and (is_file or output is None)


def numbered_outputs(output: str, count: int) -> list[Path]:
    """Where `count` pictures go: `out.png` itself for one, else `out-1.png`, `out-2.png` ...

    Raises ValueError unless the name ends in .png, the format that keeps the parameters.
    """
    path = Path(at_home(output))
    if path.suffix.lower() != ".png":
        raise ValueError(f"the output {output} must end in .png, the format that keeps the parameters")
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, count + 1)]


def check_not_inputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise ValueError if one of `outputs` is a file that they are made from."""
    read = set(map(os.path.realpath, inputs))  # which takes links that lead nowhere, too
    for output in outputs:
        if os.path.realpath(output) in read:
            raise ValueError(f"the output {output} would overwrite what it is made from: choose another -o")


def _split_scale(rest: str, *, what: str = "a number, as 0.8") -> tuple[str, Scale]:
    """The path and the number behind it. Raises ValueError where something else stands behind a file.

    what: may stand there.
    """
    path, strength = _split_strength(rest)
    if strength is not None:
        return path, parse_scale(strength)
    path, colon, tail = rest.rpartition(":")
    if colon and not os.path.exists(at_home(rest)) and os.path.exists(at_home(path)):
        raise ValueError(f"behind {path} stands {tail!r}, and not {what}")
    return rest, 1.0


def parse_bytes(text: str) -> int:
    """An amount of memory in bytes: 4GB, 3.5gb or 800MB, of 1000s; GiB and MiB of 1024s.

    Raises ValueError for anything else, or nothing at all.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm])(i?)b\s*", text.lower())
    if match is None:
        raise ValueError(f"an amount of memory is written as in 4GB, 3.5GB or 800MB, not {text!r}")
    number, unit, binary = match.groups()
    amount = int(float(number) * (1024 if binary else 1000) ** (3 if unit == "g" else 2))
    if amount <= 0:
        raise ValueError(f"an amount of memory must be more than nothing, not {text!r}")
    return amount

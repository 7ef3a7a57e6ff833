"""Options of preprocessors as a command line has them: text that becomes what a class declares."""

import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from controlkit.naming import unknown

Range = tuple[float, float]
"""Two numbers between which one is drawn; as text ``50..150``."""

_SWITCHES = dict.fromkeys(("true", "yes", "on", "1"), True) | dict.fromkeys(
    ("false", "no", "off", "0"), False
)


def known_options(make: type) -> Mapping[str, Any]:
    """Return the keyword options of a preprocessor's class: name to declared type."""
    hints = typing.get_type_hints(vars(make)["__init__"])
    parameters = inspect.signature(make).parameters
    return {name: hints[name] for name in parameters}


def checked_options(make: type, given: Mapping[str, Any], *, kind: str) -> dict[str, Any]:
    """Return the options given as the types that the class declares.

    Raises:
        ValueError: one line: an unknown option (with a suggestion), or a value of another type.
    """
    known = known_options(make)
    for name in given:
        if name not in known:
            raise unknown(f"{kind} option", name, known)
    return {name: _of_type(known[name], value, f"{kind}'s {name}") for name, value in given.items()}


def _of_type(wanted: Any, value: Any, name: str) -> Any:
    choices = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    choices = tuple(choice for choice in choices if choice is not types.NoneType)  # the same as not given
    for choice in choices:
        read = _READERS[choice](value)
        if read is not None:
            return read
    allowed = " or ".join(_NAMES[choice] for choice in choices)
    raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def _read_number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value) if isinstance(value, (numbers.Real, str)) else None
    except (ValueError, OverflowError):
        return None


def _read_whole(value: Any) -> int | None:
    number = _read_number(value)
    return int(number) if number is not None and math.isfinite(number) and number == int(number) else None


def _read_switch(value: Any) -> bool | None:
    return value if isinstance(value, bool) else _SWITCHES.get(str(value).casefold())


def _read_text(value: Any) -> str | None:
    return str(value) if isinstance(value, (str, os.PathLike)) else None


def _read_range(value: Any) -> Range | None:
    parts = value.split("..") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    low, high = _read_number(parts[0]), _read_number(parts[1])
    return None if low is None or high is None else (low, high)


_READERS: dict[Any, Callable[[Any], Any]] = {
    float: _read_number,
    int: _read_whole,
    bool: _read_switch,
    str: _read_text,
    Range: _read_range,
}
_NAMES: dict[Any, str] = {
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    str: "text",
    Range: "a range as 50..150",
}

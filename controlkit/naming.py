"""Names that users type: suggestions, and the one-line error for a name that does not exist."""

import difflib
from collections.abc import Iterable, Sequence


def first_of(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to ``name``, or ``""`` when none is close.

    Case is ignored. Closeness is difflib's ratio, at least 0.6.
    """
    by_folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1)
    return f" (did you mean {by_folded[close[0]]!r}?)" if close else ""


def kind_of_value(value: object) -> str:
    """What a value is, with its article: "a list", "an int"."""
    return with_article(type(value).__name__)


def with_article(name: str) -> str:
    """A name of a kind, with its article."""
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def check_list_of(name: str, given: object, kind: type, example: str) -> None:
    """Raise ValueError unless it is a list of things of a kind, as ``example`` is one."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{name} is a list, as [{example}], not {kind_of_value(given)}")
    for one in given:
        if not isinstance(one, kind):
            raise ValueError(f"{name} is a list of {kind.__name__}, and {kind_of_value(one)} is in it")


def check_callables(**given: object) -> None:
    """Raise ValueError for what is given to be called and cannot be; None is not called."""
    for name, function in given.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name} is a function, not {kind_of_value(function)}")


def unknown(what: str, name: object, choices: Iterable[str]) -> ValueError:
    """Build (not raise) the error for a ``name`` that is none of ``choices``; ``what`` says what was named.

    A ``name`` that is no text, as None, is told as it reads, and resembles none.

    >>> str(unknown("control", "cany", ["canny", "depth"]))
    "unknown control 'cany' (did you mean 'canny'?); choose from: canny, depth"
    """
    given, listed = str(name), sorted(choices)
    suggestion = did_you_mean(given, listed) if isinstance(name, str) else ""
    return ValueError(f"unknown {what} {given!r}{suggestion}; choose from: {', '.join(listed)}")

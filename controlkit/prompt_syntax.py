"""How a prompt's letters are read: as they are, or with A1111's weights and breaks.

    plain    every letter is text, as in diffusers; what is beyond 77 tokens is cut off, with a warning
    a1111    (word) x 1.1, [word] / 1.1, (word:1.3) x 1.3, also nested; a backslash makes a bracket or another
             backslash a letter, and is none itself; BREAK begins a new chunk of 75 tokens, also within
             brackets, as does running out of one: nothing is cut off

What is left open goes on to the end, what closes nothing is text, and so is everything that A1111 has
besides: prompts that change between the steps, `AND`, files in angle brackets (`notes` names them).

The syntax is that of AUTOMATIC1111/stable-diffusion-webui (its wiki, Features: "Attention/emphasis" and
"Infinite prompt length"). No library is used: compel 2.5.1 runs beside current transformers, but has a syntax
of its own, in which (red:1.3) is the words "red:1 . 3" with neither a weight nor a warning, and C++ a weight.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from controlkit import limits, naming

SYNTAXES = ("plain", "a1111")

_MARK = re.compile(
    r"""
      \\(?P<letter>[()\[\]\\]?)
    | :\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)
    | (?P<bracket>[()\[\]])
    | (?P<break>\bBREAK\b)
    """,
    re.VERBOSE,
)
_WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")
_FACTORS = {")": 1.1, "]": 1 / 1.1}
_OPENED_BY = {")": "(", "]": "["}
_LEFTOVERS = {
    r"\[[^\[\]]*:\s*\d*\.?\d+\s*\]": "a prompt that changes between the steps",
    r"\[[^\[\]]*\|[^\[\]]*\]": "a prompt that changes between the steps",
    r"\bAND\b": "a composition of prompts",
}


class Words(NamedTuple):
    """A run of text with one weight."""

    text: str
    weight: float


def check_syntax(syntax: str) -> None:
    """Raise ValueError unless `syntax` is one of `SYNTAXES`."""
    if syntax not in SYNTAXES:
        raise naming.unknown("prompt syntax", syntax, SYNTAXES)


def parse(prompt: str) -> list[list[Words]]:
    """The parts of a prompt in A1111's syntax, from one BREAK to the next, each as runs of one weight.

    There is at least one part; a part without text has no runs. Raises ValueError for a weight outside
    `limits.WEIGHT_RANGE`, of one bracket or of several within each other.
    """
    texts, weights, breaks = _read(prompt)
    for weight in weights:
        limits.check_weight(weight)
    parts: list[list[Words]] = []
    for first, last in zip([0, *breaks], [*breaks, len(texts)], strict=True):
        part: list[Words] = []
        for text, weight in zip(texts[first:last], weights[first:last], strict=True):
            if part and part[-1].weight == weight:
                text = part.pop().text + text
            part.append(Words(text, weight))
        parts.append(part)
    return parts


def _read(prompt: str) -> tuple[list[str], list[float], list[int]]:
    """The pieces of text, their weights, and before which pieces a BREAK stands."""
    texts: list[str] = []
    weights: list[float] = []
    breaks: list[int] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(first: int, factor: float) -> None:
        for k in range(first, len(weights)):
            weights[k] *= factor

    def add(text: str) -> None:
        if text:
            texts.append(text)
            weights.append(1.0)

    end = 0
    for mark in _MARK.finditer(prompt):
        add(prompt[end : mark.start()])
        end = mark.end()
        closing = ")" if mark["weight"] else mark["bracket"] or ""
        if mark["break"]:
            breaks.append(len(texts))
        elif closing in open_at:
            open_at[closing].append(len(texts))
        elif closing and open_at[_OPENED_BY[closing]]:
            factor = float(mark["weight"]) if mark["weight"] else _FACTORS[closing]
            weigh(open_at[_OPENED_BY[closing]].pop(), factor)
        else:
            add(mark[0] if mark["letter"] is None else mark["letter"])
    add(prompt[end:])
    for closing, opening in _OPENED_BY.items():
        for first in open_at[opening]:
            weigh(first, _FACTORS[closing])
    return texts, weights, breaks


def _extra_networks(prompt: str) -> list[str]:
    """Of <lora:name:weight> and its like, which is no part of a prompt here."""
    match = re.search(r"<([a-z]+):[^<>]+>", prompt)
    if match is None:
        return []
    instead = "a LoRA is given as --lora FILE:WEIGHT" if match[1] == "lora" else "it is not supported"
    return [f"{match[0]!r} is read as text: {instead}"]


def notes(prompt: str, syntax: str) -> list[str]:
    """What A1111 would not read as text, but is read so here: a line for each."""
    if syntax == "plain":
        match = _WEIGHT.search(prompt)
        told = [f"{match[0]!r} is read as text: for weights, add --prompt-syntax a1111"] if match else []
        return [*told, *_extra_networks(prompt)]
    found = _extra_networks(prompt)
    for pattern, what in _LEFTOVERS.items():
        match = re.search(pattern, prompt)
        if match is not None:
            found.append(f"{match[0]!r} is read as text: {what} is not supported")
    return found

"""What is wrong with the maps that a training, or an evaluation, is about to take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from numpy.typing import NDArray

LOOKED_AT = 16
"""Maps that show what is wrong with all of a data set."""


def wrong_maps(kind: str, maps: Sequence[NDArray[Any]], *, meant: Collection[str] = ()) -> list[str]:
    """A line for each thing that is wrong with the first maps of a kind, uint8 (H, W, 3).

    meant: codes of findings that are no mistake.
    """
    from controlkit import preprocessors

    if kind in preprocessors.names():
        findings = [one for m in maps for one in preprocessors.lint(m, kind) if one.code not in meant]
        found = Counter(f"{one.message}; {one.cure}" for one in findings)
    else:
        blank = "of one colour: nothing can be learned from them"
        found = Counter(blank for m in maps if (m == m[:1, :1]).all())
    return [f"{count} of the first {len(maps)} {kind} maps: {text}" for text, count in found.items()]

"""An evaluation's summary as lines for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from controlkit.metrics import Interval
from controlkit.training.evaluation.map_scores import MEASURES, principal

if TYPE_CHECKING:
    from controlkit.training.evaluation.summary import Group, Summary

_NAMED = 3  # sizes in a line


def table(summary: Summary) -> list[str]:
    """A table for each kind of map, what was left out, and what it comes to."""
    lines: list[str] = []
    for group in summary.groups:
        lines += [*_group(group, summary), ""]
    lines += [f"not measured: {name}: {reason}" for name, reason in summary.skipped.items()]
    for arm in summary.arms:
        if arm.label in summary.reach:
            reach = summary.reach[arm.label]
            sure = f" ({reach.low:.0%} to {reach.high:.0%})" if math.isfinite(reach.low) else ""
            lines.append(
                f"{arm.label}: {reach.value:.0%}{sure} of the way from no control to the autoencoder's"
                f" pictures, in {principal(arm.kind)}"
            )
    for one in summary.differences:
        if one.measure in {principal(arm.kind) for arm in summary.arms if arm.label == one.first}:
            lines.append(f"{one.first} - {one.second}, {one.measure}: {_told(one.interval)}: {one.verdict}")
    return lines


def sizes_told(sizes: Mapping[tuple[int, int], int]) -> str:
    """The widths and heights of pairs, in a phrase; of many the narrowest and the widest."""
    told = [f"{width}x{height}" for width, height in sorted(sizes, key=lambda size: size[0] / size[1])]
    return ", ".join(told) if len(told) <= _NAMED else f"{len(told)} sizes from {told[0]} to {told[-1]}"


def _group(group: Group, summary: Summary) -> list[str]:
    """A line for each of what is compared; the first measure with its interval."""
    labels = [arm.label for arm in summary.arms if any(arm.label in t for t in group.intervals.values())]
    names = [f"{m} (less is better)" if MEASURES[m].lower else m for m in group.measures]
    columns = []
    for k, measure in enumerate(group.measures):
        told = [group.intervals[measure].get(label) for label in labels]
        columns.append(["" if one is None else _told(one) if not k else f"{one.value:.3f}" for one in told])
    widths = [max(map(len, [name, *column])) for name, column in zip(names, columns, strict=True)]
    first = max(map(len, [*labels, group.kind, "pictures"]))
    lines = [[group.kind or "pictures", *names]]
    lines += [[label, *(column[k] for column in columns)] for k, label in enumerate(labels)]
    return [
        "  ".join([line[0].ljust(first), *(c.rjust(w) for c, w in zip(line[1:], widths, strict=True))])
        for line in lines
    ]


def _told(found: Interval) -> str:
    if not math.isfinite(found.low):
        return f"{found.value:.3f}"
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"

"""Values with their intervals, one line for each of what is compared, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from controlkit.metrics import Interval
from controlkit.training.reporting.charts import number, ticks

CSS = """
.intervals{width:100%;max-width:760px;height:auto;display:block;font:13px system-ui,sans-serif}
.intervals text{fill:var(--faint)}
.intervals .who{fill:var(--ink)}
.intervals .value{fill:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.intervals .grid{stroke:var(--grid);stroke-width:1}
.intervals .span{stroke-width:3;stroke-linecap:round}
.intervals.narrow{display:none}
@media (max-width:600px){.intervals.narrow{display:block}.intervals.wide{display:none}}
"""
_WIDTH, _ROW, _TOP, _BOTTOM, _VALUE = 760, 26, 8, 26, 76
_NARROW, _TALL_ROW = 340, 42
_LETTER = 7.2


@dataclass(frozen=True)
class Line:
    """One of what is compared; `colour` is its number in the palette, -1 for what stands beside."""

    label: str
    interval: Interval
    colour: int = -1


def interval_chart(lines: Sequence[Line], *, label: str) -> str:
    """An SVG with a dot for each value and a bar for its interval; "" where no value is a number.

    There are two, of which a page shows the one that suits its width. label: what is shown, for who cannot
    see it.
    """
    kept = [line for line in lines if math.isfinite(line.interval.value)]
    if not kept:
        return ""
    ends = [
        value
        for line in kept
        for value in (line.interval.value, line.interval.low, line.interval.high)
        if math.isfinite(value)
    ]
    low, high = min(0.0, *ends), max(ends)
    high = high if high > low else low + 1.0
    left = 16 + round(_LETTER * max(len(line.label) for line in kept))
    wide = _Layout("wide", _WIDTH, left, _WIDTH - _VALUE, _ROW)
    narrow = _Layout("narrow", _NARROW, 8, _NARROW - 8, _TALL_ROW)
    return "".join(_drawn(kept, low, high, layout, label) for layout in (wide, narrow))


class _Layout(NamedTuple):
    """How wide a chart is, where its axis begins and ends, and how high a line is: a tall one has its label
    above the bar.
    """

    name: str
    width: int
    left: int
    right: int
    row: int

    @property
    def is_narrow(self) -> bool:
        return self.row == _TALL_ROW


def _drawn(lines: Sequence[Line], low: float, high: float, layout: _Layout, label: str) -> str:
    height = _TOP + layout.row * len(lines) + _BOTTOM

    def place(value: float) -> float:
        return layout.left + (value - low) / (high - low) * (layout.right - layout.left)

    body = [
        f'<line class="grid" x1="{place(t):.1f}" x2="{place(t):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        f'<text x="{place(t):.1f}" y="{height - 8}" text-anchor="middle">{number(t)}</text>'
        for t in ticks(low, high, 6)
    ]
    body += [_row(line, _TOP + layout.row * (k + 0.5), place, layout) for k, line in enumerate(lines)]
    return (
        f'<svg class="intervals {layout.name}" viewBox="0 0 {layout.width} {height}" role="img"'
        f' aria-label="{escape(label)}"><title>{escape(label)}</title>{"".join(body)}</svg>'
    )


def figure(value: float) -> str:
    """A value for people: as many digits after the point as its size leaves meaning."""
    size = abs(value)
    return f"{value:.1f}" if size >= 20 else f"{value:.2f}" if size >= 5 else f"{value:.3f}"


def _row(line: Line, y: float, place: Callable[[float], float], layout: _Layout) -> str:
    found = line.interval
    colour = "var(--faint)" if line.colour < 0 else f"var(--c{line.colour % 6})"
    of_bar, of_text = (y + 9, y - 4) if layout.is_narrow else (y, y + 4.5)
    bar = ""
    if math.isfinite(found.low) and math.isfinite(found.high):
        bar = (
            f'<line class="span" style="stroke:{colour};opacity:.45" x1="{place(found.low):.1f}"'
            f' x2="{place(found.high):.1f}" y1="{of_bar:.1f}" y2="{of_bar:.1f}"/>'
        )
    who = 'x="0" text-anchor="start"' if layout.is_narrow else f'x="{layout.left - 12}" text-anchor="end"'
    return (
        f'<text class="who" {who} y="{of_text:.1f}">{escape(line.label)}</text>{bar}'
        f'<circle cx="{place(found.value):.1f}" cy="{of_bar:.1f}" r="5" style="fill:{colour}"/>'
        f'<text class="value" x="{layout.width}" y="{of_text:.1f}" text-anchor="end">'
        f"{figure(found.value)}</text>"
    )

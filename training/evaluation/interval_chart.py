"""Values with their intervals, one line for each of what is compared, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from controlkit.metrics import Interval
from controlkit.training.reporting.charts import number, ticks

CSS = """
.intervals{width:100%;max-width:760px;height:auto;display:block;font:13px system-ui,sans-serif}
.intervals text{fill:var(--faint)}
.intervals .who{fill:var(--ink)}
.intervals .value{fill:var(--ink);font-weight:600;font-variant-numeric:tabular-nums}
.intervals .grid{stroke:var(--grid);stroke-width:1}
.intervals .span{stroke-width:3;stroke-linecap:round}
"""
_WIDTH, _ROW, _TOP, _BOTTOM, _VALUE = 760, 26, 8, 26, 76
_LETTER = 7.2


@dataclass(frozen=True)
class Line:
    """One of what is compared; `colour` is its number in the palette, -1 for what stands beside."""

    label: str
    interval: Interval
    colour: int = -1


def interval_chart(lines: Sequence[Line], *, label: str) -> str:
    """An SVG with a dot for each value and a bar for its interval; "" where no value is a number.

    label: what is shown, for who cannot see it.
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
    span = _WIDTH - left - _VALUE
    height = _TOP + _ROW * len(kept) + _BOTTOM

    def place(value: float) -> float:
        return left + (value - low) / (high - low) * span

    body = [
        f'<line class="grid" x1="{place(t):.1f}" x2="{place(t):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        f'<text x="{place(t):.1f}" y="{height - 8}" text-anchor="middle">{number(t)}</text>'
        for t in ticks(low, high, 6)
    ]
    body += [_row(line, _TOP + _ROW * (k + 0.5), place, left) for k, line in enumerate(kept)]
    return (
        f'<svg class="intervals" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )


def figure(value: float) -> str:
    """A value for people: as many digits after the point as its size leaves meaning."""
    size = abs(value)
    return f"{value:.1f}" if size >= 20 else f"{value:.2f}" if size >= 5 else f"{value:.3f}"


def _row(line: Line, y: float, place: Callable[[float], float], left: int) -> str:
    found = line.interval
    colour = "var(--faint)" if line.colour < 0 else f"var(--c{line.colour % 6})"
    bar = ""
    if math.isfinite(found.low) and math.isfinite(found.high):
        bar = (
            f'<line class="span" style="stroke:{colour};opacity:.45" x1="{place(found.low):.1f}"'
            f' x2="{place(found.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    base = f'y="{y + 4.5:.1f}" text-anchor="end"'
    return (
        f'<text class="who" x="{left - 12}" {base}>{escape(line.label)}</text>{bar}'
        f'<circle cx="{place(found.value):.1f}" cy="{y:.1f}" r="5" style="fill:{colour}"/>'
        f'<text class="value" x="{_WIDTH}" {base}>{figure(found.value)}</text>'
    )

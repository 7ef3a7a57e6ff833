"""Curves as inline SVG, drawn with what a browser has: no script, no font, no file beside the page.

Colours are CSS variables (--c0 to --c5, --ink, --faint, --grid), so one drawing reads on light and on dark
paper; `CSS` gives the classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

CSS = """
.chart{width:100%;height:auto;display:block;font:12px system-ui,sans-serif;overflow:visible}
.chart text{fill:var(--faint)}
.chart .grid{stroke:var(--grid);stroke-width:1}
.chart .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.chart .thin{stroke-width:1;opacity:.35}
.chart .mark{stroke:var(--ink);stroke-width:1;stroke-dasharray:3 3}
.chart .mark-text{fill:var(--ink);font-size:11px}
.chart .name{font-weight:600}
"""

COLOURS = 6
_WIDTH, _HEIGHT = 560, 260
_LEFT, _TOP, _BOTTOM = 52, 32, 30
_LETTER = 6.9  # width of a letter of the names, in pixels, rather more than less
_MOST_POINTS = 400
_LOG_FROM = 100.0  # largest to smallest value from which an axis is logarithmic, where it may be


@dataclass(frozen=True)
class Series:
    """A named curve; `colour` is its number in the palette. A `thin` one stays behind, without a name."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    thin: bool = False


@dataclass(frozen=True)
class Mark:
    """A vertical line at a step, with a word."""

    x: float
    text: str


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    marks: Sequence[Mark] = (),
    across: Point | None = None,
    reach: float = -math.inf,
    percent: bool = False,
    from_zero: bool = False,
    may_log: bool = False,
) -> str:
    """An SVG of curves over steps; "" where no series has two points.

    label: what the picture shows, for who cannot see it. across: first and last step of the axis. reach: a
    value that the axis has in any case, so that a tiny curve looks tiny. percent: of values in units of 1.
    from_zero: the value axis begins at 0 at the latest. may_log: a range of more than a hundredfold is drawn
    logarithmically.
    """
    kept = [Series(s.name, thinned(_finite(s.points)), s.colour, s.thin) for s in series]
    kept = [s for s in kept if len(s.points) > 1]
    if not kept:
        return ""
    xs = [x for s in kept for x, _ in s.points]
    ys = [y for s in kept for _, y in s.points]
    log = may_log and min(ys) > 0 and max(ys) > _LOG_FROM * min(ys)
    axis = _Axis([*ys, max(*ys, reach)], log=log, from_zero=from_zero)
    names = [s for s in kept if s.name and not s.thin]
    right = 14 + round(_LETTER * max((len(s.name) for s in names), default=0))
    first, last = across or (min(xs), max(xs))
    place_x = _scale(first, last, _LEFT, _WIDTH - right)
    body = [_grid(axis, right, percent=percent), _steps(first, last, place_x)]
    body += [_marks([mark for mark in marks if first <= mark.x <= last], place_x)]
    body += [_line(s, place_x, axis.place) for s in sorted(kept, key=lambda s: not s.thin)]
    body += _names(names, axis.place, _WIDTH - right + 8)
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"<title>{escape(label)}</title>{''.join(body)}</svg>"
    )


def smoothed(points: Sequence[Point], *, share: float = 0.04) -> list[Point]:
    """Means over a moving window of a share of the points, at least 3 of them, centred."""
    points = _finite(points)
    half = max(1, round(share * len(points) / 2))
    windows = [points[max(0, k - half) : k + half + 1] for k in range(len(points))]
    return [
        (x, sum(y for _, y in window) / len(window)) for (x, _), window in zip(points, windows, strict=True)
    ]


def thinned(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most about `most` points: of each stretch its lowest and its highest, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    stretches = most // 2
    for k in range(stretches):
        part = points[k * len(points) // stretches : (k + 1) * len(points) // stretches]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], 1, 2 or 5 times a power of ten apart, about `count` of them."""
    span = high - low
    if not (span > 0 and math.isfinite(span)):
        return [low]
    power = 10 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    return [step * k for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A number for people: 1234567 -> "1.23M", 0.00012 -> "1.2e-4", 640 -> "640", 0.125 -> "0.125"."""
    size = abs(value)
    if size >= 999_500:
        return f"{value / 1e6:.3g}M"
    if size >= 10_000:
        return f"{value / 1e3:.3g}k"
    if size and size < 1e-3:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


class _Axis:
    """The value axis: its ticks, and where a value lies."""

    def __init__(self, values: Sequence[float], *, log: bool, from_zero: bool) -> None:
        low, high = min(values), max(values)
        if log:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            self.ticks = [10.0**k for k in range(first, last + 1)]
            inner = _scale(first, last, _HEIGHT - _BOTTOM, _TOP)
            self.place: Callable[[float], float] = lambda y: inner(math.log10(y))
            return
        low = min(low, 0.0) if from_zero else low
        if high - low < 1e-12 * max(abs(high), 1e-12):  # one value: give it room
            low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
        found = ticks(low, high)
        step = found[1] - found[0] if len(found) > 1 else high - low
        slack = 0.02 * step  # a hair below a line needs no room of its own
        low = found[0] if low >= found[0] - slack else found[0] - step
        high = found[-1] if high <= found[-1] + slack else found[-1] + step
        self.ticks = ticks(low, high, 6)
        self.place = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _grid(axis: _Axis, right: int, *, percent: bool) -> str:
    parts = []
    for value in axis.ticks:
        y = axis.place(value)
        text = f"{number(round(100 * value, 9))} %" if percent else number(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    return "".join(parts)


def _steps(first: float, last: float, across: Callable[[float], float]) -> str:
    parts = [
        f'<text x="{across(value):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{number(value)}</text>'
        for value in ticks(first, last)
    ]
    return "".join(parts)


def _marks(marks: Sequence[Mark], across: Callable[[float], float]) -> str:
    """The lines, and their words in two rows where they are close."""
    parts, free = [], [-math.inf, -math.inf]
    for mark in sorted(marks, key=lambda mark: mark.x):
        x, width = across(mark.x), _LETTER * len(mark.text)
        row = next((row for row in (0, 1) if x > free[row]), None)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 5}" y2="{_HEIGHT - _BOTTOM}"/>'
        )
        if row is not None:  # a third one in the same place is only a line
            free[row] = x + width
            place = f'x="{x + 4:.1f}" y="{_TOP - 5 - 13 * row}"'
            parts.append(f'<text class="mark-text" {place}>{escape(mark.text)}</text>')
    return "".join(parts)


def _line(series: Series, across: Callable[[float], float], place: Callable[[float], float]) -> str:
    path = "L".join(f"{across(x):.1f} {place(y):.1f}" for x, y in series.points)
    thin = " thin" if series.thin else ""
    return (
        f'<path class="line{thin}" style="stroke:var(--c{series.colour % COLOURS})" d="M{path}">'
        f"<title>{escape(series.name)}</title></path>"
    )


def _names(series: Sequence[Series], place: Callable[[float], float], x: float) -> list[str]:
    """Each curve's name beside its end, pushed apart where they would overlap."""
    wanted = sorted((place(s.points[-1][1]), k) for k, s in enumerate(series))
    placed: list[tuple[float, int]] = []
    for y, k in wanted:
        placed.append((max(y, placed[-1][0] + 15) if placed else y, k))
    over = max(0.0, placed[-1][0] - (_HEIGHT - _BOTTOM)) if placed else 0.0
    return [
        f'<text class="name" x="{x:.1f}" y="{y - over + 4:.1f}"'
        f' style="fill:var(--c{series[k].colour % COLOURS})">{escape(series[k].name)}</text>'
        for y, k in placed
    ]

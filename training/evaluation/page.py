"""report.html: which adapter follows its maps, how surely, and what it looks like.

It needs no other file, no script runs and nothing is fetched: charts are inline SVG, the sheets are in it.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlkit import files, images
from controlkit.metrics import Interval
from controlkit.metrics.intervals import LEAST, LEVEL
from controlkit.training.evaluation.example_sheets import sheets_of
from controlkit.training.evaluation.interval_chart import CSS, Line, figure, interval_chart
from controlkit.training.evaluation.map_scores import AP, MEASURES, principal
from controlkit.training.evaluation.request import FLOOR, TRUE
from controlkit.training.evaluation.telling import sizes_told
from controlkit.training.reporting.page import STYLE, pairs_table

if TYPE_CHECKING:
    from controlkit.training.evaluation.held_out import HeldOut, Told
    from controlkit.training.evaluation.request import Request
    from controlkit.training.evaluation.summary import Group, Summary

NAME = "report.html"
_QUALITY = 88  # of the JPEGs in the page; the sheets beside it are PNGs
_MOST_EXAMPLES = 400
_MORE = """
.scroll{overflow-x:auto}
td small{color:var(--faint)}
details summary{cursor:pointer;color:var(--faint)}
.sheet{overflow-x:auto}
.sheet img{border-radius:8px;width:100%;min-width:640px;max-width:1040px;height:auto}
.measure{margin:20px 0 4px;font-weight:600}
.measure span{font-weight:400;color:var(--faint)}
"""


def write_page(
    request: Request,
    held_out: HeldOut,
    summary: Summary,
    told: Mapping[str, Any],
    pairs: Mapping[int, Told],
) -> Path:
    """Write the page and the sheets into the request's folder; return the page's path."""
    parts = [
        _head(request, summary, held_out, told),
        _verdicts(summary),
        *(_group(group, summary) for group in summary.groups),
        _differences(summary),
        _skipped(summary),
        _sheets(request, held_out, summary),
        _examples(summary, pairs),
        _settings(told),
    ]
    path = request.output / NAME
    files.write_text(
        path,
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title(summary, held_out))}</title><style>{STYLE}{CSS}{_MORE}</style></head>\n"
        f"<body><main>\n{''.join(parts)}</main></body></html>\n",
    )
    return path


def title(summary: Summary, held_out: HeldOut) -> str:
    """What was measured, in a phrase."""
    labels = [arm.label for arm in summary.arms if arm.compared]
    if len(labels) > 3:
        return f"{len(labels)} adapters compared"
    return f"{', '.join(labels)} on {'held-out pairs' if held_out.is_held_out else held_out.title}"


def plain(found: Interval) -> str:
    """A value with its interval, for people."""
    if not math.isfinite(found.low):
        return figure(found.value)
    return f"{figure(found.value)} <small>({figure(found.low)} to {figure(found.high)})</small>"


def _head(request: Request, summary: Summary, held_out: HeldOut, told: Mapping[str, Any]) -> str:
    facts = [
        told["pairs"]["title"],
        f"{request.seeds} picture{'s' if request.seeds > 1 else ''} of each",
        f"base {request.base}",
        f"{request.steps} steps, {request.scheduler}, guidance {told['settings']['guidance']:g}",
    ]
    warning = "".join(f"<p><b>{escape(line)}</b></p>" for line in told["warnings"])
    return (
        f"<header><h1>{escape(title(summary, held_out))}</h1><p>{escape(' · '.join(facts))}</p>{warning}"
        "</header>\n"
    )


def _verdicts(summary: Summary) -> str:
    lines = []
    for arm in summary.arms:
        if arm.label in summary.reach:
            reach = summary.reach[arm.label]
            sure = f" ({reach.low:.0%} to {reach.high:.0%})" if math.isfinite(reach.low) else ""
            lines.append(
                f"<p><b>{escape(arm.label)}</b> goes {reach.value:.0%}{sure} of the way from no control to"
                f" the true pictures through the autoencoder, in {principal(arm.kind)}.</p>"
            )
    for one in summary.differences:
        kinds = {arm.kind for arm in summary.arms if arm.label == one.first}
        if one.measure in {principal(kind) for kind in kinds}:
            lines.append(
                f"<p>{escape(one.first)} against {escape(one.second)}, in {one.measure}:"
                f" {escape(one.verdict)}.</p>"
            )
    return f'<section class="status">{"".join(lines)}</section>\n' if lines else ""


def _group(group: Group, summary: Summary) -> str:
    name = f"How the pictures follow {group.kind} maps" if group.kind else "The pictures themselves"
    blocks = []
    for measure in group.measures:
        told = MEASURES[measure]
        lower = "; less is better" if told.lower else ""
        chart = interval_chart(
            [
                Line(arm.label, group.intervals[measure][arm.label], _colour(summary, arm.label))
                for arm in summary.arms
                if arm.label in group.intervals[measure]
            ],
            label=f"{measure} by what is compared",
        )
        pairs = f", {group.pairs[measure]} pairs" if group.pairs.get(measure) else _sizes(group, measure)
        blocks.append(
            f'<p class="measure">{measure} <span>{escape(told.text)}{lower}{pairs}</span></p>{chart}'
        )
    caption = f"<p>{_what_is_drawn(group)}</p>"
    return f"<section><h2>{name}</h2>{caption}{''.join(blocks)}{_table(group, summary)}</section>\n"


def _what_is_drawn(group: Group) -> str:
    """What dots, bars and brackets of a group are, and what has none."""
    told = []
    if group.pairs:
        dots = "Dots are means over pairs" + f" ({AP} is of all together)" * (AP in group.pairs)
        if any(found.resamples for measure in group.pairs for found in group.intervals[measure].values()):
            bars = f"bars, and the brackets of the table, their {LEVEL:.0%} intervals by bootstrap over pairs"
            told.append(f"{dots}; {bars}. Fewer than {LEAST} pairs have none.")
        else:
            told.append(f"{dots}, without intervals: fewer than {LEAST} pairs say too little of others.")
    if group.pictures:
        told.append("What compares sets of pictures has no interval.")
    return " ".join(told)


def _sizes(group: Group, measure: str) -> str:
    """Of how many pictures a measure of sets is."""
    sizes = group.pictures.get(measure, {})
    if not sizes:
        return ""
    one_of = {true: sorted({own for own, _ in sizes.values()}) for _, true in sizes.values()}
    ((true, own),) = one_of.items()
    return f", {' or '.join(map(str, own))} pictures of each against {true} true ones"


def _table(group: Group, summary: Summary) -> str:
    labels = [
        arm.label
        for arm in summary.arms
        if any(arm.label in group.intervals[measure] for measure in group.measures)
    ]
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    rows = []
    for measure in group.measures:
        cells = []
        for label in labels:
            found = group.intervals[measure].get(label)
            spread = group.spread.get(measure, {}).get(label)
            more = f" <small>(subsets ±{figure(spread)})</small>" if spread else ""
            cells.append(f"<td>{'' if found is None else plain(found)}{more}</td>")
        rows.append(f'<tr><th scope="row">{measure}</th>{"".join(cells)}</tr>')
    return (
        '<details><summary>The same as a table</summary><div class="scroll"><table class="numbers"><thead>'
        f"<tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _colour(summary: Summary, label: str) -> int:
    """The adapters have the palette's colours, what stands beside them has none."""
    compared = [arm.label for arm in summary.arms if arm.compared]
    return compared.index(label) if label in compared else -1


def _differences(summary: Summary) -> str:
    if not summary.differences:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{one.measure}</th><td>{escape(one.first)} − {escape(one.second)}</td>'
        f"<td>{plain(one.interval)}</td><td>{escape(one.verdict)}</td></tr>"
        for one in summary.differences
    )
    note = (
        f"The same pairs and noise: intervals of the differences, which are narrower than those above. All of"
        f" one measure hold together at {LEVEL:.0%}."
    )
    return (
        f'<section><h2>Adapters against each other</h2><p>{note}</p><div class="scroll"><table><tbody>{rows}'
        "</tbody></table></div></section>\n"
    )


def _skipped(summary: Summary) -> str:
    if not summary.skipped:
        return ""
    return f"<section><h2>Not measured</h2>{pairs_table(summary.skipped)}</section>\n"


def _sheets(request: Request, held_out: HeldOut, summary: Summary) -> str:
    shown = []
    for arm in summary.arms:
        if not arm.compared:
            continue
        for name, sheet in sheets_of(request, held_out, summary, arm).items():
            path = request.output / f"{name}-{arm.folder}.png"
            images.write_png(path, sheet)
            alt = f"{name} pictures of {arm.label}"
            shown.append(f'<figure class="sheet">{_embedded(sheet, alt)}</figure>')
    return f"<section><h2>Pictures</h2>{''.join(shown)}</section>\n"


def _embedded(picture: NDArray[np.uint8], alt: str) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=_QUALITY)
    source = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    height, width = picture.shape[:2]
    return f'<img src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _examples(summary: Summary, pairs: Mapping[int, Told]) -> str:
    """A line for each pair: what the adapters and no control got in the adapters' own measures."""
    columns = [
        (kind, principal(kind), label)
        for kind in dict.fromkeys(arm.kind for arm in summary.arms if arm.compared)
        for label in (FLOOR, *(arm.label for arm in summary.arms if arm.compared), TRUE)
        if label in summary.of_pair.get(kind, {}).get(principal(kind), {})
    ]
    numbers = sorted(pairs)[:_MOST_EXAMPLES]
    if not columns:
        return ""
    head = "".join(
        f"<th>{escape(kind)}: {measure}<br>{escape(label)}</th>" for kind, measure, label in columns
    )
    rows = []
    for number in numbers:
        values = [summary.of_pair[kind][name][label].get(number) for kind, name, label in columns]
        cells = "".join(f"<td>{'' if value is None else figure(value)}</td>" for value in values)
        name, caption = (escape(text) for text in pairs[number])
        rows.append(f'<tr><th scope="row">{number}</th><td>{name}</td>{cells}<td>{caption}</td></tr>')
    more = "" if len(numbers) == len(pairs) else f"<p>The first {len(numbers)}; report.json has all.</p>"
    return (
        f"<section><h2>Pair by pair</h2>{more}<details><summary>{len(numbers)} pairs</summary>"
        '<div class="scroll"><table class="numbers"><thead><tr><th>pair</th><th>name</th>'
        f"{head}<th>caption</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></details></section>\n"
    )


def _settings(told: Mapping[str, Any]) -> str:
    settings = {
        name: value
        for name, value in told["settings"].items()
        if name not in ("adapters", "output") and value not in ({}, None)
    }
    sizes = {(one["width"], one["height"]): one["pairs"] for one in told["pairs"]["sizes"]}
    settings |= {"width x height": sizes_told(sizes)}
    settings |= {"device": told["device"], "dtype": told["dtype"]}
    for one in told["adapters"]:
        how = "".join(f", {key} {value}" for key, value in one["how"].items())
        settings[f"adapter {one['label']}"] = f"{one['name']}, with {one['kind']} maps{how}"
    settings["maps of the pictures"] = [
        f"{kind}: {', '.join(f'{k} {v}' for k, v in given.items()) or 'as usual'}"
        for kind, given in told["maps_made_by"].items()
    ]
    hashes = {"pairs": told["pairs"]["sha256"], "base": told["base"]["sha256"]}
    hashes |= {one["label"]: one["sha256"] for one in told["adapters"]}
    return (
        f"<section><h2>How it was measured</h2>{pairs_table(settings)}<h3>SHA-256</h3>"
        f"{pairs_table(hashes, mono=True)}<h3>Versions</h3>{pairs_table(told['versions'])}</section>\n"
    )

"""report.html: what was trained, whether it works, and everything needed to do it again, in one file.

The page needs nothing but itself: curves are inline SVG, pictures are in it, no script runs. Every part is
optional, so a run that was stopped or broke still gets its report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

from controlkit import files
from controlkit.training.reporting.charts import CSS as CHART_CSS
from controlkit.training.reporting.charts import Mark, Series, line_chart, smoothed
from controlkit.training.reporting.convergence import advice_for, hold_told, took_hold
from controlkit.training.reporting.page import STYLE, duration, pairs_table, picture
from controlkit.training.reporting.run_record import RunRecord, read_run, versions

NAME = "report.html"
_SMALL_WIDTH, _MOST_SMALL = 640, 12
_GAP_REACH = 0.04  # up to which the gap's axis goes at least, so that chance is seen to be small
_QUARTERS = ("least noise", "less noise", "more noise", "most noise")
_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("gap", "gap to another map", "{:.1%}".format),
    ("loss", "loss", "{:.4f}".format),
    ("samples_per_s", "samples per second", "{:.3g}".format),
    ("peak_mb", "peak memory in MB", "{:,.0f}".format),
)
_COLUMNS = {"floor": "no control", "control": "this adapter", "ceiling": "ceiling", "true": "the pictures"}


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, from what the folder holds, and return its path.

    Read are metrics.jsonl, config.toml, scores.json, facts.json, samples/ and the result. Raises ValueError
    where the folder does not exist or cannot be written.
    """
    run = read_run(run_folder)
    path = run_folder / NAME
    files.write_text(path, render(run))
    return path


def render(run: RunRecord) -> str:
    """The page."""
    parts = [_head(run), _status(run), _latest(run), _curves(run), _scores(run), _earlier(run)]
    parts += [_events(run), _data(run), _config(run), _origin(run)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title(run))}</title><style>{STYLE}{CHART_CSS}</style></head>\n"
        f"<body><main>\n{''.join(part for part in parts if part)}</main></body></html>\n"
    )


def title(run: RunRecord) -> str:
    """What was trained, in a phrase."""
    kind, base = run.config.get("map"), run.config.get("base")
    if kind and base:
        return f"A {kind} ControlNet for {base}"
    task = run.config.get("task")
    return f"Training of {task}" if task else f"The run in {run.folder.name}"


def _head(run: RunRecord) -> str:
    steps = run.config.get("steps")
    done = f"step {run.step:,} of {steps:,}" if isinstance(steps, int) else f"step {run.step:,}"
    state = "finished" if run.result else "not finished"
    parts = [f"run {escape(run.folder.resolve().name)}", f"{done} ({state})"]
    if run.seconds:
        parts.append(duration(run.seconds))
    return f"<header><h1>{escape(title(run))}</h1><p>{' · '.join(parts)}</p></header>\n"


def _status(run: RunRecord) -> str:
    return f'<section class="status">{verdict(run)}<dl class="tiles">{_tiles(run)}</dl></section>\n'


def verdict(run: RunRecord) -> str:
    """Whether control took hold, as a paragraph of HTML, and what to do where it has not."""
    step = took_hold(run.rows)
    if step is not None:
        words = hold_told(run.rows) if step else "control was there from the first step"
        counsel = advice_for(run.rows, run.config)
        more = f"<p>{escape(counsel)}</p>" if counsel else ""
        return f'<p class="verdict good">{escape(words[:1].upper() + words[1:])}.</p>{more}'
    if not run.curve("gap"):
        return '<p class="verdict">Whether control took hold was not watched in this run.</p>'
    counsel = advice_for(run.rows, run.config, finished=run.result is not None)
    more = f"<p>{escape(counsel)}</p>" if counsel else ""
    late = counsel or run.result is not None  # until then nothing is wrong
    return f'<p class="verdict{" bad" if late else ""}">Control has not taken hold so far.</p>{more}'


def _tiles(run: RunRecord) -> str:
    tiles = [(label, form(curve[-1][1])) for name, label, form in _FIGURES if (curve := run.curve(name))]
    if score := principal(run):
        measure, ours, ceiling = score
        of = f" <small>of {ceiling:.3f}</small>" if ceiling is not None else ""
        tiles.insert(0, (escape(measure), f"{ours:.3f}{of}"))
    return "".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in tiles)


def principal(run: RunRecord) -> tuple[str, float, float | None] | None:
    """The score that names the kind: its name, the adapter's, the ceiling's."""
    kind = str(run.config.get("map", ""))
    ours = run.scores.get("control") or run.scores.get(kind) or {}
    usual = {"canny": "edge F1", "openpose": "joints", "depth": "depth RMSE"}.get(kind, "")
    measure = usual if usual in ours else next(iter(ours), None)
    if measure is None:
        return None
    return measure, ours[measure], run.scores.get("ceiling", {}).get(measure)


def _latest(run: RunRecord) -> str:
    for step, path in reversed(run.samples):
        if shown := picture(path, alt=f"samples at step {step}"):
            figure = f'<figure class="latest">{shown}</figure>'
            return f"<section><h2>Samples at step {step:,}</h2>{figure}</section>\n"
    return ""


def _earlier(run: RunRecord) -> str:
    earlier = run.samples[:-1]
    if len(earlier) > _MOST_SMALL:  # evenly over the run, the first and the last among them
        last = len(earlier) - 1
        earlier = [earlier[round(k * last / (_MOST_SMALL - 1))] for k in range(_MOST_SMALL)]
    shown = [
        f"<figure>{small}<figcaption>step {step:,}</figcaption></figure>"
        for step, path in earlier
        if (small := picture(path, alt=f"samples at step {step}", width=_SMALL_WIDTH))
    ]
    if not shown:
        return ""
    return f'<section><h2>Samples on the way</h2><div class="small">{"".join(shown)}</div></section>\n'


def _curves(run: RunRecord) -> str:
    hold = took_hold(run.rows)
    marks = [Mark(step, "resumed") for step in run.resumed]
    marks += [Mark(hold, "took hold")] if hold is not None else []
    charts = [(name, note.replace("held-out", run.watched), draw(run, marks)) for name, note, draw in _CHARTS]
    shown = [
        f'<figure class="curve"><figcaption><b>{name}</b> {note}</figcaption>{svg}</figure>'
        for name, note, svg in charts
        if svg
    ]
    return f'<section><h2>Curves</h2><div class="curves">{"".join(shown)}</div></section>\n' if shown else ""


def gap_chart(run: RunRecord, marks: list[Mark]) -> str:
    """How much worse another picture's map is, over the steps, as SVG; "" where nobody looked twice."""
    series = [Series("gap", run.curve("gap"), 1)]
    return line_chart(
        series,
        label="gap by step",
        marks=marks,
        across=run.span,
        reach=_GAP_REACH,
        percent=True,
        from_zero=True,
    )


def _maps_chart(run: RunRecord, marks: list[Mark]) -> str:
    series = [
        Series("other map", run.curve("loss_other_map"), 3),
        Series("no map", run.curve("loss_no_map"), 4),
        Series("true map", run.curve("loss_map"), 1),
    ]
    return line_chart(series, label="loss with and without the map, by step", marks=marks, across=run.span)


def _score_chart(run: RunRecord, marks: list[Mark]) -> str:
    """The first score that was taken along the way, between its bounds: see `ControlScores.row`."""
    names = [name for row in run.rows for name in row if f"{name} floor" in row]
    if not names:
        return ""
    name = names[0]
    series = [
        Series("ceiling", run.curve(f"{name} ceiling"), 2),
        Series("no control", run.curve(f"{name} floor"), 4),
        Series(name, run.curve(name), 1),
    ]
    return line_chart(series, label=f"{name} by step", marks=marks, across=run.span)


def loss_chart(run: RunRecord, marks: list[Mark]) -> str:
    """The training loss over the steps, as SVG; "" before its second row."""
    loss = run.curve("loss")
    series = [Series("", loss, 0, thin=True), Series("loss", smoothed(loss), 0)]
    return line_chart(series, label="training loss by step", marks=marks, across=run.span)


def _quarter_chart(run: RunRecord, marks: list[Mark]) -> str:
    series = [
        Series(name, smoothed(run.curve(f"loss_q{k}"), share=0.1), (1, 2, 4, 3)[k])
        for k, name in enumerate(_QUARTERS)
    ]
    return line_chart(
        series, label="training loss by quarter of the noise schedule", marks=marks, across=run.span
    )


def _rate_chart(run: RunRecord, marks: list[Mark]) -> str:
    rates = run.table("learning_rates") or {"rate": run.curve("learning_rate")}
    series = [Series(name, curve, k) for k, (name, curve) in enumerate(rates.items())]
    return line_chart(series, label="learning rates by step", marks=marks, across=run.span, from_zero=True)


def _simple(name: str, label: str, colour: int, **options: bool) -> Callable[[RunRecord, list[Mark]], str]:
    def draw(run: RunRecord, marks: list[Mark]) -> str:
        return line_chart(
            [Series("", run.curve(name), colour)], label=label, marks=marks, across=run.span, **options
        )

    return draw


_CHARTS: tuple[tuple[str, str, Callable[[RunRecord, list[Mark]], str]], ...] = (
    ("Gap", "how much worse another picture’s map is than the true one, held-out pictures", gap_chart),
    ("Loss by map", "of held-out pairs, by what the network is told; same noise each time", _maps_chart),
    ("Score", "of held-out pairs, and what it lies between", _score_chart),
    ("Training loss", "mean of the steps between two rows, and smoothed", loss_chart),
    ("Training loss by noise", "quarters of the schedule, smoothed", _quarter_chart),
    (
        "Missed of the map",
        "by the pictures that the reward looks at",
        _simple("map_missed", "missed by step", 3),
    ),
    ("Learning rate", "", _rate_chart),
    ("Gradient norm", "before clipping", _simple("grad_norm", "gradient norm by step", 5, may_log=True)),
    ("Samples per second", "", _simple("samples_per_s", "samples per second by step", 2, from_zero=True)),
    ("Peak memory", "MB", _simple("peak_mb", "peak memory by step", 4, from_zero=True)),
)


def _scores(run: RunRecord) -> str:
    ours = [name for name in run.scores if name not in ("floor", "ceiling", "true")]
    names = [name for name in ("floor", *ours, "ceiling", "true") if name in run.scores]
    measures = list(dict.fromkeys(m for name in [*ours, *names] for m in run.scores[name]))
    if not measures:
        return ""
    head = "".join(f"<th>{escape(_COLUMNS.get(name, name))}</th>" for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(measure)}</th>'
        + "".join(f"<td>{_score(run.scores[name].get(measure))}</td>" for name in names)
        + "</tr>"
        for measure in measures
    )
    note = (
        f"{run.scored.capitalize()} pairs. No control: the same captions and seeds without the adapter. "
        "Ceiling: the true pictures through the autoencoder."
    )
    return (
        f"<section><h2>Scores</h2><p>{note}</p><table class=numbers><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></section>\n"
    )


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _events(run: RunRecord) -> str:
    rows = "".join(f"<tr><td>{step:,}</td><td>{escape(text)}</td></tr>" for step, text in run.events)
    return f"<section><h2>What happened</h2><table><tbody>{rows}</tbody></table></section>\n" if rows else ""


def _data(run: RunRecord) -> str:
    data = run.config.get("data")
    told = dict(data) if isinstance(data, Mapping) else {}
    if not told and "scenes" in run.config:
        told = {"source": "world", "scenes": run.config["scenes"]}
    told |= {key: value for key, value in run.facts.items() if key.startswith("data")}
    return f"<section><h2>Data</h2>{pairs_table(told)}</section>\n" if told else ""


def _config(run: RunRecord) -> str:
    if not run.config_text:
        return ""
    text = escape(run.config_text.strip())
    return f"<section><h2>Recipe</h2><p>The whole of config.toml.</p><pre>{text}</pre></section>\n"


def _origin(run: RunRecord) -> str:
    facts = {key: value for key, value in run.facts.items() if not key.startswith("data")}
    hashes = pairs_table(run.hashes(), mono=True)
    parts = [f"<h3>Known beside</h3>{pairs_table(facts, mono=True)}" if facts else ""]
    parts += [f"<h3>SHA-256 of the result</h3>{hashes}" if hashes else ""]
    parts += [f"<h3>Versions</h3>{pairs_table(versions())}"]
    return f"<section><h2>Where it comes from</h2>{''.join(parts)}</section>\n"

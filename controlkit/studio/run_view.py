"""A training as HTML: how far it is, whether control took hold, its curves, what it said."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from controlkit.studio.run_folders import Run

NOTHING = '<p class="faint">No training yet. Start one, and it appears here.</p>'
STATES = {
    "starting": "Loading the libraries.",
    "running": "Running.",
    "stopped": "Stopped; it can be gone on with.",
    "failed": "It could not begin.",
    "finished": "Finished.",
}


@dataclass(frozen=True)
class View:
    """The parts of the page."""

    head: str
    curves: str
    log: str


def details(run: Run, log: list[str]) -> View:
    """What there is to be seen of a run. log: the last lines that it said."""
    from controlkit.training.reporting.charts import Mark
    from controlkit.training.reporting.report import gap_chart, loss_chart, verdict

    record = run.record
    marks = [Mark(step, "resumed") for step in record.resumed]
    charts = [
        ("Gap", "how much worse another picture’s map is than the true one", gap_chart(record, marks)),
        ("Loss", "of the training", loss_chart(record, marks)),
    ]
    figures = "".join(
        f"<figure><figcaption><b>{name}</b> {note}</figcaption>{svg}</figure>"
        for name, note, svg in charts
        if svg
    )
    words = verdict(record) if record.curve("gap") else ""
    if run.state == "failed" and log:
        words = f'<p class="verdict bad">{escape(log[-1])}</p>'
    return View(_head(run, words), figures, f"<pre>{escape(chr(10).join(log))}</pre>")


def _head(run: Run, words: str) -> str:
    record, facts = run.record, []
    facts += [("Map", str(record.config["map"]))] if "map" in record.config else []
    facts += [("Pictures", str(record.config["data"]["source"]))] if _has_source(run) else []
    facts += [("Step", f"{record.step} of {run.steps}")] if run.steps else []
    speed = record.curve("samples_per_s")
    facts += [("Speed", f"{speed[-1][1]:.1f} pictures/s")] if speed else []
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    share = record.step / run.steps if run.steps else 0.0
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Steps done"></progress>' if run.steps else ""
    return f'<h3>{escape(run.name)}</h3><p class="state">{STATES[run.state]}</p>{bar}<dl>{cells}</dl>{words}'


def _has_source(run: Run) -> bool:
    data = run.record.config.get("data")
    return isinstance(data, dict) and "source" in data

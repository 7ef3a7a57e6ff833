"""A training as HTML: how far it is, whether control took hold, its curves, what it said."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from controlkit.studio.run_folders import ALIVE, Run
from controlkit.studio.wording import about_settings, sentence, title

NOTHING = '<p class="faint">No training yet. Start one, and it appears here.</p>'
STATES = {
    "starting": "Starting.",
    "running": "Running.",
    "stopped": "Stopped; it can be gone on with.",
    "failed": "It could not begin.",
    "finished": "Finished.",
}
UNSAVED = "Stopped before its first checkpoint; going on begins anew."
UNBEGUN = "Stopped before it began; it can be started anew by the same name."
SETTINGS = (
    "Names with a _ are settings of the recipe, which the command line takes:"
    " controlkit train {config} NAME=VALUE out=ANOTHER"
)


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
    if "</p><p>" in words:  # advice, which speaks of settings
        words += f'<p class="faint">{escape(SETTINGS.format(config=record.folder / "config.toml"))}</p>'
    if run.error:
        where = about_settings(run.error)
        more = f'<p class="faint">{escape(where)}</p>' if where else ""
        words = f'<p class="verdict bad" role="alert">{escape(run.error)}</p>{more}{words}'
    return View(_head(run, words, log), figures, f"<pre>{escape(chr(10).join(log))}</pre>")


def _head(run: Run, words: str, log: list[str]) -> str:
    from controlkit.training.reporting.report import principal

    record, facts = run.record, []
    facts += [("Map", ", ".join(map(title, run.kinds)))] if "map" in record.config else []
    facts += [("Pictures", str(record.config["data"]["source"]))] if _has_source(run) else []
    facts += [("Step", f"{record.step} of {run.steps}")] if run.steps else []
    speed = record.curve("samples_per_s")
    facts += [("Speed", f"{speed[-1][1]:.1f} pictures/s")] if speed else []
    if score := principal(record):
        measure, ours, ceiling = score
        facts += [(measure, f"{ours:.3f}" + (f" of {ceiling:.3f}" if ceiling is not None else ""))]
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    share = record.step / run.steps if run.steps else 0.0
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Steps done"></progress>' if run.steps else ""
    state = f'<p class="state">{_state(run)}{_doing(run, log)}</p>'
    return f"<h3>{escape(run.name)}</h3>{state}{bar}<dl>{cells}</dl>{words}"


def _doing(run: Run, log: list[str]) -> str:
    """What a training that is alive does, in its own words."""
    return f" {escape(sentence(log[-1].strip()))}" if run.state in ALIVE and log else ""


def _state(run: Run) -> str:
    if run.state == "stopped" and not run.saved:
        return UNSAVED if run.can_go_on else UNBEGUN
    return STATES[run.state]


def _has_source(run: Run) -> bool:
    data = run.record.config.get("data")
    return isinstance(data, dict) and "source" in data

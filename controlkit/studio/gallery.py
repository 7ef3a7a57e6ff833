"""The session's pictures: the one that is looked at, the others, and what each was made with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from controlkit.infotext import PictureRecord
from controlkit.rules import USUAL_MODE
from controlkit.studio.commands import command, script
from controlkit.studio.components import Picture
from controlkit.studio.toasts import readable
from controlkit.studio.wording import title
from controlkit.training.reporting.run_record import RESULTS

COPY = """(text) => {
  const told = document.getElementById("copied");
  const done = () => { told.textContent = "Copied."; setTimeout(() => { told.textContent = ""; }, 3000); };
  const by_hand = () => {
    const area = document.createElement("textarea");
    area.value = text; document.body.appendChild(area); area.select();
    document.execCommand("copy"); area.remove(); done();
  };
  if (navigator.clipboard) navigator.clipboard.writeText(text).then(done, by_hand); else by_hand();
}"""


SHOWN = 8  # of `Gallery.shown`


@dataclass(frozen=True)
class Made:
    """A finished picture: where the page shows it, and its record."""

    file: str
    record: PictureRecord

    @property
    def there(self) -> bool:
        """Whether the page can still show it: what is old is deleted."""
        return os.path.isfile(self.file)


class Gallery:
    """Builds the right side of the first tab; `chosen` gives the updates that show one picture."""

    def __init__(self, photo: gr.Image) -> None:
        """Lay it out and wire it. photo: where a result goes back to."""
        gr.HTML("<h2>Pictures</h2>")
        self.view = Picture(
            label="Result", show_label=False, interactive=False, format="png", type="filepath",
            elem_classes="picture result", elem_id="result", buttons=["fullscreen"], height=360,
        )  # fmt: skip
        self.preview = gr.Image(
            label="In the making", show_label=False, interactive=False, format="png", visible=False,
            elem_classes="picture result", elem_id="preview", buttons=[], height=360,
        )  # fmt: skip
        self.status = gr.HTML("", elem_id="status")
        self.about = gr.HTML("", elem_id="about")
        with gr.Row(visible=False, elem_classes="actions") as self.actions:
            self.download = gr.DownloadButton("Download", size="sm", min_width=110)
            copy_command = gr.Button("Copy as command", size="sm", min_width=110)
            copy_script = gr.Button("Copy as Python", size="sm", min_width=110)
            again = gr.Button("Use as photo", size="sm", min_width=110)
        gr.HTML('<p id="copied" role="status" aria-live="polite"></p>')
        self.strip = gr.Gallery(
            [], label="This session", show_label=False, columns=5, height="auto", allow_preview=False,
            elem_id="strip", format="png", interactive=False, visible=False, buttons=[],
        )  # fmt: skip
        with gr.Accordion(
            "As a command, as Python", open=False, visible=False, elem_classes="plain"
        ) as self.fold:
            code: dict[str, Any] = {"interactive": False, "show_line_numbers": False}
            self.command = gr.Code(
                language="shell", label="Command", wrap_lines=True, lines=3, max_lines=8, **code
            )
            self.script = gr.Code(language="python", label="Python", max_lines=20, **code)
        self.made = gr.State([])
        self.strip.select(
            self._select, self.made, self.shown, show_progress="hidden", api_visibility="private"
        )
        copy_command.click(None, self.command, js=COPY, api_visibility="private")
        copy_script.click(None, self.script, js=COPY, api_visibility="private")
        again.click(lambda file: file, self.view, photo, show_progress="hidden", api_visibility="private")

    @property
    def shown(self) -> list[Any]:
        """The components that show one picture."""
        texts = [self.about, self.download, self.command, self.script]
        return [self.view, *texts, self.actions, self.fold, self.preview]

    @readable
    def _select(self, made: list[Made], event: gr.SelectData) -> list[Any]:
        one = made[event.index]
        if not one.there:
            raise ValueError("the page shows that picture no longer; it lies where pictures are kept")
        return chosen(one)


def chosen(made: Made) -> list[Any]:
    """The updates of `Gallery.shown` for a picture."""
    record = made.record
    shown = gr.update(visible=True)
    return [
        gr.update(value=made.file, visible=True),
        gr.update(value=about(record), visible=True),
        made.file,
        command(record),
        script(record),
        shown,
        shown,
        gr.update(value=None, visible=False),
    ]


def in_the_making(picture: np.ndarray, *, begins: bool) -> list[Any]:
    """The updates of `Gallery.shown` for a look at an unfinished picture, uint8 (H, W, 3).

    begins: it takes the place of the one that is looked at; whoever looks at another one later stays there.
    """
    hidden, same = gr.update(visible=False), gr.skip()
    if not begins:
        return [same] * (SHOWN - 1) + [picture]
    return [hidden, hidden, same, same, same, hidden, hidden, gr.update(value=picture, visible=True)]


def as_before(any_made: bool) -> list[Any]:
    """The updates of `Gallery.shown` that take an unfinished picture away."""
    back, same, below = gr.update(visible=True), gr.skip(), gr.update(visible=any_made)
    return [back, back, same, same, same, below, below, gr.update(value=None, visible=False)]


def about(record: PictureRecord) -> str:
    """What a picture was made with, as HTML."""
    from html import escape

    rows = [
        ("Seed", str(record.seed)),
        ("Size", f"{record.width} × {record.height}"),
        ("Steps", str(record.steps)),
        ("Guidance", f"{record.guidance:g}"),
        ("Scheduler", record.scheduler),
    ]
    rows += [("Without", record.negative_prompt)] if record.negative_prompt else []
    for control in record.controls:
        how = [f"{control.scale:g}"] if isinstance(control.scale, float | int) else []
        how += [f"{control.start:g} to {control.end:g}"] if (control.start, control.end) != (0, 1) else []
        how += [control.mode] if control.mode != USUAL_MODE else []
        how += [_adapter(control.adapter)] if control.adapter != control.kind else []
        rows.append((title(control.kind), ", ".join(how)))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f'<p class="told" tabindex="0">{escape(record.prompt)}</p><dl>{cells}</dl>'


def _adapter(name: str) -> str:
    """An adapter as a person calls it: the training that made it, or its name on the hub."""
    path = Path(name)
    return f"adapter {path.parent.name if path.is_absolute() and path.name in RESULTS else name}"

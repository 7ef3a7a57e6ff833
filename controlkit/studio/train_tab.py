"""The second tab: a training is begun, watched, stopped, and its adapter taken to the first tab."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from controlkit.studio import run_folders
from controlkit.studio.asked import count_of
from controlkit.studio.components import Number
from controlkit.studio.engine import Engine
from controlkit.studio.remembered import Field, fields
from controlkit.studio.run_view import NOTHING, details
from controlkit.studio.slot import OWN
from controlkit.studio.toasts import readable
from controlkit.studio.uploads import Shown

if TYPE_CHECKING:
    from controlkit.studio.create_tab import CreateTab

EVERY = 2.0  # seconds between two looks at the runs
STEPS = 250
MOST_STEPS = 10_000_000
WORLD, FOLDER = "The bundled world", "A folder"
READ = "Pictures with captions beside them (.txt), or a data set that controlkit data check reads"
NAME = "Train"  # of the tab
# Of the tab that is open: while a page loads, gradio tells of a choice of the first one that nobody made.
OPEN_TAB = """async () => {
  await new Promise((done) => setTimeout(done, 50));
  return document.querySelector('button[role="tab"][aria-selected="true"]')?.innerText.trim() ?? "";
}"""
ONE = "One training at a time; while it runs, pictures take longer."


class TrainTab:
    """Builds the tab and wires it. runs: the folder of the trainings. data: the folders within which their
    pictures have to lie; None is anywhere.
    """

    def __init__(self, engine: Engine, runs: Path, data: Sequence[Path] | None = None) -> None:
        """Lay the components out."""
        self.data = data
        self.engine, self.runs, self.sheets = engine, runs, Shown()
        self.recipes = run_folders.recipes(engine.name)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=4, min_width=300):
                self._form()
            with gr.Column(scale=7, min_width=320):
                gr.HTML("<h2>Trainings</h2>")
                self.chosen = gr.Radio(
                    self._choices(), label="Trainings", show_label=False, container=False,
                    elem_classes="runs", elem_id="runs",
                )  # fmt: skip
                self.about = gr.HTML(NOTHING, elem_id="run", elem_classes="run")
                with gr.Row(elem_classes=["actions", "runs-actions"]):
                    self.stop = gr.Button("Stop", size="sm", visible=False)
                    self.on = gr.Button("Go on", size="sm", visible=False)
                    self.use = gr.Button("Use its adapter", variant="primary", size="sm", visible=False)
                self.curves = gr.HTML("", elem_classes="run curves")
                self.sheet = gr.Image(
                    label="Samples", show_label=False, interactive=False, visible=False, elem_classes="sheet",
                    format="png", buttons=["fullscreen"],
                )  # fmt: skip
                with gr.Accordion("Log", open=False, elem_classes="plain"):
                    self.log = gr.HTML("", elem_classes="log")
        self.seen = gr.State("")
        self.timer = gr.Timer(EVERY, active=False)
        self._listen()

    def _form(self) -> None:
        gr.HTML("<h2>A new training</h2>")
        names = [*self.recipes]
        sources = [WORLD] if self.data == [] else [WORLD, FOLDER]
        self.source = gr.Radio(
            sources, value=WORLD, label="Pictures", elem_classes="segments", container=False
        )
        where = f"within {run_folders.called(self.data)}" if self.data else "on the machine of this page"
        self.folder = gr.Textbox(
            label=f"Folder {where}", placeholder="photos" if self.data else "/home/me/photos", info=READ,
            visible=False,
        )  # fmt: skip
        self.recipe = gr.Dropdown(names, value=names[0], label="Recipe", info=self.recipes[names[0]])
        self.steps = Number(STEPS, label="Steps")
        self.name = gr.Textbox("my-adapter", label="Name", info=f"Its folder lies in {self.runs.name}.")
        self.start = gr.Button("Start training", variant="primary", elem_id="start")
        gr.HTML(f'<p class="faint">{ONE}</p>')

    def _listen(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 8}
        shown = [self.chosen, self.about, self.curves, self.sheet, self.log, self.seen]
        shown += [self.stop, self.on, self.use]
        look = {"fn": self._look, "inputs": [self.chosen, self.seen], "outputs": shown, **quiet}
        self.source.change(
            lambda source: gr.update(visible=source == FOLDER), self.source, self.folder,
            api_visibility="private", **quiet,
        )  # fmt: skip
        self.recipe.change(
            lambda name: gr.update(info=self.recipes[name]), self.recipe, self.recipe,
            api_visibility="private", **quiet,
        )  # fmt: skip
        form = [self.source, self.folder, self.recipe, self.steps, self.name]
        begun = self.start.click(self._begin, form, self.chosen, api_name="train", **quiet)
        begun.success(**look, api_visibility="private")
        self.timer.tick(**look, api_visibility="private", trigger_mode="once")
        self.chosen.input(**look, api_visibility="private")
        for button, work, name in (
            (self.stop, run_folders.stop, "stop"),
            (self.on, run_folders.go_on, "go_on"),
        ):
            done = button.click(self._ask(work), self.chosen, None, api_name=name, **quiet)
            done.then(**look, api_visibility="private")

    @property
    def fields(self) -> dict[str, Field]:
        """What a browser remembers of the form."""
        form = {"source": self.source, "folder": self.folder, "recipe": self.recipe, "name": self.name}
        texts = fields({f"train {name}": part for name, part in form.items()})

        def steps(kept: Mapping[str, Any]) -> int:
            return count_of(kept["train steps"], MOST_STEPS, "Steps")

        return {**texts, "train steps": Field(self.steps, self.steps.change, self.steps, steps)}

    def wire(self, tabs: gr.Tabs, own: gr.Tab, create_tab: gr.Tab, create: CreateTab) -> None:
        """Look at the runs while the tab is open, and take adapters to the first tab."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        look = {"fn": self._look, "inputs": [self.chosen, self.seen]}
        outputs = [self.chosen, self.about, self.curves, self.sheet, self.log, self.seen]
        outputs += [self.stop, self.on, self.use]
        for tab in (own, create_tab):  # the name of the tab comes in the place of another text
            turned = tab.select(self._open, self.name, self.timer, js=OPEN_TAB, **quiet)
            if tab is own:
                turned.then(**look, outputs=outputs, **quiet)
        for slot in create.slots:  # a page that is loaded anew has its first choices
            gr.on(
                [create.remembered.restored.change, create_tab.select, slot.kind.change],
                self._adapters, [slot.kind, slot.adapters], slot.adapter, trigger_mode="always_last", **quiet,
            )  # fmt: skip
            slot.adapter.input(
                lambda kind, adapter, chosen: {**chosen, kind: adapter},
                [slot.kind, slot.adapter, slot.adapters], slot.adapters, **quiet,
            )  # fmt: skip
        first = create.slots[0]
        taken = [tabs, first.kind, first.adapter, first.adapters]
        self.use.click(self._use, [self.chosen, first.kind, first.adapters], taken, **quiet)

    def _open(self, name: str) -> gr.Timer:
        """Look at the runs while this tab is the one that is open."""
        return gr.Timer(active=name == NAME)

    def _choices(self) -> list[tuple[str, str]]:
        return [(run.line, run.name) for run in run_folders.found(self.runs)]

    @readable
    def _begin(self, source: str, folder: str, recipe: str, steps: Any, name: str) -> Any:
        """Begin, and choose the new run."""
        if source == FOLDER and not (folder or "").strip():
            raise ValueError("type in the folder of the pictures")
        if recipe not in self.recipes:
            raise ValueError(f"the page knows no recipe {recipe!r} for the base {self.engine.name}")
        begun = run_folders.begin(
            self.runs,
            name=(name or "").strip(),
            recipe=recipe,
            base=self.engine.name,
            steps=count_of(steps, MOST_STEPS, "Steps"),
            source=folder if source == FOLDER else "",
            within=self.data,
        )
        return gr.update(choices=self._choices(), value=begun.name)

    def _ask(self, work: Any) -> Any:
        @readable
        def asked(name: str | None) -> None:
            work(self._folder(name))

        return asked

    def _folder(self, name: str | None) -> Path:
        """The folder of a run in the list. Raises ValueError for any other."""
        folder = self.runs / Path(name or "").name
        if not name or not run_folders.is_run(folder):
            raise ValueError("choose a training in the list")
        return folder

    @readable
    def _look(self, name: str | None, seen: str) -> list[Any]:
        """What there is to be seen of the chosen run, or else the newest; nothing where it is as before."""
        runs = run_folders.found(self.runs)
        if not runs:  # none yet, or their folders were deleted
            no = gr.update(visible=False)
            return [gr.update(choices=[], value=None), NOTHING, "", no, "", "", no, no, no]
        run = next((run for run in runs if run.name == name), runs[0])
        log = run_folders.log_lines(run.record.folder)
        now = repr(
            [[one.line for one in runs], run.name, len(run.record.rows), run.record.samples[-1:], log[-1:]]
        )
        if now == seen:
            return [gr.skip()] * 9
        view = details(run, log)
        step, sheet = run.record.samples[-1] if run.record.samples else (0, None)
        picture = None if sheet is None else self.sheets.copy(sheet, f"{run.name}-{sheet.name}")
        told = f'<p class="faint">Step {step}: maps, their pictures, samples</p>' if picture else ""
        return [
            gr.update(choices=[(one.line, one.name) for one in runs], value=run.name),
            view.head,
            view.curves + told,
            gr.update(value=picture, visible=picture is not None),
            view.log,
            now,
            gr.update(visible=run.state in run_folders.ALIVE),
            gr.update(visible=run.can_go_on),
            gr.update(visible=run.state == "finished" and self._fits(run)),
        ]

    def _fits(self, run: run_folders.Run) -> bool:
        return (
            run.record.config.get("task") == "controlnet"
            and run.record.config.get("base") == self.engine.name
        )

    def _finished(self) -> list[run_folders.Run]:
        return [run for run in run_folders.found(self.runs) if run.state == "finished" and self._fits(run)]

    def _adapters(self, kind: str, chosen: dict[str, str]) -> Any:
        """The adapters for a kind of map, the base's own and those that were trained here; chosen is the one
        that was before.
        """
        value = chosen.get(kind, "")
        rows = [(OWN, "")]
        rows += [(run.name, str(run.record.result)) for run in self._finished() if kind in run.kinds]
        return gr.update(choices=rows, value=value if value in [path for _, path in rows] else "")

    @readable
    def _use(self, name: str | None, kind: str, chosen: dict[str, str]) -> list[Any]:
        """The first tab, with the run's kind of map, or one of its kinds, and its adapter."""
        run = run_folders.look(self._folder(name))
        if run.state != "finished" or not self._fits(run):
            raise ValueError(f"the run {run.name} is {run.state}: it has no adapter for this page")
        if kind not in run.kinds:
            kind = next((one for one in run.kinds if one in self.engine.kinds), kind)
        chosen = {**chosen, kind: str(run.record.result)}
        return [gr.Tabs(selected="create"), gr.update(value=kind), self._adapters(kind, chosen), chosen]

"""The first tab: a photo, its map, a prompt, and the pictures that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gradio as gr

from controlkit import demo, figures
from controlkit.images import encode_png
from controlkit.prompt_syntax import SYNTAXES
from controlkit.schedulers import SCHEDULERS
from controlkit.settings import USUAL_SCHEDULER, USUAL_STEPS
from controlkit.studio.asked import MOST_PICTURES, MOST_STEPS
from controlkit.studio.components import Picture, Slider
from controlkit.studio.drawn import IS_MAP, Maps
from controlkit.studio.engine import Engine
from controlkit.studio.gallery import Gallery
from controlkit.studio.making import Making
from controlkit.studio.remembered import Field, Remembered, fields
from controlkit.studio.slot import Slot
from controlkit.studio.toasts import readable
from controlkit.studio.uploads import uploaded, write_shown
from controlkit.studio.wording import SCHEDULER_INFO, SYNTAX_NAMES

MOST_CONTROLS = 3
REMEMBERED = "This browser finds its pictures and settings here again, until the studio ends."
SCENES = (1, 3, 7, 12, 20, 21)  # of the bundled world's demonstration split


class CreateTab:
    """Builds the tab and wires it."""

    def __init__(self, engine: Engine, keep: Path, page: gr.Blocks) -> None:
        """Lay the components out in the order in which a person needs them."""
        self.engine, self.page = engine, page
        self.scenes = [figures.render(seed, size=256) for seed in SCENES]
        self.files = [
            write_shown(encode_png(scene.picture), f"scene-{seed}.png")
            for seed, scene in zip(SCENES, self.scenes, strict=True)
        ]
        self.remembered, self.maps = Remembered(), Maps(engine)
        with gr.Row(elem_classes="columns"):
            with gr.Column(scale=6, min_width=320):
                self._photo_and_map()
            with gr.Column(scale=5, min_width=320, elem_classes="pictures"):
                self._asked()
                self.gallery = Gallery(self.photo)
        self._wire()
        making = Making(engine, keep)
        making.listen(self)
        self.remembered.forgets(self.afresh, making.visitors.forget)

    def _photo_and_map(self) -> None:
        with gr.Row(elem_classes="pair"):
            with gr.Column(min_width=240):
                gr.HTML("<h2>Photo</h2>")
                self.photo = Picture(
                    value=self.files[0], type="filepath", image_mode=None,
                    sources=["upload", "webcam", "clipboard"],
                    label="Photo", show_label=False, height=300, elem_classes="picture", elem_id="photo",
                )  # fmt: skip
                self.examples = gr.Dataset(
                    components=[gr.Image(visible=False)],
                    samples=[[file] for file in self.files],
                    label="Or a scene of the bundled world",
                    type="index",
                    elem_classes="examples",
                )
                is_map = gr.Checkbox(label=IS_MAP, elem_id="is-map")
            self.width = gr.Textbox(label="Width", render=False, placeholder="as the photo")
            self.height = gr.Textbox(label="Height", render=False, placeholder="as the photo")
            sides = [self.width, self.height]
            with gr.Column(min_width=240):
                gr.HTML("<h2>Map</h2>")
                self.slots = [Slot(1, self.maps, self.photo, sides, self.remembered.restored, is_map=is_map)]
        self._more(sides)

    def _asked(self) -> None:
        """What is to be in the pictures, and the button that makes them: beside the map, in sight."""
        self.prompt = gr.Textbox(
            self._prompt(0), label="Prompt", placeholder="What the picture shows", lines=2, elem_id="prompt"
        )
        with gr.Row(elem_classes="go"):
            self.go = gr.Button("Generate", variant="primary", elem_id="generate", scale=2)
            self.cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", scale=2, visible=False)
            self.count = Slider(1, MOST_PICTURES, 4, step=1, label="Pictures", scale=3, min_width=160)

    def _wire(self) -> None:
        for picture in (self.photo, *(slot.own for slot in self.slots if slot.own is not None)):
            picture.upload(
                readable(uploaded), picture, picture, show_progress="hidden", api_visibility="private"
            )
        self.examples.click(
            lambda index: (self.files[index], self._prompt(index)),
            self.examples,
            [self.photo, self.prompt],
            show_progress="hidden",
            api_visibility="private",
        )

    def remember(self, others: Mapping[str, Field]) -> None:
        """Let the browser keep the fields of this tab, and others by names of their own."""
        own = {
            "photo": self.photo, "prompt": self.prompt, "count": self.count, "negative": self.negative,
            "seed": self.seed, "steps": self.steps, "guidance": self.guidance, "scheduler": self.scheduler,
            "syntax": self.syntax, "width": self.width, "height": self.height,
        }  # fmt: skip
        of_maps = {name: field for slot in self.slots for name, field in slot.fields.items()}
        self.remembered.wire(self.page, {**fields(own), **of_maps, **others})

    def _more(self, sides: list[gr.Textbox]) -> None:
        """What has good defaults, folded away."""
        with gr.Accordion("More maps and settings", open=False, elem_id="more"):
            self.negative = gr.Textbox("", label="Negative prompt", placeholder="What it should not show")
            with gr.Row():
                self.seed = gr.Textbox(label="Seed", placeholder="another one each time")
                self.steps = Slider(1, MOST_STEPS, USUAL_STEPS, step=1, label="Steps")
            with gr.Row():
                self.guidance = gr.Textbox(label="Guidance", placeholder="the base's own")
                self.scheduler = gr.Dropdown(
                    list(SCHEDULERS), value=USUAL_SCHEDULER, label="Scheduler", info=SCHEDULER_INFO
                )
            self.syntax = gr.Dropdown(
                [(SYNTAX_NAMES.get(name, name), name) for name in SYNTAXES],
                value="plain",
                label="Parentheses",
            )
            with gr.Row():
                for side in sides:
                    side.render()
            for number in range(2, MOST_CONTROLS + 1):
                with gr.Accordion(f"Map {number}", open=False):
                    self.slots.append(Slot(number, self.maps, self.photo, sides, self.remembered.restored))
            gr.HTML(f'<p class="faint">{REMEMBERED}</p>')
            self.afresh = gr.Button("Start afresh", size="sm", elem_id="afresh")

    def _prompt(self, index: int) -> str:
        """A scene's caption in other colours: what comes of it differs from the photo."""
        return demo.recoloured(self.scenes[index].caption, demo.COLOUR_STRIDE)

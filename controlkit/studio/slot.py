"""One control on the page: what kind of map, the map itself, how strongly, when and in which mode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr
import numpy as np

from controlkit import images, preprocessors
from controlkit.preprocessors import Map
from controlkit.preprocessors.canny import HIGH, LOW
from controlkit.rules import MODES
from controlkit.studio.asked import DIGITS, AskedControl, whole
from controlkit.studio.engine import ON_DEVICE, Engine, Wish
from controlkit.studio.pose_editor import edited, pose_editor, shown
from controlkit.studio.toasts import readable
from controlkit.studio.uploads import as_file, read_upload, write_shown

TITLES = {
    "canny": "Edges",
    "openpose": "Pose",
    "depth": "Depth",
    "normal": "Normals",
    "lineart": "Line art",
    "lineart_anime": "Anime lines",
    "mlsd": "Straight lines",
    "scribble": "Scribble",
    "shuffle": "Colours",
    "softedge": "Soft edges",
}
IS_MAP = "This picture is a map already"
SLOT_INPUTS = 7  # of `Slot.inputs`
MOST_EDGE = 600  # of a slider for canny's thresholds; gradients above are rare


@dataclass(frozen=True, eq=False)
class Drawn:
    """A map that is shown; beside a pose the photo at its size, uint8 (H, W, 3).

    A session keeps it for long: of other maps no photo, which may have 40 million pixels.
    """

    map: Map
    photo: np.ndarray | None = None


class Slot:
    """The components of one control, and the functions that keep them in step."""

    def __init__(
        self,
        number: int,
        engine: Engine,
        photo: gr.Image,
        sides: list[gr.Textbox],
        *,
        page: gr.Blocks,
        is_map: gr.Checkbox | None = None,
    ) -> None:
        """Build the components where the page is being laid out. is_map: the photo's own switch."""
        self.number, self.engine = number, engine
        choices = [(TITLES.get(kind, kind), kind) for kind in engine.kinds]
        name = "" if number == 1 else f" {number}"
        api = "" if number == 1 else f"_{number}"
        self.on = gr.Checkbox(number == 1, label="Follow this map, too", visible=number > 1)
        self.kind = gr.Radio(
            choices, value=choices[0][1], label=f"Map{name}", elem_classes="segments", container=False
        )
        self.view = gr.Image(
            label="Map", format="png", interactive=False, show_label=False, elem_classes="picture map",
            buttons=["download", "fullscreen"], height=300,
        )  # fmt: skip
        self.pose = pose_editor()
        self.joints = gr.DownloadButton("Joints as JSON", visible=False, size="sm")
        self.edges = gr.Column(elem_classes="thresholds")
        with self.edges:
            self.low = gr.Slider(0, MOST_EDGE, LOW, step=1, label="Weak edges from", min_width=120)
            self.high = gr.Slider(0, MOST_EDGE, HIGH, step=1, label="Strong edges from", min_width=120)
        self.findings = gr.Markdown(elem_classes="findings", visible=False)
        self.scale = gr.Slider(0, 2, 1, step=0.05, label="Strength")
        self.is_map = is_map or gr.Checkbox(label=IS_MAP)
        self.own = None
        with gr.Accordion("When and how", open=False, elem_classes="plain"):
            with gr.Row():
                self.start = gr.Slider(0, 1, 0, step=0.05, label="From", min_width=120)
                self.end = gr.Slider(0, 1, 1, step=0.05, label="Until", min_width=120)
            self.mode = gr.Dropdown(list(MODES), value="balanced", label="Mode")
            self.adapter = gr.Dropdown([("the base's own", "")], value="", label="Adapter")
            if number > 1:
                self.own = as_file(
                    gr.Image(type="filepath", sources=["upload"], label="Another picture", height=160)
                )
        self.drawn = gr.State(None)
        self.wanted = gr.State(None)  # changes when the device has to draw
        self._listen(photo, sides, api, page)

    def _listen(self, photo: gr.Image, sides: list[gr.Textbox], api: str, page: gr.Blocks) -> None:
        own = [] if self.own is None else [self.own]
        inputs = [self.kind, self.is_map, self.low, self.high, *sides, photo, *own]
        outputs = [self.view, self.pose, self.joints, self.findings, self.drawn]
        shapes = [
            self.kind.change,
            self.is_map.change,
            photo.change,
            *(side.submit for side in sides),
            *(side.blur for side in sides),
        ]
        gr.on(
            [page.load, *shapes, *(picture.change for picture in own)],
            self._begin,
            inputs,
            [*outputs, self.edges, self.wanted],
            show_progress="hidden",
            trigger_mode="always_last",  # else a photo that comes right after a removal can be lost
            concurrency_limit=8,
            api_name=f"map{api}",
        )
        gr.on(
            [self.low.input, self.high.input],
            self._redraw,
            inputs,
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=8,
            api_visibility="private",
        )
        self.wanted.change(
            self._draw,
            inputs,
            outputs,
            concurrency_id="device",
            concurrency_limit=1,
            show_progress="minimal",
            show_progress_on=self.view,
            api_name=f"device_map{api}",
        )
        self.pose.edited(
            self._move,
            [self.pose, self.drawn],
            [self.pose, self.joints, self.drawn],
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=8,
            api_name=f"pose{api}",
        )

    @readable
    def _begin(self, kind: str, is_map: bool, *rest: Any) -> list[Any]:
        """Draw what needs no network; for the rest, ask the device."""
        thresholds = gr.update(visible=kind == "canny" and not is_map)
        if kind in ON_DEVICE and not is_map and _source(rest) is not None:
            return [gr.skip()] * 5 + [thresholds, object()]
        return [*self._draw(kind, is_map, *rest), thresholds, gr.skip()]

    @readable
    def _redraw(self, *values: Any) -> list[Any]:
        return self._draw(*values)

    @readable
    def _draw(self, kind: str, is_map: bool, low: float, high: float, *rest: Any) -> list[Any]:
        """The map of the slot's picture, and what is wrong with it."""
        path = _source(rest)
        if path is None:
            return [gr.update(value=None, visible=True), shown(None), gr.update(visible=False), _no(), None]
        picture = read_upload(path, is_map=is_map)
        width, height = whole(rest[0], "the width"), whole(rest[1], "the height")
        size = self.engine.size(picture, width, height)
        wish = Wish(kind, is_map, low, max(low, high))
        made = self.engine.map(picture, wish, width=size[0], height=size[1])
        told = _findings(picture if is_map else made.image, kind, is_map=is_map, made=made)
        photo = None if made.poses is None else images.cover(picture, *size)
        return [*_views(made, photo), told, Drawn(made, photo)]

    @readable
    def _move(self, value: Any, drawn: Drawn | None) -> list[Any]:
        """Draw the pose anew after a joint was moved."""
        if drawn is None or drawn.map.poses is None:
            return [gr.skip()] * 3
        made = edited(value, drawn.map)
        return [*_views(made, drawn.photo)[1:], Drawn(made, drawn.photo)]

    @property
    def inputs(self) -> list[Any]:
        """What `asked` takes, in its order."""
        return [self.on, self.scale, self.start, self.end, self.mode, self.adapter, self.drawn]


def asked(
    on: bool, scale: float, start: float, end: float, mode: str, adapter: str | None, drawn: Drawn | None
) -> AskedControl | None:
    """A slot's control; None where there is no map, or one that does not act."""
    if not on or drawn is None or not scale:
        return None
    scale, start, end = (round(float(x), DIGITS) for x in (scale, start, end))
    return AskedControl(drawn.map.kind, drawn.map.image, scale, start, end, mode, adapter or "")


def _source(rest: tuple[Any, ...]) -> str | None:
    """The slot's own picture, or else the photo."""
    return next((path for path in reversed(rest[2:]) if path), None)


def _views(made: Map, photo: np.ndarray | None) -> list[Any]:
    """The map, the editor of its joints and their download, of which the fitting ones are visible."""
    if made.poses is None:
        return [gr.update(value=made.image, visible=True), shown(None), gr.update(visible=False)]
    import json

    from controlkit.preprocessors.posejson import poses_to_json

    joints = write_shown(json.dumps(poses_to_json(made.poses), indent=2).encode(), "pose.json")
    return [
        gr.update(value=made.image, visible=False),
        shown(made, photo),
        gr.update(value=joints, visible=True),
    ]


def _no() -> Any:
    return gr.update(value="", visible=False)


def _findings(image: np.ndarray, kind: str, *, is_map: bool, made: Map) -> Any:
    """What is wrong with a map, in plain words."""
    if made.poses is not None and not len(made.poses.people):
        return gr.update(
            value="No person was found in this picture, so there is no pose to follow.", visible=True
        )
    if not is_map:
        return (
            _no()
            if made.image.any()
            else gr.update(value="Nothing was found: the map is black.", visible=True)
        )
    found = preprocessors.lint(image, kind)
    lines = [
        f"{one.message[:1].upper()}{one.message[1:]}. {one.cure[:1].upper()}{one.cure[1:]}." for one in found
    ]
    return gr.update(value="\n\n".join(lines), visible=bool(lines))

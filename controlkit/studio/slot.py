"""One control on the page: what kind of map, the map itself, how strongly, when and in which mode."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from controlkit import images, preprocessors
from controlkit.preprocessors.canny import HIGH, LOW
from controlkit.rules import MODES, USUAL_MODE
from controlkit.studio.asked import AskedControl, between, whole
from controlkit.studio.components import Picture, Slider
from controlkit.studio.drawn import IS_MAP, Drawn, MadeOf, Maps
from controlkit.studio.engine import Wish
from controlkit.studio.pose_editor import edited, on_another_part, pose_editor, shown
from controlkit.studio.remembered import Field, fields, text
from controlkit.studio.toasts import readable
from controlkit.studio.uploads import read_upload, upload_size, write_shown
from controlkit.studio.wording import MODE_NAMES, line_of, title

OWN = "the base's own"  # adapter
MOST_EDGE = 600  # of a slider for canny's thresholds; gradients above are rare
MOST_SCALE = 2  # of a slider for the strength
WEAK, STRONG = "Weak edges from", "Strong edges from"
DRAWING = "The map is being made."


@dataclass
class Latest:
    """What one page wants to see now, and what it wanted of the device before that."""

    made_of: MadeOf | None = None
    asked: deque[MadeOf] = field(default_factory=lambda: deque(maxlen=8))

    def over(self, made_of: MadeOf | None) -> bool:
        """Whether the page wanted this map, and wants another one now."""
        return made_of in self.asked and made_of != self.made_of


class Slot:
    """The components of one control, and the functions that keep them in step."""

    def __init__(
        self,
        number: int,
        maps: Maps,
        photo: gr.Image,
        sides: list[gr.Textbox],
        restored: gr.State,
        *,
        is_map: gr.Checkbox | None = None,
    ) -> None:
        """Build the components where the page is being laid out. is_map: the photo's own switch. restored:
        changes when a page that was loaded has its values.
        """
        self.number, self.maps, self.engine = number, maps, maps.engine
        choices = [(title(kind), kind) for kind in self.engine.kinds]
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
            self.low = Slider(0, MOST_EDGE, LOW, step=1, label=WEAK, min_width=120)
            self.high = Slider(0, MOST_EDGE, HIGH, step=1, label=STRONG, min_width=120)
        self.findings = gr.Markdown(elem_classes="findings", visible=False)
        self.scale = Slider(0, MOST_SCALE, 1, step=0.05, label="Strength")
        self.is_map = is_map or gr.Checkbox(label=IS_MAP)
        self.own = None
        if number > 1:
            with gr.Accordion("Another picture than the photo", open=False, elem_classes="plain"):
                self.own = Picture(
                    type="filepath", sources=["upload"], label="Another picture", show_label=False, height=160
                )
        with gr.Accordion("When and how", open=False, elem_classes="plain"):
            with gr.Row():
                self.start = Slider(0, 1, 0, step=0.05, label="From", min_width=120)
                self.end = Slider(0, 1, 1, step=0.05, label="Until", min_width=120)
            self.mode = gr.Dropdown(
                [(MODE_NAMES.get(mode, mode), mode) for mode in MODES], value=USUAL_MODE, label="Mode"
            )
            self.adapter = gr.Dropdown([(OWN, "")], value="", label="Adapter")
        self.adapters = gr.State({})  # what was chosen for each kind of map
        self.drawn = gr.State(None)
        self.wanted = gr.State(None)  # changes when the device has to draw
        self.latest = gr.State(Latest())
        self.before = gr.State(None)  # joints that were moved on this page before it was loaded anew
        self._listen(photo, sides, api, restored)

    def _listen(self, photo: gr.Image, sides: list[gr.Textbox], api: str, restored: gr.State) -> None:
        own = [] if self.own is None else [self.own]
        inputs = [self.drawn, self.kind, self.is_map, self.low, self.high, *sides, photo, *own]
        outputs = [self.view, self.pose, self.joints, self.findings, self.drawn]
        shapes = [
            self.kind.change,
            self.is_map.change,
            photo.change,
            *(side.submit for side in sides),
            *(side.blur for side in sides),
        ]
        gr.on(
            [restored.change, *shapes, *(picture.change for picture in own)],
            self._begin,
            [self.latest, *inputs],
            [*outputs, self.edges, self.wanted],
            show_progress="hidden",
            trigger_mode="always_last",  # else a photo that comes right after a removal can be lost
            concurrency_limit=8,
            api_name=f"map{api}",
        )
        gr.on(
            [self.low.change, self.high.change],
            self._draw,
            inputs,
            outputs,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=8,
            api_visibility="private",
        )
        self.wanted.change(
            self._draw_on_device,
            [self.latest, self.before, *inputs],
            outputs,
            concurrency_id="device",
            concurrency_limit=1,
            show_progress="hidden",
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
    def _begin(self, latest: Latest, drawn: Drawn | None, kind: str, is_map: bool, *rest: Any) -> list[Any]:
        """Draw what needs no network; for the rest, ask the device."""
        thresholds = gr.update(visible=kind == "canny" and not is_map)
        latest.made_of = None
        try:
            latest.made_of = made_of = self._made_of(kind, is_map, *rest)
        except ValueError as error:
            return [*_nothing(drawn, error), thresholds, gr.skip()]
        if made_of is not None and made_of.on_device and _known(drawn, made_of) is None:
            latest.asked.append(made_of)
            return [*[gr.skip()] * 3, gr.update(value=DRAWING, visible=True), gr.skip(), thresholds, object()]
        return [*self._draw(drawn, kind, is_map, *rest), thresholds, gr.skip()]

    @readable
    def _draw(self, drawn: Drawn | None, *values: Any) -> list[Any]:
        """The map of the slot's picture, and what is wrong with it; nothing where it is shown already."""
        try:
            made = self.draw(drawn, *values)
        except ValueError as error:
            return _nothing(drawn, error)
        if made is None:
            return _nothing(drawn)
        if made is drawn and not drawn.hidden:
            return [*[gr.skip()] * 3, _findings(drawn), gr.skip()]
        return [*_views(made), _findings(made), replace(made, hidden=False)]

    @readable
    def _draw_on_device(self, latest: Latest, before: Any, drawn: Drawn | None, *values: Any) -> list[Any]:
        """As `_draw`, unless another map is wanted by now; joints that were moved before the page was loaded
        anew are where they were.
        """
        try:
            made_of = self._made_of(*values)
        except ValueError as error:
            return _nothing(drawn, error)
        updates = [] if latest.over(made_of) else self._draw(drawn, *values)
        if latest.over(made_of):  # also if it became so meanwhile
            return [gr.skip()] * 5
        made = updates[-1]
        if not isinstance(made, Drawn) or made.hidden or made.hand:
            return updates
        try:
            again = moved(made, before)
        except ValueError:  # not of this page
            return updates
        return updates if again is made else [*_views(again), _findings(again), again]

    def draw(self, drawn: Drawn | None, *values: Any) -> Drawn | None:
        """The map that belongs to the values, which may be drawn already; None without a picture.

        values: kind, is_map, low, high, width, height, photo and, where the slot has it, its own picture.
        Raises ValueError for what cannot be read or is not allowed.
        """
        made_of = self._made_of(*values)
        if made_of is None:
            return None
        known = _known(drawn, made_of)
        if known is not None:
            return known
        by_hand = None if drawn is None or drawn.made_of.path != made_of.path else drawn.by_hand
        if by_hand is not None and by_hand.made_of.wish == made_of.wish:
            return _at_another_size(by_hand, made_of, read_upload(made_of.path))
        return replace(self.maps.of(made_of), kept=by_hand)

    def _made_of(
        self, kind: str, is_map: bool, low: Any, high: Any, width: str, height: str, *pictures: str | None
    ) -> MadeOf | None:
        """What the map is made of, by the pictures' headers; None without a picture."""
        path = next((path for path in reversed(pictures) if path), None)
        if path is None:
            return None
        wish = Wish(kind, is_map)
        if kind == "canny" and not is_map:
            low, high = between(low, 0, MOST_EDGE, WEAK), between(high, 0, MOST_EDGE, STRONG)
            wish = Wish(kind, is_map, min(low, high), max(low, high))
        shape = upload_size(pictures[0] or path)  # all maps of a request have the photo's shape
        if path != pictures[0]:
            upload_size(path)
        size = self.engine.size(shape, whole(width, "Width"), whole(height, "Height"))
        return MadeOf(path, wish, size)

    @readable
    def _move(self, value: Any, drawn: Drawn | None) -> list[Any]:
        """Draw the pose anew after a joint was moved."""
        if drawn is None or drawn.map.poses is None:
            return [gr.skip()] * 3
        made = moved(drawn, value)
        return [*_views(made)[1:], made]  # also where nothing was moved: the browser waits for an answer

    @property
    def inputs(self) -> list[Any]:
        """What `asked` takes, in its order, but for the sides and the photo, which all slots share."""
        own = [] if self.own is None else [self.own]
        how = [self.on, self.scale, self.start, self.end, self.mode, self.adapter]
        return [*how, self.kind, self.is_map, self.low, self.high, self.pose, self.drawn, *own]

    @property
    def fields(self) -> dict[str, Field]:
        """What a browser remembers of this control, by names of its own."""
        names = ("kind", "on", "low", "high", "scale", "start", "end", "mode", "own")
        parts = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        parts |= {"is_map": self.is_map}
        kind, adapter, pose = (f"{name} {self.number}" for name in ("kind", "adapter", "pose"))

        def adapters(kept: Mapping[str, Any]) -> dict[str, str]:
            return {text(kept.get(kind)): text(kept[adapter])}

        return {
            **fields({f"{name} {self.number}": part for name, part in parts.items()}),
            adapter: Field(self.adapter, self.adapter.change, self.adapters, adapters),
            pose: Field(self.pose, self.pose.edited, self.before, lambda kept: _joints(kept[pose])),
        }

    def asked(
        self, width: str, height: str, photo: str | None,
        on: bool, scale: Any, start: Any, end: Any, mode: str, adapter: str | None,
        kind: str, is_map: bool, low: Any, high: Any, pose: Any, drawn: Drawn | None, *own: str | None,
    ) -> AskedControl | None:  # fmt: skip
        """The control as the page has it now; None where there is no picture, or one that does not act.

        The map is the one that is shown where that is of this picture, kind and size; else it is made here.
        Raises ValueError for what the page cannot take.
        """
        of = "" if self.number == 1 else f" of map {self.number}"
        scale = between(scale, 0, MOST_SCALE, f"Strength{of}")
        if not on or not scale:
            return None
        start, end = between(start, 0, 1, f"From{of}"), between(end, 0, 1, f"Until{of}")
        if start >= end:
            raise ValueError(f"From{of} is {start:g} and Until is {end:g}: it has to begin before it ends")
        made = self.draw(drawn, kind, is_map, low, high, width, height, photo, *own)
        if made is None:
            return None
        made = moved(made, pose)  # a joint that was moved this moment
        return AskedControl(made.map.kind, made.map.image, scale, start, end, mode, adapter or "")


def _joints(value: Any) -> dict[str, Any]:
    """Joints as the page kept them; whether they are some is seen once their pose is there."""
    if not isinstance(value, dict):
        raise ValueError("these are no joints")
    return {"of": text(value.get("of")), "people": value.get("people")}


def _known(drawn: Drawn | None, made_of: MadeOf) -> Drawn | None:
    """What was drawn before of the same: joints that were moved by hand stay moved."""
    if drawn is None:
        return None
    if drawn.made_of == made_of:
        return drawn
    by_hand = drawn.by_hand
    return by_hand if by_hand is not None and by_hand.made_of == made_of else None


def _at_another_size(drawn: Drawn, made_of: MadeOf, picture: np.ndarray) -> Drawn:
    """A pose whose joints were moved, where pictures have another size and show another part of the photo."""
    assert drawn.map.poses is not None
    shape = picture.shape[1], picture.shape[0]
    poses, found = (
        None if one is None else on_another_part(one, shape, made_of.size)
        for one in (drawn.map.poses, drawn.found)
    )
    assert poses is not None
    made = replace(preprocessors.poses_to_map(poses), model=drawn.map.model)
    return Drawn(made, made_of, images.cover(picture, *made_of.size), drawn.told, hand=True, found=found)


def moved(drawn: Drawn, value: Any) -> Drawn:
    """What is drawn of the joints as the browser has them; itself where they are the same, or another pose's.

    Raises ValueError for anything but such joints.
    """
    if drawn.map.poses is None or not isinstance(value, dict) or value.get("of") != drawn.made_of.name:
        return drawn
    made = edited(value, drawn.map)
    assert made.poses is not None
    if np.array_equal(made.poses.people, drawn.map.poses.people):
        return drawn
    return replace(drawn, map=made, hand=True, kept=None)


def _nothing(drawn: Drawn | None, error: ValueError | None = None) -> list[Any]:
    """No map is shown, beneath it why; the one that was is kept for its joints, should it be wanted again."""
    told = _no() if error is None else gr.update(value=escape(line_of(error)), visible=True)
    hidden = None if drawn is None else replace(drawn, hidden=True)
    return [gr.update(value=None, visible=True), shown(None), gr.update(visible=False), told, hidden]


def _views(drawn: Drawn) -> list[Any]:
    """The map, the editor of its joints and their download, of which the fitting ones are visible."""
    made = drawn.map
    if made.poses is None:
        return [gr.update(value=made.image, visible=True), shown(None), gr.update(visible=False)]
    import json

    from controlkit.preprocessors.posejson import poses_to_json

    joints = write_shown(json.dumps(poses_to_json(made.poses), indent=2).encode(), "pose.json")
    return [
        gr.update(value=made.image, visible=False),
        shown(made, drawn.photo, of=drawn.made_of.name, found=drawn.found),
        gr.update(value=joints, visible=True),
    ]


def _no() -> Any:
    return gr.update(value="", visible=False)


def _findings(drawn: Drawn) -> Any:
    return gr.update(value=drawn.told, visible=bool(drawn.told))

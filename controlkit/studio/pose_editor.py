"""A pose whose joints can be moved: the component of the page, and the drawing of what was moved."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from controlkit.images import at_resolution, encode_png
from controlkit.preprocessors import Map, poses_to_map
from controlkit.preprocessors.skeleton import COLOURS, LIMBS, Poses

JOINTS = (
    *("nose", "neck", "right shoulder", "right elbow", "right wrist", "left shoulder", "left elbow"),
    *("left wrist", "right hip", "right knee", "right ankle", "left hip", "left knee", "left ankle"),
    *("right eye", "left eye", "right ear", "left ear"),
)
_BACKDROP = 384  # pixels of the shorter side of the photo behind the pose
_TEMPLATE = '<div class="pose-editor"></div>'


def pose_editor() -> Any:
    """Joints on the map, moved by mouse, touch and arrow keys; triggers `edited` when one was moved.

    Its value: None, or an object with width, height, people (each 18 points x, y, score), found (the people
    as they were), of (whose they are), map and photo (data URLs). No class of its own: of those gradio writes
    a stub beside the module.
    """
    return gr.HTML(
        html_template=_TEMPLATE, js_on_load=_script(), apply_default_css=False, label="Pose", visible=False
    )


def _script() -> str:
    """The component's script, behind what it is told of joints and limbs."""
    told = {"LIMBS": LIMBS, "COLOURS": [f"rgb{colour}" for colour in COLOURS], "JOINTS": JOINTS}
    lines = [f"const {name} = {json.dumps(value)};" for name, value in told.items()]
    return "\n".join([*lines, (Path(__file__).parent / "pose_editor.js").read_text(encoding="utf-8")])


def shown(
    made: Map | None, picture: np.ndarray | None = None, *, of: str = "", found: Poses | None = None
) -> Any:
    """The update that shows a map's joints over a picture, or hides the editor.

    of: a name that comes back with the joints. found: the joints before any was moved.
    """
    if made is None or made.poses is None:
        return gr.update(value=None, visible=False)
    assert picture is not None
    from controlkit.images import cover

    height, width = made.image.shape[:2]
    photo = cover(picture, width, height)
    if min(width, height) > _BACKDROP:
        photo = at_resolution(photo, _BACKDROP)
    value = {
        "width": width,
        "height": height,
        "people": made.poses.people.tolist(),
        "found": (found or made.poses).people.tolist(),
        "of": of,
        "map": _data_url(made.image, plain=True),
        "photo": _data_url(photo),
    }
    return gr.update(value=value, visible=True)


def _data_url(image: np.ndarray, *, plain: bool = False) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(image, plain=plain)).decode()


def on_another_part(poses: Poses, shape: tuple[int, int], size: tuple[int, int]) -> Poses:
    """A pose on the central part of a photo that pictures of another size show (`images.cover`).

    shape: width and height of the photo. size: those of the pictures.
    """
    before, after = (min(shape[0] / w, shape[1] / h) for w, h in ((poses.width, poses.height), size))
    middle = np.array([poses.width, poses.height]) / 2

    def moved(points: np.ndarray) -> np.ndarray:
        there = (points[..., :2] - middle) * (before / after) + np.array(size) / 2
        return np.concatenate(
            [np.where(points[..., 2:] > 0, there, points[..., :2]), points[..., 2:]], axis=-1
        )

    parts = {name: moved(getattr(poses, name)) for name in ("people", "hands", "faces")}
    return replace(poses, **parts, width=size[0], height=size[1])


def edited(value: Any, before: Map) -> Map:
    """The map of the joints as the browser has them. Raises ValueError for anything but such joints."""
    assert before.poses is not None
    people = value.get("people") if isinstance(value, dict) else None
    shape = before.poses.people.shape
    try:
        points = np.array(people, dtype=np.float64).reshape(-1, 18, 3)
    except (TypeError, ValueError, OverflowError):
        raise ValueError("the joints that came from the page cannot be read") from None
    if points.shape != shape or not all(math.isfinite(x) for x in points.ravel()):
        raise ValueError("the joints that came from the page are not those of the people in the picture")
    poses = replace(before.poses, people=points)
    return replace(poses_to_map(poses), model=before.model)

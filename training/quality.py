"""How well pictures follow their maps and captions on held-out scenes of the bundled world.

Each adapter is measured between a floor (the same prompts and seeds without control) and a ceiling (the
true picture passed through the autoencoder), on seeds 0 to N-1 of the "validation" split, which no training
sees. Maps are the world's own: edges of the picture, true joints, true depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit import images
from controlkit.base import Base
from controlkit.control import Control
from controlkit.figures import COLOURS, Scene, render
from controlkit.layouts import lay_out
from controlkit.metrics import depth_rmse, edge_f1, iou, nearest_colour, pck
from controlkit.naming import unknown
from controlkit.sampling import generate
from controlkit.training.world import exact_map

if TYPE_CHECKING:
    from diffusers import ControlNetModel

    from controlkit.adapters import Adapter

KINDS = ("canny", "openpose", "depth")
FOLLOWS = {"canny": "edge F1", "openpose": "joints", "depth": "depth RMSE"}  # the score that names each kind
LOWER_IS_BETTER = {"depth RMSE"}
STEPS = 20
Scores = dict[str, float]


@dataclass(frozen=True)
class Examination:
    """Mean scores by what was looked at: "floor", "ceiling", "true" (the picture itself) and each adapter's
    kind.
    """

    scenes: int
    scores: Mapping[str, Scores]

    def of_ceiling(self, kind: str, score: str) -> float:
        """A score of an adapter in units of the ceiling's; for an error, the ceiling's in units of it.

        Not a number where that divides by zero.
        """
        ours, ceiling = self.scores[kind][score], self.scores["ceiling"][score]
        part, whole = (ceiling, ours) if score in LOWER_IS_BETTER else (ours, ceiling)
        return part / whole if whole else math.nan


class Examiner:
    """Scores pictures of a scene with the preprocessors that users have."""

    @cached_property
    def _canny(self) -> Any:
        from controlkit.preprocessors import get

        return get("canny")

    @cached_property
    def _pose(self) -> Any:
        from controlkit.preprocessors import get

        return get("openpose", model="tiny")

    @cached_property
    def _depth(self) -> Any:
        from controlkit.preprocessors import get

        return get("depth", model="tiny")

    def scores(self, picture: NDArray[np.uint8], scene: Scene, kinds: Iterable[str] = KINDS) -> Scores:
        """Scores of a picture that should show `scene`, each in [0, 1] except the depth error (1/m).

        "edge F1": between the edges of both pictures, tolerance 2 pixels. "joints": share of the visible
        joints found within a tenth of the figure's height. "depth RMSE": of the estimated inverse depth,
        after scale and shift. "silhouette IoU": of the pixels that have the figure's colour. "colours":
        share of the parts (figure, objects, floor, sky) whose colour, read where the scene has them, is the
        caption's.
        """
        found: Scores = {"silhouette IoU": iou(silhouette(picture, scene), scene.masks["figure"])}
        right = colours_right(picture, scene)
        found |= {f"colour of {part}": float(value) for part, value in right.items() if part != "object2"}
        found["colours"] = float(np.mean(list(right.values())))
        if "canny" in kinds:
            found["edge F1"] = edge_f1(self._canny(picture).image, self._canny(scene.picture).image).f1
        if "openpose" in kinds:
            found["joints"] = self._joints(picture, scene)
        if "depth" in kinds:
            found["depth RMSE"] = depth_rmse(self._depth.inverse_depth(picture), scene.inverse_depth)
        return found

    def _joints(self, picture: NDArray[np.uint8], scene: Scene) -> float:
        people = self._pose(picture).poses.people
        pose = people[0] if len(people) else np.zeros((18, 3))
        return pck(pose, scene.joints, size=scene.figure_height)


def colours_right(picture: NDArray[np.uint8], scene: Scene) -> dict[str, bool]:
    """For each part of the scene, whether the picture has its colour at the part's true pixels."""
    return {
        part: nearest_colour(picture, scene.masks[part], scene.shade, COLOURS) == name
        for part, name in scene.colours.items()
    }


def silhouette(picture: NDArray[np.uint8], scene: Scene) -> NDArray[np.bool_]:
    """Pixels nearer to the figure's colour, at any light from dim to full, than to any other part's
    colour.
    """
    pixels = picture.astype(np.float64)
    distances = {}
    for part, name in scene.colours.items():
        colour = np.array(COLOURS[name], dtype=np.float64)
        light = np.clip((pixels @ colour) / (colour @ colour), 0.4, 1.0)
        distances[part] = ((pixels - light[..., None] * colour) ** 2).sum(axis=-1)
    others = np.min([distances[part] for part in distances if part != "figure"], axis=0)
    return np.asarray(distances["figure"] < others)


def examine(
    base: Base,
    adapters: Mapping[str, Adapter | ControlNetModel],
    *,
    scenes: int = 200,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Examination:
    """Generate under each adapter for held-out scenes and score the pictures against floor and ceiling.

    Scene k is generated with seed k, DDIM, 20 steps and the base's usual guidance. Of the scores that need an
    estimator only those of the given adapters' kinds are measured. Raises ValueError for fewer than 1
    or more than 2³² scenes, or an unknown kind.
    """
    if not 1 <= scenes <= 2**32:
        raise ValueError(f"{scenes} scenes: examine between 1 and 2^32 of them")
    for kind in adapters:
        if kind not in KINDS:
            raise unknown("kind of map", kind, KINDS)
    examiner, rows = Examiner(), []
    for number in range(scenes):
        scene = render(number, split="validation", size=base.resolution)
        pictures = {"true": scene.picture, "ceiling": through_vae(base, scene.picture)}
        pictures["floor"] = generate(base, scene.caption, steps=STEPS, seeds=[number])[0]
        for kind, adapter in adapters.items():
            seen = exact_map(kind, scene.picture, scene.joints, scene.inverse_depth)
            control = Control(adapter, seen, kind=kind)
            pictures[kind] = generate(base, scene.caption, controls=[control], steps=STEPS, seeds=[number])[0]
        rows.append({name: examiner.scores(picture, scene, adapters) for name, picture in pictures.items()})
        progress(number + 1, scenes)
    means = {
        name: {score: float(np.mean([row[name][score] for row in rows])) for score in rows[0][name]}
        for name in rows[0]
    }
    return Examination(scenes, means)


def through_vae(base: Base, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture, encoded and decoded: the best that a base could draw."""
    lay_out(base.vae)  # as a generation does: what was made before must not change the last bit
    latents = base.encode_pictures(images.picture_to_tensor([picture]))
    return images.tensor_to_pictures(base.decode_latents(latents))[0]

"""How well a picture follows the map that was asked for, by every measure that its kind of map has.

The picture's own map comes from the preprocessor that makes such maps; it is compared with the one that was
asked for. What each measure is stands in `MEASURES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit.metrics import depth_rmse, depth_rmse_255, edge_f1, iou, matches, ms_ssim, oks, ssim
from controlkit.metrics.pose_ap import Matches, person_area
from controlkit.metrics.similarity import MS_SSIM_LEAST, WINDOW
from controlkit.training.quality import colours_right, silhouette
from controlkit.training.reporting.measures import (
    DEPTH_KINDS,
    EDGE_KINDS,
    black_and_white,
    grey,
    joints_right,
    large_enough,
)

if TYPE_CHECKING:
    from controlkit.preprocessors import Map
    from controlkit.training.evaluation.held_out import Held

TOLERANCE = 2  # pixels
LINES = ("hed", "lineart", "lineart_anime", "lineart_standard", "pidinet", "softedge")
NO_LAYOUT = ("shuffle",)  # the map is a matter of chance: two of one picture differ
AP = "OKS-AP"


@dataclass(frozen=True)
class Measure:
    """A measure: what it is, in a sentence, whether less is better, and what to call the one that wins."""

    text: str
    lower: bool = False
    wins: str = "better"


MEASURES = {
    "edge F1": Measure("edges of the picture against the map's, up to 2 pixels out of place"),
    "strict edge F1": Measure("the same with no tolerance, as ControlNet++ reports it"),
    "line F1": Measure("lines brighter than half, up to 2 pixels out of place"),
    "map SSIM": Measure("structural similarity of both maps"),
    "map MS-SSIM": Measure("structural similarity of both maps over five scales"),
    "map error": Measure("mean absolute difference of both maps, of 1", lower=True),
    "depth RMSE": Measure("of both maps in grey levels, 0 to 255, as ControlNet++ reports it", lower=True),
    "depth error": Measure("RMSE after the best scale and shift, of 1", lower=True),
    "joints": Measure("PCK: share of the joints within a tenth of their person's size"),
    "OKS": Measure("COCO's similarity of joints, mean over those asked for; 0 for whoever is missing"),
    AP: Measure("COCO's average precision of people, OKS 0.50 to 0.95"),
    "silhouette IoU": Measure("overlap of the figure's pixels with its true mask"),
    "colours": Measure("share of the parts that have the colour their caption names"),
    "CLIP score": Measure("100 times the cosine of picture and caption"),
    "LPIPS between seeds": Measure(
        "perceptual distance of the pictures of one pair: diversity", wins="more diverse"
    ),
    "FID": Measure("Fréchet distance to the true pictures, clean-fid's resizing", lower=True),
    "KID": Measure("kernel distance to the true pictures, clean-fid's resizing", lower=True),
}


@dataclass(frozen=True, eq=False)
class MapScore:
    """What one picture got; {} where there is nothing to score. people: for poses."""

    values: dict[str, float]
    people: Matches | None = None


def principal(kind: str) -> str:
    """The measure that names a kind."""
    if kind in EDGE_KINDS:
        return "edge F1"
    if kind in DEPTH_KINDS:
        return "depth error"
    return "joints" if kind == "openpose" else "map SSIM"


def score_map(kind: str, found: Map, pair: Held, wanted_people: NDArray[Any] | None = None) -> MapScore:
    """Compare a picture's own map with the one that was asked for.

    wanted_people: for poses, the joints that were asked for, (P, 18, 3): see `people_of`.
    """
    if kind == "openpose":
        return _people(found, wanted_people)
    true = pair.maps[kind]
    if kind in DEPTH_KINDS:
        pred = grey(found.image) if found.depth is None else found.depth
        return MapScore(
            {
                "depth error": depth_rmse(pred, grey(true)),
                "depth RMSE": depth_rmse_255(255 * grey(found.image), 255 * grey(true)),
            }
        )
    if kind in EDGE_KINDS:
        edges, asked = black_and_white(found.image), black_and_white(true)
        return MapScore(
            {
                "edge F1": edge_f1(edges, asked, tolerance=TOLERANCE).f1,
                "strict edge F1": edge_f1(edges, asked, tolerance=0).f1,
                **_alike(grey(edges[..., None]), grey(asked[..., None])),
            }
        )
    a, b = grey(found.image), grey(true)
    values = {**_alike(a, b), "map error": float(np.abs(a - b).mean())}
    if kind in LINES:
        values["line F1"] = edge_f1((a > 0.5).astype(np.uint8), (b > 0.5).astype(np.uint8)).f1
    return MapScore(values)


def score_scene(picture: NDArray[np.uint8], pair: Held) -> dict[str, float]:
    """What a picture of the bundled world has beside its map: the figure's outline, the caption's colours."""
    if pair.scene is None:
        return {}
    right = colours_right(picture, pair.scene)
    return {
        "silhouette IoU": iou(silhouette(picture, pair.scene), pair.scene.masks["figure"]),
        "colours": float(np.mean(list(right.values()))),
    }


def people_of(pair: Held, found: Map | None) -> NDArray[Any] | None:
    """The people that are asked for and large enough: those the data knows, or those found in its picture."""
    if pair.joints is not None:
        return large_enough(pair.joints)
    return None if found is None or found.poses is None else large_enough(found.poses.people)


def _alike(a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    """Structural similarities, those for which the maps are large enough."""
    values = {}
    if min(a.shape) >= WINDOW:
        values["map SSIM"] = ssim(a, b)
    if min(a.shape) >= MS_SSIM_LEAST:
        values["map MS-SSIM"] = ms_ssim(a, b)
    return values


def _people(found: Map, wanted: NDArray[Any] | None) -> MapScore:
    assert found.poses is not None, found.kind
    people = np.asarray(found.poses.people)
    if wanted is None:  # nobody is asked for: whoever is found is one too many
        return MapScore({}, matches(people, np.zeros((0, 18, 3))))
    pairs = matches(people, wanted)
    return MapScore(
        {"joints": joints_right(people, wanted), "OKS": _mean_oks(people, wanted)},
        pairs,
    )


def _mean_oks(people: NDArray[Any], wanted: NDArray[Any]) -> float:
    """The mean over those asked for of the OKS of whoever is most like them, each found once at most."""
    likeness = np.array([[oks(pose, true, area=person_area(true)) for pose in people] for true in wanted])
    likeness = likeness.reshape(len(wanted), len(people))
    total = 0.0
    for _ in range(min(likeness.shape)):
        person, partner = np.unravel_index(np.argmax(likeness), likeness.shape)
        total += max(float(likeness[person, partner]), 0.0)
        likeness[person, :], likeness[:, partner] = -1, -1
    return total / len(wanted)

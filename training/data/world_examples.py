"""The bundled world as a data set: rendered pictures, their captions, and the maps that the world itself
knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit.training.data.examples import ArrayPiece, Example, Piece
from controlkit.training.world import World


@dataclass(frozen=True, eq=False)
class _Made(Piece):
    """A map that is computed when it is asked for."""

    name: str
    make: Callable[[], bytes | NDArray[Any]]

    def read(self) -> bytes | NDArray[Any]:
        return self.make()


def world_examples(world: World, kinds: Sequence[str], *, made: bool, title: str) -> list[Example]:
    """The scenes of a world: edges are made of the picture; poses are exact joints, depth is exact.

    ``made``: every map is to be made of its picture; of one kind, edges always are.
    """
    of_pictures = made or tuple(kinds) == ("canny",)
    return [
        Example(
            name=f"{title} scene {index}",
            picture=ArrayPiece(world.picture[index], f"{title} scene {index}"),
            caption=world.captions[index],
            maps=() if of_pictures else tuple(_exact(world, kind, index, title) for kind in kinds),
        )
        for index in range(len(world))
    ]


def _exact(world: World, kind: str, index: int, title: str) -> Piece:
    if kind != "openpose":
        return _Made(f"{kind} of {title} scene {index}", lambda: world.map(kind, index))
    return _Made(f"pose of {title} scene {index}", lambda: _pose_json(world, index))


def _pose_json(world: World, index: int) -> bytes:
    """The scene's joints as `--write_json` of OpenPose has them."""
    height, width = world.picture[index].shape[:2]
    joints = np.asarray(world.joints[index], dtype=np.float64).reshape(-1).tolist()
    people = [{"pose_keypoints_2d": joints}]
    return json.dumps({"canvas_width": width, "canvas_height": height, "people": people}).encode()

"""`controlkit draw`: from a pose's JSON to its map, changed on the way."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from controlkit import arguments, files, preprocessors
from controlkit.generate_controls import warn_if_black
from controlkit.preprocess_job import Beside, write_map

LARGEST_SIDE = 8192


@dataclass(frozen=True)
class Changes:
    """What is done to the poses, in this order."""

    mirror: bool = False
    drop: Sequence[str] = ()
    """Names of limbs."""
    drop_random: float = 0.0
    """The probability with which each limb of each person goes."""
    jitter: float = 0.0
    """Standard deviation in pixels of the canvas."""
    seed: int = 0


def parse_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT. Raises ValueError where it is not that, or a side is not from 1 to 8192."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip().lower())
    width, height = (int(side) for side in match.groups()) if match else (0, 0)
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        raise ValueError(f"the size {text!r} must be WIDTHxHEIGHT, each from 1 to {LARGEST_SIDE} pixels")
    return width, height


def draw(
    pose: str,
    *,
    output: str,
    size: str | None = None,
    canvas: str | None = None,
    style: str = "v1.1",
    changes: Changes | None = None,
    picture: int | None = None,
) -> list[Path]:
    """Draw the poses of a JSON file; returns the files written: the map, and the changed joints beside it.

    ``canvas`` is the size that the joints refer to, for files that do not say it; ``size`` is the map's;
    ``picture`` is the one of several in the file, counted from 1.
    Raises ValueError for a file that is no pose, a canvas too large for a map, an unknown limb or style, a
    number out of range, or an output that cannot be written or is the input.
    """
    changes = changes or Changes()
    (path,) = arguments.numbered_outputs(output, 1)
    joints = path.with_suffix(".json")
    is_beside = os.path.realpath(joints) == os.path.realpath(pose)  # pathlib raises for links in a circle
    if is_beside and (changes != Changes() or size):
        raise ValueError(f"the changed joints would overwrite {pose}: choose another -o")
    width, height = parse_size(canvas) if canvas else (None, None)
    read = preprocessors.read_poses(pose, width=width, height=height, picture=picture)
    poses = _changed(read, changes)
    map_width, map_height = parse_size(size) if size else (poses.width, poses.height)
    if max(map_width, map_height) > LARGEST_SIDE:
        raise ValueError(
            f"{pose} has a canvas of {poses.width} x {poses.height} pixels,"
            f" and a map at most {LARGEST_SIDE} on a side: give --size"
        )
    made = preprocessors.poses_to_map(poses, width=map_width, height=map_height, style=style)
    for file in (path, joints):
        files.check_writable(file)
    warn_if_black(made.image, "the openpose map")
    return write_map(path, replace(made, poses=None) if is_beside else made, Beside())


def _changed(poses: preprocessors.Poses, changes: Changes) -> preprocessors.Poses:
    import numpy as np

    if changes.seed < 0:
        raise ValueError(f"the seed must not be negative, not {changes.seed}")
    generator = np.random.default_rng(changes.seed)
    if changes.mirror:
        poses = preprocessors.mirror_poses(poses)
    poses = preprocessors.drop_limbs(poses, changes.drop)
    poses = preprocessors.drop_random_limbs(poses, generator, changes.drop_random)
    return preprocessors.jitter_poses(poses, generator, changes.jitter)

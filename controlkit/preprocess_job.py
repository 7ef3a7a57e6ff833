"""`controlkit preprocess`: from a picture's file to a map's file, and a pose's joints beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlkit import arguments, files, images, naming, preprocessors
from controlkit.generate_job import Report, warn_if_black


@dataclass(frozen=True, eq=False)
class Plan:
    """What `run` needs, checked; `picture` is uint8 (H, W, 3)."""

    kind: str
    picture: np.ndarray
    settings: dict[str, str]
    output: Path


def plan(kind: str, picture: str, settings: Sequence[str], *, output: str) -> Plan:
    """Check a request and read its picture.

    settings: the preprocessor's options as KEY=VALUE. Raises ValueError for an unknown kind, a picture that
    cannot be read, or an output that cannot be written or is the picture itself.
    """
    if kind not in preprocessors.names():
        raise naming.unknown("map", kind, preprocessors.names())
    options = arguments.parse_settings(settings)
    (path,) = arguments.numbered_outputs(output, 1)
    image = images.load_picture(picture)
    arguments.check_not_input(path, [Path(picture)])
    for written in (path, path.with_suffix(".json")) if kind == "openpose" else (path,):
        files.check_writable(written)
    return Plan(kind, image, options, path)


def run(job: Plan, report: Report) -> list[Path]:
    """Extract the map and write it; returns the files written: the map and, for poses, their JSON."""
    report.status(f"loading the {job.kind} preprocessor")
    extract = preprocessors.get(job.kind, **job.settings)
    result = extract(job.picture)
    warn_if_black(result.image, f"the {job.kind} map")
    images.write_png(job.output, result.image)
    if result.poses is None:
        return [job.output]
    joints = job.output.with_suffix(".json")
    preprocessors.write_poses(joints, result.poses)
    return [job.output, joints]

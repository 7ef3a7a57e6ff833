"""Poses as JSON in OpenPose's format, which pose editors read and write: people[].pose_keypoints_2d."""

import json
import math
from typing import Any

import numpy as np

from controlkit.files import PathLike, write_json
from controlkit.preprocessors.skeleton import Poses


def poses_to_json(poses: Poses) -> dict[str, Any]:
    """Return poses as a JSON object: per person 54 numbers x, y, score, and the canvas's size in pixels."""
    return {
        "people": [{"pose_keypoints_2d": person.ravel().tolist()} for person in poses.people],
        "canvas_width": poses.width,
        "canvas_height": poses.height,
    }


def poses_from_json(obj: Any, *, name: str = "the pose JSON") -> Poses:
    """Return the poses of a JSON object in OpenPose's format, or of a list with one such object.

    Coordinates are in pixels of the canvas; hands and faces are ignored.

    Raises:
        ValueError: one line with ``name``: a key is missing, a person has not 18 joints, a number is none.
    """
    if isinstance(obj, list) and len(obj) == 1:
        obj = obj[0]
    if not isinstance(obj, dict) or not isinstance(obj.get("people"), list):
        raise ValueError(f"{name} is not in OpenPose's format: an object with a list 'people' is wanted")
    people = [_person(person, f"{name}, people[{i}]") for i, person in enumerate(obj["people"])]
    return Poses(
        np.array(people, dtype=np.float64).reshape(len(people), 18, 3),
        _size(obj, "canvas_width", name),
        _size(obj, "canvas_height", name),
    )


def write_poses(path: PathLike, poses: Poses) -> None:
    """Write poses as a JSON file in OpenPose's format, atomically.

    Raises:
        ValueError: as :func:`controlkit.files.write_bytes`.
    """
    write_json(path, poses_to_json(poses))


def read_poses(path: PathLike) -> Poses:
    """Read poses from a JSON file in OpenPose's format.

    Raises:
        ValueError: one line with the file's name: it cannot be read, is not JSON, or not in that format.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            obj = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    return poses_from_json(obj, name=str(path))


def _person(person: Any, name: str) -> list[float]:
    numbers = person.get("pose_keypoints_2d") if isinstance(person, dict) else None
    if not isinstance(numbers, list):
        raise ValueError(f"{name} has no list 'pose_keypoints_2d'")
    if len(numbers) != 54:
        joints = len(numbers) / 3
        raise ValueError(f"{name} has {joints:g} joints; OpenPose's 18-joint format is read (54 numbers)")
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        raise ValueError(f"{name} has an entry in 'pose_keypoints_2d' that is not a finite number")
    return numbers


def _size(obj: dict[str, Any], key: str, name: str) -> int:
    value = obj.get(key)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} has no {key} (a whole number of pixels)")
    return value

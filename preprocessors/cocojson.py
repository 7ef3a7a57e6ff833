"""Poses as JSON in COCO's formats, turned into OpenPose's: keypoints of 17 joints, or 133 of COCO-WholeBody.

Annotations and results of COCO keep the people of many pictures in one file, `keypoints` being x, y and
either a visibility (0, 1 or 2) or a score. MMPose and Sapiens write a file for each picture or video, x and y
apart from the scores (`keypoint_scores`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from controlkit.preprocessors.skeleton import LEAST_SCORE, coco17_to_openpose18, coco133_to_openpose

_BEHIND_BODY = {"foot_kpts": 6, "face_kpts": 68, "lefthand_kpts": 21, "righthand_kpts": 21}
"""The points of a person beside the body's, as COCO-WholeBody's annotations name and order them."""


def pictures_of(obj: Any) -> list[dict[str, Any]] | None:
    """The people (see `as_openpose`) of each picture of a JSON object in one of COCO's formats, with its
    canvas where the file knows that; None for other objects.
    """
    if isinstance(obj, dict) and isinstance(obj.get("annotations"), list):
        listed = obj.get("images")
        images = [image for image in listed if isinstance(image, dict)] if isinstance(listed, list) else []
        sizes = {repr(image.get("id")): _size_of(image) for image in images}
        shown = [one for one in obj["annotations"] if _has_joints(one) and any(one["keypoints"])]
        return [{"people": here, **sizes.get(key, {})} for key, here in _by_picture(shown, sizes).items()]
    people = obj.get("instance_info") if isinstance(obj, dict) else obj
    if not isinstance(people, list) or not people:
        return None
    if all(isinstance(frame, dict) and isinstance(frame.get("instances"), list) for frame in people):
        return [{"people": frame["instances"]} for frame in people]  # of a video
    if not all(map(_has_joints, people)):
        return None
    return [{"people": here} for here in _by_picture(people).values()]


def as_openpose(person: Any, where: str) -> Any:
    """A person of COCO's formats as OpenPose's has it; another one as it is.

    A score below `LEAST_SCORE` means that the joint is absent, as where a network is asked; a visibility of 1
    (hidden, but its place is known) counts as seen. Raises ValueError, one line with ``where``, for another
    number of joints than 17 or 133, or what is no finite number.
    """
    if not _has_joints(person):
        return person
    points = _joints(person["keypoints"], person.get("keypoint_scores"), where)
    if len(points) == 17 and any(person.get(part) for part in _BEHIND_BODY):
        more = [_joints(person.get(part) or [0] * 3 * n, None, where) for part, n in _BEHIND_BODY.items()]
        points = np.concatenate([points, *more])
    if len(points) == 17:
        return {"pose_keypoints_2d": coco17_to_openpose18(points).ravel().tolist()}
    if len(points) != 133:
        raise ValueError(
            f"{where} has {len(points)} joints in 'keypoints'; 17 (COCO) and 133 (COCO-WholeBody) are read"
        )
    body, hands, face = coco133_to_openpose(points)
    parts = {"pose": body, "hand_left": hands[0], "hand_right": hands[1], "face": face}
    return {f"{part}_keypoints_2d": found.ravel().tolist() for part, found in parts.items()}


def _has_joints(person: Any) -> bool:
    return isinstance(person, dict) and isinstance(person.get("keypoints"), list)


def _by_picture(people: Iterable[dict[str, Any]], pictures: Iterable[str] = ()) -> dict[str, list[Any]]:
    """The people by the pictures' `image_id`: all of one picture where there is none."""
    found: dict[str, list[Any]] = {picture: [] for picture in pictures}
    for person in people:
        found.setdefault(repr(person.get("image_id")), []).append(person)
    return found


def _size_of(image: dict[str, Any]) -> dict[str, Any]:
    sides = {"canvas_width": image.get("width"), "canvas_height": image.get("height")}
    return {side: value for side, value in sides.items() if value is not None}


def _joints(numbers: list[Any], scores: Any, where: str) -> np.ndarray:
    """Points (K, 3) of x, y and a score, zeros where a joint is absent."""
    try:
        points = np.array(numbers, dtype=np.float64)
        points = points.reshape(-1, 3) if points.ndim == 1 else points
        points = points if scores is None else np.column_stack([points[:, :2], np.array(scores, np.float64)])
        if points.shape[1:] == (2,):  # no scores: what was not found lies at 0, 0
            points = np.column_stack([points, points.any(axis=1)])
        if points.shape[1:] != (3,):
            raise ValueError
    except (TypeError, ValueError, IndexError, OverflowError):
        raise ValueError(f"{where} is not x, y and a score for each joint") from None
    if not np.isfinite(points).all():
        raise ValueError(f"{where} has a number that is not finite")
    told = points[:, 2:]
    least = 1 if (told == np.floor(told)).all() else LEAST_SCORE  # a visibility, or a score
    return np.where(told >= least, np.minimum(points, [np.inf, np.inf, 1]), 0.0)

"""Poses as JSON in OpenPose's format, which pose editors read and write, and read in COCO's, too."""

import json
import math
from typing import Any

import numpy as np

from controlkit.files import PathLike, write_json
from controlkit.preprocessors.cocojson import as_openpose, pictures_of
from controlkit.preprocessors.skeleton import Poses

_BODY, _FACE = "pose_keypoints_2d", "face_keypoints_2d"
_HANDS = ("hand_left_keypoints_2d", "hand_right_keypoints_2d")
# BODY_25 has the middle of the hips after the wrists, and the feet at its end.
_BODY_25 = (*range(8), *range(9, 19))
_FARTHEST = 2  # canvases from its corner that a joint may be; people of fewer pixels there are none
_MANY = 3  # joints of a person, and a quarter of them
_PUPILS = (14, 15)
_NOWHERE = -1  # pixel: where A1111's OpenPose says that points of hands and faces are that it did not find


def poses_to_json(poses: Poses) -> dict[str, Any]:
    """Return poses as a JSON object: per person 54 numbers x, y, score, and the canvas's size in pixels.

    Hands (63 numbers each) and faces (210) are written where there are any.
    """
    people = []
    for body, hands, face in zip(poses.people, poses.hands, poses.faces, strict=True):
        parts = {_BODY: body, _HANDS[0]: hands[0], _HANDS[1]: hands[1], _FACE: face}
        people.append(
            {key: points.ravel().tolist() for key, points in parts.items() if key == _BODY or points.any()}
        )
    return {"people": people, "canvas_width": poses.width, "canvas_height": poses.height}


def poses_from_json(
    obj: Any,
    *,
    name: str = "the pose JSON",
    width: int | None = None,
    height: int | None = None,
    picture: int | None = None,
) -> Poses:
    """Return the poses of a JSON object in OpenPose's format, or of one of a list of such objects, or of a
    picture in one of COCO's formats (see `cocojson.pictures_of`), or as A1111's OpenPose editor saves them.

    Read are bodies of 18 joints and of 25 (BODY_25, what OpenPose itself writes; its middle hip and feet are
    dropped), hands of 21 points and faces of 70 or 68; null, an empty list or no key means that a part is
    absent. Coordinates are in pixels of the canvas; where all of a file lie in [-2, 2], and not all are
    whole, they are fractions of it (a joint may lie outside); where all lie in [-1, 1] and many of a person's
    are negative, they are what OpenPose writes with ``--keypoint_scale 4``. Points of hands and faces a pixel
    before the canvas are those that A1111 and ComfyUI did not find. ``width`` and ``height`` say how
    large the canvas is where the JSON does not (OpenPose's does not). ``picture`` says which of a list,
    counted from 1, is meant.

    Raises:
        ValueError: one line with ``name``: a key is missing, a part has another number of points, a number is
            none, the size is not known, or there are several pictures and it is not said which is meant.
    """
    obj = _one_picture(obj, picture, name)
    bodies, hands, faces = [], [], []
    for i, person in enumerate(obj["people"]):
        where = f"{name}, people[{i}]"
        person = as_openpose(person, where)
        if not isinstance(person, dict) or not isinstance(person.get(_BODY, 0), (list, type(None))):
            raise ValueError(f"{where} has no list '{_BODY}'")
        bodies.append(_body(person, where))
        hands.append([_points(person, key, (21,), where) for key in _HANDS])
        faces.append(_face(person, bodies[-1], where))
    count = len(bodies)
    parts = (
        np.array(bodies).reshape(count, 18, 3),
        np.array(hands).reshape(count, 2, 21, 3),
        np.array(faces).reshape(count, 70, 3),
    )
    wide = _size(obj, "canvas_width", width, name)
    high = _size(obj, "canvas_height", height, name)
    are_fractions = _are_fractions(parts)
    side = np.array([wide, high]) if are_fractions else np.ones(2)
    parts = parts[0], _found(parts[1], side), _found(parts[2], side)
    if are_fractions:
        is_centred = _are_centred(parts)
        parts = tuple(_on_canvas(points, wide, high, is_centred) for points in parts)  # type: ignore[assignment]
    return Poses(parts[0], wide, high, hands=parts[1], faces=parts[2])


def write_poses(path: PathLike, poses: Poses) -> None:
    """Write poses as a JSON file in OpenPose's format, atomically.

    Raises:
        ValueError: as :func:`controlkit.files.write_bytes`.
    """
    write_json(path, poses_to_json(poses))


def read_poses(
    path: PathLike, *, width: int | None = None, height: int | None = None, picture: int | None = None
) -> Poses:
    """Read poses from a JSON file in OpenPose's format or COCO's, whoever wrote it; see
    :func:`poses_from_json`.

    Raises:
        ValueError: one line with the file's name: it cannot be read, is not JSON, or in neither format.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            obj = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    return poses_from_json(obj, name=str(path), width=width, height=height, picture=picture)


def _one_picture(obj: Any, picture: int | None, name: str) -> dict[str, Any]:
    """Return the object that holds the people of one picture."""
    objects = pictures_of(obj) or _of_editor(obj) or (obj if isinstance(obj, list) else [obj])
    first = objects[0] if objects else None
    if not isinstance(first, dict) or not isinstance(first.get("people"), list):
        raise ValueError(
            f"{name} is not in OpenPose's format, nor in COCO's: an object with a list 'people' is wanted, or"
            " a list of people with 'keypoints'"
        )
    count = len(objects)
    if picture is None and count > 1:
        raise ValueError(
            f"{name} holds {count} pictures; one is wanted: say which, 1 to {count}, as picture, of the"
            " command line as --picture"
        )
    if picture is not None and not 1 <= picture <= count:
        raise ValueError(f"{name} holds {count} picture{'s' * (count > 1)}, and no number {picture}")
    found = objects[(picture or 1) - 1]
    if not isinstance(found, dict) or not isinstance(found.get("people"), list):
        raise ValueError(f"{name}, picture {picture}, has no list 'people'")
    return found


def _of_editor(obj: Any) -> list[dict[str, Any]] | None:
    """What A1111's OpenPose editor saves: the canvas, and x and y of the 18 joints of each person in turn."""
    points = obj.get("keypoints") if isinstance(obj, dict) else None
    if not isinstance(points, list) or len(points) % 18 or not points:
        return None
    if not all(isinstance(point, list) and len(point) == 2 for point in points):
        return None
    people = [points[k : k + 18] for k in range(0, len(points), 18)]
    bodies = [{_BODY: [number for x, y in person for number in (x, y, 1)]} for person in people]
    return [{"people": bodies, "canvas_width": obj.get("width"), "canvas_height": obj.get("height")}]


def _body(person: dict[str, Any], where: str) -> np.ndarray:
    points = _points(person, _BODY, (18, 25), where)
    return points if len(points) == 18 else points[list(_BODY_25)]


def _face(person: dict[str, Any], body: np.ndarray, where: str) -> np.ndarray:
    points = _points(person, _FACE, (70, 68), where)
    return points if len(points) == 70 else np.concatenate([points, body[list(_PUPILS)]])


def _points(person: dict[str, Any], key: str, counts: tuple[int, ...], where: str) -> np.ndarray:
    """Return a part's points, float64 (n, 3), or zeros of the first count where it is absent."""
    numbers = person.get(key)
    if numbers is None or numbers == []:
        return np.zeros((counts[0], 3))
    if not isinstance(numbers, list):
        raise ValueError(f"{where} has no list '{key}'")
    if len(numbers) not in [3 * count for count in counts]:
        wanted = " or ".join(f"{count} ({3 * count} numbers)" for count in counts)
        what = "joints" if key == _BODY else "points"
        raise ValueError(f"{where} has {len(numbers) / 3:g} {what} in '{key}'; {wanted} are read")
    if not all(_is_number(x) for x in numbers):
        raise ValueError(f"{where} has an entry in '{key}' that is not a finite number")
    return np.array(numbers, dtype=np.float64).reshape(-1, 3)


def _is_number(x: Any) -> bool:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    try:
        return math.isfinite(x)
    except OverflowError:  # an integer beyond float64
        return False


def _are_fractions(parts: tuple[np.ndarray, ...]) -> bool:
    """Whether coordinates are shares of the canvas: some of a person may lie outside of it, and nobody is so
    small in pixels.
    """
    points = np.concatenate([part.reshape(-1, 3) for part in parts])
    xy = points[points[:, 2] > 0, :2]
    return bool((np.abs(xy) <= _FARTHEST).all() and (xy != np.floor(xy)).any())


def _found(points: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Points of hands or faces, (..., 3), without those that A1111 and ComfyUI keep as not found.

    They stand a pixel before the canvas, in either coordinate, with a score of 1. side: of the canvas (x, y)
    in the unit of the coordinates.
    """
    is_nowhere = np.isclose(points[..., :2] * side, _NOWHERE, rtol=0, atol=1e-4).any(axis=-1)
    return np.where(is_nowhere[..., None], 0.0, points)


def _are_centred(parts: tuple[np.ndarray, ...]) -> bool:
    """Whether fractions count from -1 to 1: of somebody many joints are negative, not one or two outside."""
    found = []
    for person in zip(*parts, strict=True):
        points = np.concatenate([part.reshape(-1, 3) for part in person])
        found.append(points[points[:, 2] > 0, :2])
    negative = [int(np.count_nonzero((xy < 0).any(axis=1))) for xy in found]
    many = [count >= max(_MANY, len(xy) / 4) for count, xy in zip(negative, found, strict=True)]
    return any(many) and all(bool((np.abs(xy) <= 1).all()) for xy in found)


def _on_canvas(points: np.ndarray, width: int, height: int, is_centred: bool) -> np.ndarray:
    """Fractions of the canvas, (..., 3), as pixels; points that are absent stay 0."""
    if not is_centred:
        return points * [width, height, 1]
    placed = (points + np.array([1, 1, 0])) * [width / 2, height / 2, 1]
    return np.where(points[..., 2:] > 0, placed, 0.0)


def _size(obj: dict[str, Any], key: str, given: int | None, name: str) -> int:
    value = obj.get(key)
    if value is None and given is not None:
        value = given
    if value is None or not _is_number(value) or value < 1 or value != int(value):
        side = key.removeprefix("canvas_")
        raise ValueError(
            f"{name} has no {key} (a whole number of pixels); it can be given: as {side}, of the command line"
            " as --canvas WxH"
        )
    return int(value)

"""Changing poses: to another canvas, mirrored, moved, jittered, without some limbs or people, cropped.

Every function returns new :class:`Poses`; hands and faces go with their bodies. Absent points stay absent.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from controlkit.limits import is_whole
from controlkit.naming import kind_of_value, unknown
from controlkit.preprocessors.skeleton import BODY_MIRROR, FACE_MIRROR, Poses, check_canvas

_HEAD = (0, 14, 15, 16, 17)
_WRISTS = {0: 7, 1: 4}  # of the left and right hand
_NOSE = 0

# Name: joints of the body, hands (0 left, 1 right), and whether the face goes, too.
_PARTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "head": (_HEAD, (), True),
    "face": ((), (), True),
    "left-arm": ((6, 7), (0,), False),
    "right-arm": ((3, 4), (1,), False),
    "left-forearm": ((7,), (0,), False),
    "right-forearm": ((4,), (1,), False),
    "left-hand": ((), (0,), False),
    "right-hand": ((), (1,), False),
    "left-leg": ((12, 13), (), False),
    "right-leg": ((9, 10), (), False),
    "left-shin": ((13,), (), False),
    "right-shin": ((10,), (), False),
}
LIMB_NAMES = tuple(_PARTS)
"""What :func:`drop_limbs` knows. An arm is all below its shoulder, a leg all below its hip."""
_RANDOM = ("head", "left-arm", "right-arm", "left-leg", "right-leg")

_Change = Callable[[np.ndarray], np.ndarray]


def scale_poses(poses: Poses, width: int, height: int, *, keep_aspect: bool = False) -> Poses:
    """Return poses on a canvas of another size.

    They are stretched with it, or, with ``keep_aspect``, made as large as fits and put in the middle.

    Raises:
        ValueError: a side that is not at least 1 pixel.
    """
    check_canvas(width, height)
    if (width, height) == (poses.width, poses.height):
        return poses
    scale = np.array([width / poses.width, height / poses.height])
    if keep_aspect:
        scale[:] = scale.min()
    shift = (np.array([width, height]) - scale * [poses.width, poses.height]) / 2
    moved = _changed(poses, lambda xy: xy * scale + shift)
    return replace(moved, width=width, height=height)


def mirror_poses(poses: Poses) -> Poses:
    """Return poses as a mirror shows them: left and right change places in the picture and in the people.

    A whole x means pixel x and becomes ``width - 1 - x``; any other is a place and becomes ``width - x``. So
    every joint is drawn in the mirrored pixel.
    """

    def mirrored(xy: np.ndarray) -> np.ndarray:
        is_whole = xy[..., 0] == np.floor(xy[..., 0])
        return np.stack([poses.width - is_whole - xy[..., 0], xy[..., 1]], axis=-1)

    flipped = _changed(poses, mirrored)
    return replace(
        flipped,
        people=flipped.people[:, BODY_MIRROR],
        hands=flipped.hands[:, ::-1].copy(),
        faces=flipped.faces[:, FACE_MIRROR],
    )


def move_person(poses: Poses, person: int, *, dx: float = 0.0, dy: float = 0.0, scale: float = 1.0) -> Poses:
    """Return poses with one person moved by ``dx``, ``dy`` pixels and scaled about the middle of its joints.

    Raises:
        ValueError: there is no such person, or a number is not finite or the scale not positive.
    """
    _known_people(poses, [person])
    if not (np.isfinite([dx, dy, scale]).all() and scale > 0):
        raise ValueError(f"a person cannot be moved by ({dx:g}, {dy:g}) and scaled by {scale:g}")
    one = keep_people(poses, [person])
    points = _visible_points(one)
    if not len(points):
        return poses
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    moved = _changed(one, lambda xy: (xy - middle) * scale + middle + [dx, dy])
    people, hands, faces = poses.people.copy(), poses.hands.copy(), poses.faces.copy()
    people[person], hands[person], faces[person] = moved.people[0], moved.hands[0], moved.faces[0]
    return replace(poses, people=people, hands=hands, faces=faces)


def jitter_poses(poses: Poses, generator: np.random.Generator, sd: float) -> Poses:
    """Return poses with every joint moved by Gaussian noise of standard deviation ``sd`` pixels.

    A hand moves as a whole with its wrist, a face with the nose.

    Raises:
        ValueError: ``sd`` is negative or not finite.
    """
    if not (np.isfinite(sd) and sd >= 0):
        raise ValueError(f"the jitter is {sd:g} pixels; it must be 0 or more")
    noise = generator.normal(0.0, sd, (len(poses.people), 18, 2))
    people, hands, faces = poses.people.copy(), poses.hands.copy(), poses.faces.copy()
    people[..., :2] += noise * (people[..., 2:] > 0)
    for hand, wrist in _WRISTS.items():
        hands[:, hand, :, :2] += noise[:, wrist, None] * (hands[:, hand, :, 2:] > 0)
    faces[..., :2] += noise[:, _NOSE, None] * (faces[..., 2:] > 0)
    return replace(poses, people=people, hands=hands, faces=faces)


def drop_limbs(poses: Poses, names: Iterable[str], *, people: Iterable[int] | None = None) -> Poses:
    """Return poses without some parts, each one of ``LIMB_NAMES``, of all people or of those numbered.

    Raises:
        ValueError: an unknown part (with a suggestion), or a person that there is not.
    """
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        if name not in _PARTS:
            raise unknown("limb", name, _PARTS)
    indices = _known_people(poses, range(len(poses.people)) if people is None else people)
    return _without(poses, [(index, name) for index in indices for name in wanted])


def drop_random_limbs(poses: Poses, generator: np.random.Generator, probability: float) -> Poses:
    """Return poses in which each person's head, arms and legs are dropped, each with a probability.

    Raises:
        ValueError: the probability lies outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"limbs are dropped with a probability from 0 to 1, not {probability:g}")
    dropped = generator.uniform(size=(len(poses.people), len(_RANDOM))) < probability
    return _without(poses, [(int(index), _RANDOM[part]) for index, part in np.argwhere(dropped)])


def keep_people(poses: Poses, people: Iterable[int]) -> Poses:
    """Return some of the people, in the order given. Raises ValueError: there is no such person."""
    kept = np.array(_known_people(poses, people), dtype=np.int64)
    return replace(poses, people=poses.people[kept], hands=poses.hands[kept], faces=poses.faces[kept])


def drop_people(poses: Poses, people: Iterable[int]) -> Poses:
    """Return the other people. Raises ValueError: there is no such person."""
    dropped = _known_people(poses, people)
    return keep_people(poses, [i for i in range(len(poses.people)) if i not in dropped])


def crop_poses(
    poses: Poses, left: int, top: int, width: int, height: int, *, keep_outside: bool = False
) -> Poses:
    """Return poses on a part of their canvas, which may reach beyond it.

    Points outside become absent, as if the picture had been cropped first, and so do people without any; with
    ``keep_outside`` all stay, so that limbs run out of the picture.

    Raises:
        ValueError: a side that is not at least 1 pixel.
    """
    check_canvas(width, height)
    moved = replace(_changed(poses, lambda xy: xy - [left, top]), width=width, height=height)
    if keep_outside:
        return moved
    people, hands, faces = (points.copy() for points in (moved.people, moved.hands, moved.faces))
    for points in (people, hands, faces):
        xy = points[..., :2]
        points[~((xy >= 0) & (xy < [width, height])).all(axis=-1)] = 0.0
    cropped = replace(moved, people=people, hands=hands, faces=faces)
    seen = [i for i in range(len(people)) if len(_visible_points(keep_people(cropped, [i])))]
    return keep_people(cropped, seen)


def _changed(poses: Poses, change: _Change) -> Poses:
    """Return poses with a function applied to all coordinates (..., 2); absent points stay as they are."""

    def changed(points: np.ndarray) -> np.ndarray:
        xy = np.where(points[..., 2:] > 0, change(points[..., :2]), points[..., :2])
        return np.concatenate([xy, points[..., 2:]], axis=-1)

    return replace(
        poses, people=changed(poses.people), hands=changed(poses.hands), faces=changed(poses.faces)
    )


def _without(poses: Poses, dropped: Iterable[tuple[int, str]]) -> Poses:
    people, hands, faces = poses.people.copy(), poses.hands.copy(), poses.faces.copy()
    for index, name in dropped:
        joints, sides, face = _PARTS[name]
        people[index, list(joints)] = 0.0
        hands[index, list(sides)] = 0.0
        if face:
            faces[index] = 0.0
    return replace(poses, people=people, hands=hands, faces=faces)


def _visible_points(poses: Poses) -> np.ndarray:
    """Return the coordinates of all visible points, (n, 2)."""
    points = np.concatenate([part.reshape(-1, 3) for part in (poses.people, poses.hands, poses.faces)])
    return np.asarray(points[points[:, 2] > 0, :2])


def _known_people(poses: Poses, people: Iterable[int]) -> list[int]:
    """The numbers of people, read once. Raises ValueError unless there is each."""
    if not isinstance(people, Iterable):
        raise ValueError(f"people is a list of numbers, as [0], not {kind_of_value(people)}")
    count, numbers = len(poses.people), list(people)
    for index in numbers:
        if not is_whole(index) or not 0 <= index < count:
            raise ValueError(f"there is no person {index}: the poses have {count}, counted from 0")
    return numbers

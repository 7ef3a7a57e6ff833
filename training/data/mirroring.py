"""What a mirror does to maps whose colours say left and right: normals, and drawings of poses."""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from controlkit.preprocessors.skeleton import BODY_MIRROR, COLOURS, LIMBS

_LIMB_LEVEL = 0.6  # of a joint's colour, in ControlNet 1.1's drawings
_WHITE = 0xFFFFFF  # faces
_LARGEST_JOINT = 13  # pixels; joints are discs of 9
_LEFT_HIP, _LEFT_KNEE, _LEFT_ANKLE = 11, 12, 13


def mirrored_normals(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Normals, uint8 (H, W, 3), whose pixels are to be mirrored: red, which says left, becomes 255 - red.

    Black and white pixels, which no surface has, are the holes of a map and stay.
    """
    channels = list(cv2.split(image))
    low = cv2.min(cv2.min(channels[0], channels[1]), channels[2])
    high = cv2.max(cv2.max(channels[0], channels[1]), channels[2])
    channels[0] = np.where((high == 0) | (low == 255), channels[0], cv2.bitwise_not(channels[0]))
    return cv2.merge(channels).astype(np.uint8, copy=False)


def mirrored_drawing(image: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """A drawing of poses, uint8 (H, W, 3), whose pixels are to be mirrored: left and right change colours.

    Bodies in ControlNet 1.1's colours and the white points of faces are known. Joints become what drawing the
    mirrored joints gives; limbs become so up to their outlines, and where two cross, the same one stays on
    top.

    Raises:
        ValueError: one line with ``name``: there are other colours, of hands, of other drawings, or made by
            JPEG or smooth resizing; or there are points of hands, which are blue as left knees are.
    """
    red, green, blue = (channel.astype(np.int32) for channel in cv2.split(image))
    codes = red << 16 | green << 8 | blue
    is_painted = codes != 0
    painted = codes[is_painted]
    known, partner = _partners()
    places = np.minimum(np.searchsorted(known, painted), len(known) - 1)
    if not np.array_equal(known[places], painted) or _has_hands(codes):
        raise ValueError(
            f"{name} cannot be mirrored: it has more than OpenPose's bodies in their exact colours (hands,"
            " JPEG, another style?), so left and right cannot be exchanged; train on the joints"
            " (data.map_column=openpose_json), or with data.flip=0"
        )
    codes[is_painted] = partner[places]
    return np.dstack([(codes >> shift & 255).astype(np.uint8) for shift in (16, 8, 0)])


def _has_hands(codes: NDArray[np.int32]) -> bool:
    """Whether there is blue that is larger than a joint and touches no left leg.

    It is of hands so small that their points cover their lines, which have colours of their own.
    """
    blue = (codes == _code(COLOURS[_LEFT_KNEE])).astype(np.uint8)
    if not blue.any():
        return False
    leg = [_code(COLOURS[joint]) for joint in (_LEFT_HIP, _LEFT_ANKLE)]
    leg += [_code(_dim(COLOURS[k])) for k, limb in enumerate(LIMBS) if _LEFT_KNEE in limb]
    is_leg = np.logical_or.reduce([codes == code for code in leg])
    beside = cv2.dilate(is_leg.astype(np.uint8), np.ones((3, 3), np.uint8))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(blue)
    is_large = stats[:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].max(axis=1) > _LARGEST_JOINT
    is_large[[0, *np.unique(labels[(blue & beside) > 0])]] = False
    return bool(is_large.any())


@cache
def _partners() -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The colours of drawn bodies as 0xRRGGBB, sorted, and what each becomes in a mirror."""
    limbs = [frozenset(limb) for limb in LIMBS]
    mirrored_limbs = [limbs.index(frozenset(BODY_MIRROR[joint] for joint in limb)) for limb in limbs]
    partner = {_WHITE: _WHITE}
    partner |= {_code(COLOURS[joint]): _code(COLOURS[other]) for joint, other in enumerate(BODY_MIRROR)}
    dim = [_code(_dim(colour)) for colour in COLOURS]
    partner |= {dim[limb]: dim[other] for limb, other in enumerate(mirrored_limbs)}
    known = sorted(partner)
    return np.array(known, np.int32), np.array([partner[code] for code in known], np.int32)


def _dim(colour: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(level * _LIMB_LEVEL) for level in colour)


def _code(colour: tuple[int, ...]) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]

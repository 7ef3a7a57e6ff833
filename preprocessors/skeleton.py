"""OpenPose's 18 joints: their order, limbs and colours, and how COCO's keypoints become them.

A pose is a float array (18, 3): x and y in pixels, where pixel i spans i to i + 1, and a score, where 0
means that the joint is absent. The order: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow,
wrist, right hip, knee, ankle, left hip, knee, ankle, right eye, left eye, right ear, left ear; right is the
person's right. (CMU-Perceptual-Computing-Lab/openpose, "COCO" output format.)

A hand is (21, 3): the wrist, then four points from root to tip of the thumb, the index, middle, ring and
little finger. A face is (70, 3): the jaw (0 to 16) and brows (17 to 26) from the person's right to left, the
nose (27 to 35), the right and left eye (36 to 47), the mouth (48 to 67), the right and left pupil.
"""

import colorsys
from dataclasses import dataclass, field

import numpy as np

from controlkit.limits import is_whole

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""The 17 drawn limbs as pairs of joint indices, in drawing order."""

COLOURS = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0),
    (0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255),
    (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""RGB of joint i, and of limb i."""

HAND_EDGES = tuple((k - 1 if k % 4 != 1 else 0, k) for k in range(1, 21))
"""The 20 drawn lines of a hand as pairs of point indices, in drawing order: five fingers from the wrist."""

HAND_COLOURS = tuple(tuple(255 * level for level in colorsys.hsv_to_rgb(i / 20, 1, 1)) for i in range(20))
"""RGB of line i, not rounded: the colour wheel in 20 steps."""

BODY_MIRROR = (0, 1, 5, 6, 7, 2, 3, 4, 11, 12, 13, 8, 9, 10, 15, 14, 17, 16)
"""Which joint each joint is in a mirror."""

FACE_MIRROR = (
    *range(16, -1, -1), *range(26, 16, -1), *range(27, 31), *range(35, 30, -1),
    45, 44, 43, 42, 47, 46, 39, 38, 37, 36, 41, 40,
    *range(54, 47, -1), *range(59, 54, -1), *range(64, 59, -1), *range(67, 64, -1), 69, 68,
)  # fmt: skip
"""Which point of a face each point is in a mirror."""

LEAST_SCORE = 0.3
"""Keypoints of COCO's that score less are absent, unless another threshold is asked for."""

# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right.
_COCO_OF_JOINT = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6
# COCO-WholeBody's 133 (Jin et al. 2020): body, 6 points of the feet, face, left hand, right hand.
_BODY, _FACE, _LEFT_HAND, _RIGHT_HAND = slice(17), slice(23, 91), slice(91, 112), slice(112, 133)
_RIGHT_EYE, _LEFT_EYE = 14, 15


@dataclass(frozen=True, eq=False)
class Poses:
    """The people of one picture of ``width`` x ``height`` pixels."""

    people: np.ndarray
    """float64 (N, 18, 3); N may be 0."""
    width: int
    height: int
    hands: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 (N, 2, 21, 3), left and right; zeros where absent, and where nothing is passed."""
    faces: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """float64 (N, 70, 3); zeros where absent, and where nothing is passed."""

    def __post_init__(self) -> None:
        """Fill in absent parts. Raises ValueError for another shape, or a canvas without a pixel."""
        check_canvas(self.width, self.height)
        count = len(self.people)
        for name, each in (("people", (18, 3)), ("hands", (2, 21, 3)), ("faces", (70, 3))):
            points = np.asarray(getattr(self, name), dtype=np.float64)
            points = np.zeros((count, *each)) if points.size == 0 else points
            if points.shape != (count, *each):
                raise ValueError(f"poses of {count} people have {name} {(count, *each)}, not {points.shape}")
            object.__setattr__(self, name, points)


def check_canvas(width: int, height: int) -> None:
    """Raise ValueError unless both sides are whole numbers from 1."""
    if not (is_whole(width) and is_whole(height) and width >= 1 and height >= 1):
        raise ValueError(
            f"a canvas of {width} x {height} pixels has no room for poses; give whole ones, at least 1 x 1"
        )


def points_of(what: str, points: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return points, also those of lists, as an array. Raises ValueError for another shape, by their name."""
    found = np.asarray(points)
    if found.shape != shape or found.dtype.kind not in "biuf":
        raise ValueError(f"{what} are {shape} numbers: x, y, score; not {found.dtype} {found.shape}")
    return found


def coco17_to_openpose18(keypoints: np.ndarray) -> np.ndarray:
    """Return COCO keypoints (17, 3) of x, y, score as a pose (18, 3), float64.

    The neck, which COCO lacks, is the middle of the shoulders with the lower of their scores, and only if
    both are visible (controlnet_aux and DWPose do the same). Absent joints are rows of zeros.

    Raises:
        ValueError: another shape.
    """
    keypoints = points_of("COCO keypoints", keypoints, (17, 3))
    shoulders = keypoints[[_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    neck = np.array([*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()])
    pose = np.array([neck if k is None else keypoints[k] for k in _COCO_OF_JOINT], dtype=np.float64)
    pose[pose[:, 2] <= 0] = 0.0
    return pose


def coco133_to_openpose(keypoints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return COCO-WholeBody keypoints (133, 3) as a pose (18, 3), hands (2, 21, 3) and a face (70, 3).

    All are float64. The feet are dropped. The pupils, which COCO-WholeBody lacks, are the eyes of the body
    (as in the A1111 extension's DWPose).

    Raises:
        ValueError: another shape.
    """
    keypoints = points_of("COCO-WholeBody keypoints", keypoints, (133, 3))
    pose = coco17_to_openpose18(keypoints[_BODY])
    hands = np.stack([keypoints[_LEFT_HAND], keypoints[_RIGHT_HAND]]).astype(np.float64)
    face = np.concatenate([keypoints[_FACE], pose[[_RIGHT_EYE, _LEFT_EYE]]]).astype(np.float64)
    hands[hands[..., 2] <= 0] = 0.0
    face[face[:, 2] <= 0] = 0.0
    return pose, hands, face

"""OpenPose's 18 joints: their order, limbs and colours, and how COCO's 17 keypoints become them.

A pose is a float array (18, 3): x and y in pixels, where pixel i spans i to i + 1, and a score, where 0
means that the joint is absent. The order: nose, neck, right shoulder, elbow, wrist, left shoulder, elbow,
wrist, right hip, knee, ankle, left hip, knee, ankle, right eye, left eye, right ear, left ear; right is the
person's right. (CMU-Perceptual-Computing-Lab/openpose, "COCO" output format.)
"""

from dataclasses import dataclass

import numpy as np

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

# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles, left before right.
_COCO_OF_JOINT = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LEFT_SHOULDER, _RIGHT_SHOULDER = 5, 6


@dataclass(frozen=True, eq=False)
class Poses:
    """The people of one picture of ``width`` x ``height`` pixels."""

    people: np.ndarray
    """float64 (N, 18, 3); N may be 0."""
    width: int
    height: int

    def __post_init__(self) -> None:
        """Hold the shape."""
        assert self.people.shape == (len(self.people), 18, 3), self.people.shape


def coco17_to_openpose18(keypoints: np.ndarray) -> np.ndarray:
    """Return COCO keypoints (17, 3) of x, y, score as a pose (18, 3), float64.

    The neck, which COCO lacks, is the middle of the shoulders with the lower of their scores, and only if
    both are visible (controlnet_aux and DWPose do the same). Absent joints are rows of zeros.
    """
    assert keypoints.shape == (17, 3), keypoints.shape
    shoulders = keypoints[[_LEFT_SHOULDER, _RIGHT_SHOULDER]]
    neck = np.array([*shoulders[:, :2].mean(axis=0), shoulders[:, 2].min()])
    pose = np.array([neck if k is None else keypoints[k] for k in _COCO_OF_JOINT], dtype=np.float64)
    pose[pose[:, 2] <= 0] = 0.0
    return pose

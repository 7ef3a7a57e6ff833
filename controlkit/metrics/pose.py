"""Are the joints of a generated figure where the pose map put them?

Poses are (18, 3) in OpenPose order or (17, 3) in COCO order: x px, y px, score; score 0 means absent.
"""

import numpy as np
from numpy.typing import ArrayLike

from controlkit.limits import number
from controlkit.metrics.arrays import same_shaped

# Per-joint spread of human annotations relative to the object's scale: the COCO evaluation's constants.
_SIGMA = {
    "nose": 0.026,
    "eye": 0.025,
    "ear": 0.035,
    "shoulder": 0.079,
    "elbow": 0.072,
    "wrist": 0.062,
    "hip": 0.107,
    "knee": 0.087,
    "ankle": 0.089,
}
_SIGMA["neck"] = _SIGMA["shoulder"]  # COCO has no neck; OpenPose puts it between the shoulders
_ARM = ["shoulder", "elbow", "wrist"]
_LEG = ["hip", "knee", "ankle"]
_ORDER = {
    17: ["nose", *(joint for joint in ("eye", "ear", *_ARM, *_LEG) for _side in ("left", "right"))],
    18: ["nose", "neck", *_ARM, *_ARM, *_LEG, *_LEG, "eye", "eye", "ear", "ear"],
}


def pck(pred: ArrayLike, true: ArrayLike, *, size: float, threshold: float = 0.1) -> float:
    """Percentage of correct keypoints, as a share in [0, 1] (Yang and Ramanan 2013).

    A truly visible joint is correct if it was predicted within `threshold * size` of its place; a joint that
    was not predicted is wrong. Joints that are not visible in `true` do not count.

    Args:
        pred: the pose found in the generated picture, (18, 3) or (17, 3).
        true: the pose that was asked for, same order.
        size: what the threshold is relative to, in pixels (here: the figure's height).
        threshold: as a share of `size`.

    Raises:
        ValueError: the poses differ in shape, `size` is not positive, `threshold` is negative, `true` has no
            visible joint, or a visible joint of either is not finite.
    """
    found, wanted, visible = _visible("pck", pred, true)
    if not number(size) > 0:
        raise ValueError(f"pck: size is {size}, allowed is a positive number of pixels")
    if not number(threshold) >= 0:
        raise ValueError(f"pck: threshold is {threshold}, allowed is 0 or more")
    near = _distance(found, wanted)[visible] <= threshold * size
    return float(np.mean((found[visible, 2] > 0) & near))


def oks(pred: ArrayLike, true: ArrayLike, *, area: float) -> float:
    """Object keypoint similarity in [0, 1], as the COCO keypoint evaluation computes it.

    The mean over the truly visible joints of exp(-d^2 / (2 area k^2)) with k twice the joint's sigma; a joint
    that was not predicted contributes 0. The neck, which COCO does not have, is given the shoulders' sigma.

    Args:
        pred: the pose found in the generated picture, (18, 3) or (17, 3).
        true: the pose that was asked for, same order.
        area: of the figure in square pixels.

    Raises:
        ValueError: the poses differ in shape, `area` is not positive, `true` has no visible joint, or a
            visible joint of either is not finite.
    """
    found, wanted, visible = _visible("oks", pred, true)
    if not number(area) > 0:
        raise ValueError(f"oks: area is {area}, allowed is a positive number of square pixels")
    k = 2 * np.array([_SIGMA[joint] for joint in _ORDER[len(wanted)]])
    similarity = np.exp(-(_distance(found, wanted) ** 2) / (2 * area * k**2))
    return float(np.mean(np.where(found[visible, 2] > 0, similarity[visible], 0.0)))


def _visible(what: str, pred: ArrayLike, true: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check both poses; return them as arrays, and which joints of `true` are visible, bool (K,)."""
    found, wanted = same_shaped(what, pred, true)
    if found.shape not in ((17, 3), (18, 3)):
        raise ValueError(f"{what}: a pose is (18, 3) in OpenPose or (17, 3) in COCO order, not {found.shape}")
    visible = wanted[:, 2] > 0
    if not visible.any():
        raise ValueError(f"{what}: the true pose has no visible joint, so there is nothing to score")
    for name, pose in (("pred", found), ("true", wanted)):
        if not np.isfinite(pose[pose[:, 2] > 0]).all():
            raise ValueError(f"{what}: {name} has a visible joint that is not finite")
    return found, wanted, visible


def _distance(pred: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Euclidean distance in pixels, joint by joint, (K,)."""
    return np.hypot(pred[:, 0] - true[:, 0], pred[:, 1] - true[:, 1])

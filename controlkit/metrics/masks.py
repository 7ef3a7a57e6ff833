"""Do two regions cover the same pixels?"""

import numpy as np

from controlkit.metrics.arrays import check_same_shape


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks of the same shape, in [0, 1]; two empty masks agree perfectly (1).

    Raises:
        ValueError: the shapes differ.
    """
    check_same_shape("iou", a, b)
    a, b = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0

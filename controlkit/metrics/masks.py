"""Do two regions cover the same pixels?"""

import numpy as np
from numpy.typing import ArrayLike

from controlkit.metrics.arrays import same_shaped


def iou(a: ArrayLike, b: ArrayLike) -> float:
    """Intersection over union of two masks of the same shape, in [0, 1]; two empty masks agree perfectly (1).

    Raises:
        ValueError: the shapes differ.
    """
    one, other = (mask.astype(bool) for mask in same_shaped("iou", a, b))
    union = np.count_nonzero(one | other)
    return float(np.count_nonzero(one & other) / union) if union else 1.0

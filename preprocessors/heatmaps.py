"""Reading joints off heatmaps: the peak, refined below the size of a cell."""

import cv2
import numpy as np

_BLUR_KERNEL, _BLUR_SIGMA = 11, 0.8
_FLOOR, _CEILING = 1e-3, 50.0  # before the logarithm


def decode_heatmaps(heatmaps: np.ndarray) -> np.ndarray:
    """Return the joints of K heatmaps, float (K, h, w), as float64 (K, 3): x, y in cells, peak value.

    Cell (i, j) has its centre at x = j, y = i. DARK (Zhang et al. 2020, "Distribution-aware coordinate
    representation", eq. 9): the heatmap is smoothed (11 x 11, sigma 0.8), and one Newton step on its
    logarithm leads from the largest cell to the maximum between cells; on a Gaussian it is exact. The
    numbers are those of transformers' ``VitPoseImageProcessor``, with one difference: a step of more than a
    cell means that there is no clean peak, and the largest cell itself is returned. A joint whose peak is
    not positive has score 0.
    """
    joints = np.zeros((len(heatmaps), 3))
    for joint, heatmap in zip(joints, heatmaps, strict=True):
        row, column = np.unravel_index(np.argmax(heatmap), heatmap.shape)
        score = float(heatmap[row, column])
        if score > 0:
            dx, dy = _newton_step(heatmap, int(row), int(column))
            joint[:] = column + dx, row + dy, score
    return joints


def _newton_step(heatmap: np.ndarray, row: int, column: int) -> tuple[float, float]:
    """Return the step (dx, dy) in cells from a cell to the maximum of the smoothed heatmap's logarithm."""
    smooth = cv2.GaussianBlur(
        heatmap.astype(np.float64), (_BLUR_KERNEL, _BLUR_KERNEL), _BLUR_SIGMA, borderType=cv2.BORDER_REFLECT
    )
    padded = np.pad(np.log(np.clip(smooth, _FLOOR, _CEILING)), 1, mode="edge")
    p = padded[row : row + 3, column : column + 3]  # the cell is p[1, 1]
    gradient = 0.5 * np.array([p[1, 2] - p[1, 0], p[2, 1] - p[0, 1]])
    dxx, dyy = p[1, 2] - 2 * p[1, 1] + p[1, 0], p[2, 1] - 2 * p[1, 1] + p[0, 1]
    dxy = 0.5 * (p[2, 2] - p[1, 2] - p[2, 1] + 2 * p[1, 1] - p[1, 0] - p[0, 1] + p[0, 0])
    determinant = dxx * dyy - dxy * dxy
    if determinant <= 0:
        return 0.0, 0.0
    dx = -(dyy * gradient[0] - dxy * gradient[1]) / determinant
    dy = -(dxx * gradient[1] - dxy * gradient[0]) / determinant
    return (float(dx), float(dy)) if max(abs(dx), abs(dy)) <= 1 else (0.0, 0.0)

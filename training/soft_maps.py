"""Maps that are differentiable in the picture, and how far they are from the map that was asked for.

Every function takes a batch, gives one number or map for each picture of it, and computes in its input's
precision. A picture here is in [0, 1], not in a network's [-1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_TOLERANCE = 1  # pixels by which an edge may be out of place
_ROUNDED = 16  # units of the last place: flatter depth is flat
_COUNTED = 1.0  # pixels that agree in any case, so that a map without edges has a score


def edge_strength(pictures: Tensor) -> Tensor:
    """|dx| + |dy| of each pixel's strongest channel, as `cv2.Canny` measures it: 0 to 2040.

    ``pictures``: (B, 3, H, W) in [0, 1]. Returns (B, H - 2, W - 2): a 3 x 3 Sobel gradient of 8-bit levels,
    left off along the border.
    """
    levels = 255.0 * pictures
    across = levels[..., 2:] - levels[..., :-2]
    dx = across[..., :-2, :] + 2 * across[..., 1:-1, :] + across[..., 2:, :]
    down = levels[..., 2:, :] - levels[..., :-2, :]
    dy = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return (dx.abs() + dy.abs()).amax(dim=1)


def soft_edges(pictures: Tensor, *, low: float, high: float) -> Tensor:
    """How much of an edge each pixel is, (B, H - 2, W - 2) in [0, 1): what Canny decides, made gradual.

    g² / (g² + c²) of the gradient g of :func:`edge_strength`, a half at c, midway between Canny's thresholds.
    Its slope falls slowly on both sides, so that an edge that is missing altogether still draws one. Lines
    are not thinned: :func:`edges_missed` compares with tolerance instead.
    """
    half = max((low + high) / 2, 1.0)
    squared = edge_strength(pictures).square()
    return squared / (squared + half**2)


def edges_missed(edges: Tensor, wanted: Tensor) -> Tensor:
    """1 - F1 of soft edges and the map's, (B,): 0 where they agree, 1 where they have nothing in common.

    Both (B, H, W) in [0, 1]. Precision is the share of ``edges`` within a pixel of ``wanted``, recall the
    share of ``wanted`` within a pixel of ``edges``: `controlkit.metrics.edge_f1`, made gradual. Unlike a mean
    difference it does not drown the few pixels of an edge in those of its surroundings.
    """
    agreed_on = (edges * _widened(wanted)).sum(dim=(1, 2)) + _COUNTED
    found = (wanted * _widened(edges)).sum(dim=(1, 2)) + _COUNTED
    precision = agreed_on / (edges.sum(dim=(1, 2)) + _COUNTED)
    recall = found / (wanted.sum(dim=(1, 2)) + _COUNTED)
    return 1 - 2 * precision * recall / (precision + recall)


def _widened(edges: Tensor) -> Tensor:
    """The largest value within the tolerance of each pixel."""
    return functional.max_pool2d(edges[:, None], 2 * _TOLERANCE + 1, stride=1, padding=_TOLERANCE)[:, 0]


def depth_missed(depth: Tensor, wanted: Tensor) -> Tensor:
    """The share of a depth map's variance that an estimate does not explain, (B,): 0 where they agree.

    Both (B, H, W), larger is nearer. Scale and shift of ``depth`` are fitted by least squares first (MiDaS,
    Ranftl et al. 2020, equations 3 and 4), which leaves 1 - r², r their correlation; here 1 - r |r|, for near
    and far exchanged is worse than nothing: up to 2. 1, without a gradient, where ``wanted`` is flat.
    """
    x, y = _centred(depth), _centred(wanted)
    r = (x * y).sum(dim=1) / (_spread(x, depth) * _spread(y, wanted))
    return 1 - r * r.abs()


def _centred(values: Tensor) -> Tensor:
    return (values - values.mean(dim=(1, 2), keepdim=True)).flatten(1)


def _spread(centred: Tensor, values: Tensor) -> Tensor:
    """The root of the sum of squares, (B,), kept above what rounding makes of a flat map."""
    limits = torch.finfo(values.dtype)
    rounding = (_ROUNDED * limits.eps * values.detach().flatten(1)).square().sum(dim=1) + limits.tiny
    return (centred.square().sum(dim=1) + rounding).sqrt()

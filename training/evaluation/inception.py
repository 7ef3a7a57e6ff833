"""The features that FID and KID compare, computed as clean-fid computes them.

Inception v3 with the weights of the original FID (Heusel et al. 2017), last pooling, 2048 features. Each
channel is resized to 299 x 299 by Pillow's bicubic filter in float32, which averages where it shrinks: what
Parmar, Zhang & Zhu 2022 (clean-fid) found to be right. torch-fidelity has the network; it is given the
resized picture as it is, without rounding to 8 bits.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    import torch

SIDE = 299
FEATURES = 2048
BATCH = 16
SUBSET = 1000  # pictures of each set whose kernel distances have a spread, as the field reports it


def clean_resize(picture: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.float32]:
    """A picture uint8 (H, W, 3) as float32 (side, side, 3) in [0, 255]: each channel by itself, bicubic."""
    channels = [
        np.asarray(
            Image.fromarray(picture[..., k].astype(np.float32)).resize(
                (side, side), resample=Image.Resampling.BICUBIC
            )
        )
        for k in range(3)
    ]
    return np.stack(channels, axis=2).clip(0, 255)


class Inception:
    """The network, from a file of its weights."""

    count = FEATURES

    def __init__(self, weights: Path, *, device: torch.device | str = "cpu") -> None:
        """Load torch-fidelity's port of the network.

        Raises ValueError, one line, for a file that does not hold its weights.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
            )
        except (RuntimeError, OSError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"{weights} does not hold the weights of Inception v3: {reason}") from error
        self.layers = [layer for name, layer in network.named_children() if name != "fc"]
        self.device = device
        for layer in self.layers:
            layer.eval().requires_grad_(False).to(device)

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features (N, 2048) of pictures, uint8 (H, W, 3) of any sizes."""
        import torch

        rows = [np.zeros((0, FEATURES), np.float32)]
        for start in range(0, len(pictures), BATCH):
            resized = np.stack([clean_resize(picture) for picture in pictures[start : start + BATCH]])
            x = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self.device)
            with torch.inference_mode():
                x = (x - 128) / 128
                for layer in self.layers:
                    x = layer(x)
            rows.append(x.flatten(1).float().cpu().numpy())
        return np.concatenate(rows)


def frechet_distance(real: NDArray[Any], fake: NDArray[Any]) -> float:
    """FID of features (N, D) and (M, D), by torchmetrics in float64."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_given(real.shape[1]))
    metric.set_dtype(torch.float64)
    _fill(metric.update, real, fake)
    return float(metric.compute())


def kernel_distance(real: NDArray[Any], fake: NDArray[Any], *, subsets: int = 100) -> tuple[float, float]:
    """KID of features (N, D) and (M, D): the unbiased estimate of all of them, and its spread over subsets.

    Bińkowski et al. 2018 (arXiv:1801.01401), equation 4, with their kernel (x.y / D + 1)^3. The sets need not
    be of one size. The spread is the standard deviation over subsets of `SUBSET` pictures of each, as they
    report it; no number unless both sets have more, for then a subset is the whole set.
    """
    x, y = (np.asarray(features, dtype=np.float64) for features in (real, fake))
    spread = float("nan")
    if min(len(x), len(y)) > SUBSET:
        draw = np.random.default_rng(0)
        parts = [
            [features[draw.choice(len(features), SUBSET, replace=False)] for features in (x, y)]
            for _ in range(subsets)
        ]
        spread = float(np.std([_squared_discrepancy(*part) for part in parts]))
    return _squared_discrepancy(x, y), spread


def _squared_discrepancy(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The unbiased estimate of the squared maximum mean discrepancy; negative by chance where it is 0."""
    n, m = len(x), len(y)
    own = sum(
        (_kernel_sum(z, z) - (_kernel(z, z, paired=True)).sum()) / (len(z) * (len(z) - 1)) for z in (x, y)
    )
    return float(own - 2 * _kernel_sum(x, y) / (n * m))


def _kernel_sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The kernel summed over all pairs, by rows at a time: of many pictures the whole table is too large."""
    return float(sum(_kernel(x[k : k + SUBSET], y).sum() for k in range(0, len(x), SUBSET)))


def _kernel(x: NDArray[np.float64], y: NDArray[np.float64], *, paired: bool = False) -> NDArray[np.float64]:
    products = (x * y).sum(axis=1) if paired else x @ y.T
    return np.asarray((products / x.shape[1] + 1) ** 3)


def _given(count: int) -> torch.nn.Module:
    """A network for torchmetrics that hands on features that are computed already."""
    import torch

    class Given(torch.nn.Identity):
        num_features = count

    return Given()


def _fill(update: Callable[..., None], real: NDArray[Any], fake: NDArray[Any]) -> None:
    import torch

    for features, is_real in ((real, True), (fake, False)):
        update(torch.from_numpy(np.ascontiguousarray(features)).double(), real=is_real)

"""Depth networks: any that transformers' AutoModelForDepthEstimation loads, as inverse depth."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.images import resize
from controlkit.preprocessors.weights import find_model, load_model, load_processor

if TYPE_CHECKING:
    import torch

MODELS = {
    "depth-anything-v2-small": "depth-anything/Depth-Anything-V2-Small-hf",
    "depth-anything-v2-base": "depth-anything/Depth-Anything-V2-Base-hf",
    "depth-anything-v2-large": "depth-anything/Depth-Anything-V2-Large-hf",
    "depth-anything-small": "LiheYoung/depth-anything-small-hf",
    "dpt": "Intel/dpt-large",
    "dpt-hybrid": "Intel/dpt-hybrid-midas",
    "zoedepth": "Intel/zoedepth-nyu-kitti",
    "depth-pro": "apple/DepthPro-hf",
}
"""Short names of depth models on the hub; sd-controlnet-depth learned from dpt-hybrid's maps.

Their weights are Apache-2.0, but for zoedepth (MIT), depth-anything-v2-base and -large (CC-BY-NC-4.0: not for
commercial use) and depth-pro (Apple's own terms, for research).
"""

USUAL = "depth-anything-v2-small"
"""The model that is used where none is named."""

_METRIC_TYPES = {"depth_pro", "glpn", "zoedepth"}  # models that predict metres, large where it is far
_NEAREST_M = 0.1  # nearer counts as this near; else one pixel at 0 m would take the whole range of the map
_LARGEST_ASPECT = 8  # networks keep a picture's aspect, and fail on a picture of 3000 x 2 pixels
_MOST_AT_ONCE = 16  # pictures in one pass, so that a batch of any length fits into memory


class DepthNetwork:
    """A network that estimates depth from one picture."""

    def __init__(self, name: str, *, device: str, precision: str) -> None:
        """Load it. Raises ValueError, one line: an unknown name, missing or damaged weights, the device."""
        from transformers import AutoModelForDepthEstimation

        folder = find_model("depth", name, MODELS)
        self.name = name
        self._network = load_model(AutoModelForDepthEstimation, folder, device=device, precision=precision)
        self._processor = load_processor(folder)
        # A CPU gains nothing from passing pictures together, and would round a little differently.
        self._at_once = 1 if self._network.device.type == "cpu" else _MOST_AT_ONCE

    def inverse_depth(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the inverse depth of each picture, uint8 (H, W, 3): float32 (H, W), larger is nearer.

        Up to a scale and a shift that the network leaves open. Pictures of one size go through the network
        together, 16 at a time; on the CPU one by one, so that a batch equals its pictures alone bit for bit.

        Raises:
            ValueError: a value is not finite, as happens where half precision does not suffice.
        """
        found: dict[int, np.ndarray] = {}
        for indices in _by_size(pictures, self._at_once):
            together = self._pass([pictures[index] for index in indices])
            found.update(zip(indices, together, strict=True))
        return [found[index] for index in range(len(pictures))]

    @property
    def pads(self) -> bool:
        """Whether pictures are padded before the network sees them."""
        return bool(getattr(self._processor, "do_pad", False))

    def differentiable(self, pictures: "torch.Tensor") -> "torch.Tensor":
        """Return the inverse depth of pictures, (B, 3, H, W) in [0, 1]: (B, H, W), with gradients.

        What :meth:`inverse_depth` finds, up to how pictures are resampled and rounded on the way. Not for
        networks that pad (:attr:`pads`): their processors' padding is not repeated here.
        """
        import torch
        from torch.nn.functional import interpolate

        assert not self.pads, self.name
        processor, size = self._processor, tuple(pictures.shape[-2:])
        blank = processor(np.zeros((*size, 3), np.uint8), input_data_format="channels_last")
        seen = tuple(np.shape(blank["pixel_values"][0])[-2:])
        mean, std = (
            torch.tensor(values, dtype=pictures.dtype, device=pictures.device)[:, None, None]
            for values in (processor.image_mean, processor.image_std)
        )
        resized = pictures
        if seen != size:
            resized = interpolate(pictures, seen, mode="bicubic", align_corners=False, antialias=True)
        found = self._network(pixel_values=((resized - mean) / std).to(self._network.dtype)).predicted_depth
        if found.shape[-2:] != size:
            found = interpolate(found[:, None], size, mode="bicubic", align_corners=False)[:, 0]
        return 1.0 / found.clamp(min=_NEAREST_M) if _is_metric(self._network.config) else found

    def _pass(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the inverse depth of pictures of one size."""
        import torch

        height, width = pictures[0].shape[:2]
        seen = [_tame(picture) for picture in pictures]
        inputs = self._processor(seen, input_data_format="channels_last", return_tensors="pt")
        inputs = inputs.to(self._network.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._network.dtype)
        with torch.no_grad():
            outputs = self._network(**inputs)
        outputs = type(outputs)(
            **{name: value.float() for name, value in outputs.items() if torch.is_tensor(value)}
        )
        options: dict[str, Any] = {"target_sizes": [(height, width)] * len(pictures)}
        if self._network.config.model_type == "zoedepth":  # its processor pads, and must know what to cut off
            options["source_sizes"] = [picture.shape[:2] for picture in seen]
        post = self._processor.post_process_depth_estimation(outputs, **options)
        return [self._inverted(one["predicted_depth"].cpu().numpy(), height, width) for one in post]

    def _inverted(self, predicted: np.ndarray, height: int, width: int) -> np.ndarray:
        depth = predicted.astype(np.float32, copy=False).reshape(height, width)  # it drops axes of 1
        if not np.isfinite(depth).all():
            dtype = str(self._network.dtype).removeprefix("torch.")
            raise ValueError(
                f"the depth that {self.name} finds in {dtype} has values that are not finite; "
                "use precision=fp32"
            )
        return 1.0 / np.maximum(depth, _NEAREST_M) if _is_metric(self._network.config) else depth


def _by_size(pictures: Sequence[np.ndarray], most: int) -> list[list[int]]:
    """Return the pictures' indices in groups of one size, each of ``most`` at most."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        groups[picture.shape].append(index)
    return [group[start : start + most] for group in groups.values() for start in range(0, len(group), most)]


def _is_metric(config: Any) -> bool:
    relative = getattr(config, "depth_estimation_type", "relative") == "relative"
    return config.model_type in _METRIC_TYPES or not relative


def _tame(picture: np.ndarray) -> np.ndarray:
    """Squeeze a picture of an extreme aspect to at most 8 : 1; all others pass unchanged."""
    height, width = picture.shape[:2]
    least_height, least_width = -(-width // _LARGEST_ASPECT), -(-height // _LARGEST_ASPECT)
    return resize(picture, max(width, least_width), max(height, least_height))

"""Depth maps: near is white, the nearest point of a picture 255 and the farthest 0."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from controlkit.images import resize
from controlkit.preprocessors.maps import Map, Preprocessor
from controlkit.preprocessors.weights import find_model, load_model, load_processor

MODELS = {
    "depth-anything-v2-small": "depth-anything/Depth-Anything-V2-Small-hf",
    "dpt-hybrid": "Intel/dpt-hybrid-midas",
}
"""Short names of depth models on the hub, Apache-2.0; sd-controlnet-depth learned from dpt-hybrid's maps."""

_METRIC_TYPES = {"depth_pro", "glpn", "zoedepth"}  # models that predict metres, large where it is far
_NEAREST_M = 0.1  # nearer counts as this near; else one pixel at 0 m would take the whole range of the map
_LARGEST_ASPECT = 8  # networks keep a picture's aspect, and fail on a picture of 3000 x 2 pixels


class Depth(Preprocessor):
    """The depth of a picture, estimated by any network that transformers' AutoModelForDepthEstimation loads.

    ``model`` is "depth-anything-v2-small" (the default; downloaded once), "dpt-hybrid", "tiny" (bundled;
    only for pictures of the bundled world), a hub id or a transformers folder; ``device`` is torch's name.
    Networks that predict metric depth are inverted, so near is always white.

    Raises:
        ValueError: one line: an unknown name, missing or damaged weights.
    """

    kind = "depth"

    def __init__(
        self, *, model: str = "depth-anything-v2-small", device: str = "auto", resolution: int = 0
    ) -> None:
        """Load the network."""
        super().__init__(resolution=resolution)
        from transformers import AutoModelForDepthEstimation

        folder = find_model("depth", model, MODELS)
        self.model = model
        self._network = load_model(AutoModelForDepthEstimation, folder, device=device)
        self._processor = load_processor(folder)

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        """Return the depth map of a picture."""
        depth = self.inverse_depth(picture)
        return Map(
            image=depth_to_map(depth),
            kind=self.kind,
            polarity="near-is-white",
            model=self.model,
            depth=depth,
        )

    def inverse_depth(self, picture: np.ndarray) -> np.ndarray:
        """Return the estimated inverse depth of a uint8 (H, W, 3) picture: float32 (H, W), larger is nearer.

        Up to a scale and a shift that the network leaves open.
        """
        import torch

        height, width = picture.shape[:2]
        seen = _tame(picture)
        inputs = self._processor(seen, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            outputs = self._network(**inputs.to(self._network.device))
        options: dict[str, Any] = {"target_sizes": [(height, width)]}
        if self._network.config.model_type == "zoedepth":  # its processor pads, and must know what to cut off
            options["source_sizes"] = [seen.shape[:2]]
        post = self._processor.post_process_depth_estimation(outputs, **options)
        depth = post[0]["predicted_depth"].float().cpu().numpy().reshape(height, width)  # it drops axes of 1
        return 1.0 / np.maximum(depth, _NEAREST_M) if _is_metric(self._network.config) else depth


def depth_to_map(inverse_depth: np.ndarray) -> np.ndarray:
    """Return inverse depth, float (H, W), larger is nearer, as a map: uint8 (H, W, 3), near is white.

    The smallest value becomes 0 and the largest 255, linearly between them, as MiDaS maps have it
    (lllyasviel's annotator; rounded to the nearest level here). Constant depth gives a black map.

    Raises:
        ValueError: a value is not finite.
    """
    low, high = float(inverse_depth.min()), float(inverse_depth.max())
    if not np.isfinite(high - low):
        raise ValueError("the depth has values that are not finite (NaN or infinity)")
    share = (inverse_depth.astype(np.float64) - low) / ((high - low) or 1.0)  # in [0, 1]
    return np.rint(share * 255.0).astype(np.uint8)[:, :, None].repeat(3, axis=2)


def _is_metric(config: Any) -> bool:
    relative = getattr(config, "depth_estimation_type", "relative") == "relative"
    return config.model_type in _METRIC_TYPES or not relative


def _tame(picture: np.ndarray) -> np.ndarray:
    """Squeeze a picture of an extreme aspect to at most 8 : 1; all others pass unchanged."""
    height, width = picture.shape[:2]
    least_height, least_width = -(-width // _LARGEST_ASPECT), -(-height // _LARGEST_ASPECT)
    return resize(picture, max(width, least_width), max(height, least_height))

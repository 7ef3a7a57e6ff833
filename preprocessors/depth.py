"""Depth maps: near is white, the nearest point of a picture 255 and the farthest 0."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.limits import number
from controlkit.preprocessors.depthfiles import depth_range, read_depth
from controlkit.preprocessors.depthnet import USUAL, DepthNetwork
from controlkit.preprocessors.depthtiles import tiled_depth
from controlkit.preprocessors.maps import Map, Preprocessor

if TYPE_CHECKING:
    from controlkit.images import Source

FROM_FILE = "file"
"""The model name that says: the picture given is depth already."""


class Depth(Preprocessor):
    """The depth of a picture, estimated by a network, or read from a file that holds depth.

    ``model`` is one of ``depthnet.MODELS``: "depth-anything-v2-small" (the default; downloaded once),
    "depth-anything-v2-base" and "-large" (their weights are CC-BY-NC-4.0, not for commercial use),
    "depth-anything-small", "dpt", "dpt-hybrid" (what sd-controlnet-depth learned from), "zoedepth",
    "depth-pro" (Apple's terms, for research); or "tiny" (bundled; only for pictures of the bundled world), a
    hub id or a transformers folder. Networks that predict metres are inverted, so near is always white.
    ``device`` is torch's name; ``precision`` "auto" (fp16 on CUDA, else fp32), "fp32", "fp16" or "bf16".

    ``clip`` is a percentage: 1 makes the nearest and the farthest hundredth of a picture white and black, so
    that single pixels do not take the range. ``tile`` (0: off) is the side, in pixels, of the tiles by which
    a large picture is refined (:func:`controlkit.preprocessors.depthtiles.tiled_depth`).

    With ``model="file"`` nothing is estimated: the picture is depth from a sensor or a renderer, read by
    :func:`controlkit.preprocessors.read_depth` in all its bits. ``metric=True`` says that its values grow
    with the distance (metres, millimetres), ``metric=False`` that they grow towards the viewer (disparity,
    and what :func:`controlkit.preprocessors.write_depth_png16` writes). Without either the file decides: the
    channel Z or depth of an EXR is a distance, all else grows towards the viewer. ``fill=True`` fills the
    holes that sensors leave from the nearest measured pixels; without it they are black.

    Raises:
        ValueError: one line: an unknown name, missing or damaged weights, an option out of range.
    """

    kind = "depth"

    def __init__(
        self,
        *,
        model: str = USUAL,
        device: str = "auto",
        precision: str = "auto",
        clip: float = 0.0,
        tile: int = 0,
        metric: bool | None = None,
        fill: bool = False,
        resolution: int = 0,
    ) -> None:
        """Load the network."""
        super().__init__(resolution=resolution)
        check_clip(clip)
        if tile and not 64 <= tile <= 8192:
            raise ValueError(f"depth's tile is {tile}; it must be 0 (off) or 64 to 8192 pixels")
        if metric and model != FROM_FILE:
            raise ValueError(
                "depth's metric is for model=file: of networks it is known whether they say metres"
            )
        if fill and model != FROM_FILE:
            raise ValueError("depth's fill is for model=file: networks leave no holes")
        self.model = model
        self._options: dict[str, float | str] = {"clip": clip}
        from_file = {"fill": fill} if metric is None else {"metric": metric, "fill": fill}
        self._options |= from_file if model == FROM_FILE else {"tile": tile, "precision": precision}
        self._clip, self._tile, self._from_file = clip, tile, from_file
        self._network = None
        if model != FROM_FILE:
            self._network = DepthNetwork(model, device=device, precision=precision)

    def load(self, image: "Source | Sequence[Source]") -> tuple[list[np.ndarray], bool]:
        """Return pictures, uint8 (H, W, 3); or for ``model="file"`` inverse depth, float32 (H, W)."""
        if self._network is not None:
            return super().load(image)
        is_batch = isinstance(image, (list, tuple)) or getattr(image, "ndim", 0) == 4
        sources: Sequence[Any] = image if is_batch else [image]  # type: ignore[assignment]
        return [read_depth(source, **self._from_file) for source in sources], is_batch

    def inverse_depth(self, picture: np.ndarray) -> np.ndarray:
        """Return the estimated inverse depth of a uint8 (H, W, 3) picture: float32 (H, W), larger is nearer.

        Up to a scale and a shift that the network leaves open.
        """
        (depth,) = self._inverse_depths([picture])
        return depth

    def _inverse_depths(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        if self._network is None:
            return [
                picture if picture.dtype == np.float32 else read_depth(picture, **self._from_file)
                for picture in pictures
            ]
        if self._tile:
            return [tiled_depth(self._network.inverse_depth, picture, self._tile) for picture in pictures]
        return self._network.inverse_depth(pictures)

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [
            Map(
                image=depth_to_map(depth, clip=self._clip),
                kind=self.kind,
                polarity="near-is-white",
                params=self._options,
                model=self.model,
                depth=depth,
            )
            for depth in self._inverse_depths(pictures)
        ]

    def _resized(self, made: Map, width: int, height: int) -> Map:
        """Bring the depth to the other size, and make the map of it anew: its range stays exact."""
        resized = super()._resized(made, width, height)
        assert resized.depth is not None
        return replace(resized, image=depth_to_map(resized.depth, clip=self._clip))


def depth_to_map(inverse_depth: np.ndarray, *, clip: float = 0.0) -> np.ndarray:
    """Return inverse depth, float (H, W), larger is nearer, as a map: uint8 (H, W, 3), near is white.

    The smallest value becomes 0 and the largest 255, linearly between them, as MiDaS maps have it
    (lllyasviel's annotator; rounded to the nearest level here). Constant depth gives a black map. With
    ``clip``, in percent, the range is from that percentile to 100 minus it (from the smallest to the largest
    value where those two are equal), and what lies outside is cut off.

    Raises:
        ValueError: a value is not finite, it is not (H, W) numbers, or ``clip`` is not from 0 to below 50.
    """
    check_clip(clip)
    depth, low, high = depth_range(inverse_depth)
    if clip:
        inner_low, inner_high = (float(value) for value in np.percentile(depth, (clip, 100 - clip)))
        if inner_high > inner_low:
            low, high = inner_low, inner_high
    share = (depth.astype(np.float64) - low) / ((high - low) or 1.0)
    levels = np.rint(np.clip(share, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels[:, :, None].repeat(3, axis=2)


def check_clip(clip: float) -> None:
    """Raise ValueError, one line, unless it is a percentage from 0 to below 50."""
    if not 0 <= number(clip) < 50:
        given = f"{clip:g}" if isinstance(clip, int | float) else clip
        raise ValueError(f"depth's clip is {given}; it must be a percentage from 0 (off) to below 50")

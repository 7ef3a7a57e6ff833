"""Depth (near is white) and normals (red left, green top, blue to the viewer) by way of controlnet-aux."""

import math
import types
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from controlkit.preprocessors.annotators import find_weights, import_annotator, quietly
from controlkit.preprocessors.depth import depth_to_map
from controlkit.preprocessors.detectors import Detector, as_tensor, build, continued, run_detector
from controlkit.preprocessors.maps import Map
from controlkit.preprocessors.normal import FLAT, check_normal_options, normal_from_depth


class Midas(Detector):
    """Depth by MiDaS's DPT-Hybrid (Ranftl et al. 2021), as the first depth ControlNets had it.

    ``normal`` gives the normals instead, with ``a`` and ``bg_threshold`` of
    :func:`controlkit.preprocessors.normal.normal_from_depth`. The weights are dpt_hybrid-midas-501f0c75.pt;
    timm is needed. (The same network, without either: ``get("depth", model="dpt-hybrid")``.)

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux or timm, an option out of range.
    """

    kind = "midas"

    def __init__(
        self,
        *,
        model: str = "",
        device: str = "auto",
        normal: bool = False,
        a: float = FLAT,
        bg_threshold: float = 0.1,
        resolution: int = 512,
    ) -> None:
        """Load the network."""
        options = {"a": a, "bg_threshold": bg_threshold} if normal else {}
        super().__init__(model=model, resolution=resolution, normal=normal, **options)
        check_normal_options(self.kind, a, bg_threshold)
        self._normal, self._a, self._bg_threshold = normal, a, bg_threshold
        path = find_weights("dpt_hybrid-midas-501f0c75.pt", model)
        network = import_annotator("midas.midas.dpt_depth").DPTDepthModel
        self._network = build(lambda: network(backbone="vitb_rn50_384"), path, device=device)

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._from_depth(self._depth(picture)) for picture in pictures]

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return self._from_depth(self._depth(picture)).image

    def _depth(self, picture: np.ndarray) -> np.ndarray:
        import torch

        height, width = picture.shape[:2]
        with torch.no_grad():
            depth = self._network(as_tensor(continued(picture), self._network) / 127.5 - 1.0)[0]
        return depth.cpu().numpy()[:height, :width]

    def _from_depth(self, depth: np.ndarray) -> Map:
        if not self._normal:
            return replace(self._map(depth_to_map(depth), depth=depth), polarity="near-is-white")
        image = normal_from_depth(depth, a=self._a, bg_threshold=self._bg_threshold)
        return replace(self._map(image, depth=depth), polarity="normals")


class Zoe(Detector):
    """Depth by ZoeDepth (Bhat et al. 2023): metres, between their 2nd and 85th percentile, near is white.

    The weights are ZoeD_M12_N.pt; timm is needed. (Inverse depth by the same network, without either:
    ``get("depth", model="zoedepth")``.)

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux or timm.
    """

    kind = "zoe"
    polarity = "near-is-white"

    def __init__(self, *, model: str = "", device: str = "auto", resolution: int = 512) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution)
        path = find_weights("ZoeD_M12_N.pt", model)
        module = import_annotator("zoe")
        self._network = build(
            lambda: module.ZoeDepth.build_from_config(module.get_config("zoedepth", "infer")),
            path,
            device=device,
            key="model",
            unused="relative_position_index",  # timm computes it since 1.0
        )

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        import torch

        height, width = picture.shape[:2]
        with torch.no_grad():
            metres = self._network.infer(as_tensor(continued(picture), self._network) / 255.0)
        return near_is_white(metres[0, 0].cpu().numpy()[:height, :width], 2, 85)


class Leres(Detector):
    """Depth by LeReS (Yin et al. 2021), near is white.

    Its batch norms use what they learned, as its authors have it; controlnet-aux leaves them as in training.

    ``boost`` refines it piece by piece (BoostingMonocularDepth, Miangoleh et al. 2021): slow, for large
    pictures. ``remove_near`` and ``remove_background`` are percentages of the depth's range: what is nearer
    becomes white, what is farther black. The weights are res101.pth, for ``boost`` latest_net_G.pth too.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux, an option out of range.
    """

    kind = "leres"
    polarity = "near-is-white"

    def __init__(
        self,
        *,
        model: str = "",
        device: str = "auto",
        boost: bool = False,
        remove_near: float = 0.0,
        remove_background: float = 0.0,
        resolution: int = 512,
    ) -> None:
        """Load the network, for ``boost`` both."""
        cuts = {"remove_near": remove_near, "remove_background": remove_background}
        super().__init__(model=model, resolution=resolution, boost=boost, **cuts)
        for name, value in cuts.items():
            if not 0 <= value <= 100:
                raise ValueError(f"leres's {name} is {value:g}; it must be a percentage from 0 to 100")
        self._remove_near, self._remove_background = remove_near, remove_background
        path = find_weights("res101.pth", model)
        boost_path = find_weights("latest_net_G.pth", model) if boost else None
        self._module = import_annotator("leres")
        self._network = build(
            lambda: self._module.RelDepthModel(backbone="resnext101"), path, device=device, key="depth_model"
        )
        self._merger = _merger(self._module, boost_path, device) if boost_path else None

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        height, width = picture.shape[:2]
        levels = near_is_white(self._distances(continued(picture))[:height, :width], 0, 100)
        if self._remove_near:
            levels[255 - levels <= self._remove_near * 2.55] = 255
        if self._remove_background:
            levels[levels <= self._remove_background * 2.55] = 0
        return levels

    def _distances(self, picture: np.ndarray) -> np.ndarray:
        """Return depth, float (H, W), larger where it is farther."""
        import torch

        height, width = picture.shape[:2]
        with torch.no_grad():
            if self._merger is not None and max(height, width) >= _LEAST_TO_BOOST:
                with quietly(), np.errstate(all="ignore"):
                    distances = self._module.estimateboost(
                        picture, self._network, 0, self._merger, max(height, width)
                    )
                if np.isfinite(distances).all():  # it divides by the range of what it finds
                    return distances
            return self._module.estimateleres(picture, self._network, width, height)


class NormalBae(Detector):
    """Normals by Bae et al. 2021, as ControlNet 1.1 has them: red left, green top, blue to the viewer.

    The weights are scannet.pt.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux.
    """

    kind = "normalbae"
    polarity = "normals"

    def __init__(self, *, model: str = "", device: str = "auto", resolution: int = 512) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution)
        path = find_weights("scannet.pt", model)
        module = import_annotator("normalbae")
        options = types.SimpleNamespace(
            mode="client", architecture="BN", pretrained="scannet", sampling_ratio=0.4, importance_ratio=0.7
        )
        network = build(lambda: module.NNET(options), path, device=device, key="model")
        self._detector = module.NormalBaeDetector(network)

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return run_detector(self._detector, picture)


def near_is_white(distances: np.ndarray, low: float, high: float) -> np.ndarray:
    """Return distances, float (H, W), as levels, uint8 (H, W, 3): white at the percentile ``low``.

    Black at the percentile ``high``, linearly between them. Constant distances give black.

    Raises:
        ValueError: a value is not finite.
    """
    near, far = (float(value) for value in np.percentile(distances, (low, high)))
    if not math.isfinite(float(distances.max()) - float(distances.min())):
        raise ValueError("the depth has values that are not finite (NaN or infinity)")
    share = (far - distances.astype(np.float64)) / ((far - near) or math.inf)
    levels = np.rint(np.clip(share, 0.0, 1.0) * 255.0).astype(np.uint8)
    return levels[:, :, None].repeat(3, axis=2)


_LEAST_TO_BOOST = 256  # pixels of the longer side; the search for a size to boost at fails below 150


def _merger(module: Any, path: Any, device: str) -> Any:
    """Return the network that merges a coarse and a fine estimate, in the frame that LeReS's code expects."""
    # Its own options are parsed from the command line of whoever runs this process.
    options = types.SimpleNamespace(
        gpu_ids=[],
        isTrain=False,
        checkpoints_dir="",
        name="",
        preprocess="scale_width",
        input_nc=2,
        output_nc=1,
    )
    frames: list[Any] = []

    def make() -> Any:
        frames.append(module.Pix2Pix4DepthModel(options))
        return frames[0].netG

    network = build(make, path, device=device)
    (frame,) = frames
    frame.device = next(network.parameters()).device
    return frame

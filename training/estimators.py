"""Training the bundled estimators, of the classes that the real detectors load: pose (ViTPose) and depth.

They look at the whole picture, so that maps come from pictures of the bundled world by the same code path
as from photographs with the published models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import files
from controlkit.base import load_base
from controlkit.folders import load_part
from controlkit.metrics import depth_rmse, pck
from controlkit.preprocessors.heatmaps import decode_heatmaps
from controlkit.preprocessors.skeleton import coco17_to_openpose18
from controlkit.training.cache import cached_passed
from controlkit.training.config import DepthRecipe, EstimatorRecipe, PoseRecipe
from controlkit.training.draws import Draws
from controlkit.training.exporting import save_half
from controlkit.training.task import DrawnTask
from controlkit.training.world import World

if TYPE_CHECKING:
    from transformers import DepthAnythingForDepthEstimation, VitPoseForPoseEstimation

_SIZE = 128
_MEAN = _STD = 0.5
_SCORED = 200
# OpenPose's index of each of COCO's 17 keypoints: nose, eyes, ears, shoulders, elbows, wrists, hips, knees,
# ankles, left before right.
COCO_FROM_OPENPOSE = [0, 15, 14, 17, 16, 5, 2, 6, 3, 7, 4, 11, 8, 12, 9, 13, 10]
_SPREAD = 1.2  # of a joint's Gaussian, in heatmap cells
_RELIEF = 12.0  # weight of a joint's cells over the empty ones, which are 50 times as many


class _Pictures:
    """The training pictures: true ones and, where the recipe names an autoencoder, passed through it."""

    def __init__(
        self, recipe: EstimatorRecipe, world: World, device: torch.device, report: Callable[[str], None]
    ) -> None:
        self.recipe, self.world, self.device = recipe, world, device
        self.passed: NDArray[np.uint8] | None = None
        if recipe.autoencoder is not None:
            vae = load_base(recipe.autoencoder, device=device).vae
            self.passed = cached_passed(world, vae, latent_noise=recipe.latent_noise, report=report)

    def pixel_values(self, indices: list[int], draws: Draws) -> Tensor:
        if self.passed is None:
            return _pixel_values([self.world.picture[i] for i in indices], self.device)
        chosen = draws.chosen(len(indices), self.recipe.passed).tolist()
        sources = [self.passed if passed else self.world.picture for passed in chosen]
        return _pixel_values([source[i] for source, i in zip(sources, indices, strict=True)], self.device)


def _pixel_values(pictures: list[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Pictures as both networks take them: (B, 3, 128, 128), (level / 255 - 0.5) / 0.5."""
    levels = torch.from_numpy(np.stack(pictures)).to(device)
    return ((levels.float() / 255.0 - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()


def _save(model: Any, folder: Path, processor: str, **options: Any) -> None:
    """Write a transformers folder in half precision, with the configuration of its image processor."""
    save_half(model, folder)
    described = {
        "image_processor_type": processor,
        "size": {"height": _SIZE, "width": _SIZE},
        "image_mean": [_MEAN] * 3,
        "image_std": [_STD] * 3,
        **options,
    }
    files.write_json(folder / "preprocessor_config.json", described)


class _EstimatorTask(DrawnTask):
    """A network that estimates something of the bundled world's pictures."""

    name: ClassVar[str]
    """Of the network, among the trained modules."""

    def __init__(
        self,
        recipe: EstimatorRecipe,
        world: World,
        validation: World,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        """Prepare the pictures, and make the network of the recipe's seed."""
        self.recipe, self.world, self.validation, self.device = recipe, world, validation, device
        self.pictures = _Pictures(recipe, world, device, report)
        torch.manual_seed(recipe.seed)
        self.model = self._build().to(device)

    @abstractmethod
    def _build(self) -> Any:
        """The untrained network, of transformers' class."""

    def modules(self) -> dict[str, nn.Module]:
        return {self.name: self.model}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.model.parameters()), "rate": 1.0}]


class PoseTask(_EstimatorTask):
    """Heatmaps of COCO's 17 keypoints: a Gaussian where a joint is seen, nothing where it is not."""

    name = "pose"

    def _build(self) -> Any:
        return _build_pose(self.recipe)

    @cached_property
    def joints(self) -> Tensor:
        """COCO's keypoints in every scene, (N, 17, 3)."""
        return torch.from_numpy(self.world.joints[:, COCO_FROM_OPENPOSE])

    def loss(self, draws: Draws) -> Tensor:
        indices = draws.indices(len(self.world), self.recipe.batch_size)
        heatmaps = self.model(self.pictures.pixel_values(indices, draws)).heatmaps.float()
        target = _gaussians(self.joints[indices].to(self.device), heatmaps.shape[-1])
        return ((1.0 + _RELIEF * target) * (heatmaps - target).square()).mean()

    def sample(self) -> NDArray[np.uint8]:
        """Pictures above the joints that were found in them."""
        from controlkit.preprocessors.drawing import draw_poses

        pictures = [self.validation.picture[i] for i in range(8)]
        poses = [draw_poses([self._find(i)], _SIZE, _SIZE) for i in range(8)]
        return np.vstack([np.hstack(pictures), np.hstack(poses)])

    @torch.no_grad()
    def _find(self, index: int) -> NDArray[np.float64]:
        pixel_values = _pixel_values([self.validation.picture[index]], self.device)
        heatmaps = self.model(pixel_values).heatmaps[0].float().cpu().numpy()
        joints = decode_heatmaps(heatmaps)
        joints[:, :2] = (joints[:, :2] + 0.5) * _SIZE / heatmaps.shape[-1]
        joints[joints[:, 2] < 0.3] = 0.0
        return coco17_to_openpose18(joints)

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        _save(self.model, folder, "VitPoseImageProcessor", do_affine_transform=False)
        scores = [
            pck(self._find(i), self.validation.joints[i], size=float(self.validation.figure_height[i]))
            for i in range(min(_SCORED, len(self.validation)))
        ]
        quality = {"PCK at 0.1 of the figure's height": float(np.mean(scores)), "scenes": len(scores)}
        files.write_json(folder / "quality.json", quality)


def _gaussians(joints: Tensor, cells: int) -> Tensor:
    """(B, 17, 3) joints in pixels -> (B, 17, cells, cells) targets; the centre of cell j is (j + 0.5)
    cells.
    """
    centres = torch.arange(cells, device=joints.device) + 0.5
    at = joints[..., :2] * cells / _SIZE
    dx = (centres - at[..., :1]).square()  # (B, 17, cells)
    dy = (centres - at[..., 1:2]).square()
    squared = dy[..., :, None] + dx[..., None, :]
    return (-0.5 * squared / _SPREAD**2).exp() * joints[..., 2, None, None]


def _build_pose(recipe: PoseRecipe) -> VitPoseForPoseEstimation:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    if recipe.init is not None:
        model = load_part(VitPoseForPoseEstimation, Path(recipe.init), dtype=torch.float32)
        return cast("VitPoseForPoseEstimation", model)
    backbone = VitPoseBackboneConfig(
        image_size=(_SIZE, _SIZE),
        patch_size=(recipe.patch_size, recipe.patch_size),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        mlp_ratio=2,
        out_indices=[recipe.layers],
    )
    return VitPoseForPoseEstimation(
        VitPoseConfig(backbone_config=backbone, num_labels=17, scale_factor=2, use_simple_decoder=True)
    )


class DepthTask(_EstimatorTask):
    """Relative inverse depth: 0 at a picture's farthest point, 1 at its nearest."""

    name = "depth"

    def _build(self) -> Any:
        return _build_depth(self.recipe)

    def loss(self, draws: Draws) -> Tensor:
        indices = draws.indices(len(self.world), self.recipe.batch_size)
        predicted = self.model(self.pictures.pixel_values(indices, draws)).predicted_depth.float()
        target = (
            torch.from_numpy(np.stack([self.world.inverse_depth[i] for i in indices])).float().to(self.device)
        )
        low, high = target.amin(dim=(1, 2), keepdim=True), target.amax(dim=(1, 2), keepdim=True)
        error = predicted - (target - low) / (high - low)
        slopes = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + error.square().mean() + 2.0 * slopes  # outlines are what a map is for

    def sample(self) -> NDArray[np.uint8]:
        """Pictures above their estimated depth."""
        from controlkit.preprocessors import depth_to_map

        pictures = [self.validation.picture[i] for i in range(8)]
        return np.vstack(
            [np.hstack(pictures), np.hstack([depth_to_map(self._estimate(i)) for i in range(8)])]
        )

    @torch.no_grad()
    def _estimate(self, index: int) -> NDArray[np.float32]:
        predicted = self.model(_pixel_values([self.validation.picture[index]], self.device)).predicted_depth
        return np.asarray(predicted[0].float().cpu().numpy())

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        _save(
            self.model,
            folder,
            "DPTImageProcessor",
            keep_aspect_ratio=True,
            ensure_multiple_of=self.recipe.patch_size,
        )
        count = min(_SCORED, len(self.validation))
        errors = [
            depth_rmse(self._estimate(i), self.validation.inverse_depth[i].astype(np.float32))
            for i in range(count)
        ]
        quality = {"RMSE after scale and shift, 1/m": float(np.mean(errors)), "scenes": count}
        files.write_json(folder / "quality.json", quality)


def _build_depth(recipe: DepthRecipe) -> DepthAnythingForDepthEstimation:
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    if recipe.init is not None:
        model = load_part(DepthAnythingForDepthEstimation, Path(recipe.init), dtype=torch.float32)
        return cast("DepthAnythingForDepthEstimation", model)
    width, fusion = recipe.hidden_size, recipe.fusion_size
    backbone = Dinov2Config(
        image_size=_SIZE,
        patch_size=recipe.patch_size,
        hidden_size=width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        mlp_ratio=2,
        layerscale_value=1.0,
        out_indices=list(range(recipe.layers - 3, recipe.layers + 1)),
        reshape_hidden_states=False,
    )
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            patch_size=recipe.patch_size,
            reassemble_hidden_size=width,
            reassemble_factors=[4, 2, 1, 0.5],
            neck_hidden_sizes=[fusion // 2, fusion, fusion, fusion],
            fusion_hidden_size=fusion,
            head_hidden_size=fusion // 2,
        )
    )

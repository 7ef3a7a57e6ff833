"""ViTPose: the keypoints of people whose boxes are known (Xu et al. 2022), through transformers.

transformers' own ``VitPoseImageProcessor`` needs SciPy, which it does not install, for cutting out a person
and for decoding. Both are done here with the same numbers: a box is widened to the network's aspect and
enlarged by 1.25 about its centre, its pixel x goes to ``(x - left) * (w - 1) / width`` in the network's
picture ("unbiased data processing", Huang et al. 2020), and cell j of a heatmap back to ``left + j * width
/ (cells - 1)``.

A network whose preprocessor_config.json says ``"do_affine_transform": false`` knows no boxes: it sees the
whole picture, resized to its input, and the centre of cell j lies at ``(j + 0.5) * width / cells`` in the
picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlkit.folders import read_json
from controlkit.images import resize
from controlkit.preprocessors.heatmaps import decode_heatmaps
from controlkit.preprocessors.weights import PROCESSOR_CONFIG, load_model

_BOX_MARGIN = 1.25


@dataclass(frozen=True)
class _Input:
    """What the network wants to see, from preprocessor_config.json; the defaults are transformers'."""

    width: int = 192
    height: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crops_boxes: bool = True


class VitPose:
    """A ``VitPoseForPoseEstimation`` of COCO's 17 keypoints from a transformers folder.

    Raises:
        ValueError: one line: the folder's files are missing, damaged, or of a network of other keypoints.
    """

    def __init__(self, folder: Path, *, device: str) -> None:
        """Load the network."""
        from transformers import VitPoseForPoseEstimation

        self._input = _read_input(folder)
        self._model = load_model(VitPoseForPoseEstimation, folder, device=device)
        labels = self._model.config.num_labels
        if labels != 17:
            raise ValueError(f"the pose model in {folder} has {labels} keypoints; COCO's 17 are wanted")

    @property
    def wants_boxes(self) -> bool:
        """Whether people must be found first; otherwise the network sees the whole picture as one person."""
        return self._input.crops_boxes

    def keypoints(self, picture: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
        """Return the keypoints (N, 17, 3) of x, y in pixels and score, nominally [0, 1], in a picture.

        ``picture`` is uint8 (H, W, 3). ``boxes`` (N, 4) are left, top, width, height in pixels, one per
        person; a network that wants no boxes takes none and returns N = 1.
        """
        assert self.wants_boxes == (boxes is not None)
        size = (self._input.width, self._input.height)
        if boxes is None:
            joints, cells = self._joints([resize(picture, *size)])
            height, width = picture.shape[:2]
            joints[..., :2] = (joints[..., :2] + 0.5) * np.array([width, height]) / cells
            return joints
        if len(boxes) == 0:
            return np.zeros((0, 17, 3))
        parts = np.stack([_widen(box, aspect=size[0] / size[1]) for box in boxes])
        joints, cells = self._joints([_cut(picture, part, *size) for part in parts])
        joints[..., :2] = parts[:, None, :2] + joints[..., :2] * parts[:, None, 2:] / (cells - 1)
        return joints

    def _joints(self, pictures: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Return what the network sees in pictures of its input size.

        The joints (N, 17, 3) of x, y in cells and score, and the heatmaps' width and height in cells, (2,).
        """
        heatmaps = self._heatmaps(pictures)
        joints = np.stack([decode_heatmaps(of_one_picture) for of_one_picture in heatmaps])
        return joints, np.array([heatmaps.shape[3], heatmaps.shape[2]])

    def _heatmaps(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Return the network's heatmaps (N, 17, h, w) of pictures of its input size."""
        import torch

        levels = np.stack(pictures).astype(np.float32) / 255.0
        normalised = (levels - np.array(self._input.mean, np.float32)) / np.array(self._input.std, np.float32)
        pixel_values = torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous().to(self._model.device)
        options: dict[str, Any] = {}
        if self._model.config.backbone_config.num_experts > 1:  # ViTPose++: data set 0 is COCO
            options["dataset_index"] = torch.zeros(len(pictures), dtype=torch.long, device=self._model.device)
        with torch.no_grad():
            heatmaps = self._model(pixel_values, **options).heatmaps
        return heatmaps.float().cpu().numpy()


def _read_input(folder: Path) -> _Input:
    path = folder / PROCESSOR_CONFIG
    config = read_json(path)
    try:
        size = config.get("size", {"width": _Input.width, "height": _Input.height})
        return _Input(
            width=int(size["width"]),
            height=int(size["height"]),
            mean=tuple(float(x) for x in config.get("image_mean", _Input.mean)),
            std=tuple(float(x) for x in config.get("image_std", _Input.std)),
            crops_boxes=bool(config.get("do_affine_transform", True)),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a pose network's input: {error}") from error


def _widen(box: np.ndarray, *, aspect: float) -> np.ndarray:
    """Return a box (left, top, width, height) widened to an aspect of width / height, and by the margin."""
    left, top, width, height = (float(x) for x in box)
    part_width = max(width, height * aspect) * _BOX_MARGIN
    part_height = max(height, width / aspect) * _BOX_MARGIN
    x, y = left + width / 2, top + height / 2
    return np.array([x - part_width / 2, y - part_height / 2, part_width, part_height])


def _cut(picture: np.ndarray, part: np.ndarray, width: int, height: int) -> np.ndarray:
    """Return a part (left, top, width, height) of a picture, resampled; outside the picture is black."""
    left, top, part_width, part_height = part
    scale_x, scale_y = (width - 1) / part_width, (height - 1) / part_height
    matrix = np.array([[scale_x, 0.0, -left * scale_x], [0.0, scale_y, -top * scale_y]])
    return cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_LINEAR)

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

from collections.abc import Sequence
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
_BATCH = 32
_DATASETS = {17: 0, 133: 5}  # keypoints: ViTPose++'s number of COCO and of COCO-WholeBody


@dataclass(frozen=True)
class _Input:
    """What the network wants to see, from preprocessor_config.json; the defaults are transformers'."""

    width: int = 192
    height: int = 256
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    crops_boxes: bool = True


class VitPose:
    """A ``VitPoseForPoseEstimation`` from a transformers folder: COCO's 17 keypoints or COCO-WholeBody's 133.

    Raises:
        ValueError: one line: the folder's files are missing, damaged, or of a network of other keypoints.
    """

    def __init__(self, folder: Path, *, device: str) -> None:
        """Load the network."""
        from transformers import VitPoseForPoseEstimation

        self._input = _read_input(folder)
        self._model = load_model(VitPoseForPoseEstimation, folder, device=device)
        self.count = int(self._model.config.num_labels)
        """How many keypoints a person has."""
        if self.count not in _DATASETS:
            raise ValueError(
                f"the pose model in {folder} has {self.count} keypoints; COCO's 17 are wanted, "
                "or COCO-WholeBody's 133"
            )
        # A CPU's last bits depend on the size of a batch: there a picture is a batch of its own.
        self._batch = 0 if self._model.device.type == "cpu" else _BATCH

    @property
    def wants_boxes(self) -> bool:
        """Whether people must be found first; otherwise the network sees the whole picture as one person."""
        return self._input.crops_boxes

    def keypoints(self, picture: np.ndarray, boxes: np.ndarray | None = None) -> np.ndarray:
        """Return the keypoints (N, K, 3) of x, y in pixels and score, nominally [0, 1], in a picture.

        ``picture`` is uint8 (H, W, 3). ``boxes`` (N, 4) are left, top, width, height in pixels, one per
        person; a network that wants no boxes takes none and returns N = 1.
        """
        return self.keypoints_of([picture], [boxes])[0]

    def keypoints_of(
        self, pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        """Return the keypoints of several pictures, as :meth:`keypoints`; their people share passes."""
        parts, seen = [], []
        for picture, of_picture in zip(pictures, boxes, strict=True):
            assert self.wants_boxes == (of_picture is not None)
            parts.append(self._parts(picture, of_picture))
            seen.append([self._seen(picture, part) for part in parts[-1]])
        joints, cells = self._joints(seen)
        found = []
        for of_picture, in_cells in zip(parts, joints, strict=True):
            shift, steps = (0.0, cells - 1) if self.wants_boxes else (0.5, cells)
            places = (in_cells[..., :2] + shift) * of_picture[:, None, 2:] / steps
            found.append(np.concatenate([of_picture[:, None, :2] + places, in_cells[..., 2:]], axis=2))
        return found

    def _parts(self, picture: np.ndarray, boxes: np.ndarray | None) -> np.ndarray:
        """Return the parts (N, 4) of a picture that the network sees: left, top, width, height."""
        if boxes is None:
            return np.array([[0.0, 0.0, picture.shape[1], picture.shape[0]]])
        aspect = self._input.width / self._input.height
        return np.array([_widen(box, aspect=aspect) for box in boxes]).reshape(len(boxes), 4)

    def _seen(self, picture: np.ndarray, part: np.ndarray) -> np.ndarray:
        size = (self._input.width, self._input.height)
        return _cut(picture, part, *size) if self.wants_boxes else resize(picture, *size)

    def _joints(self, seen: Sequence[Sequence[np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return what the network sees in pictures of its input size, grouped as they are.

        The joints (N, K, 3) of x, y in cells and score, and the heatmaps' width and height in cells, (2,).
        """
        flat = [picture for group in seen for picture in group]
        sizes = (
            [self._batch] * -(-len(flat) // self._batch) if self._batch else [len(group) for group in seen]
        )
        joints, cells, start = [np.zeros((0, self.count, 3))], np.full(2, 2), 0
        for size in sizes:
            if some := flat[start : start + size]:
                heatmaps = self._heatmaps(some)
                joints.append(np.stack([decode_heatmaps(of_one_picture) for of_one_picture in heatmaps]))
                cells = np.array([heatmaps.shape[3], heatmaps.shape[2]])
            start += size
        ends = np.cumsum([len(group) for group in seen])
        return np.split(np.concatenate(joints), ends[:-1]), cells

    def _heatmaps(self, pictures: list[np.ndarray]) -> np.ndarray:
        """Return the network's heatmaps (N, K, h, w) of pictures of its input size."""
        import torch

        levels = np.stack(pictures).astype(np.float32) / 255.0
        normalised = (levels - np.array(self._input.mean, np.float32)) / np.array(self._input.std, np.float32)
        pixel_values = torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous().to(self._model.device)
        options: dict[str, Any] = {}
        if self._model.config.backbone_config.num_experts > 1:  # ViTPose++ asks for which data set it stands
            index = torch.full((len(pictures),), _DATASETS[self.count], dtype=torch.long)
            options["dataset_index"] = index.to(self._model.device)
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

"""OpenPose's networks: controlnet_aux's classes and weights for the body, the hands and the face."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlkit.devices import check_device
from controlkit.preprocessors.annotators import ANNOTATORS, find_weights, import_annotator
from controlkit.preprocessors.gridmaps import STRIDE
from controlkit.preprocessors.handface import (
    Box,
    decode_face,
    decode_hand,
    face_box,
    face_input,
    hand_boxes,
    hand_inputs,
)
from controlkit.preprocessors.limbs import decode_people, grid_of, scaled_size
from controlkit.preprocessors.skeleton import Poses
from controlkit.preprocessors.weights import fill, load_tensors

BODY_FILE, HAND_FILE, FACE_FILE = "body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"

_NOTICE = "OpenPose's network and weights are licensed by CMU for non-commercial use only"
_noticed: set[str] = set()
_PAD = 128
_LONGEST = 32  # times the shorter side: in thinner pictures nobody is looked for
_BATCH = 8  # pictures per pass, on devices where a pass of several costs less


class OpenPoseNet:
    """OpenPose's body network and, where asked for, those of the hands and the face.

    ``source`` is a folder with the weights, or a hub id ("" for lllyasviel/Annotators). Only the files that
    are needed are looked for. Warns once per process of the licence.

    Raises:
        ValueError: one line: a file is missing, damaged, or holds other weights; the device is not there.
    """

    def __init__(self, source: str = "", *, hands: bool, face: bool, device: str) -> None:
        """Load the networks."""
        self._device = check_device(device)
        self._batch = 1 if self._device.type == "cpu" else _BATCH
        networks = _without_its_package("open_pose/model.py")
        self._body = self._load(networks.bodypose_model(), BODY_FILE, source)
        self._hand = self._load(networks.handpose_model(), HAND_FILE, source) if hands else None
        self._face = None
        if face:
            self._face = self._load(import_annotator("open_pose.face").FaceNet(), FACE_FILE, source)
        if not _noticed:
            _noticed.add(_NOTICE)
            warnings.warn(_NOTICE, stacklevel=2)

    def find(self, pictures: Sequence[np.ndarray]) -> list[Poses]:
        """Return the people in each picture, uint8 (H, W, 3) RGB of any sizes.

        In pictures more than 32 times as long as wide, nobody is looked for.
        """
        reversed_colours = [np.ascontiguousarray(picture[:, :, ::-1]) for picture in pictures]
        bodies = self._bodies(reversed_colours)
        hands = self._hands(reversed_colours, bodies)
        faces = self._faces(reversed_colours, bodies)
        return [
            Poses(people, picture.shape[1], picture.shape[0], hands=hands[i], faces=faces[i])
            for i, (picture, people) in enumerate(zip(pictures, bodies, strict=True))
        ]

    def _bodies(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the bodies in BGR pictures, each (N, 18, 3)."""
        found = [np.zeros((0, 18, 3)) for _ in pictures]
        seen = {i: _padded(picture) for i, picture in enumerate(pictures) if _is_wide_enough(picture)}
        for indices, outputs in self._passes(self._body, seen):
            fields, heatmaps = (output.float().cpu().numpy() for output in outputs)
            for i, of_limbs, of_joints in zip(indices, fields, heatmaps, strict=True):
                found[i] = decode_people(of_joints, of_limbs, grid_of(*pictures[i].shape[:2]))
        return found

    def _hands(self, pictures: Sequence[np.ndarray], bodies: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the hands of all bodies, each (N, 2, 21, 3)."""
        found = [np.zeros((len(people), 2, 21, 3)) for people in bodies]
        if self._hand is None:
            return found
        boxes: dict[tuple[int, int, int], Box] = {}  # picture, person, side
        for i, j, body in _numbered(bodies):
            for side, box in enumerate(hand_boxes(body, *pictures[i].shape[:2])):
                if box is not None:
                    boxes[i, j, side] = box
        inputs = {key: hand_inputs(_cut(pictures[key[0]], box)) for key, box in boxes.items()}
        seen = {(*key, k): scaled for key, scales in inputs.items() for k, scaled in enumerate(scales)}
        outputs: dict[tuple[int, int, int], dict[int, np.ndarray]] = defaultdict(dict)
        for keys, heatmaps in self._passes(self._hand, seen):
            for (*key, k), of_one in zip(keys, heatmaps.float().cpu().numpy(), strict=True):
                outputs[key[0], key[1], key[2]][k] = of_one
        for (i, j, side), (left, top, length) in boxes.items():
            scales = outputs[i, j, side]
            found[i][j, side] = _moved(decode_hand([scales[k] for k in sorted(scales)], length), left, top)
        return found

    def _faces(self, pictures: Sequence[np.ndarray], bodies: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the faces of all bodies, each (N, 70, 3)."""
        from torch.nn.functional import interpolate

        found = [np.zeros((len(people), 70, 3)) for people in bodies]
        if self._face is None:
            return found
        boxes: dict[tuple[int, int], Box] = {}
        for i, j, body in _numbered(bodies):
            box = face_box(body, *pictures[i].shape[:2])
            if box is not None:
                boxes[i, j] = box
        cuts = {key: _cut(pictures[key[0]], box) for key, box in boxes.items()}
        for keys, stages in self._passes(self._face, {key: face_input(cut) for key, cut in cuts.items()}):
            for (i, j), cells in zip(keys, stages[-1], strict=True):
                left, top, _side = boxes[i, j]
                size = cuts[i, j].shape[:2]
                heatmaps = interpolate(cells[None], size, mode="bilinear", align_corners=True)
                found[i][j] = _moved(decode_face(heatmaps[0].float().cpu().numpy()), left, top)
        return found

    def _passes(self, network: Any, seen: dict[Any, np.ndarray]) -> Iterator[tuple[list[Any], Any]]:
        """Yield keys and a network's outputs for pictures uint8 (h, w, 3) BGR, those of one size together."""
        import torch

        by_size: dict[tuple[int, ...], list[Any]] = defaultdict(list)
        for key, picture in seen.items():
            by_size[picture.shape].append(key)
        for keys in by_size.values():
            for start in range(0, len(keys), self._batch):
                some = keys[start : start + self._batch]
                pictures = np.stack([seen[key] for key in some]).transpose(0, 3, 1, 2).astype(np.float32)
                with torch.no_grad():
                    yield some, network(torch.from_numpy(pictures / 256 - 0.5).to(self._device))

    def _load(self, network: Any, file: str, source: str) -> Any:
        """Return a network with the weights of a file, in evaluation mode, without gradients."""
        path = find_weights(file, source)
        tensors = load_tensors(path)
        # The files of the body and the hand lack the first part of each name, the branch.
        in_file = {
            name: name if file == FACE_FILE else name.partition(".")[2] for name in network.state_dict()
        }
        fill(network, {name: tensors[held] for name, held in in_file.items() if held in tensors}, path)
        return network.to(self._device)


def is_openpose(model: str) -> bool:
    """Return whether a model's name means OpenPose: "openpose", its repository, or a folder with it."""
    return model in ("openpose", ANNOTATORS) or (Path(model).expanduser() / BODY_FILE).is_file()


def _without_its_package(file: str) -> Any:
    """Return a module of controlnet_aux that needs nothing but torch; its package would import much more."""
    spec = find_spec("controlnet_aux")
    folders = spec.submodule_search_locations if spec else None
    if not folders:
        raise ValueError(
            "OpenPose's networks need controlnet-aux; install it with `pip install controlnet-aux`"
        )
    module_spec = spec_from_file_location("controlkit_openpose_model", Path(folders[0], file))
    assert module_spec is not None
    assert module_spec.loader is not None
    module = module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def _is_wide_enough(picture: np.ndarray) -> bool:
    height, width = picture.shape[:2]
    return max(height, width) <= _LONGEST * min(height, width)


def _padded(picture: np.ndarray) -> np.ndarray:
    """Return a picture 184 pixels high, padded at the right and bottom to whole cells."""
    height, width = scaled_size(*picture.shape[:2])
    shrinks = picture.shape[0] > 184
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LANCZOS4
    scaled = cv2.resize(picture, (width, height), interpolation=interpolation)
    return np.pad(scaled, ((0, -height % STRIDE), (0, -width % STRIDE), (0, 0)), constant_values=_PAD)


def _numbered(bodies: Sequence[np.ndarray]) -> Iterator[tuple[int, int, np.ndarray]]:
    for i, people in enumerate(bodies):
        for j, body in enumerate(people):
            yield i, j, body


def _cut(picture: np.ndarray, box: Box) -> np.ndarray:
    """Return a box's pixels; a face's box may reach beyond the picture, and is then no square."""
    left, top, side = box
    return picture[top : top + side, left : left + side]


def _moved(points: np.ndarray, left: int, top: int) -> np.ndarray:
    """Return points of a part in the whole picture; absent ones stay zeros."""
    return points + np.array([left, top, 0]) * (points[:, 2:] > 0)

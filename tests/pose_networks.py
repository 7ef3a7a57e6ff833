"""What a pose network might say of made-up people, and OpenPose's network with random weights."""

from pathlib import Path
from typing import Any

import numpy as np

LIMBS = (
    "2-3 2-6 3-4 4-5 6-7 7-8 2-9 9-10 10-11 2-12 12-13 13-14 2-1 1-15 15-17 1-16 16-18 3-17 6-18"  # from 1
)
# Where OpenPose keeps the x component of each limb's field; y follows.
_FIELDS = (12, 20, 14, 16, 22, 24, 0, 2, 4, 6, 8, 10, 28, 30, 34, 32, 36, 18, 26)
_STANDING = np.array(
    [[0, -0.75], [0, -0.5], [-0.2, -0.5], [-0.3, -0.2], [-0.32, 0.08], [0.2, -0.5], [0.3, -0.2], [0.32, 0.08],
     [-0.12, 0.05], [-0.13, 0.5], [-0.13, 0.9], [0.12, 0.05], [0.13, 0.5], [0.13, 0.9],
     [-0.05, -0.8], [0.05, -0.8], [-0.11, -0.77], [0.11, -0.77]]
)  # fmt: skip


def network_output(
    rng: np.random.Generator,
    height: int,
    width: int,
    people: int,
    *,
    noise: float = 0.02,
    hidden: float = 0.15,
) -> tuple[np.ndarray, np.ndarray]:
    """Return heatmaps (19, h, w) and fields (38, h, w) of people who overlap, cross and leave the picture.

    ``hidden`` is the share of joints that cannot be seen; a tenth of the limbs without both joints have a
    field nevertheless.
    """
    y, x = np.mgrid[:height, :width].astype(float)
    heatmaps, fields = np.zeros((19, height, width)), np.zeros((38, height, width))
    for _ in range(people):
        middle = rng.uniform([0.1 * width, 0.3 * height], [0.9 * width, 0.7 * height])
        stretch = [rng.choice([-1, 1]) * rng.uniform(0.8, 1.2), 1]
        joints = middle + height * rng.uniform(0.25, 0.55) * (
            _STANDING * stretch + rng.normal(0, 0.04, (18, 2))
        )
        seen, level = rng.uniform(size=18) > hidden, rng.uniform(0.4, 1.05, 18)
        for k in np.flatnonzero(seen):
            distance2 = (x - joints[k, 0]) ** 2 + (y - joints[k, 1]) ** 2
            blob = level[k] * np.exp(-distance2 / (2 * rng.uniform(0.7, 1.4) ** 2))
            heatmaps[k] = np.maximum(heatmaps[k], blob)
        for limb, channel in zip(LIMBS.split(), _FIELDS, strict=True):
            a, b = (int(number) - 1 for number in limb.split("-"))
            if (seen[a] and seen[b]) or rng.uniform() < 0.1:
                length = max(float(np.hypot(*(joints[b] - joints[a]))), 1e-3)
                u = (joints[b] - joints[a]) / length
                along = (x - joints[a, 0]) * u[0] + (y - joints[a, 1]) * u[1]
                across = (y - joints[a, 1]) * u[0] - (x - joints[a, 0]) * u[1]
                band = (along > -1) & (along < length + 1) & (np.abs(across) < 1.2)
                strength = rng.uniform(0.4, 1)
                fields[channel] += strength * u[0] * band
                fields[channel + 1] += strength * u[1] * band
    heatmaps += rng.normal(0, noise, heatmaps.shape)
    fields += rng.normal(0, noise, fields.shape)
    return heatmaps.astype(np.float32), fields.astype(np.float32)


def fixed_body(open_pose: Any) -> Any:
    """Return controlnet_aux's ``Body`` whose network says what its attribute ``says`` holds."""
    import torch

    class Says(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_parameter("device", torch.nn.Parameter(torch.zeros(1)))

        def forward(self, picture: Any) -> Any:
            heatmaps, fields = body.says
            assert tuple(8 * side for side in heatmaps.shape[1:]) == tuple(picture.shape[2:])
            return torch.from_numpy(fields)[None], torch.from_numpy(heatmaps)[None]

    body = object.__new__(open_pose.body.Body)
    body.model = Says()
    return body


def bodies_of(body: Any, candidate: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """Return controlnet_aux's result as people (N, 18, 3)."""
    people = np.zeros((len(subset), 18, 3))
    for person, found in zip(people, body.format_body_result(candidate, subset), strict=True):
        for joint, keypoint in zip(person, found.keypoints, strict=True):
            if keypoint is not None:
                joint[:] = keypoint.x, keypoint.y, keypoint.score
    return people


def save_openpose(folder: Path, model: Any) -> Path:
    """Save OpenPose's body network with random weights under which it finds many people in any photograph.

    The last layers are set so that few cells are warm and that fields point down and to the right.
    """
    import torch
    from skimage import data

    torch.manual_seed(0)
    network = model.bodypose_model()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            torch.nn.init.zeros_(layer.bias)
    photograph = np.ascontiguousarray(data.astronaut()[64:432:2, 64:432:2, ::-1])
    picture = torch.from_numpy(photograph).permute(2, 0, 1)[None] / 256 - 0.5
    _set_level(network, network.model6_2.Mconv7_stage6_L2, picture, spread=0.35, mean=-0.45)
    _set_level(network, network.model6_1.Mconv7_stage6_L1, picture, spread=0.1, mean=0.6)
    save_network(folder / "body_pose_model.pth", network, drop_branch=True)
    return folder


def save_network(path: Path, network: Any, *, drop_branch: bool) -> None:
    """Save a network's weights as OpenPose's files have them, in half precision to write less."""
    import torch

    names = {name: name.partition(".")[2] if drop_branch else name for name in network.state_dict()}
    torch.save({names[name]: tensor.half() for name, tensor in network.state_dict().items()}, path)


def _set_level(network: Any, layer: Any, picture: Any, *, spread: float, mean: float) -> None:
    import torch

    seen: list[Any] = []
    hook = layer.register_forward_hook(
        lambda _layer, _inputs, output: seen.append(output[0].flatten(1).clone())
    )
    with torch.no_grad():
        network(picture)
        hook.remove()
        scale = spread / seen[0].std(1)
        layer.weight *= scale[:, None, None, None]
        layer.bias.copy_(mean - seen[0].mean(1) * scale)

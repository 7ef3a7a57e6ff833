"""What the detectors of controlnet-aux share: weights, devices, and maps of exactly the picture's size.

They round sizes to multiples of 64, which changes the aspect. Here a picture is brought to the working
resolution with its aspect kept and continued at its right and lower edge up to such a multiple; of the map
that continuation is cut off. A picture whose sides are multiples gives what controlnet-aux gives.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import cv2
import numpy as np

from controlkit.preprocessors.annotators import ANNOTATORS, quietly
from controlkit.preprocessors.maps import Map, Preprocessor
from controlkit.preprocessors.weights import fill, load_tensors

if TYPE_CHECKING:
    import torch

_MULTIPLE = 64


class Detector(Preprocessor):
    """A detector of controlnet-aux.

    ``model`` is "" for its usual weights, another hub id with the same files, or a folder that holds them;
    ``device`` is torch's name. Weights are read as tensors only: nothing in their files is run.
    """

    polarity: ClassVar[str] = "white-on-black"

    def __init__(self, *, model: str, resolution: int, **options: float | str) -> None:
        """Keep what its maps say of how they were made."""
        super().__init__(resolution=resolution)
        self.model = model or ANNOTATORS
        self._options = options

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(self._detect(picture)) for picture in pictures]

    @abstractmethod
    def _detect(self, picture: np.ndarray) -> np.ndarray:
        """Return the map of a picture, both uint8 (H, W, 3)."""

    def _map(self, image: np.ndarray, *, depth: np.ndarray | None = None) -> Map:
        return Map(
            image=image,
            kind=self.kind,
            polarity=self.polarity,
            params=self._options,
            model=self.model,
            depth=depth,
        )


def continued(picture: np.ndarray) -> np.ndarray:
    """Return a picture (H, W, 3) with its last column and row repeated up to multiples of 64."""
    height, width = picture.shape[:2]
    below, right = -height % _MULTIPLE, -width % _MULTIPLE
    return cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REPLICATE)


def run_detector(detector: Any, picture: np.ndarray, **options: Any) -> np.ndarray:
    """Return what a detector of controlnet-aux makes of a picture, uint8 (H, W, 3), at the picture's size."""
    height, width = picture.shape[:2]
    seen = continued(picture)
    side = min(seen.shape[:2])  # with which its own change of size changes nothing
    with np.errstate(over="ignore"):  # their sigmoid, far from zero
        found = detector(seen, detect_resolution=side, image_resolution=side, output_type="np", **options)
    assert found.shape == seen.shape, (found.shape, seen.shape)
    return np.ascontiguousarray(found[:height, :width])


def as_tensor(picture: np.ndarray, network: "torch.nn.Module") -> "torch.Tensor":
    """Return a picture, uint8 (H, W, 3), as float32 (1, 3, H, W), still 0..255, on the network's device."""
    import torch

    device = next(network.parameters()).device
    return torch.from_numpy(picture).to(device).permute(2, 0, 1)[None].float()


def build(
    make: "Callable[[], torch.nn.Module]", path: Path, *, device: str, key: str = "", unused: str = ""
) -> Any:
    """Return the network that ``make`` makes, with the weights of a file, on a device, for inference.

    ``key`` names the entry of the file that holds them; tensors with ``unused`` in their name are left out.

    Raises:
        ValueError: one line: the device is not there, or the weights are damaged or of another network.
    """
    import torch

    from controlkit.devices import check_device

    target = check_device(device)
    tensors = load_tensors(path, key=key)
    if unused:
        tensors = {name: tensor for name, tensor in tensors.items() if unused not in name}
    with quietly(), torch.random.fork_rng(devices=[]):  # making it draws random weights
        network = make()
    fill(network, tensors, path)
    return network.to(target)

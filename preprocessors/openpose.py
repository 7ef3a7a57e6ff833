"""OpenPose maps: the joints of the people in a picture, found by a ViTPose network and drawn."""

from collections.abc import Sequence

import numpy as np

from controlkit.naming import unknown
from controlkit.preprocessors.drawing import STYLES, draw_poses
from controlkit.preprocessors.maps import Map, Preprocessor
from controlkit.preprocessors.people import DETECTOR, PersonDetector
from controlkit.preprocessors.skeleton import Poses, coco17_to_openpose18
from controlkit.preprocessors.vitpose import VitPose
from controlkit.preprocessors.weights import find_model

MODELS = {"vitpose": "usyd-community/vitpose-base-simple"}
"""Short names of pose models on the hub; ViTPose-B has 75.8 AP on COCO and an Apache-2.0 licence."""


class OpenPose(Preprocessor):
    """Poses of the people in a picture, drawn in OpenPose's 18-joint form; the joints travel with the map.

    ``model`` is "vitpose" (the default; photographs, downloaded once), "tiny" (bundled; only for pictures
    of the bundled world), a hub id or a transformers folder. ``detector`` finds the people for models that
    look at one person at a time: a hub id or a folder. Keypoints that score below ``threshold`` (in [0, 1])
    are absent, and a person without any is left out. ``style`` is one of ``drawing.STYLES``; ``device`` is
    torch's name.

    Raises:
        ValueError: one line: a value out of range, an unknown name, missing or damaged weights.
    """

    kind = "openpose"

    def __init__(
        self,
        *,
        model: str = "vitpose",
        threshold: float = 0.3,
        style: str = "v1.1",
        detector: str = DETECTOR,
        device: str = "auto",
        resolution: int = 0,
    ) -> None:
        """Check the options and load the networks."""
        super().__init__(resolution=resolution)
        if not 0 <= threshold <= 1:
            raise ValueError(f"openpose's threshold is {threshold:g}; it must lie in [0, 1]")
        if style not in STYLES:
            raise unknown("draw style", style, STYLES)
        self.model, self.threshold, self.style = model, threshold, style
        self._network = VitPose(find_model("pose", model, MODELS), device=device)
        self._people = PersonDetector(detector, device=device) if self._network.wants_boxes else None

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._map(picture) for picture in pictures]

    def _map(self, picture: np.ndarray) -> Map:
        """Return the poses of a picture and their drawing; a picture without people gives a black map."""
        height, width = picture.shape[:2]
        poses = Poses(self._find(picture), width, height)
        return Map(
            image=draw_poses(poses.people, width, height, style=self.style),
            kind=self.kind,
            polarity="openpose-18",
            params={"threshold": self.threshold, "style": self.style},
            model=self.model,
            poses=poses,
        )

    def _find(self, picture: np.ndarray) -> np.ndarray:
        """Return the people of a uint8 (H, W, 3) picture as poses, float64 (N, 18, 3)."""
        boxes = self._people.boxes(picture) if self._people else None
        keypoints = self._network.keypoints(picture, boxes)
        keypoints[keypoints[..., 2] < self.threshold] = 0.0
        people = [coco17_to_openpose18(person) for person in keypoints if person[:, 2].any()]
        return np.array(people).reshape(len(people), 18, 3)

"""OpenPose maps: the joints of the people in a picture, found by a network and drawn."""

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from controlkit.naming import unknown
from controlkit.preprocessors.drawing import STYLES, USUAL_STYLE, draw_poses
from controlkit.preprocessors.maps import Map, Preprocessor
from controlkit.preprocessors.openposenet import OpenPoseNet, is_openpose
from controlkit.preprocessors.people import DETECTOR, PersonDetector
from controlkit.preprocessors.poseedit import scale_poses
from controlkit.preprocessors.skeleton import LEAST_SCORE, Poses, coco17_to_openpose18, coco133_to_openpose
from controlkit.preprocessors.vitpose import VitPose
from controlkit.preprocessors.weights import find_model

MODELS = {"vitpose": "usyd-community/vitpose-base-simple", "openpose": "lllyasviel/Annotators"}
"""Short names of pose models on the hub. ViTPose-B has 75.8 AP on COCO and an Apache-2.0 licence; OpenPose
knows hands and faces, too, and is for non-commercial use only."""


class OpenPose(Preprocessor):
    """Poses of the people in a picture, drawn in OpenPose's 18-joint form; the joints travel with the map.

    ``model`` is "vitpose" (the default; photographs, downloaded once), "openpose" (CMU's networks through
    controlnet-aux, non-commercial), "tiny" (bundled; only for pictures of the bundled world), a hub id, a
    transformers folder, or a folder of OpenPose's .pth files. ``hands`` and ``face`` are found by "openpose"
    and by networks of COCO-WholeBody's 133 keypoints. ``detector`` finds the people for models that look at
    one person at a time: a hub id or a folder. Points that score below ``threshold`` (in [0, 1]) are
    absent, and a person without any is left out; "auto" is 0.3, or for "openpose" 0, as its own rules decide.
    ``style`` is one of ``drawing.STYLES``; ``device`` is torch's name. With a ``resolution`` the joints are
    found at that scale and drawn at full size.

    Raises:
        ValueError: one line: a value out of range, an unknown name, missing or damaged weights.
    """

    kind = "openpose"

    def __init__(
        self,
        *,
        model: str = "vitpose",
        threshold: float | str = "auto",
        style: str = USUAL_STYLE,
        hands: bool = False,
        face: bool = False,
        detector: str = DETECTOR,
        device: str = "auto",
        resolution: int = 0,
    ) -> None:
        """Check the options and load the networks."""
        super().__init__(resolution=resolution)
        of_openpose = is_openpose(model)
        if of_openpose and detector != DETECTOR:
            raise _needs_no_detector(model)
        self.threshold = _checked_threshold(threshold, 0.0 if of_openpose else LEAST_SCORE)
        if style not in STYLES:
            raise unknown("draw style", style, STYLES)
        self.model, self.style, self.hands, self.face = model, style, hands, face
        self._network: OpenPoseNet | _People
        if of_openpose:
            source = "" if model == "openpose" else model
            self._network = OpenPoseNet(source, hands=hands, face=face, device=device)
        else:
            self._network = _People(model, detector, device=device, parts=hands or face)

    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        return [self._drawn(self._seen(poses)) for poses in self._network.find(pictures)]

    def _resized(self, made: Map, width: int, height: int) -> Map:
        """Return the map drawn anew at its picture's size: lines stay as thick and as sharp."""
        assert made.poses is not None
        drawn = self._drawn(scale_poses(made.poses, width, height))
        return replace(drawn, params=drawn.params | {"resolution": self.resolution})

    def _remark(self, maps: Sequence[Map]) -> None:
        empty = sum(made.poses is not None and not len(made.poses.people) for made in maps)
        if empty:
            of_many = f" in {empty} of {len(maps)} pictures" if len(maps) > 1 else ""
            warnings.warn(f"no person was found{of_many}: the openpose map is black", stacklevel=3)

    def _seen(self, poses: Poses) -> Poses:
        """Return poses without points that score too low, parts that were not asked for, and empty people."""
        people, hands, faces = (
            np.where(points[..., 2:] < self.threshold, 0.0, points) * wanted
            for points, wanted in ((poses.people, True), (poses.hands, self.hands), (poses.faces, self.face))
        )
        kept = (people[..., 2] > 0).any(axis=1)
        return replace(poses, people=people[kept], hands=hands[kept], faces=faces[kept])

    def _drawn(self, poses: Poses) -> Map:
        """Return poses and their drawing; nobody gives a black map."""
        image = draw_poses(
            poses.people, poses.width, poses.height, style=self.style, hands=poses.hands, faces=poses.faces
        )
        return Map(
            image=image,
            kind=self.kind,
            polarity="openpose-18",
            params={
                "threshold": self.threshold,
                "style": self.style,
                "hands": self.hands,
                "face": self.face,
            },
            model=self.model,
            poses=poses,
        )


def _needs_no_detector(model: str) -> ValueError:
    return ValueError(f"the pose model {model} finds the people by itself: leave detector out")


class _People:
    """A ViTPose, and what finds the people for it where it wants boxes."""

    def __init__(self, model: str, detector: str, *, device: str, parts: bool) -> None:
        self._network = VitPose(find_model("pose", model, MODELS), device=device)
        if parts and self._network.count != 133:
            raise ValueError(
                f"the pose model {model} knows neither hands nor faces; model=openpose does, "
                "and so do models of COCO-WholeBody's 133 keypoints"
            )
        if detector != DETECTOR and not self._network.wants_boxes:
            raise _needs_no_detector(model)
        self._people = PersonDetector(detector, device=device) if self._network.wants_boxes else None

    def find(self, pictures: Sequence[np.ndarray]) -> list[Poses]:
        """Return the people in each picture, uint8 (H, W, 3) of any sizes."""
        boxes = [self._people.boxes(picture) if self._people else None for picture in pictures]
        found = self._network.keypoints_of(pictures, boxes)
        return [
            _as_poses(keypoints, *picture.shape[:2])
            for keypoints, picture in zip(found, pictures, strict=True)
        ]


def _as_poses(keypoints: np.ndarray, height: int, width: int) -> Poses:
    """Return keypoints (N, 17 or 133, 3) as poses."""
    count = len(keypoints)
    if keypoints.shape[1] == 17:
        people = [coco17_to_openpose18(person) for person in keypoints]
        return Poses(np.array(people).reshape(count, 18, 3), width, height)
    parts = [coco133_to_openpose(person) for person in keypoints]
    people, hands, faces = ([part[k] for part in parts] for k in range(3))
    return Poses(
        np.array(people).reshape(count, 18, 3),
        width,
        height,
        hands=np.array(hands).reshape(count, 2, 21, 3),
        faces=np.array(faces).reshape(count, 70, 3),
    )


def _checked_threshold(threshold: float | str, default: float) -> float:
    if threshold == "auto":
        return default
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        given = threshold if isinstance(threshold, str) else f"{threshold:g}"
        raise ValueError(f"openpose's threshold is {given}; it must lie in [0, 1], or be auto")
    return threshold

"""Finding the people in a picture, for pose networks that look at one person at a time."""

import numpy as np

from controlkit.preprocessors.weights import find_model, load_model, load_processor

DETECTOR = "PekingU/rtdetr_r50vd_coco_o365"
"""RT-DETR (Zhao et al. 2024), trained on COCO and Objects365; Apache-2.0."""

_THRESHOLD = 0.3


class PersonDetector:
    """Any object detector that transformers knows and that has a label "person".

    ``name`` is a hub id or a folder.

    Raises:
        ValueError: one line: there is no such model, it is damaged, or it does not know people.
    """

    def __init__(self, name: str = DETECTOR, *, device: str) -> None:
        """Load the network."""
        from transformers import AutoModelForObjectDetection

        folder = find_model("person", name, {})
        self._model = load_model(AutoModelForObjectDetection, folder, device=device)
        self._processor = load_processor(folder)
        labels = {label.lower(): index for index, label in self._model.config.id2label.items()}
        if "person" not in labels:
            raise ValueError(f"the detector {name} has no label 'person'")
        self._person = labels["person"]

    def boxes(self, picture: np.ndarray) -> np.ndarray:
        """Return the people's boxes in a uint8 (H, W, 3) picture, likeliest first.

        float64 (N, 4): left, top, width, height in pixels, clipped to the picture; N may be 0.
        """
        import torch

        height, width = picture.shape[:2]
        inputs = self._processor(picture, input_data_format="channels_last", return_tensors="pt")
        with torch.no_grad():
            outputs = self._model(**inputs.to(self._model.device))
        found = self._processor.post_process_object_detection(
            outputs, threshold=_THRESHOLD, target_sizes=[(height, width)]
        )[0]
        is_person = found["labels"] == self._person
        order = torch.argsort(found["scores"][is_person], descending=True)
        corners = found["boxes"][is_person][order].cpu().double().numpy()
        corners = np.clip(corners, 0, [width, height, width, height])
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        return boxes[(boxes[:, 2] >= 1) & (boxes[:, 3] >= 1)]

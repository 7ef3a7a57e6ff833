"""Lines by the detectors of controlnet-aux: white on black."""

import math
from typing import Any

import cv2
import numpy as np

from controlkit.preprocessors.annotators import find_weights, import_annotator
from controlkit.preprocessors.detectors import Detector, build, continued, run_detector


class Hed(Detector):
    """Soft edges by holistically nested detection (HED, Xie and Tu 2015; lllyasviel's network, Apache-2.0).

    ``safe`` cuts the edges to a few levels, in which no traces of the picture can hide; ``scribble`` gives
    bold binary lines instead. ``resolution`` is the shorter side at which it works. ``model`` and ``device``:
    see :class:`Detector`; the weights are ControlNetHED.pth.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux.
    """

    kind = "hed"

    def __init__(
        self,
        *,
        model: str = "",
        device: str = "auto",
        safe: bool = False,
        scribble: bool = False,
        resolution: int = 512,
    ) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution, safe=safe, scribble=scribble)
        path = find_weights("ControlNetHED.pth", model)
        module = import_annotator("hed")
        self._detector = module.HEDdetector(build(module.ControlNetHED_Apache2, path, device=device))

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return run_detector(self._detector, picture, **self._options)


class PidiNet(Detector):
    """Soft edges by pixel difference networks (PiDiNet, Su et al. 2021).

    ``safe``, ``scribble`` and ``resolution`` as in :class:`Hed`; the weights are table5_pidinet.pth.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux.
    """

    kind = "pidinet"

    def __init__(
        self,
        *,
        model: str = "",
        device: str = "auto",
        safe: bool = False,
        scribble: bool = False,
        resolution: int = 512,
    ) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution, safe=safe, scribble=scribble)
        path = find_weights("table5_pidinet.pth", model)
        module = import_annotator("pidi")
        network = build(module.pidinet, path, device=device, key="state_dict")
        self._detector = module.PidiNetDetector(network)

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return run_detector(self._detector, picture, **self._options)


class Mlsd(Detector):
    """Straight lines (M-LSD, Gu et al. 2022): one pixel wide, binary; for rooms and buildings.

    ``score``, from 0 to 1, is how sure a line must be, ``distance`` how long, in pixels at half the working
    ``resolution``. The weights are mlsd_large_512_fp32.pth.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux, an option out of range.
    """

    kind = "mlsd"

    def __init__(
        self,
        *,
        model: str = "",
        device: str = "auto",
        score: float = 0.1,
        distance: float = 0.1,
        resolution: int = 512,
    ) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution, score=score, distance=distance)
        if not 0 <= score <= 1:
            raise ValueError(f"mlsd's score is {score:g}; it must be from 0 to 1")
        if not 0 <= distance < math.inf:
            raise ValueError(f"mlsd's distance is {distance:g}; it must be 0 or more pixels")
        self._score, self._distance = score, distance
        path = find_weights("mlsd_large_512_fp32.pth", model)
        module = import_annotator("mlsd")
        self._network = build(module.MobileV2_MLSD_Large, path, device=device)
        self._find_lines = module.pred_lines

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        drawn = np.zeros_like(picture)
        for line in self._lines(continued(picture)):
            left, top, right, bottom = (int(number) for number in line)
            cv2.line(drawn, (left, top), (right, bottom), (255, 255, 255), 1)
        return drawn

    def _lines(self, picture: np.ndarray) -> Any:
        """Return lines (x, y, x, y) in pixels. (controlnet-aux's own call turns every failure into black.)"""
        import torch

        try:
            with torch.no_grad():
                shape = list(picture.shape[:2])
                return self._find_lines(picture, self._network, shape, self._score, self._distance)
        except IndexError:  # where it finds none
            return ()


class Lineart(Detector):
    """Drawn lines (Informative Drawings, Chan et al. 2022): white on black.

    ``coarse`` takes the network with fewer, bolder lines. The weights are sk_model.pth, for ``coarse``
    sk_model2.pth.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux.
    """

    kind = "lineart"

    def __init__(
        self, *, model: str = "", device: str = "auto", coarse: bool = False, resolution: int = 512
    ) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution, coarse=coarse)
        path = find_weights("sk_model2.pth" if coarse else "sk_model.pth", model)
        module = import_annotator("lineart")
        network = build(lambda: module.Generator(3, 1, 3), path, device=device)
        self._detector = module.LineartDetector(network, network)

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return run_detector(self._detector, picture)


class LineartAnime(Detector):
    """Lines of drawn pictures (lllyasviel's network for anime): white on black. The weights are netG.pth.

    Raises:
        ValueError: one line: missing or damaged weights, no controlnet-aux.
    """

    kind = "lineart_anime"

    def __init__(self, *, model: str = "", device: str = "auto", resolution: int = 512) -> None:
        """Load the network."""
        super().__init__(model=model, resolution=resolution)
        path = find_weights("netG.pth", model)
        module = import_annotator("lineart_anime")
        network = build(lambda: _anime_network(module), path, device=device)
        self._detector = module.LineartAnimeDetector(network)

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        return run_detector(self._detector, picture)


class LineartStandard(Detector):
    """Lines without a network: where a picture is darker than its surroundings. White on black.

    ``sigma`` is the width of the Gaussian that gives the surroundings, in pixels at the working
    ``resolution``; ``intensity`` the levels (of 255) below which a difference does not count as a line when
    the map's brightness is set. The values are controlnet-aux's, its changes of size left out.

    Raises:
        ValueError: an option is out of range.
    """

    kind = "lineart_standard"

    def __init__(self, *, sigma: float = 6.0, intensity: float = 8.0, resolution: int = 512) -> None:
        """Check and keep the options."""
        super().__init__(model="", resolution=resolution, sigma=sigma, intensity=intensity)
        if not 0 < sigma <= 100:
            raise ValueError(f"lineart_standard's sigma is {sigma:g}; it must be above 0 and at most 100")
        if not 0 <= intensity <= 255:
            raise ValueError(f"lineart_standard's intensity is {intensity:g}; it must be from 0 to 255")
        self.model = ""
        self._sigma, self._intensity = sigma, intensity

    def _detect(self, picture: np.ndarray) -> np.ndarray:
        values = picture.astype(np.float32)
        around = cv2.GaussianBlur(values, (0, 0), self._sigma)
        darker = (around - values).min(axis=2).clip(0, 255)
        lines = darker[darker > self._intensity]
        typical = max(16.0, float(np.median(lines))) if lines.size else 16.0
        levels = (darker / np.float32(typical) * 127).clip(0, 255).astype(np.uint8)
        return cv2.merge([levels] * 3)


def _anime_network(module: Any) -> Any:
    import functools

    import torch

    norm = functools.partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
    return module.UnetGenerator(3, 1, 8, 64, norm_layer=norm, use_dropout=False)

"""What a picture in the making will be: shown now and then, small, in a file or by a function."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from controlkit import images
from controlkit.generate_plan import PREVIEW_CHUNK

if TYPE_CHECKING:
    import torch

    from controlkit.base import Base

PREVIEW_SECONDS = 1.0  # between two looks at the picture at hand
Show = Callable[[np.ndarray], None]
"""Is given a small picture, uint8 (H, W, 3)."""


class Preview:
    """A small picture of what the latents at hand will be, in a file or handed to a function."""

    def __init__(self, place: Path | Show, base: Base) -> None:
        self.place, self.base, self.last = place, base, 0.0

    def __call__(self, predicted: torch.Tensor) -> None:
        """Show predicted latents (B, C, h, w), the first of them, at half the size; now and then.

        Those that are no picture yet are not shown: at a step of pure noise a prediction of the noise tells
        none, and the generation goes on.
        """
        import torch

        now = time.monotonic()
        if now - self.last < PREVIEW_SECONDS:
            return
        small = torch.nn.functional.avg_pool2d(predicted[:1], 2)
        decoded = self.base.decode_latents(small)
        if bool(torch.isfinite(decoded).all()):
            self._show(decoded)
        self.last = time.monotonic()

    def _show(self, decoded: torch.Tensor) -> None:
        (picture,) = images.tensor_to_pictures(decoded)
        if isinstance(self.place, Path):
            images.write_png(self.place, picture, text={PREVIEW_CHUNK: "this picture is not finished"})
        else:
            self.place(picture)

    def close(self) -> None:
        """Remove the file."""
        if isinstance(self.place, Path):
            self.place.unlink(missing_ok=True)

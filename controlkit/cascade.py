"""Two stages: a picture at the base's own size, then the same larger and refined under the same control.

A base that was trained for 512 pixels repeats itself at 1024. Its composition comes from the first stage; the
second starts from that picture, enlarged, with a part of the noise (A1111's "hires. fix").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit import images, limits
from controlkit.sampling import generate
from controlkit.starting import Start

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.control import Control


def larger_size(width: int, height: int, factor: float) -> tuple[int, int]:
    """Width and height of the second stage. Raises ValueError as `limits.enlarged`."""
    larger = limits.enlarged(width, height, factor)
    assert larger[0] is not None
    assert larger[1] is not None
    return larger[0], larger[1]


def refine(
    base: Base,
    prompt: str,
    picture: np.ndarray,
    *,
    factor: float = 2.0,
    strength: float = 0.5,
    seed: int = 0,
    controls: Sequence[Control] = (),
    start: Start | None = None,
    **options: Any,
) -> np.ndarray:
    """The second stage: a picture, uint8 (H, W, 3), `factor` times as large, refined under its controls.

    picture: whatever `images.load_picture` takes. strength: above 0, up to 1: the share of the steps that are
    taken. controls: with maps of the larger picture where there are any; others are resized. start: what the
    first stage started from; outside of its hole the result has its pixels, at the larger size. options: of
    `sampling.generate`; with `tiles` memory stays bounded.
    """
    picture = images.load_picture(picture)
    width, height = larger_size(picture.shape[1], picture.shape[0], factor)
    refined = Start(images.resize(picture, width, height), strength)
    if start is not None and start.mask is not None:
        whole = start.fitted(width, height)
        refined = Start(whole.pasted(refined.picture), strength, whole.mask, start.paste)
    return generate(
        base,
        prompt,
        controls=controls,
        start=refined,
        seeds=[seed],
        width=width,
        height=height,
        **options,
    )[0]

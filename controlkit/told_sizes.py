"""What SDXL is told of a picture's sizes, as it was of those that it was trained on.

Beside the text it knows the size that a picture had before it was scaled, the corner at which it was cropped
and the size that was asked for (Podell et al. 2023, arXiv:2307.01952, section 2.2). As the paper
shows, a small original makes pictures blurred, a corner makes them cut off. Needs neither torch nor numpy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from controlkit.limits import is_whole

MOST_PIXELS = 32768  # of a side: float16, in which networks are told, ends before the double
_WRITTEN = re.compile(r"(\d{1,9})[x×](\d{1,9})(?:\+(\d{1,9})\+(\d{1,9}))?")  # as ImageMagick writes a place


@dataclass(frozen=True)
class Sizes:
    """Sizes in pixels as (height, width), the corner as (top, left); None is what is generated.

    diffusers' ``original_size``, ``crops_coords_top_left`` and ``target_size``. Raises ValueError for numbers
    that are not whole, or outside 1 to 32768 (of the corner: 0 to 32768).
    """

    original: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)
    target: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, pair, least in (
            ("original", self.original, 1),
            ("corner", self.corner, 0),
            ("target", self.target, 1),
        ):
            if pair is None and name != "corner":
                continue
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(is_whole, pair)):
                raise ValueError(
                    f"sizes that SDXL is told: {name} must be two whole numbers, not {pair!r:.60}"
                )
            if not all(least <= side <= MOST_PIXELS for side in pair):
                raise ValueError(
                    f"sizes that SDXL is told: {name} must be from {least} to {MOST_PIXELS}, not"
                    f" {pair[0]} and {pair[1]}"
                )

    def ids(self, *, height: int, width: int) -> list[int]:
        """The six numbers of diffusers' ``add_time_ids`` for a picture that is generated at this size."""
        here = (height, width)
        return [*(self.original or here), *self.corner, *(self.target or here)]


def parse_sizes(text: str, name: str) -> Sizes:
    """Read WIDTHxHEIGHT, or WIDTHxHEIGHT+X+Y with the corner of a crop; "" is what is generated, whole.

    name: what messages call it. Raises ValueError for anything else.
    """
    if not text:
        return Sizes()
    match = _WRITTEN.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{name} is WIDTHxHEIGHT or WIDTHxHEIGHT+X+Y in pixels, as 2048x1536, not {text!r:.60}"
        )
    width, height, left, top = (int(number or 0) for number in match.groups())
    try:
        return Sizes((height, width), (top, left))
    except ValueError as error:
        raise ValueError(f"{name}={text}: {str(error).partition(': ')[2]}") from None

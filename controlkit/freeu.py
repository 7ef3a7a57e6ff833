"""FreeU: the decoder trusts its own features more, and the low frequencies of the encoder's less.

Si et al. 2023, arXiv:2309.11497, as diffusers' blocks do it: in the two innermost blocks of the U-Net's
decoder half of the channels are multiplied by b1 and b2, and the lowest frequencies of what the encoder (and
with it a ControlNet) hands them by s1 and s2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from typing import Any

from controlkit import limits


@dataclass(frozen=True)
class FreeU:
    """The four factors, each above 0 and at most 10: 1 changes nothing.

    b1, b2: of the decoder's own features, in its innermost block and the next one. s1, s2: of the lowest
    frequencies of the skips there. diffusers' documentation gives 1.5, 1.6, 0.9, 0.2 for SD1.5; 1.4, 1.6,
    0.9, 0.2 for SD2.1; and 1.3, 1.4, 0.9, 0.2 for SDXL.

    Raises ValueError for a number outside its range.
    """

    b1: float
    b2: float
    s1: float
    s2: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < limits.number(value) <= 10:
                raise ValueError(
                    f"freeu's {field.name} must be a number above 0 and at most 10, not {value!r}"
                )


def parse_freeu(text: str) -> FreeU:
    """What "B1,B2,S1,S2" says. Raises ValueError for anything else."""
    try:
        b1, b2, s1, s2 = map(float, text.split(","))
    except ValueError:
        example = "1.5,1.6,0.9,0.2"
        raise ValueError(f"freeu takes four numbers, B1,B2,S1,S2, as {example}, not {text!r}") from None
    return FreeU(b1, b2, s1, s2)


@contextlib.contextmanager
def freed(unet: Any, freeu: FreeU | None) -> Iterator[None]:
    """Within the block a U-Net works by ``freeu``, behind it as before; None leaves it as it is."""
    if freeu is None:
        yield
        return
    names = [field.name for field in fields(FreeU)]
    before = [{name: getattr(block, name, None) for name in names} for block in unet.up_blocks]
    for block in unet.up_blocks:
        for name, value in zip(names, astuple(freeu), strict=True):
            setattr(block, name, value)
    try:
        yield
    finally:
        for block, values in zip(unet.up_blocks, before, strict=True):
            for name, value in values.items():
                setattr(block, name, value)

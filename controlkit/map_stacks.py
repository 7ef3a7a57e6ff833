"""Maps of several kinds that a network was trained to take as one input, one behind the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from controlkit import images
from controlkit.formats.description import kinds_at_once
from controlkit.kinds import kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from controlkit.adapters import Adapter


def kinds_in(adapter: Adapter) -> list[str]:
    """The kinds of maps in an adapter's one input, in their order; [] where it takes a map at a time."""
    is_union = kind_of(adapter.controlnet).name == "controlnet-union"
    return kinds_at_once(adapter.info.map, is_union=is_union)


def is_whole(adapter: Adapter, kinds: Sequence[str]) -> bool:
    """Whether what is given is an adapter's input as it is: also a picture with a grey map per channel."""
    return not kinds_in(adapter) or (len(kinds) == 1 and adapter.info.map.channels == 3)


def check_given(adapter: Adapter, kinds: Sequence[str], settings: Sequence[Sequence[object]]) -> None:
    """Raise ValueError unless every kind of an adapter's input is given once, with the same settings."""
    wanted = kinds_in(adapter)
    one_input = f"adapter {adapter.name} takes the maps {', '.join(wanted)} as one input"
    for kind in wanted:
        if kinds.count(kind) != 1:
            how_often = "missing" if kind not in kinds else "given twice"
            raise ValueError(f"{one_input}, each once: {kind} is {how_often}")
    for kind in kinds:
        if kind not in wanted:
            raise ValueError(f"{one_input}, and {kind} is none of them")
    if any(other != settings[0] for other in settings):
        raise ValueError(f"{one_input}: give them the same scale, window, mode and mask")


def stack(adapter: Adapter, maps: Mapping[str, np.ndarray | Tensor]) -> Tensor:
    """An adapter's input, float32 (1, C, H, W) in [0, 1], of a map of each kind, uint8 (H, W, 3).

    Raises ValueError for a coloured one where the network was trained with grey ones, and for a tensor.
    """
    kinds = kinds_in(adapter)
    grey = adapter.info.map.channels == len(kinds)
    parts = [_part(maps[kind], kind, grey=grey) for kind in kinds]
    return images.levels_to_cond(images.maps_to_levels([np.concatenate(parts, axis=2)]))


def _part(image: np.ndarray | Tensor, kind: str, *, grey: bool) -> np.ndarray:
    if not isinstance(image, np.ndarray):
        raise ValueError(f"the {kind} map is made of the picture to start from, and cannot be one of several")
    if grey and (image != image[..., :1]).any():
        raise ValueError(f"this control network takes grey maps, and the {kind} map is coloured")
    return image[..., :1] if grey else image

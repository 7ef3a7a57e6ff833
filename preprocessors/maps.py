"""What every preprocessor returns, and what it is."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from controlkit.preprocessors.skeleton import Poses

if TYPE_CHECKING:
    from controlkit.images import Source


@dataclass(frozen=True, eq=False, kw_only=True)
class Map:
    """A conditioning map and what made it."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB, exactly the size of its picture."""
    kind: str
    """"canny", "depth" or "openpose"."""
    polarity: str
    """How values are to be read: "white-on-black", "near-is-white" or "openpose-18"."""
    params: dict[str, float | str] = field(default_factory=dict)
    """The options that were in force, defaults included."""
    model: str | None = None
    """The network's name, hub id or folder, as it was asked for; None where there is none."""
    poses: Poses | None = None
    """For poses, the joints that were drawn."""


class Preprocessor(Protocol):
    """Makes one kind of map from any picture that :func:`controlkit.images.load_picture` reads."""

    @property
    def kind(self) -> str:
        """The kind of map, as :func:`controlkit.preprocessors.get` knows it."""

    def __call__(self, image: "Source") -> Map:
        """Return the map of a picture. Raises ValueError where it cannot be read as one."""

"""What every preprocessor returns, and what it is."""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import numpy as np

from controlkit.files import PathLike
from controlkit.images import at_resolution, load_pictures, resize, resize_lines, write_png
from controlkit.preprocessors.skeleton import Poses

if TYPE_CHECKING:
    from controlkit.images import Source

POLARITIES = (
    "white-on-black",  # lines: canny, soft edges, scribbles, line art
    "near-is-white",  # depth
    "openpose-18",  # poses
    "normals",  # red: left, green: top, blue: to the viewer
    "colours",  # a rearranged picture
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Map:
    """A conditioning map and what made it."""

    image: np.ndarray
    """uint8 (H, W, 3) RGB, exactly the size of its picture."""
    kind: str
    """What :func:`controlkit.preprocessors.get` was asked for: "canny", "depth", "openpose" ..."""
    polarity: str
    """How values are to be read: one of ``POLARITIES``."""
    params: dict[str, float | str] = field(default_factory=dict)
    """The options that were in force, defaults included."""
    model: str | None = None
    """The network's name, hub id or folder, as it was asked for; None where there is none."""
    poses: Poses | None = None
    """For poses, the joints that were drawn."""
    depth: np.ndarray | None = None
    """For depth, what the map was made from: float32 (H, W) inverse depth, larger is nearer."""

    def __post_init__(self) -> None:
        """Hold the contract."""
        assert self.image.dtype == np.uint8, self.image.dtype
        assert self.image.ndim == 3, self.image.shape
        assert self.image.shape[2] == 3, self.image.shape
        assert self.polarity in POLARITIES, self.polarity

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Be the image to numpy, and so to whatever takes a picture or map."""
        return np.array(self.image, dtype=dtype, copy=copy)

    def save(self, path: PathLike, *, durable: bool = True) -> None:
        """Write the image as a PNG, atomically, the same bytes as ``controlkit preprocess``.

        A text chunk "controlkit" says what made it: JSON with its kind, polarity, parameters and model.
        Poses and depth are written by ``write_poses`` and ``write_depth_npy``.

        Raises:
            ValueError: as :func:`controlkit.files.write_bytes`.
        """
        note = {"kind": self.kind, "polarity": self.polarity, "params": self.params}
        if self.model is not None:
            note["model"] = self.model
        plain = self.poses is not None or self.is_binary
        write_png(path, self.image, text={"controlkit": json.dumps(note)}, plain=plain, durable=durable)

    @property
    def is_binary(self) -> bool:
        """Whether every value is 0 or 255."""
        return not bool((self.image + np.uint8(1) > 1).any())  # 255 + 1 is 0


class Preprocessor(ABC):
    """Makes one kind of map from any picture that :func:`controlkit.images.load_picture` reads.

    ``resolution`` (0: off) is the shorter side, in pixels, at which a map is computed; it is then brought to
    its picture's size. Detectors see other things at other scales: small ones give coarse structure.
    """

    kind: ClassVar[str]
    """The kind of map, as :func:`controlkit.preprocessors.get` knows it."""

    def __init__(self, *, resolution: int = 0) -> None:
        """Check and keep the resolution."""
        if resolution and not 16 <= resolution <= 8192:
            raise ValueError(
                f"{self.kind}'s resolution is {resolution}; it must be 0 (the picture's own) or 16 to 8192"
            )
        self.resolution = resolution

    @overload  # a str is a Source and a Sequence[str]: one picture, as the first says
    def __call__(self, image: "Source") -> Map: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, image: "Sequence[Source]") -> list[Map]: ...
    def __call__(self, image: "Source | Sequence[Source]") -> Map | list[Map]:
        """Return the map of a picture, or a list with the map of each picture of a batch.

        A batch is a list or tuple of pictures, an array (N, H, W, C) or a tensor (N, C, H, W).

        Raises:
            ValueError: a picture cannot be read as one.
        """
        pictures, is_batch = self.load(image)
        maps = self.extract(pictures)
        self._remark(maps)
        return maps if is_batch else maps[0]

    def load(self, image: "Source | Sequence[Source]") -> tuple[list[np.ndarray], bool]:
        """Return what :meth:`extract` takes for a picture or a batch, and whether it was a batch.

        Raises:
            ValueError: a picture cannot be read as one.
        """
        return load_pictures(image)

    def extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        """Return the map of each picture, uint8 (H, W, 3) of any sizes: what a call does after loading."""
        if not self.resolution:
            return self._extract(pictures)
        maps = self._extract([at_resolution(picture, self.resolution) for picture in pictures])
        return [
            self._resized(made, picture.shape[1], picture.shape[0])
            for made, picture in zip(maps, pictures, strict=True)
        ]

    def _remark(self, maps: Sequence[Map]) -> None:  # noqa: B027
        """Warn of what whoever calls this preprocessor should know of its maps; by default of nothing."""

    @abstractmethod
    def _extract(self, pictures: Sequence[np.ndarray]) -> list[Map]:
        """Return the map of each picture at the picture's own size."""

    def _resized(self, made: Map, width: int, height: int) -> Map:
        """Return a map at another size: binary maps stay binary, others are resampled smoothly."""
        change = resize_lines if made.is_binary else resize
        params = made.params | {"resolution": self.resolution}
        depth = None if made.depth is None else resize(made.depth, width, height)
        return replace(made, image=change(made.image, width, height), params=params, depth=depth)

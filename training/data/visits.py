"""What a visit sees of an example: a view of its picture, and the map of that view.

Every result is a function of (index, view, seed): neither the order of calls nor the thread matters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from controlkit import images
from controlkit.naming import unknown
from controlkit.training.data import map_files
from controlkit.training.data.map_use import STYLE, MapUse, idle_options, uses_of
from controlkit.training.data.mirroring import mirrored_drawing, mirrored_normals
from controlkit.training.data.views import View, look, make_views, nearest_shape, shapes
from controlkit.training.draws import derived_seed

if TYPE_CHECKING:
    from controlkit.preprocessors import Poses
    from controlkit.training.config_adapter import DataRecipe
    from controlkit.training.data.examples import Example, Examples, Piece
    from controlkit.training.data.map_files import Sense
    from controlkit.training.data.views import Sampling

_BLUR = (0.4, 2.0)  # pixels, the ends of the spread of map_blur
FARTHEST_ASPECT = 1.1
"""Of a map's aspect to its picture's; annotators stretch maps to multiples of 64, which is less than this."""
_OF_JOINTS = "data.pose_drop and data.pose_jitter change the joints of poses as JSON"
_COLOURED = {"normal", "normalbae", "openpose", "shuffle"}


@dataclass(frozen=True)
class Visit:
    """One look at one example."""

    index: int
    lap: int
    """How often every example had been visited before."""
    seed: int
    """For whatever else is drawn for this visit."""
    view: int
    """The number of the view among those of the example."""


class Visits:
    """The pictures and maps that the visits to a data set see.

    ``sizes`` are those of the pictures, (width, height), upright; None for one that could not be read.
    ``kind`` is the kind of map. Maps come from files or are made of the pictures (``data.maps``).

    Maps from files may be of another size than their picture; they are resized with it. Depth in more than 8
    bits has its own range as black to white, near is white; ``data.options`` may hold ``metric`` (values grow
    with the distance) and ``fill`` (holes are filled from around them). Poses as JSON are scaled, cut and
    mirrored as joints and drawn at the final size, with limbs running out of the picture; ``data.options``
    may hold ``style``; those of the kind's preprocessor have no use then. ``data.pose_drop`` and
    ``data.pose_jitter`` leave out and move joints, drawn from the visit's seed. Mirrored normals change red;
    mirrored drawings of poses exchange the colours of left and right. Where several maps are stacked, each
    one's column says what it is (a name with "depth", "normal" or "pose" in it); else ``kind`` does.

    Raises:
        ValueError: one line: an unknown kind of map to be made, an unknown option, a map that is missing,
            one that cannot be mirrored, or joints to be changed where there are none.
    """

    channels: int
    """Of a map, all stacked ones together."""
    fixed: bool
    """Whether the map of a view is the same at every visit, so that it may be kept."""
    map_settings: str
    """All that decides a view's map beside its pieces, the picture's size and the visit's seed."""
    made: bool
    """Whether maps are made of the pictures, not read from files."""
    shapes: list[tuple[int, int]]
    """Widths and heights that are trained on."""
    shape_of: list[int]
    """For each example the number of its shape among ``shapes``; -1 where the picture could not be read."""
    sizes: list[tuple[int, int]]
    """Width and height of each picture; (0, 0) where it could not be read."""

    def __init__(
        self,
        examples: Examples,
        sizes: Sequence[tuple[int, int] | None],
        *,
        data: DataRecipe,
        kind: str,
        resolution: int,
        seed: int,
    ) -> None:
        assert len(sizes) == len(examples), (len(sizes), len(examples))
        self._examples, self.sizes = examples, [size or (0, 0) for size in sizes]
        self._data, self._kind, self._seed = data, kind, seed
        self._grey = data.map_mode == "grey"
        self.shapes = shapes(data, resolution=resolution)
        self.shape_of = [-1 if size is None else nearest_shape(size, self.shapes) for size in sizes]
        self._first = next((index for index, shape in enumerate(self.shape_of) if shape >= 0), None)
        has_files = self._first is not None and bool(examples[self._first].maps)
        self.made = is_made = data.maps == "made" or (data.maps == "auto" and not has_files)
        self._maker = _maker(kind, data) if is_made else None
        self._count = 1 if is_made else self._count_maps()
        self._uses = uses_of(data, kind=kind, count=self._count)
        self._senses = [use.sense for use in self._uses]
        self.channels = self._count * (1 if self._grey else 3)
        self._moves_joints = data.pose_drop > 0 or data.pose_jitter > 0
        still = data.map_blur == 0 and not self._moves_joints
        self.fixed = still and (self._maker is None or self._maker.fixed)
        made_of = (self._grey, kind) if is_made else (self._grey, *self._senses)
        idle = [] if is_made else idle_options(data, kind=kind, count=self._count)
        options = {name: value for name, value in data.options.items() if name not in idle}
        self.map_settings = f"{'made' if is_made else 'read on black'} {made_of} {sorted(options.items())}"
        if self._maker is None:
            self._style = _draw_style(options)
            self._check_files()
        elif self._moves_joints:
            raise ValueError(f"{_OF_JOINTS}; here the maps are made of the pictures (data.maps)")

    def views(self, index: int) -> list[View]:
        """Every view that a visit to an example can have; the same whatever the recipe's seed is.

        Raises ValueError where the example's picture could not be read.
        """
        size = self._size(index)
        shape = self.shapes[self.shape_of[index]]
        return make_views(size, shape, data=self._data, key=f"example {index}")

    def pieces(self, index: int) -> tuple[Piece, ...]:
        """What the maps of an example come from: its files, or the picture."""
        example = self._examples[index]
        return example.maps if self._maker is None else (example.picture,)

    def visit(self, index: int, lap: int) -> Visit:
        """What is drawn for the visit to an example in a lap, from these two and the recipe's seed alone."""
        seed = derived_seed(self._seed, "visit", lap, index)
        random = np.random.default_rng(derived_seed(seed, "view"))
        faces = 2 if 0 < self._data.flip < 1 else 1
        crop = int(random.integers(len(self.views(index)) // faces))
        is_mirrored = random.random() < self._data.flip
        return Visit(index, lap, seed, crop * faces + (faces - 1) * is_mirrored)

    def picture(self, index: int, view: View) -> NDArray[np.uint8]:
        """A view of an example's picture: uint8 (H, W, 3).

        Raises ValueError, one line with the picture's name, where it cannot be read or has changed its size.
        """
        piece = self._examples[index].picture
        picture = map_files.read_picture(piece.read(), piece.name)
        if (picture.shape[1], picture.shape[0]) != self._size(index):
            raise ValueError(f"{piece.name} has changed: it had {_times(self._size(index))} pixels before")
        seen = look(picture, view)
        return seen if seen.flags.writeable else seen.copy()  # of arrays that are mapped from disk

    def opaque(self, index: int, view: View, factor: int) -> NDArray[np.uint8]:
        """How opaque a view of an example's picture is where each of its latents lies: uint8 (H/f, W/f), 255
        wholly. factor: of the autoencoder.

        Raises ValueError as `picture`.
        """
        piece = self._examples[index].picture
        alpha = map_files.read_alpha(piece.read(), piece.name)
        height, width = view.height // factor, view.width // factor
        if alpha is None:
            return np.full((height, width), 255, np.uint8)
        return np.ascontiguousarray(images.resize(look(alpha, view), width, height))

    def map(
        self,
        index: int,
        view: View,
        *,
        seed: int,
        picture: NDArray[np.uint8] | None = None,
        whole: bool = False,
    ) -> NDArray[Any]:
        """A view's map: uint8, or uint16 where grey maps have 16 bits, (H, W, C), C = ``channels``.

        ``seed`` is the visit's; it matters unless ``fixed``. ``picture`` is the view's picture if it is at
        hand, from which a map is made without reading it again. ``whole``: poses keep all joints in their
        places.

        Raises:
            ValueError: one line: a map is missing, cannot be read, is coloured where it must be grey, has
                another shape than its picture, or cannot be mirrored.
        """
        if self._maker is not None:
            seen = self.picture(index, view) if picture is None else picture
            made = self._maker(seen, seed=seed)
            levels: NDArray[Any] = made[..., :1] if self._grey else made
        else:
            levels = self._stacked(index, view, None if whole else seed)
        return np.ascontiguousarray(self._blurred(levels, seed))

    # --- maps from files ---

    def _stacked(self, index: int, view: View, seed: int | None) -> NDArray[Any]:
        example = self._examples[index]
        self._check_maps(example)
        maps = [
            self._from_file(piece, use, index, view, seed)
            for piece, use in zip(example.maps, self._uses, strict=True)
        ]
        if len({levels.dtype for levels in maps}) > 1:
            maps = [
                levels if levels.dtype == np.uint16 else levels.astype(np.uint16) * np.uint16(257)
                for levels in maps
            ]
        return np.dstack(maps)

    def _from_file(self, piece: Piece, use: MapUse, index: int, view: View, seed: int | None) -> NDArray[Any]:
        content, sense = piece.read(), use.sense
        if map_files.is_json(content):
            assert isinstance(content, bytes)
            return self._drawn(content, piece.name, index, view, seed)
        levels = use.levels(content, piece.name)
        self._check_aspect(levels, piece.name, index)
        if view.mirrored and sense == "pose" and not self._grey:
            levels = mirrored_drawing(levels, piece.name)  # whole, in its own colours and size
        seen = look(levels, view, sampling=_sampling(levels, sense, view))
        if view.mirrored and sense == "normals" and not self._grey:
            seen = mirrored_normals(seen)
        return seen

    def poses(self, index: int, view: View) -> Poses | None:
        """The joints of a view, in its pixels, where the data set's own map is a pose as JSON; else None."""
        for piece in () if self._maker else self._examples[index].maps:
            content = piece.read()
            if map_files.is_json(content):
                assert isinstance(content, bytes)
                return self._joints(content, piece.name, index, view)
        return None

    def _joints(self, content: bytes, name: str, index: int, view: View) -> Poses:
        from controlkit.preprocessors import crop_poses, mirror_poses, scale_poses

        width, height = self._size(index)
        poses = map_files.read_joints(content, name, width=width, height=height)
        poses = scale_poses(poses, view.resized_width, view.resized_height)
        poses = crop_poses(poses, view.left, view.top, view.width, view.height, keep_outside=True)
        return mirror_poses(poses) if view.mirrored else poses

    def _disturbed(self, poses: Poses, seed: int) -> Poses:
        """Poses as somebody else might have found them: with parts missing, and joints a little elsewhere."""
        from controlkit.preprocessors import drop_random_limbs, jitter_poses

        random = np.random.default_rng(derived_seed(seed, "pose"))
        poses = drop_random_limbs(poses, random, self._data.pose_drop)
        return jitter_poses(poses, random, self._data.pose_jitter)

    def _drawn(
        self, content: bytes, name: str, index: int, view: View, seed: int | None
    ) -> NDArray[np.uint8]:
        """The drawing of a view of poses, uint8 (H, W, 3); lines have their usual width."""
        from controlkit.preprocessors import draw_poses

        if self._grey:
            raise ValueError(map_files.grey_pose(name))
        poses = self._joints(content, name, index, view)
        if self._moves_joints and seed is not None:
            poses = self._disturbed(poses, seed)
        try:
            return draw_poses(
                poses.people,
                view.width,
                view.height,
                style=self._style,
                hands=poses.hands,
                faces=poses.faces,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    # --- checks ---

    def _size(self, index: int) -> tuple[int, int]:
        if self.shape_of[index] < 0:
            raise ValueError(f"{self._examples[index].picture.name} could not be read")
        return self.sizes[index]

    def _count_maps(self) -> int:
        wanted = len(self._data.map_column)
        return wanted or (len(self._examples[self._first].maps) if self._first is not None else 0) or 1

    def _check_files(self) -> None:
        """Refuse at once what the options and the first example that can be read show."""
        if self._first is not None:
            self._check_maps(self._examples[self._first])
            pieces = self._examples[self._first].maps
            if self._moves_joints and not any(map_files.is_json(piece.read()) for piece in pieces):
                raise ValueError(f"{_OF_JOINTS}; {pieces[0].name} is none")
            if self._data.flip:
                self.map(self._first, self.views(self._first)[-1], seed=0)  # whether it can be mirrored

    def _check_maps(self, example: Example) -> None:
        if not example.maps:
            raise ValueError(f"{example.name} has no map; data.maps=made makes maps of the pictures")
        if len(example.maps) != self._count:
            raise ValueError(f"{example.name} has {len(example.maps)} maps; {self._count} are wanted")

    def _check_aspect(self, levels: NDArray[Any], name: str, index: int) -> None:
        height, width = levels.shape[:2]
        size = self._size(index)
        if max(width * size[1], height * size[0]) > FARTHEST_ASPECT * min(width * size[1], height * size[0]):
            raise ValueError(
                f"{name} has {width} x {height} pixels, its picture {_times(size)}: another shape"
            )

    def _blurred(self, levels: NDArray[Any], seed: int) -> NDArray[Any]:
        """The map, blurred at a share of visits, with a spread drawn from the visit's seed."""
        if not self._data.map_blur:
            return levels
        random = np.random.default_rng(derived_seed(seed, "blur"))
        is_chosen, sigma = random.random() < self._data.map_blur, random.uniform(*_BLUR)
        if not is_chosen:
            return levels
        import cv2

        return cv2.GaussianBlur(levels, (0, 0), sigma).reshape(levels.shape)


def _draw_style(options: Mapping[str, Any]) -> str:
    """The style of `draw_poses` for poses from files. Raises ValueError for an unknown one."""
    from controlkit.preprocessors.drawing import STYLES, USUAL_STYLE

    style = options.get(STYLE, USUAL_STYLE)
    if style not in STYLES:
        raise unknown("draw style", style, STYLES)
    return str(style)


def _maker(kind: str, data: DataRecipe) -> Any:
    from controlkit.training.data.made_maps import Maker

    if data.map_mode == "grey" and kind in _COLOURED:
        raise ValueError(f"{kind} maps are coloured, and data.map_mode is grey; auto keeps their colours")
    return Maker(kind, data.options)


def _sampling(levels: NDArray[Any], sense: Sense, view: View) -> Sampling:
    if levels.shape[:2] == (view.resized_height, view.resized_width):
        return "nearest"  # nothing is resized
    return map_files.right_sampling(levels, sense)


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"

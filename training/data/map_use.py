"""How a recipe's visits read the file of a map, so that a look at the data can say what they would refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from controlkit import preprocessors
from controlkit.preprocessors.depth import Depth
from controlkit.preprocessors.linting import KINDS
from controlkit.preprocessors.options import checked_options
from controlkit.training.data import map_files
from controlkit.training.data.map_files import Sense
from controlkit.training.data.mirroring import mirrored_drawing

if TYPE_CHECKING:
    from controlkit.training.config_adapter import DataRecipe


OF_DEPTH = ("metric", "fill")
"""Options of depth that is read from files, as `preprocessors.read_depth` has them."""
STYLE = "style"
"""The option of poses that are read from files."""


@dataclass(frozen=True)
class MapUse:
    """What is asked of each file of one of the maps."""

    sense: Sense = ""
    grey: bool = False
    """Whether the map has one channel (``data.map_mode``)."""
    metric: bool | None = None
    """Whether depth grows with the distance (``data.options.metric``); None leaves it to the file."""
    fill: bool = False
    """Whether holes in depth are filled from around them (``data.options.fill``)."""
    mirrored: bool = False
    """Whether any visit sees the mirror image."""

    @property
    def name(self) -> str:
        """What tells this use from others in which a file may be refused; "" where none is."""
        return " ".join(["grey"] * self.grey + ["mirrored"] * self._mirrors_drawings)

    @property
    def _mirrors_drawings(self) -> bool:
        return self.mirrored and self.sense == "pose" and not self.grey

    def levels(self, content: bytes | NDArray[Any], name: str) -> NDArray[Any]:
        """The whole map, as `map_files.read_levels` reads it for this use."""
        is_depth = self.sense == "depth"
        return map_files.read_levels(
            content, name, grey=self.grey, depth=is_depth, metric=self.metric, fill=self.fill
        )

    def problem(self, content: bytes | NDArray[Any], name: str) -> str:
        """Why visits would refuse a map that can be read: one line with its name; "" where they would not."""
        if not self.name:
            return ""
        if map_files.is_json(content):
            return map_files.grey_pose(name) if self.grey else ""
        try:
            levels = self.levels(content, name)
            if self._mirrors_drawings:
                mirrored_drawing(levels, name)
        except ValueError as error:
            return str(error)
        return ""


def uses_of(data: DataRecipe, *, kind: str, count: int) -> list[MapUse]:
    """The use of each of ``count`` maps of an example: of stacked ones, each column says what it holds.

    kind: of the map, where there is one; "" where it is not known. Raises ValueError for an option that is
    neither true nor false.
    """
    given = {name: data.options[name] for name in OF_DEPTH if name in data.options}
    options = checked_options(Depth, given, kind="depth")
    return [
        MapUse(
            sense,
            grey=data.map_mode == "grey",
            metric=options.get("metric"),
            fill=options.get("fill", False),
            mirrored=data.flip > 0,
        )
        for sense in senses_of(data.map_column, kind=kind, count=count)
    ]


def idle_options(data: DataRecipe, *, kind: str, count: int) -> list[str]:
    """Options that a recipe gives for maps that are made, and that maps from files have no use for.

    kind, count: as for `uses_of`. Raises ValueError, one line, for an option that neither of them has.
    """
    allowed, idle = _options(data, kind=kind, count=count)
    made = preprocessors.options_of(kind) if kind in preprocessors.names() else []
    for name in idle:
        if name not in made:
            raise ValueError(
                f"data.options has {name}, but these maps come from files, for which it is"
                f" {' and '.join(allowed) or 'none'}; data.maps=made makes maps of the pictures"
            )
    return idle


def about_idle(data: DataRecipe, *, kind: str, count: int) -> str:
    """Say in one line which options have no use as the maps come from files; "" where all have."""
    _, idle = _options(data, kind=kind, count=count)
    if not idle:
        return ""
    verb = "are" if len(idle) > 1 else "is"
    return f"data.options: {' and '.join(idle)} {verb} not used, for the maps are read from files, not made"


def _options(data: DataRecipe, *, kind: str, count: int) -> tuple[list[str], list[str]]:
    """The options that there are for maps from files, and those of the recipe that are none of them."""
    names = _names(data.map_column, kind=kind, count=count)
    senses = senses_of(data.map_column, kind=kind, count=count)
    allowed = [STYLE] * any(map(_may_be_poses, names)) + [*OF_DEPTH] * ("depth" in senses)
    return allowed, [name for name in data.options if name not in allowed]


def _may_be_poses(name: str) -> bool:
    """Whether a map may be a pose: its name says so, or nothing at all ("keypoints", "edges")."""
    sense = map_files.sense_of(name)
    return sense == "pose" or (not sense and name not in {*preprocessors.names(), *KINDS})


def senses_of(columns: Sequence[str], *, kind: str, count: int) -> list[Sense]:
    """What is known of the values of each of ``count`` maps."""
    return [map_files.sense_of(name) for name in _names(columns, kind=kind, count=count)]


def _names(columns: Sequence[str], *, kind: str, count: int) -> Sequence[str]:
    """What each of ``count`` maps is called; "" where nothing says it."""
    return (columns if count > 1 else (kind,)[:count]) or [""] * count

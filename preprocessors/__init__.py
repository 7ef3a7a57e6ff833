"""From pictures to conditioning maps: ``get("canny", low=100, high=200)(picture)`` returns a :class:`Map`.

Importing this package costs nothing: a preprocessor and what it needs are imported when it is asked for,
and one whose libraries are missing does not disturb the others.
"""

import builtins
from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "preprocessors":
    raise ImportError("this package is imported as controlkit.preprocessors, not as preprocessors")

from controlkit.naming import unknown

if TYPE_CHECKING:
    from controlkit.preprocessors.depth import depth_to_map as depth_to_map
    from controlkit.preprocessors.drawing import draw_poses as draw_poses
    from controlkit.preprocessors.maps import Map as Map
    from controlkit.preprocessors.maps import Preprocessor as Preprocessor
    from controlkit.preprocessors.posejson import read_poses as read_poses
    from controlkit.preprocessors.posejson import write_poses as write_poses
    from controlkit.preprocessors.skeleton import Poses as Poses
    from controlkit.preprocessors.skeleton import coco17_to_openpose18 as coco17_to_openpose18

# kind: (module, class); the class's keyword arguments are the options.
_KINDS = {
    "canny": ("canny", "Canny"),
    "depth": ("depth", "Depth"),
    "openpose": ("openpose", "OpenPose"),
}
_HOME = {
    "Map": "maps",
    "Poses": "skeleton",
    "Preprocessor": "maps",
    "coco17_to_openpose18": "skeleton",
    "depth_to_map": "depth",
    "draw_poses": "drawing",
    "read_poses": "posejson",
    "write_poses": "posejson",
}
__all__ = [*_HOME, "get", "list", "names", "options"]


def names() -> builtins.list[str]:
    """Return the kinds of maps that :func:`get` knows, sorted."""
    return sorted(_KINDS)


def list() -> builtins.list[str]:
    """Return the kinds of maps that :func:`get` knows, sorted; the same as :func:`names`."""
    return names()


def get(kind: str, **options: Any) -> "Preprocessor":
    """Return the preprocessor for a kind of map; called with any picture, it returns a :class:`Map`.

    Called with a batch (a list of pictures, an array (N, H, W, C), a tensor (N, C, H, W)), it returns a list.
    An option may be given as text, as a command line has it: ``low="50"``. :func:`options` lists the options
    of a kind; what each means and allows stands in its class's docstring. Weights are loaded here, not at
    the first picture.

    Raises:
        ValueError: an unknown kind or option (with a suggestion), a value out of range, missing weights.
    """
    make = _find(kind)
    from controlkit.preprocessors.options import checked_options

    preprocessor: Preprocessor = make(**checked_options(make, options, kind=kind))
    return preprocessor


def options(kind: str) -> builtins.list[str]:
    """Return the names of the options that :func:`get` takes for a kind. Raises ValueError: unknown kind."""
    from controlkit.preprocessors.options import known_options

    return [*known_options(_find(kind))]


def _find(kind: str) -> Any:
    if kind not in _KINDS:
        raise unknown("map", kind, _KINDS)
    module, name = _KINDS[kind]
    return getattr(import_module(f"controlkit.preprocessors.{module}"), name)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'controlkit.preprocessors' has no attribute {name!r}")
    return getattr(import_module(f"controlkit.preprocessors.{_HOME[name]}"), name)


def __dir__() -> builtins.list[str]:
    return sorted(__all__)

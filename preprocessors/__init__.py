"""From pictures to conditioning maps: ``get("canny", low=100, high=200)(picture)`` returns a :class:`Map`.

Importing this package costs nothing: a preprocessor and what it needs are imported when it is asked for,
and one whose libraries are missing does not disturb the others.
"""

import inspect
import os
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
_KINDS = {"canny": ("canny", "Canny"), "depth": ("depth", "Depth"), "openpose": ("openpose", "OpenPose")}
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
__all__ = [*_HOME, "get", "names"]


def names() -> list[str]:
    """Return the kinds of maps that :func:`get` knows, sorted."""
    return sorted(_KINDS)


def get(kind: str, **options: Any) -> "Preprocessor":
    """Return the preprocessor for a kind of map; called with any picture, it returns a :class:`Map`.

    A number may be given as text, as a command line has it.

    Options: canny ``low``, ``high``; openpose ``model``, ``threshold``, ``style``, ``device``; depth
    ``model``, ``device``. What each means and allows stands in the class's docstring. Weights are loaded
    here, not at the first picture.

    Raises:
        ValueError: an unknown kind or option (with a suggestion), a value out of range, missing weights.
    """
    if kind not in _KINDS:
        raise unknown("map", kind, _KINDS)
    module, name = _KINDS[kind]
    make = getattr(import_module(f"controlkit.preprocessors.{module}"), name)
    known = inspect.signature(make).parameters
    for option, value in options.items():
        if option not in known:
            raise unknown(f"{kind} option", option, known)
        options[option] = _of_type(known[option].annotation, value, f"{kind}'s {option}")
    preprocessor: Preprocessor = make(**options)
    return preprocessor


def _of_type(wanted: type, value: object, name: str) -> float | str:
    """Return an option as the type that its class declares, float or str."""
    assert wanted in (float, str), wanted
    if wanted is str and isinstance(value, (str, os.PathLike)):
        return str(value)
    try:
        if wanted is float and isinstance(value, (int, float, str)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {value!r}; it must be {'a number' if wanted is float else 'text'}")


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'controlkit.preprocessors' has no attribute {name!r}")
    return getattr(import_module(f"controlkit.preprocessors.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""From pictures to conditioning maps: ``get("canny", low=100, high=200)(picture)`` returns a :class:`Map`.

Importing this package costs nothing: a preprocessor and what it needs are imported when it is asked for,
and one whose libraries are missing does not disturb the others.
"""

import builtins
import inspect
from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ == "preprocessors":
    raise ImportError("this package is imported as controlkit.preprocessors, not as preprocessors")

from controlkit.naming import unknown

if TYPE_CHECKING:
    from controlkit.preprocessors.depth import depth_to_map as depth_to_map
    from controlkit.preprocessors.depthfiles import read_depth as read_depth
    from controlkit.preprocessors.depthfiles import write_depth_npy as write_depth_npy
    from controlkit.preprocessors.depthfiles import write_depth_png16 as write_depth_png16
    from controlkit.preprocessors.drawing import draw_poses as draw_poses
    from controlkit.preprocessors.drawing import poses_to_map as poses_to_map
    from controlkit.preprocessors.lint_facts import Finding as Finding
    from controlkit.preprocessors.linting import guess_kind as guess_kind
    from controlkit.preprocessors.linting import lint as lint
    from controlkit.preprocessors.maps import Map as Map
    from controlkit.preprocessors.maps import Preprocessor as Preprocessor
    from controlkit.preprocessors.normal import normal_from_depth as normal_from_depth
    from controlkit.preprocessors.poseedit import crop_poses as crop_poses
    from controlkit.preprocessors.poseedit import drop_limbs as drop_limbs
    from controlkit.preprocessors.poseedit import drop_people as drop_people
    from controlkit.preprocessors.poseedit import drop_random_limbs as drop_random_limbs
    from controlkit.preprocessors.poseedit import jitter_poses as jitter_poses
    from controlkit.preprocessors.poseedit import keep_people as keep_people
    from controlkit.preprocessors.poseedit import mirror_poses as mirror_poses
    from controlkit.preprocessors.poseedit import move_person as move_person
    from controlkit.preprocessors.poseedit import scale_poses as scale_poses
    from controlkit.preprocessors.posejson import read_poses as read_poses
    from controlkit.preprocessors.posejson import write_poses as write_poses
    from controlkit.preprocessors.skeleton import Poses as Poses
    from controlkit.preprocessors.skeleton import coco17_to_openpose18 as coco17_to_openpose18

# kind: (module, class); the class's keyword arguments are the options.
_KINDS = {
    "canny": ("canny", "Canny"),
    "depth": ("depth", "Depth"),
    "hed": ("auxlines", "Hed"),
    "leres": ("auxdepth", "Leres"),
    "lineart": ("auxlines", "Lineart"),
    "lineart_anime": ("auxlines", "LineartAnime"),
    "lineart_standard": ("auxlines", "LineartStandard"),
    "midas": ("auxdepth", "Midas"),
    "mlsd": ("auxlines", "Mlsd"),
    "normal": ("normal", "Normal"),
    "normalbae": ("auxdepth", "NormalBae"),
    "openpose": ("openpose", "OpenPose"),
    "pidinet": ("auxlines", "PidiNet"),
    "scribble": ("strokes", "Scribble"),
    "softedge": ("strokes", "SoftEdge"),
    "shuffle": ("shuffle", "Shuffle"),
    "zoe": ("auxdepth", "Zoe"),
}
_DEPTH_KINDS = {"depth", "midas", "normal"}
_HOME = {
    "Finding": "lint_facts",
    "Map": "maps",
    "Poses": "skeleton",
    "Preprocessor": "maps",
    "crop_poses": "poseedit",
    "drop_limbs": "poseedit",
    "drop_people": "poseedit",
    "drop_random_limbs": "poseedit",
    "jitter_poses": "poseedit",
    "keep_people": "poseedit",
    "mirror_poses": "poseedit",
    "move_person": "poseedit",
    "poses_to_map": "drawing",
    "scale_poses": "poseedit",
    "coco17_to_openpose18": "skeleton",
    "depth_to_map": "depth",
    "draw_poses": "drawing",
    "guess_kind": "linting",
    "lint": "linting",
    "normal_from_depth": "normal",
    "read_depth": "depthfiles",
    "read_poses": "posejson",
    "write_depth_npy": "depthfiles",
    "write_depth_png16": "depthfiles",
    "write_poses": "posejson",
}
__all__ = [*_HOME, "get", "gives_depth", "names", "options_of", "summary"]


def names() -> builtins.list[str]:
    """Return the kinds of maps that :func:`get` knows, sorted; ``preprocessors.list()`` is the same."""
    return sorted(_KINDS)


def list() -> builtins.list[str]:
    """Return :func:`names`. Not in ``__all__``, or ``import *`` would take Python's own ``list`` away."""
    return names()


def get(kind: str, **options: Any) -> "Preprocessor":
    """Return the preprocessor for a kind of map; called with any picture, it returns a :class:`Map`.

    Called with a batch (a list of pictures, an array (N, H, W, C), a tensor (N, C, H, W)), it returns a list.
    An option may be given as text, as a command line has it: ``low="50"``. :func:`options_of` lists a kind's
    options; what each means and allows stands in its class's docstring. Weights are loaded here, not at the
    first picture.

    Raises:
        ValueError: an unknown kind or option (with a suggestion), a value out of range, missing weights.
    """
    make = _find(kind)
    from controlkit.preprocessors.options import checked_options

    preprocessor: Preprocessor = make(**checked_options(make, options, kind=kind))
    return preprocessor


def options_of(kind: str) -> builtins.list[str]:
    """Return the names of the options that :func:`get` takes for a kind. Raises ValueError: unknown kind."""
    from controlkit.preprocessors.options import known_options

    return [*known_options(_find(kind))]


def summary(kind: str) -> str:
    """Return what a kind of map is, in a sentence. Raises ValueError: unknown kind."""
    text = inspect.getdoc(_find(kind)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "")


def gives_depth(kind: str) -> bool:
    """Return whether a kind's maps carry depth values (:attr:`Map.depth`)."""
    return kind in _DEPTH_KINDS


def _find(kind: str) -> Any:
    if not isinstance(kind, str) or kind not in _KINDS:
        raise unknown("map", kind, _KINDS)
    module, name = _KINDS[kind]
    return getattr(import_module(f"controlkit.preprocessors.{module}"), name)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'controlkit.preprocessors' has no attribute {name!r}")
    return getattr(import_module(f"controlkit.preprocessors.{_HOME[name]}"), name)


def __dir__() -> builtins.list[str]:
    return sorted(__all__)

"""controlnet-aux's networks, imported one at a time, and the files of their weights.

``import controlnet_aux`` pulls in all of its detectors: seconds, a dozen warnings, and a failure wherever one
of them (mediapipe) does not fit. A stand-in for the package, with its folder but without its ``__init__``,
lets each subpackage be imported alone.
"""

import importlib
import importlib.util
import os
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from controlkit.hub import find_file

ANNOTATORS = "lllyasviel/Annotators"
"""The hub repository with the weights of most of them."""

_PACKAGE = "controlnet_aux"
_SIDE_EFFECT = "KMP_DUPLICATE_LIB_OK"  # which importing it sets for the whole process


def import_annotator(name: str) -> Any:
    """Return the module ``controlnet_aux.NAME`` (as "open_pose" or "hed.something").

    Raises:
        ValueError: one line: controlnet-aux, or something that this part of it needs, is not installed.
    """
    before = os.environ.get(_SIDE_EFFECT)
    try:
        if _PACKAGE not in sys.modules:
            sys.modules[_PACKAGE] = _stand_in()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"{_PACKAGE}.{name}")
    except ImportError as error:
        raise ValueError(
            f"controlnet-aux's {name} cannot be used: {error}; install it with `pip install controlnet-aux`"
        ) from error
    finally:
        if before is None:
            os.environ.pop(_SIDE_EFFECT, None)


def find_weights(file: str, source: str = "", *, repository: str = ANNOTATORS) -> Path:
    """Return the path of a weights file, by its name in ``repository``.

    ``source`` says where to look instead: a folder that holds the file, or another hub id ("" for
    ``repository``). The model cache comes first, the network second.

    Raises:
        ValueError: one line, within 5 seconds: the file's name, the repository, the folder into which it may
            be put, and why the hub could not help.
    """
    return find_file(source or repository, file)


def _stand_in() -> types.ModuleType:
    spec: ModuleSpec | None = importlib.util.find_spec(_PACKAGE)  # finds it without running it
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("the package is not installed")
    package = types.ModuleType(_PACKAGE)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = spec
    return package

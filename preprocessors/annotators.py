"""controlnet-aux's networks, imported one at a time, and the files of their weights.

``import controlnet_aux`` pulls in all of its detectors: seconds, a dozen warnings, and a failure wherever one
of them (mediapipe) does not fit. A stand-in for the package, with its folder but without its ``__init__``,
lets each subpackage be imported alone. The stand-in has a name of its own, so that whoever imports
controlnet_aux gets the real one; where that is imported already, its subpackages are taken from it.
"""

import contextlib
import importlib
import importlib.util
import io
import os
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from controlkit.hub import find_file

ANNOTATORS = "lllyasviel/Annotators"
"""The hub repository with the weights of most of them."""

_PACKAGE = "controlnet_aux"
_STAND_IN = "_controlkit_annotators"
_SIDE_EFFECT = "KMP_DUPLICATE_LIB_OK"  # which importing it sets for the whole process
_BROKEN = (ImportError, AttributeError, NameError, OSError, RuntimeError, TypeError, ValueError, SyntaxError)
# Guards what quietly() and the import change for all threads; one import may lead to another.
_importing = threading.RLock()


def import_annotator(name: str) -> Any:
    """Return the module ``controlnet_aux.NAME`` (as "open_pose" or "hed.something").

    Raises:
        ValueError: one line: controlnet-aux, or something that this part of it needs, is not installed or
            cannot be imported.
    """
    with quietly():
        before = os.environ.get(_SIDE_EFFECT)
        try:
            return importlib.import_module(f"{_package()}.{name}")
        except _BROKEN as error:
            missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
            install = (missing or _PACKAGE).split(".")[0].replace("_", "-")
            reason = " ".join(str(error).split())
            raise ValueError(
                f"controlnet-aux's {name} cannot be used: {reason}; install it with `pip install {install}`"
            ) from error
        finally:
            if before is None:
                os.environ.pop(_SIDE_EFFECT, None)
            else:
                os.environ[_SIDE_EFFECT] = before


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep to itself what controlnet-aux prints and warns of while it imports and builds its networks."""
    with _importing, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def find_weights(file: str, source: str = "", *, repository: str = ANNOTATORS) -> Path:
    """Return the path of a weights file, by its name in ``repository``.

    ``source`` says where to look instead: a folder that holds the file, or another hub id ("" for
    ``repository``). The model cache comes first, the network second.

    Raises:
        ValueError: one line, within 5 seconds: the file's name, the repository, the folder into which it may
            be put, and why the hub could not help.
    """
    try:
        return find_file(source or repository, file)
    except ValueError as error:
        if source in ("", repository):
            raise
        raise ValueError(f"{error}; {file} is in {repository}") from error


def _package() -> str:
    """Return the name under which subpackages are imported."""
    if _PACKAGE in sys.modules:
        return _PACKAGE
    if _STAND_IN not in sys.modules:
        sys.modules[_STAND_IN] = _stand_in()
    return _STAND_IN


def _stand_in() -> types.ModuleType:
    spec = importlib.util.find_spec(_PACKAGE)  # finds it without running it
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError("it is not installed", name=_PACKAGE)
    package = types.ModuleType(_STAND_IN)
    package.__path__ = list(spec.submodule_search_locations)
    package.__spec__ = ModuleSpec(_STAND_IN, None, is_package=True)
    return package

"""What makes maps of generated pictures, so that they can be compared with the maps that were asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from controlkit import preprocessors
from controlkit.base import BUNDLED
from controlkit.training.evaluation.map_scores import NO_LAYOUT

if TYPE_CHECKING:
    from controlkit.formats.description import MapSpec
    from controlkit.preprocessors import Preprocessor
    from controlkit.training.evaluation.held_out import HeldOut
    from controlkit.training.evaluation.request import Request

_ON_DEVICE = ("openpose", "depth", "normal")


def reasons_against(kinds: Sequence[str]) -> dict[str, str]:
    """The kinds that cannot be scored, and why."""
    found = {}
    for kind in kinds:
        if kind in NO_LAYOUT:
            found[kind] = f"{kind} maps carry no layout that could be found again in a picture"
        elif kind not in preprocessors.names():
            found[kind] = f"no preprocessor is known that makes {kind} maps of pictures"
    return found


def options_of(
    kind: str, request: Request, held_out: HeldOut, specs: Sequence[MapSpec], *, device: str
) -> dict[str, Any]:
    """How the preprocessor of a kind is set up: as it made the data's maps; else as its adapters say that
    their maps were made, where they agree; what the request says goes before both.
    """
    options = usual_options(kind, request.base)
    if kind in _ON_DEVICE:
        options["device"] = device
    if kind in held_out.settled:
        options |= held_out.settled[kind]
    elif len(told := {tuple(sorted(spec.thresholds.items())) for spec in specs}) == 1:
        options |= _fitting(kind, dict(told.pop()))
    return options | request.options.get(kind, {})


def usual_options(kind: str, base: str) -> dict[str, Any]:
    """The bundled estimators beside a bundled base."""
    return {"model": "tiny"} if base in BUNDLED and kind in ("openpose", "depth") else {}


def estimators(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Preprocessor]:
    """The preprocessors, by kind. Raises ValueError, one line, where weights are not to be had."""
    made = {}
    for kind, given in options.items():
        try:
            made[kind] = preprocessors.get(kind, **given)
        except ValueError as error:
            raise ValueError(f"{kind} maps of the generated pictures are needed: {error}") from error
    return made


def _fitting(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    known = preprocessors.options_of(kind)
    return {name: value for name, value in options.items() if name in known}

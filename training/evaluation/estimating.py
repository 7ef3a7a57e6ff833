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


def stated_options(kind: str, base: str, specs: Sequence[MapSpec]) -> dict[str, Any]:
    """How maps of a kind are made where nobody says: as its adapters say that theirs were, where they agree;
    by the bundled estimators beside a bundled base.
    """
    options = {"model": "tiny"} if base in BUNDLED and kind in ("openpose", "depth") else {}
    told = {tuple(sorted(_stated(spec).items())) for spec in specs}
    known = preprocessors.options_of(kind) if len(told) == 1 and kind in preprocessors.names() else ()
    return options | {name: value for name, value in (told.pop() if known else ()) if name in known}


def options_of(
    kind: str, request: Request, held_out: HeldOut, stated: Mapping[str, Any], *, device: str
) -> dict[str, Any]:
    """How the preprocessor of a kind is set up: as it made the data's maps, else as is stated; what the
    request says goes before both.
    """
    on_device = {"device": device} if kind in _ON_DEVICE else {}
    return on_device | dict(held_out.settled.get(kind, stated)) | request.options.get(kind, {})


def estimators(options: Mapping[str, Mapping[str, Any]]) -> dict[str, Preprocessor]:
    """The preprocessors, by kind. Raises ValueError, one line, where weights are not to be had."""
    made = {}
    for kind, given in options.items():
        try:
            made[kind] = preprocessors.get(kind, **given)
        except ValueError as error:
            raise ValueError(f"{kind} maps of the generated pictures are needed: {error}") from error
    return made


def _stated(spec: MapSpec) -> dict[str, Any]:
    style = {"style": spec.draw_style} if spec.draw_style else {}
    return {**spec.thresholds, **style}

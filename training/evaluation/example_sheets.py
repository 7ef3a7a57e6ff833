"""The best and the worst pictures of an adapter, beside their maps and the pictures without control."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from controlkit import images
from controlkit.sheets import Cell, contact_sheet
from controlkit.training.evaluation.arms import Arm
from controlkit.training.evaluation.map_scores import principal
from controlkit.training.evaluation.pass_over import map_path, picture_path
from controlkit.training.evaluation.request import FLOOR
from controlkit.training.reporting.showing import visible

if TYPE_CHECKING:
    from controlkit.training.evaluation.held_out import Held, HeldOut
    from controlkit.training.evaluation.request import Request
    from controlkit.training.evaluation.summary import Summary

ROWS, CELL = 6, 256


def sheets_of(
    request: Request, held_out: HeldOut, summary: Summary, arm: Arm
) -> dict[str, NDArray[np.uint8]]:
    """The sheets "best" and "worst" of an adapter, uint8 (H, W, 3); of few pairs there is "all" alone."""
    order = summary.order[arm.label] or [held_out.number(place) for place in range(len(held_out))]
    title = f"{arm.label}, by {principal(arm.kind)}"
    extremes = {"best": order[:ROWS], "worst": order[: -ROWS - 1 : -1]}
    chosen = {"all": order} if len(order) <= ROWS else extremes
    floor = next(one for one in summary.arms if one.label == FLOOR)
    places = {held_out.number(place): place for place in range(len(held_out))}
    return {
        name: contact_sheet(
            [_row(request, summary, arm, floor, held_out[places[number]]) for number in numbers],
            title=f"{name if name != 'all' else 'best to worst'}: {title}",
            cell=CELL,
        )
        for name, numbers in chosen.items()
    }


def _row(request: Request, summary: Summary, arm: Arm, floor: Arm, pair: Held) -> list[Cell]:
    """The pair's picture and map, the adapter's picture and the map found in it, the one without control."""
    measure = principal(arm.kind)
    told = summary.of_pair.get(arm.kind, {}).get(measure, {})
    ours = picture_path(request.output, arm, pair.number, 0)

    def worth(label: str) -> str:
        value = told.get(label, {}).get(pair.number)
        return "" if value is None else f": {value:.3f}"

    cells: list[Cell] = [
        (pair.picture, pair.caption or pair.name),
        (visible(pair.maps[arm.kind]), f"{arm.kind} asked for"),
        (images.load_picture(ours), f"{arm.label}{worth(arm.label)}"),
    ]
    found = map_path(request.output, arm, arm.kind, pair.number, 0)
    if found.is_file():
        cells.append((images.load_picture(found), f"{arm.kind} found in it"))
    without = picture_path(request.output, floor, pair.number, 0)
    cells.append((images.load_picture(without), f"no control{worth(FLOOR)}"))
    return cells

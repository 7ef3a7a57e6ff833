"""Measuring adapters on held-out pairs: `controlkit evaluate`, and `evaluate` from Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controlkit.training.evaluation.job import Report, Result


def evaluate(
    data: str | Path = "world",
    *,
    adapters: Sequence[str] = (),
    output: str | Path = "report",
    base: str | None = None,
    settings: Mapping[str, str] | None = None,
    report: Report | None = None,
    **options: Any,
) -> Result:
    """Measure adapters as `controlkit evaluate` does, into the folder ``output``.

    data: "world", a data set, or a run's folder. adapters: [KIND=]NAME[:HOW] each. settings: KEY to VALUE as
    on the command line. options: count, seeds, steps, guidance, scheduler, negative_prompt, features, clip,
    device, dtype; see `request.Request`.

    Raises ValueError, one line, for whatever cannot be measured.
    """
    from controlkit.silence import Silent
    from controlkit.training.evaluation.job import evaluate as run
    from controlkit.training.evaluation.request import make_request

    request = make_request(
        str(data), str(output), adapters=adapters, base=base, settings=settings or {}, **options
    )
    return run(request, report or Silent())

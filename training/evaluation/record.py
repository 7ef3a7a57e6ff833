"""report.json: everything that an evaluation found, for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from controlkit.metrics.intervals import LEVEL, RESAMPLES, Interval
from controlkit.training.evaluation.map_scores import MEASURES, principal
from controlkit.training.evaluation.request import CEILING, FLOOR, TRUE, as_json, digest_of
from controlkit.training.reporting.run_record import versions

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.training.evaluation.held_out import HeldOut
    from controlkit.training.evaluation.request import Request
    from controlkit.training.evaluation.summary import Group, Summary

VERSION = 1


def record(
    request: Request,
    base: Base,
    held_out: HeldOut,
    summary: Summary,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The whole evaluation as JSON has it; what is not a number is null."""
    return {
        "version": VERSION,
        "settings": as_json(request),
        "pairs": {"title": held_out.title, "count": len(held_out), "sha256": held_out.digest()},
        "base": {"name": request.base, "family": base.family, "sha256": base.digest()},
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "adapters": [
            {
                "label": arm.label,
                "name": arm.compared.name,
                "kind": arm.kind,
                "how": arm.compared.how,
                "sha256": digest_of(arm.compared.name),
                "pictures": f"pictures/{arm.folder}",
                "measure": principal(arm.kind),
                "reach": interval_json(summary.reach.get(arm.label)),
                "seconds_per_picture": summary.seconds.get(arm.label),
            }
            for arm in summary.arms
            if arm.compared
        ],
        "beside": {"floor": FLOOR, "ceiling": CEILING, "true": TRUE},
        "maps_made_by": {
            kind: {key: str(value) for key, value in given.items()} for kind, given in options.items()
        },
        "interval": {
            "level": LEVEL,
            "resamples": RESAMPLES,
            "over": "pairs",
            "differences": "all of one measure together",
        },
        "measures": {
            name: {"text": measure.text, "lower_is_better": measure.lower}
            for name, measure in MEASURES.items()
            if any(name in group.intervals for group in summary.groups)
        },
        "results": [_group_json(group) for group in summary.groups],
        "differences": [
            {
                "measure": one.measure,
                "first": one.first,
                "second": one.second,
                "pairs": one.pairs,
                **(interval_json(one.interval) or {}),
                "verdict": one.verdict,
            }
            for one in summary.differences
        ],
        "skipped": summary.skipped,
        "examples": examples(summary),
        "versions": versions(),
    }


def examples(summary: Summary) -> list[dict[str, Any]]:
    """One entry for each pair: what every arm got, by kind and measure."""
    found: dict[int, dict[str, Any]] = {}
    for kind, measures in summary.of_pair.items():
        for measure, by_arm in measures.items():
            for label, told in by_arm.items():
                for number, value in told.items():
                    entry = found.setdefault(number, {"number": number, "scores": {}})
                    scores = entry["scores"].setdefault(kind or "picture", {})
                    scores.setdefault(measure, {})[label] = round(value, 6)
    return [found[number] for number in sorted(found)]


def interval_json(found: Interval | None) -> dict[str, float | None] | None:
    """Value, low and high; null where one is not a number."""
    if found is None:
        return None
    told = {"value": found.value, "low": found.low, "high": found.high}
    return {name: value if math.isfinite(value) else None for name, value in told.items()}


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind or "picture",
        "measures": {
            measure: {
                "pairs": group.pairs.get(measure),
                "arms": {
                    label: {
                        **(interval_json(found) or {}),
                        **({"spread": spread} if (spread := _spread(group, measure, label)) else {}),
                    }
                    for label, found in group.intervals[measure].items()
                },
            }
            for measure in group.measures
        },
    }


def _spread(group: Group, measure: str, label: str) -> float | None:
    return group.spread.get(measure, {}).get(label)

"""report.json: everything that an evaluation found, for machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from controlkit.metrics.intervals import LEVEL, Interval
from controlkit.sampling import default_guidance
from controlkit.training.evaluation.held_out import Told
from controlkit.training.evaluation.map_scores import MEASURES, principal
from controlkit.training.evaluation.request import CEILING, FLOOR, TRUE, as_json, digest_of
from controlkit.training.reporting.run_record import versions

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.training.evaluation.held_out import HeldOut
    from controlkit.training.evaluation.request import Request
    from controlkit.training.evaluation.summary import Difference, Group, Summary

VERSION = 1
_LIBRARIES = (  # beside those of every run, what maps and measures are made by
    *("opencv-python-headless", "opencv-python", "pillow", "scipy", "scikit-image"),
    *("torchvision", "torchmetrics", "torch-fidelity"),
)


def record(
    request: Request,
    base: Base,
    held_out: HeldOut,
    summary: Summary,
    options: Mapping[str, Mapping[str, Any]],
    pairs: Mapping[int, Told],
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """The whole evaluation as JSON has it; what is not a number is null."""
    guidance = default_guidance(base) if request.guidance is None else request.guidance
    return {
        "version": VERSION,
        "settings": {**as_json(request), "guidance": guidance},
        "pairs": {
            "title": held_out.title,
            "count": len(held_out),
            "held_out": held_out.is_held_out,
            "sizes": [
                {"width": width, "height": height, "pairs": count}
                for (width, height), count in held_out.sizes().items()
            ],
            "sha256": held_out.digest(),
        },
        "base": {"name": request.base, "family": base.family, "sha256": base.digest()},
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "adapters": _adapters_json(summary),
        "beside": {"floor": FLOOR, "ceiling": CEILING, "true": TRUE},
        "maps_made_by": {
            kind: {key: str(value) for key, value in given.items()} for kind, given in options.items()
        },
        "interval": {
            "level": LEVEL,
            "over": "pairs",
            "differences": "all comparisons of one measure hold together (Bonferroni), each at its own level",
        },
        "measures": {
            name: {"text": measure.text, "lower_is_better": measure.lower}
            for name, measure in MEASURES.items()
            if any(name in group.intervals for group in summary.groups)
        },
        "results": [_group_json(group) for group in summary.groups],
        "differences": [_difference_json(one) for one in summary.differences],
        "warnings": list(warnings),
        "skipped": summary.skipped,
        "examples": examples(summary, pairs),
        "versions": versions(*_LIBRARIES),
    }


def examples(summary: Summary, pairs: Mapping[int, Told]) -> list[dict[str, Any]]:
    """One entry for each pair: which it is, and what every arm got, by kind and measure."""
    found: dict[int, dict[str, Any]] = {}
    for kind, measures in summary.of_pair.items():
        for measure, by_arm in measures.items():
            for label, told in by_arm.items():
                for number, value in told.items():
                    told_of = {"number": number, "name": pairs[number].name, "caption": pairs[number].caption}
                    entry = found.setdefault(number, {**told_of, "scores": {}})
                    scores = entry["scores"].setdefault(kind or "picture", {})
                    scores.setdefault(measure, {})[label] = round(value, 6)
    return [found[number] for number in sorted(found)]


def interval_json(found: Interval | None) -> dict[str, float | None] | None:
    """Value, low and high, null where one is not a number, and from how many resamples they come."""
    if found is None:
        return None
    told = {"value": found.value, "low": found.low, "high": found.high}
    ends = {name: value if math.isfinite(value) else None for name, value in told.items()}
    return {**ends, "resamples": found.resamples}


def _adapters_json(summary: Summary) -> list[dict[str, Any]]:
    return [
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
    ]


def _difference_json(one: Difference) -> dict[str, Any]:
    return {
        "measure": one.measure,
        "first": one.first,
        "second": one.second,
        "pairs": one.pairs,
        "comparisons": one.comparisons,
        "level": one.level,
        **(interval_json(one.interval) or {}),
        "verdict": one.verdict,
    }


def _group_json(group: Group) -> dict[str, Any]:
    return {
        "kind": group.kind or "picture",
        "measures": {
            measure: {
                "pairs": group.pairs.get(measure),
                "arms": {
                    label: {
                        **(interval_json(found) or {}),
                        **_of_sets(group, measure, label),
                    }
                    for label, found in group.intervals[measure].items()
                },
            }
            for measure in group.measures
        },
    }


def _of_sets(group: Group, measure: str, label: str) -> dict[str, float]:
    """Of what compares sets of pictures: how large they are, and the spread over subsets if there is one."""
    if label not in group.pictures.get(measure, {}):
        return {}
    own, true = group.pictures[measure][label]
    spread = group.spread.get(measure, {}).get(label)
    return {"pictures": own, "true_pictures": true, **({} if spread is None else {"spread": spread})}

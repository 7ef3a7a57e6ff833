"""From rows to a summary: means with their intervals, differences between adapters, best and worst pairs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit.metrics import Interval, interval, mean_interval
from controlkit.metrics.intervals import LEAST, LEVEL
from controlkit.metrics.pose_ap import Matches, Ranked
from controlkit.training.evaluation.arms import Arm
from controlkit.training.evaluation.map_scores import AP, MEASURES, principal
from controlkit.training.evaluation.picture_scores import PictureScores
from controlkit.training.evaluation.request import CEILING, FLOOR, TRUE
from controlkit.training.evaluation.rows import Row

AP_RESAMPLES = 200  # each one counts anew over all pictures
ByPair = dict[int, float]


@dataclass(frozen=True)
class Difference:
    """How much more one adapter got than another on the same pairs and noise, and whether that is better.

    Of several comparisons in one measure all intervals hold together at `LEVEL`, each at a higher one
    (Bonferroni). comparisons: how many there are of that measure.
    """

    measure: str
    first: str
    second: str
    interval: Interval
    pairs: int
    comparisons: int = 1

    @property
    def level(self) -> float:
        """Of its own interval."""
        return 1 - (1 - LEVEL) / self.comparisons

    @property
    def verdict(self) -> str:
        """What the interval says: which one is better, or that it cannot be told."""
        low, high = self.interval.low, self.interval.high
        if not math.isfinite(low):
            few = "1 pair is" if self.pairs == 1 else f"{self.pairs} pairs are"
            return (
                f"{few} too few {'to tell' if self.pairs < LEAST else f'for {self.comparisons} comparisons'}"
            )
        if not (low > 0 or high < 0):
            return "no difference to be seen"
        first_more = low > 0
        told = MEASURES[self.measure]
        return f"{self.first if first_more != told.lower else self.second} is {told.wins}"


@dataclass
class Group:
    """The measures of one kind of map, or of what every picture has (kind "")."""

    kind: str
    intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """By measure and arm."""
    pairs: dict[str, int] = field(default_factory=dict)
    """By measure: how many pairs have it."""
    pictures: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """By measure and arm, for sets of pictures: how many of the arm's, against how many true ones."""
    spread: dict[str, dict[str, float]] = field(default_factory=dict)
    """By measure and arm, for sets of pictures: the spread over subsets, where there is one."""

    @property
    def measures(self) -> list[str]:
        """In the order of `MEASURES`."""
        return [name for name in MEASURES if name in self.intervals]


@dataclass
class Summary:
    """Everything that the report tells."""

    arms: list[Arm]
    groups: list[Group]
    differences: list[Difference]
    reach: dict[str, Interval]
    """By adapter: the share of the way from no control to the autoencoder's pictures, in its own kind's
    principal measure.
    """
    order: dict[str, list[int]]
    """By adapter: the pairs' numbers, the best first."""
    of_pair: dict[str, dict[str, dict[str, ByPair]]]
    """By kind, measure and arm: each pair's value."""
    skipped: dict[str, str]
    seconds: dict[str, float]
    """By arm: the median time of a picture that was generated, where any was."""


def summarise(
    arms: Sequence[Arm],
    rows: Mapping[str, Sequence[Row]],
    kinds: Sequence[str],
    pictures: PictureScores,
    skipped: Mapping[str, str],
) -> Summary:
    """Count everything. rows: by arm's folder. kinds: that are scored."""
    values: dict[str, dict[str, dict[str, ByPair]]] = {}
    groups = []
    for kind in (*kinds, ""):
        values[kind] = _of_kind(arms, rows, kind)
        if not kind:
            for measure, found in pictures.of_pair.items():
                values[kind][measure] = {arm.label: found[arm.folder] for arm in arms if arm.folder in found}
        group = _group(kind, values[kind])
        if kind == "openpose":
            _add_precision(group, arms, rows)
        if not kind:
            _add_sets(group, pictures, arms)
        if group.intervals:
            groups.append(group)
    compared = [arm for arm in arms if arm.compared]
    return Summary(
        arms=list(arms),
        groups=groups,
        differences=_differences(compared, values, rows),
        reach=_reaches(compared, values),
        order=_orders(compared, values),
        of_pair=values,
        skipped={**skipped, **pictures.skipped},
        seconds=_seconds(arms, rows),
    )


def _of_kind(
    arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]], kind: str
) -> dict[str, dict[str, ByPair]]:
    """By measure and arm, each pair's mean over its seeds."""
    found: dict[str, dict[str, ByPair]] = {}
    for arm in arms:
        of_pair: dict[str, dict[int, list[float]]] = {}
        for row in rows[arm.folder]:
            for measure, value in row.scores.get(kind, {}).items():
                of_pair.setdefault(measure, {}).setdefault(row.number, []).append(value)
        for measure, told in of_pair.items():
            found.setdefault(measure, {})[arm.label] = {n: float(np.mean(v)) for n, v in told.items()}
    return found


def _group(kind: str, values: Mapping[str, Mapping[str, ByPair]]) -> Group:
    group = Group(kind)
    for measure, by_arm in values.items():
        group.intervals[measure] = {
            label: mean_interval(np.array(list(told.values()))) for label, told in by_arm.items() if told
        }
        group.pairs[measure] = max(map(len, by_arm.values()), default=0)
    return group


def _add_precision(group: Group, arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> None:
    """OKS-AP, which is of all pictures together; pairs are drawn with all of their pictures."""
    for arm in arms:
        by_pair = _people(rows[arm.folder])
        if not by_pair:
            continue
        ranked, count = Ranked(list(by_pair.values())), len(by_pair)
        found = interval(ranked.precisions, count, resamples=AP_RESAMPLES, batched=True)
        group.intervals.setdefault(AP, {})[arm.label] = found
        group.pairs[AP] = max(group.pairs.get(AP, 0), count)


def _people(rows: Sequence[Row]) -> dict[int, list[Matches]]:
    """Each pair's people, found and asked for; {} where nobody was asked for at all."""
    by_pair: dict[int, list[Matches]] = {}
    for row in rows:
        if row.people is not None:
            by_pair.setdefault(row.number, []).append(row.people)
    asked = any(one.similarity.shape[1] for found in by_pair.values() for one in found)
    return by_pair if asked else {}


def _precision_apart(
    first: Sequence[Row], second: Sequence[Row], *, level: float
) -> tuple[Interval, int] | None:
    """How much higher the first one's OKS-AP is, on the same pairs, and on how many; None of no people."""
    one, other = _people(first), _people(second)
    both = sorted(set(one) & set(other))
    if not both:
        return None
    mine, theirs = (Ranked([people[number] for number in both]) for people in (one, other))
    apart = lambda chosen: mine.precisions(chosen) - theirs.precisions(chosen)  # noqa: E731
    return interval(apart, len(both), resamples=AP_RESAMPLES, level=level, batched=True), len(both)


def _add_sets(group: Group, pictures: PictureScores, arms: Sequence[Arm]) -> None:
    true = sum(pictures.counts.get(arm.folder, 0) for arm in arms if arm.label == TRUE)
    for measure, found in pictures.of_set.items():
        for arm in (arm for arm in arms if arm.folder in found):
            value, spread = found[arm.folder]
            group.intervals.setdefault(measure, {})[arm.label] = Interval(value, math.nan, math.nan)
            group.pictures.setdefault(measure, {})[arm.label] = pictures.counts[arm.folder], true
            if math.isfinite(spread):
                group.spread.setdefault(measure, {})[arm.label] = spread


def _differences(
    compared: Sequence[Arm],
    values: Mapping[str, Mapping[str, Mapping[str, ByPair]]],
    rows: Mapping[str, Sequence[Row]],
) -> list[Difference]:
    """Every two adapters of one kind, in that kind's measures and in those of every picture."""
    found = []
    rivals = [pair for pair in combinations(compared, 2) if pair[0].kind == pair[1].kind]
    together = Counter(first.kind for first, _ in rivals)
    for first, second in rivals:
        for kind in (first.kind, ""):
            comparisons = together[kind] if kind else len(rivals)
            level = 1 - (1 - LEVEL) / comparisons
            for measure in (name for name in MEASURES if name in values.get(kind, {})):
                one, other = (values[kind][measure].get(arm.label, {}) for arm in (first, second))
                both = sorted(set(one) & set(other))
                if both:
                    each = np.array([one[number] - other[number] for number in both])
                    told = mean_interval(each, level=level)
                    found.append(Difference(measure, first.label, second.label, told, len(both), comparisons))
            if kind == "openpose":
                precision = _precision_apart(rows[first.folder], rows[second.folder], level=level)
                told_of = (AP, first.label, second.label)
                found += [Difference(*told_of, *precision, comparisons)] if precision else []
    return found


def _reaches(
    compared: Sequence[Arm], values: Mapping[str, Mapping[str, Mapping[str, ByPair]]]
) -> dict[str, Interval]:
    found = {}
    for arm in compared:
        by_arm = values.get(arm.kind, {}).get(principal(arm.kind), {})
        if not all(by_arm.get(label) for label in (arm.label, FLOOR, CEILING)):
            continue
        numbers = sorted(set(by_arm[arm.label]) & set(by_arm[FLOOR]) & set(by_arm[CEILING]))
        table = np.array([[by_arm[x][n] for x in (FLOOR, arm.label, CEILING)] for n in numbers])
        if not _is_ahead(table, lower=MEASURES[principal(arm.kind)].lower):
            continue

        def share(chosen: Any, table: Any = table) -> float:
            floor, ours, ceiling = table[chosen].mean(axis=0)
            return float((ours - floor) / (ceiling - floor)) if ceiling != floor else math.nan

        if len(table) and math.isfinite(share(np.arange(len(table)))):
            found[arm.label] = interval(share, len(table))
    return found


def _is_ahead(table: NDArray[np.float64], *, lower: bool) -> bool:
    """Whether the ceiling is surely better than the floor; only then is there a way from one to the other."""
    ahead = mean_interval((table[:, 2] - table[:, 0]) * (-1 if lower else 1))
    return ahead.low > 0


def _orders(
    compared: Sequence[Arm], values: Mapping[str, Mapping[str, Mapping[str, ByPair]]]
) -> dict[str, list[int]]:
    found = {}
    for arm in compared:
        measure = principal(arm.kind)
        told = values.get(arm.kind, {}).get(measure, {}).get(arm.label, {})
        sign = 1 if MEASURES[measure].lower else -1
        found[arm.label] = sorted(told, key=lambda number: (sign * told[number], number))
    return found


def _seconds(arms: Sequence[Arm], rows: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    found = {}
    for arm in arms:
        told = [row.seconds for row in rows[arm.folder] if row.seconds is not None]
        if told and arm.label not in (TRUE, CEILING):
            found[arm.label] = float(np.median(told))
    return found

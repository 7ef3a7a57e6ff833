"""What an evaluation concludes: how sure it is, of few pairs, of many adapters, and where there is no way."""

import math

import numpy as np
import pytest

from controlkit.metrics import mean_interval
from controlkit.metrics.pose_ap import Matches
from controlkit.training.evaluation.arms import Arm
from controlkit.training.evaluation.page import _what_is_drawn
from controlkit.training.evaluation.picture_scores import PictureScores
from controlkit.training.evaluation.request import CEILING, FLOOR, TRUE, Compared
from controlkit.training.evaluation.rows import Row
from controlkit.training.evaluation.summary import Summary, summarise
from controlkit.training.evaluation.telling import table


def summary(kind: str, measure: str, **values: object) -> Summary:
    """Of the values of each pair, by arm: floor, ceiling, and adapters by name."""
    labels = {"floor": FLOOR, "ceiling": CEILING}
    arms = [
        Arm(labels.get(name, name), name, *(() if name in labels else (kind, Compared(name, kind, {}, name))))
        for name in values
    ]
    rows = {
        name: [Row(name, n, 0, {kind: {measure: float(value)}}) for n, value in enumerate(np.array(told))]
        for name, told in values.items()
    }
    assert TRUE not in values
    return summarise(arms, rows, [kind], PictureScores(), {})


def test_few_pairs_give_no_verdict():
    """Seven pairs of ten say nothing, however clear they look."""
    seven = summary("canny", "edge F1", a=np.linspace(0.8, 0.9, 7), b=np.linspace(0.1, 0.2, 7))
    (only,) = seven.differences
    assert only.verdict == "7 pairs are too few to tell"
    assert "a - b, edge F1: 0.700: 7 pairs are too few to tell" in table(seven)
    eight = summary("canny", "edge F1", a=np.linspace(0.8, 0.9, 8), b=np.linspace(0.1, 0.2, 8))
    assert eight.differences[0].verdict == "a is better"
    depth = summary("depth", "depth error", a=np.linspace(0.8, 0.9, 8), b=np.linspace(0.1, 0.2, 8))
    assert depth.differences[0].verdict == "b is better"


def test_many_comparisons_hold_together():
    """Nine adapters without a difference: at 95 % each, two of the 36 comparisons would name a better one."""
    random = np.random.default_rng(4)
    same = {f"a{k}": random.normal(size=40) for k in range(9)}
    alone = [mean_interval(same[one] - same[other]) for i, one in enumerate(same) for other in list(same)[:i]]
    assert sum(found.low > 0 or found.high < 0 for found in alone) >= 1
    found = summary("canny", "edge F1", **same).differences
    assert len(found) == 36
    assert {one.verdict for one in found} == {"no difference to be seen"}
    two = summary("canny", "edge F1", a0=same["a0"], a1=same["a1"]).differences[0]
    assert two.interval == mean_interval(same["a0"] - same["a1"])  # of two there is one comparison


def test_what_is_compared_in_one_measure_counts_together():
    """Adapters of one kind in its measures, and all of them in what every picture has."""
    random = np.random.default_rng(4)
    kinds = {"a": "canny", "b": "canny", "c": "canny", "d": "depth", "e": "depth"}
    arms = [Arm(name, name, kind, Compared(name, kind, {}, name)) for name, kind in kinds.items()]
    measure = {"canny": "edge F1", "depth": "depth error"}
    rows = {
        name: [
            Row(name, n, 0, {kind: {measure[kind]: random.random()}, "": {"CLIP score": random.random()}})
            for n in range(20)
        ]
        for name, kind in kinds.items()
    }
    found = summarise(arms, rows, ["canny", "depth"], PictureScores(), {}).differences
    assert {(one.measure, one.comparisons) for one in found} == {
        ("edge F1", 3),
        ("depth error", 1),
        ("CLIP score", 4),
    }
    assert len(found) == 3 + 1 + 4


def test_the_best_pair_comes_first():
    values = [0.2, 0.9, 0.1, 0.9]
    assert summary("canny", "edge F1", a=values).order == {"a": [1, 3, 0, 2]}
    assert summary("depth", "depth error", a=values).order == {"a": [2, 0, 1, 3]}


def test_adapters_are_compared_on_the_pairs_that_both_have():
    arms = [Arm(name, name, "canny", Compared(name, "canny", {}, name)) for name in ("a", "b")]
    rows = {
        name: [Row(name, n, 0, {"canny": {"edge F1": n / 100 + (name == "a") / 10}}) for n in numbers]
        for name, numbers in (("a", range(20)), ("b", range(5, 30)))
    }
    (only,) = summarise(arms, rows, ["canny"], PictureScores(), {}).differences
    assert only.pairs == 15
    assert only.interval.value == pytest.approx(0.1)


def test_few_pairs_are_too_few_for_many_comparisons():
    """Of 8 pairs three adapters can be told apart, four and eight cannot, whatever the work."""
    random = np.random.default_rng(2)
    values = {f"a{k}": k + random.normal(size=8) / 9 for k in range(8)}
    three = summary("canny", "edge F1", **dict(list(values.items())[:3]))
    assert [one.verdict for one in three.differences] == ["a1 is better", "a2 is better", "a2 is better"]
    assert [one.level for one in three.differences] == pytest.approx([1 - 0.05 / 3] * 3)
    eight = summary("canny", "edge F1", **values)
    assert {one.verdict for one in eight.differences} == {"8 pairs are too few for 28 comparisons"}
    assert math.isfinite(eight.groups[0].intervals["edge F1"]["a0"].low)  # its own, of no comparison


def test_poses_of_few_pairs_are_compared_in_bounded_work():
    names = [f"a{k}" for k in range(5)]
    arms = [Arm(name, name, "openpose", Compared(name, "openpose", label=name)) for name in names]
    rows = {
        name: [Row(name, n, 0, {"openpose": {"OKS": 0.5}}, people(n / 9)) for n in range(8)] for name in names
    }
    found = summarise(arms, rows, ["openpose"], PictureScores(), {})
    told = {one.verdict for one in found.differences if one.measure == "OKS-AP"}
    assert told == {"8 pairs are too few for 10 comparisons"}


@pytest.mark.parametrize(
    ("kind", "measure", "floor", "ceiling", "is_there"),
    [
        ("canny", "edge F1", 0.3, 0.9, True),
        ("canny", "edge F1", 0.6, 0.6, False),  # no control is as good as the true pictures
        ("canny", "edge F1", 0.9, 0.3, False),  # it is better
        ("depth", "depth error", 0.4, 0.1, True),
        ("depth", "depth error", 0.1, 0.4, False),
    ],
)
def test_the_way_is_told_where_there_is_one(kind, measure, floor, ceiling, is_there):
    random = np.random.default_rng(0)
    noise = [random.normal(0, 0.05, size=20) for _ in range(3)]
    middle = (floor + ceiling) / 2
    found = summary(kind, measure, floor=floor + noise[0], mine=middle + noise[1], ceiling=ceiling + noise[2])
    assert set(found.reach) == ({"mine"} if is_there else set())
    if is_there:
        assert found.reach["mine"].value == pytest.approx(0.5, abs=0.08)
        assert found.reach["mine"].low < 0.5 < found.reach["mine"].high
    assert any("of the way" in line for line in table(found)) == is_there


def test_seeds_of_a_pair_count_once():
    """An interval over pairs does not shrink because every pair was drawn four times."""
    values = np.random.default_rng(1).normal(size=12)
    once = summary("canny", "edge F1", a=values)
    arms = [Arm("a", "a", "canny", Compared("a", "canny", {}, "a"))]
    rows = {
        "a": [Row("a", n, seed, {"canny": {"edge F1": v}}) for n, v in enumerate(values) for seed in range(4)]
    }
    four = summarise(arms, rows, ["canny"], PictureScores(), {})
    (one, other) = (found.groups[0].intervals["edge F1"]["a"] for found in (once, four))
    assert math.isclose(one.low, other.low)
    assert math.isclose(one.high, other.high)


def people(score: float) -> Matches:
    """One person that was asked for and found with this similarity."""
    return Matches(np.array([[score]]), np.array([1.0]))


@pytest.mark.slow
def test_precision_of_poses_is_compared_between_adapters():
    """On the same pairs: the first finds everybody, the other every second."""
    arms = [
        Arm(label, label, "openpose", Compared(label, "openpose", label=label)) for label in ("one", "other")
    ]
    arms += [Arm(TRUE, TRUE)]
    rows = {
        "one": [Row("one", n, 0, {"openpose": {"OKS": 1.0}}, people(1.0)) for n in range(40)],
        "other": [Row("other", n, 0, {"openpose": {"OKS": n % 2}}, people(float(n % 2))) for n in range(40)],
        TRUE: [],
    }
    found = summarise(arms, rows, ["openpose"], PictureScores(), {})
    (told,) = [one for one in found.differences if one.measure == "OKS-AP"]
    (group,) = [group for group in found.groups if group.kind == "openpose"]
    values = {label: group.intervals["OKS-AP"][label].value for label in ("one", "other")}
    assert told.interval.value == pytest.approx(values["one"] - values["other"])
    assert told.interval.low > 0
    assert (told.verdict, told.pairs) == ("one is better", 40)


def test_sets_of_pictures_say_how_large_they_are():
    arms = [Arm("one", "one", "canny", Compared("one", "canny", label="one")), Arm(TRUE, TRUE)]
    pictures = PictureScores(of_set={"KID": {"one": (0.5, math.nan)}}, counts={"one": 104, TRUE: 52})
    found = summarise(arms, {"one": [], TRUE: []}, [], pictures, {})
    assert found.groups[0].pictures == {"KID": {"one": (104, 52)}}


def test_charts_say_what_their_bars_are():
    eight = summary("canny", "edge F1", a=np.linspace(0.1, 0.9, 8))  # of one adapter, too
    text = _what_is_drawn(eight.groups[0])
    assert text == (
        "Dots are means over pairs; bars, and the brackets of the table, their 95% intervals by bootstrap"
        " over pairs. Fewer than 8 pairs have none."
    )
    arms = [Arm("one", "one", "canny", Compared("one", "canny", label="one")), Arm(TRUE, TRUE)]
    pictures = PictureScores(of_set={"KID": {"one": (0.5, math.nan)}}, counts={"one": 104, TRUE: 52})
    sets = summarise(arms, {"one": [], TRUE: []}, [], pictures, {})
    assert _what_is_drawn(sets.groups[0]) == "What compares sets of pictures has no interval."


def test_more_diverse_is_not_called_better():
    arms = [Arm(label, label, "canny", Compared(label, "canny", label=label)) for label in ("one", "other")]
    pictures = PictureScores(
        of_pair={
            "LPIPS between seeds": {
                "one": {n: 0.5 + n / 100 for n in range(20)},
                "other": dict.fromkeys(range(20), 0.1),
            }
        }
    )
    found = summarise(arms, {"one": [], "other": []}, [], pictures, {})
    assert [told.verdict for told in found.differences] == ["one is more diverse"]


def test_copies_of_one_adapter_share_what_their_pictures_got():
    arms = [Arm(label, "same", "canny", Compared(label, "canny", label=label)) for label in ("a/x", "b/x")]
    pictures = PictureScores(
        of_pair={"CLIP score": {"same": dict.fromkeys(range(20), 25.0)}},
        of_set={"KID": {"same": (0.5, 0.1)}},
        counts={"same": 20},
    )
    (group,) = summarise(arms, {"same": []}, [], pictures, {}).groups
    assert [*group.intervals] == ["CLIP score", "KID"]
    assert all([*told] == ["a/x", "b/x"] for told in group.intervals.values())

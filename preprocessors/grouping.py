"""Which joints belong to one person: limbs are chosen greedily, persons grow from limbs (Cao et al. 2017)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Limb:
    """The pairs of candidates that one limb joins, best first."""

    pairs: np.ndarray
    """int (n, 2): the candidates' numbers among those of the limb's first and second joint."""
    scores: np.ndarray
    """float64 (n,)."""

    @classmethod
    def none(cls) -> "Limb":
        """Return a limb that nobody has."""
        return cls(np.zeros((0, 2), np.int64), np.zeros(0))


@dataclass
class Person:
    """A person as it grows."""

    joints: np.ndarray
    """int (18,): numbers of candidates among all, -1 where there is none."""
    score: float
    count: int


def choose(pairs: np.ndarray, scores: np.ndarray, first: int, second: int, *, slack: float) -> Limb | None:
    """Return the pairs (n, 2) that are left when the best go first and no candidate is used twice.

    Equal scores keep their order. None if two scores are within ``slack`` (where that is not 0) of each
    other, so that rounding could change their order.
    """
    order = np.argsort(-scores, kind="stable")
    if slack and (-np.diff(scores[order]) <= slack).any():
        return None
    used: tuple[set[int], set[int]] = set(), set()
    kept: list[int] = []
    for index in order.tolist():
        a, b = pairs[index].tolist()
        if a not in used[0] and b not in used[1]:
            used[0].add(a)
            used[1].add(b)
            kept.append(index)
            if len(kept) == min(first, second):
                break
    return Limb(pairs[kept], scores[kept])


def assemble(
    limbs: Sequence[Limb], joints: Sequence[tuple[int, int]], scores: np.ndarray, starts: np.ndarray
) -> list[Person]:
    """Return the persons that limbs, in their order, make up.

    ``joints`` are the limbs' two joints, ``scores`` those of all candidates, ``starts`` where each joint's
    candidates begin among them. A limb is added to the person that has one of its ends, joins two persons
    that share no joint, or begins a person (not so from the 18th on). The details, such as that a limb whose
    second end is known already changes nothing, are the reference's.
    """
    persons: list[Person] = []
    for k, limb in enumerate(limbs):
        a, b = joints[k]
        for (i, j), score in zip(limb.pairs.tolist(), limb.scores.tolist(), strict=True):
            ends = i + int(starts[a]), j + int(starts[b])
            _add(persons, (a, b), ends, score, scores, may_begin=k < 17)
    return persons


def _add(
    persons: list[Person],
    limb: tuple[int, int],
    ends: tuple[int, int],
    score: float,
    scores: np.ndarray,
    *,
    may_begin: bool,
) -> None:
    (a, b), (start, end) = limb, ends
    owners = [person for person in persons if person.joints[a] == start or person.joints[b] == end]
    if not owners:
        if may_begin:
            joints = np.full(18, -1)
            joints[a], joints[b] = start, end
            persons.append(Person(joints, float(scores[start]) + float(scores[end]) + score, 2))
        return
    one = owners[0]
    if len(owners) > 1:
        other = owners[1]
        if not ((one.joints >= 0) & (other.joints >= 0)).any():
            one.joints = np.maximum(one.joints, other.joints)
            one.score = one.score + other.score + score
            one.count += other.count
            persons[:] = [person for person in persons if person is not other]
            return
    elif one.joints[b] == end:
        return
    one.joints[b] = end
    one.count += 1
    one.score += float(scores[end]) + score


def mean_scores(persons: Sequence[Person]) -> np.ndarray:
    """Return the mean score of each person's joints and limbs, as OpenPose counts them: float64 (N,)."""
    return np.array([person.score / person.count for person in persons])

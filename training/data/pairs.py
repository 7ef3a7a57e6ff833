"""The pairs of a training: opened, looked at, and divided into those that are trained on and those that are
shown.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from controlkit.training.config_adapter import ControlNetRecipe, DataRecipe
from controlkit.training.data.examples import Example, Examples, size_and_digest
from controlkit.training.data.world_examples import world_examples
from controlkit.training.draws import derived_seed
from controlkit.training.world import VALIDATION_SCENES, load_world

Report = Callable[[str], None]
WORLD = "world"
_LEAST_PER_SHOWN = 4  # pairs for each that is held out: no more than a quarter of them
_LEAST_COMPARED = 2  # held-out pairs: the monitor shows a picture another one's map
SHOWN_TRAINED = 4  # pairs that are shown where none is held out
_NAMED = 5  # pairs in a message
_WORTH_SAYING = ("duplicate", "tiny", "no caption")


@dataclass(frozen=True)
class Pairs:
    """A data set, and what is done with each of its examples."""

    examples: Sequence[Example]
    sizes: list[tuple[int, int] | None]
    """Width and height of each picture, upright; None where it is not used."""
    trained: list[int]
    shown: list[int]
    """For samples, scores and the monitor: held out where there are enough, else among the trained ones."""

    @property
    def held_out(self) -> list[int]:
        """Those of the shown pairs that are not trained on."""
        return sorted(set(self.shown) - set(self.trained))


def load_pairs(recipe: ControlNetRecipe, *, report: Report) -> Pairs:
    """Open the recipe's data and look at every pair.

    Raises ValueError, naming them, for pairs that cannot be used (unless the recipe leaves them out), and for
    data that is not there.
    """
    data = recipe.data
    if data.source == WORLD and data.format in ("auto", WORLD):
        return _world(recipe, report)
    from controlkit.training.data.sources import open_examples

    examples = open_examples(data, kind=recipe.map, report=report)
    sizes, digests = _looked_at(examples, recipe, report)
    usable = [index for index, size in enumerate(sizes) if size is not None]
    if not usable:
        raise ValueError(f"{data.source}: none of the {len(examples)} pairs can be used")
    trained, shown = _divided(usable, digests, data, seed=recipe.seed, report=report)
    return Pairs(examples, sizes, trained, shown)


def _world(recipe: ControlNetRecipe, report: Report) -> Pairs:
    data, made = recipe.data, recipe.data.maps == "made"
    scenes = min(recipe.scenes, data.limit or recipe.scenes)
    world = load_world("train", scenes, report=report)
    validation = load_world("validation", VALIDATION_SCENES, report=report)
    kinds = data.map_column or (recipe.map,)
    examples = world_examples(world, kinds, made=made, title="training")
    examples += world_examples(validation, kinds, made=made, title="validation")[: data.holdout]
    height, width = world.picture[0].shape[:2]
    shown = list(range(scenes, len(examples))) or list(range(min(SHOWN_TRAINED, scenes)))
    return Pairs(examples, [(width, height)] * len(examples), list(range(scenes)), shown)


def _looked_at(
    examples: Examples, recipe: ControlNetRecipe, report: Report
) -> tuple[list[tuple[int, int] | None], Sequence[str | None]]:
    """The size of each picture, None where the pair is left out; and the digest of each that can be read."""
    data = recipe.data
    if not data.check:
        known = [size_and_digest(example) for example in examples]
        return [size for size, _ in known], [digest for _, digest in known]
    from controlkit.training.data.check import check_examples

    check = check_examples(examples, data=data, kind=recipe.map, report=report)
    usable = set(check.usable)
    if check.errors and data.bad == "stop":
        raise ValueError(
            f"{data.source}: {check.problem(_NAMED)}: mend them, or leave them out with data.bad=skip"
            " (controlkit data check shows all)"
        )
    if check.errors:
        report(f"{check.problem(_NAMED)}: they are left out")
    for code, count in check.counts.items():
        if code in _WORTH_SAYING:
            report(f"{count:,} of {len(examples):,} pairs: {code} (controlkit data check names them)")
    if unpaired := check.about_unpaired():
        report(f"{unpaired} (controlkit data check names them)")
    sizes = [size if index in usable else None for index, size in enumerate(check.sizes)]
    return sizes, check.digests


def _divided(
    usable: Sequence[int], digests: Sequence[str | None], data: DataRecipe, *, seed: int, report: Report
) -> tuple[list[int], list[int]]:
    """The pairs to train on, and those to show."""
    random = np.random.default_rng(derived_seed(seed, "holdout")).permutation(len(usable))
    order = [usable[k] for k in random]
    held = held_of(data.holdout, len(usable), report)
    same: dict[str | int, list[int]] = {}
    for index in order:
        same.setdefault(digests[index] or index, []).append(index)
    chosen, apart = _held_apart(list(same.values()), len(order) // _LEAST_PER_SHOWN, held)
    if len(chosen) < min(held, _LEAST_COMPARED):
        report("too few pairs have a picture of their own to hold some out: what is shown is trained on")
        chosen, apart = [], set()
    if not chosen:
        first_of_each = [twins[0] for twins in same.values()]  # the monitor compares pictures with others
        return list(usable), sorted(first_of_each[:SHOWN_TRAINED])
    if len(chosen) < held:
        report(f"of these {held} pairs {len(chosen)} are held out: too many others show the pictures of more")
    if more := len(apart) - len(chosen):
        report(f"{more} more pairs, which show the pictures of those that are held out, are not trained on")
    return sorted(set(usable) - apart), sorted(chosen)


def _held_apart(same: Sequence[list[int]], most: int, held: int) -> tuple[list[int], set[int]]:
    """So many pairs to hold out; and they with all others of the same pictures, at most so many: what is
    measured on a picture that was trained on says nothing of others. same: the pairs of each picture.
    """
    chosen: list[int] = []
    apart: set[int] = set()
    for twins in same:
        if len(chosen) < held and len(apart) + len(twins) <= most:
            chosen.append(twins[0])
            apart.update(twins)
    return chosen, apart


def held_of(asked: int, pairs: int | None, report: Report) -> int:
    """How many pairs are held out of so many: a quarter at most, and none where no two could be compared.

    pairs: None where it is not known, and more than enough.
    """
    held = asked if pairs is None else min(asked, pairs // _LEAST_PER_SHOWN)
    if held < min(asked, _LEAST_COMPARED):
        report(f"{pairs} pairs are too few to hold some out: what is shown is trained on")
        return 0
    if held < asked:
        report(f"{held} of {pairs} pairs are held out, not {asked}: a quarter at most")
    return held

"""Opening what a request names: the bundled world, a data set, or what a run held out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from controlkit.training.checkpoints import latest_state
from controlkit.training.config import ControlNetRecipe, load_recipe
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import digest_of_pairs, size_of_example
from controlkit.training.data.made_maps import range_ends
from controlkit.training.data.source_recipe import recipe_of
from controlkit.training.data.visits import Visits
from controlkit.training.draws import derived_seed
from controlkit.training.evaluation.held_out import DataSet, HeldOut, Opened, WorldScenes
from controlkit.training.evaluation.request import WORLD, Request, run_config
from controlkit.training.reporting.run_record import json_of

if TYPE_CHECKING:
    from controlkit.training.data.examples import Example
    from controlkit.training.data.pairs import Pairs

Report = Callable[[str], None]
Options = Mapping[str, Mapping[str, Any]]
_NAMED = 3  # broken pairs in a message
_DIVIDING = ("format", "split", "streaming", "picture_column", "limit", "holdout", "bad", "check")
# an evaluation sees pictures and maps as they are
_STILL = ("data.flip=0", "data.map_blur=0", "data.pose_drop=0", "data.pose_jitter=0")


def open_held_out(
    request: Request,
    kinds: Sequence[str],
    *,
    resolution: int,
    options: Options | None = None,
    report: Report = lambda _: None,
) -> HeldOut:
    """Open the pairs of a request. kinds: of maps that are wanted. resolution: the base's. options: how maps
    of each kind are made, where the data does not say.

    Raises ValueError, one line: no such data, a pair that cannot be read (unless bad=skip leaves it out), or
    maps of one kind where several are wanted.
    """
    usual = {kind: dict((options or {}).get(kind, {})) for kind in kinds}
    run = run_config(request.data)
    if run is not None:
        return _of_run(request, run, usual, resolution=resolution, report=report)
    if request.data == WORLD:
        if request.settings:
            raise ValueError(f"the bundled world has no settings, and given is {min(request.settings)}")
        return _world(request, usual, size=resolution)
    data = recipe_of(request.data, kinds[0], request.settings, where="evaluate")
    opened = _opened(request, data, usual, resolution=resolution, report=report)
    examples, visits, _ = next(iter(opened.values()))
    usable = [index for index, shape in enumerate(visits.shape_of) if shape >= 0]
    chosen = _looked_at(opened, _chosen(usable, request.count), report)
    title = f"{len(chosen)} of {len(examples)} pairs of {os.path.basename(data.source.rstrip('/'))}"
    return DataSet(opened, chosen, title=title)


def _world(request: Request, options: Options, *, size: int) -> WorldScenes:
    if not request.count:
        raise ValueError("the bundled world has no end: say with -n how many of its scenes")
    told = {kind: {**given, **request.options.get(kind, {})} for kind, given in options.items()}
    return WorldScenes(request.count, told, size=size)


def _of_run(request: Request, config: Path, options: Options, *, resolution: int, report: Report) -> HeldOut:
    """What the run of a recipe held out; settings change how it is seen, never which pairs they are."""
    for name in request.settings:
        if name in _DIVIDING:
            raise ValueError(
                f"{name} decides which pairs a run holds out, and {config} settles it: leave it away, or"
                " name the data set instead of the run"
            )
    moved = [f"data.source={request.settings['source']}"] if "source" in request.settings else []
    recipe = load_recipe(str(config), moved)
    assert isinstance(recipe, ControlNetRecipe)
    seen = load_recipe(str(config), [*_STILL, *(f"data.{k}={v}" for k, v in request.settings.items())])
    assert isinstance(seen, ControlNetRecipe)
    data = seen.data
    if data.source == WORLD:
        told = {
            kind: {**given, **(_fixed(data.options) if data.maps == "made" and kind == recipe.map else {})}
            for kind, given in options.items()
        }
        return _world(request, told, size=data.resolution or resolution)
    if data.streaming:
        raise ValueError(f"{request.data} was trained on a stream: name a data set to evaluate on")
    from controlkit.training.data.pairs import load_pairs

    pairs = load_pairs(recipe, report=report)
    _refuse_others(request.data, config.parent, recipe, pairs)
    kept = pairs.held_out
    if not kept:
        raise ValueError(
            f"{request.data} held no pairs out (data.holdout): name another data set to evaluate on"
        )
    opened = _opened(
        request, data, options, resolution=resolution, report=report, sizes=pairs.sizes, own=recipe.map
    )
    chosen = _looked_at(opened, _chosen(kept, request.count), report)
    title = f"{len(chosen)} pairs that the run {config.parent.resolve().name} held out"
    return DataSet(opened, chosen, title=title, is_held_out=True)


def _refuse_others(name: str, run: Path, recipe: ControlNetRecipe, pairs: Pairs) -> None:
    """Refuse pairs that are held out of a data set as it is now, and were not when the run was trained."""
    state = latest_state(run / "checkpoints").get("task_state") or {}
    facts = json_of(run / "facts.json")
    if digest := state.get("held_out_sha256") or facts.get("data_held_out_sha256"):
        kept, made = [pairs.examples[index] for index in pairs.held_out], recipe.data.maps == "made"
        is_other = digest != digest_of_pairs((example, _content(example, made=made)) for example in kept)
    else:  # of older runs, and of those without a cache, the number alone is known
        trained = state.get("pairs", facts.get("data_pairs"))
        is_other = trained not in (None, len(pairs.trained))
    if is_other:
        raise ValueError(
            f"the data set {recipe.data.source} has changed since {name} was trained on it, and which pairs"
            " were held out is not known any more: bring it back as it was, or name the data set in place"
            " of the run"
        )


def _content(example: Example, *, made: bool) -> list[str]:
    """The digests of a pair's picture and maps, as a training knows them."""
    picture = example.picture.digest().hex()
    if made or not example.maps:
        return [picture, picture]
    return [picture, *(piece.digest().hex() for piece in example.maps)]


def _opened(
    request: Request,
    data: DataRecipe,
    options: Options,
    *,
    resolution: int,
    report: Report,
    sizes: Sequence[tuple[int, int] | None] = (),
    own: str = "",
) -> Opened:
    """The data set once for each kind. own: the kind that `data.options` are of; "" for every one."""
    from controlkit.training.data.sources import open_examples

    found: Opened = {}
    side = data.resolution or resolution
    for kind, usual in options.items():
        one = {"map_column": (kind,)} if kind in data.map_column else {}  # of those that are stacked its own
        of_kind = data.model_copy(update=one)
        examples = open_examples(of_kind, kind=kind, report=report)
        sizes = sizes or _sizes(examples, data, report)
        of_data = data.options if own in ("", kind) else {}
        asked = request.options.get(kind, {})
        if examples[0].maps and data.maps != "made":
            # the rest of the options is of maps of generated pictures
            told = {**of_data, **_style(kind, {**usual, **asked})}
        else:
            told = {**usual, **_fixed(of_data), **asked}
        seen = of_kind.model_copy(update={"options": told})
        found[kind] = (
            examples,
            Visits(examples, sizes, data=seen, kind=kind, resolution=side, seed=0),
            seen,
        )
    _refuse_one_for_all(found, data.source)
    return found


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options without those that a training draws anew at each visit: an evaluation takes the usual ones."""
    return {name: value for name, value in options.items() if range_ends(value) is None}


def _style(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How joints from files are drawn, where that is said."""
    return {"style": options["style"]} if kind == "openpose" and "style" in options else {}


def _sizes(examples: Sequence[Example], data: DataRecipe, report: Report) -> list[tuple[int, int] | None]:
    """The size of every picture; None for those that cannot be read and are left out."""
    sizes: list[tuple[int, int] | None] = []
    broken: list[str] = []
    for example in examples:
        try:
            sizes.append(size_of_example(example))
        except ValueError as error:
            sizes.append(None)
            broken.append(str(error))
    if not broken:
        return sizes
    told = f"{len(broken)} of {len(examples)} pairs cannot be read: {'; '.join(broken[:_NAMED])}"
    if data.bad == "stop":
        raise ValueError(f"{told}: mend them, or leave them out with bad=skip")
    if len(broken) == len(examples):
        raise ValueError(told)
    report(f"{told}: they are left out")
    return sizes


def _looked_at(opened: Opened, chosen: Sequence[int], report: Report) -> list[int]:
    """Those of the chosen pairs that can be used, pictures and maps decoded once: before minutes of work."""
    from controlkit.training.data.check import check_examples

    left = list(chosen)
    for kind, (examples, _, data) in opened.items():
        check = check_examples(
            [examples[k] for k in left], data=data, kind=kind, lint=False, report=lambda _: None
        )
        if not check.errors:
            continue
        if data.bad == "stop" or not check.usable:
            raise ValueError(
                f"{data.source}: {check.problem(_NAMED)}: mend them, or leave them out: bad=skip"
            )
        report(f"{check.problem(_NAMED)}: they are left out")
        left = [left[k] for k in check.usable]
    return left


def _refuse_one_for_all(found: Opened, source: str) -> None:
    """Refuse to take the same files for maps of two kinds."""
    seen: dict[str, str] = {}
    for kind, (examples, visits, _) in found.items():
        if visits.made:
            continue
        name = examples[next(k for k, shape in enumerate(visits.shape_of) if shape >= 0)].maps[0].name
        if name in seen:
            raise ValueError(
                f"{source} has maps of one kind, and adapters of two are named ({seen[name]}, {kind}):"
                " evaluate them one after the other, or make the maps of the pictures with maps=made"
            )
        seen[name] = kind


def _chosen(usable: Sequence[int], count: int) -> list[int]:
    """Some of the pairs, drawn once and for all: more of them contain fewer."""
    if not count or count >= len(usable):
        return list(usable)
    order = np.random.default_rng(derived_seed(0, "evaluate")).permutation(len(usable))
    return sorted(usable[k] for k in order[:count])

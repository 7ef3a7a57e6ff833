"""From a recipe's name to a finished run: builds the task, trains, measures."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from controlkit import known_adapters
from controlkit.base_structure import check_fits_at_hand
from controlkit.files import as_text
from controlkit.folders import check_weights, load_part, quiet_libraries, read_json
from controlkit.naming import check_callables, check_list_of
from controlkit.notices import reason
from controlkit.training.config import (
    BaseRecipe,
    ControlNetRecipe,
    DepthRecipe,
    EstimatorRecipe,
    PoseRecipe,
    Recipe,
    TextRecipe,
    VaeRecipe,
    given_keys,
    load_recipe,
    moved_from,
    overridden_keys,
)
from controlkit.training.config_adapter import unused
from controlkit.training.going_on import as_begun
from controlkit.training.lock import locked
from controlkit.training.loop import train
from controlkit.training.machine import Machine, device_name, remarks
from controlkit.training.optimizers import check_optimizer
from controlkit.training.saving import check_folder
from controlkit.training.task import Task
from controlkit.training.watch import Progress
from controlkit.training.world import VALIDATION_SCENES, World, load_world

RESULT = {"controlnet": "controlnet"}  # folder of the result within the run, by task; "result" for the others


@dataclass(frozen=True)
class Result:
    """What a training left: the run's folder, the result's folder, scores by name, lines to show.

    A training that was asked to stop has no result yet, and says at which step it ``stopped_at``, and by
    which signal.
    """

    folder: Path
    result: Path | None
    scores: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    stopped_at: int | None = None
    signal: int = 0
    base: str = ""
    """Of an adapter, the base that it was trained for."""


def train_recipe(
    name_or_path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Result:
    """Train what a recipe describes, in its `out` folder; a run that was stopped goes on where it was, by
    its own recipe in everything that is not given.

    name_or_path: of a bundled recipe (`config.recipe_names`), or a recipe's file. overrides: as on the
    command line, ["steps=200"]. progress: called as the training goes on.

    Raises ValueError, one line, for whatever the recipe or the folder makes impossible.
    """
    name_or_path = as_text("a recipe", name_or_path)
    check_list_of("overrides", overrides, str, '"steps=200"')
    check_callables(progress=progress)
    given = given_keys(name_or_path, overrides)
    recipe, note = as_begun(
        load_recipe(name_or_path, overrides), given, overridden=overridden_keys(overrides)
    )
    before = moved_from(name_or_path, overrides)
    set_threads(recipe)
    folder, name = Path(recipe.out), RESULT.get(recipe.task, "result")
    check_folder(recipe, folder, result=name)
    _check_apart(recipe, folder)
    check_models(recipe)
    machine = Machine(recipe)
    if not machine.processes.is_first:
        return _trained(recipe, folder, name, machine, lambda _: None)
    _make(folder)
    try:
        with locked(folder):
            moved = f"{folder} goes on where it lies, and not in {before}, which its config.toml names as out"
            for line in filter(None, [moved if before else "", note]):
                progress(Progress(0, recipe.steps, math.nan, 0.0, math.nan, line))
            return _trained(recipe, folder, name, machine, progress)
    finally:
        with suppress(OSError):
            folder.rmdir()  # only where nothing was put into it


def _check_apart(recipe: Recipe, folder: Path) -> None:
    """Refuse a run in the very folder of its data set, where its samples would be pictures to train on."""
    source = recipe.data.source if isinstance(recipe, ControlNetRecipe) else ""
    if source and os.path.realpath(os.path.expanduser(source)) == os.path.realpath(folder):
        raise ValueError(f"out={folder} is the folder of the data set: choose another, as out=runs/mine")


def set_threads(recipe: Recipe) -> None:
    """Use as many CPU threads as the recipe says."""
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the folder {folder}: {error.strerror}") from error


def _trained(
    recipe: Recipe, folder: Path, name: str, machine: Machine, progress: Callable[[Progress], None]
) -> Result:
    import torch

    with torch.inference_mode(False), torch.enable_grad():  # whatever block of the caller's this is in
        with quiet_libraries():
            task = build_task(recipe, machine, progress)
        run = train(task, recipe, folder, machine=machine, progress=progress, result=name)
    if not run.finished:
        return Result(folder, None, stopped_at=run.step, signal=run.stopped_by)
    if not machine.processes.is_first:
        return Result(folder, None)
    if not isinstance(recipe, ControlNetRecipe):
        return Result(folder, folder / name)
    return _told(recipe, folder, folder / name, progress)


def _told(
    recipe: ControlNetRecipe, folder: Path, result: Path, progress: Callable[[Progress], None]
) -> Result:
    """Measure the result, write its card and the report, and put it on the hub where that is asked for."""
    from controlkit.training.reporting.card import write_card
    from controlkit.training.reporting.report import write_report
    from controlkit.training.reporting.showing import is_examined

    finished = Result(folder, result)
    if is_examined(recipe):
        try:
            finished = _scored(recipe, folder, result, progress)
        except (ValueError, RuntimeError, OSError) as error:
            line = f"the result is not measured ({reason(error)}): the same command tries again"
            finished = Result(folder, result, lines=[line])
    write_card(result, run_folder=folder, repo_id=recipe.push_to_hub)
    report = write_report(folder)
    lines = [*finished.lines, f"the whole story: {report}"]
    if recipe.push_to_hub:
        from controlkit.training.reporting.publishing import push_to_hub

        lines.append(f"on the hub: {push_to_hub(result, recipe.push_to_hub)}")
    return Result(folder, result, finished.scores, lines, base=recipe.base)


def check_models(recipe: Recipe) -> None:
    """Refuse a recipe that names a model that is not there, before scenes are rendered for it.

    Raises ValueError, one line within about 5 seconds. Nothing is downloaded.
    """
    from controlkit.adapters import check_adapter
    from controlkit.base import check_base
    from controlkit.training.reporting.publishing import check_repo_id
    from controlkit.training.reporting.trackers import check_trackers

    if isinstance(recipe, ControlNetRecipe):
        check_optimizer(recipe.optimizer)
        check_trackers(recipe.trackers)
        if recipe.push_to_hub:
            check_repo_id(recipe.push_to_hub)
        if recipe.init is not None:
            known_adapters.check(recipe.map, recipe.init, recipe.base)
            check_fits_at_hand(recipe.init, recipe.base)
        check_base(recipe.base)
        if recipe.init is not None:
            check_adapter(recipe.init)
        return
    if isinstance(recipe, VaeRecipe) and recipe.train == "decoder" and recipe.init is None:
        raise ValueError(
            'train = "decoder" needs init, the folder of the autoencoder whose decoder is trained'
        )
    parts = {name: getattr(recipe, name, None) for name in ("init", "vae", "decoder")}
    if isinstance(recipe, BaseRecipe):
        parts |= {"init": recipe.init and f"{recipe.init}/unet", "text": f"{recipe.text}/text_encoder"}
    for part in parts.values():
        if part is not None:
            read_json(Path(part) / "config.json")
            check_weights(Path(part))
    if isinstance(recipe, EstimatorRecipe) and recipe.autoencoder is not None:
        check_base(recipe.autoencoder)


def _scored(
    recipe: ControlNetRecipe, folder: Path, result: Path, progress: Callable[[Progress], None]
) -> Result:
    """Measure a trained adapter on held-out scenes, write scores.json, and say it in lines."""
    from diffusers import UNet2DConditionModel

    from controlkit.adapters import load_adapter
    from controlkit.base import load_base
    from controlkit.training.quality import FOLLOWS, examine
    from controlkit.training.reporting.measured import scores_of
    from controlkit.training.reporting.showing import examined_kinds

    kinds = examined_kinds(recipe)

    def measure() -> dict[str, Any]:
        message = f"measuring on {recipe.score_scenes} held-out scenes"
        progress(Progress(recipe.steps, recipe.steps, math.nan, 0.0, math.nan, message))
        base = load_base(recipe.base, device=device_name(recipe))
        if not recipe.sd_locked:
            unet = load_part(UNet2DConditionModel, folder / "unet", dtype=base.dtype)
            base = replace(base, unet=unet.to(base.device))
        adapter = load_adapter(str(result), base=base)
        examination = examine(base, dict.fromkeys(kinds, adapter), scenes=recipe.score_scenes)
        return {"scenes": examination.scenes, **examination.scores}

    scores = scores_of(folder, result, recipe.score_scenes, measure)
    lines = [f"on {scores['scenes']} held-out scenes:  no control -> this adapter  (ceiling)"]
    for kind in kinds:
        for score in (FOLLOWS[kind], "silhouette IoU", "colours"):
            floor, ours, ceiling = (scores[row][score] for row in ("floor", kind, "ceiling"))
            of = f"{kind}: " if len(kinds) > 1 else ""
            lines.append(f"  {of}{score:<15} {floor:.3f} -> {ours:.3f}  ({ceiling:.3f})")
    return Result(folder, result, dict(scores[kinds[0]]), lines)


def build_task(recipe: Recipe, machine: Machine, progress: Callable[[Progress], None]) -> Task:
    """The task of a recipe, its data loaded (and rendered, where the cache lacks it)."""
    device = machine.device

    def report(message: str) -> None:
        progress(Progress(0, recipe.steps, math.nan, 0.0, math.nan, message))

    for remark in remarks(recipe, device):
        report(remark)
    if isinstance(recipe, ControlNetRecipe):
        from controlkit.training.adapter import ControlNetTask

        for line in unused(recipe):
            report(line)
        return ControlNetTask(recipe, machine, report)
    world, validation = worlds(recipe, report)
    if isinstance(recipe, VaeRecipe):
        from controlkit.training.vae import VaeTask

        return VaeTask(recipe, world, validation, device)
    if isinstance(recipe, TextRecipe):
        from controlkit.training.text import TextTask

        return TextTask(recipe, world, validation, device)
    if isinstance(recipe, BaseRecipe):
        from controlkit.training.base_model import BaseTask

        return BaseTask(recipe, world, validation, device, report)
    if isinstance(recipe, PoseRecipe):
        from controlkit.training.estimators import PoseTask

        return PoseTask(recipe, world, validation, device, report)
    if isinstance(recipe, DepthRecipe):
        from controlkit.training.estimators import DepthTask

        return DepthTask(recipe, world, validation, device, report)
    raise AssertionError(f"no task for {type(recipe)}")


def worlds(recipe: Recipe, report: Callable[[str], None]) -> tuple[World, World]:
    """The recipe's training scenes and the scenes held out for samples and scores."""
    train_scenes = load_world("train", recipe.scenes, report=report)
    return train_scenes, load_world("validation", VALIDATION_SCENES, report=report)

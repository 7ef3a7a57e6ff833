"""From a recipe's name to a finished run: builds the task, trains, measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from controlkit import files
from controlkit.folders import check_weights, quiet_libraries, read_json
from controlkit.training.config import (
    BaseRecipe,
    ControlNetRecipe,
    DepthRecipe,
    EstimatorRecipe,
    PoseRecipe,
    Recipe,
    TextRecipe,
    VaeRecipe,
    load_recipe,
)
from controlkit.training.loop import Progress, Task, check_folder, device_name, train
from controlkit.training.world import World, load_world

VALIDATION_SCENES = 250  # rendered for samples and scores; a chunk of the cache
RESULT = {"controlnet": "controlnet"}  # folder of the result within the run, by task; "result" for the others


@dataclass(frozen=True)
class Result:
    """What a finished training left: the run's folder, the result's folder, scores by name, lines to show."""

    folder: Path
    result: Path
    scores: dict[str, float] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def train_recipe(
    name_or_path: str, overrides: Sequence[str] = (), *, progress: Callable[[Progress], None] = lambda _: None
) -> Result:
    """Train what a recipe describes, in its `out` folder; a run that was stopped goes on where it was.

    Raises ValueError, one line, for whatever the recipe or the folder makes impossible.
    """
    recipe = load_recipe(name_or_path, overrides)
    if recipe.threads:
        import torch

        torch.set_num_threads(recipe.threads)
    folder, name = Path(recipe.out), RESULT.get(recipe.task, "result")
    check_folder(recipe, folder, result=name)
    check_models(recipe)
    with quiet_libraries():
        task = build_task(recipe, progress)
    train(task, recipe, folder, progress=progress, result=name)
    if isinstance(recipe, ControlNetRecipe) and recipe.score_scenes:
        return _scored(recipe, folder, folder / name, progress)
    return Result(folder, folder / name)


def check_models(recipe: Recipe) -> None:
    """Refuse a recipe that names a model that is not there, before scenes are rendered for it.

    Raises ValueError, one line within about 5 seconds. Nothing is downloaded.
    """
    from controlkit.adapters import check_adapter
    from controlkit.base import check_base

    if isinstance(recipe, ControlNetRecipe):
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
    from controlkit.adapters import load_adapter
    from controlkit.base import load_base
    from controlkit.training.quality import FOLLOWS, examine

    message = f"measuring on {recipe.score_scenes} held-out scenes"
    progress(Progress(recipe.steps, recipe.steps, math.nan, 0.0, math.nan, message))
    base = load_base(recipe.base, device=device_name(recipe))
    adapter = load_adapter(str(result), base=base)
    examination = examine(base, {recipe.map: adapter}, scenes=recipe.score_scenes)
    files.write_json(folder / "scores.json", {"scenes": examination.scenes, **examination.scores})
    shown = (FOLLOWS[recipe.map], "silhouette IoU", "colours")
    lines = [f"on {examination.scenes} held-out scenes:  no control -> this adapter  (ceiling)"]
    for score in shown:
        floor, ours, ceiling = (examination.scores[row][score] for row in ("floor", recipe.map, "ceiling"))
        lines.append(f"  {score:<15} {floor:.3f} -> {ours:.3f}  ({ceiling:.3f})")
    return Result(folder, result, dict(examination.scores[recipe.map]), lines)


def build_task(recipe: Recipe, progress: Callable[[Progress], None]) -> Task:
    """The task of a recipe, its data loaded (and rendered, where the cache lacks it)."""
    import torch

    device = torch.device(device_name(recipe))

    def report(message: str) -> None:
        progress(Progress(0, recipe.steps, math.nan, 0.0, math.nan, message))

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
    if isinstance(recipe, ControlNetRecipe):
        from controlkit.training.adapter import ControlNetTask

        return ControlNetTask(recipe, world, validation, device, report)
    raise AssertionError(f"no task for {type(recipe)}")


def worlds(recipe: Recipe, report: Callable[[str], None]) -> tuple[World, World]:
    """The recipe's training scenes and the scenes held out for samples and scores."""
    train_scenes = load_world("train", recipe.scenes, report=report)
    return train_scenes, load_world("validation", VALIDATION_SCENES, report=report)

"""Whether adapters were trained on the pairs that they are to be measured on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.training.config import ControlNetRecipe, Recipe, load_recipe
from controlkit.training.evaluation.request import WORLD, Request, run_config
from controlkit.training.reporting.run_record import json_of

if TYPE_CHECKING:
    from controlkit.formats.description import AdapterInfo


def trained_there(request: Request, infos: Sequence[AdapterInfo]) -> list[str]:
    """A line for each adapter that was, or may have been, trained on pairs that it is measured on."""
    run = run_config(request.data)
    recipe = None if run is None else load_recipe(str(run))
    source = recipe.data.source if isinstance(recipe, ControlNetRecipe) else request.data
    source = request.settings.get("source", source)
    if source == WORLD:
        return []  # whose scenes for measuring are never trained on
    lines = []
    for one, info in zip(request.adapters, infos, strict=True):
        own = _run_of(one.name)
        if not _is_of(source, own, info):
            continue
        pairs = f"pairs of {source}" if own else f"pairs of a data set that is called {_name(source)}, too"
        if recipe is None or run is None:
            are = "are" if own else "may be"
            lines.append(
                f"{one.label} was trained on {pairs}, which {are} among those that it is measured on:"
                " evaluate the run's folder to have those that it held out"
            )
        elif not _has_same_pairs(run.parent, recipe, own, info):
            lines.append(
                f"{one.label} was trained on {pairs}, and not on the same ones as the run: those that the run"
                " held out may be among them; with one seed and the same data both hold out the same"
            )
    return lines


def _run_of(adapter: str) -> tuple[Path, str] | None:
    """The folder of the run that an adapter lies in, as its result or a checkpoint, and that run's data."""
    path = os.path.realpath(os.path.expanduser(adapter))
    for folder in Path(path).parents[:2] if os.path.exists(path) else ():
        config = run_config(str(folder))
        with suppress(ValueError):  # of another tool
            recipe = None if config is None else load_recipe(str(config))
            if isinstance(recipe, ControlNetRecipe):
                return folder, recipe.data.source
    return None


def _is_of(source: str, own: tuple[Path, str] | None, info: AdapterInfo) -> bool:
    """Whether an adapter was trained on a source: by its run, else, by the name alone, its header."""
    if own is not None:
        return _real(own[1]) == _real(source)
    return bool(_told(info, "data").get("source") == _name(source))


def _real(source: str) -> str:
    return os.path.realpath(os.path.expanduser(source))


def _name(source: str) -> str:
    return os.path.basename(_real(source))


def _has_same_pairs(run: Path, recipe: Recipe, own: tuple[Path, str] | None, info: AdapterInfo) -> bool:
    """Whether an adapter was trained on the very pairs that a run was trained on."""
    if own is not None and os.path.samefile(own[0], run):
        return True
    trained, theirs = json_of(run / "facts.json").get("data_sha256"), info.training.get("data_sha256")
    if trained and theirs:
        return bool(trained == theirs)
    return bool(_told(info).get("seed") == recipe.seed)  # without a cache, which knows what the pairs were


def _told(info: AdapterInfo, *tables: str) -> Mapping[str, Any]:
    """A table of the recipe that an adapter's header tells; empty where there is none."""
    told: Any = info.training
    for name in ("recipe", *tables):
        told = told.get(name) if isinstance(told, Mapping) else None
    return told if isinstance(told, Mapping) else {}

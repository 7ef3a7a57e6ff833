"""The table of data that a command line names: a source, the kind of map, and KEY=VALUE settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Any

from controlkit.training.config import ControlNetRecipe, parse_recipe
from controlkit.training.config_adapter import DataRecipe


def recipe_of(source: str, kind: str, settings: Mapping[str, str], *, where: str) -> DataRecipe:
    """Return the recipe of a data set. ``where``: what is asked for, for messages.

    ``settings``: keys of [data], with or without that word: ``bad`` or ``data.bad``, as a training has it.

    Raises ValueError, one line, for an unknown key or a wrong value.
    """
    bare = {key.removeprefix("data."): text for key, text in settings.items()}
    table = {
        "task": "controlnet",
        "map": kind or "any",
        "out": "-",
        "steps": 100,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "data": {"source": source} | {key: _value(key, text) for key, text in bare.items()},
    }
    recipe = parse_recipe(table, where=where)
    assert isinstance(recipe, ControlNetRecipe)
    return recipe.data


def _value(key: str, text: str) -> Any:
    """A setting's value as TOML reads it; a bare word is a text."""
    if key in DataRecipe.model_fields and DataRecipe.model_fields[key].annotation is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text

"""Going on with a run by its own recipe, whatever the defaults have become since it was begun."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from controlkit.training.config import parse_recipe, was_fitted
from controlkit.training.config_base import Recipe
from controlkit.training.saving import Keys, flat, flat_recipe, recorded, refuse_changes


class Begun(NamedTuple):
    """The recipe to train by, and a line on what of it nobody gave this time; "" for nothing."""

    recipe: Recipe
    note: str = ""


def as_begun(recipe: Recipe, given: Mapping[str, Any], *, overridden: Collection[str] = ()) -> Begun:
    """The recipe to train by in its `out` folder: where a run was begun there, the run's, with what is given.

    recipe: what is given, completed by the defaults. given: what a file or a command names of it
    (`config.given_keys`). Everything else is as the run's config.toml has it, which is complete; keys that
    are newer than the run have their defaults. overridden: what of it a command names; a warmup that is not
    among it stays the run's where it was made shorter for the run's steps (`config.load_recipe`).

    Raises ValueError, one line, where something given differs from the run's and may not, and where
    config.toml cannot be read.
    """
    folder = Path(recipe.out)
    try:
        if not (folder / "config.toml").is_file():
            return Begun(recipe)
        begun, written = recorded(folder)
    except OSError as error:
        raise ValueError(f"cannot use {folder} as the run's folder: {error.strerror or error}") from error
    now, named = flat_recipe(recipe), {*flat(given), ("out",)}
    if "warmup" not in overridden and was_fitted(begun.get(("warmup",)), begun.get(("steps",)), given):
        named.discard(("warmup",))
    refuse_changes(begun, now, named, folder)
    whole = begun | {key: value for key, value in now.items() if key in named}
    taken = {key: begun.get(key) for key in begun.keys() | now.keys() if whole.get(key) != now.get(key)}
    newer = {key: begun[key] for key in begun.keys() - written.keys() - named}
    said = [
        f"{what}: {_told(keys)}" for what, keys in (("as it was begun", taken), ("new keys", newer)) if keys
    ]
    note = f"the run in {folder} goes on; {'; '.join(said)}" if said else ""
    return Begun(parse_recipe(_nested(whole), where=str(folder / "config.toml")), note)


def _told(keys: Keys) -> str:
    return ", ".join(f"{'.'.join(key)} {value}" for key, value in sorted(keys.items()))


def _nested(keys: Keys) -> dict[str, Any]:
    """The table that `flat` makes such keys of."""
    whole: dict[str, Any] = {}
    for (*tables, name), value in keys.items():
        table = whole
        for part in tables:
            table = table.setdefault(part, {})
        table[name] = value
    return whole

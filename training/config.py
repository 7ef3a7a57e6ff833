"""Recipes: the complete, typed description of a training, read from TOML.

A recipe is found by path or by the name of a bundled one (`training/recipes/NAME.toml`); `key=value`
overrides any key, `table.key=value` one in a table. Every default stands in the modules config_*.py and
nowhere else.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from controlkit.files import at_home
from controlkit.naming import did_you_mean, unknown
from controlkit.training.config_adapter import ControlNetRecipe as ControlNetRecipe
from controlkit.training.config_adapter import DataRecipe as DataRecipe
from controlkit.training.config_base import Recipe as Recipe
from controlkit.training.config_bundled import BaseRecipe as BaseRecipe
from controlkit.training.config_bundled import DepthRecipe as DepthRecipe
from controlkit.training.config_bundled import EstimatorRecipe as EstimatorRecipe
from controlkit.training.config_bundled import PoseRecipe as PoseRecipe
from controlkit.training.config_bundled import TextRecipe as TextRecipe
from controlkit.training.config_bundled import VaeRecipe as VaeRecipe
from controlkit.training.flags_table import FLAGS

RECIPES = Path(__file__).parent / "recipes"
WARMUP_SHARE = 5  # a training that is made short warms up over a fifth of its steps
_WARMUP = Recipe.model_fields["warmup"].default

_TASKS: dict[str, type[Recipe]] = {
    "vae": VaeRecipe,
    "text": TextRecipe,
    "base": BaseRecipe,
    "controlnet": ControlNetRecipe,
    "pose": PoseRecipe,
    "depth": DepthRecipe,
}


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find_recipe(name_or_path: str) -> Path:
    """Path of a recipe given by path or bundled name. Raises ValueError where there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = RECIPES / f"{name_or_path.removesuffix('.toml')}.toml"
    if path.parent == Path() and bundled.is_file():
        return bundled
    if path.is_dir():
        raise ValueError(f"{name_or_path} is a folder, no recipe; a data set is given as data.source=FOLDER")
    if path.suffix == ".toml":
        hint = did_you_mean(path.stem, recipe_names())
        raise ValueError(f"no recipe file {name_or_path}{hint}; bundled recipes: {', '.join(recipe_names())}")
    raise unknown("recipe", name_or_path, recipe_names())


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values as in TOML; bare words are strings).

    Raises ValueError, one line, for a missing file, broken TOML, an unknown key or task, or a value out of
    range.
    """
    where = str(find_recipe(name_or_path))
    table = given_keys(name_or_path, overrides)
    _fit_warmup(table, overridden_keys(overrides))
    return parse_recipe(table, where=where, overrides=overrides)


def _fit_warmup(table: dict[str, Any], overridden: Collection[str]) -> None:
    """Let a training warm up over a fifth of it that is shorter than a warmup which nobody chose for it."""
    chosen = "warmup" in table and "steps" not in overridden
    if "warmup" in overridden or chosen or table.get("task") != "controlnet":
        return
    steps, warmup = table.get("steps"), table.get("warmup", _WARMUP)
    if isinstance(steps, int) and isinstance(warmup, int) and warmup > steps > 0:
        table["warmup"] = steps // WARMUP_SHARE


def was_fitted(warmup: object, steps: object, given: Mapping[str, Any]) -> bool:
    """Whether a run of such steps has a warmup that was made shorter for it than the one that is given."""
    whole = given.get("warmup", _WARMUP)
    return (
        isinstance(steps, int)
        and isinstance(whole, int)
        and whole > steps
        and warmup == steps // WARMUP_SHARE
    )


def overridden_keys(overrides: Sequence[str]) -> set[str]:
    """The names of what `key=value` overrides give."""
    return {override.partition("=")[0].strip() for override in overrides}


def given_keys(name_or_path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a recipe's file and the overrides give, and nothing else: no defaults, and nothing checked.

    The recipe that a run has written is of the folder that it lies in, wherever that was moved or copied to.

    Raises ValueError, one line, for a missing file, broken TOML, and an override that cannot be read.
    """
    path = find_recipe(name_or_path)
    table = _read(path)
    if moved_from(name_or_path, overrides):
        table["out"] = str(path.parent)
    for override in overrides:
        _override(table, override)
    return table


def moved_from(name_or_path: str, overrides: Sequence[str] = ()) -> str:
    """Where a run lay before, by its own recipe, which lies in its folder; "" where that is there still,
    where an override says where to train, and of recipes of no run.
    """
    from controlkit.training.data.source_files import is_run

    path = find_recipe(name_or_path)
    if path.name != "config.toml" or "out" in overridden_keys(overrides) or not is_run(path.parent):
        return ""
    out = str(_read(path).get("out", path.parent))
    return "" if os.path.realpath(at_home(out)) == os.path.realpath(path.parent) else out


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error


def _override(table: dict[str, Any], override: str) -> None:
    """Set one `key=value` or `table.key=value`. Raises ValueError where it cannot be read."""
    key, separator, value = (part.strip() for part in override.partition("="))
    if not separator or not key:
        raise ValueError(f"cannot read {override!r}: write overrides as key=value, such as steps=200")
    *tables, name = key.split(".")
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ValueError(f"cannot read {override!r}: {part} is no table")
    table[name] = _value(name, value)


def _value(key: str, text: str) -> Any:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return text if key in _texts() and not isinstance(value, str) else value  # out=2026 is a folder


def _texts() -> set[str]:
    """Keys whose values are texts in every recipe and table that has them."""
    kinds: list[type[BaseModel]] = [*_TASKS.values(), DataRecipe]
    fields = [item for kind in kinds for item in kind.model_fields.items()]
    return {name for name, field in fields if field.annotation in (str, str | None)}


def parse_recipe(table: dict[str, Any], *, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe's table. Raises ValueError naming `where`, the key and what is allowed.

    overrides: those that are in the table already; one that is at fault is named in place of `where`.
    """
    if "task" not in table:
        raise ValueError(f"{where}: no task: a recipe says what to train, one of {', '.join(sorted(_TASKS))}")
    kind = _TASKS.get(str(table["task"]))
    if kind is None:
        raise unknown(f"task in {where}:", table["task"], _TASKS)
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        at_fault = next((text for text in reversed(overrides) if _is_about(text, place)), where)
        raise ValueError(f"{at_fault}: {_fault(error, kind)}") from error


def _is_about(override: str, place: str) -> bool:
    """Whether an override sets the key at fault, or one below it or above it."""
    key = override.partition("=")[0].strip()
    return bool(place) and (f"{key}.".startswith(f"{place}.") or f"{place}.".startswith(f"{key}."))


_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
_WANTED |= {"tuple": "a list", "dict": "a table"}


def _fault(error: ValidationError, kind: type[BaseModel]) -> str:
    """The first fault of a recipe: the key, what is allowed, and what was given."""
    first = error.errors()[0]
    *tables, key = map(str, first["loc"] or ("",))
    if first["type"] == "extra_forbidden":
        place = f" in [{'.'.join(tables)}]" if tables else ""
        return f"unknown key {key!r}{place}{_meant(key, tables, kind)}"
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    if first["type"] == "missing" and key.isdecimal():
        return f"{'.'.join(tables)}: a longer list is wanted, not {first['input']!r}"
    where, got = ".".join([*tables, key]), "" if first["type"] == "missing" else f", not {first['input']!r}"
    if first["type"] in ("model_type", "model_attributes_type"):
        return f"{where} is a table, not {first['input']!r}: give its keys, such as {where}.source=FOLDER"
    sort, _, problem = first["type"].partition("_")
    if sort in _WANTED and problem in ("type", "parsing", "from_float"):
        return f"{where}: {_WANTED[sort]} is wanted{got}"
    return f"{where}: {message[:1].lower()}{message[1:]}{got}"


def _meant(key: str, tables: Sequence[str], kind: type[BaseModel]) -> str:
    """The key that may have been meant, in its table; a key of another table may be meant just so, and what
    diffusers' scripts call it.
    """
    has_data = "data" in kind.model_fields
    theirs = FLAGS[key].key if key in FLAGS and has_data else ""
    if theirs:
        return f" (did you mean {theirs!r}?)"
    if tables == ["data"]:
        outside = f" (it is a key of the recipe itself, outside data: {key})" * (key in kind.model_fields)
        return outside or did_you_mean(key, DataRecipe.model_fields)
    if not tables and has_data and key in DataRecipe.model_fields:
        return f" (did you mean 'data.{key}'?)"
    return " (did you mean 'learning_rate'?)" * (key == "lr") or did_you_mean(key, kind.model_fields)


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every key, so that a run folder repeats itself without the bundled defaults."""
    return "".join(f"{line}\n" for line in _lines(recipe.model_dump(), ()))


def _lines(table: dict[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    if above:
        yield f"\n[{'.'.join(map(_key, above))}]"
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key, value in table.items():
        if value is not None and key not in inner:
            yield f"{_key(key)} = {_written(value)}"
    for key, value in inner.items():
        if value:
            yield from _lines(value, (*above, key))


def _key(key: str) -> str:
    plain = key.replace("-", "").replace("_", "").isalnum() and key.isascii()
    return key if plain else _written(key)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str):  # TOML's escapes are JSON's
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)

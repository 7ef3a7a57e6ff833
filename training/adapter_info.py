"""What the file of a trained adapter says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath

from controlkit.adapters import MAPS, AdapterInfo, MapSpec
from controlkit.base import BUNDLED, Base
from controlkit.formats.description import told_base
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.visits import Visits
from controlkit.training.saving import MAY_CHANGE


def info_of(
    recipe: ControlNetRecipe, base: Base, visits: Visits, *, data: str, origin: Mapping[str, str]
) -> AdapterInfo:
    """The description of what a recipe trained on a base.

    data: the digest of the pairs, "" where it is not known. origin: of the weights that were copied.
    """
    told = recipe.model_dump(mode="json", exclude=MAY_CHANGE | {"base", "init"})
    told["data"] = {key: v for key, v in told["data"].items() if f"data.{key}" not in MAY_CHANGE}
    told["data"]["source"] = PurePath(recipe.data.source).name  # no folders of the machine that trained
    bundled = recipe.base in BUNDLED
    return AdapterInfo(
        map=_map_spec(recipe, visits),
        family=base.family,
        prediction_type=base.prediction_type,
        base=told_base(recipe.base),
        resolution=recipe.data.resolution or base.resolution,
        title=f"{recipe.map} for the bundled base" if bundled else recipe.map,
        training={"recipe": told, **origin, **({"data_sha256": data} if data else {})},
    )


def _map_spec(recipe: ControlNetRecipe, visits: Visits) -> MapSpec:
    """What the maps are, as far as it is known: of those from files neither thresholds nor style."""
    spec = MAPS.get(recipe.map, MapSpec(recipe.map))
    thresholds = {name: recipe.data.options.get(name, value) for name, value in spec.thresholds.items()}
    fixed = visits.made and all(isinstance(value, int | float) for value in thresholds.values())
    columns = recipe.data.map_column
    return replace(
        spec,
        kind=" + ".join(columns) if len(columns) > 1 else spec.kind,
        thresholds=thresholds if fixed else {},
        channels=visits.channels // (len(columns) if recipe.adapter == "controlnet-union" else 1),
    )

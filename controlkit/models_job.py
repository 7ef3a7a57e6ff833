"""`controlkit models`: the well-known adapters, and which of them are here; and what a base's family is."""

from __future__ import annotations

import os
from pathlib import Path

from controlkit import known_adapters
from controlkit.families import family_of
from controlkit.folders import read_json

_ALIASED = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


def run(*, base: str | None = None, kind: str | None = None) -> list[str]:
    """Lines of the table, for a base (or all) and a kind of map (or all).

    Raises ValueError for a kind that there is not, or a base whose family cannot be told without loading it.
    """
    family = ""
    if base is not None:
        found = family_of_base(base)
        if found is None:
            names = ", ".join(_ALIASED)
            raise ValueError(f"the family of {base} is not known: give {names}, or a base that is here")
        family = found
    entries = known_adapters.matching(family=family, kind=kind or "")
    return list(known_adapters.table(entries, [is_cached(known.name) for known in entries]))


def check_combination(kind: str, adapter: str, base: str) -> None:
    """Raise ValueError, before anything is downloaded, where a base has no adapter for a kind of map, or the
    well-known one that is named (``adapter``, "" for none) is another family's."""
    from controlkit.base_parts import BUNDLED

    family = None if base in BUNDLED and not adapter else family_of_base(base)
    if family is not None:
        known_adapters.check_combination(kind, adapter, family)


def is_cached(repo_id: str) -> bool:
    """Whether the hub's cache has a repository's configuration, of any revision."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}", "snapshots")
    return any(folder.glob("*/config.json"))


def family_of_base(name_or_path: str) -> str | None:
    """The family of a base, from its short name or its cached or local configuration; None where unknown."""
    from controlkit.base_parts import ALIASES, BUNDLED

    ids = {repo_id: _ALIASED[alias] for alias, repo_id in ALIASES.items() if alias in _ALIASED}
    if name_or_path in _ALIASED or name_or_path in ids:
        return _ALIASED.get(name_or_path) or ids[name_or_path]
    folder = BUNDLED.get(name_or_path) or Path(os.path.expanduser(name_or_path))
    file: str | Path | None = folder / "unet" / "config.json"
    if not os.path.isfile(file or ""):
        file = _cached(name_or_path)
    if file is None:
        return None
    try:
        return family_of(read_json(Path(file)))
    except ValueError:
        return None


def _cached(repo_id: str) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, "unet/config.json")
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None

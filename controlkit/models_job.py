"""`controlkit models`: the adapters on the hub that are known here, and which of them are in the cache."""

from __future__ import annotations

from collections.abc import Sequence

from controlkit import naming
from controlkit.families import ALIASES, BUNDLED, FAMILY_TITLES
from controlkit.formats.description import map_in_words
from controlkit.formats.finding import BUNDLED_ADAPTERS
from controlkit.known_adapters import KNOWN, KnownAdapter, defaults, family_of_base, same_kind

_HEAD = ("", "base", "kind", "adapter", "network", "licence", "revision", "cached")


def table(*, base: str | None = None, kind: str | None = None) -> list[str]:
    """Lines of the table, of a base's family or a kind of map alone. Reads the cache and no network.

    Raises ValueError for a base whose family cannot be told, or for a kind that nobody has.
    """
    if base in BUNDLED:
        own = ", ".join(BUNDLED_ADAPTERS)
        return [f"the base {base} is used with its own adapters, {own}; those of the hub do not fit it"]
    family = "" if base is None else family_of_base(base)
    if base is not None and not family:
        raise naming.unknown("base", base, [*BUNDLED, *ALIASES])
    chosen = [known for known in KNOWN if not family or known.family == family]
    if kind is not None:
        kinds = {known.map.kind for known in chosen if known.map.kind}
        chosen = [known for known in chosen if known.map.kind == same_kind(kind)]
        if not chosen:
            raise naming.unknown(f"kind for {FAMILY_TITLES.get(family, 'any base')}", kind, kinds)
    rows = [_HEAD, *map(_row, chosen)]
    lines = _aligned(rows)
    lines += ["", "* is used when none is named: --control KIND=PICTURE, or --map KIND=MAP"]
    return lines + _details(chosen)


def is_cached(known: KnownAdapter) -> bool:
    """Whether its files are in the hub's cache: the newest, or those of its revision."""
    from huggingface_hub import try_to_load_from_cache

    owner, name, *file = known.name.split("/")
    wanted = file[0] if file else "config.json"
    revisions = (None, known.revision) if known.revision else (None,)
    found = [try_to_load_from_cache(f"{owner}/{name}", wanted, revision=revision) for revision in revisions]
    return any(isinstance(path, str) for path in found)


def _row(known: KnownAdapter) -> tuple[str, ...]:
    default = defaults(known.family).get(known.map.kind) == known
    return (
        "*" if default else "",
        FAMILY_TITLES[known.family],
        known.map.kind or "several",
        known.name,
        known.network,
        known.licence,
        known.revision[:7] or "main",
        "yes" if is_cached(known) else "",
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _details(chosen: Sequence[KnownAdapter]) -> list[str]:
    """What the maps are, and the notes."""
    maps = dict.fromkeys(map_in_words(known.map) for known in chosen if known.map.kind)
    notes = [f"  {known.name}: {known.note}" for known in chosen if known.note]
    return ["", "maps:", *(f"  {text}" for text in maps), *(["", "notes:", *notes] if notes else [])]

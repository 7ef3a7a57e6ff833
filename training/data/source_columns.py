"""Which column, key or folder of a data set holds the picture, which the map, which the caption."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from controlkit import preprocessors
from controlkit.naming import did_you_mean
from controlkit.picture_files import DEPTH_SUFFIXES
from controlkit.training.config_adapter import DataRecipe

PICTURE_NAMES = (
    "file_name",
    "image",
    "picture",
    "image_file_name",
    "image_path",
    "img",
    "photo",
    "target",
    "path",
    "file",
)
MAP_NAMES = (
    "conditioning_image_file_name",
    "conditioning_image",
    "conditioning_file_name",
    "conditioning",
    "control_image_file_name",
    "control_image",
    "control",
    "condition",
    "cond",
    "hint",
    "map_file_name",
    "map",
    "source",
)
_PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
"""What a table calls the pictures of tar shards, where no column has a usual name."""
LOOKED_AT = 8
"""Rows that show what a column holds."""
MAP_FILES = DEPTH_SUFFIXES | {".json"}
"""Suffixes of what may be a map: a picture, depth in numbers, a pose."""
_MAP_KEYS = {"bytes", "path", "people"}  # of a picture, and of a pose
_UNREAD = ("http://", "https://")  # addresses that are not followed
_LEAST_ROWS = 8  # of numbers that are a picture, and as many in each
CAPTION_NAMES = ("text", "caption", "prompt", "captions", "prompts", "texts", "txt")


@dataclass(frozen=True)
class Columns:
    """The columns that a data set is read from; no maps where they are made of the pictures."""

    picture: str
    maps: tuple[str, ...]
    caption: str
    """"" where there are no captions."""
    unused: tuple[str, ...] = ()
    """Columns with maps that are not read, for the recipe has maps made."""


def choose_columns(
    columns: Sequence[str], *, data: DataRecipe, kind: str, where: str, rows: Sequence[Mapping[str, Any]]
) -> Columns:
    """Choose among the columns that there are: those that the recipe names, else the usual names.

    kind: the kind of map that is trained; a column named after it goes before the usual names. "" for any.
    rows: the first ones, where they are known; a column in which none of them has a file, a picture or a pose
    holds no maps.

    Raises ValueError, one line with the columns that there are: one that is named is not among them, no
    picture is found, maps are wanted from files and none are found, or they may lie in a column of another
    name.
    """
    picture = data.picture_column
    if picture == "image" and picture not in columns and "file_name" in columns:
        picture = "file_name"  # as the library datasets calls an imagefolder's pictures
    usual = _first((*PICTURE_NAMES, *_PICTURE_SUFFIXES), columns)
    picture = _named(columns, picture, "picture_column", where) or usual
    if not picture:
        raise ValueError(
            f"{where} has no column with pictures that is known by its name: name it with "
            f"data.picture_column; columns: {', '.join(columns)}"
        )
    rest = [column for column in columns if column != picture]
    return Columns(
        picture,
        _map_columns(rest, data=data, kind=kind, where=where, rows=rows, picture=picture),
        _named(columns, data.caption_column, "caption_column", where) or _first(CAPTION_NAMES, rest),
        _usual_maps(rest, kind, rows) if data.maps == "made" else (),
    )


def _usual_maps(columns: Sequence[str], kind: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The column that holds maps by its name, if there is one."""
    columns = _with_maps(columns, rows)
    found = (_first(_of_kind(kind), columns) if kind else "") or _first(MAP_NAMES, columns)
    return (found,) if found else ()


def _with_maps(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """The columns that hold what may be a map in some row, as far as rows are known."""
    return [name for name in columns if any(_may_be_map(row.get(name)) for row in rows)] if rows else columns


def _map_columns(
    columns: Sequence[str],
    *,
    data: DataRecipe,
    kind: str,
    where: str,
    rows: Sequence[Mapping[str, Any]],
    picture: str,
) -> tuple[str, ...]:
    if data.maps == "made":
        return ()
    if data.map_column:
        return tuple(
            ("" if name in columns else _first(_of_kind(name), columns))
            or _named(columns, name, "map_column", where)
            for name in data.map_column
        )
    columns = _with_maps(columns, rows)
    found = _first(_of_kind(kind), columns) if kind else ""
    if not found and not (kind and _known_kinds(columns)):
        # Beside columns of other kinds, the one with a common name holds a map of the first of them.
        found = _first(MAP_NAMES, columns) or _only_map(columns, where)
    if not found and data.maps == "files":
        raise ValueError(
            f"{where} has no column with maps{f' of {kind}' * bool(kind)}: name it with data.map_column, or "
            f"have maps made with data.maps=made; columns: {', '.join(columns)}"
        )
    if not found and rows:
        others = [name for name in columns if any(row.get(name) != row.get(picture) for row in rows)]
        _refuse_unknown(others, kind=kind, where=where)
    return (found,) if found else ()


def _refuse_unknown(columns: Sequence[str], *, kind: str, where: str) -> None:
    """Refuse to make maps of the pictures where a column of a name that says nothing may hold them."""
    known = _known_kinds(columns)
    usual = {*PICTURE_NAMES, *known, *(MAP_NAMES if known else ())}
    left = [name for name in columns if name.casefold() not in usual]
    if left:
        raise ValueError(
            f"{where} has pictures in {' and '.join(left)}, too: if these are the maps"
            f"{f' of {kind}' * bool(kind)}, say so with {shlex.quote(f'data.map_column={left[0]}')}; to have"
            " maps made of the pictures, with data.maps=made"
        )


def _may_be_map(value: object) -> bool:
    """Whether what a row holds can be a map: a file's name, a picture or several, numbers in rows, a pose."""
    if isinstance(value, str):
        return os.path.splitext(value)[1].lower() in MAP_FILES and not value.startswith(_UNREAD)
    if isinstance(value, list) and any(isinstance(one, Image.Image) for one in value):
        return True  # which cannot be read, and is not passed over
    if isinstance(value, list):  # few numbers in a row are boxes and points
        return len(value) >= _LEAST_ROWS and isinstance(value[0], list) and len(value[0]) >= _LEAST_ROWS
    return isinstance(value, bytes) or (isinstance(value, dict) and not _MAP_KEYS.isdisjoint(value))


def _of_kind(kind: str) -> tuple[str, ...]:
    """What columns with maps of a kind are called."""
    return f"{kind}_file_name", f"{kind}_image", f"{kind}_map", kind


def _only_map(columns: Sequence[str], where: str) -> str:
    """The one column named after a known kind of map, where no kind was asked for."""
    known = _known_kinds(columns)
    if len(known) > 1:
        raise ValueError(
            f"{where} has maps of several kinds: name one with data.map_column: {', '.join(known)}"
        )
    return known[0] if known else ""


def _known_kinds(columns: Sequence[str]) -> list[str]:
    kinds = preprocessors.names()
    return [column for column in columns if column.removesuffix("_file_name") in kinds]


def _named(columns: Sequence[str], name: str, option: str, where: str) -> str:
    """The column of that name, "" where none was named."""
    if name and name not in columns:
        hint = did_you_mean(name, columns)
        raise ValueError(
            f"data.{option}: {where} has no column {name!r}{hint}; columns: {', '.join(columns) or 'none'}"
        )
    return name


def _first(names: Sequence[str], columns: Sequence[str]) -> str:
    """The first of `names` that is a column, whatever its case; "" for none."""
    by_folded = {column.casefold(): column for column in reversed(columns)}
    return next((by_folded[name.casefold()] for name in names if name.casefold() in by_folded), "")


def about_maps(maps: Sequence[str], kind: str, unused: Sequence[str] = ()) -> str:
    """Say in a few words where maps come from. unused: where others lie, which the recipe passes over."""
    if maps:
        return f"maps from {' + '.join(maps)}"
    of_kind = f" of {kind}" * bool(kind)
    if unused:
        return f"maps{of_kind} are made of the pictures (data.maps=made): {' + '.join(unused)} is not used"
    return f"no maps{of_kind}: they are made of the pictures"

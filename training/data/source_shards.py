"""WebDataset shards: tar files whose members of one name, up to its first dot, are one example.

0001.jpg  0001.map.png  0001.txt        a picture, its map, its caption
0002.jpg  0002.map.png  0002.json       the caption may stand in JSON: caption, text or prompt

The index is built in one pass over the headers; then every member is read where it lies.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from controlkit import preprocessors
from controlkit.naming import did_you_mean
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Piece
from controlkit.training.data.source_columns import CAPTION_NAMES, about_maps
from controlkit.training.data.source_doubts import likely_map
from controlkit.training.data.source_files import LazyExamples, RefusedPiece, captions_of, read_caption
from controlkit.training.data.source_tar import Shard, find_shards, read_index

PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "avif", "gif")
_PICTURE_NAMES = ("", "image", "picture", "target")
_MAP_NAMES = (
    "map",
    "cond",
    "conditioning",
    "conditioning_image",
    "hint",
    "control",
    "control_image",
    "source",
)
_CAPTIONS = ("txt", "caption", "text", "prompt", "caption.txt", "text.txt", "prompt.txt")
_LOOKED_AT = 100  # examples whose JSON is read for its keys before all others are


def open_shards(
    source: str, *, data: DataRecipe, kind: str, report: Callable[[str], None] = lambda _: None
) -> LazyExamples:
    """Open tar shards; `picture_column` and `map_column` name members ("jpg", "depth.png") and their suffix.

    `caption_column` names a member ("txt") or a key in the JSON member.

    Raises ValueError, one line: as `find_shards` and `read_index`, no member is a picture, or what a column
    names is not there.
    """
    shards = [read_index(path, report) for path in find_shards(source)]
    members = list(dict.fromkeys(itertools.chain.from_iterable(shard.members for shard in shards)))
    ends = np.cumsum([len(shard.keys) for shard in shards])
    count = int(ends[-1])
    if not count:
        raise ValueError(f"{source}: there is nothing in the shards")
    picture = _picture_members(members, data, source)
    maps = _map_members(members, data, kind, source)
    picture = [name for name in picture if not any(name in names for names in maps)] or picture
    if not maps and data.maps != "made":
        _refuse_twins(shards, picture, kind)
        _refuse_maps_apart(shards[0])
    caption = _caption_member(members, data)
    if data.caption_column and data.caption_column.lower() not in members:
        _check_key(data.caption_column, shards[0], members, source)
    shown = ["/".join(names) for names in maps]
    unused = ["/".join(_usual_maps(members, kind))] if data.maps == "made" else []
    about = about_maps(shown, kind, [name for name in unused if name])
    report(f"{source}: {count:,} examples in {len(shards)} shards, {about}")
    texts: dict[int, tuple[str, ...]] = {}

    def make(index: int) -> Example:
        number = int(np.searchsorted(ends, index, side="right"))
        shard, row = shards[number], index - (int(ends[number - 1]) if number else 0)
        name = f"{shard.path}/{shard.keys[row]}"
        piece = _member(shard, row, picture)
        try:
            if index not in texts:
                texts[index] = _captions(shard, row, caption, data.caption_column)
        except ValueError as error:
            piece = RefusedPiece(name, str(error))
        found = tuple(_member(shard, row, names) for names in maps)
        told = texts.get(index, ("",))
        return Example(name, piece, told[0] or data.caption, found, told[1:])

    return LazyExamples(count, make)


def _member(shard: Shard, row: int, names: Sequence[str]) -> Piece:
    """The first of several members that an example has (one may be a .jpg, the next a .png)."""
    pieces = [shard.piece(row, name) for name in names]
    return next((piece for piece in pieces if not isinstance(piece, RefusedPiece)), pieces[0])


def _refuse_twins(shards: Sequence[Shard], picture: Sequence[str], kind: str) -> None:
    """Refuse examples with two pictures that differ in their suffix only: one may be the map."""
    for shard in shards:
        columns = [shard.members.index(name) for name in picture if name in shard.members]
        has = shard.spans[:, columns, 0] >= 0
        for row in np.flatnonzero(has.sum(axis=1) > 1)[:1]:
            found = [shard.members[column] for column, there in zip(columns, has[row], strict=True) if there]
            likely = next((name for name in found if name.rpartition(".")[2] == "png"), found[-1])
            other = next(name for name in found if name != likely)
            raise ValueError(
                f"{shard.path}: {shard.keys[row]} has {' and '.join(found)}: if the {likely} are the maps"
                f"{f' of {kind}' * bool(kind)}, say so with data.map_column={likely}; to have maps made of"
                f" the {other}, with data.maps=made"
            )


def _refuse_maps_apart(shard: Shard) -> None:
    """Refuse maps that have names of their own, and would be examples."""
    likely = likely_map([f"{key}.jpg" for key in shard.keys]).removesuffix(".jpg")
    if likely:
        what = "hold maps of other examples" if likely.endswith("/") else "be a map of another example"
        raise ValueError(
            f"{shard.path}: {likely} seems to {what}: what belongs together has one name up to its first dot"
            " (0001.jpg, 0001.map.png); if all are pictures, say so with data.maps=made"
        )


def _picture_members(members: Sequence[str], data: DataRecipe, source: str) -> list[str]:
    if data.picture_column:
        return _named(members, data.picture_column, "picture_column", source)
    for name in _PICTURE_NAMES:
        found = [f"{name}.{suffix}".lstrip(".") for suffix in PICTURES]
        if here := [member for member in found if member in members]:
            return here
    raise ValueError(
        f"{source}: no member of the shards is a picture that is known by its name: name it with "
        f"data.picture_column; there are {', '.join(members)}"
    )


def _map_members(members: Sequence[str], data: DataRecipe, kind: str, source: str) -> list[list[str]]:
    """For each map, the members that may hold it."""
    if data.maps == "made":
        return []
    if data.map_column:
        return [_named(members, name, "map_column", source) for name in data.map_column]
    if found := _usual_maps(members, kind):
        _refuse_several(found, members, kind, source)
        return [found]
    if data.maps == "files":
        raise ValueError(
            f"{source}: no member of the shards is a map that is known by its name: name it with "
            f"data.map_column; there are {', '.join(members)}"
        )
    left = [name for name in members if _is_other_picture(name)]
    if left:
        raise ValueError(
            f"{source} has pictures in {' and '.join(left)}, too: if these are the maps"
            f"{f' of {kind}' * bool(kind)}, say so with data.map_column={left[0]}; to have maps made of the"
            " pictures, with data.maps=made"
        )
    return []


def _usual_maps(members: Sequence[str], kind: str) -> list[str]:
    """The members that hold maps by their name: one name with several suffixes; without a kind it may be any
    kind's.
    """
    for name in (*([kind] if kind else []), *_MAP_NAMES, *(() if kind else preprocessors.names())):
        for suffixes in (PICTURES, ("json",)):
            if here := [f"{name}.{suffix}" for suffix in suffixes if f"{name}.{suffix}" in members]:
                return here
    return []


def _refuse_several(found: Sequence[str], members: Sequence[str], kind: str, source: str) -> None:
    """Refuse maps of several kinds, where no kind was asked for."""
    named = dict.fromkeys(member.rpartition(".")[0] for member in members)
    kinds = [name for name in named if name in preprocessors.names()]
    if not kind and found[0].rpartition(".")[0] in kinds and len(kinds) > 1:
        raise ValueError(
            f"{source} has maps of several kinds: name one with data.map_column: {', '.join(kinds)}"
        )


def _is_other_picture(member: str) -> bool:
    """Whether a member of a name that says nothing holds a picture."""
    name, _, suffix = member.rpartition(".")
    return suffix in PICTURES and name not in (*_PICTURE_NAMES, *preprocessors.names())


def _named(members: Sequence[str], name: str, option: str, source: str) -> list[str]:
    """The member of that name, or those that have it with a picture's suffix or .json."""
    name = name.lower()
    found = [
        member
        for member in (name, *(f"{name}.{suffix}" for suffix in (*PICTURES, "json")))
        if member in members
    ]
    if not found:
        hint = did_you_mean(name, members)
        raise ValueError(
            f"data.{option}: {source} has no member {name!r}{hint}; members: {', '.join(members)}"
        )
    return found[:1] if found[0] == name else found


def _caption_member(members: Sequence[str], data: DataRecipe) -> list[str]:
    if data.caption_column.lower() in members:
        return [data.caption_column.lower()]
    return [name for name in (*_CAPTIONS, "json") if name in members]


def _check_key(key: str, shard: Shard, members: Sequence[str], source: str) -> None:
    """Raise ValueError unless a first example's JSON has a key for captions, where there is any JSON."""
    keys: dict[str, None] = {}
    for row in range(min(len(shard.keys), _LOOKED_AT)):
        piece = shard.piece(row, "json")
        if isinstance(piece, RefusedPiece):
            continue
        with suppress(ValueError):  # it is named when the example is read
            keys.update(dict.fromkeys(_json(piece)))
    if key in keys or ("json" in members and not keys):
        return
    nor = f", and the .json of its first examples no such key ({', '.join(keys)})" if keys else ""
    hint = did_you_mean(key, [*members, *keys])
    raise ValueError(
        f"data.caption_column: {source} has no member {key!r}{hint}; members: {', '.join(members)}{nor}"
    )


def _captions(shard: Shard, row: int, names: Sequence[str], key: str) -> tuple[str, ...]:
    """The captions of an example, "" where it has none. Raises ValueError where they cannot be read."""
    for name in names:
        piece = shard.piece(row, name)
        if isinstance(piece, RefusedPiece) or (key and key.lower() not in names and name != "json"):
            continue
        if not name.endswith("json"):
            return (read_caption(piece),)
        obj = _json(piece)
        keys = (key,) if key and key.lower() not in names else CAPTION_NAMES
        value = next((obj[name] for name in keys if name in obj), None)
        return captions_of(value, where=f"{piece.name}, {'/'.join(keys)}")
    return ("",)


def _json(piece: Piece) -> dict[str, Any]:
    content = piece.read()
    assert isinstance(content, bytes)
    try:
        obj = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{piece.name} is not JSON: {error}") from error
    if not isinstance(obj, dict):
        raise ValueError(f"{piece.name} is not a JSON object")
    return obj

"""A data set on the device: what the cache holds, put there once, from which each step gathers its rows.

Only what is drawn anew at each visit then travels: noise, timesteps, and the numbers of the rows. What a step
gets is the same to the bit as what is read from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Encoded, Given, Outline
from controlkit.training.data.encoding import Moments, Text
from controlkit.training.data.feeds import Feed, StoredFeed
from controlkit.training.data.views import View
from controlkit.training.memory import put

SHARE = 0.25
"""Of a device's free memory, at most, that data takes where the recipe leaves it open."""


@dataclass
class _Table:
    """All views of one size: ``moments`` (N, 2, 4, h, w), ``levels`` (N, C or 1, H, W), ``opaque`` (N, h, w)
    where it is asked for.
    """

    moments: Tensor
    levels: Tensor
    channels: int
    opaque: Tensor | None


class Resident:
    """Moments, maps and captions on a device, of pairs whose views never change."""

    def __init__(self, encoded: Encoded, indices: Sequence[int], device: torch.device) -> None:
        """Read the views of these examples from the cache, whole, and put them on the device."""
        views = [(index, view) for index in dict.fromkeys(indices) for view in encoded.visits.views(index)]
        self._rows: dict[tuple[int, View], int] = {}
        self._tables: dict[tuple[int, int], _Table] = {}
        for size in dict.fromkeys((view.width, view.height) for _, view in views):
            alike = [(index, view) for index, view in views if (view.width, view.height) == size]
            self._rows |= {key: row for row, key in enumerate(alike)}
            self._tables[size] = _table(encoded, alike, device)
        captions = list(
            dict.fromkeys(["", *(c for index in indices for c in encoded.examples[index].captions)])
        )
        self._captions = {caption: row for row, caption in enumerate(captions)}
        text = [encoded.text([caption]) for caption in captions]
        pooled = [row.pooled for row in text if row.pooled is not None]
        hidden = torch.cat([row.encoder_hidden_states for row in text])
        self._text = Text(hidden, torch.cat(pooled) if pooled else None)
        self.to(device)

    def to(self, device: torch.device) -> None:
        """Put everything on a device."""
        self.device = device
        for table in self._tables.values():
            table.moments, table.levels = table.moments.to(device), table.levels.to(device)
            table.opaque = None if table.opaque is None else table.opaque.to(device)
        hidden, pooled = self._text
        self._text = Text(hidden.to(device), None if pooled is None else pooled.to(device))

    def given(self, samples: Sequence[Outline], captions: Sequence[str]) -> Given:
        """What samples of one size give; ``captions``: what each is told."""
        table = self._tables[samples[0].view.width, samples[0].view.height]
        rows = [self._rows[s.visit.index, s.view] for s in samples]
        words = [self._captions[caption] for caption in captions]
        chosen, told = put(torch.tensor([rows, words]), self.device)
        moments = table.moments.index_select(0, chosen)
        levels = table.levels.index_select(0, chosen)
        if levels.dtype == torch.int16:
            levels = levels.view(torch.uint16)
        hidden, pooled = self._text
        return Given(
            Moments(moments[:, 0], moments[:, 1]),
            levels.expand(-1, table.channels, -1, -1),
            Text(hidden.index_select(0, told), None if pooled is None else pooled.index_select(0, told)),
            None if table.opaque is None else table.opaque.index_select(0, chosen),
        )


def open_resident(
    recipe: ControlNetRecipe, feed: Feed, device: torch.device, report: Callable[[str], None]
) -> Resident | None:
    """The feed's data on the device, where the recipe wants it there, or leaves it open and there is room.

    Raises ValueError where the recipe wants it and what visits see is not all in the cache.
    """
    wanted = recipe.data.resident
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return None
    if not isinstance(feed, StoredFeed) or not feed.encoded.fixed:
        if wanted is True:
            raise ValueError(
                "data.resident=true keeps what the cache holds on the device: it needs data.cache=true, maps"
                " that do not change from visit to visit (no ranges in data.options, no data.map_blur,"
                " pose_drop or pose_jitter) and no data.streaming"
            )
        return None
    if wanted == "auto":
        fits, line = room_for(_bytes(feed), torch.cuda.mem_get_info(device)[0])
        report(line)
        if not fits:
            return None
    return Resident(feed.encoded, feed.trained, device)


def room_for(size: int, free: int) -> tuple[bool, str]:
    """Whether data of a size is kept on a device with so many free bytes, and the line that says so."""
    room = SHARE * free
    chosen = "kept on the device" if size <= room else "read as it is needed, not kept on the device"
    return size <= room, f"data is {chosen}: {size / 1e9:.3g} GB, of {room / 1e9:.3g} GB it may take there"


def _bytes(feed: StoredFeed) -> int:
    """What the data takes on a device, at most, from one example and the number and sizes of the views."""
    encoded, first = feed.encoded, feed.trained[0]
    view = encoded.visits.views(first)[0]
    each = encoded.kept_moments(first, view).nbytes + encoded.kept_map(first, view).nbytes
    text = encoded.text([""])
    caption = text.encoder_hidden_states.nbytes + (0 if text.pooled is None else text.pooled.nbytes)
    captions = {caption for index in feed.trained for caption in encoded.examples[index].captions}
    pixels = sum(v.width * v.height for index in feed.trained for v in encoded.visits.views(index))
    return each * pixels // (view.width * view.height) + caption * (len(captions) + 1)


def _table(encoded: Encoded, views: Sequence[tuple[int, View]], device: torch.device) -> _Table:
    """Views of one size, copied one by one: the host holds no second copy of them all."""
    alike, deep = True, False
    for key in views:
        levels = encoded.kept_map(*key)
        alike, deep = alike and _is_grey(levels), deep or levels.dtype == np.uint16
    first = _levels(encoded.kept_map(*views[0]), deep=deep)
    moments = encoded.kept_moments(*views[0])
    channels = 1 if alike else len(first)
    opaque = [rows for key in views if (rows := encoded.opaque(*key)) is not None]
    table = _Table(
        torch.empty((len(views), *moments.shape), dtype=moments.dtype, device=device),
        torch.empty((len(views), channels, *first.shape[1:]), dtype=first.dtype, device=device),
        len(first),
        torch.stack(opaque).to(device) if opaque else None,
    )
    for row, key in enumerate(views):
        rows = _levels(encoded.kept_map(*key), deep=deep)
        if rows.shape != first.shape:
            name = encoded.examples[key[0]].name
            raise ValueError(f"the map of {name} has other channels than that of other pairs")
        table.moments[row] = encoded.kept_moments(*key)
        table.levels[row] = rows[:channels]
    return table


def _levels(levels: NDArray[np.uint8 | np.uint16], *, deep: bool) -> Tensor:
    """A map as (C, H, W), 16 bits by the name of int16, which devices can gather. deep: all become 16."""
    if deep and levels.dtype == np.uint8:
        levels = levels.astype(np.uint16) * np.uint16(257)
    tensor = torch.from_numpy(np.ascontiguousarray(levels.transpose(2, 0, 1)))
    return tensor.view(torch.int16) if deep else tensor


def _is_grey(levels: NDArray[np.uint8 | np.uint16]) -> bool:
    return cast(bool, (levels == levels[..., :1]).all())

"""A data set encoded: what a visit needs of picture, map and caption, from the cache or made on the spot.

Both ways give the same numbers: what the cache holds is what is made otherwise, to the bit on a CPU. What it
holds is named by what decides it (the picture's content, its view, the encoder, the precision), so
that runs share it, and a change of anything else, such as the learning rate, computes nothing anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from controlkit import images
from controlkit.base import Base
from controlkit.files import cache_folder
from controlkit.processes import Processes
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.digests import Digests
from controlkit.training.data.encoding import (
    AT_ONCE,
    Moments,
    Text,
    encode_captions,
    encode_pictures,
    picture_encoder_id,
    text_encoder_id,
)
from controlkit.training.data.examples import Example, digest_of_pairs
from controlkit.training.data.order import Turn
from controlkit.training.data.packing import pack, unpack
from controlkit.training.data.stores import Store
from controlkit.training.data.views import View
from controlkit.training.data.visits import Visit, Visits
from controlkit.training.memory import free_memory, is_out_of_memory, put

VERSION = 1  # raise when pictures, maps or captions are prepared differently
_SHARD = 256
_TEXTS = 256  # captions that are kept at hand
Report = Callable[[str], None]


@dataclass(frozen=True)
class Outline:
    """One visit: to what, and what part of it is seen."""

    example: Example
    visit: Visit
    view: View
    size: tuple[int, int]
    """Width and height of the whole picture, before it was resized."""


@dataclass(frozen=True)
class Sample(Outline):
    """One visit, prepared: latents' moments (2, 4, h, w) or the picture they are to be made of; the map."""

    moments: Tensor | None
    picture: NDArray[np.uint8] | None
    levels: NDArray[np.uint8 | np.uint16]
    opaque: Tensor | None = None
    """Where `data.alpha_mask` asks for it: `Visits.opaque`."""


class Given(NamedTuple):
    """What the data gives a micro-batch of one size, on its device: ``moments`` and ``text`` as they are
    kept, ``levels`` (B, C, H, W), uint8 or uint16, ``opaque`` (B, h, w), uint8, with `data.alpha_mask`.
    """

    moments: Moments
    levels: Tensor
    text: Text
    opaque: Tensor | None = None


class Encoded:
    """The examples of a data set as the networks need them."""

    def __init__(
        self, base: Base, examples: Sequence[Example], visits: Visits, *, data: DataRecipe, report: Report
    ) -> None:
        self.base, self.examples, self.visits, self.data, self.report = base, examples, visits, data, report
        self._at_once = AT_ONCE
        self._text = lru_cache(maxsize=_TEXTS)(self._text_of)
        self._content: dict[int, tuple[str, ...]] = {}  # digests of each example's picture, and of its maps
        self._latents: Store | None = None
        if data.cache:
            root = cache_folder()
            self._digests = Digests(root / "digests.jsonl")
            self._latents = Store(root / "latents" / picture_encoder_id(base))
            self._captions = Store(root / "text" / text_encoder_id(base))
            self._maps = Store(root / "maps") if visits.fixed else None
            self._opaque = Store(root / "opaque") if data.alpha_mask else None

    def fill(self, indices: Iterable[int], processes: Processes) -> None:
        """Compute what the cache lacks of these examples, this process its share; a stopped job goes on.

        Raises ValueError, naming it, for a picture or map that cannot be read, and where the disk is full.
        """
        if self._latents is None:
            return
        wanted = list(indices)
        self._learn(wanted)
        captions = {
            _caption_name(caption): caption
            for caption in [*(c for i in wanted for c in self.examples[i].captions), ""]
        }
        share = processes.index, processes.count
        mine = self._captions.missing(captions, share)
        done = 0
        for part in _parts(mine):
            self._captions.write(self._encoded_captions(part, captions))
            done += len(part)
            self._say("captions encoded", done, mine)
        self._fill_views(wanted, processes)
        processes.wait()
        for store in (self._latents, self._captions, self._maps, self._opaque):
            if store is not None:
                store.refresh()

    def _learn(self, indices: Sequence[int]) -> None:
        """Know the content of these examples."""
        new = [index for index in indices if index not in self._content]
        made = self.visits.made  # of the picture, which is not read twice for it
        rows = [(self.examples[index].picture, *(() if made else self.visits.pieces(index))) for index in new]
        digests = iter(self._digests.of([piece for row in rows for piece in row], report=self.report))
        for index, row in zip(new, rows, strict=True):
            content = tuple(next(digests) for _ in row)
            self._content[index] = content * 2 if made else content

    def digest(self, indices: Sequence[int]) -> str:
        """SHA-256 over these examples' pictures, maps and captions; "" without a cache, which knows them."""
        if any(index not in self._content for index in indices):
            return ""
        return digest_of_pairs((self.examples[index], self._content[index]) for index in indices)

    def outline(self, turn: Turn) -> Outline:
        """What a turn is to see."""
        visit = self.visits.visit(turn.index, turn.lap)
        view = self.visits.views(turn.index)[visit.view]
        return Outline(self.examples[turn.index], visit, view, self.visits.sizes[turn.index])

    def sample(self, turn: Turn, *, whole: bool = False) -> Sample:
        """What a turn sees. Reads and prepares, and computes nothing on a device: threads may call it.

        whole: see `Visits.map`.
        """
        seen = self.outline(turn)
        moments = picture = None
        if self._latents is None:
            picture = self.visits.picture(turn.index, seen.view)
        else:
            moments = self.kept_moments(turn.index, seen.view)
        if self._latents is None or self._maps is None:
            seed = seen.visit.seed
            levels = self.visits.map(turn.index, seen.view, seed=seed, picture=picture, whole=whole)
        else:
            levels = self.kept_map(turn.index, seen.view)
        opaque = self.opaque(turn.index, seen.view)
        return Sample(seen.example, seen.visit, seen.view, seen.size, moments, picture, levels, opaque)

    @property
    def fixed(self) -> bool:
        """Whether the cache holds all that any visit sees."""
        return self._latents is not None and self._maps is not None

    def kept_moments(self, index: int, view: View) -> Tensor:
        """From the cache: a view's moments, (2, 4, h, w)."""
        assert self._latents is not None
        return self._latents.read(self._name(index, view))

    def kept_map(self, index: int, view: View) -> NDArray[np.uint8 | np.uint16]:
        """From the cache: a view's map, (H, W, C)."""
        assert self._maps is not None
        return unpack(self._maps.read(self._map_name(index, view)))

    def opaque(self, index: int, view: View) -> Tensor | None:
        """From the cache, if there is one: `Visits.opaque`; None where nobody asked for it."""
        if not self.data.alpha_mask:
            return None
        if self._latents is None or self._opaque is None:
            return self._read_opaque((index, view))
        return self._opaque.read(self._opaque_name(index, view))

    def given(self, samples: Sequence[Sample], captions: Sequence[str], device: torch.device) -> Given:
        """What samples of one size give, on a device; ``captions``: what each is told."""
        moments, text = self.moments(samples), self.text(captions)
        pooled = None if text.pooled is None else put(text.pooled, device)
        opaque = [sample.opaque for sample in samples if sample.opaque is not None]
        return Given(
            Moments(put(moments.mean, device), put(moments.std, device)),
            put(levels_of(samples), device),
            Text(put(text.encoder_hidden_states, device), pooled),
            put(torch.stack(opaque), device) if opaque else None,
        )

    def moments(self, samples: Sequence[Sample]) -> Moments:
        """The latents' moments of samples of one size: (B, 4, h, w) each."""
        if self._latents is None:
            return self._encoded([s.picture for s in samples if s.picture is not None])
        stacked = torch.stack([s.moments for s in samples if s.moments is not None])
        return Moments(stacked[:, 0], stacked[:, 1])

    def _encoded(self, pictures: Sequence[NDArray[np.uint8]]) -> Moments:
        """The moments of pictures of one size; from now on of fewer at once where they do not fit."""
        while True:
            try:
                return encode_pictures(self.base, pictures, at_once=self._at_once)
            except RuntimeError as error:
                if self._at_once == 1 or not is_out_of_memory(error) or self.base.vae.device.type == "cpu":
                    raise
            self._at_once //= 2
            free_memory()
            message = f"{2 * self._at_once} pictures at once do not fit in memory to be encoded"
            self.report(f"{message}: from now on {self._at_once} at once")

    def text(self, captions: Sequence[str]) -> Text:
        """What the U-Net is told of each caption, (B, 77, D), and for SDXL the pooled text (B, P)."""
        rows = [self._text(caption) for caption in captions]
        pooled = [row.pooled for row in rows if row.pooled is not None]
        hidden = torch.cat([row.encoder_hidden_states for row in rows])
        return Text(hidden, torch.cat(pooled) if pooled else None)

    def _text_of(self, caption: str) -> Text:
        if self._latents is None:
            return encode_captions(self.base, [caption])
        name = _caption_name(caption)
        pooled = f"{name}.pooled"
        return Text(
            self._captions.read(name)[None],
            self._captions.read(pooled)[None] if pooled in self._captions else None,
        )

    def _encoded_captions(self, names: Sequence[str], captions: dict[str, str]) -> dict[str, Tensor]:
        text = encode_captions(self.base, [captions[name] for name in names])
        tensors = dict(zip(names, text.encoder_hidden_states, strict=True))
        if text.pooled is not None:
            tensors |= {f"{name}.pooled": row for name, row in zip(names, text.pooled, strict=True)}
        return tensors

    def _fill_views(self, indices: Sequence[int], processes: Processes) -> None:
        assert self._latents is not None
        views = [(i, view) for i in indices for view in self.visits.views(i)]
        jobs = {self._name(*key): key for key in views}
        share = processes.index, processes.count
        mine = self._latents.missing(jobs, share)
        mine.sort(key=lambda name: (jobs[name][1].width, jobs[name][1].height))  # a batch has one size
        done = 0
        with ThreadPoolExecutor(max(self.data.workers, 1)) as threads:
            for part in _parts(mine):
                pictures = list(threads.map(lambda name: self.visits.picture(*jobs[name]), part))
                self._latents.write(self._encoded_pictures(part, pictures))
                done += len(part)
                self._say("pictures encoded", done, mine)
            for what, store, name_of, make in (
                ("maps prepared", self._maps, self._map_name, self._prepared_map),
                ("transparency read", self._opaque, self._opaque_name, self._read_opaque),
            ):
                if store is None:
                    continue
                wanted = {name_of(*key): key for key in views}
                mine, done = store.missing(wanted, share), 0
                for part in _parts(mine):
                    made = threads.map(make, [wanted[name] for name in part])
                    store.write(dict(zip(part, made, strict=True)))
                    done += len(part)
                    self._say(what, done, mine)

    def _prepared_map(self, key: tuple[int, View]) -> Tensor:
        return pack(self.visits.map(*key, seed=0))

    def _read_opaque(self, key: tuple[int, View]) -> Tensor:
        return torch.from_numpy(self.visits.opaque(*key, self.base.vae_factor))

    def _encoded_pictures(
        self, names: Sequence[str], pictures: Sequence[NDArray[np.uint8]]
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for shape in dict.fromkeys(picture.shape for picture in pictures):
            rows = [k for k, picture in enumerate(pictures) if picture.shape == shape]
            moments = self._encoded([pictures[k] for k in rows])
            stacked = torch.stack([moments.mean, moments.std], dim=1)
            tensors |= {names[k]: row for k, row in zip(rows, stacked, strict=True)}
        return tensors

    def _name(self, index: int, view: View) -> str:
        return _hash(f"{self._content[index][0]} {view} {VERSION}")

    def _opaque_name(self, index: int, view: View) -> str:
        return _hash(f"{self._content[index][0]} {view} opaque {self.base.vae_factor} {VERSION}")

    def _map_name(self, index: int, view: View) -> str:
        maps, settings = " ".join(self._content[index][1:]), self.visits.map_settings
        return _hash(f"{maps} {view} {settings} {self.visits.sizes[index]} {VERSION}")

    def _say(self, what: str, done: int, of: Sequence[str]) -> None:
        if len(of) > _SHARD:
            self.report(f"{what}: {done} of {len(of)}")


def levels_of(samples: Sequence[Sample]) -> Tensor:
    """The maps of samples of one size: (B, C, H, W), uint8 or uint16."""
    return images.maps_to_levels([sample.levels for sample in samples])


def _parts(names: Sequence[str]) -> Iterable[Sequence[str]]:
    return (names[start : start + _SHARD] for start in range(0, len(names), _SHARD))


def _caption_name(caption: str) -> str:
    return _hash(f"{caption} {VERSION}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]

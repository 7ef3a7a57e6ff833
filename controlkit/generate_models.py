"""The models of generations: the base and the adapters, each loaded once and kept for the next one."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from controlkit.formats.adapter_file import is_shuffle
from controlkit.formats.finding import mark_of_base

if TYPE_CHECKING:
    import torch
    from diffusers import UNet2DConditionModel

    from controlkit.adapters import Adapter
    from controlkit.base import Base

MOST_ADAPTERS = 4  # that are kept; of SD 1.5 each takes 0.7 GB
Key = tuple[str, str, str, bool]
AdapterKey = tuple[str, bool | None]
Stamp = tuple[tuple[str, int, int], ...]


class Models:
    """What was loaded. One base is kept at a time, with the adapters that were used last: another base takes
    their place.

    Networks that rest stay on the processor until they work, where memory is scarce. base_mark: of the base's
    files as they were when they were read.
    """

    def __init__(self) -> None:
        self.base_mark = ""
        self._base: tuple[Key, Base] | None = None
        self._adapters: dict[AdapterKey, _Kept] = {}  # the last one was used last

    def base(self, name: str, *, device: str, dtype: torch.dtype, rests: bool = False) -> Base:
        """The base on its device, or, if it rests, on the processor. Raises ValueError as `load_base`."""
        key = (name, device, str(dtype), rests)
        if self._base is None or self._base[0] != key:
            self._base, self._adapters = None, {}
            self.base_mark = mark_of_base(name)  # before: what is written meanwhile is another one
            self._base = key, _load_base(name, device=device, dtype=dtype, rests=rests)
        return self._base[1]

    def adapter(self, name: str, base: Base, *, kind: str = "", rests: bool = False) -> Adapter:
        """An adapter beside a base that was made of the present one, as with LoRAs on it; one whose files
        changed is read anew, and so is one that is changes to its base's weights, beside other weights.

        Raises ValueError as `load_adapter`.
        """
        from controlkit.adapters import load_adapter

        assert self._base is not None, "the base is loaded first"
        # Of the others the kind changes nothing; without one the file's name may.
        stamp, key = _stamp(name), (name, is_shuffle(kind) if kind else None)
        found = self._adapters.pop(key, None)
        kept = found.adapter if found is not None and found.serves(name, stamp, base) else None
        if kept is None:
            found = None  # given back before the next one takes memory
            while len(self._adapters) >= MOST_ADAPTERS:
                del self._adapters[next(iter(self._adapters))]
            device = base.unet.device if rests else base.device
            kept = load_adapter(name, base=base, kind=kind, device=device, dtype=base.dtype)
        self._adapters[key] = _Kept(stamp, kept, weakref.ref(base.unet))
        return kept


class _Kept(NamedTuple):
    """An adapter, its files as they were, and the U-Net beside which it was loaded."""

    stamp: Stamp
    adapter: Adapter
    unet: weakref.ref[UNet2DConditionModel]

    def serves(self, name: str, stamp: Stamp, base: Base) -> bool:
        """Whether loading it now would give the same."""
        return self.stamp == stamp and (self.unet() is base.unet or not _is_of_base(name))


def _stamp(name: str) -> Stamp:
    """Path, time and size of each file that an adapter is read from: weights that are overwritten in place
    leave their folder's time as it was. Nothing for a name of the hub or of a bundled adapter.
    """
    place = Path(os.path.expanduser(name))
    files = sorted(place.iterdir()) if os.path.isdir(place) else [place]
    found = [(str(file), file.stat()) for file in files if os.path.isfile(file)]
    return tuple((path, status.st_mtime_ns, status.st_size) for path, status in found)


def _is_of_base(name: str) -> bool:
    """Whether an adapter's weights are changes to its base's."""
    from controlkit.formats.adapter_file import open_adapter_file
    from controlkit.formats.finding import find_adapter_file
    from controlkit.formats.recognise import OF_BASE

    return find_adapter_file(name) is not None and open_adapter_file(name).kind in OF_BASE


def _load_base(name: str, *, device: str, dtype: torch.dtype, rests: bool) -> Base:
    from controlkit.base import load_base
    from controlkit.devices import check_device
    from controlkit.memory import HOST, rested

    if not rests:
        return load_base(name, device=device, dtype=dtype)
    place = check_device(device)
    return rested(load_base(name, device=HOST, dtype=dtype), place)

"""The models of generations: the base and the adapters, each loaded once and kept for the next one."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from controlkit.adapters import Adapter
    from controlkit.base import Base

Key = tuple[str, str, str, bool]


class Models:
    """What was loaded. One base is kept at a time, with its adapters: another one takes their place.

    Networks that rest stay on the processor until they work, where memory is scarce.
    """

    def __init__(self) -> None:
        self._base: tuple[Key, Base] | None = None
        self._adapters: dict[tuple[Key, str, float], Adapter] = {}

    def base(self, name: str, *, device: str, dtype: torch.dtype, rests: bool = False) -> Base:
        """The base on its device, or, if it rests, on the processor. Raises ValueError as `load_base`."""
        key = (name, device, str(dtype), rests)
        if self._base is None or self._base[0] != key:
            self._base, self._adapters = None, {}
            self._base = key, _load_base(name, device=device, dtype=dtype, rests=rests)
        return self._base[1]

    def adapter(self, name: str, base: Base, *, rests: bool = False) -> Adapter:
        """An adapter beside a base that was made of the present one; a folder that was replaced is read anew.

        Raises ValueError as `load_adapter`.
        """
        from controlkit.adapters import load_adapter

        assert self._base is not None, "the base is loaded first"
        written = os.stat(name).st_mtime if os.path.exists(name) else 0.0
        key = (self._base[0], name, written)
        if key not in self._adapters:
            device = base.unet.device if rests else base.device
            self._adapters[key] = load_adapter(name, base=base, device=device, dtype=base.dtype)
        return self._adapters[key]


def _load_base(name: str, *, device: str, dtype: torch.dtype, rests: bool) -> Base:
    from controlkit.base import load_base
    from controlkit.devices import check_device
    from controlkit.memory import HOST, rested

    if not rests:
        return load_base(name, device=device, dtype=dtype)
    place = check_device(device)
    return rested(load_base(name, device=HOST, dtype=dtype), place)

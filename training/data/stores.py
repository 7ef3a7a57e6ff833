"""Tensors on disk by content: named once, computed once, shared by every run that needs the same.

A store is a folder of safetensors shards. A shard is written whole or not at all, several processes may write
at once, and a stopped job goes on where it was: what a shard holds is there, the rest is computed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlkit import files
from controlkit.folders import read_header


class Store:
    """Tensors by name, in the shards of a folder."""

    def __init__(self, folder: Path) -> None:
        """Open the folder, which need not be there yet. Damaged shards are removed: they can be computed."""
        self.folder = folder
        self._where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self._seen: set[Path] = set()
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def refresh(self) -> None:
        """Look for shards that others have written since."""
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else ():
            if path in self._seen:
                continue
            try:
                names = read_header(path)
            except ValueError:
                with suppress(OSError):
                    path.unlink()
                continue
            self._seen.add(path)
            self._where |= {name: path for name in names if name != "__metadata__"}

    def missing(self, names: Iterable[str], share: tuple[int, int] = (0, 1)) -> list[str]:
        """Those that are not there, each once; of a share, the k-th of n processes, only its own.

        Shares are of all names: what another process has written meanwhile must not move them.
        """
        mine = list(dict.fromkeys(names))[share[0] :: share[1]]
        return [name for name in mine if name not in self._where]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from disk. Raises ValueError where its shard has gone since, or is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self._where[name]
        try:
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[path].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}, a part of the cache, cannot be read: {error}; start again") from error
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():  # the cheapest look
            raise ValueError(
                f"{path}, a part of the cache, holds values that are not finite: delete it and start again"
                " (if they come back, the base itself makes them of these data)"
            )
        return tensor

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Add a shard. Raises ValueError, one line, where the disk is full or not to be written."""
        from safetensors import SafetensorError
        from safetensors.torch import save

        if not tensors:
            return
        path = self.folder / f"{uuid.uuid4().hex[:12]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        except (OSError, ValueError, SafetensorError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
            raise ValueError(
                f"cannot keep what was computed: {reason} (CONTROLKIT_CACHE names another folder)"
            ) from error
        self._seen.add(path)
        self._where |= dict.fromkeys(tensors, path)

    def size(self) -> int:
        """Bytes on disk."""
        return sum(os.path.getsize(path) for path in self._seen if path.exists())

"""One file of weights: what stands in it, by key, type and shape, and reading the tensors.

Of a safetensors file the header tells all but the numbers, at once and without torch. A pickle (.pth, .ckpt,
.bin, .pt) has to be read whole, by a reader that accepts tensors and plain values and nothing else; what lies
nested in it (``state_dict``, ``adapter``) is laid out flat. Which of the two a file is, its first bytes say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from controlkit.folders import FLOATS as FLOATS
from controlkit.folders import read_header, read_state, read_tensors, refuse_impostor
from controlkit.formats.finite import not_finite
from controlkit.formats.hashing import check_hash, check_records

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".ckpt", ".bin", ".pt")
_NAMES = {ours: theirs for theirs, ours in FLOATS.items()}
_WRAPPERS = (  # the entry of a training checkpoint that holds the network
    *("state_dict", "adapter", "model", "model_state_dict", "controlnet", "net", "params", "module"),
    *("weights", "ema_state_dict"),
)


DIFFERENCE_KEY = "difference"  # marks a file whose values are to be added to the base's (sd-webui-controlnet)
LORA_KEY = "lora_controlnet"  # marks a Control-LoRA
MARKERS = (DIFFERENCE_KEY, LORA_KEY)


class Stored(NamedTuple):
    """How a tensor is stored: its type by safetensors' name ("F16"), and its shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class WeightFile:
    """A file's entries and the metadata of its header; of several shards those of all. Build it with
    `open_weights`.
    """

    path: Path
    entries: Mapping[str, Stored]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _state: Mapping[str, Tensor] | None = field(default=None, repr=False)  # of a pickle, which is read whole
    _shards: Sequence[WeightFile] = field(default=(), repr=False)

    @property
    def is_pickle(self) -> bool:
        """Whether it is a pickle."""
        return self._state is not None or any(shard.is_pickle for shard in self._shards)

    @property
    def size(self) -> int:
        """In bytes, of all shards."""
        return sum(shard.size for shard in self._shards) or self.path.stat().st_size

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these keys, on the CPU, in the file's precision. Raises ValueError if damaged."""
        if self._state is not None:
            return {key: self._state[key] for key in keys}
        if self._shards:
            wanted = list(keys)
            parts = [shard.read([k for k in wanted if k in shard.entries]) for shard in self._shards]
            return {key: next(part[key] for part in parts if key in part) for key in wanted}
        return read_tensors(self.path, keys)

    def not_finite(self, keys: Iterable[str]) -> list[str]:
        """Those of the tensors that hold a NaN or an infinity."""
        wanted = list(keys)
        if self._state is not None:
            import torch

            return [key for key in wanted if not torch.isfinite(self._state[key].float()).all()]
        if self._shards:
            parts = [shard.not_finite([k for k in wanted if k in shard.entries]) for shard in self._shards]
            return [key for part in parts for key in part]
        return not_finite(self.path, wanted)

    def hollow(self) -> WeightFile:
        """The same entries with tensors that have shapes and no numbers (torch's "meta"): nothing is read."""
        import torch

        state = {
            key: torch.empty(
                entry.shape, dtype=getattr(torch, FLOATS.get(entry.dtype, "float32")), device="meta"
            )
            for key, entry in self.entries.items()
        }
        return replace(self, metadata={}, _state=state, _shards=())

    def check_hash(self) -> None:
        """Raise ValueError, naming the file, if its header knows the tensors' hash and they have another, or
        if it is torch's archive and one of its records has another checksum than it was written with.
        """
        for shard in self._shards:
            shard.check_hash()
        check_hash(self.path, self.metadata)
        if self._state is not None and not any(tensor.is_meta for tensor in self._state.values()):
            check_records(self.path)


def open_weights(path: Path, *more: Path, what: str = "adapter") -> WeightFile:
    """Open a weight file, or several that hold the parts of one model; ``what`` it should be, for messages.

    Raises ValueError, naming the file, with what it is instead: missing, empty, cut short, a Git LFS pointer,
    a web page, GGUF, a pickle of more than tensors, or without any tensor.
    """
    if more:
        shards = [open_weights(shard, what=what) for shard in (path, *more)]
        entries = {key: entry for shard in shards for key, entry in shard.entries.items()}
        return WeightFile(path, entries, _shards=shards)
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    refuse_impostor(path, start)
    if _is_pickle(start):
        try:
            state = _flat(_unwrapped(read_state(path, what=what, pickled=True)))
        except RecursionError as error:
            raise ValueError(f"{path} is damaged: its entries lie in each other without an end") from error
        entries = {key: _stored(path, key, tensor) for key, tensor in state.items()}
        opened = WeightFile(path, entries, _state=state)
    else:
        header = read_header(path)
        metadata = header.pop("__metadata__", {})
        entries = {key: Stored(entry["dtype"], tuple(entry["shape"])) for key, entry in header.items()}
        opened = WeightFile(path, entries, metadata)
    if not opened.entries:
        raise ValueError(f"{path} holds no tensors")
    return opened


def count_parameters(entries: Mapping[str, Stored]) -> int:
    """How many numbers the tensors hold together."""
    return sum(prod(entry.shape) for entry in entries.values())


def precision(entries: Mapping[str, Stored]) -> str:
    """The type of the numbers, "float16", or "mixed (float16, float32)"."""
    found = sorted({FLOATS.get(entry.dtype, entry.dtype) for entry in entries.values()})
    return found[0] if len(found) == 1 else f"mixed ({', '.join(found)})"


def check_floats(entries: Mapping[str, Stored], where: Path) -> None:
    """Raise ValueError for numbers that are no plain floats: somebody's quantization."""
    for key, entry in entries.items():
        if entry.dtype not in FLOATS:
            raise ValueError(f"{where} stores {key} as {entry.dtype}, a quantization that is not supported")


def _is_pickle(start: bytes) -> bool:
    """Whether a file begins as torch's archive or as a bare pickle; a safetensors header is JSON."""
    return len(start) > 8 and start[8:9] != b"{" and (start.startswith(b"PK\x03\x04") or start[:1] == b"\x80")


def _unwrapped(state: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in _WRAPPERS:
        if isinstance(inner := state.get(name), Mapping):
            marks = {key: state[key] for key in MARKERS if key in state}
            return _unwrapped({**marks, **inner})
    return state


def _flat(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors in nested mappings, by dotted keys; what else stands there (step counts, names) is left.

    A marker may be a plain True.
    """
    import torch

    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value.detach()
        elif key in MARKERS and value is True:
            flat[f"{prefix}{key}"] = torch.ones(1)
    return flat


def _stored(path: Path, key: str, tensor: Tensor) -> Stored:
    name = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout.__str__() != "torch.strided":
        raise ValueError(f"{path}: {key} is a sparse tensor, which no adapter has")
    if tensor.is_meta:
        raise ValueError(f"{path} has a shape for {key} and no numbers (torch's meta device)")
    return Stored(_NAMES.get(name, name), tuple(tensor.shape))

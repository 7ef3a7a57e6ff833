"""A GPU that is made of the processor: its tensors have numbers, and may not meet those of the processor.

What runs on it computes what it would on the processor, and fails where a real device would: where tensors of
both places meet, or numpy is handed one of the device's. `fake_device.py` has a device without numbers, which
is faster and can do less: schedulers, for one, read numbers.

To torch's own code the tensors lie on the second "meta" device, which has a backward pass and needs no
driver; to Python's they lie on "cuda".
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_GPU, _WITHIN = torch.device("cuda", 0), torch.device("meta", 1)
_MAY_MIX = ("aten.copy_", "aten._to_copy", "aten.index", "aten.index_put", "aten.index_put_")


class Afar(Tensor):
    """A tensor of the device; ``near`` has its numbers, on the processor."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "Afar":
        """Wrap a tensor of the processor."""
        shape = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, near.shape, **shape, dtype=near.dtype, device=_WITHIN)
        made.near = near
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As `_Places` does, also on threads that do not have it."""
        return _computed(func, args, kwargs or {}, Counter())

    @property
    def device(self) -> torch.device:
        """Where it seems to be."""
        return _GPU

    @property
    def is_cuda(self) -> bool:
        """Whether it seems to be on a GPU."""
        return True

    @property
    def is_meta(self) -> bool:
        """Whether it seems to have no numbers."""
        return False

    @property
    def data(self) -> Tensor:
        """The same numbers apart from any graph."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, new: "Afar") -> None:
        Tensor.data.__set__(self, new)
        self.near = new.near

    def __repr__(self) -> str:
        """What it is, with its numbers."""
        return f"Afar({self.near!r})"

    def numpy(self, *_: Any, **__: Any) -> Any:
        """Refused, as by torch."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def tolist(self) -> Any:
        """The numbers, for which the host waits."""
        return self.cpu().tolist()


def _computed(func: Any, args: Any, kwargs: dict[str, Any], count: Counter[str]) -> Any:
    name = str(func.overloadpacket)
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    on_gpu = any(isinstance(value, Afar) for value in given)
    if on_gpu and name not in _MAY_MIX:
        here = [tuple(value.shape) for value in given if not isinstance(value, Afar) and value.dim()]
        if here:
            raise RuntimeError(f"{name} was given tensors of cuda:0 and of the CPU, {here}")
    stays = on_gpu
    if kwargs.get("device") is not None:
        if kwargs["device"] == torch.device("meta"):
            return func(*args, **kwargs)
        stays = kwargs["device"] in (_GPU, _WITHIN)
        kwargs = {**kwargs, "device": torch.device("cpu")}
    count["read"] += on_gpu and (name == "aten._local_scalar_dense" or not stays)
    written = args[0] if name == "aten.copy_" else None
    sends = isinstance(written, Afar) if written is not None else name == "aten._to_copy" and stays
    count["sent"] += sends and any(not isinstance(value, Afar) for value in given)
    near_args, near_kwargs = tree_map_only(Afar, lambda value: value.near, (args, kwargs))
    result = func(*near_args, **near_kwargs)
    if "out" in kwargs:
        return kwargs["out"]
    if func._schema.name.endswith("_") and isinstance(result, Tensor):
        return args[0]
    return tree_map_only(Tensor, Afar, result) if stays else result


class _Places(TorchDispatchMode):
    """Puts what is made on the device there; counts what the host reads from it ("read") and sends there."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {}, self.count)


class _Names(TorchFunctionMode):
    """What asks for "cuda" is given the device, before torch looks for a driver."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        kwargs = {key: _placed(value) for key, value in kwargs.items()}
        if func in (torch.tensor, torch.as_tensor) and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__ and isinstance(args[0], Afar) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]))
        return func(*map(_placed, args), **kwargs)


def _placed(value: Any) -> Any:
    if isinstance(value, str) and value.split(":")[0] == "cuda":
        return _WITHIN
    return _WITHIN if isinstance(value, torch.device) and value.type == "cuda" else value


@contextmanager
def pretended_gpu() -> Iterator[Counter[str]]:
    """Within the block there is a device "cuda" for tensors and networks; counts what the host reads of it
    and sends there, as "read" and "sent".

    torch.cuda's own functions say that there is none, but for `with_driver`.
    """
    with _Places() as places, _Names():
        yield places.count


class _Event:
    """torch.cuda.Event of a device that has done everything as soon as it is told to."""

    def __init__(self, **_: Any) -> None:
        self._at = 0.0

    def record(self, _: Any = None) -> None:
        """Note the time."""
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, other: "_Event") -> float:
        """Milliseconds until the other's."""
        return 1000 * (other._at - self._at)


def with_driver(patch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda say that there is one GPU, what it has, and that threads may use it, too."""
    says: dict[str, Any] = {
        "is_available": True,
        "device_count": 1,
        "is_bf16_supported": True,
        "mem_get_info": (10**10, 2 * 10**10),
        "max_memory_allocated": 10**9,
        "current_stream": None,
        **dict.fromkeys(("reset_peak_memory_stats", "empty_cache", "synchronize")),
    }
    for name, answer in says.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    patch.setattr(torch.cuda, "Event", _Event)
    patch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    health = "_accelerator_graph_capture_health_check"  # not in every version
    patch.setattr(torch.optim.Optimizer, health, lambda _: None, raising=False)
    run = threading.Thread.run

    def within(thread: threading.Thread) -> None:
        with pretended_gpu():
            run(thread)

    patch.setattr(threading.Thread, "run", within)

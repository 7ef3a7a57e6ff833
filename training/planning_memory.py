"""What one training step holds in memory and computes, learned without any memory: on fake tensors.

A fake tensor has a shape, a precision and a layout but no numbers. The true networks are built of them from
their configurations, and the true forward and backward pass is run on them; a ledger notes every storage as
it comes and goes, and every operation with its shapes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from controlkit.training.flops import formula

if TYPE_CHECKING:
    from torch._ops import OpOverload

_VIEWED = ("aten::view", "aten::_unsafe_view", "aten::t", "aten::transpose", "aten::permute", "aten::expand")


@dataclass(frozen=True)
class Like:
    """A tensor's outside: what is needed to make one like it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """The outside of a tensor."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass
class Operation:
    """One operation at one set of shapes: how often it ran, and what one run computes and moves."""

    function: OpOverload
    args: tuple[Any, ...]
    """Positional arguments, tensors as `Like`."""
    kwargs: dict[str, Any]
    kind: str
    """convolution, matmul, attention, or pointwise: all that is not worth counting FLOPs for."""
    flops: int
    moved: int
    """Bytes of its tensors, read and written."""
    scratch: int
    """Bytes that it needs for itself while it runs."""
    count: int = 0


@dataclass(frozen=True)
class Moment:
    """The bytes that were alive at the worst moment, by what they were."""

    saved: int = 0
    gradients: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.saved + self.gradients + self.workspace


class Ledger(TorchDispatchMode):
    """Notes storages and operations of what runs within it. What was there before counts for nothing."""

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.worst = Moment()
        self.operations: dict[Any, Operation] = {}
        self.calls = 0
        self.gradients = 0
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in known}
        self._before = list(known)  # so that no new storage can take the address of one of them
        self._saved: set[int] = set()
        self._saved_bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        for tensor in made:
            self._note(tensor)
        self.calls += bool(made)
        if made and not func.is_view and func._schema.name not in _VIEWED:
            self._count(func, args, kwargs, result, made)
        return result

    def mark_saved(self) -> int:
        """Call what is alive now saved for the backward pass; returns its bytes."""
        self._saved = set(self._known) - {tensor.untyped_storage()._cdata for tensor in self._before}
        self._saved_bytes = self.live - self.gradients
        if not self.worst.saved:  # the worst so far was during the forward pass
            saved = min(self._saved_bytes, self.worst.total - self.gradients)
            self.worst = Moment(saved, self.gradients, self.worst.total - self.gradients - saved)
        return self._saved_bytes

    def note_gradient(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`."""
        assert parameter.grad is not None
        self.gradients += parameter.grad.untyped_storage().nbytes()

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        weakref.finalize(storage, self._freed, key, storage.nbytes()).atexit = False
        self._weigh(0)

    def _weigh(self, scratch: int) -> None:
        """Remember this moment if it is the worst so far, with an operation's own `scratch` bytes."""
        if self.live + scratch > self.worst.total:
            # A gradient is noted a little after it was made, so the rest may hold it for a moment.
            rest = self.live - self._saved_bytes
            gradients = min(self.gradients, rest)
            self.worst = Moment(self._saved_bytes, gradients, rest - gradients + scratch)

    def _freed(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes
        if key in self._saved:
            self._saved.discard(key)
            self._saved_bytes -= nbytes

    def _count(
        self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, made: list[Tensor]
    ) -> None:
        likes_args, likes_kwargs = _as_likes(args), _as_likes(kwargs)
        key = (func, repr(likes_args), repr(likes_kwargs))
        if key not in self.operations:
            read = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            moved = sum(Like.of(tensor).nbytes for tensor in [*read, *made])
            count = formula(func.overloadpacket)
            flops = int(count(*args, **kwargs, out_val=result)) if count else 0
            kind = _kind(str(func)) if count else "pointwise"
            scratch = _scratch(kind, moved, read)
            self.operations[key] = Operation(func, likes_args, likes_kwargs, kind, flops, moved, scratch)
        operation = self.operations[key]
        operation.count += 1
        if operation.scratch:
            self._weigh(operation.scratch)


def _kind(name: str) -> str:
    return "convolution" if "conv" in name else "attention" if "attention" in name else "matmul"


def _scratch(kind: str, moved: int, read: Sequence[Tensor]) -> int:
    """A convolution's copies of its tensors in the layout that its kernel wants: none of channels_last."""
    if kind != "convolution" or read[0].is_contiguous(memory_format=torch.channels_last):
        return 0
    return moved


def _as_likes(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Like.of(value)
    if isinstance(value, list | tuple):
        return type(value)(_as_likes(item) for item in value)
    if isinstance(value, dict):
        return {key: _as_likes(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Simulated:
    """A pass of one micro-batch: bytes beyond the weights, and the operations."""

    saved: int
    """Alive between forward and backward: activations, and weights cast to half precision."""
    worst: Moment
    operations: list[Operation] = field(repr=False)
    calls: int
    """How many operations ran, views among them."""

    def flops(self) -> dict[str, int]:
        """FLOPs by kind of operation; a multiplication and an addition are two."""
        total: dict[str, int] = {}
        for operation in self.operations:
            if operation.flops:
                total[operation.kind] = total.get(operation.kind, 0) + operation.flops * operation.count
        return total


def simulate(
    forward: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    *,
    backward: bool = True,
    gradients_there: bool = False,
) -> Simulated:
    """Run ``forward``, and the backward pass of what it returns, on fake tensors.

    ``modules`` hold the weights, whose bytes are not counted. ``gradients_there``: those of an earlier
    micro-batch, to which these are added. Call it within the fake mode of the networks.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    buffers = [buffer for module in modules for buffer in module.buffers()]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    ledger = Ledger([*parameters, *buffers])
    hooks = []
    with ledger:
        if gradients_there and backward:
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
                ledger.note_gradient(parameter)
        else:
            hooks = [p.register_post_accumulate_grad_hook(ledger.note_gradient) for p in trained]
        loss = forward()
        saved = ledger.mark_saved()
        if backward:
            loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return Simulated(saved, ledger.worst, list(ledger.operations.values()), ledger.calls)


def optimizer_bytes(name: str, parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """(Bytes that an optimizer keeps between steps, bytes that it needs in passing during one.)"""
    count = sum(parameter.numel() for parameter in parameters)
    largest = max(parameter.numel() for parameter in parameters)
    if name == "adafactor":  # rows' and columns' means of the last two axes; vectors in full
        kept = sum(_factored(tuple(parameter.shape)) for parameter in parameters)
        return 4 * kept, 8 * largest
    if name == "adamw8bit":  # a byte and its block's scale, twice; small tensors stay in float32
        small = sum(parameter.numel() for parameter in parameters if parameter.numel() < 4096)
        return 8 * small + (count - small) * 2 * (256 + 4) // 256, 0
    kept_per_weight: Mapping[str, int] = {"adamw": 8, "lion": 4, "prodigy": 16, "schedule-free": 8}
    return kept_per_weight[name] * count, {"schedule-free": 8 * count, "adamw": 0}.get(name, 8 * largest)


def _factored(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return prod(shape)
    return prod(shape[:-1]) + prod(shape[:-2]) * shape[-1]


def weight_bytes(modules: Sequence[nn.Module], *, trained: bool | None = None) -> int:
    """Bytes of the modules' weights and buffers; ``trained`` chooses those that are, or are not."""
    tensors: list[Tensor] = [p for m in modules for p in m.parameters() if trained in (None, p.requires_grad)]
    if not trained:
        tensors += [buffer for module in modules for buffer in module.buffers()]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)

"""Which of torch's attention kernels a training uses: chosen by measuring them at the shapes that it has.

Stable Diffusion 1 has heads of width 40, which some kernels pad to 64, and its largest layers have 4096
tokens: which kernel is fastest there depends on the GPU and on torch's version, and is soon measured.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BACKENDS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
_WARM_UPS, _TIMED = 3, 10


class Shape(NamedTuple):
    """Of one attention: rows, heads, tokens that ask, tokens that are looked at, width of a head."""

    rows: int
    heads: int
    tokens: int
    keys: int
    width: int
    dtype: torch.dtype
    device: torch.device


class Attention:
    """The kernels that are preferred, the fastest first; torch's own choice until there is a measurement."""

    def __init__(self, *, measures: bool, report: Callable[[str], None]) -> None:
        self.measures, self.report = measures, report
        self.order: list[str] = []

    @contextmanager
    def preferred(self) -> Iterator[None]:
        """Within the block the first kernel in the order is used that can compute what is asked."""
        if not self.order:
            yield
            return
        with sdpa_kernel([BACKENDS[name] for name in self.order], set_priority=True):
            yield

    def measure(self, forward: Callable[[], object]) -> None:
        """Find the order for the attentions of a forward pass, once, and say it."""
        self.measures = False
        with torch.no_grad(), _Seen() as seen:
            forward()
        spent = {name: total(seen.shapes, name) for name in BACKENDS}
        self.order = sorted((name for name in spent if math.isfinite(spent[name])), key=spent.__getitem__)
        if not self.order:
            return
        told = ", ".join(f"{name} {1000 * spent[name]:.2f} ms" for name in self.order)
        self.report(f"attention, forward and backward of a micro-batch: {told}; the first is used")


class _Seen(TorchFunctionMode):
    """Counts the attentions that are computed, by their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[Shape] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            query, key = args[0], args[1]
            rows, heads, tokens, width = query.shape
            self.shapes[Shape(rows, heads, tokens, key.shape[2], width, query.dtype, query.device)] += 1
        return func(*args, **(kwargs or {}))


def total(shapes: Mapping[Shape, int], name: str) -> float:
    """Seconds that a kernel takes for so many attentions of each shape; infinite where it cannot compute."""
    return sum(count * seconds(shape, name) for shape, count in shapes.items())


@cache
def seconds(shape: Shape, name: str) -> float:
    """Seconds of a forward and a backward pass; infinite where the kernel does not take the shape."""
    asked, looked = (
        torch.randn(
            (shape.rows, shape.heads, tokens, shape.width),
            dtype=shape.dtype,
            device=shape.device,
            requires_grad=True,
        )
        for tokens in (shape.tokens, shape.keys)
    )

    def once() -> None:
        with sdpa_kernel(BACKENDS[name]):
            out = scaled_dot_product_attention(asked, looked, looked)
        out.backward(torch.ones_like(out))

    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # each kernel's reasons why it cannot
            return _timed(once, shape.device)
    except RuntimeError:  # not for this shape, or not enough memory
        return math.inf


def _timed(work: Callable[[], None], device: torch.device) -> float:
    on_gpu = device.type == "cuda"
    for _ in range(_WARM_UPS if on_gpu else 1):
        work()
    if not on_gpu:
        spent = []
        for _ in range(_WARM_UPS):
            started = time.perf_counter()
            work()
            spent.append(time.perf_counter() - started)
        return min(spent)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)  # and not that of the first device
    begin.record(stream)
    for _ in range(_TIMED):
        work()
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000 / _TIMED

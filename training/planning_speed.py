"""How long operations take on a device: a few of them are run there, the others are reckoned from those."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.training.planning_memory import Like, Operation, Simulated

KINDS = ("convolution", "matmul", "attention", "pointwise")
_BUDGET_S = 0.5  # per kind; one operation is always run
_COVERED = 0.8  # of a kind's work; the rest goes at the same rate
_REPEATS = 3
_STREAMED = 8 * 1024**2  # elements of the arrays that the memory's speed is measured with


@dataclass(frozen=True)
class Speed:
    """Seconds that operations take, and the rates that they were reckoned from.

    ``rates``: FLOP/s by kind, of pointwise bytes/s. ``host_s``: what Python and torch spend on calling them,
    which a GPU works beside.
    """

    seconds: dict[str, float]
    rates: dict[str, float]
    host_s: float
    overlaps: bool

    @property
    def total_s(self) -> float:
        """Seconds of all operations together."""
        device = sum(self.seconds.values())
        return max(device, self.host_s) if self.overlaps else device + self.host_s


def measure_speed(simulated: Simulated, device: str) -> Speed:
    """Run the operations that matter most, of each kind, on the device for about two seconds in all."""
    operations = simulated.operations
    seconds: dict[str, float] = {}
    rates: dict[str, float] = {}
    for kind in KINDS:
        chosen = sorted((o for o in operations if o.kind == kind), key=_work, reverse=True)
        total = sum(_work(operation) for operation in chosen)
        if total:
            rates[kind] = _rate(chosen, total, device)
            seconds[kind] = total / rates[kind]
    host_s = simulated.calls * _call_seconds()
    return Speed(seconds, rates, host_s, overlaps=torch.device(device).type != "cpu")


def bandwidth(device: str) -> float:
    """Bytes/s that move when one large array is blended into another, as optimizers do."""
    first, second = (torch.ones(_STREAMED, device=device) for _ in range(2))
    return 12 * _STREAMED / _seconds(lambda: lambda: first.lerp_(second, 0.5), device)


def _work(operation: Operation) -> int:
    return (operation.moved if operation.kind == "pointwise" else operation.flops) * operation.count


def _rate(chosen: Sequence[Operation], total: int, device: str) -> float:
    """Work per second over the largest operations, weighted by how often each runs."""
    covered, taken, started = 0, 0.0, time.perf_counter()
    for operation in chosen:
        taken += operation.count * _seconds(partial(_runner, operation, device), device)
        covered += _work(operation)
        if covered >= _COVERED * total or time.perf_counter() - started > _BUDGET_S:
            break
    return covered / taken


def _runner(operation: Operation, device: str) -> Callable[[], Any]:
    """A call of the operation on the device, on tensors of the shapes and layouts that it was noted with."""
    args, kwargs = _made(operation.args, device), _made(operation.kwargs, device)
    if operation.kind == "attention" and torch.device(device).type != "cpu":  # noted as the CPU's own kernel
        if "backward" not in str(operation.function):
            return lambda: nn.functional.scaled_dot_product_attention(*args[:3])
        seen = [tensor.requires_grad_(True) for tensor in args[1:4]]
        with torch.enable_grad():  # timings are taken without
            out = nn.functional.scaled_dot_product_attention(*seen)
        return lambda: torch.autograd.grad(out, seen, args[0], retain_graph=True)
    return lambda: operation.function(*args, **kwargs)


def _made(value: Any, device: str) -> Any:
    if isinstance(value, Like):
        tensor = torch.empty_strided(value.shape, value.stride, dtype=value.dtype, device=device)
        return tensor.fill_(0.5) if value.dtype.is_floating_point else tensor.zero_()
    if isinstance(value, list | tuple):
        return type(value)(_made(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _made(item, device) for key, item in value.items()}
    if isinstance(value, torch.device):
        return torch.device(device)
    return value


@torch.no_grad()
def _seconds(prepare: Callable[[], Callable[[], Any]], device: str) -> float:
    """The middle one of three timings of what ``prepare`` gives, after one that warms up.

    It is prepared anew each time: in a training an operation does not find its tensors in a fast cache.
    """
    times: list[float] = []
    began = time.perf_counter()
    while len(times) <= _REPEATS and (len(times) < 2 or time.perf_counter() - began < _BUDGET_S):
        call = prepare()
        _synchronize(device)
        started = time.perf_counter()
        call()
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _synchronize(device: str) -> None:
    kind = torch.device(device).type
    if kind != "cpu":
        getattr(torch, kind).synchronize()


def _call_seconds() -> float:
    """Seconds to call one operation of a module and of its gradient, whatever it computes."""
    layers = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.SiLU())
    x = torch.ones(1, 4)
    calls = 12  # what the ledger counts of these: forward, backward, a sum per bias

    def run() -> Tensor:
        loss = layers(x).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        run()
        times = []
        for _ in range(50):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return statistics.median(times) / calls

"""What several processes average in a step: here threads, each of which is told that it is one of two."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from controlkit.training import loop, together
from controlkit.training.machine import Machine
from controlkit.training.task import Losses

ALL = ("first", "second", "third")


class Threads:
    """`torch.distributed` for two threads."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self) -> None:
        self.rank = threading.local()
        self._barrier, self._given = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def _exchanged(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self._given[self.rank.index] = tensor.clone()
        self._barrier.wait()
        given = list(self._given)
        self._barrier.wait()
        return given

    def get_world_size(self) -> int:
        return 2

    def all_reduce(self, tensor: torch.Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        one, other = self._exchanged(tensor)
        tensor.copy_(one + other if op == torch.distributed.ReduceOp.SUM else torch.maximum(one, other))

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self._exchanged(tensor)[source])


@dataclass
class Part:
    """A micro-batch whose gradient is ``row`` in each of these weights."""

    row: float
    weights: tuple[str, ...] = ALL

    def __len__(self) -> int:
        return 1


class Network(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: nn.Parameter(torch.full((2, 3), value)) for name in ALL})

    def forward(self, part: Part) -> torch.Tensor:
        return torch.stack([(part.row * self.weights[name]).sum() for name in part.weights]).sum()[None]


class Task:
    half = torch.bfloat16

    def __init__(self, value: float, parts: list[Part]) -> None:
        self.network, self.parts = Network(value), lambda step: parts

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network}

    def whole(self) -> nn.Module:
        return self.network

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.network.parameters()), "rate": 1.0}]

    def losses(self, whole: nn.Module, part: Part) -> Losses:
        return Losses(whole(part))


@pytest.fixture
def of_two(monkeypatch):
    """Two processes' gradients after a step on their micro-batches, and the weights that they began with."""
    threads = Threads()
    monkeypatch.setattr(together, "distributed", threads)

    def step(rank: int, parts: list[Part]) -> tuple[dict[str, Any], dict[str, Any]]:
        threads.rank.index = rank
        told: Any = {"precision": "bf16", "device": "cpu", "learning_rate": 1.0, "betas": (0.9, 0.99)}
        machine = Machine(SimpleNamespace(**told, weight_decay=0.0))
        machine.processes.index, machine.processes.count = rank, 2
        task: Any = Task(1.0 + rank / 64, parts)
        whole, weights, _ = loop._started(task, machine)
        run: Any = {"task": task, "machine": machine, "whole": whole, "weights": weights, "graphs": None}
        loop.forward_backward(SimpleNamespace(**run, pieces=1, step=0))
        masters = {name.rpartition(".")[2]: master for name, master in weights.masters.items()}
        gradients = {n: None if m.grad is None else m.grad.unique().tolist() for n, m in masters.items()}
        assert all(
            torch.equal(p.float(), m) for p, m in zip(whole.parameters(), masters.values(), strict=True)
        )
        return gradients, {name: master.unique().tolist() for name, master in masters.items()}

    def both(*parts: list[Part]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(step, range(2), parts))

    return both


@pytest.mark.parametrize("bucket", [1, 2**26])
def test_masters_of_two_processes_get_the_mean_over_all_micro_batches(of_two, monkeypatch, bucket):
    monkeypatch.setattr(together, "BUCKET", bucket)
    mean = (1.0 + 256.0 + 3.0 + 512.0) / 4  # of a process it is 257 and 515, which are no bf16 numbers
    for gradients, begun in of_two([Part(1.0), Part(256.0)], [Part(3.0), Part(512.0)]):
        assert gradients == {key: [mean] for key in ALL}
        assert begun == {key: [1.0] for key in ALL}  # the first process's


def test_a_weight_that_one_process_does_not_use_gets_the_others_share(of_two):
    parts = [Part(8.0, ("first",)), Part(4.0, ("first", "second"))], [Part(2.0, ("first",))] * 2
    for gradients, _ in of_two(*parts):
        assert gradients == {"first": [4.0], "second": [1.0], "third": None}

"""DeepSpeed's ZeRO: processes share optimizer state and masters, gradients, and in stage 3 the weights, too.

Rajbhandari et al. 2020, arXiv:1910.02054. DeepSpeed lays the weights that are trained end to end, in one flat
tensor for each group of the optimizer, and gives each process an equal stretch of it. It sums gradients over
the processes, clips them, and takes no step where their norm is not finite. Here stands what the loop needs
beside: which stretch of which weight a process has, so that averages stay shared while checkpoints hold whole
tensors, the same ones that other ways of training write.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit.training.optimizers import make_optimizer, numbers_of
from controlkit.training.task import Task
from controlkit.training.weights import Tensors, Weights, named

if TYPE_CHECKING:
    from controlkit.training.machine import Machine


def start(task: Task, machine: Machine) -> tuple[Any, Weights, Any]:
    """DeepSpeed's engine for a task, its weights, and the optimizer; the machine keeps the engine.

    In half precision DeepSpeed takes the masters from weights that it has rounded: they are put back to what
    they were.
    """
    os.environ.setdefault("DS_ACCELERATOR", machine.device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    modules = task.modules()
    half = machine.dtype != torch.float32
    exact = {name: p.detach().to("cpu", copy=True) for name, p in named(modules).items() if half}
    optimizer = make_optimizer(machine.recipe, task.parameter_groups())
    machine.engine, *_ = deepspeed.initialize(model=task.whole(), optimizer=optimizer, config=machine.zero)
    weights = ZeroWeights(modules, machine.engine)
    weights.set_masters(exact)
    return machine.engine, weights, machine.engine.optimizer


def step(engine: Any) -> float:
    """Clip and take a step, unless the gradient is not finite; returns the norm that it had."""
    engine.step()
    return math.inf if engine.optimizer.overflow else float(engine.get_global_grad_norm())


@dataclass(frozen=True)
class Share:
    """This process's stretch of one weight: ``flat[at : at + count]`` is the weight's from ``start`` on."""

    flat: Tensor
    at: int
    start: int
    count: int
    shape: torch.Size
    """Of the whole weight."""
    device: torch.device
    """Where processes tell each other what they have; ``flat`` may be in the host's memory."""

    def of(self, flat: Tensor) -> Tensor:
        """The stretch of a tensor that is laid out like ``flat``."""
        return flat[self.at : self.at + self.count]

    def cut(self, whole: Tensor) -> Tensor:
        """The stretch of a whole tensor. Raises RuntimeError for another shape than the weight's."""
        if whole.shape != self.shape:
            raise RuntimeError(f"a tensor of shape {tuple(whole.shape)} for a weight of {tuple(self.shape)}")
        return whole.flatten()[self.start : self.start + self.count]

    def whole(self, stretch: Tensor) -> Tensor:
        """The whole tensor, on every process; all of them have to ask for it."""
        whole = torch.zeros(self.shape.numel(), dtype=stretch.dtype, device=self.device)
        whole[self.start : self.start + self.count] = stretch.to(self.device)
        torch.distributed.all_reduce(whole)
        return whole.view(self.shape)


class ZeroWeights(Weights):
    """Trained weights of which each process has a stretch of the masters and of their average."""

    def __init__(self, modules: Mapping[str, nn.Module], engine: Any) -> None:
        self.engine, self.parameters = engine, named(modules)
        shares = dict(_shares(engine))
        self.shares = {name: shares[id(parameter)] for name, parameter in self.parameters.items()}
        self.masters = {name: share.of(share.flat.detach()) for name, share in self.shares.items()}
        self.average: Tensors = {}
        self.keeps_gradients = False

    @torch.no_grad()
    def set_masters(self, exact: Mapping[str, Tensor]) -> None:
        """Put the first process's whole values in place of masters."""
        for name, whole in exact.items():
            value = whole.to(self.engine.device)
            torch.distributed.broadcast(value, 0)
            self.masters[name].copy_(self._share(name, value))

    def take_gradients(self) -> None:
        """DeepSpeed has them already."""

    def reduce_gradients(self) -> None:
        """DeepSpeed does, while they are computed."""

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self.engine.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def give(self) -> None:
        """Round the masters into the network."""
        for name, parameter in self.parameters.items():
            whole = self._whole(name, self.masters[name])
            with self._together(parameter):
                parameter.copy_(whole)

    def _together(self, parameter: nn.Parameter) -> AbstractContextManager[Any]:
        """Within the block a weight of the network is whole, also where processes share it."""
        import deepspeed

        apart = self.engine.zero_optimization_stage() == 3
        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=apart)

    def state_of(self, optimizer: Any) -> tuple[Tensors, list[dict[str, Any]]]:
        """The optimizer's state, whole, named as that of other trainings is."""
        tensors = {}
        for name, share in self.shares.items():
            for key, value in optimizer.state[share.flat].items():
                is_shared = value.shape == share.flat.shape
                tensors[f"{name}/{key}"] = share.whole(share.of(value)) if is_shared else value
        return tensors, numbers_of(optimizer)

    @torch.no_grad()
    def restore_state(
        self, optimizer: Any, tensors: Mapping[str, Tensor], groups: Sequence[Mapping[str, Any]]
    ) -> None:
        """Put back what `state_of` gave, here or in a training that shares nothing."""
        optimizer.state.clear()
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            share = self.shares[name]
            state = optimizer.state[share.flat]
            if tensor.shape != share.shape:  # how many steps were taken
                state[key] = tensor.to(share.flat.device, copy=True)
                continue
            if key not in state:
                state[key] = torch.zeros_like(share.flat, requires_grad=False)
            share.of(state[key]).copy_(share.cut(tensor))
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.update(saved)

    def _whole(self, name: str, part: Tensor) -> Tensor:
        return self.shares[name].whole(part)

    def _share(self, name: str, whole: Tensor) -> Tensor:
        return self.shares[name].cut(whole)


def _shares(engine: Any) -> Iterator[tuple[int, Share]]:
    """This process's stretch of each trained weight, by the weight's id: none of some in stages 1 and 2."""
    optimizer, device = engine.optimizer, engine.device
    if engine.zero_optimization_stage() < 3:
        for flat, group in zip(
            optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True
        ):
            for parameter in group:
                if (here := parameter._hp_mapping) is None:
                    yield id(parameter), Share(flat, 0, 0, 0, parameter.shape, device)
                    continue
                to, of = here.hp_fragment_address, here.lp_fragment_address
                yield id(parameter), Share(flat, to.start, of.start, of.numel, parameter.shape, device)
        return
    rank = torch.distributed.get_rank()
    for group in optimizer.fp16_groups:
        for parameter in group:
            number, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            flat, shape = optimizer.fp32_partitioned_groups_flat[number], parameter.ds_shape
            count = max(0, min(size, shape.numel() - rank * size))  # the last ones are padded
            yield id(parameter), Share(flat, at, min(rank * size, shape.numel()), count, shape, device)

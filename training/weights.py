"""The trained weights: what the optimizer moves, what the network computes with, and their moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.training.optimizers import restore_state, state_of
from controlkit.training.sharding import shared_like, whole_tensor
from controlkit.training.together import average_gradients, take_firsts

Tensors = dict[str, Tensor]


class Weights:
    """Trained parameters by name; in half precision, beside fp32 masters that the optimizer moves.

    A step's change is often smaller than the spacing of half-precision numbers, and would be lost in them
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1): the optimizer works on the masters, which are
    then rounded into the network.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, half: torch.dtype | None) -> None:
        """``half``: the precision that trained modules are turned to; None leaves them, without masters."""
        self.parameters = named(modules)
        self.masters: Mapping[str, Tensor] = self.parameters
        if half is not None:
            self.masters = {
                name: nn.Parameter(p.detach().float().clone(memory_format=torch.preserve_format))
                for name, p in self.parameters.items()
            }
            for module in modules.values():
                nn.Module.to(module, half)  # diffusers' own warns of layers that have to stay fp32: none
        self.average: Tensors = {}
        self.keeps_gradients = False
        """Whether the network's gradients stay allocated: graphs know them by their addresses."""

    @property
    def names(self) -> dict[int, str]:
        """The name of each master by its id."""
        return {id(master): name for name, master in self.masters.items()}

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer moves other tensors than those that the network computes with."""
        return self.masters is not self.parameters

    def agree(self) -> None:
        """Take the masters of the first process into all of them."""
        take_firsts(list(self.masters.values()))
        self.give()

    def take_gradients(self) -> None:
        """Move the network's gradients to the masters, adding to what is there."""
        if not self.has_masters:
            return
        found = [(self.masters[name], p.grad) for name, p in self.parameters.items() if p.grad is not None]
        new = [torch.empty_like(master, requires_grad=False) for master, _ in found]
        torch._foreach_copy_(new, [gradient for _, gradient in found])
        for (master, _), gradient in zip(found, new, strict=True):
            master.grad = gradient if master.grad is None else master.grad + gradient
        self._drop(self.parameters)

    def reduce_gradients(self) -> None:
        """Average the masters' gradients over processes; without masters DDP does while they are computed."""
        if self.has_masters:
            average_gradients(list(self.masters.values()))

    def keep_gradients(self) -> None:
        """Allocate the network's gradients, to be added to from now on."""
        self.keeps_gradients = True
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def drop_gradients(self) -> None:
        """Forget all gradients."""
        self._drop(self.parameters)
        if self.has_masters:
            for master in self.masters.values():
                master.grad = None

    def _drop(self, parameters: Mapping[str, nn.Parameter]) -> None:
        kept = [p.grad for p in parameters.values() if p.grad is not None]
        if self.keeps_gradients and kept:
            torch._foreach_zero_(kept)
            return
        for parameter in parameters.values():
            parameter.grad = None

    def give(self) -> None:
        """Round the masters into the network."""
        if self.has_masters:
            with torch.no_grad():
                torch._foreach_copy_(list(self.parameters.values()), list(self.masters.values()))

    def start_average(self) -> None:
        """Begin a moving average at the present weights."""
        self.average = {name: master.detach().clone() for name, master in self.masters.items()}

    def update_average(self, decay: float) -> None:
        """Move the average towards the weights by 1 - decay."""
        if self.average:
            with torch.no_grad():
                masters: list[Tensor] = [self.masters[name] for name in self.average]
                torch._foreach_lerp_(list(self.average.values()), masters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block the network holds the average, where there is one."""
        if not self.average:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, average in self.average.items():
            master = self.masters[name]
            kept = master.detach().clone()
            master.copy_(average)  # in place: a compiled graph knows these tensors by their address
            average.copy_(kept)
        self.give()

    def tensors(self) -> Tensors:
        """Everything there is to save: `model.NAME`, and `average.NAME` where there is an average."""
        saved = {f"model.{name}": tensor for name, tensor in self.whole().items()}
        return saved | {f"average.{name}": self._whole(name, tensor) for name, tensor in self.average.items()}

    def whole(self) -> Tensors:
        """The trained weights as they are now, by name, fp32."""
        return {name: self._whole(name, master.detach()) for name, master in self.masters.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave. Raises KeyError or RuntimeError where it does not fit."""
        for name, master in self.masters.items():
            master.copy_(self._share(name, tensors[f"model.{name}"]))
        for name, average in self.average.items():
            average.copy_(self._share(name, tensors[f"average.{name}"]))
        self.give()

    def state_of(self, optimizer: torch.optim.Optimizer) -> tuple[Tensors, list[dict[str, Any]]]:
        """The state of the optimizer that moves the masters: see `optimizers.state_of`."""
        return state_of(optimizer, self.names)

    def restore_state(
        self,
        optimizer: torch.optim.Optimizer,
        tensors: Mapping[str, Tensor],
        groups: Sequence[Mapping[str, Any]],
    ) -> None:
        """Put back what `state_of` gave. Raises ValueError where it does not fit."""
        restore_state(optimizer, self.names, tensors, groups)

    def _whole(self, _name: str, part: Tensor) -> Tensor:
        """A master, or its average, with the parts that other processes have; ZeRO asks by the name."""
        return whole_tensor(part)

    def _share(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a master or its average."""
        return shared_like(whole, self.masters[name])


def named(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by `module.parameter` name."""
    return {
        f"{prefix}.{name}": parameter
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }

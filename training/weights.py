"""The trained weights: what the optimizer moves, what the network computes with, and their moving average."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from controlkit.training.sharding import shared_like, whole_tensor

Tensors = dict[str, Tensor]


class Weights:
    """Trained parameters by name; in half precision, beside fp32 masters that the optimizer moves.

    A step's change is often smaller than the spacing of half-precision numbers, and would be lost in them
    (Micikevicius et al. 2018, arXiv:1710.03740, section 3.1): the optimizer works on the masters, which are
    then rounded into the network.
    """

    def __init__(self, modules: Mapping[str, nn.Module], *, half: torch.dtype | None) -> None:
        """``half``: the precision that trained modules are turned to; None leaves them, without masters."""
        self.parameters = dict(_named(modules))
        self.masters: dict[str, nn.Parameter] = self.parameters
        if half is not None:
            self.masters = {
                name: nn.Parameter(p.detach().float().clone(memory_format=torch.preserve_format))
                for name, p in self.parameters.items()
            }
            for module in modules.values():
                nn.Module.to(module, half)  # diffusers' own warns of layers that have to stay fp32: none
        self.average: Tensors = {}

    @property
    def names(self) -> dict[int, str]:
        """The name of each master by its id."""
        return {id(master): name for name, master in self.masters.items()}

    def take_gradients(self) -> None:
        """Move the network's gradients to the masters, adding to what is there."""
        if self.masters is self.parameters:
            return
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master, gradient = self.masters[name], parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None

    def give(self) -> None:
        """Round the masters into the network."""
        if self.masters is not self.parameters:
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
            self.give()

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
        saved = {f"model.{name}": whole_tensor(master.detach()) for name, master in self.masters.items()}
        return saved | {f"average.{name}": whole_tensor(tensor) for name, tensor in self.average.items()}

    def whole(self) -> Tensors:
        """The trained weights as they are now, by name, fp32."""
        return {name: whole_tensor(master.detach()) for name, master in self.masters.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` gave. Raises KeyError or RuntimeError where it does not fit."""
        for name, master in self.masters.items():
            master.copy_(shared_like(tensors[f"model.{name}"], master))
        for name, average in self.average.items():
            average.copy_(shared_like(tensors[f"average.{name}"], average))
        self.give()


def _named(modules: Mapping[str, nn.Module]) -> Iterable[tuple[str, nn.Parameter]]:
    """Trained parameters by `module.parameter` name."""
    for prefix, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield f"{prefix}.{name}", parameter

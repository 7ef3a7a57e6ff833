"""Where a training runs: its device, its processes and its precision, through accelerate."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.devices import check_device
from controlkit.processes import Processes
from controlkit.training import sharding
from controlkit.training.config_base import Recipe

_PATIENCE = timedelta(hours=6)  # for the others, where one process reads or encodes longer
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Machine:
    """The device of this process, and the other processes of the same run."""

    def __init__(self, recipe: Recipe) -> None:
        """Join the run. Raises ValueError for a device that is not there, or fp16 without a GPU."""
        self.recipe, self.processes = recipe, Processes(patience=_PATIENCE)
        device = torch.device(self.processes.device if self.processes.count > 1 else device_name(recipe))
        self.device = device
        self.sharded = sharding.is_wanted() and self.processes.count > 1
        check_precision(recipe, device)

    @property
    def dtype(self) -> torch.dtype:
        """The precision that networks compute in."""
        return DTYPES[self.recipe.precision]

    @cached_property
    def accelerator(self) -> Any:
        """accelerate's Accelerator: made when it is first needed, one for the process."""
        from accelerate import Accelerator
        from accelerate.utils import GradScalerKwargs, InitProcessGroupKwargs

        return Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="fp16" if self.recipe.precision == "fp16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE), GradScalerKwargs()],
            device_placement=False,
        )

    def shared(self, module: nn.Module) -> nn.Module:
        """The module as the run trains it: with several processes, one whose gradients they average."""
        if self.sharded:
            sharding.shard(module, self.device, count=self.processes.count, dtype=self.dtype)
            return module
        if self.processes.count == 1 and self.recipe.precision != "fp16":
            return module
        return self.accelerator.prepare_model(module, device_placement=False)

    def autocast(self) -> AbstractContextManager[Any]:
        """The forward pass's precision where weights keep fp32; bf16's weights are cast once instead."""
        if self.recipe.precision != "fp16":
            return contextlib.nullcontext()
        return self.accelerator.autocast()

    def quiet(self, module: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
        """Within the block gradients stay with this process, except in the last micro-batch of a step."""
        if last or self.processes.count == 1 or self.sharded:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """The loss's gradient, scaled up where fp16 would lose it."""
        if self.recipe.precision == "fp16":
            self.accelerator.backward(loss)
        else:
            loss.backward()

    @property
    def scaler(self) -> Any:
        """fp16's gradient scaler, or None."""
        return self.accelerator.scaler if self.recipe.precision == "fp16" else None


def device_name(recipe: Recipe) -> str:
    """The recipe's device, "auto" resolved. Raises ValueError where it is unknown or absent."""
    if recipe.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return str(check_device(recipe.device))
    except ValueError as error:
        raise ValueError(f"{error} (device=cpu)") from error


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError for a precision that the device does not train in."""
    if recipe.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"precision fp16 needs a CUDA device, and this run is on {device.type}:"
            " use precision=bf16 or precision=fp32"
        )

"""Where a training runs: its device, its processes and its precision, through accelerate."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from controlkit import precisions
from controlkit.devices import check_device, gpu_or_cpu
from controlkit.processes import Processes
from controlkit.training import sharding, zero_config
from controlkit.training.config_base import Recipe

_PATIENCE = timedelta(hours=6)  # for the others, where one process reads or encodes longer
DTYPES: dict[str, torch.dtype] = {short: getattr(torch, name) for short, name in precisions.DTYPES.items()}


class Machine:
    """The device of this process, and the other processes of the same run."""

    def __init__(self, recipe: Recipe) -> None:
        """Join the run.

        Raises ValueError for a device that is not there, fp16 without a GPU, and a configuration of DeepSpeed
        that does not go with the recipe.
        """
        if zero_config.is_wanted():
            zero_config.check_package()
        self.recipe, self.processes = recipe, Processes(patience=_PATIENCE)
        device = torch.device(self.processes.device if self.processes.count > 1 else device_name(recipe))
        self.device = device
        self.fsdp = sharding.is_wanted() and self.processes.count > 1
        self.zero: dict[str, Any] | None = None
        """DeepSpeed's configuration, where it trains."""
        self.engine: Any = None
        """DeepSpeed's engine, once there is one."""
        check_precision(recipe, device)
        if zero_config.is_wanted():
            self.zero = zero_config.read(recipe, processes=self.processes.count)

    @property
    def sharded(self) -> bool:
        """Whether processes share the weights: then all of them have to take part in whatever uses them."""
        return self.fsdp or self.zero is not None

    @property
    def dtype(self) -> torch.dtype:
        """The precision that networks compute in."""
        return DTYPES[self.recipe.precision]

    @property
    def weights_dtype(self) -> torch.dtype:
        """The precision of networks' weights: fp32 where `fully_shard` casts them as they come together."""
        return torch.float32 if self.fsdp else self.dtype

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
        if self.fsdp:
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
        if self.engine is not None:
            self.engine.set_gradient_accumulation_boundary(last)
        if last or not isinstance(module, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.accelerator.no_sync(module)

    def backward(self, loss: Tensor) -> None:
        """The loss's gradient, scaled up where fp16 would lose it."""
        if self.engine is not None:
            self.engine.backward(loss, scale_wrt_gas=False)  # the loss is its part of the step's mean
        elif self.recipe.precision == "fp16":
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
        return gpu_or_cpu()
    try:
        return str(check_device(recipe.device))
    except ValueError as error:
        raise ValueError(f"{error} (device=cpu)") from error


def remarks(recipe: Recipe, device: torch.device) -> list[str]:
    """What is to be said of a recipe's settings on a device, before a training."""
    if recipe.precision != "bf16" or device.type != "cuda":
        return []
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return []
    name = torch.cuda.get_device_name(device)
    return [f"{name} computes bf16 by emulation, which is slow: precision=fp16 is what it has"]


def check_precision(recipe: Recipe, device: torch.device) -> None:
    """Raise ValueError for a precision that the device does not train in."""
    if recipe.precision == "fp16" and device.type != "cuda":
        raise ValueError(
            f"precision fp16 needs a CUDA device, and this run is on {device.type}:"
            " use precision=bf16 or precision=fp32"
        )

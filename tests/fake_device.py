"""A device that is not there: what runs on it has shapes, places and precisions, but no numbers.

Tensors of the device and of the CPU may not meet, as on a real one. Numbers that the host reads from a tensor
are made up, and where they were read is counted. One thing needs a real device, the backward pass of CUDA
tensors; so `DEVICES` has "meta" as well, which to this mode is a device like any other, and has one.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._functorch.config as functorch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from controlkit.training.loop import Run
from controlkit.training.optimizers import make_optimizer
from controlkit.training.stepping import can_read_late

DEVICES = ("cuda", "meta")
_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.item")


class Reads(TorchDispatchMode):
    """Answers what the host reads with made-up numbers; counts it by the device that it was read from.

    Copies for which the host waits are counted as "copies".
    """

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.moved = 0  # copies between devices, for which the host waits or not

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if name == "aten._pin_memory":
            return args[0]
        if name not in _READS:
            result = func(*args, **(kwargs or {}))
            if name == "aten._to_copy" and result.device != args[0].device:
                self._moved(waits=not kwargs.get("non_blocking", False))
            if name == "aten.copy_" and result.device != args[1].device:
                self._moved(waits=not any(args[2:]))
            return result
        self.count[args[0].device.type] += 1
        return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1

    def _moved(self, *, waits: bool) -> None:
        self.moved += 1
        self.count["copies"] += waits


@contextmanager
def fake_device(device: str) -> Iterator[Reads]:
    """Within the block tensors may be put on the device."""
    with (
        functorch.patch(fake_tensor_allow_meta=device == "meta"),
        FakeTensorMode(allow_non_fake_inputs=True),
        Reads() as reads,
    ):
        yield reads


def move(run: Run, device: str) -> None:
    """Put a run of a ControlNet, opened on the CPU, on the device, as if it had been opened there."""
    task, weights = run.task, run.weights
    own = weights.masters is weights.parameters
    names = {id(p): name for name, p in weights.parameters.items()}
    groups = [(g, [names[id(p)] for p in g["params"]]) for g in task.parameter_groups()]
    base = task.base
    for module in (task.controlnet, base.unet, base.vae, *base.text_encoders):
        module.to(device)
    run.machine.device = torch.device(device)
    task.alphas_cumprod = task.alphas_cumprod.to(device)
    for holder in (task, task.shown, task.encoded):
        object.__setattr__(holder.base, "device", torch.device(device))
    if task.resident is not None:
        task.resident.to(run.machine.device)
    weights.parameters = {
        f"{prefix}.{name}": p
        for prefix, module in task.modules().items()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    masters = {name: nn.Parameter(p.to(device)) for name, p in weights.masters.items()}
    weights.masters = weights.parameters if own else masters
    weights.average = {name: tensor.to(device) for name, tensor in weights.average.items()}
    if device != "meta":  # where torch has no fused optimizer
        tables = [{**group, "params": [weights.masters[name] for name in of]} for group, of in groups]
        run.optimizer = make_optimizer(run.recipe, tables)
        run.reads_late = can_read_late(run)

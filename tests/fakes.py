"""Networks of tensors without content, to count what they would compute and to see where it would lie."""

from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def faked(network: ModuleT, device: str = "cpu") -> ModuleT:
    """The network itself with empty tensors on a device, within a FakeTensorMode."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return network

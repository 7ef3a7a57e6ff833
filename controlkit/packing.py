"""Convolutions on a processor with their weights in oneDNN's own order: the same bits, sooner.

PyTorch keeps a weight as it was loaded, and has oneDNN bring it into the order that its kernels read at every
call. Where a picture is small and the weight large, which are a U-Net's deep layers, that takes as long as
the convolution. Within `packed` it is done once, at a layer's first call, and the result is kept beside the
weight: at Stable Diffusion 1.5's size 1.83 GB for the U-Net. `tests/benchmarks/packing.py` compares both.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from controlkit.free_memory import available_memory

MOST_POSITIONS = 1024  # rows x height x width of a layer that is worth it; beyond, computing takes long
NOT_ONEDNN = 20480  # numbers of a single row, up to which PyTorch uses its own code (Convolution.cpp)
LEAST_STEPS = 12  # of a generation: what packing takes at first is had back after six
LEAST_BYTES = 8 * 2**20  # of a weight: smaller ones are in order as fast as packed ones are allocated
SHARE = 0.25  # of the free memory that packed weights may take
_PLATFORMS = ("x86_64", "AMD64")  # where bits were compared


@contextmanager
def packed(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the networks' deep convolutions keep their weights packed, where that can be done.

    It is left out off x86, in float16, in bfloat16 where oneDNN does not compute in it, and where memory is
    short. A call that builds a graph, is watched operator by operator (as to count them), or runs under
    autocast is made as usual. The weights must stay as they are within the block; threads may share networks.
    Blocks may be nested, as generations are: what the outer one packed serves in the inner one, and after it.
    """
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    layers = [layer for layer in layers if _is_served(layer)]
    if not layers or not _can_be_kept(layers):
        yield
        return
    for layer in layers:
        layer._conv_forward = _Packed(layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_conv_forward", None)


def _is_served(layer: nn.Conv2d) -> bool:
    """Whether a layer's packed weight is worth it, and gives the bits of its plain one.

    With 1x1 kernels it does not: PyTorch computes these otherwise.
    """
    return (
        type(layer) is nn.Conv2d
        and "_conv_forward" not in vars(layer)  # of an outer block
        and max(layer.kernel_size) > 1
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
        and layer.weight.device.type == "cpu"
        and _is_onednns(layer.weight.dtype)
        and layer.weight.nbytes >= LEAST_BYTES
    )


def _is_onednns(dtype: torch.dtype) -> bool:
    """Whether PyTorch gives convolutions of a type to oneDNN on this processor (Convolution.cpp)."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _can_be_kept(layers: Sequence[nn.Conv2d]) -> bool:
    onednn = torch.backends.mkldnn
    if not (onednn.is_available() and onednn.enabled and platform.machine() in _PLATFORMS):
        return False
    free = available_memory("cpu")
    return free is not None and sum(layer.weight.nbytes for layer in layers) <= SHARE * free


class _Packed:
    """`nn.Conv2d._conv_forward` of one layer, with its weight packed at the first call."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.layer = layer
        self.weight: Tensor | None = None
        self.geometry: tuple[Any, ...] = (layer.padding, layer.stride, layer.dilation, layer.groups)

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _is_plain(input, weight):
            return nn.Conv2d._conv_forward(self.layer, input, weight, bias)
        if self.weight is None:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, input.shape)
        convolve = torch.ops.mkldnn._convolution_pointwise
        return convolve(input, self.weight, bias, *self.geometry, "none", [], "")


def _is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether a call is one that the packed weight makes faster, and that oneDNN makes for PyTorch, too."""
    rows, _, height, width = input.shape
    return (
        rows * height * width <= MOST_POSITIONS
        and (rows > 1 or input.numel() > NOT_ONEDNN)
        and input.dtype == weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and type(input) is Tensor
        and input.is_contiguous(memory_format=torch.channels_last)
        and _get_current_dispatch_mode() is None
    )

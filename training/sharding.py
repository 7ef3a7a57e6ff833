"""Fully sharded training: every process keeps a share of each weight, its gradient and its optimizer state.

Started by `accelerate launch` with a configuration whose `distributed_type` is FSDP; the sharding itself is
torch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277). A block's weights are brought together for as long
as it computes, so that networks that do not fit on one device train on several.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def is_wanted() -> bool:
    """Whether the launcher asks for it."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"


def shard(whole: nn.Module, device: torch.device, *, count: int, dtype: torch.dtype) -> None:
    """Share a module's weights among ``count`` processes; it computes in ``dtype``, weights stay fp32."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (count,))
    half = None if dtype == torch.float32 else dtype
    policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
    for unit in _units(whole):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(whole, mesh=mesh, mp_policy=policy)


def _units(whole: nn.Module) -> Iterator[nn.Module]:
    """What is called as a whole in a forward pass: blocks, and the layers that stand between them."""
    for network in whole.children():
        for part in network.children():
            parts = part.children() if isinstance(part, nn.ModuleList) else [part]
            yield from (unit for unit in parts if next(unit.parameters(), None) is not None)


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all of its shares, on every process; all of them have to ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def shared_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's share of a whole tensor, if ``like`` is one; the tensor itself otherwise."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements)

"""What processes tell each other of weights that each of them has whole, with masters beside the network.

DDP averages the gradients that a backward pass leaves in the network, of a step's last micro-batch alone
where the others were taken to the masters before. So there the network is left to each process, and what the
masters have summed up is averaged, in fp32, once in a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed

BUCKET = 64 * 2**20
"""Bytes that are sent at once."""


@torch.no_grad()
def take_firsts(tensors: Sequence[Tensor]) -> None:
    """Give every process the first one's values."""
    for tensor in tensors:
        value = tensor.detach().contiguous()
        distributed.broadcast(value, 0)
        tensor.copy_(value)


@torch.no_grad()
def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Put the mean over all processes in place of each gradient; one that a process lacks is zero there.

    What has no gradient in any of them is left without.
    """
    there = torch.tensor([tensor.grad is not None for tensor in tensors], device=tensors[0].device).int()
    distributed.all_reduce(there, op=distributed.ReduceOp.MAX)
    gradients = []
    for tensor, is_there in zip(tensors, there.tolist(), strict=True):
        if is_there:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            gradients.append(tensor.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(distributed.get_world_size())
        distributed.all_reduce(flat)
        means = flat.split([gradient.numel() for gradient in bucket])
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean.view(gradient.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The same, in their order, in groups of about `BUCKET` bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        bucket.append(tensor)
        if sum(one.nbytes for one in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket

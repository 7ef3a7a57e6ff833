"""Work that is recorded once and then done again at will: CUDA graphs.

A step of a diffusion model is some thousand small kernels; at small batches the host takes longer to start
them than a GPU to run them. A CUDA graph is started as a whole. It reads its inputs and writes its results at
fixed addresses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_WARM_UPS = 3  # as torch's documentation of whole-network capture has it
Work = Callable[[], Tensor]


class Recorder(Protocol):
    """What records work, to be done again at will."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """What does the work again, and where its result then lies. Raises RuntimeError if it cannot."""


class CudaRecorder:
    """CUDA graphs, by the pattern of torch.cuda.graph's documentation; all share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Warm up on a stream of its own, then capture. Nothing in the work may wait for the device."""
        with torch.cuda.device(self._device):  # streams are made on the current one
            return self._record(work)

    def _record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads, which read data and write checkpoints, may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        self._pool = graph.pool()
        return graph.replay, result


def apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far the first of each pair is from the second, as a share of it (root mean square over all)."""
    off = sum((one.float() - other.float()).square().sum() for one, other in pairs)
    size = sum(other.float().square().sum() for _, other in pairs)
    return math.sqrt(float(off) / max(float(size), 1e-30))

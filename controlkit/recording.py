"""Work that is recorded once and then done again at will: CUDA graphs.

A step of a diffusion model is some thousand small kernels; at small batches the host takes longer to start
them than a GPU to run them. A CUDA graph is started as a whole. It reads its inputs and writes its results at
fixed addresses.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from controlkit.notices import reason

_WARM_UPS = 3  # as torch's documentation of whole-network capture has it
Work = Callable[[], Tensor]
_capturing = threading.Lock()  # of a process's threads one may capture at a time


class Recorder(Protocol):
    """What records work, to be done again at will."""

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """What does the work again, and where its result then lies. Raises RuntimeError if it cannot."""


class CudaRecorder:
    """CUDA graphs, by the pattern of torch.cuda.graph's documentation; all share one pool of memory and one
    stream, for each stream takes memory for cuBLAS that it keeps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None

    def record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Warm up on the stream, then capture. Nothing in the work may wait for the device."""
        with _capturing, torch.cuda.device(self._device):  # streams are made on the current one
            return self._record(work)

    def _record(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        here, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream = stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(here)
        try:
            with torch.cuda.stream(stream):  # left also where a capture fails, as torch 2.11's own is not
                for _ in range(_WARM_UPS):
                    work()
                # Other threads, which read data and write checkpoints, may go on using the device.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
                    result = work()
        finally:
            here.wait_stream(stream)  # what failed may still be writing to memory that is free from now on
        self._pool = graph.pool()
        return graph.replay, result


def fault(error: RuntimeError) -> str:
    """What went wrong first, in a line: ending a capture that failed fails, too, and says no more than so."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return reason(error)


def apart(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """How far the first of each pair is from the second, as a share of it (root mean square over all)."""
    off = sum((one.float() - other.float()).square().sum() for one, other in pairs)
    size = sum(other.float().square().sum() for _, other in pairs)
    return math.sqrt(float(off) / max(float(size), 1e-30))

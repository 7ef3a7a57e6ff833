"""The memory of devices: putting tensors there, what is free, what was used at most, whether it is full."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from controlkit import notices

_PEAKS: dict[torch.device, int] = {}  # in bytes, before what `uncounted` passed over


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory is full, or may say so: less at once is worth a try."""
    no_workspace = isinstance(error, RuntimeError) and "CUDNN_STATUS_NOT_SUPPORTED" in str(error)
    return no_workspace or notices.is_out_of_memory(error)  # cuDNN: no algorithm has what it needs


def put(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. The host does not wait for a GPU: it copies from memory that stays in place."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def free_memory() -> None:
    """Give back what is not in use."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def uncounted(device: torch.device) -> Iterator[None]:
    """Within the block memory is used that does not count for `peak_mb`, where a device counts it."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.max_memory_allocated(device)
    try:
        yield
    finally:
        torch.cuda.reset_peak_memory_stats(device)
        _PEAKS[device] = max(before, _PEAKS.get(device, 0))


def peak_mb(device: torch.device) -> float:
    """The most memory in use so far, in megabytes (10^6 bytes): on CUDA of tensors, else of the process."""
    if device.type == "cuda":
        return round(max(torch.cuda.max_memory_allocated(device), _PEAKS.get(device, 0)) / 1e6, 1)
    if sys.platform == "linux":  # where getrusage counts what the parent held when it started us, too
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return round(most * unit / 1e6, 1)

"""How much memory there is, and how much of it this process holds."""

from __future__ import annotations

from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")


def available_memory(device: str) -> int | None:
    """Bytes that are free on a device; None where that cannot be known."""
    kind = torch.device(device).type
    if kind == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if kind == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return _free_ram() if kind == "cpu" else None


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not say."""
    try:
        return _field(Path("/proc/self/status"), "VmRSS")
    except OSError:
        return None


def _free_ram() -> int | None:
    try:
        free = _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return None
    try:  # a container may be allowed less than the machine has
        allowed = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if not allowed.isdigit() or free is None else min(free, max(int(allowed) - used, 0))


def _field(path: Path, name: str) -> int | None:
    """A number of kB in one of Linux's tables, in bytes."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None

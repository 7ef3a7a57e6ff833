"""Devices that networks run on, by torch's names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def check_device(device: str | torch.device) -> torch.device:
    """The device, if torch can use it here. Raises ValueError in one line if not."""
    import torch

    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:0 or mps") from error
    missing_cuda = found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count()
    if missing_cuda or (found.type == "mps" and not torch.backends.mps.is_available()):
        raise ValueError(f"device {str(device)!r} is not available here: use cpu")
    return found

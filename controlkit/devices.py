"""Devices that networks run on, by torch's names, and the precision that is usual there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from controlkit.families import BUNDLED
from controlkit.precisions import torch_name

if TYPE_CHECKING:
    import torch


def pick_device(name: str, dtype: str | None, *, base: str) -> tuple[str, torch.dtype]:
    """The device and precision to use with a base.

    name: "auto" (a CUDA GPU if there is one, else the CPU) or a torch device. dtype: one of
    `precisions.DTYPES`, or torch's name; None is float32 on the CPU and for bundled models, else float16.
    Raises ValueError for another precision.
    """
    import torch

    if name == "auto":
        name = gpu_or_cpu()
    return name, getattr(torch, torch_name(dtype or usual_dtype(name, base=base)))


def gpu_or_cpu() -> str:
    """The device where nobody chose one: a CUDA GPU if there is one, else the CPU, whose results repeat."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def usual_dtype(device: str, *, base: str) -> str:
    """torch's name of the precision of a base's networks on a device where nobody chose one."""
    return "float32" if device == "cpu" or base in BUNDLED else "float16"


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply matrices in bfloat16 (AMX)."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)  # not in every version
    return ask is not None and bool(ask().get("amx_bf16", False))


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The precision, also by its name in `precisions.DTYPES` or torch's. Raises ValueError for another."""
    import torch

    if isinstance(dtype, str):
        found: torch.dtype = getattr(torch, torch_name(dtype))
        return found
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
        return dtype
    raise ValueError(f"dtype is a precision, as torch.float16 or fp16, not {dtype!r}")


def check_device(device: str | torch.device) -> torch.device:
    """The device, if torch can use it here; "auto" is the best here. Raises ValueError in one line if not."""
    import torch

    if device == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:  # the latter of what is neither a name nor a number
        raise ValueError(f"unknown device {device!r}: use cpu, cuda, cuda:0 or mps") from error
    available = {
        "cpu": True,
        "cuda": (found.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
        "xpu": torch.xpu.is_available(),
    }
    if not available.get(found.type, False):  # torch knows more types than it can compute on
        raise ValueError(f"device {str(device)!r} is not available here: use cpu")
    return found

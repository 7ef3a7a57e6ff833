"""The precisions that networks compute and are stored in, by name. Needs no torch."""

from __future__ import annotations

from controlkit import naming

DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""torch's names by those of the command line."""


def torch_name(dtype: str) -> str:
    """torch's name of a precision, of either name. Raises ValueError for an unknown one."""
    if dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise naming.unknown("precision", dtype, DTYPES)
    return DTYPES[dtype]

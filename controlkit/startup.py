"""Starting quickly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Within the block Python's garbage collector rests.

    Importing the model libraries makes some million objects that stay, and looking through them again and
    again is a tenth of the time that it takes (tests/benchmarks/cold.py).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

"""Starting quickly."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Within the block Python's garbage collector rests.

    Importing the model libraries makes very many objects that stay, and it would look through them again and
    again: with it `tests/benchmarks/cold.py` gave 0.99, without 1.04.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()

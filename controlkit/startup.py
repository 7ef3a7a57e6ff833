"""What a command does before anything heavy is imported: starting quickly, and waiting with manners."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

WAITS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what a user may have said about it
TURNS = 10_000  # of the library's own 300,000: tests/benchmarks/busy.py shows what they cost


def wait_briefly() -> None:
    """PyTorch's threads (GNU OpenMP) soon let go of a core while they wait, unless the environment says else.

    On a machine that other programs use they would turn in circles for those that have no core to run on.
    Results are the same to the bit. The library reads this when it is loaded: call it before importing torch.
    """
    if not any(name in os.environ for name in WAITS):
        os.environ["GOMP_SPINCOUNT"] = str(TURNS)


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

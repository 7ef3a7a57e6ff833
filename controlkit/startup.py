"""How a command's process begins and ends: quickly, and waiting with manners in between."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
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
    """Within the block, which begins by importing the model libraries, Python's garbage collector rests.

    Loading makes very many objects that stay, and it would look through them again and again.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        _import_libraries()
        yield
    finally:
        if was_on:
            gc.enable()


@functools.cache
def _import_libraries() -> None:
    """Import what generations run, and leave it out of all later collections: it is much, and it stays."""
    import diffusers
    import transformers

    for name in ("AutoencoderKL", "ControlNetModel", "DDIMScheduler", "UNet2DConditionModel"):
        getattr(diffusers, name)  # imported when it is asked for
    for name in ("CLIPTextModel", "CLIPTokenizer"):
        getattr(transformers, name)
    gc.freeze()


def fill_closed_streams() -> None:
    """Open the null device in place of each standard stream that was closed (`2>&-`): a file of ours would
    get its number, and what a library prints would be written into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one


def run_to_the_end(command: Callable[[], None]) -> None:
    """Run a command, which raises SystemExit, and end the process without taking apart what it holds.

    What is registered for the end from here on is done, and what was written is flushed. mypy ends the same
    way; `tests/benchmarks/cold.py` shows what it saves.
    """
    codes: list[int] = []

    def leave() -> None:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # Python says so, and chooses the status
        if codes:
            os._exit(codes[0] & 0xFF)

    atexit.register(leave)  # as the first one, which is called last
    try:
        command()
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):  # else Python prints it
            codes.append(ended.code or 0)
        raise

"""A picture on a machine that another program uses: how PyTorch's threads wait for each other there.

`uv run python tests/benchmarks/busy.py` runs `controlkit generate` with the bundled base as it comes, and
with GNU OpenMP's waiting as that library comes (GOMP_SPINCOUNT=300000), each as a process of its own, in
turns: first alone, then beside processes that keep half of the cores busy. The pictures must be the same to
the byte. Reported are seconds of the clock, imports included, and the median of the paired ratios. For Linux
on two cores or more.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from controlkit.startup import WAITS

THEIRS = {"GOMP_SPINCOUNT": "300000"}
BUSY = "while True: pass"


def seconds(output: Path, steps: int, **environment: str) -> float:
    """Make a picture by the command, and return how long that took."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITS, "OMP_NUM_THREADS")}
    command = [sys.executable, "-m", "controlkit", "generate", "a red figure on a white floor"]
    began = time.perf_counter()
    subprocess.run(
        [*command, "--steps", str(steps), "--seed", "1", "-o", str(output)],
        env={**clean, "HF_HUB_OFFLINE": "1", **environment},
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - began


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within the block as many processes as said each keep a core busy."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "picture.png")
        seconds(output, asked.steps)  # fills the system's file cache
        expected = output.read_bytes()
        for processes in (0, (os.cpu_count() or 2) // 2):
            ratios = []
            with busy(processes):
                for _ in range(asked.rounds):
                    ours, theirs = seconds(output, asked.steps), seconds(output, asked.steps, **THEIRS)
                    assert output.read_bytes() == expected, "the pictures differ"
                    ratios.append(theirs / ours)
                    print(f"{processes} busy: ours {ours:.1f} s, else {theirs:.1f} s", flush=True)
            print(f"{processes} busy: {statistics.median(ratios):.2f} times as fast (median)")


if __name__ == "__main__":
    main()

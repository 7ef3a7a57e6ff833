"""How long the bundled world takes to render, on one core: `uv run python tests/benchmarks/figures.py`."""

import statistics
import time

from controlkit.figures import render


def main(count: int = 60) -> None:
    """Print the median and the range of the CPU milliseconds per scene, at two sizes."""
    for size in (128, 512):
        times = []
        for seed in range(count):
            start = time.process_time()
            render(seed, size=size)
            times.append(1e3 * (time.process_time() - start))
        print(
            f"{size}x{size}: median {statistics.median(times):.1f} ms,"
            f" {min(times):.1f} to {max(times):.1f}, {count} scenes"
        )


if __name__ == "__main__":
    main()

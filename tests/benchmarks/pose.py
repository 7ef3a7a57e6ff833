"""Reading people off OpenPose's network output: ours beside controlnet_aux's, in one run.

`uv run python tests/benchmarks/pose.py` takes about five minutes and prints a Markdown table. The network is
left out: both get the same heatmaps and fields of made-up people, and the people that they find are compared
first. CPU time on one thread. The last line sets controlnet_aux beside itself: by so much a ratio can be off.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from pairs import Ratio, compare

from controlkit.preprocessors.annotators import import_annotator
from controlkit.preprocessors.limbs import decode_people, grid_of

sys.path.insert(0, str(Path(__file__).parents[1]))
networks: Any = __import__("pose_networks")  # stands beside the tests

SIZES = (512, 1024, 2048)
PEOPLE = (1, 2, 4)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Pose decoding beside controlnet_aux.")
    parser.add_argument("--rounds", type=int, default=7, help="pairs per line (default 7)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides of the pictures in pixels")
    given = parser.parse_args()
    print_table(given.sizes, given.rounds)


def print_table(sizes: Sequence[int], rounds: int) -> None:
    """Print a row for each size and number of people, and one of controlnet_aux beside itself."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    body = networks.fixed_body(import_annotator("open_pose"))
    print("| pixels | people | controlnet_aux | ours | ratio (quartiles) |")
    print("|---|---|---|---|---|")
    for side in sizes:
        for people in PEOPLE:
            print(f"| {side} x {side} | {people} | {measured(body, side, people, rounds)} |", flush=True)
    side = sizes[0]
    picture, _ = prepared(body, side, 1)
    twice = compare(lambda: body(picture), lambda: body(picture), rounds=rounds, clock=time.process_time)
    print(f"| {side} x {side} | 1, controlnet_aux twice | {twice} |")


def prepared(body: Any, side: int, people: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return an empty picture of `side` pixels and what both are told a network saw in it."""
    rng = np.random.default_rng(people)
    body.says = networks.network_output(rng, *grid_of(side, side).cells, people, noise=0.005, hidden=0)
    return np.zeros((side, side, 3), np.uint8), body.says


def measured(body: Any, side: int, people: int, rounds: int) -> Ratio:
    """Compare the people that both find, then the time."""
    picture, output = prepared(body, side, people)
    expected = networks.bodies_of(body, *body(picture))
    found = decode_people(*output, grid_of(side, side))
    if found.shape != expected.shape or (found[..., :2] != expected[..., :2]).any() or len(found) != people:
        raise SystemExit(f"{side} pixels, {people} people: ours and controlnet_aux's differ")
    return compare(
        lambda: body(picture),
        lambda: decode_people(*output, grid_of(side, side)),
        rounds=rounds,
        clock=time.process_time,
    )


if __name__ == "__main__":
    main()

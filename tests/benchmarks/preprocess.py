"""Maps made by ControlKit beside controlnet-aux and plain OpenCV, in one run, outputs compared first.

`uv run python tests/benchmarks/preprocess.py` takes about twenty minutes on two cores; `--quick` three.
Pictures are made of the photographs that scikit-image ships. Single calls: CPU time on one thread, then wall
time with as many threads of OpenCV's as there are cores. A folder: wall time from JPEG files to PNG files,
with a thread on each core. Last, people are read off OpenPose's network output, as in pose.py.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pose
from pairs import Clock, Ratio, compare
from PIL import Image
from skimage import data

from controlkit import folder_job
from controlkit.images import load_picture
from controlkit.preprocessors import annotators, get

PHOTOGRAPHS = ("astronaut", "coffee", "cat", "rocket", "immunohistochemistry", "retina")
SIZES = (512, 1024, 2048)


class Silent:
    """A report that is not shown."""

    def status(self, text: str) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """A skipped picture would falsify the comparison."""
        raise AssertionError(text)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Drop it."""


def photographs(size: int, count: int) -> Iterator[np.ndarray]:
    """Yield `count` different pictures, uint8 (size, size, 3), with the detail of photographs at any size.

    Up to 512 pixels a part of a photograph; beyond, parts of 512 side by side: enlarged, they would have no
    edges.
    """
    rng = np.random.default_rng(size)
    sources = [load_picture(getattr(data, name)()) for name in PHOTOGRAPHS]
    for index in range(count):
        across = max(1, size // 512)
        parts = [_part(sources[(index + k) % len(sources)], size // across, rng) for k in range(across**2)]
        rows = [np.concatenate(parts[k : k + across], axis=1) for k in range(0, across**2, across)]
        yield np.concatenate(rows)


def _part(source: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    height, width = source.shape[:2]
    side = int(rng.uniform(0.6, 1.0) * min(height, width))
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    part = source[top : top + side, left : left + side][:, :: rng.choice([1, -1])]
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)


def aux_canny() -> Callable[..., object]:
    """Return controlnet-aux's detector; importing all of controlnet-aux would take seconds more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return annotators.import_annotator("canny").CannyDetector()


def one_picture(size: int, rounds: int, clock: Clock) -> Iterator[tuple[str, Ratio]]:
    """Compare calls on six photographs, one after the other."""
    pictures = list(photographs(size, len(PHOTOGRAPHS)))
    ours, detector = get("canny"), aux_canny()

    def opencv() -> None:
        for picture in pictures:
            cv2.Canny(picture, 100, 200)

    def aux() -> None:
        for picture in pictures:
            detector(picture, detect_resolution=size, image_resolution=size, output_type="np")

    def controlkit() -> None:
        for picture in pictures:
            ours(picture)

    for picture in pictures:
        made = ours(picture).image
        assert np.array_equal(made[..., 0], cv2.Canny(picture, 100, 200))
        theirs = detector(picture, detect_resolution=size, image_resolution=size, output_type="np")
        assert np.array_equal(made, theirs)
    yield "cv2.Canny on RGB", compare(opencv, controlkit, rounds=rounds, clock=clock)
    yield "controlnet-aux", compare(aux, controlkit, rounds=rounds, clock=clock)
    yield "cv2.Canny beside itself", compare(opencv, lambda: opencv(), rounds=rounds, clock=clock)


def folder(size: int, count: int, rounds: int) -> Ratio:
    """Compare folders of photographs made into folders of maps; every pixel of every map is compared."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        (root / "photos").mkdir()
        for index, picture in enumerate(photographs(size, count)):
            Image.fromarray(picture).save(root / "photos" / f"{index:04d}.jpg", quality=92)
        sources = sorted((root / "photos").iterdir())
        detector = aux_canny()
        (root / "aux").mkdir()

        def aux() -> None:
            for source in sources:
                edges = detector(Image.open(source), detect_resolution=size, image_resolution=size)
                edges.save(root / "aux" / f"{source.stem}.png")

        def ours() -> None:
            job = folder_job.plan(
                ["canny"], [str(root / "photos")], {}, output=str(root / "ours"), overwrite=True
            )
            assert folder_job.run(job, Silent()).made == count

        aux()
        ours()
        for source in sources:
            name = f"{source.stem}.png"
            theirs = np.asarray(Image.open(root / "aux" / name))
            assert np.array_equal(theirs, np.asarray(Image.open(root / "ours" / "canny" / name))), name
        return compare(aux, ours, rounds=rounds)


def print_calls(sizes: Sequence[int], rounds: int) -> None:
    """Print the table of single calls."""
    cores = len(os.sched_getaffinity(0))
    print(
        "| canny, six photographs | threads | size | peer | ControlKit | ratio |\n|---|---|---|---|---|---|"
    )
    before = cv2.getNumThreads()
    for threads, clock in ((1, time.process_time), (cores, time.perf_counter)):
        cv2.setNumThreads(threads)
        for size in sizes:
            for name, ratio in one_picture(size, rounds, clock):
                print(f"| {name} | {threads} | {size} | {ratio} |", flush=True)
    cv2.setNumThreads(before)


def print_folders(sizes: Sequence[int], count: int) -> None:
    """Print the table of folders."""
    print(f"\n| {count} JPEGs to PNG maps | size | peer | ControlKit | ratio |\n|---|---|---|---|---|")
    for size in sizes:
        print(f"| canny: controlnet-aux and Pillow | {size} | {folder(size, count, 3)} |", flush=True)


def print_poses(sizes: Sequence[int], rounds: int) -> None:
    """Print the table of poses."""
    print("\nReading people off OpenPose's network output:\n")
    pose.print_table(sizes, rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller folders, not at 2048")
    parser.add_argument("--only", choices=("calls", "folders", "poses"), help="one table")
    given = parser.parse_args()
    sizes = SIZES[:2] if given.quick else SIZES
    print(f"Medians over paired rounds, ratios with quartiles; {len(os.sched_getaffinity(0))} cores.\n")
    if given.only in (None, "calls"):
        print_calls(sizes, 5 if given.quick else 15)
    if given.only in (None, "folders"):
        print_folders(sizes, 40 if given.quick else 200)
    if given.only in (None, "poses"):
        print_poses(sizes, 3 if given.quick else 5)


if __name__ == "__main__":
    main()

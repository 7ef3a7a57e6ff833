"""Maps made by ControlKit beside controlnet-aux and plain OpenCV, in one run, outputs compared first.

`uv run python tests/benchmarks/preprocess.py` takes about a quarter of an hour on two cores; `--quick` three
minutes. Pictures are parts of the photographs that scikit-image ships. One picture: CPU time on one thread. A
folder: wall time from JPEG files to PNG files, with as many threads as there are cores. Last, reading people off
OpenPose's network output, as in pose.py.
"""

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from pairs import Ratio, compare
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
    """Yield `count` different square parts of photographs, uint8 (size, size, 3)."""
    rng = np.random.default_rng(size)
    sources = [load_picture(getattr(data, name)()) for name in PHOTOGRAPHS]
    for index in range(count):
        source = sources[index % len(sources)]
        height, width = source.shape[:2]
        side = int(rng.uniform(0.6, 1.0) * min(height, width))
        top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
        part = source[top : top + side, left : left + side][:, :: rng.choice([1, -1])]
        yield cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)


def aux_canny() -> Callable[..., object]:
    """Return controlnet-aux's detector; importing all of controlnet-aux would take seconds more."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return annotators.import_annotator("canny").CannyDetector()


def one_picture(size: int, rounds: int) -> Iterator[tuple[str, Ratio]]:
    """Compare single calls on one photograph, on one thread."""
    (picture,) = photographs(size, 1)
    ours, detector = get("canny"), aux_canny()

    def opencv() -> np.ndarray:
        return cv2.Canny(picture, 100, 200)

    def aux() -> np.ndarray:
        return detector(picture, detect_resolution=size, image_resolution=size, output_type="np")

    for other in photographs(size, 12):
        assert np.array_equal(ours(other).image[..., 0], cv2.Canny(other, 100, 200))
    assert np.array_equal(ours(picture).image, aux())
    clock = time.process_time
    yield (
        "cv2.Canny on RGB, itself again",
        compare(opencv, lambda: cv2.Canny(picture, 100, 200), rounds=rounds, clock=clock),
    )
    yield "cv2.Canny on RGB", compare(opencv, lambda: ours(picture), rounds=rounds, clock=clock)
    yield "controlnet-aux", compare(aux, lambda: ours(picture), rounds=rounds, clock=clock)


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


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller folders, not at 2048")
    quick = parser.parse_args().quick
    sizes = SIZES[:2] if quick else SIZES
    cores = len(os.sched_getaffinity(0))
    print(f"Medians over paired rounds, ratios with quartiles; {cores} cores.\n")
    print("| one picture, one thread | size | peer | ControlKit | ratio |\n|---|---|---|---|---|")
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    for size in sizes:
        for name, ratio in one_picture(size, 15 if quick else 51):
            print(f"| canny: {name} | {size} | {ratio} |", flush=True)
    cv2.setNumThreads(threads)
    count, rounds = (40, 3) if quick else (200, 5)
    print(f"\n| {count} JPEGs to PNG maps | size | peer | ControlKit | ratio |\n|---|---|---|---|---|")
    for size in sizes:
        print(f"| canny: controlnet-aux and Pillow | {size} | {folder(size, count, rounds)} |", flush=True)
    print()


if __name__ == "__main__":
    main()

"""Preparing pairs for training, beside what diffusers' train_controlnet.py does, in one run on one thread.

`uv run python tests/benchmarks/visits.py` takes about two minutes. Pairs are JPEG photographs with maps
(edges; something smooth, as depth is) as PNG files of three channels, or edges made of what is seen. The
script's part is Pillow's decoding and torchvision's Resize (bilinear), CenterCrop, ToTensor and Normalize of
pictures. Ours is `Visits.picture` and `Visits.map`, which give bytes (the device makes floats of them), and
then the same with the script's tensors. Outputs are compared first: at equal size they are equal; where
pictures shrink the filters differ, and by how much is printed. There the script's edges turn grey; ours are
drawn anew, one pixel wide and binary, which takes longer.
"""

import argparse
import io
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from pairs import Ratio, compare
from PIL import Image
from preprocess import photographs
from torchvision import transforms

from controlkit.images import map_to_cond, picture_to_tensor
from controlkit.preprocessors import get
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.examples import Example, Piece
from controlkit.training.data.visits import Visits

COUNT = 6
SIDE = 512
CLOCK = time.process_time
Pair = tuple[torch.Tensor, torch.Tensor]
Rows = list[tuple[bytes, bytes]]


class Bytes(Piece):
    """The bytes of a file, in memory, so that no disk is measured."""

    def __init__(self, content: bytes) -> None:
        self._content, self.name = content, "bytes"

    def read(self) -> bytes:
        return self._content


def encoded(image: np.ndarray, format: str, **options: int) -> bytes:
    """An image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, **options)
    return file.getvalue()


class Script:
    """What the script does with a row: `collate_fn` and the transforms of `prepare_train_dataset`."""

    def __init__(self) -> None:
        resize = transforms.Resize(SIDE, interpolation=transforms.InterpolationMode.BILINEAR)
        self._map = transforms.Compose([resize, transforms.CenterCrop(SIDE), transforms.ToTensor()])
        self._picture = transforms.Compose([*self._map.transforms, transforms.Normalize([0.5], [0.5])])

    def files(self, picture: bytes, edges: bytes) -> Pair:
        """A pair of files."""
        return self._picture(self._read(picture)), self._map(self._read(edges))

    def made(self, picture: bytes) -> Pair:
        """A picture whose edges are found in what is seen of it."""
        seen = transforms.Compose(self._map.transforms[:2])(self._read(picture))
        lines = cv2.Canny(np.asarray(seen), 100, 200)
        tensor = transforms.ToTensor()
        return transforms.Normalize([0.5], [0.5])(tensor(seen)), tensor(cv2.merge([lines] * 3))

    @staticmethod
    def _read(content: bytes) -> Image.Image:
        return Image.open(io.BytesIO(content)).convert("RGB")


class Ours:
    """The same pairs as visits."""

    def __init__(self, rows: Rows, side: int, *, kind: str, made: bool) -> None:
        examples = [
            Example("pair", Bytes(picture), "", () if made else (Bytes(edges),)) for picture, edges in rows
        ]
        sizes = [(side, side)] * len(rows)
        self._visits = Visits(examples, sizes, data=DataRecipe(), kind=kind, resolution=SIDE, seed=1)
        self._made = made

    def bytes(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """A visit: the picture and its map, uint8."""
        visit = self._visits.visit(index, 0)
        view = self._visits.views(index)[visit.view]
        picture = self._visits.picture(index, view)
        seen = picture if self._made else None
        return picture, self._visits.map(index, view, seed=visit.seed, picture=seen)

    def tensors(self, index: int) -> Pair:
        """The visit as float tensors."""
        picture, levels = self.bytes(index)
        return picture_to_tensor(picture)[0], map_to_cond(levels)[0]


def difference(script: Pair, ours: Pair) -> tuple[float, float]:
    """Mean absolute difference of the pictures and of the maps, in levels of 255."""
    picture, levels = ((a - b).abs().mean().item() for a, b in zip(script, ours, strict=True))
    return 127.5 * picture, 255 * levels


def measure(side: int, rounds: int) -> Iterator[tuple[str, Ratio, tuple[float, float]]]:
    """Compare pairs whose pictures are `side` pixels square."""
    canny, script = get("canny"), Script()
    pictures = list(photographs(side, COUNT))
    maps = {
        "canny, file": [canny(picture).image for picture in pictures],
        "depth, file": [cv2.GaussianBlur(picture[..., [1, 1, 1]], (0, 0), 3) for picture in pictures],
        "canny, made": [picture[:8, :8] for picture in pictures],  # not read
    }
    for what, levels in maps.items():
        rows = [
            (encoded(picture, "JPEG", quality=92), encoded(np.ascontiguousarray(one), "PNG"))
            for picture, one in zip(pictures, levels, strict=True)
        ]
        kind, is_made = what.split(",")[0], what.endswith("made")
        ours = Ours(rows, side, kind=kind, made=is_made)

        def peer(index: int, rows: Rows = rows, is_made: bool = is_made) -> Pair:
            return script.made(rows[index][0]) if is_made else script.files(*rows[index])

        apart = [difference(peer(k), ours.tensors(k)) for k in range(COUNT)]
        mean = (float(np.mean([p for p, _ in apart])), float(np.mean([m for _, m in apart])))
        if side == SIDE:
            assert max(mean) < 1e-4, mean
        for name, way in (("bytes", ours.bytes), ("tensors", ours.tensors)):
            yield f"{what} ({name})", compare(_all(peer), _all(way), rounds=rounds, clock=CLOCK), mean
    yield "the script beside itself", compare(_all(peer), _all(peer), rounds=rounds, clock=CLOCK), (0.0, 0.0)


def _all(way: Callable[[int], object]) -> Callable[[], None]:
    def run() -> None:
        for index in range(COUNT):
            way(index)

    return run


def main() -> None:
    """Print the table; times are those of six pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    print(
        f"{COUNT} pairs to {SIDE} pixels, CPU time of one thread; ratio: the median of {rounds} paired rounds"
    )
    print("| map | source | the script | ControlKit | ratio | picture, map apart (levels) |")
    print("|---|---|---|---|---|---|")
    for side in (512, 1024):
        for name, ratio, (picture, levels) in measure(side, rounds):
            print(f"| {name} | {side} | {ratio} | {picture:.2f}, {levels:.2f} |", flush=True)


if __name__ == "__main__":
    main()

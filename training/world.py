"""Scenes of the bundled world, rendered once and kept on disk for every training that uses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controlkit.files import cache_folder, temporary_beside

CHUNK = 250
VALIDATION_SCENES = CHUNK  # rendered for samples and scores
VERSION = 1  # raise when figures.py changes what it draws


@dataclass(frozen=True)
class World:
    """N rendered scenes of one split, seeds 0..N-1.

    picture: uint8 N×S×S×3. inverse_depth: float16 N×S×S, 1/m. joints: float32 N×18×3 (x, y in pixels,
    visible). figure: bool N×S×S, the figure's pixels. figure_height: float32 N, pixels. captions: N
    phrases.
    """

    picture: Sequence[NDArray[np.uint8]]
    inverse_depth: Sequence[NDArray[np.float16]]
    joints: NDArray[np.float32]
    figure: Sequence[NDArray[np.bool_]]
    figure_height: NDArray[np.float32]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def map(self, kind: str, index: int) -> NDArray[np.uint8]:
        """The exact map of a scene, uint8 S×S×3: see `exact_map`."""
        return exact_map(kind, self.picture[index], self.joints[index], self.inverse_depth[index])


def exact_map(
    kind: str,
    picture: NDArray[np.uint8],
    joints: NDArray[Any],
    inverse_depth: NDArray[Any],
    *,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> NDArray[np.uint8]:
    """A scene's map as the world itself knows it: the picture's edges, its true joints, its true depth.

    options: of the preprocessor, as far as they say how edges are found and joints are drawn.
    """
    from controlkit.preprocessors import depth_to_map, draw_poses, get

    if kind == "canny":
        return get("canny", **options)(picture).image
    if kind == "openpose":
        style = options.get("style", "v1.1")
        return draw_poses([joints.astype(np.float64)], picture.shape[1], picture.shape[0], style=style)
    assert kind == "depth", kind
    return depth_to_map(inverse_depth.astype(np.float32))


class _Chunks(Sequence[Any]):
    """Memory-mapped arrays of CHUNK rows each, indexed as one."""

    def __init__(self, arrays: list[NDArray[Any]], length: int) -> None:
        self._arrays, self._length = arrays, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        number, row = divmod(range(self._length)[index], CHUNK)  # the range refuses what lies outside
        return self._arrays[number][row]


def load_world(
    split: str,
    count: int,
    *,
    size: int = 128,
    folder: Path | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> World:
    """The first `count` scenes of a split, rendering those that the cache lacks (about 25 ms each on one
    core).

    Interrupted or repeated calls continue where the last one stopped; several processes may call it at once.
    Raises ValueError, one line, where the scenes cannot be kept.
    """
    root = (folder or cache_folder()) / f"world-{VERSION}-{split}-{size}"
    numbers = range((count + CHUNK - 1) // CHUNK)
    try:
        _render_missing(root, split, [n for n in numbers if not (root / f"{n:05d}").is_dir()], size, report)
        return _open(root, numbers, count)
    except OSError as error:
        raise ValueError(
            f"cannot keep rendered scenes in {root}: {error.strerror or error}"
            " (CONTROLKIT_CACHE names another folder)"
        ) from error


def _open(root: Path, numbers: range, count: int) -> World:
    def chunks(name: str) -> list[NDArray[Any]]:
        return [np.load(root / f"{number:05d}" / f"{name}.npy", mmap_mode="r") for number in numbers]

    captions: list[str] = []
    for number in numbers:
        captions += json.loads((root / f"{number:05d}" / "captions.json").read_text(encoding="utf-8"))
    return World(
        picture=_Chunks(chunks("picture"), count),
        inverse_depth=_Chunks(chunks("inverse_depth"), count),
        joints=np.concatenate(chunks("joints"))[:count],
        figure=_Chunks(chunks("figure"), count),
        figure_height=np.concatenate(chunks("figure_height"))[:count],
        captions=captions[:count],
    )


def _render_missing(
    root: Path, split: str, missing: list[int], size: int, report: Callable[[str], None]
) -> None:
    """Render chunks on every core: this process takes its share, and further interpreters take the rest.

    What they could not do is done here in the end, so that it is this process that says why not.
    """
    shares = min(os.cpu_count() or 1, len(missing))
    if not shares:
        return
    command = [sys.executable, "-m", "controlkit.training.world", str(root), split, str(size)]
    others = [
        subprocess.Popen(
            [*command, *map(str, missing[k::shares])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for k in range(1, shares)
    ]
    try:
        for done, number in enumerate(missing[::shares]):
            report(f"rendering {len(missing) * CHUNK} scenes: {done * shares * CHUNK} done")
            _render_chunk(root, split, number, size)
        for process in others:
            process.wait()
    finally:
        for process in others:
            process.terminate()
            process.wait()
    for number in missing:
        if not (root / f"{number:05d}").is_dir():
            _render_chunk(root, split, number, size)


def _render_chunk(root: Path, split: str, number: int, size: int) -> None:
    """Render one chunk into a temporary folder, then move it into place, so that none is half written."""
    root.mkdir(parents=True, exist_ok=True)
    place = Path(os.path.realpath(root)) / f"{number:05d}"
    with temporary_beside(place) as temporary:
        temporary.mkdir()  # before the work, which is for nothing where this fails
        _write_scenes(temporary, split, range(number * CHUNK, (number + 1) * CHUNK), size)
        try:
            os.rename(temporary, place)
        except OSError:  # another process rendered the same chunk first
            if not place.is_dir():
                raise


def _write_scenes(folder: Path, split: str, seeds: range, size: int) -> None:
    from controlkit.figures import render

    scenes = [render(seed, size=size, split=split) for seed in seeds]
    columns: dict[str, NDArray[Any]] = {
        "picture": np.stack([scene.picture for scene in scenes]),
        "inverse_depth": np.stack([scene.inverse_depth for scene in scenes]).astype(np.float16),
        "joints": np.stack([scene.joints for scene in scenes]).astype(np.float32),
        "figure": np.stack([scene.masks["figure"] for scene in scenes]),
        "figure_height": np.array([scene.figure_height for scene in scenes], dtype=np.float32),
    }
    for name, array in columns.items():
        np.save(folder / f"{name}.npy", array)
    captions = [scene.caption for scene in scenes]
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


if __name__ == "__main__":
    _root, _split, _size, *_numbers = sys.argv[1:]
    for _number in _numbers:
        _render_chunk(Path(_root), _split, int(_number), int(_size))

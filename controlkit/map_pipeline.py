"""Making many maps: threads that decode and encode around one that computes on a device.

OpenCV, Pillow and zlib let other threads run, so threads keep all cores busy. Kinds without a network are
made in the thread that decoded the picture; the others in batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from controlkit import images, preprocessors
from controlkit.map_folder import MapFolder
from controlkit.notices import is_out_of_memory
from controlkit.picture_files import Picture
from controlkit.preprocess_job import reads_depth, write_map

if TYPE_CHECKING:
    from controlkit.preprocessors import Map, Preprocessor

_DECODED_AHEAD = 2  # batches of decoded pictures that may wait for the device


@dataclass
class Outcome:
    """What became of one picture."""

    pixels: np.ndarray | None = None
    """Of a picture whose maps want a device, until they are made, uint8 (H, W, 3)."""
    made: int = 0
    """How many maps were made."""
    black: list[str] = field(default_factory=list)
    """The kinds of which nothing was found."""
    failure: str = ""
    """In words, why not all maps were made."""

    def add(self, made: Map) -> None:
        """Count a map."""
        self.made += 1
        if not made.image.any():
            self.black.append(made.kind)


Finished = Callable[[Picture, Outcome], None]


class MapPipeline:
    """Makes the maps of pictures and writes them into a folder."""

    def __init__(
        self,
        folder: MapFolder,
        extractors: Mapping[str, Preprocessor],
        *,
        workers: int,
        batch: int,
    ) -> None:
        """Tell the kinds that need a device from those that do not."""
        self._folder, self._workers, self._batch = folder, workers, batch
        self._light = {
            kind: extractor
            for kind, extractor in extractors.items()
            if reads_depth(folder.settings[kind]) or "device" not in preprocessors.options_of(kind)
        }
        self._heavy = {kind: extractor for kind, extractor in extractors.items() if kind not in self._light}

    def run(self, missing: Mapping[Picture, Sequence[str]], finished: Finished) -> None:
        """Make the missing kinds of each picture; `finished` is called in this thread.

        Raises ValueError when a file cannot be written. What is written then is whole.
        """
        with _one_opencv_thread(self._workers), ThreadPoolExecutor(self._workers) as pool:
            try:
                for group in self._decoded(pool, missing):
                    self._finish(pool, group, missing, finished)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _decoded(
        self, pool: ThreadPoolExecutor, missing: Mapping[Picture, Sequence[str]]
    ) -> Iterator[list[tuple[Picture, Future[Outcome]]]]:
        """Groups of a batch's size, decoded ahead but never far."""
        ahead = self._workers + _DECODED_AHEAD * self._batch
        waiting: deque[tuple[Picture, Future[Outcome]]] = deque()
        for picture, kinds in missing.items():
            waiting.append((picture, pool.submit(self._decode, picture, kinds)))
            if len(waiting) > ahead:
                yield [waiting.popleft() for _ in range(self._batch)]
        while waiting:
            yield [waiting.popleft() for _ in range(min(self._batch, len(waiting)))]

    def _decode(self, picture: Picture, kinds: Sequence[str]) -> Outcome:
        """Read a picture and make what needs no device. A failure is returned in words, not raised."""
        decoded = Outcome()
        try:
            pixels = images.load_picture(picture.path) if self._folder.has_pictures else None
            maps = [self._light_map(kind, picture, pixels) for kind in kinds if kind in self._light]
        except ValueError as error:
            decoded.failure = str(error)
            return decoded
        for made in maps:
            self._write(picture, made)
            decoded.add(made)
        if self._folder.has_pictures:
            try:
                self._folder.keep_picture(picture)
            except ValueError as error:
                if picture.path.exists():  # so that it is the disk that fails
                    raise
                decoded.failure = str(error)
                return decoded
        if any(kind in self._heavy for kind in kinds):
            decoded.pixels = pixels
        return decoded

    def _light_map(self, kind: str, picture: Picture, pixels: np.ndarray | None) -> Map:
        if pixels is None or reads_depth(self._folder.settings[kind]):
            return self._light[kind](picture.path)
        return self._light[kind](pixels)

    def _finish(
        self,
        pool: ThreadPoolExecutor,
        group: list[tuple[Picture, Future[Outcome]]],
        missing: Mapping[Picture, Sequence[str]],
        finished: Finished,
    ) -> None:
        """Compute on the device what is left to do for a group of pictures, and report on each."""
        results = [(picture, future.result()) for picture, future in group]
        writing: list[Future[None]] = []
        for kind, extractor in self._heavy.items():
            todo = [
                (picture, decoded, decoded.pixels)
                for picture, decoded in results
                if decoded.pixels is not None and kind in missing[picture]
            ]
            maps = _extract(extractor, [pixels for _, _, pixels in todo])
            for (picture, decoded, _), made in zip(todo, maps, strict=True):
                if isinstance(made, ValueError):
                    decoded.failure = f"{picture.path}: {made}"
                else:
                    decoded.add(made)
                    writing.append(pool.submit(self._write, picture, made))
        for future in writing:
            future.result()
        for picture, decoded in results:
            decoded.pixels = None
            finished(picture, decoded)

    def _write(self, picture: Picture, made: Map) -> None:
        # not durable: what a power failure leaves empty is made again
        write_map(self._folder.map_path(made.kind, picture), made, self._folder.beside, durable=False)


def _extract(extractor: Preprocessor, pixels: Sequence[np.ndarray]) -> Sequence[Map | ValueError]:
    """The maps of a batch; where it does not fit in memory, or one picture fails, one after the other."""
    try:
        return extractor.extract(pixels) if pixels else []
    except (ValueError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        if len(pixels) == 1:
            if isinstance(error, ValueError):
                return [error]
            raise
    return [_extract(extractor, [one])[0] for one in pixels]


@contextmanager
def _one_opencv_thread(workers: int) -> Iterator[None]:
    """Keep OpenCV from starting threads of its own beside several workers."""
    import cv2

    before = cv2.getNumThreads()
    if workers > 1:
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)

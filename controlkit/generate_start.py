"""The picture that a generation starts from and its mask, as given or as an earlier picture had them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from controlkit import arguments, files, images
from controlkit.generate_like import Earlier
from controlkit.infotext import StartRecord
from controlkit.settings import USUAL_STRENGTH

MASKED_STRENGTH = 1.0  # a hole is filled from nothing


@dataclass(frozen=True, eq=False)
class Beginning:
    """The picture that a generation starts from: how it is recorded, its pixels and its mask's."""

    record: StartRecord
    picture: np.ndarray
    mask: np.ndarray | None
    files: tuple[Path, ...]

    def scaled(self, width: int, height: int) -> str | None:
        """What is to be known where what a mask leaves alone is scaled to width x height, or None."""
        own = self.picture.shape[1], self.picture.shape[0]
        if self.mask is None or own == (width, height):
            return None
        return (
            f"{self.record.path} is {own[0]}x{own[1]} and is brought to {width}x{height}: what the mask"
            " leaves alone are the pixels of that"
        )


@dataclass(frozen=True)
class _File:
    """As it is recorded, and where it is."""

    name: str
    sha256: str
    place: Path


def begun(
    start: str | None, mask: str | None, strength: float | None, earlier: Earlier | None
) -> tuple[Beginning | None, list[str]]:
    """What is started from, and what is to be known of it.

    start, mask: files, "none" for nothing, or None for those of the earlier picture, whose strength is kept
    as well. Raises ValueError for a mask or a strength that nothing belongs to, or a mask that does not fit.
    """
    if start is not None and arguments.is_none(start):
        start = earlier = None
    before = None if earlier is None else earlier.record.start
    if start is None and before is None:
        _check_nothing(mask, strength)
        return None, []
    source = _given(start) if start is not None else _again(earlier, before)
    hole = _hole(mask, earlier, before)
    picture = images.load_picture(source.place)
    pixels = None if hole is None else images.load_mask(hole.place)
    notes = []
    if hole is not None and pixels is not None:
        if mask is None and pixels.shape != picture.shape[:2]:
            notes.append(f"the mask {hole.name} does not fit {source.name} and is left out")
            hole = pixels = None
        else:
            _check_mask(pixels, picture, hole.name, source.name)
    if strength is None:
        strength = _strength(before, masked=hole is not None)
        if before is not None and strength != before.strength:
            notes.append(f"without its mask {source.name} is redone by a strength of {strength:g}")
    record = StartRecord(
        path=source.name,
        sha256=source.sha256,
        strength=strength,
        mask="" if hole is None else hole.name,
        mask_sha256="" if hole is None else hole.sha256,
    )
    read = tuple(file.place for file in (source, hole) if file is not None)
    return Beginning(record, picture, pixels, read), notes


def _hole(mask: str | None, earlier: Earlier | None, before: StartRecord | None) -> _File | None:
    """The mask's file: the given one, or else the earlier picture's, or none."""
    if mask is not None:
        return None if arguments.is_none(mask) else _given(mask)
    return _again(earlier, before, mask=True) if before is not None and before.mask else None


def _strength(before: StartRecord | None, *, masked: bool) -> float:
    """The earlier picture's strength; one that came with a mask would leave nothing of a whole picture."""
    lost = before is not None and before.mask and not masked and before.strength == MASKED_STRENGTH
    if before is None or lost:
        return MASKED_STRENGTH if masked else USUAL_STRENGTH
    return before.strength


def _check_nothing(mask: str | None, strength: float | None) -> None:
    """Raise ValueError for what belongs to a picture to start from, where there is none."""
    mask = None if mask is None or arguments.is_none(mask) else mask
    for name, value in (("--mask", mask), ("--strength", strength)):
        if value is not None:
            raise ValueError(f"{name} {value} belongs to a picture to start from: add --from PICTURE")


def _given(path: str) -> _File:
    path = files.at_home(path)
    images.stored_size(path)  # which says what is wrong with the file
    return _File(path, files.sha256_file(path), Path(path))


def _again(earlier: Earlier | None, before: StartRecord | None, *, mask: bool = False) -> _File:
    assert earlier is not None
    assert before is not None
    name, sha256 = (before.mask, before.mask_sha256) if mask else (before.path, before.sha256)
    return _File(name, sha256, earlier.find(name, sha256, option="--mask" if mask else "--from"))


def _check_mask(mask: np.ndarray, picture: np.ndarray, name: str, of: str) -> None:
    if mask.shape != picture.shape[:2]:
        raise ValueError(
            f"the mask {name} is {mask.shape[1]}x{mask.shape[0]} and its picture {of}"
            f" {picture.shape[1]}x{picture.shape[0]}: they must have one size"
        )
    if mask.max() < 128:
        raise ValueError(
            f"the mask {name} is black: what is white and not transparent is redrawn, and there is none"
        )

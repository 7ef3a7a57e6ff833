"""OpenPose's colours in the pixels of a map: which limb, joint, hand or face each means."""

from functools import cache

import cv2
import numpy as np

from controlkit.preprocessors.lint_facts import sample
from controlkit.preprocessors.skeleton import COLOURS, HAND_COLOURS, LIMBS

_DIM = [tuple(level * 6 // 10 for level in colour) for colour in COLOURS]  # limbs: 0.6 of the colour
_PALETTE = np.array([*_DIM, *COLOURS], np.int16)  # 0 to 17: limbs; 18 to 35: joints
_NEAR = 30  # levels; JPEG shifts flat colours by less, and the palette's colours lie farther apart


def usual_colour(image: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Return the most frequent colour of a sample, and the share of the sample that is close to it."""
    colours = sample(image, 128).reshape(-1, 3)
    codes, counts = count_codes(colours & 0xF8)  # JPEG spreads a colour over a few levels
    code = int(codes[counts.argmax()])
    centre = np.array([code >> 16, code >> 8 & 255, code & 255])
    near = (np.abs(colours.astype(np.int16) - centre) <= 16).all(axis=1)
    usual = np.median(colours[near], axis=0).astype(int)
    return tuple(int(level) for level in usual), float(near.mean())


def flatness(image: np.ndarray) -> np.ndarray:
    """Where a pixel and its eight neighbours have nearly one colour: bool (H, W)."""
    kernel = np.ones((3, 3), np.uint8)
    span = cv2.subtract(cv2.dilate(image, kernel), cv2.erode(image, kernel))
    return largest(span) <= 24


def extremes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strongest and the weakest channel of each of (N, 3) colours."""
    return largest(colours[None]), 255 - largest(255 - colours[None])


def largest(image: np.ndarray) -> np.ndarray:
    """The largest of three channels: uint8 (H, W)."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


def count_codes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different colours as 0xRRGGBB, and how often each occurs."""
    wide = colours.astype(np.int32)
    codes = np.sort(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2])
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[first], np.diff(first, append=len(codes))


def is_in(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which codes are among known ones, which are sorted."""
    at = np.minimum(np.searchsorted(known, codes), len(known) - 1)
    return known[at] == codes


@cache
def _nearest() -> np.ndarray:
    """The palette's entry, 1 to 36, nearest to each colour of 5 bits a channel; 0 where none is near."""
    axis = np.arange(32, dtype=np.int16) * 8 + 4
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    far = np.abs(grid[:, None] - _PALETTE[None]).max(axis=2)
    return np.where(far.min(axis=1) <= _NEAR, far.argmin(axis=1) + 1, 0).astype(np.uint8)


def _lookup(colours: np.ndarray) -> np.ndarray:
    small = (colours >> 3).astype(np.int32)
    return _nearest()[small[..., 0] << 10 | small[..., 1] << 5 | small[..., 2]]


def label_strokes(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Which limb (1 to 18) or joint (19 to 36) each pixel's colour means: uint8 (H, W), 0 for none."""
    labels = np.zeros(mask.shape, np.uint8)
    labels[mask] = _lookup(image[mask])
    return labels


def palette_share(colours: np.ndarray, *, joints_only: bool = False) -> float:
    """The share of colours that are a limb's, a joint's, a hand's or a face's."""
    if not len(colours):
        return 0.0
    found = _lookup(colours)
    known = found > 18 if joints_only else found > 0
    white = (colours > 225).all(axis=1)
    rest = colours[~(known | white)]
    if not len(rest):
        return 1.0
    codes, counts = count_codes(rest)
    return 1.0 - float(counts[~is_in(codes, _hand_codes())].sum()) / len(colours)


@cache
def _hand_codes() -> np.ndarray:
    """The 20 lines of a hand, cut or rounded to whole levels."""
    exact = np.array(HAND_COLOURS)
    between = (exact > 1) & (exact < 254)
    shifted = [np.where(between, exact + shift, exact).astype(np.uint8) for shift in (-0.6, 0, 0.6)]
    return count_codes(np.concatenate(shifted))[0]


def is_finger(colours: np.ndarray) -> np.ndarray:
    """Which of (N, 3) colours are those of a hand's lines: bool (N,). Some are close to a joint's."""
    wide = colours.astype(np.int32)
    return is_in(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2], _hand_codes())


@cache
def exact_codes() -> np.ndarray:
    """The codes of all colours that the usual drawing uses, sorted."""
    return np.unique(np.concatenate([count_codes(_PALETTE.astype(np.uint8))[0], _hand_codes(), [0xFFFFFF]]))


@cache
def blended_codes() -> np.ndarray:
    """What blending limbs (0.4 of what was there, 0.6 of the colour) gives, up to three over one another."""
    found = np.concatenate([_PALETTE, np.zeros((1, 3), np.int16)])
    codes = [exact_codes()]
    for _ in range(3):
        mixed = np.rint(0.4 * found[:, None] + 0.6 * np.array(COLOURS)[None]).astype(np.uint8).reshape(-1, 3)
        found = np.unique(mixed, axis=0)
        codes.append(count_codes(found)[0])
    return np.unique(np.concatenate(codes))


# --- which limb touches which joint ---

_HAND_POINTS = (12, 0)  # blue points of hands, and what they become in BGR, tell nothing of joints
_ENOUGH = (
    20  # pixels after which a pair of limb and joint is sure; more would let one pair outweigh the others
)


def is_bgr(labels: np.ndarray) -> bool:
    """Whether limbs touch the joints they belong to only if blue and red are exchanged.

    The exchange turns the palette into itself, so colours alone tell nothing; what touches what does.
    """
    touching = np.minimum(_contacts(labels), _ENOUGH)
    touching[:, _HAND_POINTS] = 0
    if touching.sum() < 5 * _ENOUGH or np.count_nonzero(touching >= 5) < 6:
        return False
    right, swapped = _agreement(touching, (0, 1, 2)), _agreement(touching, (2, 1, 0))
    return swapped > max(right + 0.2, 2 * right)


def _contacts(labels: np.ndarray) -> np.ndarray:
    """How often a limb's colour lies a few pixels from a joint's: (18 limbs, 18 joints)."""
    labels = np.pad(labels, 5)
    counts = np.zeros(37 * 37, np.int64)
    for down, right in ((0, 5), (5, 0), (4, 4), (4, -4)):
        a = labels[: labels.shape[0] - down, max(0, -right) : labels.shape[1] - max(0, right)]
        b = labels[down:, max(0, right) : labels.shape[1] + min(0, right)]
        both = (a > 0) & (b > 0)
        counts += np.bincount(a[both].astype(np.int32) * 37 + b[both], minlength=37 * 37)
    table = counts.reshape(37, 37)
    table = table + table.T
    limb_to_joint = table[1:19, 19:37]
    if limb_to_joint.sum() >= _ENOUGH:
        return limb_to_joint
    return table[19:37, 19:37] * ~np.eye(18, dtype=bool)  # limbs in full colour


def _agreement(touching: np.ndarray, order: tuple[int, ...]) -> float:
    """The share of contacts that belong to a body if the channels are stored in ``order``."""
    stored = [COLOURS.index(tuple(colour[channel] for channel in order)) for colour in COLOURS]
    good = sum(touching[stored[limb], stored[joint]] for limb, pair in enumerate(LIMBS) for joint in pair)
    return float(good / touching.sum())

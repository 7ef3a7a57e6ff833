"""What can be wrong with drawn poses: colours, their order, the drawing's style, damage."""

from functools import cache, cached_property

import cv2
import numpy as np

from controlkit.preprocessors.lint_facts import Facts, Finding, error, has_ringing, warning
from controlkit.preprocessors.skeleton import COLOURS, HAND_COLOURS, LIMBS

_MAKE = "make the map anew with `controlkit preprocess openpose PICTURE`, or draw the joints with draw_poses"
_DIM = [tuple(level * 6 // 10 for level in colour) for colour in COLOURS]  # limbs: 0.6 of the colour
_PALETTE = np.array([*_DIM, *COLOURS], np.int16)  # 0 to 17: limbs; 18 to 35: joints
_NEAR = 30  # levels; JPEG shifts flat colours by less, and the palette's colours lie farther apart
_FEWEST = 30  # pixels that make evidence


class Strokes:
    """What is drawn on a map's background; measured when it is asked for."""

    def __init__(self, facts: Facts) -> None:
        """Take the map."""
        self.facts = facts

    @cached_property
    def _usual(self) -> tuple[tuple[int, ...], float]:
        return _usual_colour(self.facts.image)

    @property
    def background(self) -> tuple[int, ...]:
        """The most frequent colour."""
        return self._usual[0]

    @property
    def background_share(self) -> float:
        """The share of pixels that are close to it."""
        return self._usual[1]

    @property
    def on_colour(self) -> bool:
        """Whether the background is something other than black."""
        return max(self.background) > 24

    @cached_property
    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        away = self.facts.level
        if self.on_colour:
            away = _largest(cv2.absdiff(self.facts.image, np.array([*self.background, 0], np.float64)))
        left, top, width, height = cv2.boundingRect(cv2.compare(away, 40.0, cv2.CMP_GT))
        inside = np.s_[top : top + height, left : left + width]
        return self.facts.image[inside], away[inside] > 40

    @property
    def image(self) -> np.ndarray:
        """The part of the map that has all strokes: uint8 (h, w, 3)."""
        return self._cut[0]

    @property
    def mask(self) -> np.ndarray:
        """Where strokes are in that part: bool (h, w)."""
        return self._cut[1]

    @cached_property
    def colours(self) -> np.ndarray:
        """The strokes' colours, uint8 (N, 3)."""
        return self.image[self.mask]

    @cached_property
    def _flat(self) -> np.ndarray:
        return _flatness(self.image)[self.mask] if len(self.colours) else np.zeros(0, bool)

    @property
    def flat(self) -> float:
        """The share of strokes of one colour with their surroundings."""
        return float(np.count_nonzero(self._flat)) / max(1, len(self._flat))

    @cached_property
    def inner(self) -> np.ndarray:
        """The colours of those strokes, which no resampling has touched; of all where there are few, (N, 3)."""
        return self.colours[self._flat] if np.count_nonzero(self._flat) >= _FEWEST else self.colours

    @property
    def coloured(self) -> float:
        """The share of strokes that are not grey, white face points left out."""
        if not len(self.colours):
            return 0.0
        high, low = _extremes(self.colours)
        return float(np.count_nonzero(high - low > 40)) / max(1, int(np.count_nonzero(low <= 225)))

    @property
    def vivid(self) -> bool:
        """Whether most strokes have a pure colour, as all palettes for poses have; white face points pass."""
        if not len(self.inner):
            return False
        high, low = _extremes(self.inner)
        return bool(np.mean((low < 0.5 * high) | (low > 225)) > 0.6)

    @cached_property
    def in_palette(self) -> float:
        """The share of colours that are OpenPose's."""
        return _palette_share(self.inner)

    @cached_property
    def in_inverted_palette(self) -> float:
        """The share of colours that are OpenPose's after inversion."""
        return _palette_share(255 - self.inner)


def may_be_pose(strokes: Strokes) -> bool:
    """Whether it can be a pose, in whatever colours and however damaged; a photograph can not."""
    if max(strokes.in_palette, strokes.in_inverted_palette) > 0.6:
        return True
    return strokes.background_share > 0.4 and not strokes.on_colour and strokes.vivid


def looks_drawn(strokes: Strokes) -> bool:
    """Whether it is made of flat, coloured strokes on one colour, as poses in any palette are."""
    if strokes.background_share < 0.4 or not len(strokes.colours) or strokes.coloured < 0.6:
        return False
    if strokes.on_colour:
        is_grey = max(strokes.background) - min(strokes.background) < 24  # not a colour map's darkest colour
        return is_grey and max(strokes.in_palette, strokes.in_inverted_palette) > 0.6
    return strokes.flat > 0.12 and strokes.vivid


def pose_findings(strokes: Strokes, *, style_is_known: bool = False) -> list[Finding]:
    """Return what is wrong with a drawn pose; it is known to be one, in whatever colours.

    ``style_is_known``: the style was chosen, so that of ControlNet 1.0 is not worth a word.
    """
    if strokes.on_colour:
        return [_background(strokes)]
    labels = _labels(strokes.image, strokes.mask)
    if strokes.in_palette < 0.6:
        return [_damaged(strokes) if has_ringing(strokes.facts, least=0.1) else _palette(strokes)]
    if _is_bgr(labels):
        return [
            error(
                "channels",
                "the colours are in BGR order: red and blue are exchanged, so limbs are mistaken for others",
                "exchange them (`map[..., ::-1]` in numpy); OpenCV's imread and imwrite use BGR",
            )
        ]
    codes, counts = _codes(strokes.colours)
    if counts[_is_in(codes, _exact_codes())].sum() > 0.995 * counts.sum():
        return [] if style_is_known else _full_colour(labels)
    if counts[_is_in(codes, _blended_codes())].sum() > 0.9 * counts.sum():
        return [] if style_is_known else [_old_style()]
    if np.sort(counts)[-64:].sum() > 0.97 * counts.sum():  # few colours, and not the right ones
        return [_palette(strokes)]
    return [_damaged(strokes)]


def _background(strokes: Strokes) -> Finding:
    if strokes.in_inverted_palette > max(0.6, strokes.in_palette):
        return error("inverted", "the pose's colours are inverted", "invert it (255 minus every value)")
    rgb = ", ".join(str(level) for level in strokes.background)
    return error(
        "background",
        f"the pose is drawn on ({rgb}) instead of black",
        f"set the background to black (0, 0, 0); {_MAKE}",
    )


def _palette(strokes: Strokes) -> Finding:
    strength = strokes.inner.max(axis=1, keepdims=True).astype(np.float64)
    hues = (255 * (strokes.inner / np.maximum(strength, 1))).astype(np.uint8)
    if _palette_share(hues, joints_only=True) > 0.85:
        return error(
            "level",
            "the pose's colours are darker or lighter than OpenPose's: limbs have 0.6 of it, joints all of it",
            f"undo the change of brightness; {_MAKE}",
        )
    return error(
        "palette",
        "the pose's colours are not OpenPose's: another palette, another set of joints, or changed colours",
        f"draw it in OpenPose's 18 colours; {_MAKE}",
    )


def _full_colour(labels: np.ndarray) -> list[Finding]:
    """Limbs at 1.0 instead of 0.6 of their colour: none is dim, and full colours reach beyond a joint's disc."""
    if np.count_nonzero((labels >= 1) & (labels <= 18)) > 0.02 * np.count_nonzero(labels):
        return []
    long = 0
    for colour in range(18):
        if colour in (0, 9, 12):  # hands are drawn in these, too
            continue
        part = (labels == 19 + colour).astype(np.uint8)
        if part.any():
            boxes = cv2.connectedComponentsWithStats(part)[2][1:]
            long += bool((boxes[:, 2:4].max(axis=1) > 20).any())
    if long < 2:
        return []
    return [
        warning(
            "style",
            "the limbs are drawn in full colour; ControlNets learned limbs at 0.6 of it under brighter joints",
            _MAKE,
        )
    ]


def _old_style() -> Finding:
    return warning(
        "style",
        "the pose is drawn in the style of ControlNet 1.0 (limbs blended over joints)",
        'right for adapters trained on it; for all others draw it with style "v1.1"',
    )


def _damaged(strokes: Strokes) -> Finding:
    if has_ringing(strokes.facts, least=0.1):
        return warning(
            "jpeg", "the pose is damaged by JPEG: its flat colours are not flat", f"save PNG; {_MAKE}"
        )
    return warning(
        "grey",
        "the pose has in-between colours, as after smooth resizing, blurring or antialiased drawing",
        f"{_MAKE}; resize poses by drawing their joints anew, or with nearest neighbours",
    )


# --- colours ---


def _usual_colour(image: np.ndarray) -> tuple[tuple[int, ...], float]:
    """Return the most frequent colour of a sample, and the share of the sample that is close to it."""
    step = max(1, int((image.shape[0] * image.shape[1] / 16384) ** 0.5))
    sample = image[::step, ::step].reshape(-1, 3)
    codes, counts = _codes(sample & 0xF8)  # JPEG spreads a colour over a few levels
    code = int(codes[counts.argmax()])
    centre = np.array([code >> 16, code >> 8 & 255, code & 255])
    near = (np.abs(sample.astype(np.int16) - centre) <= 16).all(axis=1)
    usual = np.median(sample[near], axis=0).astype(int)
    return tuple(int(level) for level in usual), float(near.mean())


def _flatness(image: np.ndarray) -> np.ndarray:
    """Where a pixel and its eight neighbours have nearly one colour: bool (H, W)."""
    kernel = np.ones((3, 3), np.uint8)
    span = cv2.subtract(cv2.dilate(image, kernel), cv2.erode(image, kernel))
    return _largest(span) <= 24


def _extremes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The strongest and the weakest channel of each of (N, 3) colours."""
    return _largest(colours[None]), 255 - _largest(255 - colours[None])


def _largest(image: np.ndarray) -> np.ndarray:
    """The largest of three channels: uint8 (H, W)."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue)


def _codes(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the different colours as 0xRRGGBB, and how often each occurs."""
    wide = colours.astype(np.int32)
    codes = np.sort(wide[:, 0] << 16 | wide[:, 1] << 8 | wide[:, 2])
    first = np.flatnonzero(np.diff(codes, prepend=-1))
    return codes[first], np.diff(first, append=len(codes))


def _is_in(codes: np.ndarray, known: np.ndarray) -> np.ndarray:
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


def _labels(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Which limb (1 to 18) or joint (19 to 36) each pixel's colour means: uint8 (H, W), 0 for none."""
    labels = np.zeros(mask.shape, np.uint8)
    labels[mask] = _lookup(image[mask])
    return labels


def _palette_share(colours: np.ndarray, *, joints_only: bool = False) -> float:
    """The share of colours that are a limb's, a joint's, a hand's or a face's."""
    if not len(colours):
        return 0.0
    found = _lookup(colours)
    known = found > 18 if joints_only else found > 0
    white = (colours > 225).all(axis=1)
    rest = colours[~(known | white)]
    if not len(rest):
        return 1.0
    codes, counts = _codes(rest)
    return 1.0 - float(counts[~_is_in(codes, _hand_codes())].sum()) / len(colours)


@cache
def _hand_codes() -> np.ndarray:
    """The 20 lines of a hand, cut or rounded to whole levels."""
    exact = np.array(HAND_COLOURS)
    between = (exact > 1) & (exact < 254)
    shifted = [np.where(between, exact + shift, exact).astype(np.uint8) for shift in (-0.6, 0, 0.6)]
    return _codes(np.concatenate(shifted))[0]


@cache
def _exact_codes() -> np.ndarray:
    return np.unique(np.concatenate([_codes(_PALETTE.astype(np.uint8))[0], _hand_codes(), [0xFFFFFF]]))


@cache
def _blended_codes() -> np.ndarray:
    """What blending limbs (0.4 of what was there, 0.6 of the colour) gives, up to three over one another."""
    found = np.concatenate([_PALETTE, np.zeros((1, 3), np.int16)])
    codes = [_exact_codes()]
    for _ in range(3):
        mixed = np.rint(0.4 * found[:, None] + 0.6 * np.array(COLOURS)[None]).astype(np.uint8).reshape(-1, 3)
        found = np.unique(mixed, axis=0)
        codes.append(_codes(found)[0])
    return np.unique(np.concatenate(codes))


# --- which limb touches which joint ---

_HAND_POINTS = (12, 0)  # blue points of hands, and what they become in BGR, tell nothing of joints
_ENOUGH = (
    20  # pixels after which a pair of limb and joint is sure; more would let one pair outweigh the others
)


def _is_bgr(labels: np.ndarray) -> bool:
    """Whether limbs touch the joints they belong to only if blue and red are exchanged.

    The exchange turns the palette into itself, so colours alone tell nothing; what touches what does.
    """
    touching = np.minimum(_contacts(labels), _ENOUGH)
    touching[:, _HAND_POINTS] = 0
    if touching.sum() < 3 * _ENOUGH:
        return False
    right, swapped = _agreement(touching, (0, 1, 2)), _agreement(touching, (2, 1, 0))
    return swapped > max(right + 0.2, 2 * right)


def _contacts(labels: np.ndarray) -> np.ndarray:
    """How often a limb's colour lies a few pixels from a joint's: (18 limbs, 18 joints)."""
    counts = np.zeros(37 * 37, np.int64)
    for down, right in ((0, 5), (5, 0), (4, 4), (4, -4)):
        a = labels[: labels.shape[0] - down, max(0, -right) : labels.shape[1] - max(0, right)]
        b = labels[down:, max(0, right) : labels.shape[1] + min(0, right)]
        both = (a > 0) & (b > 0)
        counts += np.bincount(a[both].astype(np.int32) * 37 + b[both], minlength=37 * 37)
    table = counts.reshape(37, 37)
    table = table + table.T
    limb_to_joint = table[1:19, 19:37]
    if limb_to_joint.sum() >= _FEWEST:
        return limb_to_joint
    return table[19:37, 19:37] * ~np.eye(18, dtype=bool)  # limbs in full colour


def _agreement(touching: np.ndarray, order: tuple[int, ...]) -> float:
    """The share of contacts that belong to a body if the channels are stored in ``order``."""
    stored = [COLOURS.index(tuple(colour[channel] for channel in order)) for colour in COLOURS]  # type: ignore[arg-type]
    good = sum(touching[stored[limb], stored[joint]] for limb, pair in enumerate(LIMBS) for joint in pair)
    return float(good / touching.sum())

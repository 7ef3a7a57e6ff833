"""What can be wrong with drawn poses: colours, their order, the drawing's style, damage."""

from functools import cached_property

import cv2
import numpy as np

from controlkit.preprocessors.lint_facts import Facts, Finding, above, error, has_ringing, warning
from controlkit.preprocessors.lint_palette import (
    blended_codes,
    count_codes,
    exact_codes,
    extremes,
    flatness,
    is_bgr,
    is_finger,
    is_in,
    label_strokes,
    largest,
    palette_share,
    usual_colour,
)

_MAKE = "make the map anew with `controlkit preprocess openpose PICTURE`, or draw the joints with draw_poses"
_FEWEST = 30  # pixels that make evidence


class Strokes:
    """What is drawn on a map's background; measured when it is asked for."""

    def __init__(self, facts: Facts) -> None:
        """Take the map."""
        self.facts = facts

    @cached_property
    def _usual(self) -> tuple[tuple[int, ...], float]:
        return usual_colour(self.facts.image)

    @property
    def background(self) -> tuple[int, ...]:
        """The most frequent colour."""
        return self._usual[0]

    @property
    def background_share(self) -> float:
        """The share of pixels that are close to it."""
        return self._usual[1]

    @cached_property
    def on_colour(self) -> bool:
        """Whether the background is neither black nor a limb's colour, which may fill a small canvas."""
        colour = np.array([[self.background]], np.uint8)
        return max(self.background) > 24 and not label_strokes(colour, np.array([[True]])).any()

    @cached_property
    def _cut(self) -> tuple[np.ndarray, np.ndarray]:
        away = self.facts.level
        if self.on_colour:
            away = largest(cv2.absdiff(self.facts.image, np.array([*self.background, 0], np.float64)))
        left, top, width, height = cv2.boundingRect(above(away, 40))
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
        return flatness(self.image)[self.mask] if len(self.colours) else np.zeros(0, bool)

    @property
    def flat(self) -> float:
        """The share of strokes of one colour with their surroundings."""
        return float(np.count_nonzero(self._flat)) / max(1, len(self._flat))

    @cached_property
    def inner(self) -> np.ndarray:
        """The colours of those, which no resampling touched, (N, 3); of all strokes where they are few."""
        return self.colours[self._flat] if np.count_nonzero(self._flat) >= _FEWEST else self.colours

    @property
    def coloured(self) -> float:
        """The share of strokes that are not grey, white face points left out."""
        if not len(self.colours):
            return 0.0
        high, low = extremes(self.colours)
        return float(np.count_nonzero(high - low > 40)) / max(1, int(np.count_nonzero(low <= 225)))

    @property
    def vivid(self) -> bool:
        """Whether most strokes have a pure colour, as all palettes for poses have; white face points pass."""
        if not len(self.inner):
            return False
        high, low = extremes(self.inner)
        return bool(np.mean((low < 0.5 * high) | (low > 225)) > 0.6)

    @cached_property
    def in_palette(self) -> float:
        """The share of colours that are OpenPose's."""
        return palette_share(self.inner)

    @cached_property
    def in_inverted_palette(self) -> float:
        """The share of colours that are OpenPose's after inversion."""
        return palette_share(255 - self.inner)


def may_be_pose(strokes: Strokes) -> bool:
    """Whether it can be a pose, in whatever colours and however damaged; a photograph can not."""
    if max(strokes.in_palette, strokes.in_inverted_palette) > 0.6:
        return True
    return strokes.background_share > 0.4 and not strokes.on_colour and strokes.vivid


def may_be_faces(facts: Facts) -> bool:
    """Whether it can be faces without bodies: white discs on black, and nothing else."""
    if facts.middle > 0.01 or facts.solid_white < 0.25:
        return False
    boxes = cv2.connectedComponentsWithStats(facts.white)[2][1:]
    return len(boxes) >= 5 and bool(np.mean(boxes[:, 2:4].max(axis=1) <= 24) > 0.7)


def looks_drawn(strokes: Strokes) -> bool:
    """Whether it is made of flat, coloured strokes on one colour, as poses in any palette are."""
    if strokes.background_share < 0.4 or not len(strokes.colours) or strokes.coloured < 0.6:
        return False
    if max(strokes.background) > 24:
        is_grey = max(strokes.background) - min(strokes.background) < 24  # not a colour map's darkest colour
        return is_grey and max(strokes.in_palette, strokes.in_inverted_palette) > 0.6
    return strokes.flat > 0.12 and strokes.vivid


def pose_findings(strokes: Strokes, *, style_is_known: bool = False) -> list[Finding]:
    """Return what is wrong with a drawn pose; it is known to be one, in whatever colours.

    ``style_is_known``: the style was chosen, so that of ControlNet 1.0 is not worth a word.
    """
    if strokes.on_colour:
        return [_background(strokes)]
    labels = label_strokes(strokes.image, strokes.mask)
    if strokes.in_palette < 0.6:
        return [_damaged(strokes) if has_ringing(strokes.facts, least=0.1) else _palette(strokes)]
    if is_bgr(labels):
        return [
            error(
                "channels",
                "the colours are in BGR order: red and blue are exchanged, so limbs are mistaken for others",
                "exchange them (`map[..., ::-1]` in numpy); OpenCV's imread and imwrite use BGR",
            )
        ]
    codes, counts = count_codes(strokes.colours)
    has_dim = np.count_nonzero((labels >= 1) & (labels <= 18)) > 0.02 * np.count_nonzero(labels)
    if counts[is_in(codes, exact_codes())].sum() > 0.995 * counts.sum():
        return [] if style_is_known or has_dim else _full_colour(strokes, labels)
    if counts[is_in(codes, blended_codes())].sum() > 0.9 * counts.sum():
        # Both styles have limbs of 0.6 of the colour; in full colour, smooth ends of limbs pass as blended.
        found = [_old_style()] if has_dim else _full_colour(strokes, labels)
        if found:
            return [] if style_is_known else found
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
    if palette_share(hues, joints_only=True) > 0.85:
        return error(
            "level",
            "the pose's colours are darker or lighter than OpenPose's (limbs have 0.6 of it, joints all)",
            f"undo the change of brightness; {_MAKE}",
        )
    return error(
        "palette",
        "the pose's colours are not OpenPose's: another palette, another set of joints, or changed colours",
        f"draw it in OpenPose's 18 colours; {_MAKE}",
    )


def _full_colour(strokes: Strokes, labels: np.ndarray) -> list[Finding]:
    """Limbs at 1.0 instead of 0.6 of their colour: none is dim, and full colours reach beyond joints."""
    labels = labels.copy()
    labels[strokes.mask] *= ~is_finger(strokes.colours)  # fingers are always in full colour
    long = 0
    for colour in range(18):
        if colour in (0, 9, 12):  # which hands and bodies share
            continue
        part = (labels == 19 + colour).astype(np.uint8)
        if part.any():
            boxes = cv2.connectedComponentsWithStats(part)[2][1:]
            long += bool((boxes[:, 2:4].max(axis=1) > 14).any())
    if long < 2:
        return []
    return [
        warning(
            "style",
            "the limbs are drawn in full colour; ControlNets learned them darker (0.6 of it) than joints",
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
            "jpeg",
            "the pose is damaged by JPEG, or by enlarging with a sharp filter: its flat colours are not flat",
            f"save PNG, and resize poses by drawing their joints anew; {_MAKE}",
        )
    return warning(
        "grey",
        "the pose has in-between colours, as after smooth resizing, blurring or antialiased drawing",
        f"{_MAKE}; resize poses by drawing their joints anew, or with nearest neighbours",
    )

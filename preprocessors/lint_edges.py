"""What can be wrong with maps of lines: canny's one-pixel edges, and soft edges, scribbles, line art."""

import cv2
import numpy as np

from controlkit.preprocessors.lint_facts import Facts, Finding, error, has_ringing, warning

_MAKE = "make the map anew with `controlkit preprocess canny PICTURE` at the size it is used at"
_INVERT = "invert it (255 minus every value; `ImageOps.invert` in Pillow)"

_THICK = warning(
    "thick",
    "the edges are several pixels thick; canny's are one pixel wide",
    f"{_MAKE}; thick strokes are what scribble adapters read",
)


def looks_thin(facts: Facts) -> bool:
    """Whether it is thin bright lines on black, grey or damaged ones included."""
    return facts.share(0, 64) > 0.4 and facts.solid_white < 0.03 and facts.share(128) < 0.4


def looks_inverted(facts: Facts) -> bool:
    """Whether it is thin dark lines on white."""
    return facts.share(192) > 0.6 and facts.solid_black < 0.1 and facts.share(0, 127) > 0


def _is_drawn_on_white(facts: Facts) -> bool:
    """Whether what is dark in a bright map are strokes: the longer for their width, the less wide the white.

    What black is left over between many thick white edges is specks, and hardly narrower than the edges.
    """
    black = 255 - facts.white
    if not cv2.countNonZero(black):
        return False
    stroke, ground = (_half_width(mask) for mask in (black, facts.white))
    areas = cv2.connectedComponentsWithStats(black)[2][1:, cv2.CC_STAT_AREA].astype(np.float64)
    usual = float((areas**2).sum() / areas.sum())  # the area of the piece that a black pixel belongs to
    length, room = usual / (2 * stroke) ** 2, ground / stroke
    return room > 2.5 and length > 3 and length * room > 60


def _half_width(mask: np.ndarray) -> float:
    """How far the inmost tenth of a mask's pixels lies at least from what is outside of it."""
    return float(np.percentile(cv2.distanceTransform(mask, cv2.DIST_L2, 3)[mask > 0], 90))


def edge_findings(facts: Facts) -> list[Finding]:
    """Return what is wrong with a canny map; it is known to be some map of lines."""
    inverted = error("inverted", "the edges are black on white; ControlNets read white on black", _INVERT)
    if looks_inverted(facts):
        return [inverted]
    if facts.share(128) > 0.6:
        if _is_drawn_on_white(facts):
            return [inverted, _THICK]
        return [error("full", f"{facts.share(128):.0%} of the pixels are edges", "raise the thresholds")]
    if facts.colourful > 0.03:
        return [
            error(
                "coloured",
                "the edges have colours: they were found in each channel on its own",
                "take the largest of the three channels at each pixel, or " + _MAKE,
            )
        ]
    if found := _grey(facts):
        return [found]
    return [found] if (found := _thick(facts)) else []


def line_findings(facts: Facts) -> list[Finding]:
    """Return what is wrong with soft edges, scribbles or line art, which may be grey and thick."""
    if facts.share(224) > 0.65 or (facts.share(170) > 0.65 and facts.share(0, 31) < 0.1):
        return [error("inverted", "the lines are dark on white; ControlNets read white on black", _INVERT)]
    if facts.coloured > 0.05:
        return [
            error("coloured", "the map has colours; lines are white on black", "make the map anew, in grey")
        ]
    return []


def _grey(facts: Facts) -> Finding | None:
    grey = facts.share(1, 254) * facts.pixels
    if grey <= 0.01 * facts.marked:
        return None
    share = f"{grey / facts.marked:.0%} of what is drawn is neither black nor white"
    # Resizing and blurring dim lines one pixel wide; JPEG keeps most of them nearly white, and leaves ripple.
    if facts.share(239) > 0.5 * facts.share(128) or has_ringing(facts):
        return warning(
            "jpeg",
            f"the edges are damaged by JPEG: {share}",
            f"save maps as PNG; {_MAKE}. Setting values from 128 to 255 and all others to 0 mends most of it",
        )
    return warning(
        "grey",
        f"the edges are grey, as after smooth resizing or blurring: {share}",
        f"{_MAKE}; resize binary maps with `controlkit.images.resize_lines`",
    )


def _thick(facts: Facts) -> Finding | None:
    if facts.solid_white > 0.05:
        return _THICK
    square = cv2.erode(facts.white, np.ones((2, 2), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0)
    square = cv2.dilate(square, np.ones((2, 2), np.uint8), anchor=(0, 0))
    if cv2.countNonZero(square) > 0.6 * cv2.countNonZero(facts.white):
        return warning(
            "thick",
            "the edges are two pixels thick, as after enlarging without smoothing",
            f"{_MAKE}; resize binary maps with `controlkit.images.resize_lines`",
        )
    return None

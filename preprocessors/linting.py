"""Looking for mistakes in maps: inverted, damaged, of another kind, in wrong colours, of another size.

Most disappointments with ControlNets start with a map that is not what the network learned, and nothing
says so: the picture just does not follow. These checks take a few milliseconds, and each was measured on
good and damaged maps (`tests/benchmarks/lint.py`); where they cannot be sure they keep silent.
"""

import io
import os
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from controlkit.images import load_map, load_picture
from controlkit.naming import unknown
from controlkit.preprocessors.lint_depth import (
    bands,
    colour_map,
    depth_findings,
    facing,
    hole_findings,
    normal_findings,
    without_holes,
)
from controlkit.preprocessors.lint_edges import edge_findings, line_findings, looks_inverted, looks_thin
from controlkit.preprocessors.lint_facts import Facts, Finding, error, warning
from controlkit.preprocessors.lint_pose import Strokes, looks_drawn, may_be_faces, may_be_pose, pose_findings
from controlkit.preprocessors.maps import Map

if TYPE_CHECKING:
    from controlkit.images import Source

_LINES = ("scribble", "softedge", "hed", "pidinet", "mlsd", "lineart", "lineart_anime", "lineart_standard")
_FAMILY = {
    "canny": "canny",
    "openpose": "openpose",
    **dict.fromkeys(_LINES, "lines"),
    **dict.fromkeys(("depth", "midas", "zoe", "leres"), "depth"),
    **dict.fromkeys(("normal", "normalbae"), "normal"),
    "shuffle": "colours",
}
KINDS = tuple(sorted(_FAMILY))
"""The kinds of maps that have checks of their own."""

_NAMES = {
    "canny": "a map of thin edges (canny)",
    "openpose": "a drawn pose (openpose)",
    "lines": "a map of soft or thick lines (softedge, scribble)",
    "depth": "a depth map",
    "normal": "a map of normals",
}
# What a map may look like and still be of its family: damaged edges look soft, scribbles can be thin.
_PASSES_AS = {"canny": {"canny", "lines"}, "lines": {"canny", "lines"}}


def lint(map: "Source | Map", kind: str = "", picture: "Source | None" = None) -> list[Finding]:
    """Return what is wrong with a map, the worst first; an empty list for a good one.

    ``map`` is a :class:`Map` or whatever :func:`controlkit.images.load_picture` reads. ``kind`` is one of
    ``KINDS``; without it, it is the :class:`Map`'s own or a guess (:func:`guess_kind`), and where no guess is
    safe only what holds for every map is checked. With ``picture``, the sizes are compared.

    Raises:
        ValueError: an unknown kind; a map or picture that cannot be read.
    """
    style_is_known = False
    source: object = map
    if isinstance(map, Map):
        kind = kind or (map.kind if map.kind in _FAMILY else "")
        style_is_known = "style" in map.params
        map = map.image
    if kind and kind not in _FAMILY:
        raise unknown("map", kind, KINDS)
    facts = Facts(load_map(map))
    found = _content(facts, source, kind, style_is_known=style_is_known)
    if picture is not None:
        found += _size(facts, load_picture(picture))
    return sorted(found, key=lambda finding: finding.severity != "error")


def guess_kind(map: "Source | Map") -> str:
    """Return what kind of map it looks like, or "" if it looks like none.

    "canny", "openpose", "depth", "normal", or "softedge" for all soft or thick lines.

    Raises:
        ValueError: it cannot be read.
    """
    facts = Facts(load_map(map.image if isinstance(map, Map) else map))
    family = _family(facts, Strokes(facts))
    return "softedge" if family == "lines" else family


def _content(facts: Facts, source: object, kind: str, *, style_is_known: bool) -> list[Finding]:
    """What levels and colours say, whatever the map belongs to."""
    if facts.is_constant:
        clear = _transparency(source)
        if clear >= 1:
            return [error("transparent", "the map is fully transparent", "save it without an alpha channel")]
        if clear:
            what = "what is not transparent in the map is black, and so is what is behind it: nothing is seen"
            return [error("transparent", what, "draw it in white, and save it without an alpha channel")]
        return [_constant(facts, kind)]
    filled = facts
    if _FAMILY.get(kind) == "depth" and not looks_thin(facts):
        filled = without_holes(facts)
    found = _of_family(filled, kind, style_is_known=style_is_known)
    return found if "error" in {one.severity for one in found} else found + hole_findings(facts, filled)


def _of_family(facts: Facts, kind: str, *, style_is_known: bool) -> list[Finding]:
    """What is wrong with a map for its kind, or for what it looks like where none is said."""
    strokes = Strokes(facts)
    looks = _family(facts, strokes)
    family = _FAMILY.get(kind, looks)
    if found := _other_kind(facts, strokes, family, looks):
        return [found]
    if family in ("canny", "lines") and facts.share(48) * facts.pixels < _fewest(facts):
        return [_empty("hardly anything is drawn")]
    if family == "canny":
        return edge_findings(facts)
    if family == "lines":
        return line_findings(facts)
    if family == "openpose":
        return pose_findings(strokes, style_is_known=style_is_known) if len(strokes.colours) else []
    if family == "depth":
        return depth_findings(facts)
    return normal_findings(facts) if family == "normal" else []


def _fewest(facts: Facts) -> float:
    """How many pixels lines must have: a thousandth of the map, in large maps half the length of a side."""
    return min(0.001 * facts.pixels, 0.5 * facts.pixels**0.5)


def _constant(facts: Facts, kind: str) -> Finding:
    if not facts.level.any() and _FAMILY.get(kind) == "openpose":
        return _empty("nobody is in it")
    if not facts.level.any():
        return _empty("it is black")
    colour = ", ".join(str(level) for level in facts.image[0, 0])
    return error(
        "constant",
        f"every pixel is ({colour}): the map tells a network nothing",
        "look at the picture it was made from, and make it anew",
    )


def _empty(what: str) -> Finding:
    return warning(
        "empty",
        f"the map is empty: {what}",
        "look at the picture it was made from, and at the thresholds",
    )


def _other_kind(facts: Facts, strokes: Strokes, family: str, looks: str) -> Finding | None:
    """Return a finding if a map is surely of another family than it is said to be."""
    if family in ("", "colours") or looks in _PASSES_AS.get(family, {family}):
        return None
    if family == "openpose" and looks in ("", "canny", "lines") and may_be_faces(facts):
        return None
    if family == "openpose" and strokes.coloured > 0.5 and strokes.in_palette > 0.6:
        return None  # damaged, or on a background that outweighs it
    if family == "lines" and looks == "depth" and facts.share(0, 32) > 0.5:
        return None  # few lines, far apart and soft
    if family == "depth" and looks == "lines" and min(facts.height, facts.width) < 128:
        return None  # too small to tell a slit of light from a line
    if looks:
        return error(
            "wrong-kind", f"this looks like {_NAMES[looks]}", "name its kind, or give the right file"
        )
    photo = error(
        "photo",
        "this looks like a picture, not like a map",
        "extract the map first, with `controlkit preprocess`, or use --control instead of --map",
    )
    return photo if _is_picture(facts, strokes, family) else None


def _is_picture(facts: Facts, strokes: Strokes, family: str) -> bool:
    """Whether what looks like no map is surely none of this family, not even a damaged one."""
    if family == "lines":
        return (facts.middle > 0.95 and facts.share(0, 16) < 0.03) or (
            facts.colourful > 0.1 and facts.middle > 0.1
        )
    if family == "canny":
        filled = facts.middle > 0.85 and facts.share(0, 32) < 0.15 and facts.share(224) < 0.4
        return filled or (facts.colourful > 0.1 and facts.middle > 0.1)
    if family == "openpose":
        return bool(len(strokes.colours)) and not may_be_pose(strokes)
    if family == "depth":
        textured = facts.roughness > 0.2 and facts.middle > 0.3 and not bands(facts)
        return textured or (facts.coloured > 0.1 and not colour_map(facts))
    return not facing(facts)


def _family(facts: Facts, strokes: Strokes) -> str:
    """What a map looks like: a family of kinds, or ""."""
    if facts.colourful > 0.05:
        return _coloured_family(facts, strokes)
    if looks_thin(facts) or looks_inverted(facts):
        return "canny"
    if (
        facts.solid_white > 0.78
        and facts.solid_black > 0.78
        and facts.roughness < 0.12
        and facts.middle > 0.1
    ):
        return "depth"
    dark = facts.share(0, 32) > 0.4 and facts.share(128) < 0.4
    return "lines" if dark and facts.solid_white < 0.75 and facts.solid_black > 0.7 else ""


def _coloured_family(facts: Facts, strokes: Strokes) -> str:
    if facing(facts):
        return "normal"
    drawn = looks_drawn(strokes)
    if drawn and max(strokes.in_palette, strokes.in_inverted_palette) > 0.6:
        return "openpose"
    if colour_map(facts):
        return "depth"
    if drawn:
        return "openpose"
    thin = looks_thin(facts) and facts.middle < 0.05  # each channel's edges in that channel
    return "canny" if thin else ""


def _transparency(source: object) -> float:
    """The share of pixels that are more transparent than not."""
    if isinstance(source, np.ndarray):
        alpha = source[..., 3] if source.ndim == 3 and source.shape[2] == 4 else None
        if alpha is None:
            return 0.0
        return float((alpha < (0.5 if alpha.dtype.kind == "f" else 128)).mean())
    if isinstance(source, Image.Image):
        return _clear_share(source)
    if isinstance(source, (str, os.PathLike, bytes)):
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return _clear_share(image)
    return 0.0


def _clear_share(image: Image.Image) -> float:
    if not image.has_transparency_data:
        return 0.0
    return float((np.asarray(image.convert("RGBA"))[..., 3] < 128).mean())


def _size(facts: Facts, picture: np.ndarray) -> list[Finding]:
    height, width = picture.shape[:2]
    if (width, height) == (facts.width, facts.height):
        return []
    sizes = f"the map is {facts.width} x {facts.height}, its picture {width} x {height}"
    scale = (facts.width / width * facts.height / height) ** 0.5
    if abs(facts.width - width * scale) <= 1 and abs(facts.height - height * scale) <= 1:
        return [warning("size", f"{sizes}: another size", "make the map at its picture's size")]
    turned = " (turned by 90 degrees)" if (height, width) == (facts.width, facts.height) else ""
    return [
        error(
            "aspect",
            f"{sizes}: another shape{turned}, so the two do not lie on each other",
            "make the map anew from this picture; ControlKit's maps have exactly their picture's size",
        )
    ]

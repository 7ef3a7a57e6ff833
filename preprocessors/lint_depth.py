"""What can be wrong with depth maps and maps of normals: polarity, colours, bands, channel order."""

from functools import cache

import cv2
import numpy as np

from controlkit.preprocessors.lint_facts import Facts, Finding, error, sample, warning

_MAKE = "make the map anew with `controlkit preprocess depth PICTURE`"
_COLOUR_MAPS = {
    "inferno": cv2.COLORMAP_INFERNO,
    "magma": cv2.COLORMAP_MAGMA,
    "plasma": cv2.COLORMAP_PLASMA,
    "viridis": cv2.COLORMAP_VIRIDIS,
    "turbo": cv2.COLORMAP_TURBO,
    "jet": cv2.COLORMAP_JET,
    "rainbow": cv2.COLORMAP_RAINBOW,
    "hot": cv2.COLORMAP_HOT,
    "cividis": cv2.COLORMAP_CIVIDIS,
}
# ColorBrewer's eleven colours; depth networks' demonstrations show them.
_SPECTRAL = bytes.fromhex("9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2")
_SPECK = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9))
_FEWEST_HOLES = 0.003  # of the map; good maps have a black pixel here and there
_MOST_HOLES = 0.4  # of what is not black; between lines there is more
_FEWEST_SPECKS = 24
_ON_THE_MAP = 14.0  # levels: the usual distance of a sample's colours from the colour map's


def depth_findings(facts: Facts) -> list[Finding]:
    """Return what is wrong with a depth map; it is known to be one."""
    if facts.coloured > 0.02:
        name = colour_map(facts) or "a colour map"
        return [
            error(
                "colour-map",
                f"the depth is shown in colours ({name}); ControlNets read grey, near is white",
                f"{_MAKE}, or take the grey depth from the tool that made it",
            )
        ]
    if facts.share(26) == 0:
        return [
            error(
                "dark",
                f"the depth is nearly black: its levels end at {int(facts.level.max())} of 255",
                "stretch it to 0 to 255; metres or 16-bit values become a map with depth_to_map(1 / depth)",
            )
        ]
    found = []
    if _far_is_white(facts):
        found.append(
            warning(
                "far-white",
                "far seems to be white: bright at the top and dark at the bottom; near should be white",
                "invert it (255 minus every value), or for metres use depth_to_map(1 / depth)",
            )
        )
    if levels := bands(facts):
        found.append(
            warning(
                "banded",
                f"the depth has bands: smooth surfaces in steps, {levels} levels in all",
                f"convert it from 16 bits or float, not from few levels; {_MAKE}",
            )
        )
    return found


def without_holes(facts: Facts) -> Facts:
    """The map with its black specks filled, as sensors leave them; the same facts where there are none.

    A speck is black, narrow, and surrounded by what is not; black things and shadows are wider.
    """
    closed = cv2.morphologyEx(facts.image, cv2.MORPH_CLOSE, _SPECK)
    specks = (facts.level == 0) & (closed.max(axis=2) > 40)
    if not _FEWEST_HOLES * facts.pixels < np.count_nonzero(specks) < _MOST_HOLES * facts.marked:
        return facts
    if cv2.connectedComponents(specks.astype(np.uint8))[0] <= _FEWEST_SPECKS:  # slits between things
        return facts
    return Facts(np.where(specks[..., None], closed, facts.image))


def hole_findings(facts: Facts, filled: Facts) -> list[Finding]:
    """What is wrong with a depth map that equals ``filled`` but for its holes."""
    if filled is facts:
        return []
    share = np.count_nonzero(facts.level != filled.level) / facts.pixels
    return [
        warning(
            "holes",
            f"the depth has black specks ({share:.1%} of it): pixels without a measurement read as far away",
            "fill them, as by `controlkit preprocess depth FILE model=file fill=true` from what was measured",
        )
    ]


def colour_map(facts: Facts) -> str:
    """Return the name of the colour map that the colours come from, or ""."""
    if facts.coloured < 0.2:
        return ""
    colours = sample(facts.image, 16).reshape(-1, 1, 3).astype(np.int16)
    name, usual = "", _ON_THE_MAP
    for candidate, table in _tables().items():
        near = np.abs(colours - table[None]).max(axis=2).min(axis=1)
        distance = float(np.percentile(near, 80))
        if distance < usual:
            name, usual = candidate, distance
    return name.removesuffix("-bgr")


def facing(facts: Facts) -> str:
    """Return which channel points to the viewer ("red", "green", "blue", "away"), "" if it is no normals."""
    if facts.coloured < 0.3:
        return ""
    small = sample(facts.image, 128)
    vectors = small.reshape(-1, 3).astype(np.float32) / 127.5 - 1
    vectors = vectors[(vectors > -1).any(axis=1)]  # black is no normal
    if len(vectors) < 0.2 * small.shape[0] * small.shape[1]:
        return ""
    lengths = np.linalg.norm(vectors, axis=1)
    if np.mean(np.abs(lengths - 1) < 0.12) < 0.8:
        return ""
    means = vectors.mean(axis=0)
    seen = (vectors > -0.1).mean(axis=0) > 0.97  # channels that point to the viewer nearly everywhere
    if seen[2]:
        return "blue"
    if seen[0] and means[0] > means[2] + 0.3:
        return "red"
    if seen[1] and means[2] < -0.2:
        return "green"
    return "away" if np.mean(vectors[:, 2] < 0.1) > 0.97 and means[2] < -0.2 else "blue"


def normal_findings(facts: Facts) -> list[Finding]:
    """Return what is wrong with a map of normals; it is known to be one."""
    towards = facing(facts)
    if towards == "red":
        return [
            error(
                "channels",
                "the normals are in BGR order: red points to the viewer, and blue should",
                "exchange red and blue (`map[..., ::-1]` in numpy); OpenCV's imread and imwrite use BGR",
            )
        ]
    if towards in ("green", "away"):
        return [
            error(
                "channels",
                "the normals do not point to the viewer with blue, as ControlNets read them",
                "convert them: red points left, green up, blue to the viewer; each from -1..1 to 0..255",
            )
        ]
    return []


@cache
def _tables() -> dict[str, np.ndarray]:
    """The colours of each colour map, int16 (52, 3), in RGB and with red and blue exchanged."""
    grey = np.arange(0, 256, 5, dtype=np.uint8)[:, None]
    tables = {name: cv2.applyColorMap(grey, code)[:, 0, ::-1] for name, code in _COLOUR_MAPS.items()}
    anchors = np.frombuffer(_SPECTRAL, np.uint8).reshape(11, 3)
    at = np.linspace(0, 10, 52)
    tables["spectral"] = np.stack([np.interp(at, range(11), anchors[:, c]) for c in range(3)], axis=1)
    both = tables | {f"{name}-bgr": table[:, ::-1] for name, table in tables.items()}
    return {name: table.astype(np.int16) for name, table in both.items()}


def _far_is_white(facts: Facts) -> bool:
    """Whether the picture is near at the top and far at the bottom, and not as under a ceiling.

    Floors, tables and streets make the bottom of nearly every picture nearer than its top. Where the top is
    bright and the bottom dark, it is either a ceiling, which gets steadily brighter towards the top edge, or
    a far wall or sky in white, which is flat there while the floor below it changes.
    """
    small = cv2.resize(facts.image[..., 1], (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32)
    low, high = np.percentile(small, [1, 99])
    if high - low < 16:
        return False
    small = np.clip((small - low) / (high - low), 0, 1)
    rows = small.mean(axis=1)
    falls = rows[-16:].mean() - rows[:16].mean() < -0.25
    if not falls or np.corrcoef(rows, np.arange(64))[0, 1] > -0.5:
        return False
    profile = np.median(small, axis=1)
    slope_at_top = profile[:4].mean() - profile[14:18].mean()
    slope_at_bottom = profile[46:50].mean() - profile[-4:].mean()
    flat_top = slope_at_top < slope_at_bottom - 0.05 and np.percentile(small[:4], 20) > 0.5
    white_sky = np.mean(small[:3] > 0.985) > 0.9
    sides = min(np.median(small[:21, :3]), np.median(small[:21, -3:]))  # what is far surrounds things
    return bool((flat_top or white_sky) and sides > 0.5)


def bands(facts: Facts) -> int:
    """Return how many levels there are if slopes go in steps of several levels; 0 for a smooth map.

    Flat things in front of one another have few levels, too; but from one to the next they jump anywhere,
    where bands go from each level to the next one there is.
    """
    present = np.flatnonzero(facts.histogram > 0.0005 * facts.pixels)
    if not 6 <= len(present) <= 64 or np.median(np.diff(present)) < 4:
        return 0
    if facts.histogram[present].sum() < 0.98 * facts.pixels:
        return 0
    rank = np.zeros(256, np.int16)
    rank[present] = np.arange(len(present))
    ranks = rank[facts.level]
    jumps = np.abs(np.concatenate([np.diff(ranks, axis=0).ravel(), np.diff(ranks, axis=1).ravel()]))
    counts = np.bincount(jumps[jumps > 0], minlength=2)
    steps = int(counts.sum())
    wide = steps < 0.2 * jumps.size  # a slope of few pixels skips levels as well
    return len(present) if wide and counts[1] > 0.5 * steps and steps else 0

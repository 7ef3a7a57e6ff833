"""`controlkit demo`: the whole of ControlKit in one picture, with the bundled models, on any machine.

A scene is rendered; its edges, pose and depth are extracted by the real preprocessors; pictures are
generated that follow each map, and two at once, under three prompts; and each is scored by extracting its
map again. The same prompts and seeds without a map are the measure of what the map adds.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from controlkit import figures, metrics, preprocessors, sheets
from controlkit.generate_controls import extractor_options
from controlkit.notices import Report
from controlkit.startup import nothing_collected

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.control import Control
    from controlkit.preprocessors import Map, Preprocessor

ROWS = (("canny",), ("openpose",), ("depth",), ("openpose", "depth"))  # the maps of each row of the sheet
SHARED_SCALE = 0.7  # of each control where two act at once
SAMPLES = 3
STEPS = 20
COLOUR_STRIDE = 4  # from one sample's colours to the next one's, in the palette's order
MEASURES = {
    "canny": "edges found (F1, best 1)",
    "openpose": "joints found (PCK, best 1)",
    "depth": "depth error (0-255, best 0)",
}


@dataclass(frozen=True)
class Score:
    """How well the samples of one row follow one of its maps, and what the prompt alone gives, on average."""

    row: str
    measure: str
    followed: float
    prompt_only: float


@dataclass(frozen=True, eq=False)
class DemoResult:
    """sheet: uint8 (H, W, 3), one row per map. picture: the scene's, uint8 (128, 128, 3). caption: its own.

    seconds: for everything, imports included.
    """

    sheet: np.ndarray
    picture: np.ndarray
    caption: str
    scores: tuple[Score, ...]
    seconds: float

    def table(self) -> list[str]:
        """The scores as lines of text in columns."""
        lines = [f"{'map':<18}{'measure':<30}{'with map':>10}{'without':>10}"]
        for score in self.scores:
            values = f"{score.followed:>10.2f}{score.prompt_only:>10.2f}"
            lines.append(f"{score.row:<18}{score.measure:<30}{values}")
        return lines


def run_demo(seed: int, *, report: Report) -> DemoResult:
    """Render scene `seed` of the demonstration split, follow its maps, and lay everything out.

    Raises ValueError for a seed outside the renderer's range, or when the bundled models are missing.
    """
    started = time.monotonic()
    report.status("loading the libraries and the bundled models")
    from controlkit.base import load_base

    scene = figures.render(seed, split="demo")
    with nothing_collected():
        base = load_base("tiny")
    kinds = list(MEASURES)
    extractors = {kind: preprocessors.get(kind, **extractor_options(kind, bundled=True)) for kind in kinds}
    report.status("extracting the edges, the pose and the depth of the scene")
    maps = {kind: extractors[kind](scene.picture) for kind in kinds}
    prompts = [recoloured(scene.caption, COLOUR_STRIDE * k) for k in range(SAMPLES)]
    report.status(f"generating {SAMPLES} pictures per row, {STEPS} steps each")
    controls = [_controls(base, maps, row) for row in ((), *ROWS)]
    samples = _samples(base, prompts, controls, seed=seed, report=report)
    prompt_only = {kind: _mean_score(extractors[kind], samples[0], maps[kind]) for kind in kinds}
    scores = tuple(
        Score(
            " + ".join(row),
            MEASURES[kind],
            _mean_score(extractors[kind], pictures, maps[kind]),
            prompt_only[kind],
        )
        for row, pictures in zip(ROWS, samples[1:], strict=True)
        for kind in row
    )
    cells = [
        _cells(scene.picture, maps, row, pictures, prompts)
        for row, pictures in zip(ROWS, samples[1:], strict=True)
    ]
    sheet = sheets.contact_sheet(
        cells, title=f"Each row: a picture, its map, and {SAMPLES} pictures that follow the map"
    )
    return DemoResult(sheet, scene.picture, scene.caption, scores, time.monotonic() - started)


def _controls(base: Base, maps: Mapping[str, Map], row: Sequence[str]) -> list[Control]:
    from controlkit.adapters import default_adapter, load_adapter
    from controlkit.control import Control

    scale = 1.0 if len(row) == 1 else SHARED_SCALE
    return [
        Control(load_adapter(default_adapter(kind, base), base=base), maps[kind].image, scale=scale)
        for kind in row
    ]


def _samples(
    base: Base,
    prompts: Sequence[str],
    rows: Sequence[Sequence[Control]],
    *,
    seed: int,
    report: Report,
) -> list[list[np.ndarray]]:
    """The pictures of every row, one per prompt; column k has the same prompt and noise in every row."""
    from controlkit.sampling import generate

    total = len(rows) * len(prompts) * STEPS
    finished = 0
    samples: list[list[np.ndarray]] = []
    for controls in rows:
        pictures: list[np.ndarray] = []
        for k, prompt in enumerate(prompts):
            pictures += generate(
                base,
                prompt,
                controls=controls,
                steps=STEPS,
                seeds=[seed + k],
                callback=partial(_report_progress, report, finished, total),
            )
            finished += STEPS
        samples.append(pictures)
    return samples


def _report_progress(
    report: Report, before: int, total: int, done: int, _steps: int, _latents: object
) -> None:
    report.progress(before + done, total)


def _mean_score(extract: Preprocessor, pictures: Sequence[np.ndarray], wanted: Map) -> float:
    return fmean(_score(extract(picture), wanted) for picture in pictures)


def _score(found: Map, wanted: Map) -> float:
    """How well a sample's own map agrees with the map that was asked for, by the measure of its kind."""
    if wanted.kind == "canny":
        return metrics.edge_f1(found.image, wanted.image).f1
    if wanted.kind == "depth":
        return metrics.depth_rmse_255(found.image, wanted.image)
    assert found.poses is not None
    assert wanted.poses is not None
    if not len(wanted.poses.people):
        return float("nan")  # nobody was found in the picture: nothing to follow
    true = wanted.poses.people[0]
    visible = true[true[:, 2] > 0]
    height = float(np.ptp(visible[:, 1]))
    nobody = np.zeros((1, 18, 3))
    return metrics.pck([*found.poses.people, *nobody][0], true, size=max(height, 1.0))


def recoloured(caption: str, shift: int) -> str:
    """The caption with every colour replaced by the one `shift` places on in the palette, and its article."""
    names = list(figures.COLOURS)

    def other(match: re.Match[str]) -> str:
        colour = names[(names.index(match[1]) + shift) % len(names)]
        return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"

    return re.sub(rf"\ban? ({'|'.join(names)})\b", other, caption)


def _cells(
    picture: np.ndarray,
    maps: Mapping[str, Map],
    row: Sequence[str],
    pictures: Sequence[np.ndarray],
    prompts: Sequence[str],
) -> list[sheets.Cell]:
    """One row of the sheet: the picture, its map (two as one, the second dimmed), the samples."""
    first, *others = (maps[kind].image for kind in row)
    shown = np.max([first, *(image // 2 for image in others)], axis=0)
    samples = [(sample, _things(prompt)) for sample, prompt in zip(pictures, prompts, strict=True)]
    return [(picture, "picture"), (shown, " + ".join(row)), *samples]


def _things(prompt: str) -> str:
    """The start of a caption as a label: "red figure, blue cube"."""
    return ", ".join(re.findall(r"\ban? (\w+ \w+)", prompt)[:2])

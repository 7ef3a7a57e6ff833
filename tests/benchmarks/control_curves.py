"""How control depends on its settings: the bundled canny adapter by scale, window, mode, scheduler and steps.

`uv run python tests/benchmarks/control_curves.py --scenes 16` takes about twenty minutes of one core and
writes control_curves.json (every figure), control_curves.md (the table) and control_curves.svg (the curves)
beside itself. What is measured already is kept: the same command goes on, and --anew begins again.

Scene k of the bundled world's held-out scenes is generated with seed k, 20 steps of ddim and the base's
guidance, but for the one setting that is varied. Two scores, each the mean over the scenes: the F1 of the
edges with the map's, in units of what true pictures reach through the autoencoder; and the share of the parts
named in the caption that have their colour.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from controlkit import files
from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.figures import Scene, render
from controlkit.preprocessors import get
from controlkit.rules import MODES
from controlkit.sampling import generate
from controlkit.schedulers import SCHEDULERS
from controlkit.training.quality import Examiner, through_vae
from controlkit.training.reporting.charts import Series, line_chart

PLAIN = {"scale": 1.0, "end": 1.0, "mode": "balanced", "scheduler": "ddim", "steps": 20}  # the defaults
SAME = {"guess": "control", "more-control": "guess-diffusers"}  # modes that are the same for SD1
SWEEPS: dict[str, list[dict[str, Any]]] = {
    "scale": [{"scale": s} for s in (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)],
    "end": [{"end": e} for e in (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)],
    "start": [{"start": s} for s in (0.1, 0.3, 0.5)],
    "mode": [{"mode": mode} for mode in MODES if mode not in SAME],
    "scheduler": [{"scheduler": name} for name in SCHEDULERS],
    "steps, ddim": [{"steps": n} for n in (4, 6, 8, 12, 20, 40)],
    "steps, dpm++": [{"steps": n, "scheduler": "dpm++"} for n in (4, 6, 8, 12)],
}
OF_CONTROL = ("scale", "start", "end", "mode")


class Bench:
    """The bundled base and its canny adapter, and held-out scenes."""

    def __init__(self, scenes: int) -> None:
        self.base, self.canny, self.examiner = load_base("tiny"), get("canny"), Examiner()
        self.adapter = load_adapter("canny", base=self.base)
        self.scenes = [render(k, split="validation") for k in range(scenes)]

    def ceiling(self) -> float:
        """The F1 of the edges of true pictures through the autoencoder."""
        return mean(
            self.scored(through_vae(self.base, scene.picture), scene)["edge F1"] for scene in self.scenes
        )

    def scored(self, picture: Any, scene: Scene) -> dict[str, float]:
        return self.examiner.scores(picture, scene, kinds=("canny",))

    def measure(self, setting: dict[str, Any]) -> dict[str, float]:
        """The mean scores of the pictures made under a setting."""
        own = {key: value for key, value in setting.items() if key in OF_CONTROL}
        rest = {key: value for key, value in setting.items() if key not in OF_CONTROL}
        found = []
        for k, scene in enumerate(self.scenes):
            control = Control(self.adapter, self.canny(scene.picture).image, **own)
            (picture,) = generate(self.base, scene.caption, controls=[control], seeds=[k], **rest)
            found.append(self.scored(picture, scene))
        return {key: round(mean(one[key] for one in found), 4) for key in ("edge F1", "colours")}


def measure_all(bench: Bench, known: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every figure so far, after each that is new."""
    if "ceiling" not in known:
        known |= {"scenes": len(bench.scenes), "ceiling": round(bench.ceiling(), 4), "figures": {}}
    for settings in SWEEPS.values():
        for setting in settings:
            key = _name(setting)
            if key not in known["figures"]:
                known["figures"][key] = bench.measure(setting)
                yield known


def _name(setting: dict[str, Any]) -> str:
    """What a setting is called; the defaults are one, whatever is varied."""
    if all(PLAIN.get(key) == value for key, value in setting.items()):
        return "the defaults"
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def _share(known: dict[str, Any], setting: dict[str, Any]) -> float:
    return float(known["figures"][_name(setting)]["edge F1"] / known["ceiling"])


def table(known: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        f"Canny, {known['scenes']} held-out scenes of the bundled world, 20 steps of ddim where nothing else"
        " is said. Control: the edges' F1 with the map, of what true pictures reach through the autoencoder.",
        "Colours: the share of the named parts that have their colour.",
        "",
        "| setting | control | colours |",
        "|---|---|---|",
    ]
    done = set()
    for settings in SWEEPS.values():
        for setting in settings:
            name = _name(setting)
            if name not in done:
                done.add(name)
                colours = known["figures"][name]["colours"]
                lines.append(f"| {name} | {_share(known, setting):.3f} | {colours:.3f} |")
    return "\n".join(lines) + "\n"


def curves(known: dict[str, Any]) -> str:
    """Control and colours by scale and by window, one above the other, as one picture."""
    charts = {}
    for title, sweep, key in (
        ("by strength of the control", "scale", "scale"),
        ("by end of the window, as a share of the steps", "end", "end"),
    ):
        colours = {_name(s): known["figures"][_name(s)]["colours"] for s in SWEEPS[sweep]}
        points = [(float(s[key]), _share(known, s), colours[_name(s)]) for s in SWEEPS[sweep]]
        series = [
            Series("control", [(x, control) for x, control, _ in points], 0),
            Series("colours", [(x, colours) for x, _, colours in points], 1),
        ]
        charts[title] = line_chart(series, label=title, percent=True)
    return figure(charts)


def figure(charts: dict[str, str]) -> str:
    """Charts with their titles, below each other, in one SVG with its colours."""
    from controlkit.training.reporting.charts import CSS

    height, width = 310, 580
    shown = "".join(
        f'<text x="20" y="{24 + i * height}" font-size="14" font-weight="600" fill="#202124">{title}</text>'
        f'<svg x="10" y="{34 + i * height}" width="{width - 20}" height="{height - 44}">{chart}</svg>'
        for i, (title, chart) in enumerate(charts.items())
    )
    style = ":root{--c0:#3b6fb6;--c1:#c0562b;--ink:#202124;--faint:#5f6368;--grid:#e3e5e8}" + CSS
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height * len(charts)}"'
        f' font-family="system-ui,sans-serif"><style>{style}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{shown}</svg>\n'
    )


def main() -> None:
    """Measure, and write what was found."""
    parser = argparse.ArgumentParser(description="Control by its settings, on the bundled world.")
    parser.add_argument("--scenes", type=int, default=16)
    parser.add_argument("--anew", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if given.out.exists() and not given.anew:
        known = json.loads(given.out.read_text())
        assert known["scenes"] == given.scenes, f"{given.out} is of {known['scenes']} scenes: use --anew"
    for found in measure_all(Bench(given.scenes), known):
        files.write_json(given.out, found)
        print(list(found["figures"].items())[-1], flush=True)
    given.out.with_suffix(".md").write_text(table(known), encoding="utf-8")
    given.out.with_suffix(".svg").write_text(curves(known), encoding="utf-8")


if __name__ == "__main__":
    main()

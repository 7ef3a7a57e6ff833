"""Putting trained models into the package: `controlkit/tiny/`, each with its recipe, and a card that says
how good.

`python -m controlkit.training.bundle RUNS [PART ...]` copies the results of the `bundled-*` recipes from a
folder of runs; `controlkit measure --card` then measures them and writes the card.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import controlkit
from controlkit import files
from controlkit.folders import read_header
from controlkit.naming import unknown
from controlkit.training.quality import FOLLOWS, KINDS, LOWER_IS_BETTER, Examination

TINY = Path(controlkit.__file__).parent / "tiny"
# folder in controlkit/tiny: (runs, each begun where the one before ended; result's folder; what it is)
PARTS: Mapping[str, tuple[tuple[str, ...], str, str]] = {
    "base": (
        ("bundled-base", "bundled-base-longer"),
        "result",
        "Stable Diffusion pipeline folder (v-prediction, 128×128)",
    ),
    "controlnet-canny": (("bundled-canny", "bundled-canny-longer"), "controlnet", "ControlNet for edge maps"),
    "controlnet-openpose": (
        ("bundled-openpose", "bundled-openpose-longer"),
        "controlnet",
        "ControlNet for poses",
    ),
    "controlnet-depth": (
        ("bundled-depth", "bundled-depth-longer"),
        "controlnet",
        "ControlNet for depth maps",
    ),
    "pose": (
        ("bundled-pose-estimator", "bundled-pose-estimator-longer"),
        "result",
        "pose estimator, ViTPose classes",
    ),
    "depth": (
        ("bundled-depth-estimator", "bundled-depth-estimator-longer"),
        "result",
        "depth estimator, Depth Anything classes",
    ),
}
# runs whose results are inside `base`
_ALSO = ("bundled-vae", "bundled-vae-details", "bundled-vae-decoder", "bundled-text")
CARD, QUALITY = "README.md", "quality.json"


def all_runs() -> list[str]:
    """Every run that the bundled models come from, in the order in which they can be repeated."""
    first = [runs[0] for runs, _, _ in PARTS.values()]
    return [*_ALSO, *first, *(run for runs, _, _ in PARTS.values() for run in runs[1:])]


def collect(runs: Path, target: Path = TINY, *, parts: Sequence[str] = ()) -> None:
    """Copy the result of each part, or of the named ones, and the recipes that made it.

    The base goes first and alone (`parts=["base"]`): adapters are trained beside the one that is bundled.
    Raises ValueError, before anything is copied, for an unknown part and for a run that has no result or is
    missing.
    """
    for name in parts:
        if name not in PARTS:
            raise unknown("part", name, PARTS)
    chosen = {name: part for name, part in PARTS.items() if name in (parts or PARTS)}
    needed = [run for names, _, _ in chosen.values() for run in names]
    needed += _ALSO if "base" in chosen else ()
    for run in needed:
        if not (runs / run / "config.toml").is_file():
            raise ValueError(f"no run in {runs / run}: run `controlkit train {run}` first")
    for (*_, run), result, _ in chosen.values():
        source = runs / run / result
        if not (source / "config.json").is_file() and not (source / "model_index.json").is_file():
            raise ValueError(f"no trained model in {source}: run `controlkit train {run}` first")
    (target / "recipes").mkdir(parents=True, exist_ok=True)
    for name, ((*_, run), result, _) in chosen.items():
        with files.replace_folder(target / name) as folder:
            shutil.copytree(runs / run / result, folder, dirs_exist_ok=True)
    for run in needed:
        files.write_bytes(target / "recipes" / f"{run}.toml", (runs / run / "config.toml").read_bytes())


def write_card(examination: Examination, target: Path = TINY) -> None:
    """Write what was measured: numbers for machines (quality.json), a page for people (README.md)."""
    files.write_json(target / QUALITY, {"scenes": examination.scenes, "scores": dict(examination.scores)})
    sections = [
        _introduction(),
        _parts_table(target),
        _heading(examination),
        *quality_table(examination),
        _footnotes(target),
    ]
    files.write_text(target / CARD, "\n\n".join(sections) + "\n")


def quality_table(examination: Examination) -> list[str]:
    """The examination as Markdown tables: how maps are followed, and colours of the captions."""
    rows = [
        "| score | floor | ceiling | true picture | adapter | of the ceiling |",
        "|---|---|---|---|---|---|",
    ]
    for kind in (kind for kind in KINDS if kind in examination.scores):
        for score in (FOLLOWS[kind], "silhouette IoU"):
            values = [examination.scores[row][score] for row in ("floor", "ceiling", "true", kind)]
            share = f"{examination.of_ceiling(kind, score):.2f}"
            note = " (less is better)" if score in LOWER_IS_BETTER else ""
            rows.append(
                f"| {kind}: {score}{note} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {share} |"
            )
    colours = [name for name in examination.scores["floor"] if name.startswith("colour")]
    table = [f"| colours right | {' | '.join(name.removeprefix('colour of ') for name in colours)} |"]
    table.append("|---" * (len(colours) + 1) + "|")
    for row in ("floor", *(kind for kind in KINDS if kind in examination.scores), "ceiling"):
        label = {"floor": "no control", "ceiling": "true picture through the autoencoder"}.get(row, row)
        table.append(
            f"| {label} | " + " | ".join(f"{examination.scores[row][c]:.1%}" for c in colours) + " |"
        )
    return ["\n".join(rows), "\n".join(table)]


def _introduction() -> str:
    return (
        "# The bundled models\n\n"
        "A tiny Stable Diffusion with its real architecture and real classes, three ControlNets and two"
        " estimators, trained by this project's own code on pictures that `controlkit.figures` renders. They"
        " know that world and nothing else: twelve colours, four kinds of object, one figure. Other software"
        " loads the folders as they are (diffusers, transformers). Weights are half precision; compute with"
        " them in float32."
    )


def _parts_table(target: Path) -> str:
    rows = ["| folder | what | parameters | MB | recipe | seed | steps |", "|---|---|---|---|---|---|---|"]
    total = 0.0
    for name, (runs, _, what) in PARTS.items():
        weights = list((target / name).rglob("*.safetensors"))
        megabytes = sum(path.stat().st_size for path in weights) / 1e6
        total += megabytes
        recipes = [_recipe(target, run) for run in runs]
        count = sum(_parameters(path) for path in weights) / 1e6
        cells = (
            f"`{name}/`",
            what,
            f"{count:.2f} M",
            f"{megabytes:.1f}",
            ", ".join(f"[{run}](../../training/recipes/{run}.toml)" for run in runs),
            ", ".join(str(recipe["seed"]) for recipe in recipes),
            " + ".join(str(recipe["steps"]) for recipe in recipes),
        )
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*rows, f"| all | | | {total:.1f} | | | |"])


def _recipe(target: Path, run: str) -> dict[str, object]:
    return tomllib.loads((target / "recipes" / f"{run}.toml").read_text(encoding="utf-8"))


def _parameters(path: Path) -> int:
    """Number of weights in a safetensors file, from its header."""
    entries = [entry for name, entry in read_header(path).items() if name != "__metadata__"]
    return sum(math.prod(entry["shape"]) for entry in entries)


def _heading(examination: Examination) -> str:
    n = examination.scenes
    return (
        f'## Measured quality\n\nOn {n} held-out scenes (seeds 0 to {n - 1} of the "validation" split), DDIM,'
        f" 20 steps, the usual guidance, one picture per scene and adapter,"
        f" by `controlkit measure -n {n} --card`. Floor: the same prompts and seeds without control. Ceiling:"
        " the true picture passed through the autoencoder. Scores as `controlkit.training.quality` defines"
        " them; maps are exact (the picture's"
        " edges, the renderer's joints and depth)."
    )


def _footnotes(target: Path) -> str:
    also = ", ".join(f"[{run}](../../training/recipes/{run}.toml)" for run in _ALSO)
    lines = [
        f"`base/` also holds what {also} made: the autoencoder, its decoder trained on, and the text encoder."
    ]
    for part in ("pose", "depth"):
        quality = json.loads((target / part / QUALITY).read_text(encoding="utf-8"))
        lines.append(
            f"`{part}/` on true held-out pictures: "
            + ", ".join(f"{k}: {v:.3g}" for k, v in quality.items())
            + "."
        )
    lines.append("`recipes/` holds the complete settings of each training as it was run.")
    return "\n\n".join(lines)


if __name__ == "__main__":
    try:
        collect(Path(sys.argv[1] if len(sys.argv) > 1 else "runs"), parts=sys.argv[2:])
    except ValueError as error:
        sys.exit(f"error: {error}")

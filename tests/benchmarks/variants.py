"""The networks that can be trained, compared: what they hold, what they cost, and how well they are followed.

`uv run python tests/benchmarks/variants.py` takes its time on two cores and writes `variants.json`
and `variants.md` beside itself. Each variant is trained on the bundled world by the recipe tiny-canny, on as
many pairs, at the recipe's rates (`--only train`; runs are kept in `--runs` and gone on with); one network
for three kinds of maps is trained beside them on as many pairs. Scores are those of `training/quality.py` on
held-out scenes. Costs are measured in one process, round by round in turn (`--only time`): CPU time of one
thread, a training step of 16 pairs, and a picture of 20 steps, in units of one without control.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controlkit.training.config import load_recipe

VARIANTS = ("controlnet", "control-lora", "controlnet-xs", "t2i-adapter", "lite")
KINDS = ("canny", "openpose", "depth")
SCENES, ROUNDS = 48, 7
HERE = Path(__file__).parent


def settings(variant: str, runs: Path) -> list[str]:
    """What is changed in the recipe tiny-canny."""
    changes = [f"adapter={variant}", f"out={runs / variant}", "sample_every=0", "threads=1"]
    changes += [f"score_scenes={SCENES}", "monitor_every=0"]
    if variant == "controlnet-union":
        changes += [f"data.map_column={json.dumps(KINDS)}", "map=several"]
    return changes


def train(variant: str, runs: Path) -> None:
    """Train a variant in a process of its own, or go on with it, unless it is done."""
    if not (runs / variant / "scores.json").is_file():
        command = [sys.executable, "-m", "controlkit", "train", "tiny-canny", *settings(variant, runs)]
        subprocess.run(command, check=True)


def learned(variant: str, runs: Path) -> dict[str, Any]:
    """Scores, weights and peak memory of a finished training."""
    from safetensors import safe_open

    folder = runs / variant
    scores = json.loads((folder / "scores.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = sorted((folder / "checkpoints").glob("*/weights.safetensors"))[-1]
    with safe_open(newest, "pt") as file:
        trained = [key for key in file.keys() if key.startswith("model.")]  # noqa: SIM118
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in trained)
    return {
        "trained": count,
        "peak_mb": max(line["peak_mb"] for line in lines if "peak_mb" in line),
        "scores": scores,
    }


def paired(work: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds of one thread for each work, medians over rounds in turn."""
    spent: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS + 1):
        for name in list(work) if number % 2 else list(work)[::-1]:
            started = time.thread_time()
            work[name]()
            spent[name].append(time.thread_time() - started)
    return {name: statistics.median(times[1:]) for name, times in spent.items()}


def step_times(runs: Path) -> dict[str, float]:
    """Seconds of a training step, forward and back, of 16 pairs."""
    from controlkit.training.adapter import ControlNetTask
    from controlkit.training.machine import Machine

    def step(variant: str) -> Callable[[], object]:
        recipe: Any = load_recipe("tiny-canny", settings(variant, runs))
        task = ControlNetTask(recipe, Machine(recipe), lambda _: None)
        whole, part = task.whole(), task.parts(0)[0]

        def work() -> None:
            task.losses(whole, part).each.mean().backward()
            task.controlnet.zero_grad()

        return work

    return paired({variant: step(variant) for variant in (*VARIANTS, "controlnet-union")})


def picture_times(runs: Path) -> dict[str, float]:
    """Seconds of a picture of 20 steps, without control and under each."""
    from controlkit.adapters import load_adapter
    from controlkit.base import load_base
    from controlkit.control import Control
    from controlkit.figures import render
    from controlkit.sampling import generate
    from controlkit.training.world import exact_map

    base, scene = load_base("tiny"), render(7)
    edges = exact_map("canny", scene.picture, scene.joints, scene.inverse_depth)
    work: dict[str, Callable[[], object]] = {"none": lambda: generate(base, scene.caption)}
    for variant in (*VARIANTS, "controlnet-union"):
        control = Control(load_adapter(str(runs / variant / "controlnet"), base=base), edges, kind="canny")
        work[variant] = lambda control=control: generate(base, scene.caption, controls=[control])  # type: ignore[misc]
    return paired(work)


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    from controlkit.training.quality import FOLLOWS

    rows, plain = result["variants"], result["pictures"]["none"]
    some = rows["controlnet"]["scores"]
    floor, ceiling = some["floor"]["edge F1"], some["ceiling"]["edge F1"]
    lines = [
        "# The variants, compared",
        "",
        f"Made by `uv run python tests/benchmarks/variants.py`: bundled base, canny, {result['pairs']} pairs"
        f" each, {some['scenes']} held-out scenes, one seed; CPU time of one thread, medians of {ROUNDS}"
        " rounds.",
        "",
        "| `adapter` | trained parameters | peak memory of the training | a step, of controlnet's | "
        "a picture, of one without control | edge F1 | of the ceiling |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        row = rows[variant]
        score = row["scores"]["canny"]["edge F1"]
        step = result["steps"][variant] / result["steps"]["controlnet"]
        held = f"{row['trained'] / 1e6:.2f} million | {row['peak_mb'] / 1000:.2f} GB"
        picture = result["pictures"][variant] / plain
        lines.append(
            f"| {variant} | {held} | {step:.2f} | {picture:.2f} | {score:.3f} | {score / ceiling:.2f} |"
        )
    lines += ["", f"Without control edge F1 is {floor:.3f}, of the true pictures {ceiling:.3f}."]
    union = rows["controlnet-union"]
    step = result["steps"]["controlnet-union"] / result["steps"]["controlnet"]
    lines += [
        "",
        f"One network for three kinds of maps (controlnet-union, {union['trained'] / 1e6:.2f} million trained"
        f" parameters, a step {step:.2f} of controlnet's), on as many pairs, used with one map at a time:",
        "",
        "| map | score | without control | under it | ceiling |",
        "|---|---|---|---|---|",
    ]
    for kind in KINDS:
        name, scores = FOLLOWS[kind], union["scores"]
        values = " | ".join(f"{scores[row][name]:.3f}" for row in ("floor", kind, "ceiling"))
        lines.append(f"| {kind} | {name} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not trained, measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/variants"))
    parser.add_argument("--only", choices=["train", "time", "all"], default="all")
    given = parser.parse_args()
    everything = (*VARIANTS, "controlnet-union")
    if given.only != "time":
        for variant in everything:
            train(variant, given.runs)
    if given.only == "train":
        return
    import torch

    torch.set_num_threads(1)
    recipe = load_recipe("tiny-canny")
    result = {
        "pairs": recipe.steps * recipe.batch_size,
        "variants": {variant: learned(variant, given.runs) for variant in everything},
        "steps": step_times(given.runs),
        "pictures": picture_times(given.runs),
    }
    (HERE / "variants.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "variants.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()

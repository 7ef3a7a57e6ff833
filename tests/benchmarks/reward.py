"""Does the reward help? A bundled adapter trained on, with it and without, from one start on the same draws.

`uv run python tests/benchmarks/reward.py --settings 0 1@0.2 --seeds 1 2 --out runs/reward` trains each
setting, WEIGHT@BELOW (the recipe's `reward` and `reward_below`), by the project's own command, and scores the
result on held-out scenes. What was measured lies in OUT/scores.jsonl, and the same command goes on where it
was stopped.

Scores: of the pictures made under each scene's map (DDIM, 8 steps, guidance 2, averaged weights), on the
"validation" split. Edges: F1 at 2 pixels' tolerance and at none, against the map; the depth that the bundled
estimator finds, against the true one; the silhouette and the colours, which no reward looks at. Seconds: of
the training alone, on one thread; where other programs run, they count.
"""

import argparse
import itertools
import json
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
import torch

from controlkit.adapters import load_adapter
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.figures import Scene, render
from controlkit.metrics import edge_f1
from controlkit.preprocessors import get
from controlkit.sampling import generate
from controlkit.training import train_recipe
from controlkit.training.quality import Examiner, through_vae
from controlkit.training.watch import read_rows
from controlkit.training.world import exact_map

STEPS, GUIDANCE = 8, 2.0
Row = dict[str, Any]


def train(kind: str, setting: str, seed: int, given: argparse.Namespace) -> tuple[Path, Row]:
    """The adapter that a setting makes of the bundled one, and what its training says of itself."""
    weight, _, below = setting.partition("@")
    folder = given.out / f"{kind}-{setting}-{seed}"
    result = train_recipe(
        f"bundled-{kind}-longer",
        [
            *(f"init={kind}", f"out={folder}", f"seed={seed}", f"steps={given.steps}", "batch_size=8"),
            *("learning_rate=2e-4", "warmup=20", "ema=0.99", "stratified=true", f"scenes={given.scenes}"),
            *("sample_every=0", "monitor_every=0", "score_scenes=0", "threads=1", "log_every=20"),
            *(f"checkpoint_every={given.steps}", f"reward={weight}", f"reward_below={below or 0.2}"),
        ],
    )
    if result.stopped_at is not None:
        raise SystemExit(f"stopped at step {result.stopped_at}; the same command goes on")
    rows = [row for row in read_rows(folder) if "loss" in row]
    told = {key: mean(row[key] for row in rows[-5:]) for key in ("loss", "map_missed") if key in rows[-1]}
    return folder / "controlnet", {**told, "seconds": rows[-1]["seconds"]}


class Held:
    """The held-out scenes and how a picture of one is scored."""

    def __init__(self, base: Base, kind: str, count: int) -> None:
        self.base, self.kind, self.canny, self.examiner = base, kind, get("canny"), Examiner()
        self.scenes = [render(k, split="validation", size=base.resolution) for k in range(count)]

    def score(self, adapter: str | Path) -> Row:
        """Means of an adapter's pictures; of "true" and "ceiling" the pictures themselves, or as decoded."""
        rows = [self._of(self._picture(adapter, k), scene) for k, scene in enumerate(self.scenes)]
        return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}

    def _picture(self, adapter: str | Path, number: int) -> np.ndarray:
        scene = self.scenes[number]
        if adapter == "ceiling":
            return through_vae(self.base, scene.picture)
        told = exact_map(self.kind, scene.picture, scene.joints, scene.inverse_depth)
        control = Control(self._loaded(adapter), told)
        how = {"steps": STEPS, "guidance": GUIDANCE, "seeds": [number]}
        return generate(self.base, scene.caption, controls=[control], **how)[0]

    def _loaded(self, adapter: str | Path) -> Any:
        if getattr(self, "_name", None) != adapter:
            self._name, self._adapter = adapter, load_adapter(str(adapter), base=self.base)
        return self._adapter

    def _of(self, picture: np.ndarray, scene: Scene) -> Row:
        found = self.examiner.scores(picture, scene, ("depth",))
        ours, true = self.canny(picture).image, self.canny(scene.picture).image
        edges = {
            "edge F1": edge_f1(ours, true).f1,
            "strict edge F1": edge_f1(ours, true, tolerance=0).f1,
        }
        return edges | {name: found[name] for name in ("depth RMSE", "silhouette IoU", "colours")}


def table(rows: list[Row]) -> str:
    """A Markdown table: means over the seeds, and each seed's score of what the adapter is for."""
    names = ["edge F1", "strict edge F1", "depth RMSE", "silhouette IoU", "colours", "map_missed", "seconds"]
    lines = [f"| setting | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        cells = []
        for name in names:
            found = [row[name] for row in own if name in row]
            each = f" ({', '.join(f'{value:.4g}' for value in found)})" if len(found) > 1 else ""
            cells.append(f"{mean(found):.4g}{each}" if found else "")
        lines.append(f"| {setting} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, score, and print the table."""
    parser = argparse.ArgumentParser(description="Whether the reward helps.")
    parser.add_argument("--kind", choices=("canny", "depth"), default="canny")
    parser.add_argument("--settings", nargs="+", default=["0", "1@0.2", "0.3@0.7"], help="WEIGHT@BELOW, or 0")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--scenes", type=int, default=1000, help="scenes to train on")
    parser.add_argument("--held", type=int, default=64, help="held-out scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/reward"), help="where results are kept")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "scores.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    held = Held(load_base("tiny"), given.kind, given.held)
    todo = [
        ("ceiling", 0),
        ("start", 0),
        *((s, k) for k, s in itertools.product(given.seeds, given.settings)),
    ]
    for setting, seed in todo:
        key = {"kind": given.kind, "setting": setting, "seed": seed, "steps": given.steps}
        if any(key.items() <= row.items() for row in rows):
            continue
        adapter, told = ({"ceiling": "ceiling", "start": given.kind}.get(setting), {})
        if adapter is None:
            adapter, told = train(given.kind, setting, seed, given)
        rows.append({**key, **held.score(adapter), **told})
        print(json.dumps(rows[-1]), flush=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if row["kind"] == given.kind and row["steps"] == given.steps]))


if __name__ == "__main__":
    main()

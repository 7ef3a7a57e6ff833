"""Do adapters that saw incomplete and moved poses in training follow such poses better?

`uv run python tests/benchmarks/partial_poses.py --settings 0@0 0.15@0 0@1.5 0.15@1.5 --seeds 1 2` trains each
setting, DROP@JITTER (the recipe's `data.pose_drop` and `data.pose_jitter`), by the recipe tiny-openpose, and
scores the result on held-out scenes under three kinds of maps: the whole pose, the pose without some of its
limbs (each with a probability of 0.4, one at the least), and the whole pose with its joints moved by 1.5
pixels. What was measured lies in OUT/scores.jsonl, and the same command goes on where it was stopped.

Scores, by what the bundled estimator finds in the picture (DDIM, 20 steps, the base's guidance): the share of
the joints that the map shows which are found within a tenth of the figure's height of their true places, and
the overlap of the figure's silhouette with the true one, which falls where a figure lacks limbs.
"""

import argparse
import itertools
import json
from dataclasses import replace
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
from controlkit.metrics import iou, pck
from controlkit.preprocessors import Poses, drop_random_limbs, get, jitter_poses, poses_to_map
from controlkit.sampling import generate
from controlkit.training import train_recipe
from controlkit.training.quality import STEPS, silhouette

DROPPED, MOVED = 0.4, 1.5
Row = dict[str, Any]


def train(setting: str, seed: int, given: argparse.Namespace) -> Path:
    """The adapter that a setting makes from the base."""
    drop, _, jitter = setting.partition("@")
    folder = given.out / f"{setting}-{seed}"
    result = train_recipe(
        "tiny-openpose",
        [
            *(f"out={folder}", f"seed={seed}", f"steps={given.steps}", f"scenes={given.scenes}"),
            *(f"data.pose_drop={drop}", f"data.pose_jitter={jitter or 0}", "threads=1"),
            *("sample_every=0", "monitor_every=0", "score_scenes=0", "checkpoint_every=100"),
        ],
    )
    if result.stopped_at is not None:
        raise SystemExit(f"stopped at step {result.stopped_at}; the same command goes on")
    return folder / "controlnet"


def told_poses(scene: Scene, number: int) -> dict[str, Poses]:
    """What the network is told of a scene, by the kind of map; the draws are the scene's own."""
    height, width = scene.picture.shape[:2]
    whole = Poses(width=width, height=height, people=scene.joints[None].astype(np.float64))
    random = np.random.default_rng(number)
    partial = whole
    while _missing(whole, partial).sum() == 0 or not partial.people[..., 2].any():
        partial = drop_random_limbs(whole, random, DROPPED)
        partial = replace(partial, people=_filled(partial.people))
    return {"whole": whole, "partial": partial, "moved": jitter_poses(whole, random, MOVED)}


def _filled(people: np.ndarray) -> np.ndarray:
    """One person, also where nothing is left of it."""
    return people if len(people) else np.zeros((1, 18, 3))


def _missing(whole: Poses, told: Poses) -> np.ndarray:
    return (whole.people[0, :, 2] > 0) & (told.people[0, :, 2] == 0)


class Held:
    """The held-out scenes and how a picture of one is scored."""

    def __init__(self, base: Base, count: int) -> None:
        self.base, self.pose = base, get("openpose", model="tiny")
        self.scenes = [render(k, split="validation", size=base.resolution) for k in range(count)]

    def score(self, folder: Path | None) -> Row:
        """Mean scores by the kind of map; without a folder, of the true pictures."""
        adapter = load_adapter(str(folder), base=self.base) if folder else None
        rows: list[Row] = []
        for number, scene in enumerate(self.scenes):
            row: Row = {}
            for name, poses in told_poses(scene, number).items():
                picture = self._picture(adapter, poses, number) if adapter else scene.picture
                row |= {f"{name}: {key}": value for key, value in self._of(picture, scene, poses).items()}
            rows.append(row)
        return {name: round(mean(row[name] for row in rows), 4) for name in rows[0]}

    def _picture(self, adapter: Any, poses: Poses, number: int) -> np.ndarray:
        control = Control(adapter, poses_to_map(poses), kind="openpose")
        caption = self.scenes[number].caption
        return generate(self.base, caption, controls=[control], steps=STEPS, seeds=[number])[0]

    def _of(self, picture: np.ndarray, scene: Scene, poses: Poses) -> Row:
        people = self.pose(picture).poses.people
        found = people[0] if len(people) else np.zeros((18, 3))
        missing = (scene.joints[:, 2] > 0) & (poses.people[0, :, 2] == 0)
        shown = np.where(missing[:, None], 0.0, scene.joints)
        return {
            "joints": pck(found, shown, size=scene.figure_height),
            "silhouette IoU": iou(silhouette(picture, scene), scene.masks["figure"]),
        }


def table(rows: list[Row]) -> str:
    """A Markdown table: means over the seeds, and each seed's."""
    names = [name for name in rows[0] if ":" in name]
    lines = [f"| drop@jitter | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        cells = []
        for name in names:
            found = [row[name] for row in own]
            each = f" ({', '.join(f'{value:.3f}' for value in found)})" if len(found) > 1 else ""
            cells.append(f"{mean(found):.3f}{each}")
        lines.append(f"| {setting} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train, score, and print the table."""
    parser = argparse.ArgumentParser(description="Whether incomplete poses in training help.")
    parser.add_argument("--settings", nargs="+", default=["0@0", "0.15@0", "0@1.5", "0.15@1.5"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--scenes", type=int, default=2000, help="scenes to train on")
    parser.add_argument("--held", type=int, default=64, help="held-out scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/partial-poses"), help="where results are kept")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "scores.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    held = Held(load_base("tiny"), given.held)
    for seed, setting in [(0, "true"), *itertools.product(given.seeds, given.settings)]:
        key = {"setting": setting, "seed": seed, "steps": given.steps, "held": given.held}
        if any(key.items() <= row.items() for row in rows):
            continue
        folder = None if setting == "true" else train(setting, seed, given)
        rows.append({**key, **held.score(folder)})
        print(json.dumps(rows[-1]), flush=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
    print(table([row for row in rows if row["steps"] == given.steps and row["held"] == given.held]))


if __name__ == "__main__":
    main()

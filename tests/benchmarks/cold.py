"""A command from start to end: `controlkit generate` beside a plain diffusers script, each cold, one picture.

`uv run python tests/benchmarks/cold.py` starts both as processes of their own, in random order, on the
bundled base, a map and ten steps, after one start of each that is not counted (it fills the system's file
cache). The script is what diffusers' documentation shows: a ControlNet and a pipeline from folders, one call,
one file. Reported are seconds of the clock until the command says what it does, and until its process has
ended; the latter also of the CPU, which other work on the machine moves less.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from controlkit.adapters import BUNDLED_ADAPTERS as ADAPTERS
from controlkit.base import BUNDLED as BASES
from controlkit.figures import render
from controlkit.images import write_png
from controlkit.preprocessors import get

PROMPT, STEPS = "a red figure on a white floor", 10
SCRIPT = f"""
import sys
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from diffusers.utils import load_image

base, adapter, edges, output = sys.argv[1:]
controlnet = ControlNetModel.from_pretrained(adapter)
pipeline = StableDiffusionControlNetPipeline.from_pretrained(base, controlnet=controlnet, safety_checker=None)
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
image = pipeline(
    {PROMPT!r},
    image=load_image(edges),
    num_inference_steps={STEPS},
    guidance_scale=2.0,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save(output)
"""


def start(command: Sequence[str], folder: Path) -> tuple[float, float, float]:
    """Run a command: seconds until it says anything, until it ends, and of the CPU."""
    began, before = time.perf_counter(), os.times()
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stderr is not None
    said = time.perf_counter() if process.stderr.readline() else None
    process.stderr.read()
    assert process.wait() == 0, command
    ended, after = time.perf_counter(), os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return (said or ended) - began, ended - began, spent


def main() -> None:
    """Print the medians and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_png(folder / "edges.png", get("canny")(render(0, split="validation").picture).image)
        (folder / "script.py").write_text(SCRIPT)
        shared = [PROMPT, "--map", "canny=edges.png", "--steps", str(STEPS), "-o", "ours.png"]
        places = [str(BASES["tiny"]), str(ADAPTERS["canny"]), "edges.png", "theirs.png"]
        commands = {
            "ours": [sys.executable, "-m", "controlkit", "generate", *shared],
            "script": [sys.executable, "script.py", *places],
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
        order = random.Random(0)
        for number in range(given.rounds + 1):
            names = list(commands)
            order.shuffle(names)
            for which in names:
                measured = start(commands[which], folder)
                if number:
                    found[which].append(measured)
    said, wall, spent = (
        {which: statistics.median(row[k] for row in rows) for which, rows in found.items()} for k in range(3)
    )
    print(f"says what it does after {said['ours']:.2f} s")
    for title, seconds, k in (("clock", wall, 1), ("CPU", spent, 2)):
        ratios = [theirs[k] / ours[k] for theirs, ours in zip(found["script"], found["ours"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{title}: ours {seconds['ours']:.1f} s, script {seconds['script']:.1f} s:"
            f" {middle:.2f}x ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    main()

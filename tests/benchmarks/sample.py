"""A generation of ControlKit beside that of diffusers' ControlNet pipeline, in one run, outputs compared.

`uv run python tests/benchmarks/sample.py --size 34M` takes some minutes on two cores, `--size tiny` less;
`--size xl` has SDXL's structure, and its pipeline as the peer; `--size sd15` is Stable Diffusion 1.5's real
configuration at 512 pixels: for a GPU, or on a CPU with 14 gigabytes to spare, with `--steps 2`, or with
`--steps 12 --half --rounds 3`, an hour. Weights are random (the bundled ones at tiny); seed, prompt, map and
steps are the same, and the result is latents, so that both decode alike. The hint encoder is as large as
diffusers makes it whatever the base: a tenth of the work at 34M, a hundredth at Stable Diffusion's size.

Every round makes a picture with the pipeline as documented (twice, the second time as its own peer), with the
pipeline tuned, and with ours, under control in every step and under control that ends at half of the steps,
in random order; a ratio is the median over the rounds of the paired ratios, with quartiles. If the pipeline
beside itself is not within 0.97 to 1.03, the run says that it is void. On a CPU the time is CPU time, on one
thread; with `--dtype bf16` both are in bfloat16 there, and ours in float32 is measured beside them.

`--lossy` makes pictures of the bundled world's held-out scenes with each of the lossy settings instead: how
much faster (median and quartiles over the scenes), how much of the control is lost (F1 of the edges with the
map), and how far pictures move. Merged tokens save nothing there: such a picture has 64 of them.
"""

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_models import SIZES, base_of, write

from controlkit.adapters import load_adapter
from controlkit.applying import encode_controls
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.controlnet import HINT_CHANNELS
from controlkit.figures import render
from controlkit.metrics import edge_f1
from controlkit.packing import LEAST_STEPS
from controlkit.precisions import DTYPES
from controlkit.preprocessors import get
from controlkit.sampling import Guidance, Savings, _prepared, denoise, encode_text, generate
from controlkit.schedulers import make_schedule, make_scheduler
from controlkit.starting import begin

PROMPT, GUIDANCE, SEED = "a red figure next to a blue cube", 7.5, 1
VOID = (0.97, 1.03)
CLOSE = 5e-6  # relative difference of latents (L2) after few steps
CLOSE_AFTER_ALL = 2e-5  # after 20: each step adds the rounding of its own
COARSE = 1e-2  # in float16
FARTHER = 1.2  # ours from float32, of what the pipeline is: in bfloat16 any two ways are far from each other
WHOLE = "ours, float32"
NAMES = ("documented", "documented again", "tuned", "ours", "documented, half", "tuned, half", "ours, half")
HALF = ("documented, half", "documented again, half", "ours, half")
LOSSY = {
    "exact": Savings(),
    "control_every=2": Savings(control_every=2),
    "control_every=3": Savings(control_every=3),
    "features_every=2": Savings(features_every=2),
    "features_every=3": Savings(features_every=3),
    "features_every=4": Savings(features_every=4),
    "guidance_until=0.5": Savings(guidance_until=0.5),
    "merge_tokens=0.5": Savings(merge_tokens=0.5),
    "control_every=2, guidance_until=0.5": Savings(control_every=2, guidance_until=0.5),
    "features_every=2, guidance_until=0.5": Savings(features_every=2, guidance_until=0.5),
    "features_every=3, guidance_until=0.6": Savings(features_every=3, guidance_until=0.6),
    "features_every=3, merge_tokens=0.5": Savings(features_every=3, merge_tokens=0.5),
}


@dataclass(frozen=True)
class Job:
    """What every variant makes."""

    base: Base
    controlnet: Any
    cond: torch.Tensor
    steps: int

    @property
    def side(self) -> int:
        return int(self.cond.shape[-1])


def ours(job: Job, end: float) -> torch.Tensor:
    """ControlKit's latents."""
    base, controls = job.base, [Control(job.controlnet, job.cond, end=end)]
    generators = [torch.Generator().manual_seed(SEED)]
    with _prepared(base, controls, packs=job.steps >= LEAST_STEPS):
        schedule = make_schedule("ddim", base, steps=job.steps)
        return denoise(
            base,
            encode_text(base, PROMPT, "", guidance=GUIDANCE),
            begin(base, schedule, generators, width=job.side, height=job.side),
            controls=encode_controls(controls, width=job.side, height=job.side, pictures=1),
            schedule=schedule,
            guidance=Guidance(GUIDANCE),
            generators=generators,
        )


def pipeline_of(job: Job) -> Any:
    """diffusers' pipeline of the same parts."""
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    base = job.base
    parts = {
        "vae": base.vae,
        "unet": base.unet,
        "text_encoder": base.text_encoders[0],
        "tokenizer": base.tokenizers[0],
        "scheduler": make_scheduler("ddim", base),
        "controlnet": job.controlnet,
    }
    if base.family == "sdxl":
        parts |= {"text_encoder_2": base.text_encoders[1], "tokenizer_2": base.tokenizers[1]}
        pipeline = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    else:
        unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionControlNetPipeline(**parts, **unsafe)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, job: Job, end: float) -> torch.Tensor:
    """The pipeline's latents."""
    found: torch.Tensor = pipeline(
        PROMPT,
        image=job.cond,
        num_inference_steps=job.steps,
        guidance_scale=GUIDANCE,
        control_guidance_end=end,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        return_dict=False,
    )[0]
    return found


def variants(
    make: Callable[[], Job], names: Sequence[str], *, device: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """Each of the names, with networks laid out as it has them."""
    plain, tuned = make(), make()
    for network in (tuned.base.unet, tuned.controlnet):
        network.to(memory_format=torch.channels_last)
    mine = tuned  # three at Stable Diffusion's size would not fit into 24 gigabytes
    if device == "cuda":
        mine = make()
        for network in (tuned.base.unet, tuned.controlnet):
            network.compile(mode="reduce-overhead", fullgraph=True)
    documented, faster = pipeline_of(plain), pipeline_of(tuned)
    found = {
        "documented": lambda: theirs(documented, plain, 1.0),
        "documented again": lambda: theirs(documented, plain, 1.0),
        "tuned": lambda: theirs(faster, tuned, 1.0),
        "ours": lambda: ours(mine, 1.0),
        "documented, half": lambda: theirs(documented, plain, 0.5),
        "documented again, half": lambda: theirs(documented, plain, 0.5),
        "tuned, half": lambda: theirs(faster, tuned, 0.5),
        "ours, half": lambda: ours(mine, 0.5),
    }
    return {name: found[name] for name in names}


def in_float32(job: Job) -> Callable[[], torch.Tensor]:
    """Ours in whole precision, beside a comparison in a lower one."""
    for network in (job.base.unet, job.controlnet):
        network.to(memory_format=torch.channels_last)
    return lambda: ours(job, 1.0)


def spend(work: Callable[[], object], device: str) -> float:
    """Seconds of a picture: of the CPU, or of the clock on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(
    works: dict[str, Callable[[], torch.Tensor]], *, rounds: int, device: str
) -> dict[str, list[float]]:
    """Rounds of every variant, in random order."""
    order, spent = random.Random(0), {name: list[float]() for name in works}
    for _ in range(rounds):
        names = list(works)
        order.shuffle(names)
        for name in names:
            spent[name].append(spend(works[name], device))
    return spent


def ratio(peer: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles and median of how many times as long the peer takes: low, median, high."""
    ratios = [p / o for p, o in zip(peer, other, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


def compare(works: dict[str, Callable[[], torch.Tensor]], *, close: float) -> Iterator[str]:
    """How far ours and the pipeline's latents are apart. Raises AssertionError where it is too far."""
    for ending, title in (("", "control in every step"), (", half", "control until half of the steps")):
        if f"ours{ending}" not in works:
            continue
        mine, peer = works[f"ours{ending}"](), works[f"documented{ending}"]()
        apart = float((mine - peer).norm() / peer.norm())
        largest = float((mine - peer).abs().max())
        yield f"{title}: relative difference {apart:.1e}, at most {largest:.1e}"
        if WHOLE in works and not ending:
            whole = works[WHOLE]()
            far = [float((one - whole).norm() / whole.norm()) for one in (peer, mine)]
            yield f"  to float32: the pipeline {far[0]:.1e}, ours {far[1]:.1e}"
            assert far[1] < FARTHER * far[0], f"{title}: {far}"
        if f"tuned{ending}" in works:
            tuned = works[f"tuned{ending}"]()
            yield f"  of the pipeline tuned to the pipeline {float((tuned - peer).norm() / peer.norm()):.1e}"
        assert apart < close, f"{title}: {apart}"


def beside_diffusers(given: argparse.Namespace) -> Iterator[str]:
    """The comparison at one size, line by line."""
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), SIZES[given.size]
        write(given.size, folder, hint_channels=None if given.size == "tiny" else HINT_CHANNELS)
        dtype = getattr(torch, DTYPES[given.dtype])

        def make(dtype: torch.dtype = dtype) -> Job:
            from diffusers import ControlNetModel

            base = load_base(base_of(given.size, folder), device=given.device, dtype=dtype)
            if given.size == "tiny":
                controlnet = load_adapter("canny", base=base, device=given.device, dtype=dtype).controlnet
            else:
                controlnet = ControlNetModel.from_pretrained(folder / "controlnet", torch_dtype=dtype)
            side, generator = size.resolution, torch.Generator().manual_seed(0)
            cond = (torch.rand((1, 3, side, side), generator=generator) < 0.1).float()
            return Job(base, controlnet.to(given.device).eval(), cond, given.steps)

        names = HALF if given.half else NAMES
        works = variants(make, names, device=given.device)
        is_lower = given.dtype == "bf16" or (given.device == "cpu" and given.dtype == "fp16")
        if is_lower and not given.half:
            works[WHOLE] = in_float32(make(torch.float32))
        yield f"size {given.size}, {given.steps} steps, {given.device}, batch 1, {dtype}"
        exact = CLOSE if given.steps < 10 else CLOSE_AFTER_ALL
        yield from compare(works, close={"fp32": exact, "fp16": COARSE}.get(given.dtype, math.inf))
        if given.device == "cuda":  # what a CPU needs once, it has done for the comparison
            for work in works.values():
                work()
        spent = measure(works, rounds=given.rounds, device=given.device)
    yield f"seconds of a picture: {', '.join(f'{n} {statistics.median(spent[n]):.2f}' for n in works)}"
    itself = ratio(*(spent[name] for name in names[:2]))
    yield _told("the pipeline to itself", itself)
    if not VOID[0] <= itself[1] <= VOID[1]:
        yield f"VOID: it is not within {VOID[0]} to {VOID[1]}"
    for ending in ("", ", half"):
        for peer in ("documented", "tuned"):
            if f"{peer}{ending}" in spent:
                found = ratio(spent[f"{peer}{ending}"], spent[f"ours{ending}"])
                yield _told(f"ours to {peer}{ending}", found)
    if WHOLE in spent:
        yield _told(f"ours to {WHOLE}", ratio(spent[WHOLE], spent["ours"]))


def _told(name: str, found: tuple[float, float, float]) -> str:
    low, middle, high = found
    return f"{name}: {middle:.2f}x ({low:.2f} to {high:.2f})"


def lossy(given: argparse.Namespace) -> Iterator[str]:
    """The table of the lossy settings. Every scene is made with each of them, in random order."""
    base, canny, order = load_base("tiny"), get("canny"), random.Random(0)
    adapter = load_adapter("canny", base=base)
    spent: dict[str, list[float]] = {name: [] for name in LOSSY}
    made: dict[str, list[np.ndarray]] = {name: [] for name in LOSSY}
    maps: list[np.ndarray] = []
    for k in range(-1, given.scenes):  # the first is for warming up
        scene = render(max(k, 0), split="validation")
        edges = canny(scene.picture).image
        for name in order.sample(list(LOSSY), len(LOSSY)):
            began = time.process_time()
            (picture,) = generate(
                base,
                scene.caption,
                controls=[Control(adapter, edges)],
                steps=given.steps,
                seeds=[max(k, 0)],
                savings=LOSSY[name],
            )
            if k >= 0:
                spent[name].append(time.process_time() - began)
                made[name].append(picture)
        maps += [edges] if k >= 0 else []
    title = f"{given.steps} steps, {given.scenes} scenes"
    yield f"| {title} | times as fast | edges' F1 | of the exact | moved by |"
    yield "|---|---|---|---|---|"
    exact = statistics.mean(_scores(made["exact"], maps, canny))
    for name, pictures in made.items():
        low, middle, high = ratio(spent["exact"], spent[name])
        score = statistics.mean(_scores(pictures, maps, canny))
        pairs = zip(pictures, made["exact"], strict=True)
        moved = statistics.mean(float(np.abs(a.astype(int) - b).mean()) for a, b in pairs)
        yield (
            f"| {name} | {middle:.2f} ({low:.2f} to {high:.2f}) | {score:.3f} | {score / exact:.3f} |"
            f" {moved:.1f} levels |"
        )


def _scores(pictures: Sequence[np.ndarray], maps: Sequence[np.ndarray], canny: Any) -> list[float]:
    """How well the edges of pictures are those of their maps: F1 of each."""
    pairs = zip(pictures, maps, strict=True)
    return [edge_f1(canny(picture).image, edges).f1 for picture, edges in pairs]


def main() -> None:
    """Print the figures as they are found."""
    parser = argparse.ArgumentParser(description="ControlKit's sampling beside diffusers'.")
    parser.add_argument("--size", choices=SIZES, default="34M")
    parser.add_argument("--steps", type=int, help="default 20; at 34M and xl on a CPU 4")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--half", action="store_true", help="documented and ours, control ending at half")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the networks; default fp32, on a GPU fp16")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--lossy", action="store_true", help="measure the lossy settings instead")
    parser.add_argument("--scenes", type=int, default=32, help="of the bundled world, with --lossy")
    given = parser.parse_args()
    short = given.size in ("34M", "xl") and given.device == "cpu" and not given.lossy
    given.steps = given.steps or (4 if short else 20)
    given.dtype = given.dtype or ("fp16" if given.device == "cuda" else "fp32")
    torch.set_num_threads(given.threads)
    for line in lossy(given) if given.lossy else beside_diffusers(given):
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()

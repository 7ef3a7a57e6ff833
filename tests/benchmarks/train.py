"""A training step of ControlKit beside that of diffusers' train_controlnet.py, in one run, losses compared.

`uv run python tests/benchmarks/train.py --size 34M` takes about ten minutes on two cores; `--size tiny` two;
`--size sd15` is Stable Diffusion 1.5's real configuration at 512 pixels: for a GPU, or once on a CPU with 14
gigabytes to spare. Weights are random, the data is made of the photographs that scikit-image ships.

Every round takes steps of the script as documented (twice, the second time as its own peer), of the script
tuned, and of ours, in random order; a ratio is the median over the rounds of the paired ratios, with
quartiles. If the script beside itself is not within 0.97 to 1.03, the run says that it is void. On a CPU the
time is CPU time, that of data loading processes included, on one thread; on a GPU it is the time between two
events. The peak of memory is measured in a process of its own for each.
"""

import argparse
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from train_models import SIZES, TRAINED, Models, read, write, write_data
from train_ours import Ours, compare_losses
from train_script import Pairs, Script, Setting, load

PAIRS = 16  # of the data set
VOID = (0.97, 1.03)
NEEDED_GB = 14  # of memory, for Stable Diffusion's real size in float32
NAMES = ("documented", "documented again", "tuned", "ours")


@dataclass(frozen=True)
class Spent:
    """What steps took, in seconds: CPU time of all processes, wall time, and, on a GPU, its own."""

    cpu: float
    wall: float
    device: float


@dataclass(frozen=True)
class Bench:
    """The folder that everything lies in, and what of it the script has loaded."""

    size: str
    folder: Path
    models: Models | None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def make(self, name: str, setting: Setting) -> Script | Ours:
        """A training of one of NAMES."""
        if name == "ours":
            out = Path(tempfile.mkdtemp(dir=self.folder))
            return Ours(self.size, self.folder, self.data, setting, out=out)
        assert self.models is not None
        tuned = name == "tuned"
        batches = load(self.models, self.data, setting, tuned=tuned)
        return Script(self.models, batches, setting, tuned=tuned)


def write_all(size: str, folder: Path, pairs: int) -> None:
    """Write models, and photographs with their edges, of a size."""
    from preprocess import photographs

    from controlkit.preprocessors import get

    write(size, folder)
    pictures = list(photographs(SIZES[size].resolution, pairs))
    write_data(pictures, [get("canny")(picture).image for picture in pictures], folder / "data")


# --- time ---


def spend(training: Script | Ours, steps: int, device: str) -> Spent:
    """Take steps and measure them."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device == "cuda" else []
    workers = training.worker_ids() if isinstance(training, Script) else []
    if events:
        torch.cuda.synchronize()
        events[0].record()
    wall, cpu = time.perf_counter(), time.process_time() + _cpu_of(workers)
    for _ in range(steps):
        training.step()
    if events:
        events[1].record()
        torch.cuda.synchronize()
    cpu, wall = time.process_time() + _cpu_of(workers) - cpu, time.perf_counter() - wall
    return Spent(cpu, wall, events[0].elapsed_time(events[1]) / 1000 if events else cpu)


def _cpu_of(processes: list[int]) -> float:
    """CPU seconds that other processes have used (Linux)."""
    ticks = 0
    for process in processes:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    trainings: dict[str, Script | Ours], *, rounds: int, steps: int, device: str
) -> dict[str, list[Spent]]:
    """Rounds of every training, in random order."""
    order, spent = random.Random(0), {name: list[Spent]() for name in trainings}
    for _ in range(rounds):
        names = list(trainings)
        order.shuffle(names)
        for name in names:
            spent[name].append(spend(trainings[name], steps, device))
    return spent


def ratio(peer: list[Spent], ours: list[Spent]) -> tuple[float, float, float]:
    """Quartiles and median of how many times as long the peer takes: low, median, high."""
    ratios = [p.device / o.device for p, o in zip(peer, ours, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return low, middle, high


# --- memory: each in a process of its own ---


def alone(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Build one training and take steps: the peak of memory meanwhile, in bytes, and the times of a step.

    On a CPU what the libraries take is not counted.
    """
    setting = Setting(given.batch, given.device, given.precision)
    libraries = 0 if given.device == "cuda" else _status("VmRSS")
    models = None if name == "ours" else read(given.size, given.folder)
    training = Bench(given.size, given.folder, models).make(name, setting)
    del models
    gc.collect()
    training.step()
    _forget_peak(given.device)
    spent = spend(training, given.steps, given.device)
    peak = torch.cuda.max_memory_allocated() if given.device == "cuda" else _status("VmHWM")
    return {"peak": peak - libraries, "cpu": spent.cpu / given.steps, "wall": spent.wall / given.steps}


def _forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is there


def _status(key: str) -> int:
    """A figure of this process's memory, in bytes."""
    found = Path("/proc/self/status").read_text().partition(f"{key}:")[2]
    return 1024 * int(found.split()[0])


def alone_in_process(name: str, given: argparse.Namespace) -> dict[str, float]:
    """`alone`, in a new interpreter."""
    options = ("size", "batch", "device", "precision", "steps", "threads", "folder")
    words = [f"--{option}={getattr(given, option)}" for option in options]
    command = [sys.executable, __file__, f"--alone={name}", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# --- arithmetic ---


def flops(step: Callable[[], object], batch: int) -> float:
    """Floating point operations of a step, for each sample."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / batch


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large matrix product on the GPU: what utilisation is a share of."""
    a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
    for _ in range(5):
        a @ a
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(20):
        a @ a
    events[1].record()
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (events[0].elapsed_time(events[1]) / 1000)


def shares(bench: Bench, given: argparse.Namespace) -> dict[str, float]:
    """GFLOP for each sample of the script's step and of ours, and the VAE's share of the former."""
    assert bench.models is not None
    script, ours = (bench.make(name, Setting(1, given.device)) for name in ("documented", "ours"))
    side = SIZES[bench.size].resolution
    counted = {"script": flops(script.step, 1) / 1e9, "ours": flops(ours.step, 1) / 1e9}
    vae = flops(lambda: bench.models.vae.encode(torch.zeros(1, 3, side, side)), 1) / 1e9
    return {**counted, "vae share": vae / counted["script"]}


def losses(bench: Bench, given: argparse.Namespace) -> list[tuple[float, float]]:
    """Losses of the first steps, script and ours, in float32. Raises AssertionError where they differ."""
    setting = Setting(min(given.batch, 4), given.device)
    script, ours = (bench.make(name, setting) for name in ("documented", "ours"))
    assert bench.models is not None
    found = compare_losses(script, ours, Pairs(bench.data, bench.models), steps=3)
    tolerance = 1e-5 if given.device == "cpu" else 5e-3  # TF32 in convolutions
    assert all(abs(one - other) <= tolerance * one for one, other in found), found
    return found


# --- the run ---


def _only_alone(given: argparse.Namespace) -> bool:
    """Whether two trainings would not fit into memory together."""
    return bool(given.size == "sd15" and given.device == "cpu")


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Check, count and measure; returns what is to be told."""
    told: dict[str, Any] = {key: getattr(given, key) for key in ("size", "batch", "device", "precision")}
    told |= {"torch": torch.__version__}
    if _only_alone(given):
        available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) / 2**20
        if available < NEEDED_GB:
            sys.exit(f"{available:.0f} GB of memory are free; this needs {NEEDED_GB}")
        return told | {"alone": {name: alone_in_process(name, given) for name in ("documented", "ours")}}
    bench = Bench(given.size, given.folder, read(given.size, given.folder))
    told["GFLOP"] = shares(bench, given)
    told["losses"] = losses(bench, given)
    setting = Setting(given.batch, given.device, given.precision)
    trainings = {name: bench.make(name, setting) for name in NAMES if name != NAMES[1]}
    for training in trainings.values():
        spend(training, given.warmup, given.device)
    trainings[NAMES[1]] = trainings[NAMES[0]]  # the very same object: what differs is noise
    spent = measure(trainings, rounds=given.rounds, steps=given.steps, device=given.device)
    told |= _ratios(spent)
    told["seconds"] = {
        name: asdict(Spent(*(_median(spent[name], key, given.steps) for key in ("cpu", "wall", "device"))))
        for name in NAMES
    }
    if given.device == "cuda":
        rate = gemm_rate(setting.dtype)
        per_sample = told["seconds"]["ours"]["device"] / given.batch
        told["MFU"] = told["GFLOP"]["ours"] * 1e9 / per_sample / rate
    if not given.no_memory:
        told["alone"] = {name: alone_in_process(name, given) for name in NAMES if name != NAMES[1]}
    return told


def _median(spent: list[Spent], key: str, steps: int) -> float:
    return statistics.median(getattr(one, key) for one in spent) / steps


def _ratios(spent: dict[str, list[Spent]]) -> dict[str, Any]:
    documented, again, tuned, ours = (spent[name] for name in NAMES)
    itself = ratio(documented, again)
    return {
        "itself": itself,
        "void": not VOID[0] <= itself[1] <= VOID[1],
        "ours to documented": ratio(documented, ours),
        "ours to tuned": ratio(tuned, ours),
        "tuned to documented": ratio(documented, tuned),
    }


def lines(told: dict[str, Any]) -> Iterator[str]:
    """The tables."""
    yield f"size {told['size']}, batch {told['batch']}, {told['device']}, {told['precision']}\n"
    if "GFLOP" in told:
        counted = told["GFLOP"]
        yield (
            f"{counted['script']:.1f} GFLOP per sample as the script does it, {counted['ours']:.1f} ours;"
            f" encoding pictures is {100 * counted['vae share']:.0f} % of the script's."
        )
        pairs = ", ".join(f"{script:.6f} | {ours:.6f}" for script, ours in told["losses"])
        yield f"Losses of the first steps, script | ours: {pairs}.\n"
    yield "| step | samples/s, CPU or device time | samples/s, wall | peak memory, GB |\n|---|---|---|---|"
    for name in NAMES:
        memory = told.get("alone", {}).get(name)
        spent = told["seconds"][name] if "seconds" in told else memory and {"device": memory["cpu"], **memory}
        if spent:
            device, wall = (told["batch"] / spent[key] for key in ("device", "wall"))
            peak = f"{memory['peak'] / 1e9:.2f}" if memory else ""
            yield f"| {name} | {device:.3g} | {wall:.3g} | {peak} |"
    yield ""
    if "itself" in told:
        for name in ("ours to documented", "ours to tuned", "tuned to documented", "itself"):
            low, middle, high = told[name]
            title = "documented to itself" if name == "itself" else name
            yield f"{title}: **{middle:.2f}x** ({low:.2f} to {high:.2f})"
        if told["void"]:
            yield f"VOID: the script beside itself is not within {VOID[0]} to {VOID[1]}"
    if "MFU" in told:
        yield f"model FLOPs utilisation of ours: {100 * told['MFU']:.0f} % of the rate of a matrix product"


def main() -> None:
    """Print the tables, or the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=TRAINED, default="34M")
    parser.add_argument("--rounds", type=int, help="default 9, on a GPU 5")
    parser.add_argument("--steps", type=int, help="steps of each in a round; default 1, tiny 4, on a GPU 10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--alone", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    gpu = given.device == "cuda"
    given.rounds, given.steps = (
        given.rounds or (5 if gpu else 9),
        given.steps or (10 if gpu else 4 if given.size == "tiny" else 1),
    )
    given.warmup = 20 if gpu else 1
    torch.set_num_threads(given.threads)
    if given.alone:
        print(json.dumps(alone(given.alone, given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        os.environ["CONTROLKIT_CACHE"] = folder + "/cache"
        write_all(given.size, given.folder, given.batch if _only_alone(given) else PAIRS)
        told = run(given)
    print(json.dumps(told, indent=1) if given.json else "\n".join(lines(told)))


if __name__ == "__main__":
    main()

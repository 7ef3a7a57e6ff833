"""What a Control-LoRA loses by its rank: the bundled adapters reduced, and scored against the whole ones.

`uv run python tests/benchmarks/control_lora.py --kinds canny depth --scenes 16` takes about ten minutes of
one core and prints a table. Numbers: of the file's tensors; KiB: of the file in fp16. Kept: 1 minus the lost
share of the squared changes to the base, over all weights and in the weight that keeps least. Score: of the
pictures made under each held-out scene's map (seed k for scene k, 20 steps of ddim, the base's guidance): the
edges' F1, higher is better, or the error of the estimated depth, lower is better; "none" is without control.
"""

import argparse
from statistics import mean

import torch
from safetensors.torch import save
from torch import Tensor

from controlkit.adapters import load_adapter
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.figures import Scene, render
from controlkit.formats.control_lora import encoder_of, expand, kept_share, reduce
from controlkit.sampling import generate
from controlkit.training.quality import FOLLOWS, STEPS, Examiner
from controlkit.training.world import exact_map


def score(base: Base, kind: str, network: object, scenes: list[Scene], examiner: Examiner) -> float:
    """The mean score of pictures under an adapter; without control for None."""
    found = []
    for seed, scene in enumerate(scenes):
        image = exact_map(kind, scene.picture, scene.joints, scene.inverse_depth)
        controls = [] if network is None else [Control(network, image)]  # type: ignore[arg-type]
        (picture,) = generate(base, scene.caption, controls=controls, steps=STEPS, seeds=[seed])
        found.append(examiner.scores(picture, scene, (kind,))[FOLLOWS[kind]])
    return mean(found)


def least_kept(whole: dict[str, Tensor], unet: dict[str, Tensor], rebuilt: dict[str, Tensor]) -> float:
    """The share of its change that the weight keeps which keeps least."""
    shares = []
    for key, own in encoder_of(unet).items():
        changed = (whole[key].double() - own.double()).square().sum()
        lost = (whole[key].double() - rebuilt[key].double()).square().sum()
        if changed:
            shares.append(1 - float(lost / changed))
    return min(shares)


def row(*cells: object) -> None:
    """A line of the table, as soon as it is known."""
    print("|", " | ".join(str(cell) for cell in cells), "|", flush=True)


def measure(base: Base, kind: str, ranks: list[int], scenes: list[Scene]) -> None:
    """The lines of one kind of map: whole, by rank, and without control."""
    network, examiner = load_adapter(kind, base=base).controlnet, Examiner()
    whole = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    unet = base.unet.state_dict()
    halved = {key: tensor.half() for key, tensor in whole.items()}
    numbers = sum(tensor.numel() for tensor in whole.values())
    row(
        kind,
        "whole",
        numbers,
        len(save(halved)) // 1024,
        "",
        "",
        f"{score(base, kind, network, scenes, examiner):.4f}",
    )
    for rank in ranks:
        tensors = {name: t.half() for name, t in reduce(whole, unet, rank).items()}  # as the file has them
        rebuilt = expand(tensors, unet)
        network.load_state_dict(rebuilt)
        row(
            *(kind, rank, sum(t.numel() for t in tensors.values()), len(save(tensors)) // 1024),
            f"{kept_share(whole, unet, tensors):.4f}",
            f"{least_kept(whole, unet, rebuilt):.4f}",
            f"{score(base, kind, network, scenes, examiner):.4f}",
        )
    row(kind, "none", "", "", "", "", f"{score(base, kind, None, scenes, examiner):.4f}")


def main() -> None:
    """Measure the kinds that are named."""
    parser = argparse.ArgumentParser(description="Control-LoRA by rank, on the bundled adapters.")
    parser.add_argument("--kinds", nargs="+", default=["canny", "depth"], choices=list(FOLLOWS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 8, 16, 32])
    parser.add_argument("--scenes", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = load_base("tiny")
    scenes = [render(k, split="validation", size=base.resolution) for k in range(given.scenes)]
    row("map", "rank", "numbers", "KiB", "kept", "least kept", "score")
    row(*["---"] * 7)
    for kind in given.kinds:
        measure(base, kind, given.ranks, scenes)


if __name__ == "__main__":
    main()

"""A U-Net's prediction with packed convolution weights beside the plain ones, outputs compared first.

`uv run python tests/benchmarks/packing.py --size sd15` takes some minutes and 9 gigabytes. At other sizes no
weight is large enough unless `--all` packs the small ones, too. Both ways alternate; the ratio is the median
of the paired ratios of CPU time on one thread, with quartiles. The first call within, which packs, is timed
on its own.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from train_models import SIZES, base_of, write

from controlkit import packing
from controlkit.base import load_base
from controlkit.layouts import lay_out
from controlkit.packing import packed


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.no_grad()
def main(size: str, rounds: int, small: bool) -> None:
    """Compare, then measure. small: pack small weights, too."""
    if small:
        packing.LEAST_BYTES = 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(size, Path(folder))
        base = load_base(base_of(size, Path(folder)))
    lay_out(base.unet)
    side = SIZES[size].resolution // base.vae_factor
    shown = torch.randn(2, base.unet.config.in_channels, side, side)
    shown = shown.contiguous(memory_format=torch.channels_last)
    text = base.encode_prompts(["", "a red figure"]).encoder_hidden_states
    predict = lambda: base.unet(shown, 500, text).sample  # noqa: E731
    plain, ratios = predict(), []
    with packed([base.unet]):
        first = seconds(predict)
        print(f"{size}: equal to the bit: {torch.equal(predict(), plain)}")
        forwards = [vars(layer).get("_conv_forward") for layer in base.unet.modules()]
        kept = [one.weight.nbytes for one in forwards if one is not None and one.weight is not None]
        print(f"packed: {len(kept)} weights, {sum(kept) / 1e9:.2f} GB")
    for _ in range(rounds):
        without = seconds(predict)
        with packed([base.unet]):
            predict()
            ratios.append(without / seconds(predict))
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"plain / packed: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(f"plain / the call that packs: {without / first:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--all", action="store_true", help="pack small weights, too")
    given = parser.parse_args()
    main(given.size, given.rounds, given.all)

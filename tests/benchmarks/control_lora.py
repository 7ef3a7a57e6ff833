"""What a Control-LoRA of a chosen rank keeps of an adapter: its change, its size, and its control.

`uv run python tests/benchmarks/control_lora.py` takes its time on two cores and writes
`control_lora.json` and `control_lora.md` beside itself. The bundled adapters over the bundled base, each made
low-rank by singular value decomposition and whole again, on held-out scenes (`training/quality.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.formats import control_lora
from controlkit.training.quality import FOLLOWS, examine

KINDS, RANKS, SCENES = ("canny", "depth"), (4, 8, 16, 32), 32
HERE = Path(__file__).parent


def size(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes in half precision."""
    return 2 * sum(tensor.numel() for tensor in tensors.values())


def measure(kind: str, rank: int | None) -> dict[str, Any]:
    """An adapter as it is (None), or through a Control-LoRA of a rank."""
    base = load_base("tiny")
    adapter = load_adapter(kind, base=base)
    state, unet = adapter.controlnet.state_dict(), base.unet.state_dict()
    row: dict[str, Any] = {"rank": rank or 0, "bytes": size(state), "kept": 1.0}
    if rank is not None:
        tensors = control_lora.reduce(state, unet, rank)
        row |= {"bytes": size(tensors), "kept": control_lora.kept_share(state, unet, tensors)}
        adapter.controlnet.load_state_dict(control_lora.expand(tensors, unet))
    scores = examine(base, {kind: adapter}, scenes=SCENES).scores
    return row | {row_name: scores[row_name][FOLLOWS[kind]] for row_name in ("floor", kind, "ceiling")}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Adapters as Control-LoRAs",
        "",
        "Made by `uv run python tests/benchmarks/control_lora.py`: the bundled adapters on the bundled base,"
        f" {SCENES} held-out scenes; rank 0 is the adapter itself; sizes in half precision.",
        "",
        "| adapter | rank | size | kept of its change | score | without control | under it | ceiling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        for row in result[kind]:
            lines.append(
                f"| {kind} | {row['rank']} | {row['bytes'] / 1e6:.2f} MB | {row['kept']:.3f} |"
                f" {FOLLOWS[kind]} | {row['floor']:.3f} | {row[kind]:.3f} | {row['ceiling']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write both files."""
    argparse.ArgumentParser(description="What a Control-LoRA keeps of an adapter.").parse_args()
    torch.set_num_threads(1)
    result = {kind: [measure(kind, rank) for rank in (None, *RANKS)] for kind in KINDS}
    (HERE / "control_lora.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "control_lora.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()

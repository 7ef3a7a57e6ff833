"""The commands for files of adapters: `convert | info | models | transfer`."""

from __future__ import annotations

from typing import Annotated

import typer

from controlkit import terminal
from controlkit.cli_options import Text, Whole, option

app = typer.Typer(rich_markup_mode=None)


@app.command(epilog="Example:  controlkit convert control_v11p_sd15_canny.pth canny.safetensors --to single")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, a folder or a hub id.")],
    output: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="A .safetensors file; for diffusers a folder. An adapter that is there is replaced.",
        ),
    ],
    to: Annotated[str, option("LAYOUT", "diffusers, single, original or control-lora.", "--to")],
    dtype: Annotated[Text, option("TYPE", "fp16, bf16 or fp32.  [default: the file's]")] = None,
    base: Annotated[Text, option("NAME", "The base, where the file needs one to be whole.")] = None,
    rank: Annotated[
        Whole, option("N", "Of a Control-LoRA: 1 to 1024.  [default: as trained, else 128]")
    ] = None,
) -> None:
    """Convert an adapter file: to diffusers' folder, to one file, to the original's keys."""
    from controlkit import convert_job

    with terminal.opened() as told:
        plan = convert_job.plan(source, output, to=to, dtype=dtype, base=base, rank=rank)
        lines = convert_job.run(plan, told)
    for line in lines:
        print(line)


@app.command(epilog="Example:  controlkit info canny.safetensors --base sd15")
def info(
    adapter: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a hub id.")],
    base: Annotated[Text, option("NAME", "Say whether it fits this base.")] = None,
) -> None:
    """Say what an adapter file is, what it says of itself, and how to use it."""
    from controlkit import info_job

    with terminal.opened():
        lines = info_job.describe(adapter, base=base)
    for line in lines:
        print(line)


@app.command(epilog="Example:  controlkit models --base sd15 --kind depth")
def models(
    base: Annotated[Text, option("NAME", "Those for this base alone.")] = None,
    kind: Annotated[Text, option("KIND", "Those for this kind of map alone.")] = None,
) -> None:
    """List the adapters on the hub that are known by name, and which of them are in the cache."""
    from controlkit import models_job

    for line in models_job.table(base=base, kind=kind):
        print(line)


@app.command(epilog="Example:  controlkit transfer canny.safetensors --from sd15 --to my-base -o canny-mine")
def transfer(
    adapter: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a hub id.")],
    old: Annotated[str, option("BASE", "The base that it was trained on.", "--from")],
    new: Annotated[str, option("BASE", "The base that it shall fit, of the same family.", "--to")],
    output: Annotated[str, option("OUT", "A folder, or a .safetensors file.", "-o", "--output")],
    dtype: Annotated[Text, option("TYPE", "fp16, bf16 or fp32.  [default: the file's]")] = None,
) -> None:
    """Carry a ControlNet over to another base of its family."""
    from controlkit import transfer_job

    with terminal.opened() as told:
        plan = transfer_job.plan(adapter, output, old=old, new=new, dtype=dtype)
        lines = transfer_job.run(plan, told)
    for line in lines:
        print(line)

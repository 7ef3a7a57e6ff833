"""Options that several commands have, and their help."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def option(metavar: str, text: str, *names: str) -> Any:
    """An option: what stands for its value in the help, the help, and its names if not the parameter's."""
    return typer.Option(*names, metavar=metavar, help=text)


Text = str | None
Texts = list[str] | None
Whole = int | None
Number = float | None
Switch = bool | None
SIZE_HELP = "A multiple of 8.  [default: in the first map's shape, or the base's]"
SCHEDULER_HELP = (
    "ddim, ddpm, pndm, euler, euler-a, dpm++, dpm++-karras, dpm++-sde, unipc, heun, lms, lcm or tcd."
    "  [default: ddim]"
)
MASK_HELP = (
    "Redraw only what is white in this picture, and not transparent; of strokes of one colour on a"
    " transparent layer, what is drawn."
)
DTYPE_HELP = (
    "What the networks compute in: fp32, fp16 or bf16.  [default: fp32 on a CPU and with the bundled base,"
    " else fp16]"
)
LIKE_HELP = "Repeat this picture; other options change it, and none takes away what it had: --lora none."
CONTROL_HELP = (
    "Follow this picture's map, or that of each one in a folder. How: :0.8 (strength), :1..0.2 (a schedule),"
    " :start=0.2, :end=0.5, :mode=prompt, :gate=webui, :layers=soft, :mask=region.png, :only_mid=true,"
    " :fit=fill, :adapter=NAME"
)
Output = Annotated[str, option("FILE", "Where to write it; an older file is replaced.", "-o", "--output")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False)
]

"""The command `controlkit generate`."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from controlkit import terminal
from controlkit.cli_options import (
    CONTROL_HELP,
    DTYPE_HELP,
    LIKE_HELP,
    MASK_HELP,
    SCHEDULER_HELP,
    SIZE_HELP,
    Number,
    Switch,
    Text,
    Texts,
    Whole,
    option,
)

if TYPE_CHECKING:
    from controlkit.generate_folder import Request
    from controlkit.generate_plan import Plan
    from controlkit.grid_axes import Axis
    from controlkit.infotext import PictureRecord

_MAY_BE_NONE = {  # numbers that may be taken away, and whether they are whole
    **dict.fromkeys(("tile", "width", "height", "class_label"), True),
    **dict.fromkeys(("temperature", "guidance", "hires"), False),
}


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    control: Annotated[Texts, option("KIND=PICTURE[:HOW]", CONTROL_HELP)] = None,
    map_: Annotated[Texts, option("KIND=MAP[:HOW]", "Follow this file, a map already.", "--map")] = None,
    base: Annotated[
        Text, option("NAME", "tiny, sd15, sd21, sdxl, file, folder or hub id.  [default: tiny]")
    ] = None,
    adapter: Annotated[
        Texts, option("KIND=NAME", "Another ControlNet: a file, a folder or a hub id.")
    ] = None,
    lora: Annotated[Texts, option("FILE[:WEIGHT]", "Put a LoRA onto the base: file or hub id.")] = None,
    embedding: Annotated[Texts, option("[WORD=]FILE", "Teach the base a word: textual inversion.")] = None,
    ip_adapter: Annotated[
        Texts, option("FILE=PICTURE[:SCALE]", "Show the base a picture through an IP-Adapter.")
    ] = None,
    image_encoder: Annotated[
        Text, option("FOLDER", "The IP-Adapter's picture encoder.  [default: the one beside it]")
    ] = None,
    vae: Annotated[
        Text,
        option("NAME", "Another autoencoder: ft-mse, file, folder or hub id; taesd and taesdxl are small."),
    ] = None,
    negative_prompt: Annotated[
        Text, option("TEXT", "What the picture should not show.", "--negative", "--negative-prompt")
    ] = None,
    prompt_syntax: Annotated[
        Text, option("NAME", "a1111: (word:1.3) weighs a word, and prompts may be long.  [default: plain]")
    ] = None,
    clip_skip: Annotated[
        Whole, option("N", "Layer of the text encoder, from its end, as in A1111.  [default: 1]")
    ] = None,
    steps: Annotated[Whole, option("N", "Denoising steps, 1 to 1000.  [default: 20]")] = None,
    guidance: Annotated[Text, option("X", "How much the prompt counts.  [default: the base's]")] = None,
    clip_guidance: Annotated[
        Number, option("X", "How much --clip's view of the prompt counts besides: 30, say.  [default: 0]")
    ] = None,
    clip: Annotated[Text, option("NAME", "The CLIP: clip-b, clip-l, folder or hub id.")] = None,
    scheduler: Annotated[Text, option("NAME", SCHEDULER_HELP)] = None,
    temperature: Annotated[
        Text, option("X", "Share of the noise that the scheduler injects: 0 is deterministic.")
    ] = None,
    guidance_rescale: Annotated[
        Number, option("X", "0 to 1: against washed-out pictures of large guidance.  [default: 0]")
    ] = None,
    pag: Annotated[
        Number, option("X", "Away from what is predicted without self-attention: 3, say.  [default: 0]")
    ] = None,
    freeu: Annotated[
        Text, option("B1,B2,S1,S2", "FreeU's weights of the decoder's features: 1.5,1.6,0.9,0.2, say.")
    ] = None,
    start: Annotated[Text, option("PICTURE", "Start from this picture.", "--from")] = None,
    strength: Annotated[
        Number, option("X", "How much of it is redone.  [default: 0.75; with a mask 1]")
    ] = None,
    mask: Annotated[Text, option("MASK", MASK_HELP)] = None,
    image: Annotated[Text, option("PICTURE", "Tell an unCLIP base this picture besides the text.")] = None,
    image_noise: Annotated[
        Whole, option("N", "How freely it is taken, 0 to 999.  [default: 0]", "--image-noise")
    ] = None,
    class_label: Annotated[Text, option("N", "The class, for a base that is told one.", "--class")] = None,
    original_size: Annotated[
        Text, option("WxH[+X+Y]", "Tell an SDXL that the picture comes from one of this size, cropped there.")
    ] = None,
    negative_original_size: Annotated[
        Text, option("WxH[+X+Y]", "The same for the negative prompt.  [default: as for the prompt]")
    ] = None,
    hires: Annotated[
        Text, option("FACTOR", "Then enlarge by this factor, and refine under the same control.")
    ] = None,
    hires_strength: Annotated[
        Number, option("X", "How much the second stage redoes.  [default: 0.5]")
    ] = None,
    tile: Annotated[
        Text, option("PIXELS", "Show the networks tiles of this size: bounded memory for large pictures.")
    ] = None,
    control_every: Annotated[
        Whole, option("N", "Lossy: run the control networks in every N-th step.  [default: 1]")
    ] = None,
    features_every: Annotated[
        Whole, option("N", "Lossy: run the networks' deep parts in every N-th step.  [default: 1]")
    ] = None,
    guidance_until: Annotated[
        Number, option("X", "Lossy: guide only this first share of the steps.  [default: 1]")
    ] = None,
    merge_tokens: Annotated[
        Number, option("X", "Lossy: merge this share of like tokens, up to 0.75.  [default: 0]")
    ] = None,
    seed: Annotated[Whole, option("N", "Seed of the first picture.  [default: 0]")] = None,
    count: Annotated[int, option("N", "How many pictures, with consecutive seeds.", "-n", "--count")] = 1,
    output: Annotated[
        str,
        option("PATH", "Where to write it; an older file is replaced. For a folder: out.", "-o", "--output"),
    ] = "out.png",
    width: Annotated[Text, option("PIXELS", SIZE_HELP)] = None,
    height: Annotated[Text, option("PIXELS", SIZE_HELP)] = None,
    device: Annotated[Text, option("NAME", "auto, cpu, cuda, cuda:1 or mps.  [default: auto]")] = None,
    dtype: Annotated[Text, option("TYPE", DTYPE_HELP)] = None,
    compile_: Annotated[
        Switch,
        typer.Option(
            "--compile/--no-compile", help="Compile the networks: minutes once, worth it for many pictures."
        ),
    ] = None,
    cuda_graph: Annotated[
        Switch,
        typer.Option(
            "--cuda-graph/--no-cuda-graph", help="On a GPU: record a step, and start it as a whole."
        ),
    ] = None,
    memory: Annotated[
        Text, option("AMOUNT", "Stay within this memory, as 4GB: what that takes is chosen and told.")
    ] = None,
    like: Annotated[Text, option("PICTURE", LIKE_HELP)] = None,
    grid: Annotated[
        Texts, option("KEY=VALUES", "Vary one setting, or two, on a sheet: scale=0.5,0.8 seed=1..4")
    ] = None,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="Keep each picture of a grid, too: OUT-1.png, OUT-2.png, row by row."),
    ] = False,
    preview: Annotated[
        Text, option("FILE", "Show in this PNG what the picture will be, while it is made.")
    ] = None,
) -> None:
    """Make pictures that follow a prompt and the edges, pose or depth of another picture."""
    started = time.monotonic()
    typer.echo("reading what is asked for ...", err=True)  # before anything that takes time
    from controlkit import generate_folder, generate_job, grid_axes, grid_job
    from controlkit.generate_notes import without_effect
    from controlkit.generate_plan import check_preview

    words = [word for word in (prompt, *context.args) if word is not None]
    prompt, axes_texts = grid_axes.split_words(words, grid or ())
    axes = grid_axes.parse_axes(axes_texts) if axes_texts else []
    given = _given({**context.params, "prompt": grid_job.first_prompt(axes, prompt)})
    is_usual = context.get_parameter_source("output").name == "DEFAULT"  # type: ignore[union-attr]
    request = generate_folder.Request(tuple(control or ()), tuple(map_ or ()), start, mask, output)

    def planned(one: Request) -> Plan:
        return generate_job.plan(
            given,
            **vars(one),
            adapters=adapter or (),
            loras=lora or (),
            embeddings=embedding or (),
            ip_adapters=ip_adapter or (),
            image_encoder=image_encoder,
            image=image,
            like=like,
        )

    with terminal.opened() as told:
        usual = generate_folder.USUAL_FOLDER if is_usual else ""
        each = generate_folder.requests(request, told, usual=usual, count=count)
        if each:
            if axes or keep:
                raise ValueError("a grid is of one picture: name a file, and not its folder")
            _make_each(each, planned, told, preview, count, started)
            return
        plan = planned(request)
        if axes:
            grid_job.check(plan, axes)
        elif keep:
            raise ValueError("--keep keeps the pictures of a grid: add --grid, or leave it out")
        kept = grid_job.kept_files(plan, axes) if keep else []
        shown = None if preview is None else check_preview(preview, plan, kept)
        for note in (
            *plan.notes,
            *without_effect(plan, grid_job.variants(plan, axes), [axis.key for axis in axes]),
        ):
            told.note(f"note: {note}")
        records = _made_grid(plan, axes, told, shown, kept) if axes else _made(plan, told, shown)
    seconds = time.monotonic() - started
    if axes:
        _tell_grid(plan, records, seconds, kept)
    else:
        _tell_pictures(plan, records, seconds)


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Options` that the command's parameters give: numbers read, "none" taken away."""
    from controlkit import arguments
    from controlkit.generate_plan import Options

    named = {name.rstrip("_"): value for name, value in params.items() if value is not None}
    given = {name: value for name, value in named.items() if name in Options.__dataclass_fields__}
    if "memory" in given:
        memory = given.pop("memory")
        taken_away = arguments.is_none(memory)
        given |= {"memory": ()} if taken_away else {"memory_limit": arguments.parse_bytes(memory)}
    for name, whole in _MAY_BE_NONE.items():
        if name in given:
            flag = f"--{name.removesuffix('_label')}"
            given[name] = arguments.parse_number(given[name], flag, whole=whole)
    if given.get("hires", 1) is None:
        given["hires"] = 1.0
    return given


def _make_each(
    requests: Sequence[Request],
    planned: Callable[[Request], Plan],
    told: terminal.Terminal,
    preview: str | None,
    count: int,
    started: float,
) -> None:
    """A picture for each of a folder; exit code 1 where some are left out."""
    from controlkit import generate_folder, grid_job
    from controlkit.generate_notes import without_effect

    try:
        result = generate_folder.run(
            requests,
            planned,
            told,
            preview=preview,
            count=count,
            notes=lambda plan: [*plan.notes, *without_effect(plan, grid_job.variants(plan, []), [])],
        )
    except KeyboardInterrupt:
        told.note("what is finished stays, and the same command goes on")
        raise
    print(result.summary(time.monotonic() - started))
    if result.failed:
        raise typer.Exit(1)


def _made(plan: Plan, told: terminal.Terminal, preview: Path | None) -> list[PictureRecord]:
    """Make the pictures; who interrupts that is told which are finished, and stay."""
    from controlkit import generate_job

    kept: list[str] = []
    try:
        return generate_job.run(
            plan, told, preview=preview, finished=lambda k, _: kept.append(str(plan.outputs[k]))
        )
    except KeyboardInterrupt:
        if kept:
            told.note(f"finished before: {', '.join(kept)}")
        raise


def _made_grid(
    plan: Plan, axes: Sequence[Axis], told: terminal.Terminal, preview: Path | None, kept: Sequence[Path]
) -> list[PictureRecord]:
    """Make a grid; who interrupts it is told which of its pictures are finished, and stay."""
    from controlkit import grid_job

    done: list[int] = []
    try:
        return grid_job.run(plan, axes, told, preview=preview, kept=kept, finished=done.append)
    except KeyboardInterrupt:
        if done:
            names = ", ".join(str(kept[k]) for k in done) if kept else f"{len(done)} of its pictures"
            told.note(f"finished before: {names}; {plan.outputs[0]} shows them")
        raise


def _tell_grid(plan: Plan, records: Sequence[PictureRecord], seconds: float, kept: Sequence[Path]) -> None:
    """Which sheet was made, and of what."""
    print(f"wrote {plan.outputs[0]}, {len(records)} pictures, in {seconds:.0f} s")
    if kept:
        print(f"and each by itself, from {kept[0]} to {kept[-1]}; --like repeats one")


def _tell_pictures(plan: Plan, records: Sequence[PictureRecord], seconds: float) -> None:
    """What was made, and how to make more of it."""
    from controlkit.generate_job import could_be_lower
    from controlkit.limits import MAX_SEED, enlarged

    for path, record in zip(plan.outputs, records, strict=True):
        size: tuple[int | None, int | None] = record.width, record.height
        if record.hires != 1:
            size = enlarged(*size, record.hires)
        print(f"wrote {path} ({size[0]}x{size[1]}, seed {record.seed})")
    print(f"in {seconds:.0f} s; the same with other seeds:")
    first = shlex.quote(str(plan.outputs[0]))
    seed = min(records[-1].seed + 1, MAX_SEED - 3)
    print(f"  controlkit generate --like {first} --seed {seed} -n 4 -o more.png")
    if could_be_lower(plan, records[0]):
        print("this processor computes in bfloat16 by itself: --dtype bf16 takes a part of the time")

"""The command line: `controlkit demo | generate | preprocess | draw | lint | ui`, and all others.

This module and those whose commands it adds are the only ones that print.

Results go to stdout, everything else to stderr. A mistake of the user is a ValueError anywhere below: it
becomes one line on stderr and exit code 2. Ctrl-C is 130. Nothing heavy is imported before a command has
said what it does.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit import cli_files, cli_training, terminal
from controlkit.cli_options import (
    CONTROL_HELP,
    DTYPE_HELP,
    LIKE_HELP,
    MASK_HELP,
    SCHEDULER_HELP,
    SIZE_HELP,
    Number,
    Output,
    Switch,
    Text,
    Texts,
    Whole,
    option,
)
from controlkit.command_group import Commands, Grouped

if TYPE_CHECKING:
    from controlkit.generate_folder import Request
    from controlkit.generate_plan import Plan
    from controlkit.infotext import PictureRecord
    from controlkit.preprocess_job import Beside

_MAY_BE_NONE = {  # numbers that may be taken away, and whether they are whole
    **dict.fromkeys(("tile", "width", "height", "class_label"), True),
    **dict.fromkeys(("temperature", "guidance", "hires"), False),
}
app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pictures that follow an edge map, a pose or a depth map: make them, and train the models that do.",
    epilog="Start with:  controlkit demo",
)


def _say_version(asked: bool) -> None:
    if asked:
        from controlkit import __version__

        print(f"controlkit {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say which version this is.", callback=_say_version, is_eager=True),
    ] = False,
) -> None:
    """What stands before the command."""


@app.command(epilog="Example:  controlkit demo --seed 3 -o demo.png")
def demo(
    seed: Annotated[int, option("N", "Which scene.")] = 0,
    output: Output = "demo.png",
) -> None:
    """Make a scene, its three maps, and pictures that follow them. Needs no network and no GPU."""
    from controlkit import demo as demo_module
    from controlkit.arguments import numbered_outputs
    from controlkit.files import check_writable
    from controlkit.images import write_png
    from controlkit.limits import check_seeds

    check_seeds([seed])
    (path,) = numbered_outputs(output, 1)
    scene = path.with_name(f"{path.stem}-scene.png")
    for file in (path, scene):
        check_writable(file)
    with terminal.opened() as told:
        result = demo_module.run_demo(seed, report=told)
        write_png(path, result.sheet)
        write_png(scene, result.picture)
    for line in result.table():
        print(line)
    print(f"\nwrote {path} in {result.seconds:.0f} s: look at it")
    print(f"wrote {scene}, its picture: try")
    quoted = shlex.quote(f"canny={scene}")
    print(f'  controlkit generate "a red figure on a white floor under a green sky" --control {quoted} -n 4')
    print("  controlkit train tiny-canny")


@app.command(
    epilog='Example:  controlkit generate "a cube" --control canny=photo.jpg -o out.png',
    context_settings={"allow_extra_args": True},  # the second setting of a grid
    cls=Grouped,
)
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    control: Annotated[Texts, option("KIND=PICTURE[:HOW]", CONTROL_HELP)] = None,
    map_: Annotated[Texts, option("KIND=MAP[:HOW]", "Follow this file, a map already.", "--map")] = None,
    base: Annotated[
        Text, option("NAME", "tiny, sd15, sd21, sdxl, folder or hub id.  [default: tiny]")
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
        Text, option("NAME", "Another autoencoder: folder or hub id; taesd and taesdxl are small.")
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
    output: Output = "out.png",
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
    from controlkit import arguments, generate_folder, generate_job, grid_axes, grid_job
    from controlkit.generate_notes import without_effect
    from controlkit.generate_plan import Options, check_preview

    words = [word for word in (prompt, *context.args) if word is not None]
    prompt, axes_texts = grid_axes.split_words(words, grid or ())
    axes = grid_axes.parse_axes(axes_texts) if axes_texts else []
    asked = {name: value for name, value in context.params.items() if value is not None}
    asked["prompt"] = grid_job.first_prompt(axes, prompt)
    given = {
        name.rstrip("_"): value
        for name, value in asked.items()
        if name.rstrip("_") in Options.__dataclass_fields__ and value is not None
    }
    if memory is not None:
        taken_away = arguments.is_none(given.pop("memory"))
        given |= {"memory": ()} if taken_away else {"memory_limit": arguments.parse_bytes(memory)}
    for name, whole in _MAY_BE_NONE.items():
        if name in given:
            flag = f"--{name.removesuffix('_label')}"
            given[name] = arguments.parse_number(given[name], flag, whole=whole)
    if given.get("hires", 1) is None:
        given["hires"] = 1.0
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
        each = generate_folder.requests(request, told, usual=generate_folder.USUAL_FOLDER if is_usual else "")
        if each:
            if axes or keep:
                raise ValueError("a grid is of one picture: name a file, and not its folder")
            _make_each(each, planned, told, preview, started)
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
        if axes:
            made = grid_job.run(plan, axes, told, preview=shown, kept=kept)
            print(f"wrote {plan.outputs[0]}, {len(made)} pictures, in {time.monotonic() - started:.0f} s")
            if kept:
                print(f"and each by itself, from {kept[0]} to {kept[-1]}; --like repeats one")
            return
        records = _made(plan, told, shown)
    _tell_pictures(plan.outputs, records, time.monotonic() - started)
    if generate_job.could_be_lower(plan, records[0]):
        print("this processor computes in bfloat16 by itself: --dtype bf16 takes a part of the time")


def _make_each(
    requests: Sequence[Request],
    planned: Callable[[Request], Plan],
    told: terminal.Terminal,
    preview: str | None,
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


def _tell_pictures(outputs: Sequence[Path], records: Sequence[PictureRecord], seconds: float) -> None:
    """What was made, and how to make more of it."""
    from controlkit.limits import MAX_SEED, enlarged

    for path, record in zip(outputs, records, strict=True):
        size: tuple[int | None, int | None] = record.width, record.height
        if record.hires != 1:
            size = enlarged(*size, record.hires)
        print(f"wrote {path} ({size[0]}x{size[1]}, seed {record.seed})")
    print(f"in {seconds:.0f} s; the same with other seeds:")
    first = shlex.quote(str(outputs[0]))
    seed = min(records[-1].seed + 1, MAX_SEED - 3)
    print(f"  controlkit generate --like {first} --seed {seed} -n 4 -o more.png")


def _list_kinds(asked: bool) -> None:
    if asked:
        from controlkit import preprocessors

        for kind in preprocessors.names():
            print(f"{kind}: {preprocessors.summary(kind)}")
            print(f"    {', '.join(preprocessors.options_of(kind))}")
        raise typer.Exit()


@app.command(
    epilog="Example:  controlkit preprocess canny photo.jpg -o edges.png low=50 high=150\n\n"
    "Many:  controlkit preprocess canny,openpose,depth photos/ -o dataset --sheet canny.auto=true"
)
def preprocess(
    kinds: Annotated[
        str, typer.Argument(metavar="KINDS", help="canny, openpose, depth ...; several with commas.")
    ],
    pictures: Annotated[
        list[str],
        typer.Argument(
            metavar="PICTURE...", help="Files, folders, patterns; and KEY=VALUE options of the maps."
        ),
    ],
    output: Annotated[
        str | None,
        option("PATH", "For one map its .png, else a folder.  [default: map.png or maps]", "-o", "--output"),
    ] = None,
    workers: Annotated[Whole, option("N", "Threads that read and write.  [default: one per core]")] = None,
    batch: Annotated[Whole, option("N", "Pictures that a network sees at once.  [default: 4]")] = None,
    device: Annotated[
        Text, option("NAME", "Where networks run: auto, cpu, cuda, mps.  [default: auto]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make maps anew that are there.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="In a folder, also write a contact sheet.")] = False,
    npy: Annotated[bool, typer.Option("--npy", help="Of depth, also write the values as .npy.")] = False,
    png16: Annotated[bool, typer.Option("--png16", help="Of depth, also write a 16-bit PNG.")] = False,
    list_: Annotated[
        bool,
        typer.Option("--list", help="List the kinds and their options.", callback=_list_kinds, is_eager=True),
    ] = False,
) -> None:
    """Extract the edges, the pose, the depth ... of pictures; of many, as a data set."""
    from controlkit import arguments, limits, preprocess_job

    paths, settings = arguments.split_settings(pictures)
    names = [name.strip() for name in kinds.split(",")]
    options = preprocess_job.settings_of_kinds(names, settings, device=device)
    beside = preprocess_job.Beside(npy=npy, png16=png16)
    if not all(paths) or not paths:
        raise ValueError("name a picture, a folder or a pattern")
    if output == "":
        raise ValueError("-o names nothing: give a .png for one map, else a folder")
    limits.check_shares(workers, batch)
    if arguments.is_one_map(names, paths, output):
        _preprocess_one(names[0], paths[0], options[names[0]], output or "map.png", beside)
        return
    from controlkit import folder_job

    with terminal.opened() as told:
        job = folder_job.plan(
            names,
            paths,
            settings,
            output=output or "maps",
            workers=workers,
            batch=batch,
            device=device,
            overwrite=overwrite,
            sheet=sheet,
            beside=beside,
        )
        result = folder_job.run(job, told)
    if not result.is_mine:
        return
    for path in result.written:
        print(f"wrote {path}")
    print(result.summary())
    if result.failed:
        raise typer.Exit(1)


def _preprocess_one(kind: str, picture: str, options: dict[str, str], output: str, beside: Beside) -> None:
    from controlkit import preprocess_job

    with terminal.opened() as told:
        plan = preprocess_job.plan(kind, picture, options, output=output, beside=beside)
        written = preprocess_job.run(plan, told)
    for path in written:
        print(f"wrote {path}")
    _tell_how_to_follow(kind, written[0])


def _tell_how_to_follow(kind: str, path: Path) -> None:
    """Print the command that follows a map, where one base that has a short name has an adapter for it."""
    from controlkit.formats.finding import BUNDLED_ADAPTERS
    from controlkit.known_adapters import defaults, same_kind

    prompt, base = '"a red figure"', ""
    if same_kind(kind) not in BUNDLED_ADAPTERS:
        if same_kind(kind) not in defaults("sd1"):
            return
        prompt, base = "PROMPT", " --base sd15"
    print("follow it with:")
    print(f"  controlkit generate {prompt}{base} --map {shlex.quote(f'{kind}={path}')}")


@app.command(epilog="Example:  controlkit draw pose.json -o pose.png --size 768x512 --mirror")
def draw(
    pose: Annotated[str, typer.Argument(metavar="POSE.json", help="Joints in OpenPose's format.")],
    output: Output = "drawn.png",
    size: Annotated[Text, option("WxH", "The map's size.  [default: the canvas's]")] = None,
    canvas: Annotated[Text, option("WxH", "What the joints refer to, if the file does not say.")] = None,
    picture: Annotated[
        int | None, option("N", "Which of the pictures in the file, from 1.  [default: the only one]")
    ] = None,
    style: Annotated[str, option("NAME", "v1.1, v1.0 or xinsir.")] = "v1.1",
    mirror: Annotated[bool, typer.Option("--mirror", help="Exchange left and right.")] = False,
    drop: Annotated[
        Texts, option("LIMB", "Leave this out: left-arm, head, right-leg ...; repeatable.")
    ] = None,
    drop_random: Annotated[float, option("P", "Leave each limb out with this probability.")] = 0.0,
    jitter: Annotated[float, option("PIXELS", "Move joints by noise of this standard deviation.")] = 0.0,
    seed: Annotated[int, option("N", "Seed of what is random.")] = 0,
) -> None:
    """Draw poses from JSON, at any size, mirrored, jittered or without some limbs."""
    from controlkit import draw_job

    changes = draw_job.Changes(
        mirror=mirror, drop=drop or (), drop_random=drop_random, jitter=jitter, seed=seed
    )
    with terminal.opened():
        written = draw_job.draw(
            pose, output=output, size=size, canvas=canvas, style=style, changes=changes, picture=picture
        )
    for path in written:
        print(f"wrote {path}")
    _tell_how_to_follow("openpose", written[0])


@app.command(epilog="Example:  controlkit lint edges.png downloads/ --picture photo.jpg")
def lint(
    maps: Annotated[list[str], typer.Argument(metavar="MAP...", help="Files, folders, patterns.")],
    kind: Annotated[
        str, option("KIND", "What they are.  [default: as the file or its name says, or guessed]")
    ] = "",
    picture: Annotated[str, option("PICTURE", "What they were made from, to compare sizes.")] = "",
) -> None:
    """Say what is wrong with maps, and how to cure it. Exit code 1 if anything is."""
    from controlkit import lint_job

    with terminal.opened() as told:
        job = lint_job.plan(maps, kind=kind, picture=picture)
        result = lint_job.run(job, told.progress if len(job.maps) > 1 else lambda *_: None)
    for verdict in result.verdicts:
        for line in verdict.lines():
            print(line)
    print(result.summary())
    if result.findings:
        raise typer.Exit(1)


@app.command(epilog="Example:  controlkit ui --base sd15 --runs runs")
def ui(
    base: Annotated[str, option("NAME", "tiny, sd15, sd21, sdxl, folder or hub id.")] = "tiny",
    device: Annotated[str, option("NAME", "auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[Text, option("TYPE", DTYPE_HELP)] = None,
    host: Annotated[
        str, option("ADDRESS", "Who may reach the page: by default this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, option("N", "The port.")] = 7860,
    runs: Annotated[str, option("FOLDER", "Where trainings are, and what is made is kept.")] = "runs",
    data: Annotated[
        Texts,
        option(
            "FOLDER",
            "Trainings may use pictures within it alone (repeatable).  [default: any folder of this machine;"
            " where others reach the page, none]",
        ),
    ] = None,
) -> None:
    """Open the studio page: make pictures and train adapters in a browser."""
    from controlkit.studio import server

    with (
        terminal.opened() as told,
        server.opened(
            base,
            device=device,
            dtype=dtype,
            host=host,
            port=port,
            runs=runs,
            data=data or (),
            report=told,
        ) as address,
    ):
        for line in server.told(address, host, runs):
            print(line, flush=True)
        server.wait()


app.add_typer(cli_training.app)
app.add_typer(cli_files.app)


def main() -> None:
    """The `controlkit` command."""
    app()

"""The command line: `controlkit demo | generate | preprocess | draw | lint | ui`, and all others.

This module and those whose commands it adds are the only ones that print.

Results go to stdout, everything else to stderr. A mistake of the user is a ValueError anywhere below: it
becomes one line on stderr and exit code 2. Ctrl-C is 130. Nothing heavy is imported before a command has
said what it does.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit import cli_files, cli_generate, cli_training, terminal
from controlkit.cli_options import (
    DTYPE_HELP,
    Output,
    Text,
    Texts,
    Whole,
    option,
)
from controlkit.command_group import Commands, Grouped
from controlkit.startup import wait_briefly

if TYPE_CHECKING:
    from controlkit.preprocess_job import Beside

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


app.command(
    epilog='Example:  controlkit generate "a cube" --control canny=photo.jpg -o out.png',
    context_settings={"allow_extra_args": True},  # the second setting of a grid
    cls=Grouped,
)(cli_generate.generate)


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
    pose: Annotated[str, typer.Argument(metavar="POSE.json", help="Joints in OpenPose's format, or COCO's.")],
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
    base: Annotated[str, option("NAME", "tiny, sd15, sd21, sdxl, file, folder or hub id.")] = "tiny",
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
    wait_briefly()
    app()

"""The command line: `controlkit demo | generate | preprocess | train | measure`. The only module that prints.

Results go to stdout, everything else to stderr. A mistake of the user is a ValueError anywhere below: it
becomes one line on stderr and exit code 2. Ctrl-C is 130. Nothing heavy is imported before a command has
said what it does.
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from controlkit.infotext import PictureRecord
    from controlkit.preprocess_job import Beside
    from controlkit.training.watch import Progress as Step

PLAIN_SECONDS = 5.0  # between progress lines where there is no terminal to draw a bar in
SHORTEST_TIMED = 0.2  # seconds; a rate over less says nothing


_UsageError: Any = typer.BadParameter.__bases__[0]  # typer's copy of click has it, and no public name for it


class _Commands(TyperGroup):
    """The group of commands; turns what a user can cause into one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _tolerate_any_name()
        try:
            sys.exit(super().main(*args, **{**kwargs, "standalone_mode": False}))
        except _UsageError as error:
            message = error.format_message()
            if "\n" in message:  # the help, for want of a command
                typer.echo(message, err=True)
                sys.exit(2)
            _fail(f"{message[:1].lower()}{message[1:].rstrip('.')}{_see_help(error.ctx)}")
        except ValueError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail("the disk is full")
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
                raise
            _fail("the device's memory is full: ask for smaller pictures or batches")
        finally:
            _flush_stdout()


def _fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _see_help(context: Any) -> str:
    return "" if context is None else f"; see {context.command_path} --help"


def _tolerate_any_name() -> None:
    """Let a file's name be printed where the terminal's encoding lacks its letters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush_stdout() -> None:
    """Write out what is buffered; a reader that has gone away (`| head`) is no error."""
    if sys.stdout is None:  # closed before we started
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _fail(f"cannot print the results: {error.strerror}")


class _Grouped(TyperCommand):
    """A command whose help shows its options in the groups of `_GROUPS`; the others stand at the end."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and the options group by group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in _GROUPS}}
        for parameter in self.get_params(ctx):
            title = next((title for title, names in _GROUPS.items() if parameter.name in names), "Options")
            title = "Arguments" if parameter.param_type_name == "argument" else title
            line = parameter.get_help_record(ctx)
            groups.setdefault(title, []).extend([] if line is None else [line])
        for title, lines in groups.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Pictures that follow an edge map, a pose or a depth map: make them, and train the models that do.",
    epilog="Start with:  controlkit demo",
)


_GROUPS = {  # of the options of `generate`, in its help
    "What the picture follows": (
        *("control", "map_", "adapter", "ip_adapter", "image", "image_noise", "class_label"),
        *("negative_prompt", "prompt_syntax", "guidance", "guidance_rescale", "clip_guidance"),
    ),
    "Models": ("base", "lora", "embedding", "vae", "clip", "image_encoder"),
    "Where it starts, and how it is made": (
        *("start", "strength", "mask", "seed", "steps", "scheduler", "temperature"),
        *("width", "height", "hires", "hires_strength"),
    ),
    "Speed and memory": (
        *("device", "compile_", "cuda_graph", "memory", "tile"),
        *("control_every", "features_every", "guidance_until", "merge_tokens"),
    ),
    "Pictures and files": ("output", "count", "like", "grid", "preview"),
}


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


class Terminal:
    """Status lines and progress on stderr: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._first: tuple[float, int] | None = None  # when the first progress came, and how far it was
        self._last = time.monotonic()

    def status(self, text: str) -> None:
        """Say what happens now; the next progress is that of something new."""
        self.close()
        self._last = time.monotonic()
        typer.echo(f"{text} ...", err=True)

    def note(self, text: str) -> None:
        """Say something without interrupting the progress."""
        if self._bar is None:
            typer.echo(text, err=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Show how far it is: the count, the rate, the time left, and a note."""
        now = time.monotonic()
        self._first = self._first or (now, done)
        seconds = (now - self._first[0]) / max(done - self._first[1], 1)  # for one step
        if now - self._first[0] < SHORTEST_TIMED:
            seconds = 0.0
        rate = "" if not seconds else f"{1 / seconds:.1f}/s" if seconds < 1 else f"{seconds:.1f} s each"
        left = f"{seconds * (total - done):.0f} s left" if seconds and done < total else ""
        if sys.stderr is not None and sys.stderr.isatty():
            self._draw(done, total, "  ".join(part for part in (rate, left, note) if part))
        elif done == total or now - self._last >= PLAIN_SECONDS:
            self._last = now
            typer.echo("  ".join(part for part in (f"  {done}/{total}", rate, left, note) if part), err=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._first = None

    def _draw(self, done: int, total: int, text: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        if self._bar is None:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}", markup=False))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.add_task("", total=total, text="")
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, total=total, text=text)


@contextmanager
def _terminal() -> Iterator[Terminal]:
    """A terminal for one command: its bar is closed at the end, and warnings become one-line notes."""
    terminal = Terminal()
    before = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: terminal.note(f"note: {message}")
    try:
        yield terminal
    except KeyboardInterrupt:
        terminal.close()
        terminal.note("interrupted")
        raise
    finally:
        warnings.showwarning = before
        terminal.close()


def _option(metavar: str, text: str, *names: str) -> Any:
    """An option: what stands for its value in the help, the help, and its names if not the parameter's."""
    return typer.Option(*names, metavar=metavar, help=text)


Text = str | None
Texts = list[str] | None
Whole = int | None
Number = float | None
Switch = bool | None
_SIZE_HELP = "A multiple of 8.  [default: in the first map's shape, or the base's]"
_SCHEDULER_HELP = (
    "ddim, ddpm, pndm, euler, euler-a, dpm++, dpm++-karras, dpm++-sde, unipc, heun, lms, lcm or tcd."
    "  [default: ddim]"
)
_MASK_HELP = (
    "Redraw only what is white in this picture, and not transparent; of strokes of one colour on a"
    " transparent layer, what is drawn."
)
_LIKE_HELP = "Repeat this picture; other options change it, and none takes away what it had: --lora none."
_CONTROL_HELP = (
    "Follow this picture's map. How: :0.8 (strength), :1..0.2 (a schedule), :start=0.2, :end=0.5,"
    " :mode=prompt, :gate=webui, :layers=soft, :mask=region.png, :only_mid=true"
)
Output = Annotated[str, _option("FILE", "Where to write it; an older file is replaced.", "-o", "--output")]
Settings = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings to change.", show_default=False)
]


@app.command(epilog="Example:  controlkit demo --seed 3 -o demo.png")
def demo(
    seed: Annotated[int, _option("N", "Which scene.")] = 0,
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
    with _terminal() as terminal:
        result = demo_module.run_demo(seed, report=terminal)
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
    cls=_Grouped,
)
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    control: Annotated[Texts, _option("KIND=PICTURE[:HOW]", _CONTROL_HELP)] = None,
    map_: Annotated[Texts, _option("KIND=MAP[:HOW]", "Follow this file, a map already.", "--map")] = None,
    base: Annotated[
        Text, _option("NAME", "tiny, sd15, sd21, sdxl, folder or hub id.  [default: tiny]")
    ] = None,
    adapter: Annotated[
        Texts, _option("KIND=NAME", "Another ControlNet: a file, a folder or a hub id.")
    ] = None,
    lora: Annotated[Texts, _option("FILE[:WEIGHT]", "Put a LoRA onto the base: file or hub id.")] = None,
    embedding: Annotated[Texts, _option("[WORD=]FILE", "Teach the base a word: textual inversion.")] = None,
    ip_adapter: Annotated[
        Texts, _option("FILE=PICTURE[:SCALE]", "Show the base a picture through an IP-Adapter.")
    ] = None,
    image_encoder: Annotated[
        Text, _option("FOLDER", "The IP-Adapter's picture encoder.  [default: the one beside it]")
    ] = None,
    vae: Annotated[
        Text, _option("NAME", "Another autoencoder: folder or hub id; taesd and taesdxl are small.")
    ] = None,
    negative_prompt: Annotated[
        Text, _option("TEXT", "What the picture should not show.", "--negative", "--negative-prompt")
    ] = None,
    prompt_syntax: Annotated[
        Text, _option("NAME", "a1111: (word:1.3) weighs a word, and prompts may be long.  [default: plain]")
    ] = None,
    steps: Annotated[Whole, _option("N", "Denoising steps, 1 to 1000.  [default: 20]")] = None,
    guidance: Annotated[Text, _option("X", "How much the prompt counts.  [default: the base's]")] = None,
    clip_guidance: Annotated[
        Number, _option("X", "How much --clip's view of the prompt counts besides: 30, say.  [default: 0]")
    ] = None,
    clip: Annotated[Text, _option("NAME", "The CLIP: clip-b, clip-l, folder or hub id.")] = None,
    scheduler: Annotated[Text, _option("NAME", _SCHEDULER_HELP)] = None,
    temperature: Annotated[
        Text, _option("X", "Share of the noise that the scheduler injects: 0 is deterministic.")
    ] = None,
    guidance_rescale: Annotated[
        Number, _option("X", "0 to 1: against washed-out pictures of large guidance.  [default: 0]")
    ] = None,
    start: Annotated[Text, _option("PICTURE", "Start from this picture.", "--from")] = None,
    strength: Annotated[
        Number, _option("X", "How much of it is redone.  [default: 0.75; with a mask 1]")
    ] = None,
    mask: Annotated[Text, _option("MASK", _MASK_HELP)] = None,
    image: Annotated[Text, _option("PICTURE", "Tell an unCLIP base this picture besides the text.")] = None,
    image_noise: Annotated[
        Whole, _option("N", "How freely it is taken, 0 to 999.  [default: 0]", "--image-noise")
    ] = None,
    class_label: Annotated[Whole, _option("N", "The class, for a base that is told one.", "--class")] = None,
    hires: Annotated[
        Number, _option("FACTOR", "Then enlarge by this factor, and refine under the same control.")
    ] = None,
    hires_strength: Annotated[
        Number, _option("X", "How much the second stage redoes.  [default: 0.5]")
    ] = None,
    tile: Annotated[
        Text, _option("PIXELS", "Show the networks tiles of this size: bounded memory for large pictures.")
    ] = None,
    control_every: Annotated[
        Whole, _option("N", "Lossy: run the control networks in every N-th step.  [default: 1]")
    ] = None,
    features_every: Annotated[
        Whole, _option("N", "Lossy: run the networks' deep parts in every N-th step.  [default: 1]")
    ] = None,
    guidance_until: Annotated[
        Number, _option("X", "Lossy: guide only this first share of the steps.  [default: 1]")
    ] = None,
    merge_tokens: Annotated[
        Number, _option("X", "Lossy: merge this share of like tokens, up to 0.75.  [default: 0]")
    ] = None,
    seed: Annotated[Whole, _option("N", "Seed of the first picture.  [default: 0]")] = None,
    count: Annotated[int, _option("N", "How many pictures, with consecutive seeds.", "-n", "--count")] = 1,
    output: Output = "out.png",
    width: Annotated[Text, _option("PIXELS", _SIZE_HELP)] = None,
    height: Annotated[Text, _option("PIXELS", _SIZE_HELP)] = None,
    device: Annotated[Text, _option("NAME", "auto, cpu, cuda, cuda:1 or mps.  [default: auto]")] = None,
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
        Text, _option("AMOUNT", "Stay within this memory, as 4GB: what that takes is chosen and told.")
    ] = None,
    like: Annotated[Text, _option("PICTURE", _LIKE_HELP)] = None,
    grid: Annotated[
        Texts, _option("KEY=VALUES", "Vary one setting, or two, on a sheet: scale=0.5,0.8 seed=1..4")
    ] = None,
    preview: Annotated[
        Text, _option("FILE", "Show in this PNG what the picture will be, while it is made.")
    ] = None,
) -> None:
    """Make pictures that follow a prompt and the edges, pose or depth of another picture."""
    started = time.monotonic()
    typer.echo("reading what is asked for ...", err=True)  # before anything that takes time
    from controlkit import arguments, generate_job, grid_job
    from controlkit.generate_notes import without_effect
    from controlkit.generate_plan import Options, check_preview

    words = [word for word in (prompt, *context.args) if word is not None]
    prompt, axes_texts = grid_job.split_words(words, grid or ())
    asked = {name: value for name, value in context.params.items() if value is not None}
    asked["prompt"] = prompt
    given = {
        name.rstrip("_"): value
        for name, value in asked.items()
        if name.rstrip("_") in Options.__dataclass_fields__ and value is not None
    }
    if memory is not None:
        given["memory_limit"] = arguments.parse_bytes(given.pop("memory"))
    for name in ("tile", "width", "height", "temperature", "guidance"):  # numbers that may be none
        if name in given:
            whole = name in ("tile", "width", "height")
            given[name] = arguments.parse_number(given[name], f"--{name}", whole=whole)
    with _terminal() as terminal:
        plan = generate_job.plan(
            given,
            controls=control or (),
            maps=map_ or (),
            adapters=adapter or (),
            start=start,
            mask=mask,
            loras=lora or (),
            embeddings=embedding or (),
            ip_adapters=ip_adapter or (),
            image_encoder=image_encoder,
            image=image,
            output=output,
            like=like,
        )
        axes = grid_job.parse_axes(axes_texts) if axes_texts else []
        shown = None if preview is None else check_preview(preview, plan)
        if axes:
            grid_job.check(plan, axes)
        for note in (
            *plan.notes,
            *without_effect(plan, grid_job.variants(plan, axes), [axis.key for axis in axes]),
        ):
            terminal.note(f"note: {note}")
        if axes:
            made = grid_job.run(plan, axes, terminal, preview=shown)
            print(f"wrote {plan.outputs[0]}, {len(made)} pictures, in {time.monotonic() - started:.0f} s")
            return
        records = generate_job.run(plan, terminal, preview=shown)
    _tell_pictures(plan.outputs, records, time.monotonic() - started)


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
        _option("PATH", "For one map its .png, else a folder.  [default: map.png or maps]", "-o", "--output"),
    ] = None,
    workers: Annotated[Whole, _option("N", "Threads that read and write.  [default: one per core]")] = None,
    batch: Annotated[Whole, _option("N", "Pictures that a network sees at once.  [default: 4]")] = None,
    device: Annotated[
        Text, _option("NAME", "Where networks run: auto, cpu, cuda, mps.  [default: auto]")
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
    from controlkit import arguments, preprocess_job

    paths, settings = arguments.split_settings(pictures)
    names = [name.strip() for name in kinds.split(",")]
    options = preprocess_job.settings_of_kinds(names, settings, device=device)
    beside = preprocess_job.Beside(npy=npy, png16=png16)
    if not paths:
        raise ValueError("name a picture, a folder or a pattern")
    if arguments.is_one_map(names, paths, output):
        _preprocess_one(names[0], paths[0], options[names[0]], output or "map.png", beside)
        return
    from controlkit import folder_job

    with _terminal() as terminal:
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
        result = folder_job.run(job, terminal)
    if not result.is_mine:
        return
    for path in result.written:
        print(f"wrote {path}")
    print(result.summary())
    if result.failed:
        raise typer.Exit(1)


def _preprocess_one(kind: str, picture: str, options: dict[str, str], output: str, beside: Beside) -> None:
    from controlkit import preprocess_job

    with _terminal() as terminal:
        plan = preprocess_job.plan(kind, picture, options, output=output, beside=beside)
        written = preprocess_job.run(plan, terminal)
    for path in written:
        print(f"wrote {path}")
    print("follow it with:")
    print(f'  controlkit generate "a red figure" --map {shlex.quote(f"{kind}={written[0]}")}')


@app.command(epilog="Example:  controlkit draw pose.json -o pose.png --size 768x512 --mirror")
def draw(
    pose: Annotated[str, typer.Argument(metavar="POSE.json", help="Joints in OpenPose's format.")],
    output: Output = "drawn.png",
    size: Annotated[Text, _option("WxH", "The map's size.  [default: the canvas's]")] = None,
    canvas: Annotated[Text, _option("WxH", "What the joints refer to, if the file does not say.")] = None,
    style: Annotated[str, _option("NAME", "v1.1, v1.0 or xinsir.")] = "v1.1",
    mirror: Annotated[bool, typer.Option("--mirror", help="Exchange left and right.")] = False,
    drop: Annotated[
        Texts, _option("LIMB", "Leave this out: left-arm, head, right-leg ...; repeatable.")
    ] = None,
    drop_random: Annotated[float, _option("P", "Leave each limb out with this probability.")] = 0.0,
    jitter: Annotated[float, _option("PIXELS", "Move joints by noise of this standard deviation.")] = 0.0,
    seed: Annotated[int, _option("N", "Seed of what is random.")] = 0,
) -> None:
    """Draw poses from JSON, at any size, mirrored, jittered or without some limbs."""
    from controlkit import draw_job

    changes = draw_job.Changes(
        mirror=mirror, drop=drop or (), drop_random=drop_random, jitter=jitter, seed=seed
    )
    with _terminal():
        written = draw_job.draw(pose, output=output, size=size, canvas=canvas, style=style, changes=changes)
    for path in written:
        print(f"wrote {path}")
    print("follow it with:")
    print(f'  controlkit generate "a red figure" --map {shlex.quote(f"openpose={written[0]}")}')


@app.command(epilog="Example:  controlkit lint edges.png downloads/ --picture photo.jpg")
def lint(
    maps: Annotated[list[str], typer.Argument(metavar="MAP...", help="Files, folders, patterns.")],
    kind: Annotated[
        str, _option("KIND", "What they are.  [default: as the file or its name says, or guessed]")
    ] = "",
    picture: Annotated[str, _option("PICTURE", "What they were made from, to compare sizes.")] = "",
) -> None:
    """Say what is wrong with maps, and how to cure it. Exit code 1 if anything is."""
    from controlkit import lint_job

    with _terminal() as terminal:
        job = lint_job.plan(maps, kind=kind, picture=picture)
        result = lint_job.run(job, terminal.progress if len(job.maps) > 1 else lambda *_: None)
    for verdict in result.verdicts:
        for line in verdict.lines():
            print(line)
    print(result.summary())
    if result.findings:
        raise typer.Exit(1)


data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data", help="Look at data sets before they are trained on.")


@data.command("check", epilog="Example:  controlkit data check photos/ --map canny --sheet pairs.png")
def data_check(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder, metadata.jsonl, .tar shards, hub id ...")
    ],
    settings: Settings = None,
    map_: Annotated[str, _option("KIND", "What the maps are.  [default: guessed]", "--map")] = "",
    sheet: Annotated[Text, _option("FILE", "Write a contact sheet of some pairs, a .png.")] = None,
    json: Annotated[Text, _option("FILE", "Write all that was found.")] = None,
    lint: Annotated[bool, typer.Option(help="Look for mistakes in the maps, too.")] = True,
) -> None:
    """Open every pair once and say what cannot be used. Exit code 1 if anything cannot."""
    from controlkit import arguments, data_job

    with _terminal() as terminal:
        result = data_job.check_data(
            source,
            report=terminal,
            kind=map_,
            settings=arguments.parse_settings(settings or ()),
            sheet=sheet,
            json=json,
            lint=lint,
        )
    for line in result.lines:
        print(line)
    for path in result.written:
        print(f"wrote {path}")
    if result.code:
        raise typer.Exit(result.code)


@app.command(epilog="Example:  controlkit train tiny-canny out=my-run steps=200")
def train(
    recipe: Annotated[
        str, typer.Argument(help="A recipe's name or its .toml file.", show_default=False)
    ] = "",
    settings: Settings = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory and time it will take, and load nothing.")
    ] = False,
    find_batch: Annotated[
        bool, typer.Option("--find-batch", help="Try which batch sizes fit, and how fast they are.")
    ] = False,
    diffusers_flags: Annotated[
        str, _option("FLAGS", "Print the recipe for a train_controlnet.py command.", "--from-diffusers-flags")
    ] = "",
) -> None:
    """Train a ControlNet from a recipe; what it learned lies in OUT/controlnet."""
    if diffusers_flags:
        from controlkit.training.flags import from_diffusers_flags

        print(from_diffusers_flags(diffusers_flags), end="")
        return
    if not recipe:
        raise ValueError(
            "which recipe? give its name or its .toml file, such as: controlkit train tiny-canny"
        )
    if plan or find_batch:
        _preview(recipe, settings or [], find_batch=find_batch)
        return
    with _terminal() as terminal:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
            terminal.status("loading the libraries")
        from controlkit.training import train_recipe

        def show(step: Step) -> None:
            if step.message:
                terminal.note(step.message)
            else:
                gap = "" if step.gap is None else f"  gap {max(step.gap, 0):.1%}"
                terminal.progress(step.step, step.steps, f"loss {step.loss:.4f}{gap}")

        result = train_recipe(recipe, settings or [], progress=show)
    for line in result.lines:
        print(line)
    if result.result is None:
        return
    print(f"\nwrote {result.result}")
    if result.result.name == "controlnet":
        from controlkit.adapters import read_info
        from controlkit.info_job import how_to_use

        spec = read_info(result.result).map
        if spec.channels == 3:
            print("use it with:")
            print(f"  {how_to_use(spec.kind, str(result.result), result.base)}")
        else:
            print(f"its README says how to use it: it takes maps of {spec.channels} channels")


def _preview(recipe: str, settings: list[str], *, find_batch: bool) -> None:
    """What a training will need, or which batches fit."""
    with _terminal() as terminal:
        terminal.status("loading the libraries")
        from controlkit.training import previews

        if find_batch:
            note = lambda step: terminal.note(step.message)  # noqa: E731
            lines = previews.find_batch_for(recipe, settings, progress=note)
        else:
            lines = previews.plan_recipe(recipe, settings)
    for line in lines:
        print(line)


@app.command(epilog="Example:  controlkit ui --base sd15 --runs runs")
def ui(
    base: Annotated[str, _option("NAME", "tiny, sd15, sd21, sdxl, folder or hub id.")] = "tiny",
    device: Annotated[str, _option("NAME", "auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    host: Annotated[
        str, _option("ADDRESS", "Who may reach the page: by default this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, _option("N", "The port.")] = 7860,
    runs: Annotated[str, _option("FOLDER", "Where trainings are, and what is made is kept.")] = "runs",
    data: Annotated[
        Texts,
        _option(
            "FOLDER",
            "Trainings may use pictures within it alone (repeatable).  [default: any folder of this machine;"
            " where others reach the page, none]",
        ),
    ] = None,
) -> None:
    """Open the studio page: make pictures and train adapters in a browser."""
    from controlkit.studio import server

    with (
        _terminal() as terminal,
        server.opened(
            base, device=device, host=host, port=port, runs=runs, data=data or (), report=terminal
        ) as address,
    ):
        for line in server.told(address, host, runs):
            print(line, flush=True)
        server.wait()


@app.command(epilog="Example:  controlkit convert control_v11p_sd15_canny.pth canny.safetensors --to single")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, a folder or a hub id.")],
    output: Annotated[
        str, typer.Argument(metavar="OUT", help="A .safetensors file; for diffusers a folder.")
    ],
    to: Annotated[str, _option("LAYOUT", "diffusers, single, original or control-lora.", "--to")],
    dtype: Annotated[Text, _option("TYPE", "fp16, bf16 or fp32.  [default: the file's]")] = None,
    base: Annotated[Text, _option("NAME", "The base, where the file needs one to be whole.")] = None,
    rank: Annotated[Whole, _option("N", "Of a Control-LoRA: 1 to 1024.  [default: 128]")] = None,
) -> None:
    """Convert an adapter file: to diffusers' folder, to one file, to the original's keys."""
    from controlkit import convert_job

    with _terminal() as terminal:
        plan = convert_job.plan(source, output, to=to, dtype=dtype, base=base, rank=rank)
        lines = convert_job.run(plan, terminal)
    for line in lines:
        print(line)


@app.command(epilog="Example:  controlkit info canny.safetensors --base sd15")
def info(
    adapter: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a hub id.")],
    base: Annotated[Text, _option("NAME", "Say whether it fits this base.")] = None,
) -> None:
    """Say what an adapter file is, what it says of itself, and how to use it."""
    from controlkit import info_job

    with _terminal():
        lines = info_job.describe(adapter, base=base)
    for line in lines:
        print(line)


@app.command(epilog="Example:  controlkit models --base sd15 --kind depth")
def models(
    base: Annotated[Text, _option("NAME", "Those for this base alone.")] = None,
    kind: Annotated[Text, _option("KIND", "Those for this kind of map alone.")] = None,
) -> None:
    """List the adapters on the hub that are known by name, and which of them are in the cache."""
    from controlkit import models_job

    for line in models_job.table(base=base, kind=kind):
        print(line)


@app.command(epilog="Example:  controlkit transfer canny.safetensors --from sd15 --to my-base -o canny-mine")
def transfer(
    adapter: Annotated[str, typer.Argument(metavar="FILE", help="A file, a folder or a hub id.")],
    old: Annotated[str, _option("BASE", "The base that it was trained on.", "--from")],
    new: Annotated[str, _option("BASE", "The base that it shall fit, of the same family.", "--to")],
    output: Annotated[str, _option("OUT", "A folder, or a .safetensors file.", "-o", "--output")],
    dtype: Annotated[Text, _option("TYPE", "fp16, bf16 or fp32.  [default: the file's]")] = None,
) -> None:
    """Carry a ControlNet over to another base of its family."""
    from controlkit import transfer_job

    with _terminal() as terminal:
        plan = transfer_job.plan(adapter, output, old=old, new=new, dtype=dtype)
        lines = transfer_job.run(plan, terminal)
    for line in lines:
        print(line)


@app.command(
    epilog="Example:  controlkit evaluate photos/ --base sd15 --adapter canny --adapter canny=mine.pth"
)
def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="A data set as for train, a run's folder, or world, the bundled one."
        ),
    ] = "world",
    settings: Settings = None,
    adapter: Annotated[
        Texts, _option("[KIND=]NAME[:HOW]", "What is measured; repeatable. HOW is as in --control.")
    ] = None,
    base: Annotated[Text, _option("NAME", "The base.  [default: tiny, or the run's]")] = None,
    output: Annotated[
        str,
        _option(
            "FOLDER", "Where pictures and report go; one that is there is gone on with.", "-o", "--output"
        ),
    ] = "report",
    count: Annotated[Whole, _option("N", "Pairs; 0 for all.  [default: 50]", "-n", "--count")] = None,
    seeds: Annotated[Whole, _option("N", "Pictures of each pair.  [default: 1]")] = None,
    steps: Annotated[Whole, _option("N", "Denoising steps.  [default: 20]")] = None,
    guidance: Annotated[Number, _option("X", "How much the prompt counts.  [default: the base's]")] = None,
    scheduler: Annotated[Text, _option("NAME", _SCHEDULER_HELP)] = None,
    negative_prompt: Annotated[
        Text, _option("TEXT", "What no picture should show.", "--negative", "--negative-prompt")
    ] = None,
    features: Annotated[
        Text, _option("NAME", "What FID and KID see: inception, or none.  [default: inception]")
    ] = None,
    clip: Annotated[
        Text,
        _option("NAME", "Of the CLIP score: clip-b, clip-l, folder, hub id or none.  [default: clip-b]"),
    ] = None,
    device: Annotated[Text, _option("NAME", "auto, cpu, cuda, cuda:1 or mps.  [default: auto]")] = None,
) -> None:
    """Measure how well adapters are obeyed on held-out pairs, against no control and the best possible."""
    with _terminal() as terminal:
        if os.environ.get("RANK", "0") == "0":
            terminal.status("reading what is asked for")
        from controlkit.arguments import split_settings
        from controlkit.training.evaluation.request import make_request

        sources, given = split_settings([data, *(settings or ())])
        if len(sources) > 1:
            raise ValueError(f"one data set is evaluated on, and two are named: {', '.join(sources[:2])}")
        request = make_request(
            sources[0] if sources else "world",
            output,
            adapters=adapter or (),
            base=base,
            settings=given,
            count=count,
            seeds=seeds,
            steps=steps,
            guidance=guidance,
            scheduler=scheduler,
            negative_prompt=negative_prompt,
            features=features,
            clip=clip,
            device=device,
        )
        from controlkit.training.evaluation.job import evaluate as run_evaluation

        result = run_evaluation(request, terminal)
    for line in result.lines:
        print(line)
    for path in result.written:
        print(f"wrote {path}")


@app.command(epilog="Example:  controlkit measure -n 50 --adapter canny=runs/tiny-canny/controlnet")
def measure(
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=NAME", help="Measure this ControlNet instead of the bundled three."),
    ] = None,
    count: Annotated[int, typer.Option("-n", "--count", metavar="N", help="Held-out scenes.")] = 50,
    base: Annotated[str, typer.Option(metavar="NAME", help="A base of the bundled world.")] = "tiny",
    card: Annotated[
        bool, typer.Option("--card", help="Write the bundled models' page, controlkit/tiny/README.md.")
    ] = False,
) -> None:
    """Measure on the bundled world how well pictures follow their maps and captions."""
    from controlkit.arguments import parse_adapters

    names = parse_adapters(adapter or ())
    with _terminal() as terminal:
        terminal.status("loading the libraries and models")
        from controlkit.adapters import load_adapter
        from controlkit.base import load_base
        from controlkit.training import bundle, quality

        locked = load_base(base)
        adapters = {
            kind: load_adapter(name, base=locked)
            for kind, name in (names or {kind: kind for kind in quality.KINDS}).items()
        }
        terminal.status(f"measuring on {count} held-out scenes")
        examination = quality.examine(locked, adapters, scenes=count, progress=terminal.progress)
        if card:
            bundle.write_card(examination)
    print("\n\n".join(bundle.quality_table(examination)))


def main() -> None:
    """The `controlkit` command."""
    app()

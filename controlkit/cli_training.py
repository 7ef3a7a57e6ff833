"""The commands that train and measure: `data check | train | evaluate | measure`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer

from controlkit import terminal
from controlkit.cli_options import DTYPE_HELP, SCHEDULER_HELP, Number, Settings, Text, Texts, Whole, option

if TYPE_CHECKING:
    from controlkit.training.watch import Progress as Step

app = typer.Typer(rich_markup_mode=None)
data = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data, name="data", help="Look at data sets before they are trained on.")


@data.command("check", epilog="Example:  controlkit data check photos/ --map canny --sheet pairs.png")
def data_check(
    source: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A folder, metadata.jsonl, .tar shards, hub id ...")
    ],
    settings: Settings = None,
    map_: Annotated[str, option("KIND", "What the maps are.  [default: guessed]", "--map")] = "",
    sheet: Annotated[Text, option("FILE", "Write a contact sheet of some pairs, a .png.")] = None,
    json: Annotated[Text, option("FILE", "Write all that was found.")] = None,
    lint: Annotated[bool, typer.Option(help="Look for mistakes in the maps, too.")] = True,
) -> None:
    """Open every pair once and say what cannot be used. Exit code 1 if anything cannot."""
    from controlkit import arguments, data_job

    with terminal.opened() as told:
        result = data_job.check_data(
            source,
            report=told,
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
        str, option("FLAGS", "Print the recipe for a train_controlnet.py command.", "--from-diffusers-flags")
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
    if plan and find_batch:
        raise ValueError("--plan loads nothing and --find-batch tries: give one of them")
    if plan or find_batch:
        _preview(recipe, settings or [], find_batch=find_batch)
        return
    with terminal.opened() as told:
        if os.environ.get("RANK", "0") == "0":  # of several processes the first one speaks
            told.status("loading the libraries")
        from controlkit.training import train_recipe

        def show(step: Step) -> None:
            if step.message:
                told.note(step.message)
            else:
                gap = "" if step.gap is None else f"  gap {max(step.gap, 0):.1%}"
                told.progress(step.step, step.steps, f"loss {step.loss:.4f}{gap}")

        result = train_recipe(recipe, settings or [], progress=show)
    for line in result.lines:
        print(line)
    if result.stopped_at is not None:
        raise typer.Exit(128 + result.signal)  # as a shell tells of what a signal ended: `&&` must not go on
    if result.result is None:
        return
    print(f"\nwrote {result.result}")
    if result.result.name == "controlnet":
        from controlkit.formats.adapter_file import open_adapter_file
        from controlkit.info_job import how_to_use_file

        if (result.result.parent / "unet").is_dir():
            print(f"and {result.result.parent / 'unet'}: its README says how to use both together")
        else:
            print("use it with:")
            written = open_adapter_file(str(result.result))
            print(f"  {how_to_use_file(written, str(result.result), result.base)}")


def _preview(recipe: str, settings: list[str], *, find_batch: bool) -> None:
    """What a training will need, or which batches fit."""
    with terminal.opened() as told:
        told.status("loading the libraries")
        from controlkit.training import previews

        if find_batch:
            note = lambda step: told.note(step.message)  # noqa: E731
            lines = previews.find_batch_for(recipe, settings, progress=note)
        else:
            lines = previews.plan_recipe(recipe, settings)
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
        Texts, option("[KIND=]NAME[:HOW]", "What is measured; repeatable. HOW is as in --control.")
    ] = None,
    base: Annotated[Text, option("NAME", "The base.  [default: tiny, or the run's]")] = None,
    output: Annotated[
        str,
        option(
            "FOLDER", "Where pictures and report go; one that is there is gone on with.", "-o", "--output"
        ),
    ] = "report",
    count: Annotated[Whole, option("N", "Pairs; 0 for all.  [default: 50]", "-n", "--count")] = None,
    seeds: Annotated[Whole, option("N", "Pictures of each pair.  [default: 1]")] = None,
    steps: Annotated[Whole, option("N", "Denoising steps.  [default: 20]")] = None,
    guidance: Annotated[Number, option("X", "How much the prompt counts.  [default: the base's]")] = None,
    scheduler: Annotated[Text, option("NAME", SCHEDULER_HELP)] = None,
    negative_prompt: Annotated[
        Text, option("TEXT", "What no picture should show.", "--negative", "--negative-prompt")
    ] = None,
    features: Annotated[
        Text, option("NAME", "What FID and KID see: inception, or none.  [default: inception]")
    ] = None,
    clip: Annotated[
        Text,
        option("NAME", "Of the CLIP score: clip-b, clip-l, folder, hub id or none.  [default: clip-b]"),
    ] = None,
    device: Annotated[Text, option("NAME", "auto, cpu, cuda, cuda:1 or mps.  [default: auto]")] = None,
    dtype: Annotated[Text, option("TYPE", DTYPE_HELP)] = None,
) -> None:
    """Measure how well adapters are obeyed on held-out pairs, against no control and the best possible."""
    with terminal.opened() as told:
        if os.environ.get("RANK", "0") == "0":
            told.status("reading what is asked for")
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
            dtype=dtype,
        )
        from controlkit.training.evaluation.job import evaluate as run_evaluation

        result = run_evaluation(request, told)
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
    with terminal.opened() as told:
        told.status("loading the libraries and models")
        from controlkit.adapters import load_adapter
        from controlkit.base import load_base
        from controlkit.training import bundle, quality

        locked = load_base(base)
        adapters = {
            kind: load_adapter(name, base=locked, kind=kind)
            for kind, name in (names or {kind: kind for kind in quality.KINDS}).items()
        }
        told.status(f"measuring on {count} held-out scenes")
        examination = quality.examine(locked, adapters, scenes=count, progress=told.progress)
        if card:
            bundle.write_card(examination)
    print("\n\n".join(bundle.quality_table(examination)))

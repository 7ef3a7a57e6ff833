"""What is to be known of a generation that can be made, but perhaps not as it was meant."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import __version__, preprocessors, prompt_syntax, rules
from controlkit.infotext import ControlRecord, PictureRecord
from controlkit.usual_guidance import is_told_guidance, usual_guidance

if TYPE_CHECKING:
    from controlkit.generate_plan import Options, Plan, Source

_SEEDS = 2**32  # what a seed is told apart by
GUIDED = {  # settings that act on guidance alone, and what they are called
    "negative_prompt": "--negative",
    "guidance_rescale": "--guidance-rescale",
    "guidance_until": "--guidance-until",
    "negative_original_size": "--negative-original-size",
}

Variant = tuple["Options", Sequence[ControlRecord]]
"""One picture's settings, and its controls'."""


def versions() -> dict[str, str]:
    """Of this software and of what a picture depends on besides."""
    from importlib.metadata import version

    libraries = {name: version(name) for name in ("diffusers", "torch", "transformers")}
    return {"controlkit": __version__, **libraries}


def of_versions(record: PictureRecord) -> Iterator[str]:
    """What an earlier picture was made with, where that is not what there is here."""
    here = versions()
    then = record.versions
    other = [f"{name} {then[name]} (here {here.get(name)})" for name in then if here.get(name) != then[name]]
    if other:
        yield f"made with {', '.join(other)}: the picture may differ slightly"


def of_maps(sources: Iterable[Source]) -> Iterator[str]:
    """What is wrong with the maps that are used as they are, and the cure."""
    for source in sources:
        if source.record.is_map and source.record.kind in preprocessors.names():
            for finding in preprocessors.lint(source.picture, source.record.kind):
                yield f"{source.record.path}: {finding.message}; {finding.cure}"


def of_words(words: Iterable[str], prompts: Iterable[str]) -> Iterator[str]:
    """Of the words that a base was taught, those that no prompt says."""
    said = "\n".join(prompts).lower()
    for word in words:
        if word.lower() not in said:
            yield f"the word {word!r} has no effect: no prompt says it"


def of_networks(record: PictureRecord, networks: Sequence[Any]) -> Iterator[str]:
    """Of settings that change nothing of the control networks that they are of, one for each control."""
    from controlkit.kinds import kind_of

    kinds = [kind_of(network) for network in networks]
    if record.control_every > 1 and kinds and not any(kind.can_rest for kind in kinds):
        yield f"--control-every has no effect: a {kinds[0].title} is not run by itself in each step"
    for control, network, kind in zip(record.controls, networks, kinds, strict=True):
        if len(kind.levels(network)) > 1:
            continue
        curve = rules.MODES[control.mode].curve if control.layers is None else control.layers
        asked = [f"the curve {curve!r}"] * (isinstance(curve, str) and curve != "flat")
        for setting in [*asked, *["only_mid=true"] * control.only_mid]:
            yield f"{setting} of the {control.kind} control has no effect: a {kind.title} has 1 connection"


def without_effect(job: Plan, variants: Sequence[Variant], varied: Collection[str] = ()) -> Iterator[str]:
    """What is asked for and changes nothing, or is read as text. variants: all pictures; varied: the settings
    of a grid.
    """
    options, given = job.options, {*job.given, *varied}
    settings = [one for one, _ in variants]
    yield from _of_texts(settings)
    yield from _of_seeds(settings)
    yield from _of_grid(job, settings, varied)
    by_clip = any(one.clip_guidance for one in settings)
    by_steps = by_clip or any(one.pag for one in settings)
    if "clip" in given and options.clip and not by_clip:
        yield "--clip has no effect without --clip-guidance, as in --clip-guidance 30"
    if "hires_strength" in given and all(one.hires == 1 for one in settings):
        yield "--hires-strength has no effect without --hires, as in --hires 2"
    if "control_every" in given and options.control_every > 1 and not job.sources:
        yield "--control-every has no effect: there is no control"
    yield from _of_guidance(
        [
            option
            for name, option in GUIDED.items()
            if name in given and _differs(name, settings) and not (by_steps and name == "guidance_until")
        ],
        settings,
    )
    if "cuda_graph" in given and options.cuda_graph and not _may_be_cuda(options.device):
        yield f"--cuda-graph has no effect on the device {options.device}"
    if "temperature" not in given and any(one.temperature != options.temperature for one in settings):
        yield f"the temperature {options.temperature} is left out for the schedulers that do not take it"
    yield from _of_windows(job, variants)


def _of_texts(settings: Sequence[Options]) -> Iterator[str]:
    """Of prompts with marks that are read as text; each is told once."""
    lines = (
        line
        for one in settings
        for text in (one.prompt, one.negative_prompt or "")
        for line in prompt_syntax.notes(text, one.prompt_syntax)
    )
    yield from dict.fromkeys(lines)


def _of_seeds(settings: Sequence[Options]) -> Iterator[str]:
    """Of seeds that draw the same noise as others: torch's generator on the CPU takes 32 bits of each."""
    last = max(one.seed + one.count - 1 for one in settings)
    if last >= _SEEDS:
        yield f"the seed {last} draws the same noise as {last % _SEEDS}: seeds repeat from {_SEEDS} on"


def _of_grid(job: Plan, settings: Sequence[Options], varied: Collection[str]) -> Iterator[str]:
    """Of options whose value no picture of a grid has. The base is named where it is loaded."""
    own = {*varied, *(("width", "height") if "size" in varied else ())} - {"prompt", "base"}
    flags = {"negative_prompt": "negative", "class_label": "class"}
    for name in sorted(own & job.given):
        if all(getattr(one, name) != getattr(job.options, name) for one in settings):
            yield f"--{flags.get(name, name).replace('_', '-')} has no effect: the grid has values of its own"


def _of_guidance(asked: Sequence[str], settings: Sequence[Options]) -> Iterator[str]:
    """Of options that act on guidance where no picture is guided: by its scale, or as its base is made."""
    why = "nothing is guided where guidance is 1 or below"
    if all(one.guidance_until == 0 for one in settings):
        why, asked = "--guidance-until 0 guides no step", [name for name in asked if "until" not in name]
    elif asked and not all(one.guidance is not None and one.guidance <= 1 for one in settings):
        bases = dict.fromkeys(one.base for one in settings)
        whys = [_unguided(base, [one.guidance for one in settings if one.base == base]) for base in bases]
        why = whys[0] if all(whys) else ""
    for option in asked if why else ():
        yield f"{option} has no effect: {why}"


def _unguided(name: str, scales: Sequence[float | None]) -> str:
    """Why a base guides nothing under these scales, None its own; "" where it does, or cannot be told yet."""
    try:
        unet, scheduler = _configs(name)
        own = usual_guidance(name, unet, scheduler)
    except (OSError, ValueError):  # who loads it says what is wrong, or downloads it
        return ""
    if is_told_guidance(unet):
        return f"the base {name} is told the guidance, and nothing is guided"
    if any((own if scale is None else scale) > 1 for scale in scales):
        return ""
    return f"nothing is guided where guidance is 1 or below, and {own:g} is that of the base {name}"


def _configs(name: str) -> Sequence[Any]:
    """A base's U-Net's and scheduler's configurations. Raises ValueError where they are not at hand."""
    from huggingface_hub import try_to_load_from_cache

    from controlkit.checkpoints.kept import checkpoint_file, configs
    from controlkit.families import ALIASES, BUNDLED
    from controlkit.folders import read_json

    if (checkpoint := checkpoint_file(name)) is not None:
        return configs(checkpoint)
    files = ("unet/config.json", "scheduler/scheduler_config.json")
    folder = Path(os.path.expanduser(str(BUNDLED.get(name, name))))
    if folder.is_dir():
        return [read_json(folder / file) for file in files]
    cached = [try_to_load_from_cache(ALIASES.get(name, name), file) for file in files]
    return [read_json(Path(str(file))) for file in cached]


def _differs(name: str, settings: Sequence[Options]) -> bool:
    default = next(field.default for field in fields(settings[0]) if field.name == name)
    return any(getattr(one, name) != default for one in settings)


def _may_be_cuda(device: str) -> bool:
    return device == "auto" or device.startswith("cuda")


def _of_windows(job: Plan, variants: Sequence[Variant]) -> Iterator[str]:
    """Of controls whose windows lie between the steps; each is told once."""
    told = set()
    for options, controls in variants:
        count = _steps_taken(job, options)
        for control in controls:
            key = (control.kind, control.start, control.end, count)
            window = {"start": control.start, "end": control.end}
            if key in told or any(rules.gate_open(control.gate, i, count, **window) for i in range(count)):
                continue
            told.add(key)
            yield (
                f"the {control.kind} control has no effect: none of {count} steps lies in its window,"
                f" start={control.start:g} to end={control.end:g}"
            )


def _steps_taken(job: Plan, options: Options) -> int:
    """The steps of the loop, of which a control's window speaks."""
    strength = 1.0
    if job.beginning is not None:
        strength = job.beginning.record.strength if options.strength is None else options.strength
    taken = max(int(options.steps * strength), 1)
    second_looks = {"heun": taken - 1, "pndm": int(options.steps > 1)}
    return taken + second_looks.get(options.scheduler, 0)

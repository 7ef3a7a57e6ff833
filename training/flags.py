"""From the flags of diffusers' train_controlnet.py to a recipe that trains the same.

Every flag of the script (and of its SDXL twin) is mapped, or named in the recipe with the reason why no key
stands for it, or refused. The script's defaults are written out where ours differ or may come to differ.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from controlkit.naming import unknown
from controlkit.training.config import ControlNetRecipe, DataRecipe, parse_recipe
from controlkit.training.flags_command import SCRIPTS, Command, read_command, refuse_unsupported
from controlkit.training.flags_table import FIXED, FLAGS
from controlkit.training.flags_table import flag_table as flag_table

_Values = dict[str, tuple[Any, str]]  # by key, "data." before those of its table: value, comment

_COLUMNS = ("image_column", "conditioning_image_column", "caption_column")
_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
# Of the script's names; what it calls cosine with restarts and polynomial are these with its default options.
_SCHEDULES = {
    "constant": "constant",
    "constant_with_warmup": "constant",
    "linear": "linear",
    "polynomial": "linear",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine",
}


def from_diffusers_flags(text: str, *, pairs: int | None = None) -> str:
    """The recipe, as TOML, that trains what diffusers' ``train_controlnet.py`` would, told these flags.

    ``text`` is a command line; ``accelerate launch ... train_controlnet.py`` may stand in front of the flags.
    ``pairs`` is the size of the data set, for a command that counts in epochs and has no
    ``--max_train_samples``; None counts the pairs of a data set that is here, and reads no picture.

    Raises ValueError, one line that names the flag, for one that the script does not have, a value that it
    does not take, a setting that nothing here stands for, and a data set to be counted that is none.
    """
    command = read_command(text)
    refuse_unsupported(command)
    try:
        values = {**_mapped(command), **_training(command, pairs), **_data(command), **_result(command)}
        values["checkpoints_kept"] = _kept(command, values["steps"][0])
        values |= {key: (value, "as the script") for key, value in FIXED.items()}
        if "init" not in values:  # an adapter has its own
            values["hint_channels"] = ([16, 32, 96, 256], "as the script")
        written = "\n".join([*_head(command, values), *_lines(values), ""])
        parse_recipe(tomllib.loads(written), where="flags")
    except ValueError as error:
        raise ValueError(_by_flag(str(error))) from error
    return written


def _mapped(command: Command) -> _Values:
    """Flags that have a key and are no more than a value."""
    values: _Values = {
        "task": ("controlnet", ""),
        "map": ("custom", "the kind of map, such as canny, openpose, depth; for maps from files any word"),
    }
    others = {"steps", "schedule", "warmup", "betas", "optimizer", "push_to_hub", "trackers", "precision"}
    others |= {"data.source", "checkpoints_kept", "sample_every", "learning_rate"}
    usual = {name for name in _COLUMNS if command.get(name) == FLAGS[name].default}
    no_columns = usual if usual and not _has_columns(command) else set()
    for name, flag in FLAGS.items():
        value = command.get(name)
        if flag.key and flag.key not in others and value is not None and name not in no_columns:
            values[flag.key] = (value, _origin(command, name))
    if "seed" not in values:
        values["seed"] = (1, "without --seed no run of the script repeats another; here every run does")
    return values


def _has_columns(command: Command) -> bool:
    """Whether the script's columns are to be named: not for layouts that have none, which it does not read.

    Data that is not here is taken for the script's own.
    """
    from controlkit.training.data.sources import recognise

    try:
        layout, _ = recognise(DataRecipe(source=_data(command)["data.source"][0]))
    except ValueError:
        return True
    return layout in ("huggingface", "imagefolder")


def _origin(command: Command, *names: str) -> str:
    given = " ".join(f"--{name}" for name in names if name in command.given)
    return given or f"the default of --{names[0]}"


def _training(command: Command, pairs: int | None) -> _Values:
    scheduler = command.get("lr_scheduler")
    if scheduler not in _SCHEDULES:
        raise unknown("--lr_scheduler", scheduler, _SCHEDULES)
    warmup, rate = command.get("lr_warmup_steps"), command.get("learning_rate")
    why = _origin(command, "lr_warmup_steps")
    falls = "" if _SCHEDULES[scheduler] == "constant" else ", but down to a fiftieth of the rate, not to 0"
    if scheduler == "constant":
        warmup, why = 0, "with --lr_scheduler=constant the script does not warm up"
    elif warmup:
        why += ", a step ahead of the script, whose first step has the rate 0"
    scaled = _origin(command, "learning_rate", "scale_lr")
    if command.get("scale_lr"):
        scaled += _for_processes(command)
        rate *= command.get("gradient_accumulation_steps") * command.get("train_batch_size")
        rate *= command.processes
    eight_bit = command.get("use_8bit_adam")
    return {
        "steps": _steps(command, pairs),
        "learning_rate": (rate, scaled),
        "schedule": (_SCHEDULES[scheduler], _origin(command, "lr_scheduler") + falls),
        "warmup": (warmup, why),
        "betas": (
            [command.get("adam_beta1"), command.get("adam_beta2")],
            _origin(command, "adam_beta1", "adam_beta2"),
        ),
        "optimizer": ("adamw8bit" if eight_bit else "adamw", _origin(command, "use_8bit_adam")),
        "precision": _precision(command),
    }


def _steps(command: Command, pairs: int | None) -> tuple[int, str]:
    """--max_train_steps, else the epochs' steps, rounded up as the script rounds."""
    steps = command.get("max_train_steps")
    if steps is not None:
        return steps, "--max_train_steps" + ", before --num_train_epochs" * (
            "num_train_epochs" in command.given
        )
    pairs = _pairs(command, pairs)
    micro, accumulation = command.get("train_batch_size"), command.get("gradient_accumulation_steps")
    batches = math.ceil(math.ceil(pairs / max(micro, 1)) / command.processes)
    steps = command.get("num_train_epochs") * math.ceil(batches / max(accumulation, 1))
    why = f"{_origin(command, 'num_train_epochs')}, over {pairs} pairs"
    return steps, why + _for_processes(command)


def _for_processes(command: Command) -> str:
    """What is to be known of a number that counts the processes, where the command does not say how many."""
    if command.processes_known:
        return ""
    return ", for one process: accelerate's configuration, which may start more, is not read here"


def _pairs(command: Command, pairs: int | None) -> int:
    """How many pairs an epoch has."""
    there = pairs or _counted(command)
    wanted: int | None = command.get("max_train_samples")
    if there and wanted and wanted > there:
        raise ValueError(f"--max_train_samples={wanted}: the data has {there} pairs; the script refuses more")
    found = wanted or there
    if found is None:
        raise ValueError(
            "--max_train_steps is missing: a recipe counts steps, and the data, which is not here, decides"
            " how many an epoch has; --max_train_samples=N says how many pictures there are"
        )
    return found


def _counted(command: Command) -> int | None:
    """The pairs of a data set that is a folder or a file here, None of one on the hub."""
    source, _ = _data(command)["data.source"]
    if not os.path.exists(os.path.expanduser(source)):
        return None
    from controlkit.training.data.sources import open_examples

    mapped = _mapped(command)
    columns = {FLAGS[name].key: mapped.get(FLAGS[name].key, ("", ""))[0] for name in _COLUMNS}
    named = {key.removeprefix("data."): name for key, name in columns.items()}
    return len(open_examples(DataRecipe(source=source, **named)))


def _precision(command: Command) -> tuple[str, str]:
    given = command.given.get("mixed_precision") or command.launch_option("mixed_precision")
    if not given:
        return "fp32", "the script takes accelerate's configuration, which is not read here"
    if given not in _PRECISIONS:
        raise unknown("--mixed_precision", given, _PRECISIONS)
    return _PRECISIONS[given], "--mixed_precision"


def _data(command: Command) -> _Values:
    name = "dataset_name" if "dataset_name" in command.given else "train_data_dir"
    return {"data.source": (command.get(name), f"--{name}")}


def _result(command: Command) -> _Values:
    """What is written, shown and uploaded."""
    values: _Values = {}
    trackers = command.get("report_to")
    if trackers == "all":
        raise ValueError("--report_to=all: name one, such as --report_to=wandb")
    values["trackers"] = ([] if trackers == "none" else [trackers], _origin(command, "report_to"))
    if command.get("validation_prompt"):
        values["sample_every"] = (command.get("validation_steps"), _origin(command, "validation_steps"))
    if command.get("push_to_hub"):
        name = command.get("hub_model_id") or PurePath(command.get("output_dir")).name
        why = _origin(command, "push_to_hub", "hub_model_id")
        if "/" not in name:
            why += ": write it as OWNER/NAME, else nothing starts; the script's owner is who is logged in"
        values["push_to_hub"] = (name, why)
    return values


def _kept(command: Command, steps: int) -> tuple[int, str]:
    """How many checkpoints stay: without a limit the script keeps every one."""
    kept = command.get("checkpoints_total_limit")
    if kept is not None:
        return max(kept, 2), "--checkpoints_total_limit, 2 at least"
    every = math.ceil(steps / max(command.get("checkpointing_steps"), 1))
    why = "without --checkpoints_total_limit the script keeps all: fewer take less of the disk"
    return max(every, 2), why


# --- writing ---


def _head(command: Command, values: _Values) -> Iterator[str]:
    yield f"# What diffusers' {SCRIPTS[command.sdxl]} would train, from its flags."
    launch = shlex.join([*command.launcher, "-m", "controlkit.training"])
    if any(word.startswith("-") for word in command.launcher) and launch.isprintable():
        yield f"# Start it with: {launch} THIS_FILE.toml"
    for name in command.given:
        if FLAGS[name].key not in values:
            yield f"# --{name}: {FLAGS[name].note}."
    yield ""


def _lines(values: _Values) -> Iterator[str]:
    """Keys in the order of the recipe's, then those of its table [data]."""
    places = [(key, key) for key in ControlNetRecipe.model_fields if key != "data"]
    for key, place in [*places, ("", ""), *((key, f"data.{key}") for key in DataRecipe.model_fields)]:
        if not key:
            yield "\n[data]"
        elif place in values:
            value, comment = values[place]
            yield f"{key} = {_toml(value)}" + (f"  # {comment}" if comment else "")


def _toml(value: Any) -> str:
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's


def _by_flag(message: str) -> str:
    """A recipe's fault, told of the flag that its key came from."""
    named = re.match(r"(?:flags: |(?=data\.))([a-z_.]+?)(?:\.\d+)?(?:: |(?==))", message)
    if not named:
        return message.removeprefix("flags: ")
    flags = [name for name, flag in FLAGS.items() if flag.key == named[1]]
    shown = " or ".join(f"--{name}" for name in flags) or named[1]
    rest = message[named.end() :]
    return f"{shown}{rest}" if rest.startswith("=") else f"{shown}: {rest}"

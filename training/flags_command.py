"""Reading a command line of diffusers' train_controlnet.py, and refusing what nothing here stands for."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from controlkit.naming import did_you_mean, unknown
from controlkit.training.flags_table import ELSEWHERE, FLAGS, SDXL_ONLY

SCRIPTS = ("train_controlnet.py", "train_controlnet_sdxl.py")
_PER_NODE = ("nproc_per_node", "nproc-per-node")
_INTERPOLATIONS = ("lanczos", "nearest", "nearest_exact", "bilinear", "bicubic", "box", "hamming")
_NUMBER = re.compile(r"-\d+|-\d*\.\d+")  # below 0, as argparse knows them
_OF_THE_SHELL = re.compile(r"\$[A-Za-z_{(]|`")  # what a shell would have put something else for


@dataclass
class Command:
    """A command line, read: what was given, by name, and the words in front of the script's."""

    given: dict[str, Any] = field(default_factory=dict)
    launcher: list[str] = field(default_factory=list)
    script: str = ""

    def get(self, name: str) -> Any:
        """What was given, else the script's default."""
        if name == "tracker_project_name" and name not in self.given and self.sdxl:
            return "sd_xl_train_controlnet"
        return self.given.get(name, FLAGS[name].default)

    @property
    def sdxl(self) -> bool:
        """Whether it is the SDXL script's."""
        return self.script == SCRIPTS[1] or any(name in self.given for name in SDXL_ONLY)

    @property
    def processes(self) -> int:
        """How many processes the launcher was told to start, on all machines together."""
        return self._processes or 1

    @property
    def processes_known(self) -> bool:
        """Whether that stands in the command: accelerate has a configuration beside it."""
        return self._processes > 0 or not any("accelerate" in word for word in self.launcher)

    @property
    def _processes(self) -> int:
        """The processes that the launcher was told of, 0 where it was not told."""
        nodes = self._launch_count("nnodes") or 1
        per_node = next(filter(None, map(self._launch_count, _PER_NODE)), 0)
        return self._launch_count("num_processes") or per_node * nodes

    def _launch_count(self, name: str) -> int:
        text = self.launch_option(name)
        return int(text) if text.isdecimal() else 0

    def launch_option(self, name: str) -> str:
        """The value of a launcher's option, "" where it was not given."""
        for place, word in enumerate(self.launcher):
            if word == f"--{name}":
                return "".join(self.launcher[place + 1 : place + 2])
            if word.startswith(f"--{name}="):
                return word.partition("=")[2]
        return ""


def read_command(text: str) -> Command:
    """Read a command line. Raises ValueError for what is no flag of the scripts, or no value of a flag."""
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", text).strip().removeprefix("!"))
    except ValueError as error:
        raise ValueError(f"cannot read the flags: {str(error).lower()}") from error
    command = Command()
    if words and not words[0].startswith("-"):
        words = _launch(command, words)
    if not words:
        raise ValueError(f"no flags given: give those of {SCRIPTS[0]}, such as --learning_rate=1e-5")
    while words:
        words = _flag(command, words)
    return command


def _launch(command: Command, words: list[str]) -> list[str]:
    """Take the words up to the script's name off, and return the others."""
    place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if place is None:
        raise ValueError(f"cannot read {words[0]!r}: give {SCRIPTS[0]} and its flags, or its flags alone")
    command.script = PurePath(words[place].replace("\\", "/")).name
    if command.script not in SCRIPTS:
        raise ValueError(f"{command.script} is another script: flags are read of {' and '.join(SCRIPTS)}")
    first = next(i for i, word in enumerate(words) if "=" not in word)  # variables may be secrets
    command.launcher = words[first:place]
    return words[place + 1 :]


def _flag(command: Command, words: list[str]) -> list[str]:
    """Read the first flag and its value into ``command``, and return the other words."""
    word, separator, value = words[0].partition("=")
    if not word.startswith("-"):
        raise ValueError(f"cannot read {words[0]!r}: a flag begins with --, as in --learning_rate=1e-5")
    name = _name(command, word)
    kind, rest = FLAGS[name].values, words[1:]
    if kind == "switch":
        if separator:
            raise ValueError(f"--{name} is a switch and takes no value")
        command.given[name] = True
        return rest
    taken = [value] if separator else rest[: _count(rest, kind)]
    if not taken or not all(taken):
        raise ValueError(f"--{name} has no value")
    command.given[name] = (
        [_value(name, item) for item in taken] if kind == "texts" else _value(name, taken[0])
    )
    return rest if separator else rest[len(taken) :]


def _name(command: Command, word: str) -> str:
    """The flag that a word is: its name, or, as argparse takes it, the beginning of one name alone."""
    script, begun = command.script or SCRIPTS[0], word.removeprefix("--")
    known = [flag for flag in FLAGS if command.script != SCRIPTS[0] or flag not in SDXL_ONLY]
    if begun in known:
        return begun
    meant = [flag for flag in known if begun and word.startswith("--") and flag.startswith(begun)]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ValueError(f"{word} may be {' or '.join(f'--{flag}' for flag in meant)}: write the whole name")
    if begun in SDXL_ONLY:
        raise ValueError(f"{script} has no flag {word}, which is one of {SCRIPTS[1]}")
    if key := ELSEWHERE.get(word.removeprefix("--")):
        raise ValueError(f"{script} has no flag {word}: leave it out, and give the recipe {key}")
    close = did_you_mean(word.replace("-", "_").replace("__", "--", 1), [f"--{flag}" for flag in known])
    raise ValueError(f"{script} has no flag {word}{close}")


def _count(words: Sequence[str], kind: str) -> int:
    """How many of the words belong to a flag: those up to the next flag, one at most but for texts."""
    until = next((i for i, word in enumerate(words) if _is_flag(word)), len(words))
    return until if kind == "texts" else min(until, 1)


def _is_flag(word: str) -> bool:
    """Whether argparse takes a word for a flag: it begins with -, and is no number and no sentence."""
    is_sentence = " " in word.partition("=")[0]
    return word.startswith("-") and len(word) > 1 and not is_sentence and not _NUMBER.fullmatch(word)


def _value(name: str, text: str) -> Any:
    kind = FLAGS[name].values
    if kind in ("text", "texts"):
        if _OF_THE_SHELL.search(text):
            raise ValueError(f"--{name}={text} names a variable of the shell: write its value")
        return text
    try:
        number = float(text) if kind == "number" else int(text)
    except ValueError as error:
        raise ValueError(f"--{name} is a {kind}, not {text!r}") from error
    if not math.isfinite(number):
        raise ValueError(f"--{name} is a finite number, not {text}")
    if number < 0:
        raise ValueError(f"--{name} is not below 0, as in {text}")
    return number


def refuse_unsupported(command: Command) -> None:
    """Raise ValueError where flags are missing, or ask for something that cannot be had here."""
    given = command.given
    if "pretrained_model_name_or_path" not in given:
        raise ValueError("--pretrained_model_name_or_path is missing: the base that the ControlNet is for")
    if "dataset_name" not in given and "train_data_dir" not in given:
        raise ValueError("--train_data_dir or --dataset_name is missing: the pairs to train on")
    if "dataset_name" in given and "train_data_dir" in given:
        raise ValueError("--train_data_dir beside --dataset_name chooses a subfolder: give its path alone")
    if given.get("max_train_samples") == 0:
        raise ValueError("--max_train_samples is 1 or more, not 0")
    if given.get("resolution") == 0:
        raise ValueError("--resolution is 16 or more, a multiple of 8, not 0")
    if given.get("image_interpolation_mode", _INTERPOLATIONS[0]) not in _INTERPOLATIONS:
        raise unknown("--image_interpolation_mode", given["image_interpolation_mode"], _INTERPOLATIONS)
    _check_validation(given)
    for name, allowed, advice in _unsupported(command):
        if given.get(name, allowed) != allowed:
            raise ValueError(f"--{name}={given[name]}: {advice}")


def _check_validation(given: Mapping[str, Any]) -> None:
    """Raise ValueError for prompts and pictures to look at that the scripts refuse, too."""
    prompts, pictures = (len(given.get(f"validation_{name}", ())) for name in ("prompt", "image"))
    if bool(prompts) != bool(pictures):
        there, missing = ("prompt", "image") if prompts else ("image", "prompt")
        raise ValueError(f"--validation_{there} wants a --validation_{missing} beside it, as in the script")
    if prompts != pictures and min(prompts, pictures) > 1:
        raise ValueError(
            f"--validation_prompt has {prompts} and --validation_image {pictures}: give as many, or one of"
            " either, as in the script"
        )


def _unsupported(command: Command) -> Iterator[tuple[str, Any, str]]:
    """Flags that are taken with one value alone: name, that value, and what to do instead."""
    base = command.given["pretrained_model_name_or_path"]
    scheduler = command.get("lr_scheduler")
    out = command.get("output_dir")
    yield "revision", "main", "download that revision and give its folder as the base"
    yield "tokenizer_name", base, "the tokenizer is the base's: put another one into the base's folder"
    yield "dataset_config_name", "default", "fetch this part of the data set and give its folder"
    yield "adam_epsilon", 1e-8, "the optimizer's epsilon is 1e-8"
    weights = f"start from its weights, --controlnet_model_name_or_path={out}/CHECKPOINT/controlnet"
    yield "resume_from_checkpoint", "latest", f"a run of the script cannot go on here: {weights}"
    if scheduler == "cosine_with_restarts":
        yield "lr_num_cycles", 1, "the rate falls once, without restarts"
    if scheduler == "polynomial":
        yield "lr_power", 1.0, "the rate falls in a line, which is power 1"
    if "sdxl-vae-fp16-fix" not in command.given.get("pretrained_vae_model_name_or_path", ""):
        yield "pretrained_vae_model_name_or_path", base, "put this VAE into the base's folder"
    yield "crops_coords_top_left_h", 0, "SDXL is told that pictures are whole"
    yield "crops_coords_top_left_w", 0, "SDXL is told that pictures are whole"

"""How commands end: what a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

GROUPS = {  # of the options of `generate`, in its help
    "What the picture follows": (
        *("control", "map_", "adapter", "ip_adapter", "image", "image_noise", "class_label"),
        *("negative_prompt", "prompt_syntax", "clip_skip", "guidance", "guidance_rescale", "clip_guidance"),
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

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer's copy of click has it, and no public name for it


class Commands(TyperGroup):
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
            words = kwargs.get("args") or (args[0] if args else None) or sys.argv[1:]
            message = _with_value(message, getattr(error, "param", None), words)
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
            _fail("the device's memory is full: ask for smaller pictures or batches (generate: --memory 6GB)")
        finally:
            _flush_stdout()


def _fail(message: str) -> NoReturn:
    """One line on stderr, exit code 2."""
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _with_value(message: str, option: Any, words: Sequence[str]) -> str:
    """A message about an option's value, with the value, which typer leaves out."""
    begin, middle, end = message.partition(": Input should be a valid ")
    if not middle:
        return message
    names = getattr(option, "opts", ())
    given = ""
    for word, after in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in names:
            given = value if equals else after  # the last one counts
    kind = end.partition(",")[0].replace("integer", "whole number")
    return f"{begin}: {given!r} is no {kind}" if given else f"{begin}: it must be a {kind}"


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


class Grouped(TyperCommand):
    """A command whose help shows its options in the groups of `GROUPS`; the others stand at the end."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, and the options group by group."""
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in GROUPS}}
        for parameter in self.get_params(ctx):
            title = next((title for title, names in GROUPS.items() if parameter.name in names), "Options")
            title = "Arguments" if parameter.param_type_name == "argument" else title
            line = parameter.get_help_record(ctx)
            groups.setdefault(title, []).extend([] if line is None else [line])
        for title, lines in groups.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)

"""How commands end: what a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from controlkit.files import FULL_DISK
from controlkit.notices import is_lost_process, is_out_of_memory

GROUPS = {  # of the options of `generate`, in its help
    "What the picture follows": (
        *("control", "map_", "adapter", "ip_adapter", "image", "image_noise", "class_label"),
        *("original_size", "negative_original_size"),
        *("negative_prompt", "prompt_syntax", "clip_skip", "guidance", "guidance_rescale", "clip_guidance"),
        *("pag", "freeu"),
    ),
    "Models": ("base", "lora", "embedding", "vae", "clip", "image_encoder"),
    "Where it starts, and how it is made": (
        *("start", "strength", "mask", "seed", "steps", "scheduler", "temperature"),
        *("width", "height", "hires", "hires_strength"),
    ),
    "Speed and memory": (
        *("device", "dtype", "compile_", "cuda_graph", "memory", "tile"),
        *("control_every", "features_every", "guidance_until", "merge_tokens"),
    ),
    "Pictures and files": ("output", "count", "like", "grid", "keep", "preview"),
}

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer's copy of click has it, and no public name for it


_USERS_ERRORS = {  # of the system, wherever nobody has said more of them
    **FULL_DISK,
    errno.ENAMETOOLONG: "the name is too long for this system",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EMFILE: "too many files are open: a limit of this user's (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOMEM: "the memory is full",
    errno.EROFS: "it can only be read",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk reports an error",
}
_LONGEST = 200  # letters of a name that an error repeats


class Commands(TyperGroup):
    """The group of commands; turns what a user can cause into one line and exit code 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        _tolerate_any_name()
        with _ending_tidily():
            self._main(*args, **kwargs)

    def _main(self, *args: Any, **kwargs: Any) -> NoReturn:
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
            if error.errno == errno.ENOENT and not _is_somewhere():
                _fail("the folder that you are in has been removed: go to another one")
            if error.errno not in _USERS_ERRORS:
                raise
            name = "" if error.filename is None else f"{str(error.filename)[:_LONGEST]}: "
            _fail(f"{name}{_USERS_ERRORS[error.errno]}")
        except (RuntimeError, MemoryError, ImportError) as error:
            if is_lost_process(error):
                _fail("another one of the processes that share this job has ended: what it said comes first")
            if not is_out_of_memory(error):
                raise
            _fail(
                "the device's memory is full: ask for smaller pictures or batches (generate: --memory 6GB;"
                " train: gradient_checkpointing=true, precision=bf16)"
            )
        finally:
            _flush_stdout()


@contextmanager
def _ending_tidily() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP end the command as an error does: what is half written goes.

    A signal that somebody else handles or ignores (`nohup`) is left to them, and so are other threads.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has but one
    numbers = [
        number for name in names if signal.getsignal(number := getattr(signal, name)) == signal.SIG_DFL
    ]
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # one that was forked off
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise SystemExit(128 + number)

    for number in numbers:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _is_somewhere() -> bool:
    """Whether the folder in which the command was started is there."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


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

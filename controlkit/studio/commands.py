"""A picture's record as what makes it again: a shell command, and a Python script."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from controlkit.arguments import adapters_apart, control_text, number_text
from controlkit.devices import usual_dtype
from controlkit.formats.adapter_file import is_shuffle
from controlkit.infotext import PictureRecord
from controlkit.rules import USUAL_MODE

OUTPUT = "again.png"  # what both write


def command(record: PictureRecord) -> str:
    """The `controlkit generate` command of one picture, quoted for a POSIX shell."""
    words = ["controlkit", "generate", record.prompt, "--base", record.base]
    adapters, apart = adapters_apart([(control.kind, control.adapter) for control in record.controls])
    for control, own in zip(record.controls, apart, strict=True):
        how = {**vars(control), "own_adapter": own}
        words += ["--map", control_text(control.kind, control.path, how)]
    for kind, adapter in adapters.items():
        words += ["--adapter", f"{kind}={adapter}"]
    if record.negative_prompt is not None:
        words += ["--negative", record.negative_prompt]
    if record.prompt_syntax != "plain":
        words += ["--prompt-syntax", record.prompt_syntax]
    words += ["--seed", str(record.seed), "--steps", str(record.steps)]
    words += ["--guidance", number_text(record.guidance), "--scheduler", record.scheduler]
    words += ["--width", str(record.width), "--height", str(record.height)]
    words += ["--device", record.device]
    if record.dtype != usual_dtype(record.device, base=record.base):
        words += ["--dtype", record.dtype]
    words += ["-o", OUTPUT]
    return shlex.join(_safe(words))


def _safe(words: Sequence[str]) -> list[str]:
    """A prompt that looks like an option goes behind `--`, at the end."""
    prompt = words[2]
    return [*words] if not prompt.startswith("-") else [*words[:2], *words[3:], "--", prompt]


def script(record: PictureRecord) -> str:
    """A Python script that makes the same picture with the library's public names."""
    lines = [
        "import torch",
        "",
        "from controlkit import Control, generate, load_adapter, load_base",
        "from controlkit.images import write_png",
        "",
        f"base = load_base({record.base!r}, device={record.device!r}, dtype=torch.{record.dtype})",
        "controls = [",
    ]
    for control in record.controls:
        # Whether it pools no file need say, and a name may say otherwise.
        of_kind = f", kind={control.kind!r}" if is_shuffle(f"{control.kind} {control.adapter}") else ""
        adapter = f"load_adapter({control.adapter!r}, base=base{of_kind})"
        how = [f"kind={control.kind!r}", f"scale={control.scale!r}"]
        how += [f"start={control.start!r}"] if control.start != 0 else []
        how += [f"end={control.end!r}"] if control.end != 1 else []
        how += [f"mode={control.mode!r}"] if control.mode != USUAL_MODE else []
        lines.append(f"    Control({adapter}, {control.path!r}, {', '.join(how)}),")
    lines += [
        "]",
        "(picture,) = generate(",
        "    base,",
        f"    {record.prompt!r},",
        *([f"    negative_prompt={record.negative_prompt!r},"] if record.negative_prompt is not None else []),
        *([f"    prompt_syntax={record.prompt_syntax!r},"] if record.prompt_syntax != "plain" else []),
        "    controls=controls,",
        f"    steps={record.steps},",
        f"    guidance={record.guidance!r},",
        f"    scheduler={record.scheduler!r},",
        f"    seeds=[{record.seed}],",
        f"    width={record.width},",
        f"    height={record.height},",
        ")",
        f"write_png({OUTPUT!r}, picture)",
    ]
    return "\n".join(lines) + "\n"

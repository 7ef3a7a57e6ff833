"""`controlkit transfer`: a ControlNet carried over to another base of its family (`transfer.py`)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import files
from controlkit.convert_job import Report, check_apart, own_dtype
from controlkit.formats.adapter_file import AdapterFile, open_adapter_file
from controlkit.formats.fitting import BaseStructure, check_kind_fits
from controlkit.formats.weight_file import SUFFIXES

if TYPE_CHECKING:
    from controlkit.adapters import AdapterInfo


@dataclass(frozen=True)
class Plan:
    """A checked transfer of ``source`` from a base to another."""

    source: str
    old: str
    new: str
    output: Path


def plan(source: str, output: str, *, old: str, new: str) -> Plan:
    """Check what is asked for, before anything is loaded. Raises ValueError where nothing can be written."""
    path = Path(output)
    if path.suffix in SUFFIXES and path.suffix != ".safetensors":
        raise ValueError(f"cannot write {output}: pickles are only read; name it .safetensors")
    check_apart(source, path)
    files.check_writable(path, folder=path.suffix != ".safetensors")
    return Plan(source, old, new, path)


def run(plan: Plan, report: Report) -> list[str]:
    """Carry it over, and return lines that say what was written and how to use it.

    Raises ValueError, one line, for what is no ControlNet, does not fit a base, or cannot be written.
    """
    from controlkit.info_job import how_to_use_file, summary

    report.status(f"reading {plan.source}")
    file = open_adapter_file(plan.source)
    old, new = (_unet(name, file, plan.source, report) for name in (plan.old, plan.new))
    report.status("loading the libraries")
    from controlkit.adapters import write_adapter
    from controlkit.formats.building import build_network
    from controlkit.kinds import kind_of
    from controlkit.transfer import transfer

    network: Any = build_network(file, unet=old)
    if kind_of(network).name != "controlnet":
        raise ValueError(
            f"{plan.source} is a {kind_of(network).title}: only a ControlNet can be carried over"
        )
    transfer(network, old, new)
    report.status(f"writing {plan.output}")
    layout = "single" if plan.output.suffix == ".safetensors" else "diffusers"
    write_adapter(network, plan.output, layout=layout, dtype=own_dtype(file), info=_told(file.info, plan))
    written = open_adapter_file(plan.output)
    return [
        f"wrote {plan.output}: {summary(written)}",
        "use it with:",
        f"  {how_to_use_file(written, str(plan.output), plan.new)}",
    ]


def _told(info: AdapterInfo, plan: Plan) -> AdapterInfo:
    """What the result says of itself: also where it comes from."""
    name, old, new = (_short(text) for text in (plan.source, plan.old, plan.new))
    carried = {"adapter": name, "from": old, "to": new}
    return replace(info, base=new, training={**info.training, "transferred": carried})


def _short(name: str) -> str:
    """A model's name, without the folders of the machine that it lies on."""
    path = Path(name)
    return path.name if path.exists() else name


def _unet(name: str, file: AdapterFile, source: str, report: Report) -> Any:
    report.status(f"loading the U-Net of the base {name}")
    from controlkit.base_parts import load_unet
    from controlkit.controlnet import check_copyable

    unet = load_unet(name)
    check_copyable(unet.config)
    check_kind_fits(file.kind, file.config, file.family, BaseStructure(name, unet.config), name=source)
    return unet

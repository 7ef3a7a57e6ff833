"""`controlkit transfer`: a ControlNet carried over to another base of its family (`transfer.py`).

The adapter may be of any layout, and a difference or a Control-LoRA, which its old base makes whole. What is
written is a whole ControlNet, whose header names the new base and where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import files
from controlkit.base_structure import read_base
from controlkit.convert_job import Report, as_path, check_apart, check_precision, check_replaceable, own_dtype
from controlkit.families import BUNDLED, FAMILY_TITLES
from controlkit.formats.adapter_file import AdapterFile, open_adapter_file
from controlkit.formats.description import ENCODER, AdapterInfo, told_base
from controlkit.formats.finding import BUNDLED_ADAPTERS
from controlkit.formats.fitting import BaseStructure, check_kind_fits, plain
from controlkit.formats.recognise import KINDS
from controlkit.formats.weight_file import SUFFIXES
from controlkit.info_job import how_to_use_file, summary

if TYPE_CHECKING:
    import torch

    from controlkit.transfer import Distances

MOVABLE = ("controlnet", "controlnet-union", "controlnet-difference", "control-lora")
"""The kinds that hold a copy of their base's encoder."""
_SHAPING = (  # what decides the shapes of an encoder's weights, and how it splits its attention
    *("block_out_channels", "down_block_types", "layers_per_block", "cross_attention_dim"),
    *("attention_head_dim", "transformer_layers_per_block", "projection_class_embeddings_input_dim"),
)
_TOLD = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds")  # which a control network is not


@dataclass(frozen=True)
class Plan:
    """A checked transfer, of an adapter on the base ``old`` to ``new``. ``dtype``: torch's name, "" for the
    file's own."""

    file: AdapterFile
    source: str
    output: Path
    old: BaseStructure
    new: BaseStructure
    dtype: str


def plan(source: str, output: str, *, old: str, new: str, dtype: str | None = None) -> Plan:
    """Check what is asked for by configurations and headers alone, before any weights are loaded.

    ``output``: a folder, which is written as diffusers does, or a .safetensors file, which has the names of
    the adapter's own file.

    Raises ValueError, one line, for an adapter that holds no copy of an encoder, one that does not fit the
    old base, bases of different families or sizes, one that fills holes, an unknown precision, or where
    nothing can be written.
    """
    precision = check_precision(dtype)
    path = Path(output)
    if path.suffix in SUFFIXES and path.suffix != ".safetensors":
        raise ValueError(f"cannot write {output}: pickles are only read; name it .safetensors, or a folder")
    check_apart(source, path, bundled=BUNDLED_ADAPTERS)
    for base in (old, new):
        check_apart(base, path, bundled=BUNDLED)
    files.check_writable(path, folder=path.suffix != ".safetensors")
    check_replaceable(path)
    if path.is_dir() and any(path.iterdir()) and not (path / "config.json").is_file():
        raise ValueError(f"cannot save the adapter over what is there: {output} is not an adapter folder")
    before, after = read_base(old), read_base(new)
    check_bases(before, after)
    file = open_adapter_file(source)
    if file.kind not in MOVABLE:
        raise ValueError(
            f"{source} is {KINDS[file.kind]}: it holds no copy of its base's encoder, so there is nothing to"
            " carry over; use it on the other base as it is"
        )
    check_kind_fits(file.kind, file.config, file.family, before, name=source)
    return Plan(file, source, path, before, after, precision)


def check_bases(old: BaseStructure, new: BaseStructure) -> None:
    """Raise ValueError, one line, unless two bases have encoders of the same structure.

    A base that fills holes is refused: the adapters of the base that it was made from fit it as they are.
    """
    for base in (old, new):
        channels, own = base.unet["in_channels"], base.unet["out_channels"]
        if channels != own:
            raise ValueError(
                f"the base {base.name} fills holes (its U-Net takes {channels} channels): adapters of the"
                " base that it was made from fit it as they are"
            )
    if old.family != new.family:
        raise ValueError(
            f"the base {old.name} is {FAMILY_TITLES[old.family]} and the base {new.name} is"
            f" {FAMILY_TITLES[new.family]}: an adapter can only be carried over within its family"
        )
    for key in (*_SHAPING, *_TOLD):
        first, second = old.unet.get(key), new.unet.get(key)
        untold = key in _SHAPING and None in (first, second)  # then the weights' own shapes decide, later
        if _of_blocks(first, old) != _of_blocks(second, new) and not untold:
            raise ValueError(
                f"the bases {old.name} and {new.name} do not have the same structure: {key} is"
                f" {plain(first)} in the one and {plain(second)} in the other"
            )


def _of_blocks(value: Any, base: BaseStructure) -> Any:
    """A setting as a list where it is one number, too, which diffusers takes for every block."""
    blocks = len(base.unet["block_out_channels"])
    return [value] * blocks if isinstance(value, int) else list(value) if isinstance(value, tuple) else value


def run(plan: Plan, report: Report) -> list[str]:
    """Carry the adapter over, and return lines that say what was written and how to use it.

    Raises ValueError for what `build_network` and `write_adapter` refuse.
    """
    import torch

    from controlkit.adapters import write_adapter
    from controlkit.formats.building import build_network
    from controlkit.transfer import distances, encoder_digest, transfer_state

    old = _unet(plan.old, report)
    new = _unet(plan.new, report)
    dtype: torch.dtype | None = getattr(torch, plan.dtype) if plan.dtype else own_dtype(plan.file)
    report.status(f"reading {plan.source}")
    # In full precision, so that what is written was rounded once.
    network: Any = build_network(plan.file, unet=old, dtype=torch.float32)
    state = network.state_dict()
    moved = transfer_state(state, old.state_dict(), new.state_dict())
    notes = _notes(plan, distances(state, old.state_dict(), new.state_dict()))
    network.load_state_dict(moved)
    said = plan.file.info.training.get(ENCODER)
    if said is not None and said != encoder_digest(old.state_dict()):
        notes.append(f"the adapter says that it was trained on another base than {plan.old.name}")
    info = transferred_info(plan.file.info, plan, encoder=encoder_digest(new.state_dict()))
    report.status(f"writing {plan.output}")
    write_adapter(network, plan.output, layout=_layout(plan), dtype=dtype, info=info)
    place = as_path(plan.output)
    written = open_adapter_file(place)
    return [
        f"wrote {plan.output}: {summary(written)}",
        *(f"note: {note}" for note in notes),
        "use it with:",
        f"  {how_to_use_file(written, place, plan.new.name)}",
    ]


def transferred_info(info: AdapterInfo, plan: Plan, *, encoder: str) -> AdapterInfo:
    """What the adapter says of itself on its new base: whence it came stands in ``training``.

    ``encoder``: the new base's `transfer.encoder_digest`.
    """
    old, new = told_base(plan.old.name), told_base(plan.new.name)
    history = [*_history(info.training), {"from": old, "to": new}]
    return replace(
        info,
        family=plan.new.family,
        prediction_type=plan.new.prediction_type,
        base=new,
        training={**info.training, "transfers": history, ENCODER: encoder},
    )


def _history(training: Mapping[str, Any]) -> list[Any]:
    told = training.get("transfers", [])
    return list(told) if isinstance(told, list) else []


def _layout(plan: Plan) -> str:
    if plan.output.suffix != ".safetensors":
        return "diffusers"
    return "original" if plan.file.layout == "original" and plan.file.kind != "controlnet-union" else "single"


def _notes(plan: Plan, gaps: Distances) -> list[str]:
    """What may make the result worse than the adapter was."""
    old, new, info = plan.old, plan.new, plan.file.info
    notes = []
    if gaps.bases == 0:
        notes.append("the two bases have the same encoder: the adapter's weights are as they were")
    elif gaps.new < gaps.old:
        notes.append(
            f"the adapter is nearer to the encoder of {new.name} than to that of {old.name}, from which it is"
            " said to come: are --from and --to the right way round?"
        )
    if old.prediction_type != new.prediction_type:
        notes.append(
            f"{old.name} predicts {old.prediction_type} and {new.name} {new.prediction_type}: what the"
            " adapter learned may not carry over"
        )
    if info.base not in ("", old.name, told_base(old.name)):
        notes.append(f"the adapter says that it was trained on {info.base}, not on {old.name}")
    return notes


def _unet(base: BaseStructure, report: Report) -> Any:
    """A base's U-Net, float32, on the CPU."""
    report.status(f"loading the U-Net of the base {base.name}")
    from controlkit.base_parts import load_unet

    return load_unet(base.name)

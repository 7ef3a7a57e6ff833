"""`controlkit preprocess` for one picture: its map's file, and what belongs beside it.

NAME.png has the map; NAME.json a pose's joints; NAME.npy and NAME-16bit.png, on request, a depth's values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from controlkit import arguments, files, images, naming, preprocessors
from controlkit.generate_controls import warn_if_black
from controlkit.notices import Report
from controlkit.picture_files import DEEP

if TYPE_CHECKING:
    from controlkit.preprocessors import Map


@dataclass(frozen=True)
class Beside:
    """What is written beside the maps."""

    npy: bool = False
    """Of depth, the values: float32 inverse depth."""
    png16: bool = False
    """Of depth, 16 bits instead of 8."""

    def check(self, kinds: tuple[str, ...]) -> None:
        """Raise ValueError where no depth map is made."""
        if (self.npy or self.png16) and not any(preprocessors.gives_depth(kind) for kind in kinds):
            raise ValueError("--npy and --png16 write depth: no depth map is asked for")


@dataclass(frozen=True)
class Plan:
    """What `run` needs, checked."""

    kind: str
    picture: str
    settings: Mapping[str, str]
    output: Path
    beside: Beside


def plan(
    kind: str, picture: str, settings: Mapping[str, str], *, output: str, beside: Beside | None = None
) -> Plan:
    """Check a request.

    Raises ValueError for an output that cannot be written, is the picture itself, or whose joints would
    replace a file that holds none.
    """
    beside = beside or Beside()
    beside.check((kind,))
    (path,) = arguments.numbered_outputs(output, 1)
    if not reads_depth(settings):
        images.stored_size(picture)  # which says what is wrong with the file
    outputs = outputs_of(kind, path, beside)
    arguments.check_not_inputs(outputs, [Path(picture)])
    for written in outputs:
        files.check_writable(written)
    joints = path.with_suffix(".json")
    if kind == "openpose" and joints.exists():
        try:
            preprocessors.read_poses(joints)
        except ValueError:
            raise ValueError(
                f"{joints}, where the joints go, is there and holds none: choose another -o"
            ) from None
    return Plan(kind, picture, settings, path, beside)


def reads_depth(settings: Mapping[str, str]) -> bool:
    """Whether a kind's options say that its input holds depth, not a picture."""
    return settings.get("model") == "file"


def settings_of_kinds(
    kinds: Sequence[str], settings: Mapping[str, str], *, device: str | None = None
) -> dict[str, dict[str, str]]:
    """Return each kind's options. Raises ValueError: an unknown kind, one given twice, or no such option."""
    for kind in kinds:
        if kind not in preprocessors.names():
            raise naming.unknown("map", kind, preprocessors.names())
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"{','.join(kinds)}: each kind of map once")
    known = {kind: preprocessors.options_of(kind) for kind in kinds}
    found: dict[str, dict[str, str]] = {kind: {} for kind in kinds}
    for key, value in settings.items():
        kind, _, option = key.rpartition(".")
        if kind and kind not in kinds:
            raise ValueError(f"{key}={value}: no {kind} map is asked for")
        takers = [kind] if kind else [kind for kind in kinds if option in known[kind]]
        if not takers or option not in known[takers[0]]:
            choices = {name for taker in takers or kinds for name in known[taker]}
            raise naming.unknown(f"{' or '.join(takers or kinds)} option", option, choices)
        for taker in takers:
            found[taker][option] = value
    if device is not None:
        takers = [kind for kind in kinds if "device" in known[kind]]
        for taker in takers:
            found[taker].setdefault("device", device)
    return found


def run(job: Plan, report: Report) -> list[Path]:
    """Extract the map and write it; returns the files written, the map first."""
    report.status(f"loading the {job.kind} preprocessor")
    extract = preprocessors.get(job.kind, **job.settings)
    (made,) = extract.extract(extract.load(job.picture)[0])
    warn_if_black(made.image, f"the {job.kind} map")
    return write_map(job.output, made, job.beside)


def write_map(path: Path, made: Map, beside: Beside, *, durable: bool = True) -> list[Path]:
    """Write a map and what belongs beside it; returns the files, the map first."""
    written = [path]
    if made.poses is not None:
        written.append(path.with_suffix(".json"))
        preprocessors.write_poses(written[-1], made.poses)
    if made.depth is not None and beside.npy:
        written.append(path.with_suffix(".npy"))
        preprocessors.write_depth_npy(written[-1], made.depth)
    if made.depth is not None and beside.png16:
        written.append(_png16(path))
        preprocessors.write_depth_png16(written[-1], made.depth)
    made.save(path, durable=durable)  # last: all is there
    return written


def outputs_of(kind: str, path: Path, beside: Beside) -> list[Path]:
    """The files that `write_map` writes for a kind of map, the map first."""
    outputs = [path]
    if kind == "openpose":
        outputs.append(path.with_suffix(".json"))
    if preprocessors.gives_depth(kind):
        outputs += [path.with_suffix(".npy")] if beside.npy else []
        outputs += [_png16(path)] if beside.png16 else []
    return outputs


def _png16(path: Path) -> Path:
    return path.with_name(f"{path.stem}{DEEP}.png")

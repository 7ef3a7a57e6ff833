"""Adapter files damaged at random: whatever is done to one, it is refused in one line, or it loads."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from outcomes import Run
from test_kinds import MAKE

from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter
from controlkit.base import load_base
from controlkit.controlnet import from_base

ODD: list[Any] = [None, -1, 0, 10**9, 3.5, True, "x", "", [], [1, 2], {}, [None]]
TYPES = ["F16", "I64", "BOOL", "F8_E4M3", "BF16", "F64", "X", "", 5, None]
PLACES = [[0, 0], [0, 10**12], [-5, 5], "a", None, [5]]
Header = dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, models: Path) -> dict[str, Path]:
    """An adapter of every kind and layout, for the random SD1 base."""
    from typer.testing import CliRunner

    from controlkit.cli import app

    place, base = tmp_path_factory.mktemp("whole"), load_base(str(models / "sd1"))
    network = tiny_models.randomize_zero_convs(from_base(base, seed=1), seed=1)
    networks = {"controlnet": network}
    networks |= {kind: make(base) for kind, make in MAKE.items() if kind != "lllite"}
    for kind, one in networks.items():
        save_adapter(one, place / kind, info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    found = {kind: place / kind for kind in networks}
    for layout in ("single", "original", "control-lora"):
        found[layout] = place / f"{layout}.safetensors"
        words = ["convert", place / "controlnet", found[layout], "--to", layout]
        words += ["--rank", 4, "--base", models / "sd1"] if layout == "control-lora" else []
        assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    return found


def changed_config(draw: random.Random, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with a value that is gone, odd, too short or wrapped in a list."""
    key = draw.choice(list(config))
    value, rest = config[key], {name: one for name, one in config.items() if name != key}
    how = draw.randrange(4)
    if how == 0:
        return rest
    if how == 1 and isinstance(value, list):
        return {**rest, key: value[:-1]}
    return {**rest, key: [value] if how == 2 else draw.choice(ODD)}


def changed_header(draw: random.Random, header: Header) -> Header:
    """A safetensors header with an entry that is gone, of another name, type, shape or place, or with
    another description."""
    key = draw.choice([name for name in header if name != "__metadata__"])
    entry, rest = header[key], {name: one for name, one in header.items() if name != key}
    how = draw.randrange(8)
    if how == 0:
        return rest
    if how == 1:
        return {**rest, draw.choice(["x", "", key.upper(), f"model.{key}"]): entry}
    if how == 2:
        return {**rest, key: {**entry, "dtype": draw.choice(TYPES)}}
    if how == 3:
        shapes = [[], [0], [-1], entry["shape"][::-1], [*entry["shape"], 1], "x", None, [1.5], [2**70]]
        return {**rest, key: {**entry, "shape": draw.choice(shapes)}}
    if how == 4:
        return {**rest, key: {**entry, "data_offsets": draw.choice(PLACES)}}
    if how == 5:
        return {**rest, key: draw.choice(ODD)}
    said = dict(header.get("__metadata__") or {})
    if how == 6 or "controlkit" not in said:
        return {**header, "__metadata__": draw.choice([*ODD, {"a": 1}, {"controlkit": "{"}])}
    described = json.loads(said["controlkit"])
    inner = [name for name in ("map", "structure") if described.get(name)]
    if inner and draw.random() < 0.7:
        described[inner[-1]] = changed_config(draw, described[inner[-1]])
    else:
        described = changed_config(draw, described)
    return {**header, "__metadata__": {**said, "controlkit": json.dumps(described)}}


def changed_bytes(draw: random.Random, data: bytes) -> bytes:
    """Bytes that are others, most of them in the header, or that end early."""
    changed = bytearray(data)
    for _ in range(draw.choice([1, 5])):
        changed[draw.randrange(draw.choice([8, 3000, len(data)]))] = draw.randrange(256)
    return bytes(changed[: draw.randrange(len(data))] if draw.random() < 0.3 else changed)


def damage(draw: random.Random, source: Path, target: Path) -> Path:
    """A copy of an adapter with one thing about it changed."""
    if source.is_dir():
        shutil.copytree(source, target)
        (file,) = target.glob("*.safetensors")
    else:
        file = target = target.with_suffix(".safetensors")
        shutil.copy(source, file)
    config = file.with_name("config.json")
    if source.is_dir() and draw.random() < 0.4:
        config.write_text(json.dumps(changed_config(draw, json.loads(config.read_text()))))
        return target
    data = file.read_bytes()
    if draw.random() < 0.3:
        file.write_bytes(changed_bytes(draw, data))
        return target
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(changed_header(draw, json.loads(data[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    return target


def fits(said: str, base: Path) -> bool:
    return f"fits {base}: yes" in said


@pytest.mark.parametrize("seeds", [range(15), pytest.param(range(15, 1000), marks=pytest.mark.slow)], ids=len)
@pytest.mark.filterwarnings("default")  # of what a damaged description says
def test_a_damaged_file_is_refused_in_one_line_or_loads(
    run: Run,
    models: Path,
    whole: dict[str, Path],
    tmp_path: Path,
    seeds: range,
) -> None:
    """`info` says that a file fits where it loads, and nowhere else."""
    base = load_base(str(models / "sd1"))
    for seed in seeds:
        draw = random.Random(seed)
        kind = draw.choice(sorted(whole))
        file = damage(draw, whole[kind], tmp_path / f"damaged-{seed}")
        said = run("info", file, "--base", models / "sd1")
        if said.code:
            said.refused()
        try:
            load_adapter(str(file), base=base)
            loads, why = True, ""
        except ValueError as error:
            loads, why = False, str(error)
            assert "\n" not in why, (seed, kind)
            assert len(why) < 500, (seed, kind, why)
        if fits(said.out, models / "sd1"):
            assert loads, (seed, kind, why)
        elif loads:
            assert "badly" in said.out, (seed, kind, said.out, said.err)

"""Checkpoints: a folder per step, written whole or not at all, verified before it is trusted.

`checkpoints/step-000500/` holds `weights.safetensors` (modules, moving average), `optimizer.safetensors`,
`state.json` and `manifest.json` (size and SHA-256 of each file). No pickle anywhere.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from controlkit.files import is_half_written, replace_folder, sha256_file

_NAME = re.compile(r"step-(\d{6,})")
_FILES = ("weights.safetensors", "optimizer.safetensors", "state.json")
Tensors = dict[str, torch.Tensor]


def save_checkpoint(
    folder: Path, step: int, *, weights: Tensors, optimizer: Tensors, state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `folder/step-NNNNNN` atomically, then remove all but the newest `keep` up to it. Returns it.

    Folders of later steps stay: a run comes to an earlier step only when it passed them over as damaged.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{step:06d}"
    with replace_folder(target) as temporary:
        save_file({k: v.contiguous() for k, v in weights.items()}, temporary / "weights.safetensors")
        save_file({k: v.contiguous() for k, v in optimizer.items()}, temporary / "optimizer.safetensors")
        told = json.dumps({"step": step, **state}, allow_nan=False)
        (temporary / "state.json").write_text(told, encoding="utf-8")
        files = [temporary / name for name in _FILES]
        manifest = {file.name: {"size": file.stat().st_size, "sha256": sha256_file(file)} for file in files}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
    _flush(folder)
    until_now = [path for number, path in listed(folder) if number <= step]
    for old in until_now[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names: what a manifest vouches for must be
    there.
    """
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_latest(folder: Path) -> tuple[tuple[Tensors, Tensors, dict[str, Any]] | None, list[str]]:
    """The newest checkpoint that verifies, as (weights, optimizer, state), or None; and why others were
    passed over.
    """
    from safetensors.torch import load_file

    refused: list[str] = []
    for _, path in reversed(listed(folder)):
        fault = _fault(path)
        if fault is None:
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return (
                load_file(path / "weights.safetensors"),
                load_file(path / "optimizer.safetensors"),
                state,
            ), refused
        refused.append(f"{path.name}: {fault}")
    return None, refused


def latest_state(folder: Path) -> dict[str, Any]:
    """What the newest checkpoint that can be read says of itself, unverified; {} where there is none."""
    for _, path in reversed(listed(folder)):
        with suppress(OSError, ValueError):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            if isinstance(state, dict):
                return state
    return {}


def clear(folder: Path) -> None:
    """Remove what a process that died has left half written. Only whoever holds the run's lock may call
    it.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        if not is_half_written(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def listed(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step; foreign names and temporary folders are not checkpoints."""
    if not folder.is_dir():
        return []
    found = [
        (match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return sorted((int(match[1]), path) for match, path in found)


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        listed = {name: (manifest[name]["size"], manifest[name]["sha256"]) for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError):
        return "no readable manifest.json"
    try:
        for name, (size, sha256) in listed.items():
            if (path / name).stat().st_size != size:
                return f"{name} has another size than the manifest says"
            if sha256_file(path / name) != sha256:
                return f"{name} does not match its checksum"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None

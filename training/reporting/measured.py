"""scores.json: how a result was measured, so that a finished run that is started again need not be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from controlkit import __version__, files
from controlkit.training.reporting.run_record import json_of

FILE = "scores.json"


def scores_of(
    folder: Path, result: Path, scenes: int, measure: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The scores of a run's result: those in its folder where they are of these very weights, else measured
    now and written. Nothing is written where `measure` gives nothing.

    scenes: how many pairs are asked for.
    """
    of = {"weights": _digest(result), "asked": scenes, "controlkit": __version__}
    kept = json_of(folder / FILE)
    if kept.get("of") == of:
        return kept
    scores = dict(measure())
    if scores:
        files.write_json(folder / FILE, {**scores, "of": of})
    return scores


def forget_others(folder: Path, result: Path) -> None:
    """Remove the scores in a run's folder where they are of other weights than its result has."""
    of = json_of(folder / FILE).get("of")
    if not (isinstance(of, dict) and of.get("weights") == _digest(result)):
        (folder / FILE).unlink(missing_ok=True)


def _digest(result: Path) -> str:
    """SHA-256 over the weights of a result, by the digests of its files."""
    found = sorted(path for path in result.rglob("*.safetensors") if path.is_file())
    return hashlib.sha256("".join(map(files.sha256_file, found)).encode()).hexdigest()

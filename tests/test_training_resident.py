"""Data on the device: the same run to the bit, and where it is not possible, so said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import recipe, write_pictures
from safetensors.torch import load_file
from tiny_models import build

from controlkit.adapters import load_adapter, write_adapter
from controlkit.base import load_base
from controlkit.images import levels_to_cond
from controlkit.training import train_recipe
from controlkit.training.data.resident import SHARE, room_for

FIXED = {"data_map_blur": 0.0, "low": 80, "high": 200}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resident")
    write_pictures(folder / "pictures")
    for name, family in (("base", "sd1"), ("sdxl", "sdxl")):
        build(folder / name, family, layers=1)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place: Path, name: str, **changes):
    settings = {"steps": 4, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99, "log_every": 1}
    path = recipe(place / name, place / "pictures", **{**settings, **FIXED, **changes})
    said = []
    train_recipe(str(path), progress=lambda step: said.append(step.message) if step.message else None)
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (place / name / "checkpoints").glob("*/weights.safetensors")
    return [row["loss"] for row in lines if "loss" in row], load_file(weights), said


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"base": "sdxl", "data_map_mode": "grey"}, marks=pytest.mark.slow),
        pytest.param({"precision": "bf16", "channels_last": False}, marks=pytest.mark.slow),
    ],
    ids=["buckets, flips, dropout", "SDXL, grey", "bf16, first channels"],
)
def test_resident_data_changes_nothing(place, changes):
    name = "-".join(map(str, changes))
    if "base" in changes:
        changes = {**changes, "base": str(place / changes["base"])}
    losses, weights, _ = run(place, f"{name}-read", data_resident=False, **changes)
    resident, moved, _ = run(place, f"{name}-resident", data_resident=True, **changes)
    assert resident == losses
    assert moved.keys() == weights.keys()
    assert all(torch.equal(moved[name], weights[name]) for name in weights)


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_a_checkpoint_is_an_adapter_with_the_averages_if_there_are_any(ema, place, tmp_path):
    run(place, f"checkpoint-{ema}", ema=ema, export_dtype="fp32")
    folder = place / f"checkpoint-{ema}"
    (checkpoint,) = (folder / "checkpoints").iterdir()
    base = load_base(str(place / "base"))
    found = load_adapter(str(checkpoint), base=base).controlnet.state_dict()
    result = load_adapter(str(folder / "controlnet"), base=base).controlnet.state_dict()
    assert found.keys() == result.keys()
    assert all(torch.equal(found[name], result[name]) for name in result)
    write_adapter(load_adapter(str(checkpoint), base=base), tmp_path / "one.safetensors", layout="single")
    again = load_adapter(str(tmp_path / "one.safetensors"), base=base).controlnet.state_dict()
    assert all(torch.equal(again[name], result[name]) for name in result)


@pytest.mark.parametrize("mixed", [False, True])
def test_maps_of_sixteen_bits_are_gathered_as_they_are(mixed, place, tmp_path):
    import cv2

    from controlkit.training.adapter import ControlNetTask
    from controlkit.training.config import load_recipe
    from controlkit.training.machine import Machine

    folder = tmp_path / "pictures"
    write_pictures(folder, count=4)
    (tmp_path / "base").symlink_to(place / "base")
    (folder / "conditioning").mkdir()
    random = np.random.default_rng(0)
    for number, picture in enumerate(sorted(folder.glob("*.png"))):
        height, width = cv2.imread(str(picture)).shape[:2]
        depth = random.integers(0, 65536, (height, width)).astype(np.uint16)
        if mixed and number % 2:
            depth = (depth >> 8).astype(np.uint8)
        cv2.imwrite(str(folder / "conditioning" / picture.name), depth)
    settings = {"map": "depth", "data_maps": "files", "data_map_mode": "grey", "data_resident": True}
    path = recipe(tmp_path / "run", folder, **settings, data_map_blur=0.0, data_holdout=2)
    text = path.read_text()
    path.write_text(text[: text.index("[data.options]")])
    task = ControlNetTask(found := load_recipe(str(path)), Machine(found), lambda _: None)
    part = task.parts(0)[0]
    samples = task.feed.samples(0)
    captions = [sample.example.caption for sample in samples]
    read = task.encoded.given(samples, captions, torch.device("cpu"))
    gathered = task.resident.given(part.samples, captions)
    assert gathered.levels.dtype == torch.uint16
    assert torch.equal(levels_to_cond(gathered.levels), levels_to_cond(read.levels))
    assert torch.equal(gathered.moments.mean, read.moments.mean)


@pytest.mark.parametrize("changes", [{"low": "50..150"}, {"data_map_blur": 0.3}, {"data_cache": False}])
def test_what_changes_from_visit_to_visit_is_not_kept_on_the_device(place, changes):
    with pytest.raises(ValueError, match=r"data.resident=true .* needs data.cache=true, maps that do not"):
        run(place, "-".join(changes), data_resident=True, steps=1, warmup=0, **changes)


def test_the_room_for_data_is_a_share_and_the_choice_is_said():
    fits, line = room_for(int(1e9), int(1e9 / SHARE))
    assert fits
    assert line == "data is kept on the device: 1 GB, of 1 GB it may take there"
    fits, line = room_for(int(1e9) + 1, int(1e9 / SHARE))
    assert not fits
    assert "not kept on the device" in line

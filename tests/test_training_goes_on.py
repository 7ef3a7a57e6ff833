"""What happens beside the steps of a training, a terminal that is closed or a measurement that fails, costs
none of them.
"""

import io
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from killed_runs import prepared_for_module, recipe

from controlkit.base import load_base
from controlkit.images import write_png
from controlkit.terminal import Terminal
from controlkit.training import quality, train_recipe
from controlkit.training.interrupts import watched
from controlkit.training.reporting import showing

BRIEF = ["steps=2", "warmup=0", "batch_size=2", "sample_every=0", "monitor_every=0", "ema=0", "threads=1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, and a cache for the runs of this module."""
    with prepared_for_module(tmp_path_factory.mktemp("goes-on")) as folder:
        yield folder


def run(place: Path, name: str, *, progress=lambda step: None, **changes):
    settings = {"steps": 3, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99}
    settings |= {"log_every": 1, "ema": 0.0, **changes}
    train_recipe(str(recipe(place / name, place / "pictures", **settings)), progress=progress)
    return place / name


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_nobody_has_to_hear_how_far_it_is(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()[::-1]
    other, mine = (ours, theirs) if kind == "terminal" else (theirs, ours)
    stream = io.TextIOWrapper(io.FileIO(mine, "w"), write_through=True)
    monkeypatch.setattr("sys.stderr", stream)
    terminal = Terminal()
    terminal.progress(1, 9)
    os.close(other)
    with pytest.raises(OSError):  # noqa: PT011 - which one depends on the kind
        stream.write("nobody hears this")
    terminal.progress(2, 9, "a note")
    terminal.note("a line")
    terminal.status("the next part")
    terminal.progress(9, 9)
    terminal.close()


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread"
)
def test_a_terminal_that_is_closed_tells_twice_and_is_heard_once() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with watched() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.wanted
            assert interrupts.number == signal.SIGHUP
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_look_that_fails_is_said(place, monkeypatch) -> None:
    def no_memory(*given):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    plain = run(place, "unseen")
    monkeypatch.setattr(showing, "look_at_all", no_memory)
    folder = run(place, "not-looked", monitor_every=2)
    record = (folder / "metrics.jsonl").read_text()
    assert record.count("no look at whether the map is used at step") == 2  # of 2, and of the last
    assert "at step 2: CUDA out of memory." in record
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (plain / weights).read_bytes()


@pytest.mark.slow
def test_what_it_began_from_may_be_gone_at_the_end(place) -> None:
    begun = run(place, "begun-from")
    shutil.copytree(begun / "controlnet", place / "mine")
    started = {"init": str(place / "mine"), "precision": "bf16"}
    kept = run(place, "kept", **started)

    def take_away(step):
        if step.message is None and (place / "mine").is_dir():
            shutil.rmtree(place / "mine")

    folder = run(place, "gone", progress=take_away, **started)
    assert not (place / "mine").exists()
    weights = "controlnet/diffusion_pytorch_model.safetensors"
    assert (folder / weights).read_bytes() == (kept / weights).read_bytes()


@pytest.mark.slow
def test_maps_whose_setting_was_a_range_are_scored_or_said(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        picture = np.full((64, 64, 3), 40, np.uint8)
        picture[8 * number : 40, 16:48] = 200
        write_png(tmp_path / "pictures" / f"{number}.png", picture)
    made = ["data.source=pictures", "data.maps=made", "data.holdout=2", "data.options={sigma=[1,3]}"]
    result = train_recipe("tiny-canny", ["map=lineart_standard", "out=mine", *made, *BRIEF])
    assert result.result == Path("mine/controlnet")
    assert (tmp_path / "mine" / "report.html").is_file()
    assert (tmp_path / "mine" / "facts.json").is_file()


def test_a_folder_that_has_a_unet_is_not_taken(tmp_path) -> None:
    (tmp_path / "base" / "unet").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"base has unet in it but no config\.toml"):
        train_recipe("tiny-canny", [f"out={tmp_path / 'base'}", "sd_locked=false", *BRIEF])
    assert list((tmp_path / "base").rglob("*")) == [tmp_path / "base" / "unet"]


@pytest.mark.slow
def test_an_unlocked_result_is_measured_with_the_unet_that_was_trained(tmp_path, monkeypatch) -> None:
    """And where that fails, there are card and report all the same, and the same command tries again."""
    seen = []

    def measured(base, adapters, **told):
        seen.append({name: tensor.clone() for name, tensor in base.unet.state_dict().items()})
        if len(seen) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(base, adapters, **told)

    real = quality.examine
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quality, "examine", measured)
    settings = ["scenes=8", "score_scenes=2", "sd_locked=false", *BRIEF]
    result = train_recipe("tiny-canny", ["out=other", *settings])
    assert result.lines[0].startswith("the result is not measured (CUDA out of memory.): the same command")
    assert (tmp_path / "other" / "controlnet" / "README.md").is_file()
    assert (tmp_path / "other" / "report.html").is_file()
    result = train_recipe("tiny-canny", ["out=other", *settings])
    assert result.lines[0].startswith("on 2 held-out scenes")
    trained = UNet2DConditionModel.from_pretrained("other/unet").state_dict()
    assert all(torch.equal(tensor, trained[name].float()) for name, tensor in seen[1].items())
    base = load_base("tiny").unet.state_dict()
    assert any(not torch.equal(tensor, base[name]) for name, tensor in seen[1].items())

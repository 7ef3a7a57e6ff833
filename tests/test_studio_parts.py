"""The parts of the studio that need no page: what is kept, what may be trained on, what is told."""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the studio page needs the extra ui")

import cv2
import gradio
import numpy as np
import torch
from outcomes import Run
from PIL import Image

from controlkit import adapters, generate_job, generate_models, images, infotext
from controlkit.preprocessors.skeleton import Poses
from controlkit.silence import Silent
from controlkit.studio import (
    asked,
    commands,
    gallery,
    making,
    run_folders,
    run_view,
    server,
    uploads,
    wording,
)
from controlkit.studio.engine import Engine, Stopped
from controlkit.studio.pose_editor import on_another_part
from controlkit.studio.toasts import readable, toast
from controlkit.studio.uploads import Shown

# gradio (6.31) and what it is built on use what Starlette is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # its event loops are never closed
]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that were read, none of which takes time."""
    names: list[str] = []
    base = SimpleNamespace(device="cpu", dtype=None, unet=torch.nn.Identity())
    monkeypatch.setattr(generate_models, "_load_base", lambda *values, **named: base)
    monkeypatch.setattr(adapters, "load_adapter", lambda name, **named: names.append(name) or object())
    return names


def adapter_of(models: generate_models.Models, name: str) -> Any:
    """An adapter, beside the one base."""
    base = models.base("tiny", device="cpu", dtype=None)  # type: ignore[arg-type]
    return models.adapter(name, base)


def test_an_adapter_whose_weights_were_overwritten_in_place_is_read_anew(
    tmp_path: Path, loaded: list[str]
) -> None:
    weights, models = tmp_path / "diffusion_pytorch_model.safetensors", generate_models.Models()
    weights.write_bytes(b"first")
    first, before = adapter_of(models, str(tmp_path)), tmp_path.stat()
    assert adapter_of(models, str(tmp_path)) is first
    for data, later in ((b"other", 5), (b"longer", 0)):  # another time; another size at the same time
        time = weights.stat().st_mtime_ns + later
        weights.write_bytes(data)
        os.utime(weights, ns=(time, time))
        assert adapter_of(models, str(tmp_path)) is not first
        first = adapter_of(models, str(tmp_path))
    assert tmp_path.stat().st_mtime_ns == before.st_mtime_ns
    assert len(loaded) == 3


def test_the_adapters_that_were_used_last_are_kept(loaded: list[str]) -> None:
    models, most = generate_models.Models(), generate_models.MOST_ADAPTERS
    names = [f"owner/adapter-{number}" for number in range(most + 1)]
    for name in [*names[:most], names[0], names[most], names[0], names[1]]:
        adapter_of(models, name)
    assert loaded == [*names, names[1]]


@pytest.fixture
def runs(page_dir: Path) -> Iterator[Path]:
    """The page's runs, of which there are none yet."""
    yield page_dir.with_name("runs")
    shutil.rmtree(page_dir.with_name("runs"), ignore_errors=True)


def test_a_sheet_is_written_once_for_all_looks(tmp_path: Path, page_dir: Path) -> None:
    sheet, shown = tmp_path / "step-10.png", Shown()
    sheet.write_bytes(b"first")
    before = len(list(page_dir.rglob("*.png")))
    first = shown.copy(sheet, "mine-step-10.png")
    assert first is not None
    assert Path(first).name == "mine-step-10.png"
    os.utime(first, (0, 0))
    assert shown.copy(sheet, "mine-step-10.png") == first
    assert Path(first).stat().st_mtime > 0, "one that is looked at grows old"
    sheet.write_bytes(b"another")
    second = shown.copy(sheet, "mine-step-10.png")
    assert second is not None
    assert second != first
    Path(second).unlink()
    assert Path(str(shown.copy(sheet, "mine-step-10.png"))).read_bytes() == b"another"
    sheet.unlink()
    assert shown.copy(sheet, "mine-step-10.png") is None
    assert len(list(page_dir.rglob("*.png"))) == before + 2


def test_the_page_deletes_what_is_old_and_keeps_its_scenes(blocks: Any, page_dir: Path) -> None:
    from gradio.route_utils import delete_files_created_by_app

    assert blocks.delete_cache is not None
    assert all(seconds > 0 for seconds in blocks.delete_cache)
    scenes = sorted(page_dir.rglob("*.png"))
    assert len(scenes) > 1
    (page_dir / "old.png").write_bytes(scenes[0].read_bytes())
    blocks.temp_file_sets[-1].add(str(page_dir / "old.png"))
    delete_files_created_by_app(blocks, age=-1)
    assert sorted(page_dir.rglob("*.png")) == scenes


def listener_targets(blocks: Any, name: str) -> set[tuple[int, str]]:
    """What the function of the page that is called so listens to."""
    return {one for fn in blocks.fns.values() if getattr(fn.fn, "__name__", "") == name for one in fn.targets}


def finished(runs: Path, name: str) -> Path:
    """The folder of a training that ended, as far as the page looks."""
    (runs / name / "controlnet").mkdir(parents=True)
    (runs / name / "config.toml").write_text('task = "controlnet"\nbase = "tiny"\nmap = "canny"\n')
    return runs / name


def test_a_page_that_is_loaded_knows_the_adapters_of_each_kind(blocks: Any, runs: Path) -> None:
    result = str(finished(runs, "mine") / "controlnet")
    several = finished(runs, "several")
    (several / "config.toml").write_text(
        'task = "controlnet"\nadapter = "controlnet-union"\nbase = "tiny"\nmap = "several"\n'
        '[data]\nmap_column = ["canny", "depth"]\n'
    )
    restored = listener_targets(blocks, "_follow")
    listed = [one for one in blocks.fns.values() if restored & set(one.targets)]
    listed = [one for one in listed if {getattr(out, "label", "") for out in one.outputs} == {"Adapter"}]
    assert len(listed) == 3
    chosen = {"canny": result, "depth": result}
    choices = {kind: listed[0].fn(kind, chosen) for kind in ("canny", "depth", "openpose")}
    names = {kind: sorted(name for name, _ in update["choices"][1:]) for kind, update in choices.items()}
    assert names == {"canny": ["mine", "several"], "depth": ["several"], "openpose": []}
    assert [update["value"] for update in choices.values()] == [result, "", ""]
    use = listener(blocks, "_use")
    for shown, wanted in (("canny", "canny"), ("depth", "depth"), ("openpose", "canny")):
        _, kind, adapter, remembered = use("several", shown, {"openpose": "x"})
        assert (kind["value"], adapter["value"]) == (wanted, str(several / "controlnet"))
        assert remembered == {"openpose": "x", wanted: str(several / "controlnet")}


def test_an_error_while_making_is_logged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*values: Any) -> Any:
        raise RuntimeError("something of ours")

    logged: list[logging.LogRecord] = []
    made = making.Making(Engine("tiny"), tmp_path)
    monkeypatch.setattr(made, "_asked", broken)
    monkeypatch.setattr(logging.root, "handlers", [handler := logging.Handler()])
    monkeypatch.setattr(handler, "emit", logged.append)
    steps = made._make(SimpleNamespace(session_hash="one"), "")
    assert "Something went wrong inside (RuntimeError)" in next(steps)[0]
    with pytest.raises(gradio.Error, match="RuntimeError"):
        next(steps)
    assert not made.turns.wanted("one")
    assert [record.exc_info[1].args for record in logged if record.exc_info] == [("something of ours",)]


def test_two_maps_of_one_kind_are_both_told() -> None:
    controls = tuple(
        infotext.ControlRecord("canny", "map.png", "", True, "canny", scale=scale) for scale in (0.5, 0.75)
    )
    record = infotext.PictureRecord(
        prompt="a cube", negative_prompt="", base="tiny", steps=1, scheduler="ddim", seed=0,
        controls=controls, guidance=1.0, width=64, height=64, device="cpu", dtype="float32", versions={},
    )  # fmt: skip
    told = gallery.about(record)
    assert told.count("<dt>Edges</dt>") == 2
    assert "<dd>0.5</dd>" in told
    assert "<dd>0.75</dd>" in told


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The trainings that were begun, in words; none is."""
    words: list[list[str]] = []

    def begin(folder: Path, said: list[str]) -> None:
        folder.mkdir(parents=True)
        (folder / "config.toml").write_text("")
        words.append(said)

    monkeypatch.setattr(run_folders, "_begun", begin)
    return words


def begin(runs: Path, name: str = "mine", **how: Any) -> Path:
    """Begin a short training."""
    return run_folders.begin(runs, name=name, recipe="tiny-canny", base="tiny", steps=20, **how)


def test_a_page_for_others_trains_on_folders_that_its_owner_names(
    tmp_path: Path, begun: list[list[str]]
) -> None:
    photos, outside = tmp_path / "data" / "photos", tmp_path / "outside"
    photos.mkdir(parents=True)
    outside.mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    images.write_png(photos / "one.png", np.zeros((64, 64, 3), np.uint8))
    within = server.trainable("0.0.0.0", [str(tmp_path / "link")])
    assert within == [tmp_path / "data"]
    for number, source in enumerate((str(photos), "photos", " photos/ ", str(tmp_path / "link/photos"))):
        begin(tmp_path / "runs", f"run-{number}", source=source, within=within)
        assert f"data.source={photos}" in begun[-1]
    (photos / "away").symlink_to(outside)
    told = set()
    for source in (
        *(str(outside), "../outside", "photos/away", str(tmp_path / "nothing"), "nothing", "/root", "~"),
        *("~root", "/etc/passwd", str(tmp_path / "data" / ".." / "outside"), "a\0b", "x" * 5000),
    ):
        with pytest.raises(ValueError, match="cannot use that folder") as refused:
            begin(tmp_path / "runs", "refused", source=source, within=within)
        told.add(str(refused.value))
    assert told == {"the trainings of this page cannot use that folder: choose a folder within data"}
    assert not (tmp_path / "runs" / "refused").exists()


def test_a_folder_that_cannot_be_trained_on_is_told_at_the_click(
    tmp_path: Path, begun: list[list[str]]
) -> None:
    (photos := tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="photos holds no data set"):
        begin(tmp_path / "runs", source=str(photos))
    for name in ("one.png", "one.webp"):
        images.write_png(photos / name, np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"data.map_column=.png.*This page has no fields for them") as told:
        begin(tmp_path / "runs", source=str(photos))
    (folder := tmp_path / "runs" / "mine").mkdir(parents=True)
    (folder / run_folders.LOG).write_text(f"error: {told.value.__cause__}\n")
    assert wording.NO_FIELD in run_view.details(run_folders.look(folder), []).head
    assert not begun


@pytest.mark.parametrize(
    ("error", "speaks"),
    [
        ("one pair does not fit in the memory of cuda:0; try gradient_checkpointing=true", True),
        ("leave them out (data.bad=skip)", True),
        ("the folder holds a run: choose another with out=FOLDER", False),  # which the name decides here
        ("cannot use /photos/date=3/b", False),
    ],
)
def test_errors_that_speak_of_settings_are_told_apart(error: str, speaks: bool) -> None:
    assert wording.about_settings(error) == (wording.NO_FIELD if speaks else "")


def test_where_others_reach_the_page_no_folder_is_trained_on_unless_named(
    tmp_path: Path, begun: list[list[str]]
) -> None:
    assert server.trainable("127.0.0.1", []) is None
    assert server.trainable("0.0.0.0", []) == []
    with pytest.raises(ValueError, match="choose the bundled world"):
        begin(tmp_path / "runs", source=str(tmp_path), within=[])
    images.write_png(tmp_path / "one.png", np.zeros((64, 64, 3), np.uint8))
    begin(tmp_path / "runs", "alone", source=str(tmp_path))
    assert f"data.source={tmp_path}" in begun[-1]
    begin(tmp_path / "runs", within=[])
    assert len(begun) == 2


def test_the_named_folder_has_to_be_there(run: Run) -> None:
    assert run("ui", "--data", "no-such").refused() == (
        "no-such is not a folder: --data takes one with data sets for trainings"
    )


def test_one_training_at_a_time(tmp_path: Path, begun: list[list[str]]) -> None:
    from controlkit.training.lock import locked

    for name in ("first", "stopped"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text("steps = 20\n")
    with locked(tmp_path / "first"):
        for work in (lambda: begin(tmp_path), lambda: run_folders.go_on(tmp_path / "stopped")):
            with pytest.raises(ValueError, match="the training first is running: wait until it has ended"):
                work()
    begin(tmp_path)
    assert len(begun) == 1


def test_two_who_begin_at_once_begin_one(
    tmp_path: Path, begun: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = run_folders._check_free

    def slowly(runs: Path) -> None:
        free(runs)
        time.sleep(0.2)

    monkeypatch.setattr(run_folders, "_check_free", slowly)
    with ThreadPoolExecutor(2) as pool:
        ends = [job.exception() for job in [pool.submit(begin, tmp_path) for _ in range(2)]]
    assert len(begun) == 1
    assert sorted(str(end)[:27] for end in ends) == ["None", "there is a run mine already"]


_BEGINS = """
import os, sys
from pathlib import Path
from controlkit.studio import run_folders
run_folders.sys.executable = sys.argv[2]
run_folders._begun(Path(sys.argv[1]), [])
os.kill(os.getpid(), 9)
"""


def test_a_training_that_a_page_began_which_was_killed_is_seen_before_it_runs(tmp_path: Path) -> None:
    training = tmp_path / "training"
    training.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 600\n")
    training.chmod(0o755)
    runs = tmp_path / "runs"
    subprocess.run([sys.executable, "-c", _BEGINS, str(runs / "mine"), str(training)], check=False)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.01)
    try:
        with ThreadPoolExecutor(4) as pool:  # those who look are in nobody's way
            assert {run.state for run in pool.map(run_folders.look, 40 * [runs / "mine"])} == {"starting"}
        with pytest.raises(ValueError, match="the training mine is starting: wait until it has ended"):
            begin(runs, "other")
        with pytest.raises(ValueError, match="the run mine is starting: wait until it runs"):
            run_folders.stop(runs / "mine")
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    until = time.monotonic() + 30
    while run_folders.look(runs / "mine").state != "stopped":
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("left", [(), (".lock", f".controlkit-{'0a' * 16}.tmp")], ids=["ended", "killed"])
def test_the_name_of_a_training_that_could_not_begin_is_free(
    tmp_path: Path, begun: list[list[str]], left: Sequence[str]
) -> None:
    (tmp_path / "mine").mkdir()
    for name in (run_folders.LOG, *left):
        (tmp_path / "mine" / name).write_text("error: no pictures in photos\n")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):  # of the stand-in, which was reached
        begin(tmp_path)
    with pytest.raises(ValueError, match="there is a run file already"):
        begin(tmp_path, "file")
    with pytest.raises(ValueError, match="for the pictures of the page"):
        begin(tmp_path, "studio")


def test_a_run_that_disappears_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [finished(tmp_path, name) for name in ("one", "two")]
    read = run_folders.read_run

    def late(folder: Path) -> Any:
        if folder == folders[0]:
            shutil.rmtree(folder)
        return read(folder)

    monkeypatch.setattr(run_folders, "read_run", late)
    assert [run.name for run in run_folders.found(tmp_path)] == ["two"]
    assert run_folders.found(tmp_path / "nothing") == []


def listener(blocks: Any, name: str) -> Any:
    """The function of the page that is called so; the first, where several are."""
    return next(one.fn for one in blocks.fns.values() if getattr(one.fn, "__name__", "") == name)


def test_where_the_last_run_was_deleted_nothing_of_it_stays(blocks: Any) -> None:
    chosen, about, curves, sheet, log, _, *buttons = listener(blocks, "_look")("mine", "before")
    assert (chosen["choices"], chosen["value"], curves, log) == ([], None, "", "")
    assert "No training yet" in about
    assert not any(update["visible"] for update in (sheet, *buttons))


def test_only_a_finished_adapter_is_taken_to_the_first_tab(blocks: Any, runs: Path) -> None:
    folder = finished(runs, "mine")
    path = str(folder / "controlnet")
    choices = [("the base's own", ""), ("mine", path)]
    assert listener(blocks, "_use")("mine", "depth", {})[1:] == [
        gradio.update(value="canny"), gradio.update(choices=choices, value=path), {"canny": path}
    ]  # fmt: skip
    (folder / "controlnet").rmdir()
    with pytest.raises(gradio.Error, match="The run mine is stopped"):
        listener(blocks, "_use")("mine", "depth", {})


def test_a_session_keeps_no_photo_of_millions_of_pixels(
    blocks: Any, page_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "size", lambda *values: (64, 64))
    photo = str(next(page_dir.rglob("scene*.png")))
    drawn = listener(blocks, "_draw")(None, "canny", False, 100, 200, "", "", photo)[4]
    assert drawn.map.image.shape == (64, 64, 3)
    assert drawn.photo is None


def test_a_picture_that_was_deleted_is_a_line(blocks: Any, tmp_path: Path) -> None:
    gone = gallery.Made(str(tmp_path / "gone.png"), None)  # type: ignore[arg-type]
    with pytest.raises(gradio.Error, match="shows that picture no longer"):
        listener(blocks, "_select")([gone], SimpleNamespace(index=0))


def test_a_click_that_comes_to_nothing_is_forgotten(blocks: Any, tmp_path: Path) -> None:
    made, session = making.Making(Engine("tiny"), tmp_path), SimpleNamespace(session_hash="one")
    for end, told in ((made._refused, making.IDLE), (made._left, None)):
        made._begin(session)
        made._stop(session)
        assert end(session) == told
        stop = made.turns.begin("one")
        assert not stop.is_set(), "the next pictures are cancelled by what came before"
        made._begin(session)
        end(session)
        made._stop(session)
        assert stop.is_set(), "what is in the making cannot be cancelled"
        made.turns.end("one", stop)
        assert not any(kept for name, kept in vars(made.turns).items() if name != "_lock")
    listeners = [one for one in blocks.fns.values() if hasattr(one.fn, "__name__")]
    targets = {target[1]: one.fn.__name__ for one in listeners for target in one.targets}
    assert (targets["failure"], targets["unload"]) == ("_refused", "_left")


def test_a_click_after_one_that_was_cancelled_in_the_queue_makes_pictures(tmp_path: Path) -> None:
    made, session = making.Making(Engine("tiny"), tmp_path), SimpleNamespace(session_hash="one")
    made._begin(session)
    made._stop(session)
    made._begin(session)
    ended = list(made._make(session, ""))
    assert len(ended) == 1
    assert "Cancelled" in ended[0][0]
    assert ended[0][1:3] == making.BUSY, "the button that cancels the second is gone"
    assert not made.turns.begin("one").is_set()


def test_an_error_takes_back_no_click_of_another_run(tmp_path: Path) -> None:
    made, session = making.Making(Engine("tiny"), tmp_path), SimpleNamespace(session_hash="one")
    made._begin(session)
    made._begin(session)
    with pytest.raises(gradio.Error):  # of values that are missing
        list(made._make(session, ""))
    assert made._refused(session) == making.BUSY
    made._stop(session)
    assert made.turns.begin("one").is_set(), "the second cannot be cancelled while it waits"


def test_a_cancelled_run_leaves_the_picture_that_was_looked_at(tmp_path: Path) -> None:
    class Half:
        """An engine that is cancelled after a look at half a picture."""

        name, device, dtype = "tiny", "cpu", None

        def generate(self, job: Any, report: Any, *, preview: Any, **rest: Any) -> None:
            """Show something, then stop."""
            preview(np.zeros((8, 8, 3), np.uint8))
            time.sleep(0.4)
            raise Stopped

    made, session = making.Making(Half(), tmp_path), SimpleNamespace(session_hash="one")  # type: ignore[arg-type]
    asked_for = ["a cube", "", "1", 1, 2, "", "ddim", "plain", "", "", None]
    steps = [update[5:] for update in made._make(session, "", *asked_for)]
    began, ended = steps[0], steps[-1]
    view, preview = 0, -1
    assert (began[view]["visible"], began[preview]["visible"]) == (False, True)
    assert (ended[view]["visible"], ended[preview]["visible"]) == (True, False)
    assert "value" not in ended[view], "the picture is another one than its text and buttons speak of"


def test_thresholds_in_the_wrong_order_are_exchanged_as_opencv_does(blocks: Any, page_dir: Path) -> None:
    photo = str(next(page_dir.rglob("scene*.png")))
    drawn = listener(blocks, "_draw")(None, "canny", False, 300, 150, "", "", photo)[4]
    wanted = cv2.Canny(images.cover(images.load_picture(photo), 128, 128), 300, 150)
    np.testing.assert_array_equal(drawn.map.image[..., 0], wanted)
    asked_for = [one for one in blocks.fns.values() if (blocks._id, "load") not in one.targets]
    inputs = [
        one.inputs for one in asked_for
        if one.fn is not None and any((getattr(part, "label", ""), event) == ("Weak edges from", "change")
               for part in blocks.blocks.values() for block, event in one.targets if block == part._id)
    ]  # fmt: skip
    outputs = {getattr(out, "label", "") for one in asked_for for out in one.outputs}
    assert len(inputs) == 3
    assert not {"Weak edges from", "Strong edges from"} & outputs, "a field changes while another is typed in"


@pytest.mark.parametrize("shape", [(256, 256), (300, 200)])
@pytest.mark.parametrize("size", [(192, 192), (128, 96), (96, 160)])
def test_a_pose_keeps_its_place_in_the_photo(shape: tuple[int, int], size: tuple[int, int]) -> None:
    """Joints that mark a point of the photo mark the same point where another part of it is shown."""
    photo = np.zeros((shape[1], shape[0], 3), np.uint8)
    photo[shape[1] // 2 - 6 : shape[1] // 2 + 6, shape[0] // 2 + 20 : shape[0] // 2 + 32] = 255
    centres = []
    for one in ((128, 128), size):
        ys, xs = np.nonzero(images.cover(photo, *one)[..., 0] > 127)
        centres.append((xs.mean() + 0.5, ys.mean() + 0.5))
    people = np.zeros((1, 18, 3))
    people[0, 4] = (*centres[0], 1.0)
    there = on_another_part(Poses(people, 128, 128), shape, size)
    assert (there.width, there.height) == size
    np.testing.assert_allclose(there.people[0, 4, :2], centres[1], atol=0.8)
    assert not there.people[0, 5].any()


@pytest.mark.parametrize(
    ("log", "begun", "told"),
    [
        (
            "error: photos has no pictures\n",
            False,
            ("failed", "It could not begin.", "photos has no pictures"),
        ),
        ("loading the base\n", False, ("stopped", "Stopped before it began; it can be started anew", "")),
        ("step 3\n", True, ("stopped", "Stopped before its first checkpoint; going on begins anew.", "")),
    ],
)
def test_how_a_training_ended_is_told(tmp_path: Path, log: str, begun: bool, told: tuple[str, ...]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / run_folders.LOG).write_text(log)
    if begun:
        (tmp_path / "mine" / "config.toml").write_text("steps = 20\n")
    run = run_folders.look(tmp_path / "mine")
    head = run_view.details(run, []).head
    assert (run.state, run.error) == (told[0], told[2])
    assert told[1] in head
    assert told[2] in head


def test_what_a_training_does_is_told_once_and_as_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run = replace(run_folders.look(tmp_path / "mine"), state="starting", error="")
    head = run_view.details(run, ["loading the libraries ..."]).head
    assert ">Starting. Loading the libraries ...</p>" in head


def test_an_error_after_checkpoints_is_told(tmp_path: Path) -> None:
    folder = finished(tmp_path, "mine")
    (folder / "controlnet").rmdir()
    (folder / "checkpoints").mkdir()
    (folder / run_folders.LOG).write_text("step 40\nerror: the disk is full\n")
    run = run_folders.look(folder)
    assert run.state == "stopped"
    assert "the disk is full" in run_view.details(run, []).head
    assert "gone on with" in run_view.details(run, []).head


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "1", "P", "RGBA", "CMYK", "F"])
def test_a_picture_that_browsers_do_not_show_is_shown_as_the_same_pixels(
    page_dir: Path, tmp_path: Path, mode: str
) -> None:
    numbers = np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 20
    if mode == "I;16":
        picture = Image.fromarray(numbers)
    else:
        picture = Image.fromarray((numbers >> 8).astype(np.uint8)).convert("RGB").convert(mode)
    picture.save(tmp_path / "my scan.tiff")
    shown = uploads.displayable(str(tmp_path / "my scan.tiff"))
    if mode == "F":  # what is not read here is told of beneath the map
        with pytest.raises(ValueError, match="my scan"):
            uploads.read_upload(str(tmp_path / "my scan.tiff"))
        return
    assert Path(shown).name == "my scan.png"
    for is_map in (False, True):
        np.testing.assert_array_equal(
            uploads.read_upload(shown, is_map=is_map),
            uploads.read_upload(str(tmp_path / "my scan.tiff"), is_map=is_map),
        )


def test_a_turned_picture_is_shown_as_it_is_read(page_dir: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[uploads.ORIENTATION] = 6
    Image.fromarray(np.arange(64 * 48 * 3, dtype=np.uint8).reshape(48, 64, 3)).save(
        tmp_path / "turned.tif", exif=exif
    )
    shown = uploads.read_upload(uploads.displayable(str(tmp_path / "turned.tif")))
    assert shown.shape == (64, 48, 3)
    np.testing.assert_array_equal(shown, uploads.read_upload(str(tmp_path / "turned.tif")))


def test_a_turned_photo_has_the_upright_pictures_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[uploads.ORIENTATION] = 6  # as a telephone that is held upright saves it
    Image.new("RGB", (64, 48)).save(tmp_path / "turned.jpg", exif=exif)
    assert uploads.upload_size(str(tmp_path / "turned.jpg")) == (48, 64)


def test_what_browsers_show_and_what_is_broken_stays_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "broken.tif").write_text("no picture")
    for path in (None, "photo.png", str(tmp_path / "broken.tif"), str(tmp_path / "gone.ppm")):
        assert uploads.displayable(path) == gradio.skip()


@pytest.mark.parametrize("name", ["text.png", "cut.jpg", "fake.heic", "empty.png", "vector.svg"])
def test_an_upload_that_is_no_picture_is_told_at_once(tmp_path: Path, name: str) -> None:
    images.write_png(tmp_path / "whole.png", np.zeros((64, 64, 3), np.uint8))
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    content = {"cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:900], "empty.png": b""}
    (tmp_path / name).write_bytes(content.get(name, b"<svg>no picture"))
    with pytest.raises(gradio.Error, match=name) as told:
        readable(uploads.uploaded)(str(tmp_path / name))
    assert str(tmp_path) not in str(told.value)
    assert "value" not in uploads.uploaded(str(tmp_path / "whole.png"))
    assert "value" not in uploads.uploaded(None)


def test_lines_of_the_command_line_are_told_in_the_pages_words() -> None:
    assert wording.sentence("--negative has no effect") == "The negative prompt has no effect"
    assert wording.sentence("--negatives have no effect") == "--negatives have no effect"
    assert wording.sentence("photo.png is empty") == "photo.png is empty"
    told = "the canny control has no effect: none of 3 steps lies in its window, start=0.41 to end=0.42"
    assert wording.sentence(told).startswith("The control by Edges has no effect")
    assert wording.sentence(told).endswith("in its window, from 0.41 until 0.42")
    assert wording.line_of(ValueError("a seed\n must be whole")) == "A seed must be whole"
    told = "for weights, add --prompt-syntax a1111"
    assert wording.sentence(told).endswith("choose them under More maps and settings, Parentheses")


def test_a_wrong_number_is_not_repeated_whole() -> None:
    for read in (asked.whole, asked.real):
        with pytest.raises(ValueError, match="not '99") as refused:
            read("9" * 9000 + "x", "the seed")
        assert len(str(refused.value)) < 120


@pytest.mark.parametrize("port", [-1, 0, 65536])
def test_a_port_that_there_is_not(run: Run, port: int) -> None:
    assert "the port must be a number from 1 to 65535" in run("ui", "--port", port).refused()


def test_runs_that_are_a_file(run: Run, photo: Path) -> None:
    assert "is a file: --runs takes a folder" in run("ui", "--runs", photo).refused()


def test_a_page_of_another_precision(run: Run, tmp_path: Path) -> None:
    """Its commands make the same pictures."""
    engine = Engine("tiny", dtype="bf16")
    assert engine.load().dtype == torch.bfloat16
    wanted = asked.Asked("a cube", "tiny", steps=1, device=engine.device, dtype=engine.dtype)
    plan = wanted.plan(tmp_path / "kept")
    (record,) = generate_job.run(plan, Silent(), models=engine.models)
    words = shlex.split(commands.command(record))
    assert words[-4:-2] == ["--dtype", "bfloat16"]
    run(*words[1:]).done()
    assert Path(commands.OUTPUT).read_bytes() == plan.outputs[0].read_bytes()
    assert run("ui", "--dtype", "half").refused().startswith("unknown precision 'half'")


@pytest.mark.parametrize("said", ["CUDA error: out of memory", "[enforce fail] DefaultCPUAllocator"])
def test_a_full_memory_is_told_whoever_finds_it(said: str) -> None:
    assert "memory is full: ask for smaller" in str(toast(RuntimeError(said)))

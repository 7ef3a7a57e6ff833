"""The commands, in process: what they write, what they say, and how they fail."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_detectors
import torch
from outcomes import Run
from safetensors.torch import save_file

import controlkit
from controlkit import base_parts, cli, generate_job, infotext, terminal
from controlkit.arguments import (
    numbered_outputs,
    parse_control,
    parse_picture_prompt,
    parse_weighted,
    parse_word,
)
from controlkit.formats.finding import mark_of_base
from controlkit.generate_models import Models
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.preprocessors import draw_poses, read_poses
from controlkit.training.config import load_recipe


def test_generate_writes_a_picture_that_says_how_it_was_made(
    generate: Run, photo: Path, models: Path
) -> None:
    outcome = generate("--seed", 7, "-o", "out.png")
    assert "wrote out.png (64x64, seed 7)" in outcome.done()
    assert "--like out.png --seed 8" in outcome.out
    assert outcome.err.startswith("reading what is asked for ...\nloading the libraries"), (
        "the first thing said comes before the slow imports"
    )
    assert load_picture("out.png").shape == (64, 64, 3)
    text = read_png_text("out.png")
    lines = text["parameters"].splitlines()
    assert lines[0] == "a cube"
    assert lines[-1].startswith("Steps: 2, Sampler: DDIM, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: ")
    assert 'ControlNet 0: "Module: canny, Model: ' in lines[-1]
    recorded = json.loads(text["controlkit"])
    assert recorded["controls"][0]["path"] == str(photo)
    assert recorded["controls"][0]["adapter"] == str(models / "canny-sd1")
    assert recorded["seed"] == 7


def test_like_repeats_a_picture_byte_for_byte(generate: Run, run: Run) -> None:
    generate("--seed", 3, "-n", 2, "--negative", "blue, Ünïcode", "-o", "out.png").done()
    assert sorted(path.name for path in Path().glob("*.png") if "out" in path.name) == [
        "out-1.png",
        "out-2.png",
    ]
    run("generate", "--like", "out-2.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out-2.png").read_bytes()
    assert "would overwrite" in run("generate", "--like", "out-2.png", "-o", "out-2.png").refused()
    run("generate", "--like", "out-2.png", "--seed", 3, "-o", "first.png").done()
    assert Path("first.png").read_bytes() == Path("out-1.png").read_bytes()


def test_another_base_chooses_its_own_adapter_size_and_guidance_again(
    generate: Run, run: Run, models: Path
) -> None:
    generate("-o", "out.png").done()
    again = ("generate", "--like", "out.png", "-o", "again.png")
    run(*again, "--base", "tiny").done()
    recorded = json.loads(read_png_text("again.png")["controlkit"])
    assert (recorded["base"], recorded["controls"][0]["adapter"]) == ("tiny", "canny")
    assert (recorded["width"], recorded["guidance"], recorded["steps"]) == (128, 2.0, 2)
    assert "diffusers/controlnet-canny-sdxl-1.0" in run(*again, "--base", models / "sdxl").refused()


def test_like_finds_a_picture_that_moved_along(generate: Run, run: Run, photo: Path, tmp_path: Path) -> None:
    generate("-o", "out.png").done()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.move("out.png", moved)
    shutil.move(photo, moved)
    run("generate", "--like", moved / "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == (moved / "out.png").read_bytes()
    kept = (moved / photo.name).read_bytes()
    onto = run("generate", "--like", moved / "out.png", "-o", moved / photo.name).refused()
    assert "would overwrite what it is made from" in onto
    assert (moved / photo.name).read_bytes() == kept


def test_like_says_that_an_adapter_has_changed(run: Run, photo: Path, models: Path, tmp_path: Path) -> None:
    mine = shutil.copytree(models / "canny-sd1", tmp_path / "mine")
    run(
        *("generate", "a cube", "--base", models / "sd1", "--control", f"canny={photo}"),
        *("--adapter", f"canny={mine}", "--steps", 1, "-o", "out.png"),
    ).done()
    run("generate", "--like", "out.png", "-o", "again.png").done()
    weights = next(mine.glob("*.safetensors"))
    changed = bytearray(weights.read_bytes())
    changed[-3] ^= 1
    weights.write_bytes(changed)
    told = run("generate", "--like", "out.png", "-o", "again.png").refused()
    assert told.startswith(f"out.png was made with the adapter {mine}, which has changed since")
    assert told.endswith(f"add --adapter canny={mine}")
    shutil.rmtree(mine)
    shutil.copytree(models / "canny-sd1", mine)  # where it was, though written anew
    run("generate", "--like", "out.png", "-o", "again.png").done()


def test_advice_for_an_adapter_that_has_changed_leaves_another_one_of_its_kind(
    generate: Run, run: Run, models: Path, photo: Path
) -> None:
    mine = Path(shutil.copytree(models / "canny-sd1", "mine"))
    generate("--control", f"canny={photo}:adapter={mine}", "-o", "out.png").done()
    change(next(mine.glob("*.safetensors")))
    told = run("generate", "--like", "out.png", "-o", "again.png").refused()
    advice = shlex.split(told.partition("to use it as it is now, add ")[2])
    assert advice == [
        *("--control", f"canny={photo}:1", "--control", f"canny={photo}:1:adapter={mine}"),
        *("--adapter", f"canny={models / 'canny-sd1'}"),
    ]
    shutil.copytree(models / "canny-sd1", mine, dirs_exist_ok=True)
    run("generate", "--like", "out.png", *advice, "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def change(weights: Path) -> None:
    """One bit of the last number."""
    changed = bytearray(weights.read_bytes())
    changed[-3] ^= 1
    weights.write_bytes(changed)


@pytest.mark.parametrize(
    "kind", ["base", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("vae", "lora"))]
)
def test_like_says_that_what_a_base_is_made_of_has_changed(
    run: Run, models: Path, tmp_path: Path, kind: str
) -> None:
    base = shutil.copytree(models / "sd1", tmp_path / "mine")
    vae = shutil.copytree(models / "sd1" / "vae", tmp_path / "vae")
    lora = tmp_path / "lora"
    lora.mkdir()
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    save_file(weights, lora / "pytorch_lora_weights.safetensors")
    (tmp_path / "photos").mkdir()
    write_png(tmp_path / "photos" / "a.png", np.full((64, 64, 3), 40, np.uint8))
    made = ("generate", "a cube", "--base", base, "--vae", vae, "--lora", f"{lora}:0.5", "--steps", 1)
    made += ("--from", tmp_path / "photos", "-o", "out")
    run(*made).done()
    assert "1 made in the same way was there" in run(*made).done()
    again = ("generate", "--like", "out/a.png", "-o", "again.png")
    run(*again).done()
    assert Path("again.png").read_bytes() == Path("out/a.png").read_bytes()

    (base / "unet" / ".DS_Store").write_bytes(b"somebody has looked into the folder")
    assert "1 made in the same way was there" in run(*made).done()
    place, title = {"base": (base / "unet", "base"), "vae": (vae, "autoencoder"), "lora": (lora, "LoRA")}[
        kind
    ]
    change(next(place.glob("*.safetensors")))
    told = run(*again).refused()
    value = {"base": base, "vae": vae, "lora": f"{lora}:0.5"}[kind]
    assert f"out/a.png was made with the {title} {str(value).removesuffix(':0.5')}, which has changed" in told
    assert told.endswith(f"add --{kind} {value}")
    run(*again, f"--{kind}", value).done()
    assert "wrote 1 picture into out" in run(*made).done()
    assert "made in the same way" not in run(*made[:-2], "-o", "out2").done()


def test_a_picture_by_a_base_that_is_kept_does_not_say_that_it_is_by_the_one_there_now(
    models: Path, tmp_path: Path
) -> None:
    base, kept = shutil.copytree(models / "sd1", tmp_path / "mine"), Models()
    job = generate_job.plan({"prompt": "x", "base": str(base), "steps": 1}, output=str(tmp_path / "a.png"))
    with terminal.opened() as told:
        (first,) = generate_job.run(job, told, models=kept)
        change(next((base / "unet").glob("*.safetensors")))
        (second,) = generate_job.run(job, told, models=kept)
    assert first == second
    assert first.base_mark != mark_of_base(str(base))


def test_a_picture_of_before_there_were_marks_is_taken_as_it_was(run: Run, models: Path) -> None:
    fixed = ("generate", "a cube", "--base", models / "sd1", "--steps", 1, "-o", "out.png")
    run(*fixed).done()
    record = infotext.parse(read_png_text("out.png"), source="out.png")
    assert record.base_mark
    older = replace(record, base_mark="")
    write_png("older.png", load_picture("out.png"), text=infotext.chunks(older))
    assert infotext.is_of(Path("older.png"), record)
    assert not infotext.is_of(Path("older.png"), replace(record, seed=1))
    assert not infotext.is_of(Path("out.png"), replace(record, base_mark="0"))
    run("generate", "--like", "older.png", "-o", "again.png").done()


def test_like_says_what_is_gone_or_changed(run: Run, photo: Path, models: Path) -> None:
    how = "1..0.3:start=0.1:end=0.8:gate=webui:mode=control:layers=soft"
    controls = ("--control", f"canny={photo}:{how}", "--map", f"canny={photo}:0.5:only_mid=true")
    adapter = ("--adapter", f"canny={models / 'canny-sd1'}")
    asked = ("a cube", "--base", models / "sd1", *controls, *adapter)
    run("generate", *asked, "--steps", 2, "-o", "out.png").done()
    write_png(photo, 255 - load_picture(photo))
    changed = run("generate", "--like", "out.png", "-o", "again.png").refused()
    assert f"was made from {photo}, which has changed since" in changed
    advice = shlex.split(changed.partition("to use it as it is now, add ")[2])
    assert run("generate", "--like", "out.png", *advice, "-o", "anew.png").done()
    was, now = (json.loads(read_png_text(name)["controlkit"])["controls"] for name in ("out.png", "anew.png"))
    assert [{**record, "sha256": ""} for record in was] == [{**record, "sha256": ""} for record in now]
    photo.unlink()
    gone = run("generate", "--like", "out.png", "-o", "again.png").refused()
    assert f"was made from {photo}, which is gone" in gone
    write_png("plain.png", np.zeros((8, 8, 3), np.uint8))
    assert "carries no parameters" in run("generate", "--like", "plain.png", "-o", "again.png").refused()
    for texts, said in (
        (
            {"parameters": "1girl, sea\nSteps: 20, Sampler: Euler"},
            "parameters as A1111 writes them (its prompt: '1girl,",
        ),
        ({"prompt": "{}", "workflow": "{}"}, "carries a workflow of ComfyUI"),
    ):
        write_png("foreign.png", np.zeros((8, 8, 3), np.uint8), text=texts)
        assert said in run("generate", "--like", "foreign.png", "-o", "again.png").refused()
    write_png("broken.png", np.zeros((8, 8, 3), np.uint8), text={"controlkit": '{"prompt": 3}'})
    assert (
        "broken.png: its parameters cannot be read: prompt:"
        in run("generate", "--like", "broken.png", "-o", "again.png").refused()
    )
    assert not Path("again.png").exists()


def test_a_map_is_used_as_it_is(generate: Run, run: Run, photo: Path, models: Path) -> None:
    run("preprocess", "canny", photo, "-o", "edges.png").done()
    assert set(np.unique(load_picture("edges.png"))) == {0, 255}
    generate("-o", "from-photo.png").done()
    request = ["generate", "a cube", "--base", models / "sd1", "--steps", 2, "--map", "canny=edges.png"]
    run(*request, "--adapter", f"canny={models / 'canny-sd1'}", "-o", "from-map.png").done()
    assert np.array_equal(load_picture("from-photo.png"), load_picture("from-map.png"))
    run(*request[:6], "-o", "free.png").done()
    assert not np.array_equal(load_picture("from-photo.png"), load_picture("free.png"))


def test_the_version_and_the_help(run: Run) -> None:
    assert run("--version").done() == f"controlkit {controlkit.__version__}\n"
    helped = run("--help").done()
    assert "Pictures that follow an edge map, a pose or a depth map" in helped
    assert "Start with:  controlkit demo" in helped
    assert "KIND=PICTURE[:HOW]" in run("generate", "--help").done()
    bare = run()
    assert (bare.code, bare.out) == (2, "")
    assert bare.err.startswith("Usage: ")
    assert "no such command 'gnerate'" in run("gnerate").refused()


BAD_OPTIONS = [
    (("--steps", 0), "steps must be a whole number from 1 to 1000, not 0"),
    (("--steps", -1), "not -1"),
    (("--steps", 1001), "not 1001"),
    (("--guidance", "nan"), "guidance must be a number from 0 to 100, not nan"),
    (("--width", 60), "width must be a multiple of 8 from 16 to 8192, not 60 (nearest: 64)"),
    (("--height", 0), "height must be a multiple of 8"),
    (("--seed", -1), "a seed must be a whole number from 0 to"),
    (("-n", 0), "the number of pictures must be from 1 to 1000, not 0"),
    (("--scheduler", "dimm"), "unknown scheduler 'dimm' (did you mean 'ddim'?)"),
    (("--device", "cudda"), "unknown device 'cudda'"),
    (("--device", "meta"), "device 'meta' is not available here"),
    (("--control", "canny"), "must be KIND=PICTURE"),
    (("--negative", "caf\udce9"), "'caf\\udce9' is not valid Unicode and cannot be recorded in the PNG"),
    (("--control", "canny=nowhere.png"), "nowhere.png does not exist"),
    (("--control", f"canny={'n' * 300}.png:0.5"), ".png cannot be read: File name too long"),
    (("--base", "~nobody-of-that-name/models"), "no base called '~nobody-of-that-name/models'"),
    (("--base", "n" * 300), "give one of tiny, sd15, sd21, sdxl, an existing folder"),
    (("--control", "cany=nowhere.png"), "unknown map 'cany' (did you mean 'canny'?)"),
    (("--control", "canny=nowhere.png:nan"), "a control's scale must be a number from -10 to 10, not nan"),
    (("--adapter", "depth=x"), "has no --control or --map depth to belong to"),
    (("--adapter", "canny=x"), "--adapter gives two adapters for canny"),
    (("-o", "no/folder/out.png"), "the folder no/folder does not exist"),
    (("-o", "out.jpg"), "must end in .png"),
    (("--steps", "abc"), "invalid value for '--steps': 'abc' is no whole number"),
    (("--steps=2.5",), "invalid value for '--steps': '2.5' is no whole number"),
    (("-n", "two"), "'two' is no whole number"),
    (("--steps",), "option '--steps' requires an argument"),
    (("--stepz", 3), "no such option: --stepz"),
    (("one", "more"), "unexpected extra argument"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: str(value))
def test_a_bad_option_is_one_plain_line(generate: Run, options: tuple[object, ...], message: str) -> None:
    before = sorted(os.listdir())
    assert message in generate("-o", "out.png", *options).refused()
    assert sorted(os.listdir()) == before


def test_bad_models_are_one_plain_line(
    run: Run, models: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(*more: object) -> str:
        return run("generate", "x", "--control", f"canny={photo}", "-o", "out.png", *more).refused()

    assert "no base called 'tinny' (did you mean 'tiny'?)" in attempt("--base", "tinny")
    for folder in (models / "canny-sd1", models):
        assert "is not a diffusers pipeline folder: it has no model_index.json" in attempt("--base", folder)
    sd1 = ("--base", models / "sd1")
    before = base_parts.load_part
    monkeypatch.setattr(base_parts, "load_part", None)  # a name is checked before anything is loaded
    assert "no adapter called 'cany' (did you mean 'canny'?)" in attempt(*sd1, "--adapter", "canny=cany")
    monkeypatch.setattr(base_parts, "load_part", before)
    other_family = attempt(*sd1, "--adapter", f"canny={models / 'canny-sdxl'}")
    assert "cross_attention_dim 64" in other_family
    assert "cross_attention_dim 32" in other_family
    assert not Path("out.png").exists()


def test_bad_files_are_one_plain_line(run: Run, models: Path, photo: Path, tmp_path: Path) -> None:
    Path("text.png").write_text("not a picture")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(photo.read_bytes()[:60])
    for name in ("text.png", "empty.png", "cut.png", "nowhere.png", "."):
        for command in (["generate", "x", "--control", f"canny={name}"], ["preprocess", "canny", name]):
            line = run(*command, "-o", "out.png").refused()
            assert line.startswith(name)
    assert "would overwrite" in run("generate", "x", "--control", f"canny={photo}", "-o", photo).refused()
    assert "would overwrite" in run("preprocess", "canny", photo, "-o", photo).refused()
    assert "give a prompt" in run("generate").refused()
    run("preprocess", "canny", photo, "-o", _folder(tmp_path / "map.png")).done()  # a data set in a folder
    assert (tmp_path / "map.png" / "metadata.jsonl").exists()
    assert "unknown canny option 'lo'" in run("preprocess", "canny", photo, "lo=3", "-o", "out.png").refused()
    assert not Path("out.png").exists()


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("canny=a.png", "a.png", 1.0),
        ("canny=a.png:0.7", "a.png", 0.7),
        ("canny=C:\\pictures\\a.png", "C:\\pictures\\a.png", 1.0),
        ("canny=C:\\pictures\\a.png:-1", "C:\\pictures\\a.png", -1.0),
        ("canny=D:a b#c=é.png:1e-1", "D:a b#c=é.png", 0.1),
        ("canny=a:b.png", "a:b.png", 1.0),
    ],
)
def test_the_scale_is_what_reads_as_a_number(text: str, path: str, scale: float) -> None:
    argument = parse_control(text, is_map=False)
    assert (argument.kind, argument.path, argument.scale) == ("canny", path, scale)


def test_a_home_is_found_inside_a_word_where_no_shell_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    home = tmp_path / "home"
    found = parse_control("canny=~/a.png:0.5:mask=~/m.png", is_map=True)
    assert (found.path, found.scale, found.mask) == (str(home / "a.png"), 0.5, str(home / "m.png"))
    assert parse_picture_prompt("a.safetensors=~/a.png,b.png:0.6")[1] == (str(home / "a.png"), "b.png")
    assert parse_picture_prompt("~/a.safetensors=~/a.png")[0] == str(home / "a.safetensors")
    assert parse_weighted("~/a.safetensors:0.5") == (str(home / "a.safetensors"), 0.5)
    assert parse_word("word=~/a.safetensors") == ("word", str(home / "a.safetensors"))
    assert numbered_outputs("~/a.png", 1) == [home / "a.png"]
    Path("~").mkdir()
    Path("~/a.png").touch()
    assert parse_control("canny=~/a.png", is_map=True).path == "~/a.png", "a file that is called so"
    assert load_recipe("tiny-canny", ["out=~/runs/a"]).out == str(home / "runs" / "a")


def test_a_file_may_end_like_a_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("take:2").touch()
    assert parse_control("canny=take:2", is_map=True).path == "take:2"
    assert parse_control("canny=take:2:0.5", is_map=True).scale == 0.5


def test_infotext_quotes_what_would_break_the_line() -> None:
    record = infotext.PictureRecord(
        prompt="a, b: c",
        negative_prompt="d",
        base="folder, with comma",
        controls=(),
        steps=20,
        guidance=4.0,
        scheduler="dpm++",
        seed=1,
        width=64,
        height=72,
        device="cpu",
        dtype="float32",
        versions={"controlkit": "0.1.0"},
    )
    assert infotext.infotext(record) == (
        "a, b: c\nNegative prompt: d\n"
        'Steps: 20, Sampler: DPM++ 2M, CFG scale: 4, Seed: 1, Size: 64x72, Model: "folder, with comma", '
        "Version: controlkit 0.1.0"
    )
    assert infotext.parse(infotext.chunks(record), source="x.png") == record


def test_a_map_of_an_unknown_kind_is_refused_before_the_base_is_loaded(run: Run, photo: Path) -> None:
    line = run(
        "generate", "x", "--base", "nobody/nothing", "--map", f"cany={photo}", "-o", "out.png"
    ).refused()
    assert line.startswith("unknown map 'cany' (did you mean 'canny'?)")
    assert line.endswith("or name its --adapter")


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_a_control_that_cannot_work_is_noted(generate: Run, run: Run, models: Path, photo: Path) -> None:
    as_pose = ["generate", "x", "--base", models / "sd1", "--steps", 1, "--map", f"openpose={photo}"]
    outcome = run(*as_pose, "--adapter", f"openpose={models / 'canny-sd1'}", "-o", "out.png")
    outcome.done()
    assert "learned to follow canny maps, not openpose" in outcome.err
    write_png("plain.png", np.full((64, 64, 3), 90, np.uint8))
    outcome = run("preprocess", "canny", "plain.png", "-o", "edges.png")
    outcome.done()
    assert "note: the canny map is black: nothing was found" in outcome.err


def test_every_command_has_help_with_an_example(run: Run) -> None:
    for command in ("demo", "generate", "preprocess", "train"):
        assert f"Example:  controlkit {command}" in run(command, "--help").done()
    assert "Start with:  controlkit demo" in run("--help").done()


def test_usage_errors_exit_with_2(run: Run) -> None:
    outcome = run("generate", "x", "--stepz", 3)
    assert outcome.code == 2
    assert "--steps" in outcome.err


@pytest.mark.parametrize(
    "words",
    [
        ("data", "check", "{}"),
        ("preprocess", "canny", "photos", "-o", "{}"),
        ("convert", "{}", "z.safetensors", "--to", "original"),
        ("evaluate", "{}"),
        ("info", "{}"),
    ],
    ids=" ".join,
)
def test_a_name_that_no_file_can_have_is_one_plain_line(
    run: Run, photo: Path, words: tuple[str, ...]
) -> None:
    Path("photos").mkdir()
    shutil.copy(photo, "photos/a.png")
    message = run(*(word.format("x" * 5000) for word in words)).refused()
    assert len(message) < 6000
    assert "Traceback" not in message


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread"
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_written(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    replace = os.replace

    def ended(*values: Any) -> None:
        os.kill(os.getpid(), number)
        replace(*values)

    before = sorted(os.listdir())
    usual = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(os, "replace", ended)
    try:
        outcome = run("preprocess", "canny", photo, "-o", "edges.png")
        assert outcome.code == 128 + number
        assert sorted(os.listdir()) == before
        assert [signal.getsignal(one) for one in usual] == [signal.SIG_DFL] * 2
    finally:  # under nohup, SIGHUP was ignored
        for one, handler in usual.items():
            signal.signal(one, handler)


def test_a_signal_that_is_ignored_stays_ignored(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def asked(*values: Any) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        replace(*values)

    monkeypatch.setattr(os, "replace", asked)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run("preprocess", "canny", photo, "-o", "edges.png").done()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_that_was_stopped_is_no_success(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from controlkit import training
    from controlkit.training.runs import Result

    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stopped = Result(Path("runs"), None, stopped_at=3, signal=number)
        monkeypatch.setattr(training, "train_recipe", lambda *given, stopped=stopped, **named: stopped)
        assert run("train", "tiny-canny").code == code


def test_a_terminal_without_the_names_letters_is_no_traceback(photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "controlkit", "preprocess", "canny", str(photo), "-o", "Kanten – é.png"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert "wrote Kanten \\u2013 \\xe9.png" in done.stdout


def test_preprocess_writes_the_joints_beside_the_map(run: Run, photo: Path, tmp_path: Path) -> None:
    model = tiny_detectors.save_pose_model(tmp_path / "pose")
    out = run("preprocess", "openpose", photo, f"model={model}", "threshold=0.0", "-o", "pose.png").done()
    assert out.splitlines()[:2] == ["wrote pose.png", "wrote pose.json"]
    poses = read_poses("pose.json")
    assert len(poses.people) == 1
    assert np.array_equal(draw_poses(poses.people, 64, 64), load_picture("pose.png"))
    taken = run("preprocess", "openpose", photo, "-o", _folder(tmp_path / "x.json").with_suffix(".png"))
    assert "it is a folder" in taken.refused()


def test_a_depth_map_is_extracted_for_a_control(run: Run, models: Path, photo: Path, tmp_path: Path) -> None:
    model = tiny_detectors.save_depth_model(tmp_path / "depth")
    run("preprocess", "depth", photo, f"model={model}", "-o", "depth.png").done()
    depth = load_picture("depth.png")
    assert depth.shape == (64, 64, 3)
    assert depth.min() == 0
    assert depth.max() == 255


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError("Unable to allocate 2.00 GiB for an array"),
        ImportError("cv2.abi3.so: failed to map segment from shared object"),
    ],
)
def test_a_full_device_is_one_plain_line(run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def plan(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate_job, "plan", plan)
    assert "memory is full" in run("generate", "x").refused()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:18326"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"),
        torch.distributed.DistBackendError("NCCL error: remote process exited or there was a network error"),
    ],
)
def test_a_process_that_has_gone_is_one_plain_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def plan(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(generate_job, "plan", plan)
    assert "another one of the processes" in run("generate", "x").refused()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_plain_line(photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "controlkit", "preprocess", "canny", str(photo), "-o", "map.png"]
    for unbuffered in ("", "1"):  # found when all is flushed at the end, or by the first print
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
            )
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in done.stderr


def test_bad_recipes_are_one_plain_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from controlkit.training import runs

    monkeypatch.setattr(runs, "load_world", None)  # no scene is rendered for a recipe that cannot run
    assert "no base called 'tinny'" in run("train", "tiny-canny", "base=tinny", "out=run").refused()
    assert "no adapter called 'cany'" in run("train", "tiny-canny", "init=cany", "out=run").refused()
    assert "nowhere/config.json is missing" in run("train", "bundled-vae", "init=nowhere").refused()
    assert "nowhere/unet/config.json is missing" in run("train", "bundled-base", "init=nowhere").refused()
    assert "no base called" in run("train", "bundled-pose-estimator", "autoencoder=x").refused()
    assert 'train = "decoder" needs init' in run("train", "bundled-vae", "train=decoder").refused()
    assert "did you mean" in run("train", "tiny-cany").refused()
    assert "did you mean 'steps'" in run("train", "tiny-canny", "stepz=3").refused()
    assert sorted(os.listdir()) == []


def test_a_closed_stdout_is_no_traceback(photo: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "controlkit", "preprocess", "canny", str(photo), "-o", "map.png"]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    assert "Traceback" not in subprocess.run(closed, cwd=tmp_path, capture_output=True, text=True).stderr
    assert load_picture(tmp_path / "map.png").shape == (64, 64, 3)
    (tmp_path / "map.png").unlink()
    reader, writer = os.pipe()
    os.close(reader)  # as when `| head` has seen enough
    done = subprocess.run(command, cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert "BrokenPipe" not in done.stderr
    assert "Traceback" not in done.stderr
    assert load_picture(tmp_path / "map.png").shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_threads_wait_briefly_unless_the_environment_says_else(
    said: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that what the command sets is taken back, too
        monkeypatch.delenv(name)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["controlkit", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_a_folder_that_is_gone_is_one_plain_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for command in (("generate", "x"), ("preprocess", "canny", str(tmp_path))):
        assert "the folder that you are in has been removed" in run(*command).refused()


def test_no_file_takes_the_place_of_a_stream_that_was_closed(tmp_path: Path) -> None:
    program = (
        "import os; os.close(1); os.close(2)\n"
        "from controlkit.startup import fill_closed_streams; fill_closed_streams()\n"
        f"number = os.open({str(tmp_path / 'mine')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "os.write(2, b'what a library prints')\n"
        "raise SystemExit(number <= 2)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    assert (tmp_path / "mine").read_bytes() == b""


@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("sys.exit()", 0, "done closed"),
        ("sys.exit(130)", 130, "done closed"),
        ("sys.exit('no')", 1, "done closed freed"),  # Python's own end, as of all that is no command's
        ("raise RuntimeError('no')", 1, "done closed freed"),
    ],
)
def test_a_process_ends_without_taking_apart_what_it_holds(ending: str, code: int, said: str) -> None:
    script = f"""
import atexit, os, sys
from controlkit.startup import run_to_the_end

class Freed:
    def __del__(self):
        os.write(1, b"freed")

def command():
    atexit.register(lambda: print("closed", end=" "))
    print("done", end=" ")
    {ending}

held = Freed()
held.itself = held
run_to_the_end(command)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stdout.split() == said.split()
    assert ("no" in done.stderr) == ("no" in ending)


def test_what_libraries_are_made_of_is_left_out_of_collections() -> None:
    import gc

    from controlkit import startup

    def is_looked_through(made: object) -> bool:
        return any(one is made for one in gc.get_objects())

    early: list[int] = []
    startup._import_libraries.cache_clear()  # as in a process that has not imported them
    with startup.nothing_collected():
        assert not gc.isenabled()
        assert {"diffusers.models.unets.unet_2d_condition", "transformers.models.clip"} <= sys.modules.keys()
    assert gc.isenabled()
    assert not is_looked_through(early)  # nor at the end of the program
    later: list[int] = []
    with startup.nothing_collected():
        pass
    assert is_looked_through(later)

"""What `controlkit generate --like` repeats, what another option changes, and what none takes away."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import Run
from safetensors.torch import save_file

from controlkit import infotext
from controlkit.files import sha256_file
from controlkit.generate_like import Earlier
from controlkit.generate_plan import Plan, plan, versions
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.infotext import (
    ControlRecord,
    EmbeddingRecord,
    ImageRecord,
    LoraRecord,
    PictureRecord,
    PromptPictureRecord,
    StartRecord,
)

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RECORD = PictureRecord(
    prompt="a cube",
    negative_prompt="",
    base="sd15",
    controls=(),
    steps=4,
    guidance=4.0,
    scheduler="ddim",
    seed=1,
    width=64,
    height=64,
    device="cpu",
    dtype="float32",
    versions=versions(),
)


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with pictures, masks and files that a base could be given."""
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0)
    for name, side in (("photo.png", 64), ("same.png", 64), ("other.png", 32)):
        write_png(name, rows.integers(0, 256, (side, side, 3), np.uint8))
    for name, columns in (("left.png", slice(0, 32)), ("right.png", slice(32, 64))):
        mask = np.zeros((64, 64, 3), np.uint8)
        mask[:, columns] = 255
        write_png(name, mask)
    write_png("small.png", np.full((8, 8, 3), 255, np.uint8))
    save_file({"x": torch.ones(1)}, "a.safetensors")


def made(**changes: Any) -> str:
    """A picture that says it was made like that, in `made.png`."""
    record = replace(RECORD, **changes)
    write_png("made.png", np.zeros((64, 64, 3), np.uint8), text=infotext.chunks(record))
    return "made.png"


def like(changes: dict[str, Any], given: dict[str, Any] | None = None, **asked: Any) -> Plan:
    """The plan of `--like` a picture that was made with `changes`."""
    return plan(given or {}, output="out.png", like=made(**changes), **asked)


def begun(mask: str = "", strength: float = 0.5) -> dict[str, Any]:
    sums = [sha256_file(name) if name else "" for name in ("photo.png", mask)]
    return {"start": StartRecord("photo.png", sums[0], strength, mask, sums[1])}


def test_another_mask_takes_the_place_of_the_remembered_one() -> None:
    job = like(begun("left.png", 0.9), mask="right.png")
    assert job.beginning is not None
    assert job.beginning.record.mask == "right.png"
    assert job.beginning.record.mask_sha256 == sha256_file("right.png")
    assert job.beginning.record.strength == 0.9
    assert job.beginning.mask is not None
    assert job.beginning.mask[0, [0, 63]].tolist() == [0, 255]
    assert Path("right.png") in job.beginning.files
    job = like(begun(strength=0.5), mask="right.png")
    assert job.beginning is not None
    assert job.beginning.record.strength == 0.5
    with pytest.raises(ValueError, match=r"the mask small.png is 8x8 and its picture photo.png 64x64"):
        like(begun(), mask="small.png")


def test_another_picture_keeps_the_strength_and_the_mask_that_fits_it() -> None:
    job = like(begun("left.png", 0.6), start="same.png")
    assert job.beginning is not None
    record = job.beginning.record
    assert (record.path, record.mask, record.strength) == ("same.png", "left.png", 0.6)
    assert job.notes == ()
    job = like(begun("left.png", 1.0), start="other.png")
    assert job.beginning is not None
    record = job.beginning.record
    assert (record.path, record.mask, record.mask_sha256, record.strength) == ("other.png", "", "", 0.75)
    assert job.beginning.mask is None
    assert job.notes == (
        "the mask left.png does not fit other.png and is left out",
        "without its mask other.png is redone by a strength of 0.75",
    )
    job = like(begun("left.png"), {"strength": 0.3}, start="other.png", mask="none")
    assert job.beginning is not None
    assert (job.beginning.record.mask, job.beginning.record.strength, job.notes) == ("", 0.3, ())


def test_the_start_can_be_taken_away() -> None:
    assert like(begun("left.png"), start="none").beginning is None
    with pytest.raises(ValueError, match=r"--mask left.png belongs to a picture to start from"):
        like(begun("left.png"), start="none", mask="left.png")
    write_png("none", load_picture("photo.png"))
    job = like(begun("left.png"), start="none")
    assert job.beginning is not None
    assert job.beginning.record.path == "none", "a file called none is a file"


@pytest.mark.parametrize(("scheduler", "kept"), [("dpm++", None), ("ddim", None), ("lcm", 1.5)])
def test_a_temperature_that_a_scheduler_does_not_take_is_left_out(scheduler: str, kept: float | None) -> None:
    hot = {"scheduler": "euler-a", "temperature": 1.5}
    job = like(hot, {"scheduler": scheduler})
    assert job.options.temperature == kept
    assert bool(job.notes) == (kept is None)
    with pytest.raises(ValueError, match="temperature"):
        like(hot, {"scheduler": "dpm++", "temperature": 1.5})
    assert like(hot, {"temperature": None}).options.temperature is None


def test_what_a_base_or_a_device_decides_is_decided_anew() -> None:
    earlier = Earlier(Path("made.png"), replace(RECORD, dtype="bfloat16"))
    names = {"guidance", "width", "height", "dtype", "memory", "steps", "seed"}
    for given in ({}, {"device": "cpu"}, {"base": "sd15"}):
        assert earlier.settings(given, names).keys() == names
    assert names - earlier.settings({"device": "cuda"}, names).keys() == {"dtype", "memory"}
    assert earlier.settings({"base": "sdxl", "width": 96}, names).keys() == {"steps", "seed"}


def test_a_file_is_where_it_was_or_else_beside_the_picture(tmp_path: Path) -> None:
    there, here = tmp_path / "there" / "a.png", tmp_path / "here" / "a.png"
    earlier = Earlier(here.with_name("made.png"), RECORD)
    assert earlier.place(str(there)) == str(there), "it is nowhere"
    for file, expected in ((here, here), (there, there)):
        file.parent.mkdir()
        file.write_bytes(b"")
        assert earlier.place(str(there)) == str(expected)


def test_an_autoencoder_that_is_not_used_may_have_changed() -> None:
    earlier = Earlier(Path("made.png"), replace(RECORD, vae="a.safetensors", vae_mark="another"))
    with pytest.raises(ValueError, match=r"made.png was made with the autoencoder a.safetensors, which has"):
        earlier.check_models({"base"}, vae="a.safetensors")
    earlier.check_models({"base"}, vae="")
    earlier.check_models({"base", "vae"}, vae="a.safetensors")


def test_the_infotext_is_read_by_others() -> None:
    """With one key for both strengths, where there is one, and quotes where a value would be cut."""
    told = infotext.infotext(replace(RECORD, hires=1.5, hires_strength=0.4, base="C:models"))
    assert "Denoising strength: 0.4" in told
    assert 'Model: "C:models"' in told
    told = infotext.infotext(replace(RECORD, hires=1.5, hires_strength=0.4, **begun()))
    assert "Denoising strength: 0.5, Hires upscale: 1.5, Hires strength: 0.4" in told


def put_on() -> dict[str, Any]:
    total = sha256_file("a.safetensors")
    told = PromptPictureRecord("a.safetensors", ("photo.png",), (sha256_file("photo.png"),), 0.5, total)
    return {
        "loras": (LoraRecord("a.safetensors", 0.5, total),),
        "embeddings": (EmbeddingRecord("a.safetensors", "cube", total),),
        "ip_adapters": (told,),
        "image": ImageRecord("photo.png", sha256_file("photo.png")),
    }


def count_of(job: Plan) -> tuple[int, int, int, bool]:
    added = job.additions
    return len(added.loras), len(added.embeddings), len(added.ip_adapters), added.shown is not None


def test_what_is_put_on_belongs_to_its_base() -> None:
    assert count_of(like(put_on())) == (1, 1, 1, True)
    job = like(put_on(), {"base": "sdxl"})
    assert count_of(job) == (0, 0, 0, False)
    assert [note.split(" of made.png are left out")[0] for note in job.notes] == [
        "the LoRAs",
        "the words",
        "the IP-Adapters",
    ]
    job = like(put_on(), {"base": "sdxl"}, loras=["a.safetensors:0.2"])
    assert [record.weight for record, _ in job.additions.loras] == [0.2]
    assert len(job.notes) == 2
    Path("a.safetensors").unlink()
    assert count_of(like_again({"base": "sdxl"})) == (0, 0, 0, False), "it is not looked for"


def test_a_home_is_found_by_every_option_that_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, there, elsewhere = made(), str(tmp_path / "a.safetensors"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(elsewhere)
    added = plan(
        {},
        output="out.png",
        like=f"~/{name}",
        loras=["~/a.safetensors:0.5"],
        embeddings=["cube=~/a.safetensors"],
        ip_adapters=["~/a.safetensors=~/photo.png"],
        image_encoder="~/elsewhere",
        image="~/photo.png",
    ).additions
    total = sha256_file(there)
    assert added.loras[0][0] == LoraRecord(there, 0.5, total)
    assert added.embeddings[0][0] == EmbeddingRecord(there, "cube", total)
    told = added.ip_adapters[0].record
    assert (told.source, told.sha256, told.encoder) == (there, total, str(elsewhere))
    assert added.shown is not None
    assert added.shown.record.path == str(tmp_path / "photo.png")


def like_again(given: dict[str, Any]) -> Plan:
    return plan(given, output="out.png", like="made.png")


def test_none_takes_away_one_kind() -> None:
    assert count_of(like(put_on(), loras=["none"])) == (0, 1, 1, True)
    assert count_of(like(put_on(), embeddings=["none"])) == (1, 0, 1, True)
    assert count_of(like(put_on(), ip_adapters=["none"])) == (1, 1, 0, True)
    assert count_of(like(put_on(), image="none")) == (1, 1, 1, False)
    assert like({"vae": "somewhere"}, {"vae": "none"}).options.vae == ""
    options = like({"clip": "clip-b", "clip_guidance": 30.0}, {"clip": "none"}).options
    assert (options.clip, options.clip_guidance) == ("", 0.0)
    Path("none").touch()
    with pytest.raises(ValueError, match="none"):
        like(put_on(), loras=["none"])


def test_controls_can_be_taken_away_and_replaced() -> None:
    controls = {"controls": (ControlRecord("canny", "photo.png", sha256_file("photo.png"), False, "a"),)}
    assert len(like(controls).sources) == 1
    assert like(controls, controls=["none"]).sources == ()
    assert like(controls, maps=["none"]).sources == ()
    (source,) = like(controls, controls=["none"], maps=["depth=photo.png"]).sources
    assert source.record.kind == "depth"


def test_a_sheet_is_not_a_picture(run: Run) -> None:
    write_png("sheet.png", np.zeros((8, 8, 3), np.uint8), text={infotext.GRID_CHUNK: "[]"})
    assert run("generate", "--like", "sheet.png").refused() == (
        "sheet.png is a sheet of several pictures (--grid): only a single one can be repeated"
    )


def test_the_command_takes_none_for_numbers(run: Run, models: Path) -> None:
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 1]
    hot = ["--tile", 64, "--scheduler", "euler-a", "--temperature", 0.5, "--guidance", 3]
    run(*fixed, *hot, "--width", 128, "--height", 128, "-o", "made.png").done()
    numbers = ("tile", "temperature", "guidance", "width", "height")
    none = [word for name in (*numbers, "clip", "vae", "from") for word in (f"--{name}", "none")]
    run("generate", "--like", "made.png", *none, "-o", "out.png").done()
    told = json.loads(read_png_text("out.png")["controlkit"])
    assert [told[name] for name in numbers] == [None, None, 7.5, 64, 64]
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    assert "--tile must be a whole number, or none, not '6.5'" in run(*fixed, "--tile", "6.5").refused()
    hot = ["--temperature", "hot"]
    assert "--temperature must be a number, or none, not 'hot'" in run(*fixed, *hot).refused()


def test_a_grid_of_schedulers_leaves_a_remembered_temperature_out(run: Run, models: Path) -> None:
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 1, "--scheduler", "euler-a"]
    run(*fixed, "--temperature", 1.5, "-o", "made.png").done()
    outcome = run("generate", "--like", "made.png", "--grid", "scheduler=euler-a,dpm++", "-o", "grid.png")
    outcome.done()
    assert "note: the temperature 1.5 is left out for the schedulers that do not take it" in outcome.err
    told = json.loads(read_png_text("grid.png")[infotext.GRID_CHUNK])
    assert [one["temperature"] for one in told] == [1.5, None]
    grid = ["--grid", "scheduler=euler-a,dpm++"]
    assert "dpm++ injects none" in run(*fixed, "--temperature", 1.5, *grid).refused()


def test_another_mask_is_what_is_redrawn(run: Run, models: Path) -> None:
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 1]
    run(*fixed, "--from", "photo.png", "--mask", "left.png", "-o", "made.png").done()
    run("generate", "--like", "made.png", "--mask", "right.png", "-o", "out.png").done()
    before, after = load_picture("photo.png"), load_picture("out.png")
    assert np.array_equal(after[:, :32], before[:, :32])
    assert not np.array_equal(after[:, 32:], before[:, 32:])
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_a_file_of_that_name_elsewhere_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = made(**begun())
    other = tmp_path / "elsewhere"
    other.mkdir()
    write_png(other / "photo.png", np.full((64, 64, 3), 9, np.uint8))
    monkeypatch.chdir(other)
    job = plan({}, output="out.png", like=f"../{name}")
    assert job.beginning is not None
    assert np.array_equal(job.beginning.picture, load_picture("../photo.png"))


def test_numbers_that_are_taken_away(run: Run, models: Path) -> None:
    def again(*arguments: object) -> str:
        name = made(base=str(models / "sd1"), steps=1, hires=2.0, memory=("vae_tiled",))
        return run("generate", "--like", name, "-o", "b.png", "-n", 0, *arguments).refused()

    for option in ("--hires", "--memory", "--class"):  # what follows is refused, and this is not
        assert "0" in again(option, "none")
    assert "--hires must be a number, or none, not 'x'" in again("--hires", "x")
    assert "an amount of memory is written as in 4GB" in again("--memory", "x")

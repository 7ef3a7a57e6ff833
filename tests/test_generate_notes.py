"""Masks with transparency, options that change nothing, and what is refused before anything is loaded."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from cases import seldom
from outcomes import Run
from PIL import Image
from test_kinds import MAKE, xs_of
from test_like import RECORD

from controlkit import generate_job
from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter
from controlkit.base import Base
from controlkit.control import Control
from controlkit.generate_notes import of_networks, without_effect
from controlkit.generate_plan import Plan, plan
from controlkit.grid_axes import parse_axes
from controlkit.grid_job import check, variants
from controlkit.images import load_mask, load_picture, read_png_text, write_png
from controlkit.infotext import ControlRecord
from controlkit.sampling import Savings, generate

SQUARE = (slice(16, 48), slice(16, 48))


def layer(name: str, drawn: tuple[int, int, int], hidden: tuple[int, int, int], mode: str = "RGBA") -> str:
    """A file with a square on a transparent layer; `hidden` is the colour of what is transparent."""
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[..., :3] = hidden
    rgba[SQUARE] = (*drawn, 255)
    Image.fromarray(rgba).convert(mode).save(name)
    return name


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# --- masks ---


@pytest.mark.parametrize(
    ("drawn", "hidden"),
    [
        ((255, 255, 255), (0, 0, 0)),
        ((255, 255, 255), (255, 255, 255)),
        ((0, 0, 0), (255, 255, 255)),
        ((0, 0, 0), (0, 0, 0)),
        ((200, 30, 30), (9, 9, 9)),
    ],
)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_not_selected(
    drawn: tuple[int, int, int], hidden: tuple[int, int, int], mode: str
) -> None:
    mask = load_mask(layer("mask.png", drawn, hidden, mode))
    assert mask.shape == (64, 64)
    assert (mask[SQUARE] == 255).all()
    assert np.count_nonzero(mask) == 32 * 32


def test_white_selects_on_a_layer_of_two_colours() -> None:
    rgba = np.zeros((64, 64, 4), np.uint8)
    rgba[8:56, 8:56] = (0, 0, 0, 255)
    rgba[SQUARE] = (255, 255, 255, 128)
    Image.fromarray(rgba).save("mask.png")
    mask = load_mask("mask.png")
    assert (mask[SQUARE] == 128).all()
    assert np.count_nonzero(mask) == 32 * 32
    rgba[..., 3] = 255
    Image.fromarray(rgba).save("mask.png")
    assert np.array_equal(load_mask("mask.png"), load_picture("mask.png").max(axis=2))
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save("mask.png")
    assert not load_mask("mask.png").any()
    palette = Image.fromarray(np.eye(8, dtype=np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    palette.save("mask.png", transparency=0)
    assert np.array_equal(load_mask("mask.png"), 255 * np.eye(8, dtype=np.uint8))


def test_a_mask_is_turned_upright_as_its_picture_is() -> None:
    rgba = np.zeros((8, 16, 4), np.uint8)
    rgba[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(rgba).save("mask.png", exif=exif)
    mask = load_mask("mask.png")
    assert mask.shape == load_picture("mask.png").shape[:2] == (16, 8)
    assert (mask[:4] == 255).all()
    assert not mask[4:].any()


def test_a_transparent_mask_redraws_its_square_alone(run: Run, models: Path, photo: Path) -> None:
    layer("mask.png", (255, 255, 255), (0, 0, 0))
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 1]
    run(*fixed, "--from", photo, "--mask", "mask.png", "-o", "out.png").done()
    changed = (load_picture("out.png") != load_picture(photo)).any(axis=2)
    assert changed[SQUARE].any()
    changed[SQUARE] = False
    assert not changed.any()


def test_a_control_acts_where_its_mask_is_not_transparent(photo: Path) -> None:
    layer("mask.png", (255, 255, 255), (0, 0, 0))
    (source,) = planned(controls=[f"canny={photo}:mask=mask.png"]).sources
    assert source.mask is not None
    assert source.mask.mean() == 255 / 4
    write_png("black.png", np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"the mask black.png of the canny control is black"):
        planned(controls=[f"canny={photo}:mask=black.png"])


# --- what has no effect ---


def planned(given: dict[str, Any] | None = None, **asked: Any) -> Plan:
    return plan({"prompt": "x", **(given or {})}, output="out.png", **asked)


def notes(given: dict[str, Any], *grid: str, **asked: Any) -> list[str]:
    job, axes = planned(given, **asked), parse_axes(grid) if grid else []
    check(job, axes)
    return list(without_effect(job, variants(job, axes), [axis.key for axis in axes]))


@pytest.mark.parametrize(
    ("given", "grid", "note"),
    [
        ({"clip": "clip-b"}, "", "--clip has no effect without --clip-guidance"),
        ({"clip": "clip-b", "clip_guidance": 30.0}, "", None),
        ({"clip": "clip-b"}, "clip_guidance=0,30", None),
        ({"hires_strength": 0.3}, "", "--hires-strength has no effect without --hires"),
        ({"hires_strength": 0.3, "hires": 1.5}, "", None),
        ({"negative_prompt": "y", "guidance": 1.0}, "", "--negative has no effect"),
        ({"negative_prompt": "y", "guidance": 1.0}, "guidance=1,2", None),
        ({"negative_prompt": None, "guidance": 1.0}, "", None),
        ({"negative_prompt": "y"}, "", None),
        ({"guidance_rescale": 0.3, "guidance": 0.0}, "", "--guidance-rescale has no effect"),
        ({"guidance_until": 0.3, "guidance": 1.0}, "", "--guidance-until has no effect"),
        (
            {"negative_original_size": "64x64", "guidance": 1.0},
            "",
            "--negative-original-size has no effect",
        ),
        ({"negative_original_size": "64x64"}, "", None),
        ({"guidance": 1.0}, "guidance_until=0.5,1", "--guidance-until has no effect"),
        ({"guidance_until": 0.3, "guidance": 1.0, "clip": "clip-b", "clip_guidance": 30.0}, "", None),
        ({"control_every": 2}, "", "--control-every has no effect: there is no control"),
        ({"cuda_graph": True, "device": "cpu"}, "", "--cuda-graph has no effect on the device cpu"),
        ({"cuda_graph": True, "device": "cuda:1"}, "", None),
        ({"cuda_graph": True}, "", None),
        ({"cuda_graph": False, "device": "cpu"}, "", None),
        ({"steps": 9}, "steps=2,3", "--steps has no effect: the grid has values of its own"),
        ({"negative_prompt": "y"}, "negative=u|v", "--negative has no effect: the grid has"),
        ({"width": 96}, "size=64x64,64x128", "--width has no effect: the grid has"),
        ({"steps": 9}, "seed=1,2", None),
        ({"steps": 3}, "steps=2,3", None),
    ],
)
def test_options_without_effect(given: dict[str, Any], grid: str, note: str | None) -> None:
    found = notes(given, *([grid] if grid else []))
    assert [one.startswith(note or "") for one in found] == [True] * (note is not None)


@pytest.fixture(scope="module")
def unguided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Configurations of bases: of the Turbo kind, told the guidance, and a plain one. None has weights."""
    folder = tmp_path_factory.mktemp("unguided")
    turbo = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
    changes: dict[str, tuple[dict[str, object], dict[str, object]]] = {
        "turbo": ({}, dict(turbo)),
        "lcm": ({"time_cond_proj_dim": 256}, {}),
        "plain": ({}, {"_class_name": "PNDMScheduler"}),
    }
    for name, (unet, scheduler) in changes.items():
        for part, file, more in (("unet", "config", unet), ("scheduler", "scheduler_config", scheduler)):
            (folder / name / part).mkdir(parents=True)
            whole = {"cross_attention_dim": 768, **more}
            (folder / name / part / f"{file}.json").write_text(json.dumps(whole))
    return {name: str(folder / name) for name in changes}


@pytest.mark.parametrize(
    ("base", "given", "grid", "count"),
    [
        ("turbo", {"negative_prompt": "y", "guidance_rescale": 0.5, "guidance_until": 0.5}, "", 3),
        ("turbo", {"negative_prompt": "y", "guidance": 2.0}, "", 0),
        ("turbo", {"negative_prompt": "y"}, "guidance=0.5,2", 0),
        ("turbo", {"negative_prompt": "y"}, "guidance=0.5,1", 1),
        ("turbo", {"negative_prompt": None}, "", 0),
        ("lcm", {"negative_prompt": "y", "guidance_rescale": 0.5, "guidance_until": 0.5}, "", 3),
        ("lcm", {"negative_prompt": "y", "guidance": 5.0}, "", 1),
        ("lcm", {}, "negative=|y", 1),
        ("turbo", {"negative_prompt": "y"}, "base={turbo},{plain}", 0),
        ("turbo", {"negative_prompt": "y"}, "base={turbo},{lcm}", 1),
        ("plain", {"negative_prompt": "y", "guidance_rescale": 0.5}, "", 0),
        ("plain", {"negative_prompt": "y", "guidance": 1.0}, "", 1),
        ("nobody/ever", {"negative_prompt": "y"}, "", 0),
    ],
)
def test_a_base_that_guides_nothing_by_itself(
    unguided: dict[str, str], base: str, given: dict[str, Any], grid: str, count: int
) -> None:
    name = unguided.get(base, base)
    found = notes({**given, "base": name}, *([grid.format(**unguided)] if grid else []))
    assert len(found) == count
    assert all("has no effect: " in line for line in found)
    if base == "lcm":
        assert all(
            line.endswith(f"the base {name} is told the guidance, and nothing is guided") for line in found
        )
    if base == "turbo" and count == 3:
        assert all(line.endswith(f"is 1 or below, and 1 is that of the base {name}") for line in found)


@pytest.mark.parametrize(
    ("how", "given", "grid", "told"),
    [
        ("start=0.6", {"steps": 2}, "", True),
        ("start=0.5", {"steps": 2}, "", False),
        ("start=0.6:gate=webui", {"steps": 2}, "", True),
        ("start=0.6:gate=invoke", {"steps": 2}, "", False),
        ("start=0.6", {"steps": 2, "scheduler": "heun"}, "", False),  # its 3rd step begins at 0.67
        (
            "end=0.5",
            {"steps": 1, "scheduler": "pndm"},
            "",
            True,
        ),  # which does not look twice at its only step
        ("end=0.4", {"steps": 2, "scheduler": "pndm"}, "", False),
        ("end=0.4", {"steps": 4, "strength": 0.5}, "", True),
        ("end=0.4", {"steps": 4}, "", False),
        ("start=0.6", {}, "steps=1..3", True),
        ("end=0.4", {"steps": 2}, "end=0.4,0.6", True),
    ],
)
def test_a_window_that_holds_no_step(
    photo: Path, how: str, given: dict[str, Any], grid: str, told: bool
) -> None:
    start = str(photo) if "strength" in given else None
    found = notes(given, *([grid] if grid else []), controls=[f"canny={photo}:{how}"], start=start)
    assert ("the canny control has no effect" in " ".join(found)) == told


@pytest.mark.parametrize("kind", ["t2i-adapter", "controlnet-xs", "lite"])
def test_what_changes_nothing_of_a_network_is_told(sd1: Base, kind: str) -> None:
    network, picture = MAKE[kind](sd1), np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)

    def made(savings: Savings | None = None, **how: Any) -> np.ndarray:
        control, size = Control(network, picture, **how), {"width": 128, "height": 128}
        return generate(sd1, "x", controls=[control], steps=2, savings=savings, **size)[0]

    def told(control_every: int = 1, **how: Any) -> bool:
        control = ControlRecord("canny", "a.png", "", True, "", **how)
        record = replace(RECORD, control_every=control_every, controls=(control,))
        return any("has no effect" in line for line in of_networks(record, [network]))

    plain = made()
    assert not told()
    assert not told(mode="unbalanced")
    assert told(control_every=2) == np.array_equal(made(Savings(control_every=2)), plain)
    assert told(only_mid=True) == np.array_equal(made(only_mid=True), plain)
    assert told(layers="soft") == np.array_equal(made(layers="soft"), plain)
    assert told(mode="guess") == np.array_equal(made(mode="guess"), made(mode="unbalanced"))


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_what_changes_nothing_of_a_network_is_shown_once(run: Run, models: Path, sd1: Base) -> None:
    save_adapter(xs_of(sd1), "xs", info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    write_png("map.png", np.random.default_rng(1).integers(0, 2, (128, 128, 3), np.uint8) * 255)
    fixed = ["generate", "x", "--base", models / "sd1", "--adapter", "canny=xs", "--control-every", 2]
    fixed += ["--width", 128, "--height", 128]
    axis = ["--grid", "mode=balanced,guess"]
    outcome = run(*fixed, "--map", "canny=map.png", "--steps", 2, *axis, "-o", "grid.png")
    outcome.done()
    assert outcome.err.count("--control-every has no effect: a ControlNet-XS is not run by itself") == 1
    told = "the curve 'soft' of the canny control has no effect: a ControlNet-XS has 1 connection"
    assert outcome.err.count(told) == 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("image_noise=0,100", "--grid varies image_noise, and the base is told no picture: add --image"),
        ("hires_strength=0.3,0.5", "--grid varies hires_strength, and there is no second stage: add --hires"),
        ("control_every=1,2", "--grid varies control_every, and there is no control"),
        ("seed=1..", "--grid 'seed=1..': seed cannot be '': it takes whole numbers, as 1,2,4 or 1..4"),
        ("seed=a", "seed cannot be 'a': it takes whole numbers"),
        ("guidance=a,b", "--grid 'guidance=a,b': guidance cannot be 'a': it takes numbers, as 0.5,1"),
    ],
)
def test_grids_that_make_no_sense(run: Run, grid: str, message: str) -> None:
    assert message in run("generate", "x", "--grid", grid).refused()


def test_the_notes_are_shown_and_no_clip_is_loaded(generate: Run) -> None:
    clip = tiny_models.build_clip(Path("clip"))
    outcome = generate("--clip", clip, "--hires-strength", 0.3, "-o", "out.png")
    outcome.done()
    assert "note: --clip has no effect" in outcome.err
    assert "note: --hires-strength has no effect" in outcome.err
    assert "loading the CLIP" not in outcome.err
    outcome = generate("--clip", clip, "--grid", "clip_guidance=0,30", "-o", "grid.png")
    outcome.done()
    assert "note: --clip" not in outcome.err
    assert "loading the CLIP" in outcome.err


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_what_only_the_device_and_the_size_show(run: Run, models: Path) -> None:
    write_png("photo.png", np.random.default_rng(0).integers(0, 256, (64, 70, 3), np.uint8))
    write_png("mask.png", np.full((64, 70, 3), 255, np.uint8))
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 1, "--from", "photo.png"]
    outcome = run(*fixed, "--mask", "mask.png", "--cuda-graph", "--device", "cpu", "-o", "out.png")
    outcome.done()
    assert "note: photo.png is 70x64 and is brought to 72x64: what the mask leaves alone" in outcome.err
    assert outcome.err.count("--cuda-graph has no effect on the device cpu") == 1
    outcome = run(*fixed, "--width", 64, "--height", 64, "-o", "out.png")
    outcome.done()
    assert "is brought to" not in outcome.err
    assert "photo.png is 70x64, and 9% of it lies outside the 64x64 that are generated" in outcome.err
    write_png("map.png", np.random.default_rng(1).integers(0, 2, (64, 64, 3), np.uint8) * 255)
    region = run("generate", "x", "--map", "canny=map.png:mask=mask.png", "--steps", 1, "-o", "out.png")
    region.done()
    assert "mask.png is 70x64, and 9% of it lies outside" in region.err
    assert "a region is best given in the shape of the map" in region.err


# --- words, sizes, records ---


def test_an_inpaint_control_asks_for_its_adapter(generate: Run, photo: Path) -> None:
    told = generate("--control", f"inpaint={photo}").refused()
    assert told == "an inpaint control needs its adapter: add --adapter inpaint=NAME"


def test_a_start_whose_name_cannot_be_recorded_is_refused(run: Run, photo: Path) -> None:
    strange = os.fsdecode(b"photo\xff.png")
    shutil.copy(photo, strange)
    assert "is not valid Unicode" in run("generate", "x", "--from", strange).refused()


def test_a_second_stage_that_is_too_large_is_refused_at_once(run: Run) -> None:
    with pytest.raises(ValueError, match=r"a width of 4096, 4 times as large, is 16384; 8192 is the most"):
        planned({"width": 4096, "height": 64, "hires": 4.0})
    outcome = run("generate", "x", "--width", 4096, "--height", 64, "--hires", 4)
    assert "8192 is the most" in outcome.refused()
    assert "loading" not in outcome.err


def test_the_infotext_keeps_both_strengths(generate: Run, photo: Path) -> None:
    generate(
        "--from", photo, "--strength", 0.4, "--hires", 1.5, "--hires-strength", 0.6, "-o", "out.png"
    ).done()
    told = read_png_text("out.png")["parameters"]
    assert "Denoising strength: 0.4" in told
    assert "Hires upscale: 1.5, Hires strength: 0.6" in told
    generate("--hires", 1.5, "--hires-strength", 0.6, "-o", "out.png").done()
    told = read_png_text("out.png")["parameters"]
    assert "Hires upscale: 1.5, Denoising strength: 0.6" in told
    assert "Hires strength" not in told


# --- one file for several controls ---


@pytest.mark.parametrize(
    "more",
    [
        ["--control-every", 2],
        *seldom([], ["--tile", 64], ["--features-every", 2], ["--memory", "4GB"]),
    ],
)
def test_controls_of_one_file_share_its_adapter_and_map(
    generate: Run, photo: Path, monkeypatch: pytest.MonkeyPatch, more: list[object]
) -> None:
    asked = ["--control", f"canny={photo}:0.5:end=0.5", "--steps", 4, *more]
    outcome = generate(*asked, "-o", "out.png")
    outcome.done()
    assert outcome.err.count("loading the canny adapter") == 1
    assert outcome.err.count("extracting the canny map") == 1

    def apart(sources: Any, base: Any, models: Any, report: Any, *, rests: bool) -> Any:
        device = base.unet.device if rests else base.device
        return [load_adapter(source.record.adapter, base=base, device=device) for source in sources]

    monkeypatch.setattr(generate_job, "_adapters", apart)
    generate(*asked, "-o", "apart.png").done()
    assert np.array_equal(load_picture("apart.png"), load_picture("out.png"))


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_an_adapter_that_two_kinds_share_is_told_of_the_wrong_one(
    generate: Run, photo: Path, models: Path
) -> None:
    fixed = ["--map", f"depth={photo}", "--adapter", f"depth={models / 'canny-sd1'}"]
    outcome = generate(*fixed, "-o", "out.png")
    outcome.done()
    assert outcome.err.count("learned to follow canny maps, not depth") == 1
    assert outcome.err.count("loading the") == 2, "the base, and one adapter"


def test_the_help_shows_groups(run: Run) -> None:
    import typer.main

    from controlkit.cli import app
    from controlkit.command_group import GROUPS

    command = typer.main.get_command(app)
    there = {parameter.name for parameter in command.commands["generate"].params}  # type: ignore[attr-defined]
    named = [name for names in GROUPS.values() for name in names]
    assert set(named) <= there
    assert len(set(named)) == len(named)
    helped = run("generate", "--help").done()
    places = [helped.index(f"\n{title}:\n") for title in ("Arguments", *GROUPS, "Options")]
    assert places == sorted(places)
    assert helped.index("--lora FILE") > helped.index("\nModels:\n")
    assert helped.index("  --help") > places[-1], "what is in no group stands at the end"

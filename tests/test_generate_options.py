"""`controlkit generate` with every way of control, from pictures, in two stages, and in tiles."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from outcomes import Run

from controlkit.adapters import AdapterInfo, MapSpec, load_adapter, save_adapter
from controlkit.arguments import ControlArgument, parse_control
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.sampling import generate as generate_pictures

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def recorded(path: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(read_png_text(path)["controlkit"])
    return found


@pytest.fixture
def region(tmp_path: Path) -> str:
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, :32] = 255
    write_png(tmp_path / "left.png", mask)
    return "left.png"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("0.7", {"scale": 0.7}),
        ("1..0.2", {"scale": (1.0, 0.2)}),
        ("scale=0.5:end=0.5", {"scale": 0.5, "end": 0.5}),
        ("0.7:mode=prompt:start=0.1", {"scale": 0.7, "mode": "prompt", "start": 0.1}),
        ("layers=soft:gate=webui", {"layers": "soft", "gate": "webui"}),
        ("layers=0,0.5,1", {"layers": (0.0, 0.5, 1.0)}),
        ("layers=0.5", {"layers": (0.5,)}),
        ("only_mid=true:mask=left.png", {"only_mid": True, "mask": "left.png"}),
        ("mask=C:\\l r.png:end=0.5", {"mask": "C:\\l r.png", "end": 0.5}),
        (
            "0.7:adapter=C:\\a.pth:mask=take: 2.png",
            {"scale": 0.7, "adapter": "C:\\a.pth", "mask": "take: 2.png"},
        ),
        ("mode=prompt:0.7", {"scale": 0.7, "mode": "prompt"}),
        ("mask=D:a.png:1..0.2:end=0.5", {"scale": (1.0, 0.2), "mask": "D:a.png", "end": 0.5}),
    ],
)
def test_how_a_control_acts_is_written_behind_its_picture(how: str, expected: dict[str, object]) -> None:
    found = parse_control(f"canny=C:\\a b.png:{how}", is_map=False)
    assert found == ControlArgument(
        "canny",
        "C:\\a b.png",
        **{"scale": 1.0, **expected},
        is_map=False,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mode=promt", "unknown mode 'promt' (did you mean 'prompt'?)"),
        ("mod=prompt", "unknown setting of a control 'mod' (did you mean 'mode'?)"),
        ("end=half", "end must be a number from 0 to 1, not 'half'"),
        ("start=0.6:end=0.5", "0 <= start < end <= 1"),
        ("scale=11", "scale must be a number from -10 to 10, not 11.0"),
        ("0.5:end=0.5:end=0.7", "end is given twice"),
        ("0.5:end=0.5:0.7", "scale is given twice"),
        ("scale=0.5:0.7", "scale is given twice"),
        ("mode=prompt:guess", "unknown mode 'prompt:guess'"),
        ("mask=", "mask must be a file, not ''"),
        ("0.7:scale=0.5", "scale is given twice"),
        ("only-mid=true", "unknown setting of a control 'only-mid'"),
        ("only_mid=yes", "only_mid must be true or false, not 'yes'"),
        ("layers=0,nan", "layers must be finite numbers"),
        ("0,8", "stands '0,8', and not a strength, as 0.8 or 1..0.2, or a setting, as mode=prompt"),
        ("prompt:end=0.5", "stands 'prompt', and not a strength"),
    ],
)
def test_what_a_control_cannot_be_told(generate: Run, photo: Path, how: str, message: str) -> None:
    assert message in generate("--control", f"canny={photo}:{how}").refused()


def test_settings_are_recorded_and_repeated(run: Run, models: Path, photo: Path, region: str) -> None:
    fixed = ["--base", models / "sd1", "--adapter", f"canny={models / 'canny-sd1'}", "--steps", 3]
    how = f"1..0.5:end=0.9:gate=webui:mode=guess:mask={region}"
    more = ["--scheduler", "euler-a", "--temperature", 0.5, "--guidance-rescale", 0.3, "--clip-skip", 2]
    run("generate", "x", *fixed, "--control", f"canny={photo}:{how}", *more, "-o", "out.png").done()
    control = recorded("out.png")["controls"][0]  # type: ignore[index]
    assert (control["scale"], control["end"], control["gate"]) == ([1.0, 0.5], 0.9, "webui")
    assert (control["mode"], control["mask"]) == ("guess", region)
    assert (recorded("out.png")["temperature"], recorded("out.png")["guidance_rescale"]) == (0.5, 0.3)
    assert recorded("out.png")["clip_skip"] == 2
    assert "Clip skip: 2, " in read_png_text("out.png")["parameters"]
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    run("generate", "--like", "out.png", "--temperature", 1, "-o", "other.png").done()
    assert not np.array_equal(load_picture("other.png"), load_picture("out.png"))
    write_png(region, np.full((64, 64, 3), 255, np.uint8))
    assert "left.png, which has changed since" in run("generate", "--like", "out.png").refused()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the command says that the adapter was not trained with masks
@pytest.mark.parametrize("each", [1, 3])
def test_maps_that_are_one_input_are_given_as_several(run: Run, models: Path, sd1: Base, each: int) -> None:
    """As a tensor of all of them from Python gives it."""
    network = from_base(sd1, conditioning_channels=2 * each, hint_channels=(4, 8, 8, 8), seed=1)
    tiny_models.randomize_zero_convs(network, seed=1)
    info = AdapterInfo(map=MapSpec("canny + depth", channels=2 * each), family="sd1")
    save_adapter(network, "both", info=info, dtype=torch.float32)
    draw = np.random.default_rng(0)
    maps = [np.repeat(draw.integers(0, 256, (64, 64, 1), np.uint8), 3, axis=2) for _ in range(2)]
    for name, image in zip(("edges.png", "far.png"), maps, strict=True):
        write_png(name, image)
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 2]
    given = ["--map", "depth=far.png:0.7", "--map", "canny=edges.png:0.7"]
    adapters = ["--adapter", "canny=both", "--adapter", "depth=both"]
    run(*fixed, *given, *adapters, "-o", "out.png").done()
    levels = np.concatenate([image[..., :each] for image in maps], axis=2)
    cond = torch.from_numpy(levels).permute(2, 0, 1)[None].contiguous() / 255
    base = load_base(str(models / "sd1"))
    control = Control(load_adapter("both", base=base), cond, scale=0.7)
    (expected,) = generate_pictures(base, "x", controls=[control], steps=2)
    assert np.array_equal(load_picture("out.png"), expected)
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    for arguments, message in (
        (given[:2], "takes the maps canny, depth as one input, each once: canny is missing"),
        ([*given, *given[:2]], "depth is given twice"),
        ([*given[:2], "--map", "canny=edges.png:0.5"], "give them the same scale, window, mode and mask"),
    ):
        named = adapters if len(arguments) > 2 else adapters[2:]  # the depth's alone
        refused = run(*fixed, *arguments, *named)
        assert (refused.code, message in refused.err) == (2, True)
    write_png("far.png", draw.integers(0, 256, (64, 64, 3), np.uint8))
    given += ["--map", "mask=edges.png:0.7"]
    refused = run(*fixed, *given, *adapters, "--adapter", "mask=both")
    assert "takes the maps canny, depth as one input, and mask is none of them" in refused.err
    given = given[:4]
    if each == 1:
        assert "takes grey maps, and the depth map is coloured" in run(*fixed, *given, *adapters).err
    told = run("info", "both", "--base", models / "sd1").done().splitlines()[-1]
    how = "--control canny=PICTURE --control depth=PICTURE --adapter canny=both --adapter depth=both"
    assert told.endswith(how)


@pytest.mark.slow
def test_a_picture_with_a_grey_map_in_each_channel_is_one_input(run: Run, models: Path, sd1: Base) -> None:
    network = from_base(sd1, hint_channels=(4, 8, 8, 8), seed=1)
    info = AdapterInfo(map=MapSpec("canny + depth + mask"), family="sd1")
    save_adapter(network, "three", info=info, dtype=torch.float32)
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (64, 64, 3), np.uint8)
    write_png("all.png", image)
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 2]
    for kind, channel in zip(("canny", "depth", "mask"), range(3), strict=True):
        write_png(f"{kind}.png", np.repeat(image[..., channel : channel + 1], 3, axis=2))
    run(*fixed, "--map", "canny=all.png", "--adapter", "canny=three", "-o", "one.png").done()
    given = [word for kind in ("mask", "canny", "depth") for word in ("--map", f"{kind}={kind}.png")]
    given += [word for kind in ("canny", "depth", "mask") for word in ("--adapter", f"{kind}=three")]
    run(*fixed, *given, "-o", "several.png").done()
    assert np.array_equal(load_picture("one.png"), load_picture("several.png"))


def test_a_picture_to_start_from_is_recorded_and_repeated(
    run: Run, models: Path, photo: Path, region: str
) -> None:
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 4, "--from", photo]
    run(*fixed, "-o", "whole.png").done()
    assert recorded("whole.png")["start"]["strength"] == 0.75  # type: ignore[index]
    assert "Denoising strength: 0.75" in read_png_text("whole.png")["parameters"]
    run(*fixed, "--mask", region, "-o", "hole.png").done()
    before, after = load_picture(photo), load_picture("hole.png")
    assert np.array_equal(after[:, 32:], before[:, 32:])
    assert not np.array_equal(after[:, :32], before[:, :32])
    run("generate", "--like", "hole.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("hole.png").read_bytes()
    run("generate", "--like", "hole.png", "--strength", 0.5, "-o", "half.png").done()
    assert recorded("half.png")["start"]["strength"] == 0.5  # type: ignore[index]


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_an_inpainting_adapter_sees_the_picture_and_its_hole(
    run: Run, models: Path, photo: Path, region: str
) -> None:
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 2]
    control = ["--control", f"inpaint={photo}", "--adapter", f"inpaint={models / 'canny-sd1'}"]
    assert "add --from PICTURE --mask MASK" in run(*fixed, *control).refused()
    outcome = run(*fixed, *control, "--from", photo, "--mask", region, "-o", "out.png")
    outcome.done()
    assert "learned to follow canny maps, not inpaint" in outcome.err
    write_png("other.png", 255 - load_picture(photo))
    other = ["--control", "inpaint=other.png", *control[2:], "--from", photo, "--mask", region]
    run(*fixed, *other, "-o", "other-out.png").done()
    changed = (load_picture("other-out.png") != load_picture("out.png")).any(axis=2)
    assert changed[:, :32].any(), "it follows the picture that the control names"
    assert not changed[:, 32:].any()
    filled = ["--control", f"inpaint={photo}:fit=fill", *control[2:], "--from", photo, "--mask", region]
    assert "fit=fill would move it off the picture that is filled" in run(*fixed, *filled).refused()


@pytest.mark.slow
def test_two_stages(generate: Run, run: Run) -> None:
    outcome = generate("--hires", 1.5, "--hires-strength", 0.5, "-n", 2, "-o", "out.png")
    assert "wrote out-1.png (96x96, seed 0)" in outcome.done()
    assert load_picture("out-2.png").shape == (96, 96, 3)
    assert "Hires upscale: 1.5" in read_png_text("out-1.png")["parameters"]
    run("generate", "--like", "out-2.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out-2.png").read_bytes()


def test_large_pictures_in_tiles_keep_their_size(run: Run, models: Path) -> None:
    write_png("large.png", np.random.default_rng(0).integers(0, 256, (160, 200, 3), np.uint8))
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 2, "--from", "large.png"]
    run(*fixed, "--tile", 64, "-o", "out.png").done()
    assert load_picture("out.png").shape == (160, 200, 3)


def test_a_preview_lives_as_long_as_the_picture_is_made(
    generate: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlkit import generate_preview

    seen = []
    real = generate_preview.images.write_png

    def watch(path: object, picture: np.ndarray, **options: object) -> None:
        seen.append((str(path), picture.shape))
        real(path, picture, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(generate_preview.images, "write_png", watch)
    monkeypatch.setattr(generate_preview, "PREVIEW_SECONDS", 0.0)
    generate("--preview", "live.png", "-o", "out.png").done()
    assert seen == [("live.png", (32, 32, 3))] * 2 + [("out.png", (64, 64, 3))]
    assert not Path("live.png").exists()
    assert "would replace a file" in generate("--preview", photo).refused()
    assert "must end in .png" in generate("--preview", "live.jpg").refused()


def test_a_preview_passes_over_what_is_no_picture_yet(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that predicts the noise tells no picture at a step of nothing but noise."""
    from controlkit import generate_preview

    monkeypatch.setattr(generate_preview, "PREVIEW_SECONDS", 0.0)
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "steps_offset": 0}
    alphas = sd1.alphas_cumprod.clone()
    alphas[-1] = 0
    base = replace(sd1, scheduler_config={**sd1.scheduler_config, **zero}, alphas_cumprod=alphas)
    request: dict[str, Any] = {"steps": 3, "scheduler": "euler"}
    seen: list[np.ndarray] = []
    (shown,) = generate_pictures(base, "x", preview=generate_preview.Preview(seen.append, base), **request)
    assert len(seen) == 2, "of three steps the first is passed over"
    assert np.array_equal(shown, generate_pictures(base, "x", **request)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mask", "left.png"), "belongs to a picture to start from: add --from PICTURE"),
        (("--strength", 0.5), "belongs to a picture to start from"),
        (("--from", "nowhere.png"), "nowhere.png does not exist"),
        (("--from", "{photo}", "--strength", 0), "strength must be a number above 0"),
        (("--from", "{photo}", "--mask", "small.png"), "the mask small.png is 8x8 and its picture"),
        (("--from", "{photo}", "--mask", "black.png"), "the mask black.png is black"),
        (("--from", "{photo}", "-o", "{photo}"), "would overwrite what it is made from"),
        (("--hires", 0.5), "enlarged by a factor above 1 and up to 8, not 0.5"),
        (("--tile", 100), "a tile's side must be a multiple of 64"),
        (("--temperature", 0.5, "--scheduler", "euler"), "euler injects none"),
        (("--clip-skip", 0), "clip_skip must be a whole number from 1"),
        (("--clip-skip", 4), "clip_skip 4 leaves no layer of the base's text encoder (3)"),
        (("--control-every", 0), "control_every must be a whole number from 1"),
        (("--guidance-until", 2), "guidance_until must be a number from 0 to 1"),
        (("--guidance-rescale", -1), "guidance_rescale must be a number from 0 to 1"),
    ],
)
def test_options_that_do_not_fit(
    generate: Run, photo: Path, region: str, words: tuple[object, ...], message: str
) -> None:
    write_png("small.png", np.full((8, 8, 3), 255, np.uint8))
    write_png("black.png", np.zeros((64, 64, 3), np.uint8))
    told = [str(word).replace("{photo}", str(photo)) for word in words]
    assert message in generate(*told).refused()

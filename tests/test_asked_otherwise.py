"""What is asked for in other ways than the usual ones: other arrays, masks, seeds, words of others."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from outcomes import Run
from PIL import Image

from controlkit import infotext
from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.images import load_picture, read_png_text, write_png
from controlkit.sampling import generate as sample
from controlkit.sheets import contact_sheet
from controlkit.starting import Start
from controlkit.studio import commands

GREY = np.arange(64 * 64, dtype=np.uint32).reshape(64, 64).astype(np.uint8)
COLOUR = np.stack([GREY, GREY[::-1], GREY.T], axis=2)


@pytest.mark.parametrize(
    "picture",
    [
        COLOUR,
        COLOUR.astype(np.float32) / 255,
        np.dstack([COLOUR, np.full((64, 64), 255, np.uint8)]),
        Image.fromarray(COLOUR),
        torch.from_numpy(COLOUR).permute(2, 0, 1),
    ],
    ids=["uint8", "floats", "RGBA", "PIL", "tensor"],
)
def test_a_picture_to_start_from_is_whatever_a_map_may_be(picture: Any) -> None:
    np.testing.assert_array_equal(Start(picture).picture, COLOUR)


def test_a_grey_picture_to_start_from() -> None:
    np.testing.assert_array_equal(Start(GREY).picture, np.dstack([GREY] * 3))


def test_masks_of_a_start_are_checked() -> None:
    hole = np.zeros((64, 64), bool)
    hole[10:20] = True
    assert (Start(COLOUR, mask=hole).hole() == hole).all()
    for mask, words in (
        (hole * 255.0, r"values in \[0, 1\], not 0 to 255"),
        (hole * 2.0 - 1, r"values in \[0, 1\], not -1 to 1"),
        (hole[..., None].astype(np.uint8), r"a mask is \(H, W\), not \(64, 64, 1\)"),
        (np.zeros((64, 64), bool), "black: there is nothing to redraw"),
        (hole.astype(np.int64), "uint8, bool, or float"),
    ):
        with pytest.raises(ValueError, match=words):
            Start(COLOUR, mask=mask)


@pytest.mark.parametrize("dtype", [np.float32, bool])
def test_a_control_that_acts_nowhere_is_refused(dtype: Any, sd1: Base) -> None:
    with pytest.raises(ValueError, match="0 everywhere: the control would act nowhere"):
        Control(from_base(sd1), COLOUR, mask=np.zeros((8, 8), dtype))


@pytest.mark.filterwarnings("ignore:.*lies outside")
def test_a_region_whose_white_is_cropped_is_named(generate: Run, photo: Path) -> None:
    wide = np.zeros((64, 256), np.uint8)
    wide[:, 200:] = 255
    write_png("region.png", np.dstack([wide] * 3))
    message = generate("--control", f"canny={photo}:mask=region.png", "-o", "out.png").refused()
    assert "region.png: at 64x64 it is cropped, and all that is white in it with it" in message


def test_the_two_settings_of_a_grid_have_a_line_each(generate: Run) -> None:
    """Both together are longer than a cell is wide, and pictures of one column could not be told apart."""
    generate("--grid", "canny.mode=balanced,prompt", "--grid", "scheduler=ddim,ddpm", "-o", "grid.png").done()
    sheet = load_picture("grid.png")
    line, cell = round(11 * 1.6), 192
    row = 16 + cell + 2 * line
    labels = sheet[:, 16 : 16 + cell]  # of the first column
    below, above = labels[-16 - 2 * line : -16], labels[-16 - row - 2 * line : -16 - row]
    assert (above[:line] == below[:line]).all(), "the column's setting is one"
    assert (above[line:] != below[line:]).any(), "the row's is another"
    one = contact_sheet([[(COLOUR, ("canny.mode=balanced", "scheduler=ddim"))]], cell=cell)
    assert (one[-16 - 2 * line : -16, 16 : 16 + cell] == above).all()


def test_a_cell_that_cannot_be_is_named(generate: Run) -> None:
    asked = ["--grid", "canny.start=0,0.5", "--grid", "canny.end=0.5,1"]
    assert "--grid, canny.start=0.5, canny.end=0.5: " in generate(*asked, "-o", "g.png").refused()


def test_two_controls_of_one_kind_have_an_adapter_each(
    run: Run, models: Path, photo: Path, sd1: Base
) -> None:
    other = tiny_models.randomize_zero_convs(from_base(sd1, seed=5), seed=5)
    save_adapter(other, "other", info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    fixed = [
        "generate",
        "x",
        "--base",
        models / "sd1",
        "--steps",
        2,
        "--adapter",
        f"canny={models / 'canny-sd1'}",
    ]
    both = ["--map", f"canny={photo}:0.7", "--map", f"canny={photo}:0.4:adapter=other"]
    run(*fixed, *both, "-o", "both.png").done()
    edges = load_picture(photo)
    adapters = (load_adapter(str(models / "canny-sd1"), base=sd1), load_adapter("other", base=sd1))
    controls = [
        Control(adapter, edges, scale=scale) for adapter, scale in zip(adapters, (0.7, 0.4), strict=True)
    ]
    (expected,) = sample(sd1, "x", controls=controls, steps=2)
    np.testing.assert_array_equal(load_picture("both.png"), expected)
    run("generate", "--like", "both.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("both.png").read_bytes()
    record = infotext.parse(read_png_text("both.png"), source="both.png")
    (name, *words) = shlex.split(commands.command(record))
    assert name == "controlkit"
    run(*words).done()
    np.testing.assert_array_equal(load_picture(commands.OUTPUT), expected)
    write_png(photo, COLOUR)
    asked = run("generate", "--like", "both.png", "-o", "again.png").refused()
    assert ":adapter=other" in asked
    refused = run(*fixed, "--adapter", "canny=other", *both).refused()
    assert "for each control its own: --control canny=PICTURE:adapter=NAME" in refused


@pytest.mark.slow
def test_seeds_that_repeat_are_told(generate: Run) -> None:
    outcome = generate("--seed", 2**32 - 1, "-n", 2, "-o", "big.png")
    outcome.done()
    assert "the seed 4294967296 draws the same noise as 0: seeds repeat from 4294967296 on" in outcome.err
    generate("--seed", 0, "-o", "small.png").done()
    np.testing.assert_array_equal(load_picture("big-2.png"), load_picture("small.png"))
    assert "seeds repeat" not in generate("--seed", 2**32 - 1, "-o", "last.png").err


def test_words_of_others_are_led_to_ours(generate: Run, run: Run, photo: Path) -> None:
    for word in ("strength", "strenght", "weight"):
        refused = generate("--control", f"canny={photo}:{word}=0.5").refused()
        assert f"unknown setting of a control '{word}' (did you mean 'scale'?)" in refused
    told = run("generate", "a cube <lora:style:0.5>", "--steps", 1, "-o", "out.png").err
    assert "'<lora:style:0.5>' is read as text: a LoRA is given as --lora FILE:WEIGHT" in told
    refused = run("generate", "x", "--base", "sd15", "--control", f"tile={photo}").refused()
    assert "no preprocessor makes tile maps; give the map itself, --map tile=" in refused


def test_where_nothing_can_be_made_is_said_as_it_is(run: Run) -> None:
    if not Path("/proc/self").exists():
        pytest.skip("there is no such place here")
    refused = run("generate", "x", "--steps", 1, "-o", "/proc/nothing/x.png").refused()
    assert "the folder /proc/nothing does not exist" in refused
    assert "does not exist" not in run("generate", "x", "--steps", 1, "-o", "/proc/x.png").refused()


@pytest.fixture
def broken(tmp_path: Path) -> Base:
    """A base of which each test breaks a part."""
    return load_base(str(tiny_models.build(tmp_path / "base", "sd1", sample_size=8)))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("decoder", "the latents are finite, and the picture decoded from them is not"),
        ("encoder", "step 1 of 2: the picture to start from was not finite once encoded"),
        ("text", "step 1 of 2: the text as its encoder read it was not finite to begin with"),
        ("unet", "step 1 of 2: guidance that is too large, damaged weights"),
    ],
)
def test_what_is_not_finite_is_told_by_where_it_began(part: str, words: str, broken: Base) -> None:
    text = next(
        bias for name, bias in broken.text_encoders[0].named_parameters() if "final_layer_norm.bias" in name
    )
    biases = {"decoder": broken.vae.decoder.conv_out.bias, "encoder": broken.vae.encoder.conv_out.bias}
    weight = {**biases, "text": text, "unet": broken.unet.conv_out.bias}[part]
    with torch.no_grad():
        weight.fill_(float("nan"))
    start = Start(COLOUR, strength=1.0) if part == "encoder" else None
    with pytest.raises(ValueError, match=words):
        sample(broken, "x", steps=2, guidance=4, start=start)


def test_what_is_neither_a_name_nor_a_path_is_refused_by_what_it_is_for() -> None:
    import controlkit

    base = load_base("tiny")
    wanted = {
        "a base": lambda given: controlkit.load_base(given),
        "an adapter": lambda given: controlkit.load_adapter(given, base=base),
        "an autoencoder": lambda given: controlkit.with_vae(base, given),
        "a CLIP": lambda given: controlkit.load_clip(given),
        "a LoRA": lambda given: controlkit.with_loras(base, [controlkit.Lora(given)]),
        "an embedding": lambda given: controlkit.with_embeddings(base, [controlkit.Embedding(given)]),
        "an IP-Adapter": lambda given: controlkit.picture_prompt(base, given, COLOUR),
    }
    for what, use in wanted.items():
        for given, kind in ((None, "a NoneType"), (5, "an int")):
            with pytest.raises(ValueError, match=f"^{what} is a name or a path, not {kind}$"):
                use(given)
    with pytest.raises(ValueError, match="an adapter is a name or a path"):
        controlkit.open_adapter_file(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no IP-Adapter aaa"):
        controlkit.picture_prompt(base, 300 * "a", COLOUR)


def test_prompts_and_networks_are_asked_for_by_what_they_are() -> None:
    base = load_base("tiny")
    for prompts, kind in (
        ("a red figure", "not a str"),
        (iter(["a"]), "not a"),
        ([None], "a NoneType is in it"),
    ):
        with pytest.raises(
            ValueError, match=rf"^prompts is a list.*{kind}"
        ):  # text is no list of its letters
            base.encode_prompts(prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is copied from a base or its U-Net, not a str"):
        from_base("tiny")  # type: ignore[arg-type]


def test_a_recipe_may_be_a_path_and_its_changes_are_a_list(tmp_path: Path) -> None:
    from controlkit import training

    assert dir(training) == ["Progress", "Result", "train_recipe"]
    with pytest.raises(ValueError, match=r"no recipe file .*nowhere.toml"):
        training.train_recipe(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match="a recipe is a name or a path, not a NoneType"):
        training.train_recipe(None)  # type: ignore[arg-type]
    for overrides in ("steps=2", {"steps": 2}, None, [2]):
        with pytest.raises(ValueError, match=r"^overrides is a list"):
            training.train_recipe("tiny-canny", overrides)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="progress is a function, not an int"):
        training.train_recipe("tiny-canny", [f"out={tmp_path / 'run'}"], progress=5)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_shown_in_a_few_lines() -> None:
    shown = repr(load_adapter("canny", base=load_base("tiny")))
    assert "name='canny'" in shown
    assert "Conv2d" not in shown

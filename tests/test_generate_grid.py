"""`controlkit generate --grid`: two settings of any kind on a labelled sheet."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from outcomes import Run
from safetensors.torch import load_file, save_file
from test_like import RECORD

from controlkit import grid_job, sampling
from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter
from controlkit.base import load_base
from controlkit.controlnet import from_base
from controlkit.generate_models import Models
from controlkit.grid_axes import Axis, parse_axes, split_words
from controlkit.images import load_picture, read_png_text
from controlkit.loras import Lora, with_loras
from controlkit.sheets import contact_sheet


@pytest.mark.parametrize(
    "quoted",
    [
        ["seed=0,1", "steps=1..2"],
        pytest.param(["seed=0,1", "--grid", "steps=1..2"], marks=pytest.mark.slow),
    ],
)
def test_the_second_setting_may_stand_behind_the_first(generate: Run, run: Run, quoted: list[str]) -> None:
    generate("-o", "one.png").done()
    for start in (generate, lambda *more: run("generate", "--like", "one.png", *more)):
        assert "wrote grid.png, 4 pictures" in start("--grid", *quoted, "-o", "grid.png").done()
    assert "unknown setting of a grid 'stps'" in generate("--grid", "seed=0,1", "stps=1..2").refused()
    assert "unexpected extra argument 'more'" in generate("--grid", "seed=0,1", "more").refused()


def test_a_grid_over_two_settings(generate: Run) -> None:
    outcome = generate("--grid", "canny.scale=0,1..0.5", "--grid", "seed=1..3", "-o", "grid.png")
    assert "wrote grid.png, 6 pictures" in outcome.done()
    told = json.loads(read_png_text("grid.png")["controlkit-grid"])
    assert [(one["seed"], one["controls"][0]["scale"]) for one in told] == [
        (seed, scale) for seed in (1, 2, 3) for scale in (0.0, [1.0, 0.5])
    ]
    assert load_picture("grid.png").shape[0] > 3 * 192
    assert not list(Path().glob("*.part*"))


def test_each_picture_may_be_kept(generate: Run, run: Run, photo: Path) -> None:
    told = generate("--grid", "seed=0,3", "scale=1,0.5", "--keep", "-o", "grid.png").done()
    assert told.endswith("and each by itself, from grid-1.png to grid-4.png; --like repeats one\n")
    generate("--seed", 3, "-o", "alone.png").done()
    assert Path("alone.png").read_bytes() == Path("grid-2.png").read_bytes()
    run("generate", "--like", "grid-3.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("grid-3.png").read_bytes()
    generate("--grid", "seed=5", "--keep", "-o", "single.png").done()
    assert Path("single-1.png").is_file()

    before = Path("grid-3.png").read_bytes()
    more = ("--like", "grid-3.png", "--grid", "seed=0,1", "scale=1,0.5", "--keep", "-o", "grid.png")
    assert "grid-3.png would overwrite what it is made from" in run("generate", *more).refused()
    assert Path("grid-3.png").read_bytes() == before
    preview = ("--grid", "seed=0,1", "--keep", "-o", "new.png", "--preview", "new-2.png")
    assert "the preview new-2.png would replace a file" in generate(*preview).refused()
    assert "--keep keeps the pictures of a grid" in generate("--keep").refused()


def test_axes_are_read() -> None:
    assert parse_axes(["scale=0.5,0.8,1.1", "seed=1..4"]) == [
        Axis("scale", (0.5, 0.8, 1.1)),
        Axis("seed", (1, 2, 3, 4)),
    ]
    assert parse_axes(["mode=balanced,prompt"]) == [Axis("mode", ("balanced", "prompt"))]
    assert parse_axes(["scheduler=ddim, euler"]) == [Axis("scheduler", ("ddim", "euler"))]
    assert parse_axes(["adapter=one, other"]) == [Axis("adapter", ("one", "other"))]
    assert Axis("scale", ()).label((1.0, 0.5)) == "scale=1..0.5"


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["scal=1,2"], "unknown setting of a grid 'scal' (did you mean 'scale'?)"),
        (["scale"], "must be KEY=VALUE,VALUE or KEY=FIRST..LAST"),
        (["seed=4..1"], "4..1 runs backwards"),
        (["seed=1..100", "scale=1,2,3,4,5"], "would make 500 pictures; 400 is the most"),
        (["scale=1", "scale=2"], "varies scale twice"),
        (["scale=1", "canny.scale=0,1"], "varies canny.scale twice: scale is that of every control"),
        (["canny.scale=0,1", "scale=1"], "varies canny.scale twice: scale is that of every control"),
        (["scale=1", "seed=1", "steps=2"], "varies one setting or two, not 3"),
        (["scale=1,12"], "scale must be a number from -10 to 10, not 12.0"),
        (["steps=0,2"], "steps must be a whole number from 1 to 1000, not 0"),
        (["mode=balanced,promt"], "unknown mode 'promt'"),
        (["depth.scale=1,2"], "unknown control 'depth'"),
        (["strength=0.5"], "there is no picture to start from"),
    ],
)
def test_grids_that_cannot_be_made(generate: Run, axes: list[str], message: str) -> None:
    told = [word for axis in axes for word in ("--grid", axis)]
    assert message in generate(*told, "-o", "grid.png").refused()
    assert not Path("grid.png").exists()


def test_the_prompt_of_a_grid_may_look_like_a_setting() -> None:
    grid = ["seed=1,2"]
    assert split_words(["style=anime cat"], grid) == ("style=anime cat", grid)
    assert split_words(["seed=of a tree, in 1..2 parts"], grid) == ("seed=of a tree, in 1..2 parts", grid)
    assert split_words(["style=anime"], grid) == ("style=anime", grid)
    assert split_words(["steps=1..2"], grid) == (None, [*grid, "steps=1..2"])
    assert split_words(["canny.scale=1"], grid) == (None, [*grid, "canny.scale=1"])
    assert split_words(["stps=1..2"], grid) == (None, [*grid, "stps=1..2"])
    assert split_words(["a cat", "stps=1"], grid) == ("a cat", [*grid, "stps=1"])
    assert split_words(["steps=1..2"], []) == ("steps=1..2", [])
    assert split_words(["prompt=a cat|a dog"], grid) == (None, [*grid, "prompt=a cat|a dog"])
    assert split_words(["prompt=a cat"], grid) == ("prompt=a cat", grid)


def told_on(sheet: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(read_png_text(sheet)["controlkit-grid"])
    return found


def lora(path: str) -> str:
    """A LoRA of one layer of the random SD1 base, which changes its pictures."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, 16, generator=draw), torch.randn(16, 2, generator=draw)
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    return path


def other_adapter(models: Path, folder: str) -> str:
    base = load_base(str(models / "sd1"))
    network = tiny_models.randomize_zero_convs(from_base(base, seed=2), seed=2)
    save_adapter(network, folder, info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    return folder


def test_labels_have_room_for_what_tells_pictures_apart() -> None:
    texts = ("a portrait of a woman", "a portrait of a woman, red hair", "a portrait of a man")
    assert [Axis("prompt", texts).label(text) for text in texts] == [
        "...woman",
        "...woman, red hair",
        "...man",
    ]
    assert Axis("negative_prompt", ("", "grey")).label("grey") == "negative: grey"
    short = Axis("prompt", ("a cat", "a dog"))
    assert short.label("a dog") == "a dog"


def check_sheet(run: Run, sheet: str, columns: int, pictures: list[tuple[str, list[object]]]) -> None:
    """Every picture of a sheet is the one that its settings alone make, under its label."""
    cells = []
    for k, (label, arguments) in enumerate(pictures):
        run(*arguments, "-o", f"alone-{k}.png").done()
        cells.append((load_picture(f"alone-{k}.png"), label.split(", ")))  # a line for each setting
        assert told_on(sheet)[k] == json.loads(read_png_text(f"alone-{k}.png")["controlkit"])
    rows = [cells[first : first + columns] for first in range(0, len(cells), columns)]
    assert np.array_equal(load_picture(sheet), contact_sheet(rows, title="a cube", cell=192))


@pytest.mark.slow
def test_models_as_axes(generate: Run, run: Run, models: Path, photo: Path) -> None:
    """What is loaded changes from picture to picture, and each is as it would be alone."""
    adapters = [str(models / "canny-sd1"), other_adapter(models, "other")]
    style = lora("style.safetensors")
    axes = ["--grid", "lora=0,0.5", "--grid", "adapter=" + ",".join(adapters)]
    assert "4 pictures" in generate("--lora", style, *axes, "-o", "grid.png").done()
    fixed = ["generate", "a cube", "--base", models / "sd1", "--control", f"canny={photo}", "--steps", 2]
    alone = [
        (
            f"lora={weight:g}, adapter={name}",
            [*fixed, "--adapter", f"canny={name}", "--lora", f"{style}:{weight}"],
        )
        for name in adapters
        for weight in (0, 0.5)
    ]
    check_sheet(run, "grid.png", 2, alone)
    made = [load_picture(f"alone-{k}.png") for k in range(4)]
    assert all((made[i] != made[j]).any() for i in range(4) for j in range(i))


def test_an_adapter_that_is_changes_to_its_base_follows_a_lora_on_it(run: Run, models: Path) -> None:
    """As each weight of the LoRA would have it alone; any other adapter is loaded once for all."""
    folder, style = models / "canny-sd1", Lora(lora("style.safetensors"), 1.0)
    run("convert", folder, "low.safetensors", "--to", "control-lora", "--base", models / "sd1").done()
    kept = Models()
    plain = kept.base(str(models / "sd1"), device="cpu", dtype=torch.float32)
    styled = with_loras(plain, [style])
    for name, is_new in ((str(folder), False), ("low.safetensors", True)):
        first, second = (kept.adapter(name, base, kind="canny") for base in (plain, styled))
        assert (second is not first) == is_new
        assert kept.adapter(name, styled, kind="canny") is second
        fresh = load_adapter(name, base=styled, kind="canny").controlnet.state_dict()
        ours = second.controlnet.state_dict()
        assert all(torch.equal(tensor, ours[key]) for key, tensor in fresh.items())


@pytest.mark.slow
def test_bases_sizes_and_stages_as_axes(run: Run, models: Path) -> None:
    bases = [models / "sd1", models / "sdxl"]
    fixed = ["generate", "a cube", "--steps", 1]
    axes = ["--grid", "base=" + ",".join(map(str, bases)), "--grid", "size=64x64,64x96"]
    run(*fixed, *axes, "-o", "grid.png").done()
    alone = [
        (f"base={base}, 64x{height}", [*fixed, "--base", base, "--width", 64, "--height", height])
        for height in (64, 96)
        for base in bases
    ]
    check_sheet(run, "grid.png", 2, alone)
    run(*fixed, "--base", bases[0], "--grid", "hires=1,1.5", "--hires-strength", 0.6, "-o", "two.png").done()
    assert [one["hires"] for one in told_on("two.png")] == [1.0, 1.5]
    sized = ["--base", bases[0], "--grid", "tile=64,128", "--grid", "height=72,80"]
    run(*fixed, *sized, "--width", 96, "-o", "tiles.png").done()
    assert [(one["tile"], one["height"]) for one in told_on("tiles.png")] == [
        (tile, height) for height in (72, 80) for tile in (64, 128)
    ]


@pytest.mark.slow
def test_a_base_of_a_grid_decides_anew_what_was_decided_by_another(run: Run, models: Path) -> None:
    bases = [models / "sd1", models / "sdxl"]
    own = ["--guidance", 2, "--width", 64, "--height", 80]
    run("generate", "a cube", "--steps", 1, "--base", bases[0], *own, "-o", "made.png").done()
    axis = "base=" + ",".join(map(str, bases))
    run("generate", "--like", "made.png", "--grid", axis, "-o", "grid.png").done()
    run("generate", "--like", "made.png", "--base", bases[1], "-o", "alone.png").done()
    assert told_on("grid.png") == [
        json.loads(read_png_text(name)["controlkit"]) for name in ("made.png", "alone.png")
    ]
    run("generate", "--like", "made.png", "--guidance", 3, "--grid", axis, "-o", "grid.png").done()
    assert [(one["guidance"], one["height"]) for one in told_on("grid.png")] == [(3.0, 80), (3.0, 64)]


@pytest.mark.slow
def test_precisions_as_an_axis(generate: Run, run: Run, models: Path, photo: Path) -> None:
    generate("--grid", "dtype=fp32,bf16", "-o", "grid.png").done()
    fixed = ["generate", "a cube", "--base", models / "sd1", "--control", f"canny={photo}", "--steps", 2]
    fixed += ["--adapter", f"canny={models / 'canny-sd1'}", "--dtype"]
    check_sheet(run, "grid.png", 2, [(f"dtype={name}", [*fixed, name]) for name in ("float32", "bfloat16")])


def test_texts_as_axes(run: Run, models: Path, photo: Path) -> None:
    fixed = ["generate", "--base", models / "sd1", "--steps", 1]
    axes = ["--grid", "prompt=a cube, red|a (blue:1.2) cube", "negative=|grey"]
    told = run(*fixed, *axes, "-o", "grid.png")
    assert "picture 1 of 4: a cube, red, negative: " in told.err
    assert "wrote grid.png, 4 pictures" in told.done()
    assert [(one["prompt"], one["negative_prompt"]) for one in told_on("grid.png")] == [
        (prompt, negative) for negative in (None, "grey") for prompt in ("a cube, red", "a (blue:1.2) cube")
    ]
    assert "note: '(blue:1.2)' is read as text" in told.err  # of the second prompt
    told = run(*fixed, *axes[:2], "seed=1,2", "-o", "grid.png")
    assert "picture 4 of 4: seed=2, a (blue:1.2) cube" in told.err  # the long text last: it may be cut off
    told = run("generate", "a cube", *fixed[1:], *axes, "-o", "grid.png")
    assert "--grid varies the prompt: leave out 'a cube'" in told.refused()


def test_only_what_was_made_is_on_the_sheet_of_a_grid_that_ends_early(
    generate: Run, models: Path, tmp_path: Path
) -> None:
    """The adapter of the second column is damaged, and the first column's pictures are kept; one that does
    not fit is refused before any is made.
    """
    damaged = tmp_path / "damaged"
    shutil.copytree(models / "canny-sd1", damaged)
    weights = load_file(damaged / "diffusion_pytorch_model.safetensors")
    save_file({key: tensor * torch.nan for key, tensor in weights.items()}, damaged / "model.safetensors")
    (damaged / "model.safetensors").replace(damaged / "diffusion_pytorch_model.safetensors")
    first = models / "canny-sd1"
    misfit = ["--grid", f"adapter={first},{models / 'canny-sdxl'}", "--grid", "seed=1,2"]
    assert "does not fit the base" in generate(*misfit, "-o", "grid.png").refused()
    assert not Path("grid.png").exists()
    axes = ["--grid", f"adapter={first},{damaged}", "--grid", "seed=1,2"]
    outcome = generate(*axes, "-o", "grid.png")
    assert outcome.code == 2
    assert "error: " in outcome.err.splitlines()[-1]
    assert [one["seed"] for one in told_on("grid.png")] == [1, 2]
    missing = load_picture("grid.png")[-192:, -192:-16]
    assert (missing == 255).all()


@pytest.mark.parametrize("keep", [[], ["--keep"]])
def test_who_interrupts_a_grid_is_told_what_is_finished(
    generate: Run, keep: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, whole = [], sampling.generate

    def interrupted(*given: Any, **how: Any) -> list[np.ndarray]:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(how["seeds"])
        return whole(*given, **how)

    monkeypatch.setattr(sampling, "generate", interrupted)
    outcome = generate("--grid", "seed=1..4", *keep, "-o", "grid.png")
    assert outcome.code
    names = "grid-1.png, grid-2.png" if keep else "2 of its pictures"
    assert f"finished before: {names}; grid.png shows them\ninterrupted" in outcome.err
    assert [one["seed"] for one in told_on("grid.png")] == [1, 2]
    assert Path("grid-2.png").exists() == bool(keep)
    assert load_picture("grid.png").shape[1] == 16 + 2 * (192 + 16)


def test_a_sheet_is_written_now_and_then_and_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = [0.0], []
    monkeypatch.setattr(grid_job.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(grid_job, "_write", lambda *_: written.append(clock[0]))
    sheet = grid_job._Sheet(tmp_path / "grid.png", [("",)] * 100, 10, "")
    picture = np.zeros((8, 8, 3), np.uint8)
    for k in range(100):
        clock[0] += 1
        sheet.add(k, picture, RECORD)
        sheet.write_now_and_then()
    sheet.write()
    sheet.write()
    assert written[:3] == [1, 2, 3]
    assert written[-1] == 100
    assert len(written) < 35
    assert max(b - a for a, b in itertools.pairwise(written)) <= 11


def test_a_sheet_keeps_pictures_as_small_as_it_shows_them(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    sizes = ((768, 640), (96, 96), (520, 1040))
    pictures = [draw.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    sheet = grid_job._Sheet(tmp_path / "grid.png", [("a",)] * 3, 2, "x")
    for k, picture in enumerate(pictures):
        sheet.add(k, picture, RECORD)
    sheet.write()
    assert all(max(kept.shape) <= 512 for kept in sheet._pictures if kept is not None)
    cells = [(picture, ("a",)) for picture in pictures]
    expected = contact_sheet([cells[:2], cells[2:]], title="x", cell=512)
    assert np.array_equal(load_picture(tmp_path / "grid.png"), expected)


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (
            "lora=0,1",
            "--grid varies lora, and there are 0 LoRAs: it is the weight of the one that --lora names",
        ),
        ("ip_adapter=0,1", "--grid varies ip_adapter, and there are 0"),
        ("prompt=a,b", "texts are parted by |, as prompt=a red cube|a blue cube"),
        ("prompt=a|", "one prompt is empty"),
        ("size=64", "size cannot be '64': it takes sizes in pixels, as 512x512,512x768"),
        ("size=60x64", "width must be a multiple of 8"),
        ("base=,b", "one base is empty"),
        ("adapter=canny,nowhere", "no adapter called 'nowhere'"),
        ("base=tiny,nobase", "no base called 'nobase'"),
        ("tile=1,64", "tile"),
        ("hires=0,1", "enlarged by a factor above 1"),
        ("canny.prompt=a|b", "unknown setting of a grid 'canny.prompt'"),
    ],
)
def test_what_cannot_be_an_axis(generate: Run, axis: str, message: str) -> None:
    assert message in generate("--grid", axis, "-o", "grid.png").refused()
    assert not Path("grid.png").exists()
    if axis.startswith("size"):
        assert "varies the size twice" in generate("--grid", "size=64x64,72x72", "width=64,72").refused()

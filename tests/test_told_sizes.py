"""Sizes that SDXL is told: the pipeline's arguments, the command's words, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from outcomes import Run
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents

from controlkit import Control, Sizes, Tiles, Told, generate
from controlkit.base import Base
from controlkit.images import load_picture, read_png_text
from controlkit.told_sizes import parse_sizes

SAID = Sizes((512, 768), (16, 32), (80, 72))
NEGATIVE = Sizes((48, 40), (4, 8), (64, 64))


def as_the_pipeline_takes(told: Told) -> dict[str, Any]:
    """Its arguments; those of the negative prompt count where both its sizes are given."""
    words: dict[str, Any] = {}
    for sizes, mark in ((told.sizes, ""), (told.negative_sizes, "negative_")):
        if sizes is not None:
            words[f"{mark}original_size"] = sizes.original
            words[f"{mark}crops_coords_top_left"] = sizes.corner
            words[f"{mark}target_size"] = sizes.target
    return words


@pytest.mark.parametrize(
    ("told", "guidance"),
    [(Told(sizes=SAID), 5.0), (Told(sizes=SAID, negative_sizes=NEGATIVE), 5.0), (Told(sizes=SAID), 1.0)],
)
def test_latents_equal_the_pipeline(load: Callable[[str], Base], told: Told, guidance: float) -> None:
    base = load("sdxl")
    controls = [Control(controlnet_of(base), cond(), scale=0.8)]
    request: dict[str, Any] = {"seed": 7, "steps": 3, "scheduler": "ddim", "guidance": guidance}
    branches = 1 if guidance <= 1 else 2
    ours = our_latents(base, controls, **request, sizes=told.of_branches(branches))
    assert_same(ours, their_latents(base, controls, **request, **as_the_pipeline_takes(told)))
    assert (ours - our_latents(base, controls, **request)).abs().max() > 1e-3, "it makes no difference"


def test_what_is_not_said_is_what_is_made(load: Callable[[str], Base]) -> None:
    base, request = load("sdxl"), {"steps": 2, "width": 64, "height": 80}
    (plain,) = generate(base, "x", **request)
    for told in (
        Told(sizes=Sizes()),
        Told(sizes=Sizes((80, 64), target=(80, 64))),
        Told(negative_sizes=Sizes()),
    ):
        (same,) = generate(base, "x", told=told, **request)
        assert np.array_equal(plain, same)
    (other,) = generate(base, "x", told=Told(negative_sizes=NEGATIVE), **request)
    assert not np.array_equal(plain, other)


def test_words() -> None:
    assert parse_sizes("", "size") == Sizes()
    assert parse_sizes("768x512", "size") == Sizes((512, 768))
    assert parse_sizes("768×512+32+16", "size") == Sizes((512, 768), (16, 32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *(
            (text, "is WIDTHxHEIGHT or WIDTHxHEIGHT+X+Y in pixels")
            for text in ("768", "768x", "768x512+1", "-1x5", "x")
        ),
        ("0x512", "original_size=0x512: original must be from 1 to 32768, not 512 and 0"),
        ("8x8+40000+0", "corner must be from 0 to 32768, not 0 and 40000"),
    ],
)
def test_words_that_are_no_sizes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_sizes(text, "original_size")


@pytest.mark.parametrize(
    "given", [{"original": (512,)}, {"original": 512}, {"corner": None}, {"target": (1.5, 2)}]
)
def test_numbers_that_are_no_sizes(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be two whole numbers"):
        Sizes(**given)


def test_who_is_told_no_sizes(sd1: Base, load: Callable[[str], Base]) -> None:
    with pytest.raises(ValueError, match="is told no sizes: only SDXL is"):
        generate(sd1, "x", told=Told(sizes=SAID), steps=1)
    with pytest.raises(ValueError, match="tiles are told the whole's size"):
        generate(load("sdxl"), "x", told=Told(sizes=SAID), tiles=Tiles(64), steps=1)
    with pytest.raises(ValueError, match=r"are Sizes\(...\), not tuple"):
        Told(sizes=(512, 512))  # type: ignore[arg-type]


def test_the_command_records_and_repeats(run: Run, models: Path) -> None:
    fixed = ["generate", "x", "--base", models / "sdxl", "--steps", 2]
    said = ["--original-size", "768x512+32+16", "--negative-original-size", "40x48"]
    run(*fixed, "-o", "plain.png").done()
    run(*fixed, *said, "-o", "said.png").done()
    recorded = json.loads(read_png_text("said.png")["controlkit"])
    assert (recorded["original_size"], recorded["negative_original_size"]) == (said[1], said[3])
    assert not np.array_equal(load_picture("said.png"), load_picture("plain.png"))
    run("generate", "--like", "said.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("said.png").read_bytes()
    taken = ["--original-size", "none", "--negative-original-size", "none"]
    run("generate", "--like", "said.png", *taken, "-o", "without.png").done()
    assert np.array_equal(load_picture("without.png"), load_picture("plain.png"))
    run(*fixed, "--grid", "original_size=64x64,none", "negative_original_size=none", "-o", "grid.png").done()
    told = json.loads(read_png_text("grid.png")["controlkit-grid"])
    assert [one["original_size"] for one in told] == ["64x64", ""]


def test_what_the_command_refuses(run: Run, models: Path) -> None:
    fixed = ["generate", "x", "--steps", 1, "--base"]
    told = run(*fixed, models / "sd1", "--original-size", "64x64").refused()
    assert "is told no sizes: only SDXL is, so leave out --original-size" in told
    told = run(*fixed, models / "sd1", "--negative-original-size", "64x64").refused()
    assert "is told no sizes: only SDXL is, so leave out --negative-original-size" in told
    assert "original_size is WIDTHxHEIGHT" in run(*fixed, models / "sdxl", "--original-size", "64").refused()
    for option in ("--original-size", "--negative-original-size"):
        told = run(*fixed, models / "sdxl", option, "64x64", "--tile", 64).refused()
        assert "tiles are told the whole's size" in told
        assert option in told
        assert "or take away an earlier picture's with none" in told

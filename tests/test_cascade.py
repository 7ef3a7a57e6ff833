"""Generations within a generation: the second stage leaves the first as it was, whatever is switched on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from PIL import Image
from sampling_peers import cond, controlnet_of
from test_ip_adapter import adapter, flat, photo, write_encoder

from controlkit import cascade
from controlkit.base import Base, load_base
from controlkit.cascade import refine
from controlkit.class_labels import Told
from controlkit.control import Control
from controlkit.execution import Execution
from controlkit.images import resize
from controlkit.ip_adapter import picture_prompt
from controlkit.sampling import Memory, Savings, Start, Tiles, generate


def two_stages(base: Base, seeds: list[int], **how: Any) -> list[np.ndarray]:
    """Pictures in two stages, the second made as soon as the first is there, as `generate --hires` does."""
    made: list[np.ndarray] = []
    start = how.pop("start", None)

    def finished(k: int, picture: np.ndarray) -> None:
        second = {key: value for key, value in how.items() if key not in ("width", "height")}
        made.append(refine(base, "x", picture, factor=1.5, seed=seeds[k], start=start, **second))

    generate(base, "x", seeds=seeds, finished=finished, start=start, **how)
    return made


@pytest.fixture(scope="module")
def prompts(sd1: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("prompts")
    save_file(flat(adapter(sd1, "plain")), folder / "a.safetensors")
    write_encoder(folder / "image_encoder")
    return [picture_prompt(sd1, str(folder / "a.safetensors"), [photo(1)])]


HOW: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "a picture prompt": lambda prompts: {"picture_prompts": prompts},
    "tiles": lambda _: {"tiles": Tiles(64)},
    "tiled vae": lambda _: {"memory": Memory(1, sliced_vae=True, tiled_vae=True)},
    "offload": lambda _: {"memory": Memory(1, offload=True, one_branch=True)},
    "merged tokens": lambda _: {"savings": Savings(merge_tokens=0.5)},
    "kept features": lambda _: {"savings": Savings(features_every=2, control_every=2)},
    "a hole": lambda _: {"start": Start(photo(2, 64, 64), 1.0, hole())},
    "graphs": lambda _: {"execution": Execution(cuda_graph=True)},
}


def hole() -> np.ndarray:
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:40] = 255
    return mask


OFTEN = ("offload", "a hole")  # the others are slow tests


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in HOW]
)
def test_the_second_picture_is_as_it_is_alone(sd1: Base, prompts: list[Any], name: str) -> None:
    request: dict[str, Any] = {"steps": 4, **HOW[name](prompts)}
    both = two_stages(sd1, [3, 4], **request)
    (alone,) = two_stages(sd1, [4], **request)
    assert np.array_equal(both[1], alone)
    assert not np.array_equal(both[0], both[1])


def test_a_base_that_is_told_a_picture_in_two_stages(tmp_path: Path) -> None:
    base = load_base(str(tiny_models.build_unclip(tmp_path / "unclip")))
    request: dict[str, Any] = {"steps": 3, "told": Told(photo(1), noise_level=50)}
    assert np.array_equal(two_stages(base, [3, 4], **request)[1], two_stages(base, [4], **request)[0])


def test_a_generation_without_pictures_within_one_with_them(sd1: Base, prompts: list[Any]) -> None:
    request: dict[str, Any] = {"seeds": [0, 1], "steps": 3, "picture_prompts": prompts}
    expected = generate(sd1, "x", **request)
    found = generate(sd1, "x", **request, finished=lambda k, picture: generate(sd1, "y", steps=2) and None)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("channels", [4, 9])
def test_outside_of_a_hole_both_stages_keep_the_picture(sd1: Base, channels: int) -> None:
    base = tiny_models.nine_channels(sd1) if channels == 9 else sd1
    start = Start(photo(2, 96, 96), 1.0, np.kron(hole(), np.ones((3, 3), np.uint8))[::2, ::2])
    (second,) = two_stages(base, [3], start=start, steps=3, width=64, height=64)
    fitted = start.fitted(96, 96)
    assert np.array_equal(second[~fitted.hole()], fitted.picture[~fitted.hole()])
    assert not np.array_equal(second[fitted.hole()], fitted.picture[fitted.hole()])


def test_the_second_stage_is_told_what_the_first_was(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(cascade, "generate", lambda base, prompt, **given: told.update(given) or ["made"])
    first = photo(1, 64, 96)
    for paste in (True, False):
        start = Start(photo(2, 64, 96), 0.8, np.pad(hole(), ((0, 0), (0, 32))), paste)
        assert refine(sd1, "x", first, factor=1.5, seed=7, start=start, steps=3) == "made"
        refined, whole = told["start"], start.fitted(144, 96)
        assert (told["seeds"], told["width"], told["height"], told["steps"]) == ([7], 144, 96, 3)
        assert (refined.strength, refined.paste) == (0.5, paste)
        assert np.array_equal(refined.mask, whole.mask)
        around = whole.picture if paste else resize(first, 144, 96)
        assert np.array_equal(refined.picture[~whole.hole()], around[~whole.hole()])
    assert refine(sd1, "x", Image.fromarray(first), factor=1.5) == "made"
    assert np.array_equal(told["start"].picture, resize(first, 144, 96))


def test_what_was_switched_on_before_stays_on(sd1: Base) -> None:
    sd1.vae.enable_tiling()
    sd1.vae.enable_slicing()
    try:
        generate(sd1, "x", steps=1, tiles=Tiles(64), memory=Memory(1, sliced_vae=True, tiled_vae=True))
        assert sd1.vae.use_tiling
        assert sd1.vae.use_slicing
    finally:
        sd1.vae.disable_tiling()
        sd1.vae.disable_slicing()


def test_a_control_on_a_base_that_fills_holes(sd1: Base) -> None:
    base, start = tiny_models.nine_channels(sd1), Start(photo(2, 64, 64), 1.0, hole())
    request: dict[str, Any] = {"steps": 2, "start": start}
    controlled = generate(base, "x", controls=[Control(controlnet_of(sd1), cond())], **request)[0]
    assert not np.array_equal(controlled, generate(base, "x", **request)[0])

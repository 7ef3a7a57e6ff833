"""Large pictures in tiles, and pictures in two stages."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sampling_peers import SIZE, controlnet_of
from tiny_models import nine_channels

from controlkit import sampling
from controlkit.adapters import load_adapter
from controlkit.applying import EncodedControl, Rows, encode_controls
from controlkit.base import Base, load_base
from controlkit.cascade import larger_size, refine
from controlkit.control import Control
from controlkit.figures import render
from controlkit.images import cover, resize
from controlkit.memory import Memory
from controlkit.predicting import Predictor
from controlkit.preprocessors import get
from controlkit.reuse import cross_attentions
from controlkit.sampling import Guidance, Savings
from controlkit.starting import Start
from controlkit.tiling import TiledPredictor, Tiles, tiled_vae, window_weights, windows


def test_tiles_cover_everything_and_overlap() -> None:
    for height, width, size, overlap in [(64, 64, 64, 0.25), (96, 200, 64, 0.25), (65, 130, 64, 0.5)]:
        found = windows(height, width, size=size, overlap=overlap)
        covered = torch.zeros(height, width)
        for window in found:
            window.of(covered).add_(1)
        assert bool((covered >= 1).all())
        assert all((w.height, w.width) == (min(size, height), min(size, width)) for w in found)
        lefts = sorted({w.left for w in found})
        steps = [after - before for before, after in itertools.pairwise(lefts)]
        assert all(step <= size * (1 - overlap) + 0.5 for step in steps)
    assert windows(40, 30, size=64, overlap=0.25) == [(0, 0, 40, 30)]
    weights = window_weights(16, 8)
    assert bool((weights > 0).all())
    assert weights.argmax() in (7 * 8 + 3, 7 * 8 + 4, 8 * 8 + 3, 8 * 8 + 4)
    assert torch.allclose(weights, weights.flip(0, 1), atol=1e-6)  # no corner counts more than another
    assert [w.left for w in windows(64, 160, size=64, overlap=0.25)] == [
        0,
        48,
        96,
    ]  # and no tile more than needed


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_one_tile_is_the_whole_picture(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    controls = [Control(controlnet_of(base), torch.rand(1, 3, SIZE, SIZE))]
    given: dict[str, Any] = {"controls": controls, "steps": 2, "seeds": (3,)}
    (plain,) = sampling.generate(base, "x", **given)
    (tiled,) = sampling.generate(base, "x", tiles=Tiles(SIZE), **given)
    assert np.abs(plain.astype(int) - tiled).max() <= 1


def test_the_hint_of_a_map_in_bands_is_the_hint(sd1: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    from controlkit import applying

    monkeypatch.setattr(applying, "BAND", 64)
    control = Control(controlnet_of(sd1), torch.rand(1, 3, 200, 72))
    with torch.no_grad():
        whole, bands = (
            encode_controls([control], width=72, height=200, pictures=1, in_bands=in_bands)[0].hint
            for in_bands in (False, True)
        )
    assert torch.allclose(whole[0], bands[0], atol=1e-5)
    assert whole[0].std() > 1e-3


@pytest.fixture(scope="module")
def large() -> tuple[np.ndarray, str]:
    """A picture of the bundled world at twice its size, and its caption."""
    scene = render(5)
    return resize(scene.picture, 256, 256), scene.caption


def steps_across(picture: np.ndarray, edges: list[int]) -> tuple[float, float]:
    """The mean step between neighbouring columns: at tile edges, and everywhere else."""
    steps = np.abs(np.diff(picture.astype(float), axis=1)).mean(axis=(0, 2))
    at = np.zeros(len(steps), bool)
    for edge in edges:
        at[edge - 1] = True
    return float(steps[at].mean()), float(steps[~at].mean())


def test_no_seam_shows_between_tiles(large: tuple[np.ndarray, str]) -> None:
    base, (picture, caption) = load_base("tiny"), large
    edges = get("canny")(picture).image
    control = Control(load_adapter("canny", base=base), edges)
    given: dict[str, Any] = {
        "controls": [control],
        "start": Start(picture, 0.6),
        "steps": 10,
        "width": 256,
        "height": 256,
    }
    (refined,) = sampling.generate(base, caption, tiles=Tiles(128), **given)
    found = windows(32, 32, size=16, overlap=0.25)
    borders = sorted({8 * w.left for w in found if w.left} | {8 * (w.left + 16) for w in found} - {256})
    at, elsewhere = steps_across(refined, borders)
    assert at < 1.5 * elsewhere
    from controlkit.metrics import edge_f1

    assert edge_f1(get("canny")(refined).image, edges).f1 > 0.5


def test_what_the_networks_see_is_bounded(sd1: Base) -> None:
    seen: list[tuple[int, ...]] = []
    hook = sd1.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    start = Start(np.zeros((128, 192, 3), np.uint8), 0.5)
    (picture,) = sampling.generate(sd1, "x", start=start, steps=4, tiles=Tiles(64))
    hook.remove()
    assert picture.shape == (128, 192, 3)
    assert set(seen) == {(1, 4, 8, 8)}


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "savings"),
    [("sdxl", Savings()), ("sd1", Savings(control_every=2)), ("sd1", Savings(features_every=2))],
)
def test_each_tile_is_predicted_as_a_picture_alone(
    load: Callable[[str], Base], family: str, savings: Savings
) -> None:
    """Under its part of the hint, the mask and what a hole is shown, with features of its own."""
    base, draw = nine_channels(load(family)), torch.Generator().manual_seed(1)
    control = Control(controlnet_of(load(family)), torch.rand(1, 3, 64, 96, generator=draw))
    width = base.unet.config.block_out_channels[0]
    hint, shown = torch.randn(1, width, 8, 12, generator=draw), torch.randn(1, 5, 8, 12, generator=draw)
    mask = torch.rand(1, 1, 64, 96, generator=draw)
    at_latents = torch.nn.functional.interpolate(mask, size=(8, 12), mode="bilinear")
    text = base.encode_prompts(["", "a red cube"])

    def predictor(cut: Callable[[torch.Tensor], torch.Tensor], region: torch.Tensor, left: int) -> Predictor:
        added = base.added_cond(text.pooled, height=64, width=96)
        if added is not None and left >= 0:
            added["time_ids"] = torch.tensor([[64.0, 96.0, 0.0, 8.0 * left, 64.0, 64.0]] * 2)
        encoded = EncodedControl(control, (cut(hint),), control.weights(), cut(region))
        rows = Rows(text.encoder_hidden_states, added, 1)
        return Predictor(base, rows, [encoded], Guidance(5.0), 4, savings, cut(shown))

    # The mask of the whole is brought to the latents' size, and of that each tile has its part.
    tiled = TiledPredictor(predictor(lambda x: x, mask, -1), Tiles(64), height=8, width=12)
    assert [(w.left, w.width) for w in tiled.windows] == [(0, 8), (4, 8)]
    tiles = [predictor(lambda x, left=left: x[..., left : left + 8], at_latents, left) for left in (0, 4)]
    weights = torch.sin(torch.pi * (torch.arange(8) + 0.5) / 8).square()
    weights = weights[:, None] * weights + 1e-4
    for step in range(2):
        latents, t = torch.randn(1, 4, 8, 12, generator=draw), torch.tensor(700 - 100 * step)
        wanted, total = torch.zeros(1, 4, 8, 12), torch.zeros(8, 12)
        for left, tile in zip((0, 4), tiles, strict=True):
            wanted[..., left : left + 8] += tile(latents[..., left : left + 8], t, step) * weights
            total[:, left : left + 8] += weights
        torch.testing.assert_close(tiled(latents, t, step), wanted / total, atol=1e-5, rtol=1e-4)


def test_an_autoencoder_that_worked_in_tiles_before_goes_on_so(load: Callable[[str], Base]) -> None:
    vae = load("sd1").vae
    for before in (False, True):
        vae.use_tiling = before
        with tiled_vae(load("sd1"), True):
            assert vae.use_tiling
        assert vae.use_tiling is before
    vae.use_tiling = False


@pytest.mark.slow
def test_tiles_share_the_texts_keys(load: Callable[[str], Base]) -> None:
    base, computed = load("sdxl"), []
    attention = next(iter(cross_attentions(base.unet)))
    hook = attention.to_k.register_forward_hook(lambda *_: computed.append(1))
    request: dict[str, Any] = {"width": 192, "height": 128, "steps": 4, "tiles": Tiles(64)}
    sampling.generate(base, "x", memory=Memory(1, one_branch=True), **request)
    hook.remove()
    assert len(computed) == 2  # the prompt and its negative, whatever the tile and the step


@pytest.mark.slow
def test_two_stages_keep_the_composition_and_follow_the_map() -> None:
    base, scene = load_base("tiny"), render(5)
    adapter = load_adapter("canny", base=base)
    small, large_map = (get("canny")(resize(scene.picture, side, side)).image for side in (128, 192))
    (first,) = sampling.generate(base, scene.caption, controls=[Control(adapter, small)], steps=10)
    second = refine(
        base, scene.caption, first, factor=1.5, strength=0.4, controls=[Control(adapter, large_map)], steps=10
    )
    assert second.shape == (192, 192, 3)
    again = cover(second, 128, 128).astype(float)
    other = sampling.generate(base, scene.caption, controls=[Control(adapter, small)], steps=10, seeds=(9,))[
        0
    ]
    assert np.abs(again - first).mean() < np.abs(other.astype(float) - first).mean() * 1.5
    from controlkit.metrics import edge_f1

    assert edge_f1(get("canny")(second).image, large_map).f1 > 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tiles(100), "a tile's side must be a multiple of 64 from 64 to 4096 pixels, not 100"),
        (lambda: Tiles(128, overlap=0.9), "tiles overlap by a share from 0.1 to 0.75, not 0.9"),
        (lambda: Tiles(128, overlap="half"), "tiles overlap by a share from 0.1 to 0.75, not 'half'"),
        (lambda: larger_size(512, 512, 1.0), "a factor above 1 and up to 8, not 1.0"),
        (
            lambda: larger_size(4096, 512, 4.0),
            "a width of 4096, 4 times as large, is 16384; 8192 is the most",
        ),
    ],
)
def test_numbers_outside_their_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

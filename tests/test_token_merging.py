"""Merged tokens: the matching against plain loops, and what generations with it are."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import Run
from sampling_peers import cond, controlnet_of, our_latents
from test_kinds import MAKE
from torch import Tensor

from controlkit import sampling
from controlkit.base import Base
from controlkit.control import Control
from controlkit.images import load_picture, read_png_text
from controlkit.memory import Memory
from controlkit.memory_plan import Estimate, Request
from controlkit.sampling import Savings, Tiles
from controlkit.token_merging import Pattern, TokenMerging, match, outermost_transformers, pattern

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GRIDS = [(8, 8), (7, 5), (1, 9), (6, 3)]


def tokens(height: int, width: int, *, rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn((rows, height * width, 12), generator=torch.Generator().manual_seed(seed))


# --- the matching ---


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_every_cell_has_one_destination(height: int, width: int) -> None:
    found = pattern(height, width)
    everything = torch.cat([found.sources, found.destinations])
    assert everything.sort().values.tolist() == list(range(height * width))
    cells = [(int(d) // width // 2, int(d) % width // 2) for d in found.destinations]
    assert sorted(cells) == [(i, j) for i in range((height + 1) // 2) for j in range((width + 1) // 2)]


def test_destinations_are_drawn_apart_from_everything_else() -> None:
    before = torch.get_rng_state()
    one, other = pattern(32, 32), pattern(32, 32)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.destinations, other.destinations)
    places = {(int(d) // 32 % 2, int(d) % 2) for d in one.destinations}
    assert len(places) == 4, "no corner of the cells is left out"


def in_loops(x: Tensor, found: Pattern, share: float) -> tuple[list[list[int]], Tensor, Tensor]:
    """For one row of tokens (N, C): which become one, what the attention is given for each token, and the
    tokens that it sees, in any order; written as the paper has it."""
    sources, destinations = found.sources.tolist(), found.destinations.tolist()
    best: dict[int, tuple[float, int]] = {}
    for a in sources:
        likeness = [float(torch.cosine_similarity(x[a], x[b], dim=0)) for b in destinations]
        best[a] = max(likeness), destinations[int(np.argmax(likeness))]
    ranked = sorted(sources, key=lambda a: -best[a][0])
    merged = ranked[: min(int(len(x) * share), len(sources))]
    groups = [[b, *(a for a in merged if best[a][1] == b)] for b in destinations]
    groups += [[a] for a in sources if a not in merged]
    seen = torch.stack([x[group].mean(dim=0) for group in groups])
    given = torch.empty_like(x)
    for group, value in zip(groups, seen, strict=True):
        given[group] = value
    return groups, given, seen


@pytest.mark.parametrize(("height", "width"), GRIDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75])
def test_matching_equals_plain_loops(height: int, width: int, share: float) -> None:
    x, found = tokens(height, width), pattern(height, width)
    merge = match(x, found, share)
    merged = merge.merge(x)
    again = merge.unmerge(merged)
    for row in range(len(x)):
        groups, given, seen = in_loops(x[row], found, share)
        assert merged.shape[1] == len(groups)
        assert torch.allclose(again[row], given, atol=1e-6)
        ours, theirs = (t[t[:, 0].argsort()] for t in (merged[row], seen))
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_large_pictures_are_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from controlkit import token_merging

    x, found = tokens(16, 16), pattern(16, 16)
    whole = match(x, found, 0.5)
    monkeypatch.setattr(token_merging, "_SIMILARITIES", 5 * len(found.destinations))
    parts = match(x, found, 0.5)
    assert torch.equal(parts.slots, whole.slots)
    assert torch.equal(parts.merge(x), whole.merge(x))


@pytest.mark.parametrize(("height", "width"), GRIDS)
def test_tokens_that_are_equal_in_groups_come_back(height: int, width: int) -> None:
    """A picture of 2x2 cells of one colour each: all that can be merged is, and nothing is lost."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    cells = tokens(rows, columns).view(3, rows, columns, 12)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, :height, :width].reshape(3, -1, 12)
    merge = match(x, pattern(height, width), 0.75)
    merged = merge.merge(x)
    if height % 2 == width % 2 == 0:
        assert merged.shape[1] == rows * columns
    assert torch.allclose(merge.unmerge(merged), x, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_many_tokens_become_one_in_every_precision(dtype: torch.dtype) -> None:
    """Equal tokens are all merged into the same destination, a thousand and more."""
    x = torch.linspace(-3, 3, 12).to(dtype).expand(2, 48 * 48, 12)
    merge = match(x, pattern(48, 48), 0.75)
    merged = merge.merge(x)
    assert len(merge.into.unique()) == 1
    assert merged.dtype == dtype
    assert torch.allclose(merge.unmerge(merged).float(), x.float(), rtol=0.01)


def test_rows_do_not_see_each_other() -> None:
    x, found = tokens(8, 8, rows=4), pattern(8, 8)
    together = match(x, found, 0.5)
    for row in range(4):
        alone = match(x[row : row + 1], found, 0.5)
        assert torch.equal(alone.slots[0], together.slots[row])


# --- in the networks ---


def test_where_tokens_are_merged(load: Callable[[str], Base]) -> None:
    sd1, sdxl = load("sd1").unet, load("sdxl").unet
    assert outermost_transformers(sd1) == [*sd1.down_blocks[0].attentions, *sd1.up_blocks[-1].attentions]
    assert outermost_transformers(sdxl) == [*sdxl.down_blocks[1].attentions, *sdxl.up_blocks[-2].attentions]
    controlnet = controlnet_of(load("sdxl"))
    assert outermost_transformers(controlnet) == list(controlnet.down_blocks[1].attentions)


def test_networks_are_left_as_they_were(sd1: Base) -> None:
    before = dict(sd1.unet.attn_processors)
    with TokenMerging(0.5).within(sd1.unet):
        changed = [name for name, now in sd1.unet.attn_processors.items() if now is not before[name]]
        assert len(changed) == 5
        assert all(".attn1." in name for name in changed)
    assert sd1.unet.attn_processors == before
    assert not any(t.norm._forward_pre_hooks for t in outermost_transformers(sd1.unet))


def told(base: Base, **more: Any) -> Tensor:
    controls = [Control(controlnet_of(base), cond(), scale=0.8)]
    return our_latents(base, controls, seed=7, steps=4, scheduler="ddim", **more)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_no_share_changes_no_bit(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    plain = told(base)
    assert torch.equal(told(base, savings=Savings(merge_tokens=0.0)), plain)
    merged = told(base, savings=Savings(merge_tokens=0.5))
    assert torch.equal(told(base, savings=Savings(merge_tokens=0.5)), merged)
    assert 0 < (merged - plain).abs().max() < 0.5 * plain.abs().max()


@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("savings", [{}, {"features_every": 2}, {"guidance_until": 0.5, "control_every": 2}])
def test_both_branches_at_once_and_one_by_one_are_the_same(
    load: Callable[[str], Base], family: str, savings: dict[str, Any]
) -> None:
    """At once, what comes before the text has a row for each picture, and two for each behind it."""
    chosen = Savings(merge_tokens=0.6, **savings)
    together = told(load(family), savings=chosen)
    apart = told(load(family), savings=chosen, one_branch_at_a_time=True)
    assert torch.allclose(together, apart, atol=1e-4)


def test_picture_k_of_several_is_picture_k_alone(sd1: Base) -> None:
    request: dict[str, Any] = {
        "controls": [Control(controlnet_of(sd1), cond())],
        "steps": 2,
        "savings": Savings(merge_tokens=0.5),
    }
    several = sampling.generate(sd1, "a cube", seeds=(3, 4), **request)
    torch.manual_seed(99)  # nobody asks the global generator
    for seed, picture in zip((3, 4), several, strict=True):
        (alone,) = sampling.generate(sd1, "a cube", seeds=(seed,), **request)
        assert np.array_equal(alone, picture)
    together = sampling.generate(sd1, "a cube", seeds=(3, 4), batch_size=2, **request)
    assert np.abs(np.stack(together).astype(int) - np.stack(several)).max() <= 1


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_odd_latents_and_tiles(load: Callable[[str], Base], family: str) -> None:
    request: dict[str, Any] = {"steps": 2, "savings": Savings(merge_tokens=0.75)}
    (odd,) = sampling.generate(load(family), "a cube", width=72, height=56, **request)
    assert odd.shape == (56, 72, 3)
    tiles = Tiles(64)
    (large,) = sampling.generate(load(family), "a cube", width=120, height=72, tiles=tiles, **request)
    assert large.shape == (72, 120, 3)


@pytest.mark.slow
def test_memory_is_reckoned_with_it(sd1: Base) -> None:
    """The table of likenesses comes on top, and fewer tokens attend."""
    needed = {}
    for share in (0.0, 0.5):
        request = Request(512, 512, merge_tokens=share)
        estimate = Estimate(replace(sd1, device=torch.device("cuda")), [], request)
        needed[share] = estimate.phases(Memory(1))["denoising"]
    table = 3072 * 1024 * 4
    assert needed[0.0] < needed[0.5] < needed[0.0] + 2 * 2 * table


# --- beside networks of other kinds ---


def of_kind(load: Callable[[str], Base], kind: str) -> tuple[Base, Control]:
    """A base, and a control of a kind that fits it."""
    base = load("sdxl" if kind in ("controlnet-xs", "lllite") else "sd1")
    return base, Control(MAKE[kind](base), cond(), kind="canny")


@pytest.mark.parametrize(
    ("kind", "merging"), [("lite", 0), ("t2i-adapter", 0), ("controlnet-xs", 2), ("controlnet-union", 2)]
)
def test_tokens_are_merged_where_a_network_has_them(
    load: Callable[[str], Base], kind: str, merging: int
) -> None:
    """In the U-Net alone beside a network without such attentions; the control goes on acting."""
    base, control = of_kind(load, kind)
    assert len(outermost_transformers(control.controlnet)) == merging
    request: dict[str, Any] = {"seed": 7, "steps": 2, "scheduler": "ddim"}
    savings = Savings(merge_tokens=0.5)
    plain = our_latents(base, [control], **request)
    merged = our_latents(base, [control], savings=savings, **request)
    assert 0 < (merged - plain).abs().max() < 0.1 * plain.abs().max()
    assert (merged - our_latents(base, [], savings=savings, **request)).abs().max() > 0.1
    apart = our_latents(base, [control], savings=savings, one_branch_at_a_time=True, **request)
    assert torch.allclose(merged, apart, atol=1e-4)
    assert torch.equal(our_latents(base, [control], **request), plain), "the networks are as they were"


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKE)
def test_memory_beside_every_kind(load: Callable[[str], Base], kind: str) -> None:
    base, control = of_kind(load, kind)
    request = Request(512, 512, merge_tokens=0.5)
    if kind == "lllite":
        with pytest.raises(ValueError, match="merge_tokens does not go with a ControlNet-LLLite"):
            Estimate(base, [control], request)
        return
    assert Estimate(base, [control], request).phases(Memory(1))["denoising"] > 0


# --- the command ---


@pytest.mark.slow
def test_the_command_records_and_repeats_it(generate: Run, run: Run) -> None:
    generate("-o", "plain.png").done()
    generate("--merge-tokens", 0.5, "-o", "out.png").done()
    text = read_png_text("out.png")
    assert json.loads(text["controlkit"])["merge_tokens"] == 0.5
    assert "Token merging ratio: 0.5" in text["parameters"]
    assert not np.array_equal(load_picture("out.png"), load_picture("plain.png"))
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    run("generate", "--like", "out.png", "--merge-tokens", 0, "-o", "off.png").done()
    assert Path("off.png").read_bytes() == Path("plain.png").read_bytes()
    generate("--grid", "merge_tokens=0,0.5", "-o", "grid.png").done()
    shares = [one["merge_tokens"] for one in json.loads(read_png_text("grid.png")["controlkit-grid"])]
    assert shares == [0.0, 0.5]


@pytest.mark.parametrize("share", [0.8, -0.1, "nan"])
def test_shares_out_of_range(generate: Run, share: object) -> None:
    refused = generate("--merge-tokens", share).refused()
    assert refused.startswith("merge_tokens must be a number from 0 to 0.75, not ")

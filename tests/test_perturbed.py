"""Perturbed-attention guidance against diffusers' own pipelines, on random weights of the real classes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents
from test_kinds import MAKE

from controlkit import sampling
from controlkit.applying import Rows, encode_controls
from controlkit.base import Base
from controlkit.control import Control
from controlkit.memory import Memory
from controlkit.predicting import Guidance, Predictor, Savings

SIZE = 192  # the middle block sees 3x3 places: of a single one attention has nothing to choose
assert_close = partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)  # rounding, of sums up to 10


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_latents_equal_the_pipeline(load: Callable[[str], Base], family: str, guidance: float) -> None:
    base = load(family)
    controls = [Control(controlnet_of(base), cond(size=SIZE), scale=0.8, end=0.75)]
    request: dict[str, Any] = {"seed": 7, "steps": 4, "size": SIZE, "scheduler": "ddim", "guidance": guidance}
    ours = our_latents(base, controls, pag=3.0, **request)
    assert_same(ours, their_latents(base, controls, pag=3.0, **request))
    assert (ours - our_latents(base, controls, **request)).abs().max() > 1e-3


def test_several_controls_equal_the_pipeline(sd1: Base) -> None:
    controls = [
        Control(controlnet_of(sd1, seed=k), cond(k, size=SIZE), scale=0.5, start=0.5 * k) for k in range(2)
    ]
    request: dict[str, Any] = {"seed": 1, "steps": 4, "size": SIZE, "scheduler": "pndm", "pag": 2.0}
    assert_same(our_latents(sd1, controls, **request), their_latents(sd1, controls, **request))


def predictions(base: Base, controls: list[Control], pictures: int = 1, **changes: Any) -> torch.Tensor:
    """One guided prediction of pictures, of one text each branch."""
    generator = torch.Generator().manual_seed(3)
    noisy_latents = torch.randn((pictures, 4, SIZE // 8, SIZE // 8), generator=generator)
    with torch.no_grad():
        text = sampling.encode_text(base, "a cube", None, guidance=5.0).encoder_hidden_states
        encoded = encode_controls(controls, width=SIZE, height=SIZE, pictures=pictures)
        rows = Rows(text.repeat_interleave(pictures, dim=0), None, pictures)
        guidance = changes.pop("guidance", Guidance(5.0, perturbed=3.0))
        return Predictor(base, rows, encoded, guidance, 4, **changes)(noisy_latents, torch.tensor(500), 2)


@pytest.mark.parametrize("settings", [{}, {"mode": "guess"}, {"mode": "control"}, {"only_mid": True}])
def test_branch_by_branch_is_the_same(sd1: Base, settings: dict[str, Any]) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    for more in (settings, {**settings, "mask": mask}):
        controls = [Control(controlnet_of(sd1), cond(size=SIZE), **more)]
        together = predictions(sd1, controls)
        assert_close(predictions(sd1, controls, one_branch_at_a_time=True), together)


@pytest.mark.parametrize("kind", ["t2i-adapter", "lite", "controlnet-union"])
def test_other_kinds_act_on_both_predictions(sd1: Base, kind: str) -> None:
    controls = [Control(MAKE[kind](sd1), cond(size=SIZE), kind="canny")]
    together = predictions(sd1, controls, pictures=2)
    alone = predictions(sd1, controls, pictures=2, one_branch_at_a_time=True)
    assert_close(alone, together)
    assert (together - predictions(sd1, [], pictures=2)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["controlnet-xs", "lllite"])
def test_kinds_that_act_within_layers_are_refused(load: Callable[[str], Base], kind: str) -> None:
    base = load("sdxl" if kind == "lllite" else "sd1")
    with pytest.raises(ValueError, match=r"pag does not go with a .*, which acts within the U-Net's layers"):
        sampling.generate(base, "a cube", controls=[Control(MAKE[kind](base), cond())], pag=1.0, steps=1)


def test_pictures_of_a_batch_keep_to_themselves(sd1: Base) -> None:
    controls = [Control(controlnet_of(sd1), cond(batch=2, size=SIZE))]
    two = predictions(sd1, controls, pictures=2)
    alone = predictions(sd1, [Control(controls[0].controlnet, cond(batch=2, size=SIZE)[:1])])
    assert_close(two[:1], alone)


def test_it_is_the_way_away_from_a_prediction_without_self_attention(sd1: Base) -> None:
    """By its definition, with the middle block's attention replaced by hand."""
    plain = predictions(sd1, [], guidance=Guidance(0.0, perturbed=0.0))  # of the negative prompt alone
    own = Guidance(1e-6, perturbed=1.0)  # eps_u + eps_c - eps_p, but for rounding
    found = predictions(sd1, [], guidance=own)
    cond_alone = predictions(sd1, [], guidance=Guidance(1.0))
    attentions = [m for n, m in sd1.unet.mid_block.named_modules() if n.endswith("attn1")]
    before = [attention.processor for attention in attentions]
    assert attentions
    try:
        for attention in attentions:
            attention.processor = lambda attn, x, *_, **__: attn.to_out[0](attn.to_v(x))
        perturbed = predictions(sd1, [], guidance=Guidance(1.0))
    finally:
        for attention, processor in zip(attentions, before, strict=True):
            attention.processor = processor
    assert_close(found, plain + cond_alone - perturbed)


def test_attentions_are_as_before_behind_it_and_unguided_steps_are_plain(sd1: Base) -> None:
    attentions = [m for n, m in sd1.unet.named_modules() if n.endswith("attn1")]
    before = [attention.processor for attention in attentions]
    request: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}
    made = {
        (pag, until): sampling.generate(
            sd1, "a cube", pag=pag, savings=Savings(guidance_until=until), **request
        )[0]
        for pag in (0.0, 3.0)
        for until in (1.0, 0.0)
    }
    assert [attention.processor for attention in attentions] == before
    assert np.array_equal(made[0.0, 0.0], made[3.0, 0.0])
    assert not np.array_equal(made[0.0, 1.0], made[3.0, 1.0])


def test_it_goes_with_tiles_merged_tokens_and_little_memory(sd1: Base) -> None:
    def latents(**change: Any) -> torch.Tensor:
        found: list[torch.Tensor] = []
        request: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE, "pag": 3.0}
        sampling.generate(sd1, "a cube", callback=lambda *step: found.append(step[-1]), **request, **change)
        return found[-1]

    plain = latents()
    assert_close(latents(memory=Memory(1, one_branch=True)), plain)
    assert_close(latents(tiles=sampling.Tiles(256)), plain)
    assert (latents(savings=Savings(merge_tokens=0.5)) - plain).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pag": -1.0}, "pag must be a number from 0 to 100, not -1.0"),
        ({"pag": float("nan")}, "pag must be a number from 0 to 100"),
        ({"pag": 3.0, "savings": Savings(features_every=2)}, "pag acts on the deep parts in every step"),
        ({"pag": 3.0, "execution": sampling.Execution(compiled=True)}, "compile does not go with pag"),
    ],
)
def test_what_does_not_go_together_is_refused(sd1: Base, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.generate(sd1, "a cube", steps=1, **change)


def test_a_base_without_attention_in_its_middle_is_refused(sd1: Base) -> None:
    class Without(torch.nn.Module):
        mid_block = torch.nn.Identity()
        config = sd1.unet.config
        dtype = sd1.unet.dtype

    with pytest.raises(ValueError, match="this base has none there"):
        sampling.generate(replace(sd1, unet=Without()), "a cube", steps=1, pag=3.0)  # type: ignore[arg-type]

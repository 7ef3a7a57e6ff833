"""FreeU against diffusers' own pipelines, on random weights of the real classes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny_models
from sampling_peers import SIZE, assert_same, cond, controlnet_of, our_latents, their_latents

from controlkit import sampling
from controlkit.base import Base
from controlkit.control import Control
from controlkit.freeu import FreeU, freed, parse_freeu
from controlkit.predicting import Savings

USUAL = FreeU(1.5, 1.6, 0.9, 0.2)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_latents_equal_the_pipeline(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    controls = [Control(controlnet_of(base), cond(), scale=0.8, end=0.75)]
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": "ddim"}
    with freed(base.unet, USUAL):
        ours = our_latents(base, controls, **request)
    plain = our_latents(base, controls, **request)
    try:
        theirs = their_latents(
            base, controls, prepare=lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), **request
        )
    finally:
        base.unet.disable_freeu()
    assert_same(ours, theirs)
    assert (ours - plain).abs().max() > 1e-3


def test_factors_of_1_change_nothing_but_rounding_and_the_base_is_as_before(sd1: Base) -> None:
    request: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}
    plain, ones, usual, again = (
        sampling.generate(sd1, "a cube", freeu=freeu, **request)[0].astype(int)
        for freeu in (None, FreeU(1, 1, 1, 1), USUAL, None)
    )
    assert abs(plain - ones).max() <= 1
    assert abs(plain - usual).max() > 1
    assert np.array_equal(plain, again)


def test_a_base_that_was_freed_before_is_so_behind_it(sd1: Base) -> None:
    sd1.unet.enable_freeu(s1=0.5, s2=0.4, b1=1.1, b2=1.2)
    try:
        with freed(sd1.unet, USUAL):
            assert sd1.unet.up_blocks[0].b1 == 1.5
        assert [(block.b1, block.s2) for block in sd1.unet.up_blocks] == [(1.1, 0.4)] * 4
    finally:
        sd1.unet.disable_freeu()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.5,1.6,0.9", "freeu takes four numbers, B1,B2,S1,S2, as 1.5,1.6,0.9,0.2, not '1.5,1.6,0.9'"),
        ("a,b,c,d", "freeu takes four numbers"),
        ("1,1,0,1", "freeu's s1 must be a number above 0 and at most 10, not 0.0"),
        ("nan,1,1,1", "freeu's b1 must be a number above 0"),
        ("1,11,1,1", "freeu's b2 must be a number above 0 and at most 10, not 11.0"),
    ],
)
def test_what_is_no_freeu_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_freeu(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"savings": Savings(features_every=2)}, "freeu acts on the deep parts in every step"),
        ({"execution": sampling.Execution(compiled=True)}, "compile does not go with freeu"),
        ({"freeu": "1.5,1.6,0.9,0.2"}, "freeu is a FreeU, as FreeU"),
    ],
)
def test_what_does_not_go_together_is_refused(sd1: Base, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sampling.generate(sd1, "a cube", steps=1, **{"freeu": USUAL, **change})

"""Bases and LoRAs that were distilled to few steps, against diffusers' pipelines."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import tiny_models
import torch
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents

from controlkit.base import Base
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.diffusion import rescale_zero_terminal_snr
from controlkit.sampling import default_guidance
from controlkit.schedulers import SCHEDULERS, doubts, make_schedule

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

TURBO = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_base_that_is_told_the_guidance_equals_the_pipeline(
    load: Callable[[str], Base], family: str
) -> None:
    base = tiny_models.told_guidance(load(family))
    controls = [Control(controlnet_of(load(family)), cond(), scale=0.8)]
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": "lcm", "guidance": 8.0}
    ours = our_latents(base, controls, **request)
    assert_same(ours, their_latents(base, controls, **request))
    for other in (base, load(family)):
        different = our_latents(other, controls, **{**request, "guidance": 1.5})
        assert (ours - different).abs().max() > 1e-2
    assert default_guidance(base) == 8.5


def test_no_control_network_is_copied_from_such_a_base(sd1: Base) -> None:
    with pytest.raises(ValueError, match="train the adapter on the base that it was distilled from"):
        from_base(tiny_models.told_guidance(sd1))


def test_a_turbo_base_keeps_its_spacing_and_is_not_guided(sd1: Base) -> None:
    turbo = replace(sd1, scheduler_config={**sd1.scheduler_config, **TURBO})
    assert default_guidance(turbo) == 1.0
    zero_snr = replace(turbo, scheduler_config={**turbo.scheduler_config, "rescale_betas_zero_snr": True})
    assert default_guidance(zero_snr) == default_guidance(sd1) == 7.5
    v = replace(turbo, scheduler_config={**turbo.scheduler_config, "prediction_type": "v_prediction"})
    assert default_guidance(v) == 7.5, "no such base was distilled"
    assert make_schedule("euler-a", turbo, steps=1).timesteps.tolist() == [999]
    controls = [Control(controlnet_of(sd1), cond())]
    for steps in (1, 2):
        request: dict[str, Any] = {"seed": 7, "steps": steps, "scheduler": "euler-a", "guidance": 0.0}
        ours = our_latents(turbo, controls, **request)
        assert_same(ours, their_latents(turbo, controls, **request))
    assert not torch.equal(ours, our_latents(sd1, controls, **request))


def test_schedulers_that_do_not_start_at_pure_noise_are_named(sd1: Base) -> None:
    config = {**sd1.scheduler_config, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    base = replace(sd1, scheduler_config=config, alphas_cumprod=rescale_zero_terminal_snr(sd1.alphas_cumprod))
    said = {name: list(doubts(name, base)) for name in SCHEDULERS}
    assert {name for name, lines in said.items() if lines} == {"heun", "lms", "pndm"}
    assert all("does not start there" in line for lines in said.values() for line in lines)
    assert not any(list(doubts(name, sd1)) for name in SCHEDULERS)
    blind = replace(base, scheduler_config={**config, "prediction_type": "epsilon"})
    assert "its schedule ends in nothing else" in next(doubts("ddim", blind))


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_more_steps_than_the_distillation_had_are_refused_in_plain_words(sd1: Base, name: str) -> None:
    assert len(make_schedule(name, sd1, steps=50).timesteps) == 50
    with pytest.raises(ValueError, match=f"scheduler '{name}' takes at most 50 steps, not 51"):
        make_schedule(name, sd1, steps=51)

"""Every way of control: the formulas against tables computed by hand, and against other systems' own code."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from sampling_peers import SIZE, assert_same, cond, controlnet_of, our_latents, their_latents
from torch import Tensor

from controlkit import sampling
from controlkit.applying import Rows, encode_controls, summed_residuals
from controlkit.base import Base
from controlkit.control import Control
from controlkit.predicting import Predictor
from controlkit.rules import (
    CURVES,
    GATES,
    MODES,
    connection_levels,
    gate_open,
    guided_at,
    layer_weights,
    scale_at,
)
from controlkit.sampling import Guidance, Savings
from controlkit.schedulers import make_schedule
from controlkit.starting import Begun

SD_LEVELS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
SDXL_LEVELS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


@torch.no_grad()
def residuals_of(base: Base, *controls: Control, step: int = 0, steps: int = 4, branches: int = 2) -> Any:
    """What the controls add to the rows of one picture: (unconditional, conditional), or one row."""
    latents = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=torch.Generator().manual_seed(1))
    text = base.encode_prompts(["", "a red cube"][-branches:])
    added = base.added_cond(text.pooled, height=SIZE, width=SIZE)
    encoded = encode_controls(controls, width=SIZE, height=SIZE, pictures=1)
    rows = Rows(text.encoder_hidden_states, added, 1)
    return summed_residuals(encoded, latents, torch.tensor(500), rows, step=step, steps=steps)


def flat(residuals: Any) -> list[Tensor]:
    return [*residuals.down, residuals.mid]


# --- the formulas, against numbers that were written down ---


def test_the_originals_guess_weights_to_four_digits() -> None:
    told = [0.0994, 0.1205, 0.1461, 0.177, 0.2146, 0.2601, 0.3153, 0.3822, 0.4633, 0.5615, 0.6806, 0.825, 1]
    assert layer_weights("soft", SD_LEVELS) == pytest.approx(told, abs=6e-5)
    assert layer_weights("soft-webui", SD_LEVELS) == layer_weights("soft", SD_LEVELS)
    assert layer_weights("soft-webui", SDXL_LEVELS) == pytest.approx(told[:10], abs=6e-5)
    assert layer_weights("soft", SDXL_LEVELS) == pytest.approx(told[3:], abs=6e-5)


def test_diffusers_guess_weights_to_four_digits() -> None:
    told = [0.1, 0.1212, 0.1468, 0.1778, 0.2154, 0.261, 0.3162, 0.3831, 0.4642, 0.5623, 0.6813, 0.8254, 1.0]
    assert layer_weights("logspace", SD_LEVELS) == pytest.approx(told, abs=6e-5)
    assert layer_weights("logspace", SD_LEVELS) == pytest.approx(torch.logspace(-1, 0, 13).tolist(), rel=1e-6)
    assert layer_weights("logspace", SDXL_LEVELS)[:4] == pytest.approx(
        [0.1, 0.1292, 0.1668, 0.2154], abs=6e-5
    )


def test_the_papers_resolution_weights_are_64_by_the_height_of_each_connection() -> None:
    heights = [64, 64, 64, 32, 32, 32, 16, 16, 16, 8, 8, 8, 8]
    assert layer_weights("resolution", SD_LEVELS) == tuple(64 / height for height in heights)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_connection_levels_are_the_sizes_of_the_residuals(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    sizes = [
        residual.shape[-1] for residual in flat(residuals_of(base, Control(controlnet_of(base), cond())))
    ]
    levels = connection_levels(controlnet_of(base).config)
    assert [SIZE // 8 >> level for level in levels] == sizes


def test_connection_levels_of_the_real_families() -> None:
    sd = {"block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
    assert connection_levels(sd) == SD_LEVELS
    assert connection_levels({"block_out_channels": (320, 640, 1280), "layers_per_block": 2}) == SDXL_LEVELS


def open_steps(gate: str, start: float, end: float, n: int = 20) -> list[int]:
    return [i for i in range(n) if gate_open(gate, i, n, start=start, end=end)]


@pytest.mark.parametrize(
    ("start", "end", "diffusers", "webui", "invoke"),
    [
        (0.0, 1.0, range(20), range(20), range(20)),
        (0.0, 0.5, range(10), range(11), range(11)),
        (0.5, 1.0, range(10, 20), range(10, 20), range(10, 20)),
        (0.25, 0.75, range(5, 15), range(5, 16), range(5, 16)),
        (0.33, 0.66, range(7, 13), range(7, 14), range(6, 15)),
        (0.0, 0.04, [], [0], [0, 1]),
        (0.97, 1.0, [], [], [19]),
    ],
)
def test_each_gate_opens_for_its_own_steps(
    start: float, end: float, diffusers: Any, webui: Any, invoke: Any
) -> None:
    assert open_steps("diffusers", start, end) == list(diffusers)
    assert open_steps("webui", start, end) == list(webui)
    assert open_steps("invoke", start, end) == list(invoke)


def test_the_diffusers_gate_is_the_pipelines_expression_everywhere() -> None:
    for n in (1, 7, 20, 50):
        for start in np.linspace(0, 0.9, 10):
            for end in np.linspace(start + 0.05, 1, 7):
                keeps = [1.0 - float(i / n < start or (i + 1) / n > end) for i in range(n)]
                assert open_steps("diffusers", start, end, n) == [i for i, keep in enumerate(keeps) if keep]


def test_a_share_of_the_steps_is_guided_to_the_step() -> None:
    for n in (10, 25, 40, 50, 100, 200, 1000):
        for k in range(n + 1):
            until = float(f"{k / n:.3f}")  # as somebody writes it
            assert sum(guided_at(i, n, until) for i in range(n)) == k
    predictor = Predictor(None, None, [], Guidance(2.0), 100, Savings(guidance_until=0.07))  # type: ignore[arg-type]
    assert [i for i in range(100) if predictor.guides(i)] == list(range(7))
    assert [predictor.settings_at(i) == predictor.settings_at(0) for i in (6, 7)] == [True, False]


def test_scales_by_step() -> None:
    assert [scale_at(0.7, i, 3) for i in range(3)] == [0.7] * 3
    assert [scale_at([1.0, 0.5, 0.25, 0.0], i, 4) for i in range(4)] == [1.0, 0.5, 0.25, 0.0], "one for each"
    assert [scale_at([1.0, 0.0], i, 5) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0], "a straight line"
    assert [scale_at([0.0, 1.0, 0.0], i, 5) for i in range(5)] == [0.0, 0.5, 1.0, 0.5, 0.0]
    assert scale_at([1.0, 0.5], 0, 1) == 1.0
    assert scale_at([0.4], 3, 9) == 0.4


# --- the modes: branches and weights of real networks ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_weighs_the_branches_that_it_names(
    load: Callable[[str], Base], family: str, mode: str
) -> None:
    base, controlnet = load(family), controlnet_of(load(family))
    plain = flat(residuals_of(base, Control(controlnet, cond())))
    found = flat(residuals_of(base, Control(controlnet, cond(), scale=0.8, mode=mode)))
    last = len(plain) - 1
    curve = {
        "flat": lambda k: 1.0,
        "soft": lambda k: 0.825 ** (last - k),
        "soft-webui": lambda k: 0.825 ** (12 - k),
        "logspace": lambda k: math.pow(10, k / last - 1),
        "resolution": lambda k: plain[0].shape[-1] / plain[k].shape[-1],
    }[MODES[mode].curve]
    for k, (before, after) in enumerate(zip(plain, found, strict=True)):
        expected = before * (0.8 * curve(k))
        if not MODES[mode].both:
            expected[0] = 0
        assert torch.allclose(after, expected, rtol=1e-4, atol=1e-5), (mode, k)


def test_without_guidance_every_mode_controls_the_one_branch(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    for mode in MODES:
        residuals = residuals_of(sd1, Control(controlnet, cond(), mode=mode), branches=1)
        assert all(len(residual) == 1 and residual.abs().max() > 0 for residual in flat(residuals))


def test_layers_take_the_place_of_the_modes_curve(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    plain = flat(residuals_of(sd1, Control(controlnet, cond())))
    weights = [k / 10 for k in range(13)]
    for mode in ("balanced", "prompt"):
        found = flat(residuals_of(sd1, Control(controlnet, cond(), scale=2.0, mode=mode, layers=weights)))
        for weight, before, after in zip(weights, plain, found, strict=True):
            assert torch.allclose(after, before * 2.0 * weight, rtol=1e-5)
    named = flat(residuals_of(sd1, Control(controlnet, cond(), layers="logspace")))
    guess = flat(residuals_of(sd1, Control(controlnet, cond(), mode="more-prompt")))
    assert all(torch.equal(one, other) for one, other in zip(named, guess, strict=True))


def test_only_the_middle_block(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    plain = residuals_of(sd1, Control(controlnet, cond()))
    found = residuals_of(sd1, Control(controlnet, cond(), only_mid=True))
    assert torch.equal(found.mid, plain.mid)
    assert not any(residual.any() for residual in found.down)


def test_a_scale_below_zero_turns_the_residuals_round(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    plain = flat(residuals_of(sd1, Control(controlnet, cond())))
    found = flat(residuals_of(sd1, Control(controlnet, cond(), scale=-0.5)))
    for before, after in zip(plain, found, strict=True):
        assert torch.allclose(after, -0.5 * before, rtol=1e-5)


def test_a_network_that_pools_has_a_flat_curve_on_the_prompt_in_every_mode(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    controlnet.register_to_config(global_pool_conditions=True)
    plain = flat(residuals_of(sd1, Control(controlnet, cond(), mode="unbalanced")))
    for mode in MODES:
        found = flat(residuals_of(sd1, Control(controlnet, cond(), mode=mode)))
        assert all(torch.equal(one, other) for one, other in zip(found, plain, strict=True)), mode


def test_a_region_is_stretched_to_each_residual(sd1: Base) -> None:
    controlnet, mask = controlnet_of(sd1), np.zeros((SIZE, SIZE), np.uint8)
    mask[:, : SIZE // 2] = 255
    plain = flat(residuals_of(sd1, Control(controlnet, cond())))
    found = flat(residuals_of(sd1, Control(controlnet, cond(), mask=mask)))
    for before, after in zip(plain, found, strict=True):
        stretched = torch.nn.functional.interpolate(
            torch.from_numpy(mask / 255.0).float()[None, None], size=before.shape[-2:], mode="bilinear"
        )
        assert torch.allclose(after, before * stretched, atol=1e-6)
        if before.shape[-1] > 1:
            half = before.shape[-1] // 2
            assert torch.equal(after[..., :half], before[..., :half])
            assert not after[..., half:].any()
    as_float = flat(residuals_of(sd1, Control(controlnet, cond(), mask=torch.from_numpy(mask / 255.0))))
    assert all(torch.equal(one, other) for one, other in zip(as_float, found, strict=True))


@pytest.mark.parametrize("as_type", [np.uint8, bool, np.float32, torch.bool, torch.float16])
def test_a_region_is_given_in_any_type(sd1: Base, as_type: Any) -> None:
    white = np.eye(SIZE) > 0
    mask: Any = white * np.uint8(255) if as_type is np.uint8 else white
    mask = torch.from_numpy(mask).to(as_type) if isinstance(as_type, torch.dtype) else mask.astype(as_type)
    region = Control(controlnet_of(sd1), cond(), mask=mask).region(SIZE, SIZE)
    assert region is not None
    assert torch.equal(region[0, 0], torch.from_numpy(white).float())


@pytest.mark.filterwarnings("error")
def test_a_region_may_be_turned_round_and_protected(sd1: Base) -> None:
    mask = np.triu(np.ones((SIZE, SIZE), np.float32))
    protected, plain = mask.copy(), Control(controlnet_of(sd1), cond(), mask=mask)
    protected.flags.writeable = False
    for given in (mask[::-1].copy()[::-1], protected, mask.astype(">f4"), np.asfortranarray(mask)):
        region = replace(plain, mask=given).region(SIZE, SIZE)
        assert region is not None
        assert torch.equal(region, plain.region(SIZE, SIZE))


@pytest.mark.parametrize("factor", [1, 4])
@pytest.mark.parametrize("as_type", [np.uint8, bool])
def test_a_region_stays_on_its_map(sd1: Base, factor: int, as_type: type) -> None:
    """Its map is cropped to the picture's shape, and so is a mask of the same shape, at whatever size."""
    drawn = np.zeros((48, 80, 3), np.uint8)
    drawn[:, 24:48] = 255
    mask = drawn[::factor, ::factor, 0].astype(as_type)
    control = Control(controlnet_of(sd1), drawn, mask=mask)
    for width, height in ((48, 48), (96, 96), (80, 48), (80, 24)):
        region = control.region(width, height)
        assert region is not None
        assert region.shape == (1, 1, height, width)
        followed = control.cond_for(width, height)[:, :1]
        assert (region - followed).abs().mean() < (0.01 if factor == 1 else 0.06)
    own = np.full((8, 24), 255, np.uint8)  # of another shape than the map: it is the picture's
    region = Control(controlnet_of(sd1), drawn, mask=own).region(48, 48)
    assert region is not None
    assert region.shape == (1, 1, 8, 24)


def test_a_region_acts_where_that_of_a_fitted_map_does(sd1: Base) -> None:
    drawn = np.zeros((SIZE, 2 * SIZE, 3), np.uint8)
    drawn[:, 40:72] = 255
    fitted = drawn[:, SIZE // 2 : 3 * SIZE // 2]
    request: dict[str, Any] = {"steps": 2, "width": SIZE, "height": SIZE}
    pictures = [
        sampling.generate(sd1, "x", controls=[Control(controlnet_of(sd1), m, mask=m[..., 0])], **request)[0]
        for m in (drawn, fitted)
    ]
    assert np.array_equal(*pictures)


def test_controls_in_different_modes_are_summed(sd1: Base) -> None:
    one = Control(controlnet_of(sd1, seed=1), cond(1), scale=0.5, mode="guess")
    other = Control(controlnet_of(sd1, seed=2), cond(2), scale=[1.0, 0.2], mode="balanced")
    for step in (0, 3):
        total = flat(residuals_of(sd1, one, other, step=step))
        parts = [flat(residuals_of(sd1, control, step=step)) for control in (one, other)]
        for k, residual in enumerate(total):
            assert torch.allclose(residual, parts[0][k] + parts[1][k], atol=1e-6)


def test_what_a_mode_ignores_is_not_run(sd1: Base) -> None:
    controlnet, rows = controlnet_of(sd1), []
    hook = controlnet.mid_block.register_forward_hook(lambda _, args, out: rows.append(len(out)))
    for mode in MODES:
        sampling.generate(sd1, "x", controls=[Control(controlnet, cond(), mode=mode, end=0.5)], steps=4)
    hook.remove()
    assert rows == [count for mode in MODES for count in [2 if MODES[mode].both else 1] * 2]


# --- other systems' own code ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("guidance", [5.0, 1.0])
def test_guess_mode_of_diffusers_equals_its_pipeline(
    load: Callable[[str], Base], family: str, guidance: float
) -> None:
    base = load(family)
    controls = [Control(controlnet_of(base), cond(), scale=0.8, mode="guess-diffusers", end=0.8)]
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim", "guidance": guidance}
    theirs = their_latents(base, controls, guess_mode=True, **request)
    assert_same(our_latents(base, controls, **request), theirs)
    balanced = [Control(controls[0].adapter, cond(), scale=0.8, end=0.8)]
    assert (our_latents(base, balanced, **request) - theirs).abs().max() > 1e-2


@torch.no_grad()
def originals_guess(base: Base, controlnet: Any, noise: Tensor, *, steps: int, strength: float) -> Tensor:
    """Guess mode as the original's DDIM sampler does it, written plainly: two forward passes of diffusers'
    own models, control in the conditional one alone, strength x 0.825^(12 - i) on the thirteen outputs.
    """
    times = [1 + i * (1000 // steps) for i in range(steps)][::-1]
    x, acp = noise, base.alphas_cumprod
    told = base.encode_prompts(["", "a red cube"]).encoder_hidden_states
    for i, t in enumerate(times):
        now = torch.tensor([t])
        down, mid = controlnet(x, now, told[1:], controlnet_cond=cond(), return_dict=False)
        outputs = [out * strength * 0.825 ** float(12 - k) for k, out in enumerate([*down, mid])]
        eps_c = base.unet(
            x,
            now,
            told[1:],
            down_block_additional_residuals=outputs[:-1],
            mid_block_additional_residual=outputs[-1],
            return_dict=False,
        )[0]
        eps_u = base.unet(x, now, told[:1], return_dict=False)[0]
        eps = eps_u + 5.0 * (eps_c - eps_u)
        before = acp[times[i + 1]] if i + 1 < steps else acp[0]
        pred_x0 = (x - (1 - acp[t]).sqrt().float() * eps) / acp[t].sqrt().float()
        x = before.sqrt().float() * pred_x0 + (1 - before).sqrt().float() * eps
    return x


def test_guess_mode_of_the_original_equals_a_plain_implementation(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    noise = torch.randn((1, 4, SIZE // 8, SIZE // 8), generator=torch.Generator().manual_seed(3))
    plain = originals_guess(sd1, controlnet, noise, steps=5, strength=0.9)
    with torch.no_grad():
        for mode in ("guess", "control"):
            ours = sampling.denoise(
                sd1,
                sampling.encode_text(sd1, "a red cube", "", guidance=5.0),
                Begun(noise, noise),
                controls=encode_controls(
                    [Control(controlnet, cond(), scale=0.9, mode=mode)], width=SIZE, height=SIZE, pictures=1
                ),
                schedule=make_schedule("ddim", sd1, steps=5),
                guidance=Guidance(5.0),
            )
            assert (ours - plain).abs().max() < 1e-4 * float(plain.abs().max())


# --- what a user can get wrong ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "promt"}, "unknown mode 'promt' .did you mean 'prompt'"),
        ({"gate": "a1111"}, "unknown gate 'a1111'"),
        ({"layers": "sof"}, "unknown curve of layers 'sof' .did you mean 'soft'"),
        ({"layers": [1.0, math.inf]}, "layers must be finite numbers"),
        ({"layers": ["1"]}, "layers must be finite numbers, one for each connection, not .'1'."),
        ({"layers": 0.5}, "layers must be finite numbers, one for each connection, not 0.5"),
        ({"mode": None}, "unknown mode 'None'; choose from: balanced"),
        ({"mode": ["paper"]}, "unknown mode"),
        ({"gate": 3}, "unknown gate '3'"),
        ({"scale": [0.5, math.nan]}, "scale must be a number from -10 to 10, not nan"),
        ({"scale": []}, "a schedule of scales needs a number for each point, and it has none"),
        ({"mask": np.zeros((4, 4, 3), np.uint8)}, r"mask must be \(H, W\), not \(4, 4, 3\)"),
        ({"mask": np.full((4, 4), 2.0)}, r"mask must be uint8, or float with values in \[0, 1\]"),
        ({"mask": np.full((4, 4), np.nan)}, r"values in \[0, 1\]"),
        ({"mask": np.ones((4, 4), np.int64)}, "mask must be uint8, or float"),
        ({"mask": np.eye(4, dtype=np.uint8)}, r"is white \(255\) where the control acts, and .* uint8, is 1"),
        ({"mask": np.zeros((4, 4), np.uint8)}, "the largest value of this one, uint8, is 0"),
        ({"mask": torch.full((4, 4), 127, dtype=torch.uint8)}, "uint8, is 127"),
        ({"mask": np.zeros((4, 4))}, "mask is 0 everywhere: the control would act nowhere"),
        ({"mask": [[1]]}, "mask is a path, a PIL image, an array or a tensor, not a list"),
        ({"mask": "gone.png"}, "gone.png does not exist"),
        ({"kind": 5}, "a control's kind is a name, as 'canny', not an int"),
        ({"mask": np.array([["a"]])}, "mask must be uint8, or float, or bool, not <U1"),
        ({"mask": np.ones((4, 4), object)}, "mask must be uint8, or float, or bool, not object"),
        (
            {"scale": iter([1.0, 0.5])},
            r"a schedule of scales is a list of numbers, as \[.*, not a list_iterator",
        ),
        ({"scale": {0: 1.0}}, "a schedule of scales is a list of numbers, .*, not a dict"),
        ({"layers": (1.0 for _ in range(13))}, "layers is a list of numbers, .*, not a generator"),
    ],
)
def test_settings_that_are_not_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Control(torch.nn.Identity(), cond(), **settings)  # type: ignore[arg-type]


def test_layers_of_another_family_are_named(sd1: Base) -> None:
    control = Control(controlnet_of(sd1), cond(), layers=[1.0] * 10)
    with pytest.raises(ValueError, match=r"layers has 10 weights; .* has 13 connections"):
        sampling.generate(sd1, "x", controls=[control], steps=1)


def test_a_network_that_pools_has_no_region(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    controlnet.register_to_config(global_pool_conditions=True)
    with pytest.raises(ValueError, match="no mask"):
        sampling.generate(sd1, "x", controls=[Control(controlnet, cond(), mask=np.ones((8, 8)))], steps=1)


def test_every_name_is_explained_where_it_is_defined() -> None:
    import controlkit.rules

    told = controlkit.rules.__doc__ or ""
    assert all(f"    {name} " in told for name in (*MODES, *CURVES, *GATES))


def test_a_formula_of_no_known_name_is_none() -> None:
    with pytest.raises(ValueError, match="unknown curve of layers 'softer'"):
        layer_weights("softer", [0, 1])
    with pytest.raises(ValueError, match="unknown gate 'comfy'"):
        gate_open("comfy", 0, 2, start=0.0, end=1.0)

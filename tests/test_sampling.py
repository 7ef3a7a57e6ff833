"""The denoising loop against diffusers' own pipelines, on random weights of the real classes."""

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tiny_models
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from sampling_peers import SIZE, assert_same, cond, controlnet_of, our_latents, their_latents

from controlkit import sampling
from controlkit.base import Base
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.infotext import SAMPLER_NAMES
from controlkit.reuse import KeptText, repeat_rows, shared_start, text_kept
from controlkit.schedulers import NOT_OF_PICTURES, make_schedule, scaled_noise, step_options

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_latents_equal_the_pipeline(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    controls = [Control(controlnet_of(base), cond(), scale=0.8, start=0.0, end=0.75)]
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": "ddim"}
    ours = our_latents(base, controls, **request)
    assert_same(ours, their_latents(base, controls, **request))
    without = our_latents(base, [], **request)
    assert (ours - without).abs().max() > 1e-2, "the control does nothing, so the comparison says nothing"


def test_a_negative_prompt_and_no_guidance_equal_the_pipeline(load: Callable[[str], Base]) -> None:
    base = load("sdxl")
    controls = [Control(controlnet_of(base), cond())]
    for rest in ({"negative_prompt": "blue"}, {"negative_prompt": ""}, {"guidance": 1.0}):
        request: dict[str, Any] = {"seed": 3, "steps": 2, "scheduler": "euler", **rest}
        assert_same(our_latents(base, controls, **request), their_latents(base, controls, **request))


def test_an_sdxl_that_encodes_an_empty_negative_prompt_equals_the_pipeline(
    load: Callable[[str], Base],
) -> None:
    base = replace(load("sdxl"), zeros_for_empty_negative=False)
    request: dict[str, Any] = {"seed": 3, "steps": 2, "scheduler": "ddim"}
    controls = [Control(controlnet_of(base), cond())]
    ours = our_latents(base, controls, **request)
    assert_same(ours, their_latents(base, controls, **request))
    assert (ours - our_latents(load("sdxl"), controls, **request)).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_network_that_pools_acts_on_the_prompt_alone_as_in_the_pipeline(
    load: Callable[[str], Base], family: str
) -> None:
    base, controlnet = load(family), controlnet_of(load(family))
    controlnet.register_to_config(global_pool_conditions=True)
    controls = [Control(controlnet, cond(), scale=0.7)]
    for rest in ({}, {"guidance": 1.0}):
        request: dict[str, Any] = {"seed": 3, "steps": 2, "scheduler": "ddim", **rest}
        assert_same(our_latents(base, controls, **request), their_latents(base, controls, **request))


@pytest.mark.parametrize("scheduler", sampling.SCHEDULERS)
def test_every_scheduler_equals_the_pipeline(sd1: Base, scheduler: str) -> None:
    controls = [Control(controlnet_of(sd1), cond(), start=0.2)]
    request: dict[str, Any] = {"seed": 5, "steps": 5, "scheduler": scheduler}
    assert_same(our_latents(sd1, controls, **request), their_latents(sd1, controls, **request))


SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@pytest.mark.parametrize("name", sampling.SCHEDULERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_schedulers_name_holds_whatever_the_bases_file_says(sd1: Base, name: str, spacing: str) -> None:
    """The solver and the spacing of noise levels are the name's; all else that the file says stays."""
    stays = {"timestep_spacing": "trailing", "steps_offset": 0}
    says: dict[str, Any] = {"clip_sample": True}  # latents are no pixels
    if name.startswith("dpm++"):
        says |= {"algorithm_type": "dpmsolver", "solver_order": 3}
    if name == "unipc":
        says |= {"predict_x0": False, "solver_type": "bh1", "lower_order_final": False, "solver_order": 3}
    told = replace(sd1, scheduler_config={**sd1.scheduler_config, **stays, **says, spacing: True})
    made = sampling.make_scheduler(name, told)
    known = inspect.signature(type(made).__init__).parameters
    meant: dict[str, Any] = {key: False for key in (*SPACINGS, "clip_sample") if key in known}
    if name.startswith("dpm++"):
        solver = "sde-dpmsolver++" if name == "dpm++-sde" else "dpmsolver++"
        karras = name == "dpm++-karras"
        meant |= {"algorithm_type": solver, "solver_order": 2, "use_karras_sigmas": karras}
    if name == "pndm":
        meant["skip_prk_steps"] = True
    if name == "unipc":
        meant |= {"predict_x0": True, "solver_type": "bh2", "lower_order_final": True, "solver_order": 2}
    theirs = type(made).from_config(told.scheduler_config, **meant)
    assert {key: made.config[key] for key in known if key in made.config} == {
        key: theirs.config[key] for key in known if key in theirs.config
    }
    plain = sampling.make_scheduler(name, replace(sd1, scheduler_config={**sd1.scheduler_config, **stays}))
    for scheduler in (made, plain):
        scheduler.set_timesteps(6)
    assert torch.equal(made.timesteps, plain.timesteps)
    assert made.config.timestep_spacing == "trailing"
    if hasattr(made, "sigmas"):
        assert torch.equal(made.sigmas, plain.sigmas)


def test_a_base_with_karras_levels_tells_two_schedulers_apart(sd1: Base) -> None:
    karras = replace(sd1, scheduler_config={**sd1.scheduler_config, "use_karras_sigmas": True})
    request: dict[str, Any] = {"seed": 5, "steps": 6}
    plain = our_latents(sd1, [], scheduler="dpm++", **request)
    assert torch.equal(our_latents(karras, [], scheduler="dpm++", **request), plain)
    assert not torch.equal(our_latents(karras, [], scheduler="dpm++-karras", **request), plain)


@pytest.mark.parametrize("scheduler", sampling.SCHEDULERS)
def test_a_base_that_predicts_the_picture(sd1: Base, scheduler: str) -> None:
    """Every scheduler takes it, or says at once that it does not, and which do."""
    base = replace(sd1, scheduler_config={**sd1.scheduler_config, "prediction_type": "sample"})
    if scheduler not in NOT_OF_PICTURES:
        assert torch.isfinite(our_latents(base, [], seed=1, steps=3, scheduler=scheduler)).all()
        return
    steps: list[int] = []
    message = f"predicts the picture itself .sample., which scheduler '{scheduler}' does not take: take one"
    with pytest.raises(ValueError, match=message):
        sampling.generate(base, "x", steps=2, scheduler=scheduler, callback=lambda i, n, x: steps.append(i))
    assert not steps


@pytest.mark.parametrize("scheduler", sampling.SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2])
def test_every_scheduler_takes_few_steps(sd1: Base, scheduler: str, steps: int) -> None:
    latents = our_latents(sd1, [], seed=1, steps=steps, scheduler=scheduler)
    assert torch.isfinite(latents).all()


def test_eta_draws_the_same_noise_as_the_pipeline(sd1: Base) -> None:
    request: dict[str, Any] = {"seed": 5, "steps": 4, "scheduler": "ddim", "temperature": 1.0}
    controls = [Control(controlnet_of(sd1), cond())]
    assert_same(our_latents(sd1, controls, **request), their_latents(sd1, controls, **request))


def test_several_controls_sum_like_the_pipeline(sd1: Base) -> None:
    first = Control(controlnet_of(sd1, seed=1), cond(1), scale=0.5)
    second = Control(controlnet_of(sd1, seed=2), cond(2), scale=0.9, end=0.5)
    request: dict[str, Any] = {"seed": 2, "steps": 4, "scheduler": "ddim"}
    assert_same(our_latents(sd1, [first, second], **request), their_latents(sd1, [first, second], **request))


def test_the_window_is_the_pipelines_gate() -> None:
    control = Control(torch.nn.Identity(), cond(), start=0.25, end=0.5)
    assert [i for i in range(20) if control.active(i, 20)] == [5, 6, 7, 8, 9]
    half = Control(torch.nn.Identity(), cond(), end=0.5)
    assert sum(half.active(i, 20) for i in range(20)) == 10
    off = Control(torch.nn.Identity(), cond(), scale=0.0)
    assert not any(off.active(i, 20) for i in range(20))


@torch.no_grad()
@pytest.mark.parametrize("family", ["sd1", "sdxl"])  # whose transformers begin with a convolution, a matrix
@pytest.mark.parametrize("rows_added", [0, 1, 2])
def test_the_start_that_branches_share_is_what_the_block_makes_of_both(
    load: Callable[[str], Base], family: str, rows_added: int
) -> None:
    unet, draw = load(family).unet, torch.Generator().manual_seed(1)
    for block in unet.down_blocks:
        channels = block.resnets[0].in_channels
        x = torch.randn(1, channels, 4, 6, generator=draw)
        emb = torch.randn(1, unet.time_embedding.linear_2.out_features, generator=draw)
        text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=draw)
        inner = block.resnets[-1].out_channels
        # A T2I-Adapter's features enter behind a level's last layer, where diffusers adds them.
        added = torch.randn(rows_added, inner, 4, 6, generator=draw) if rows_added else None
        attends = getattr(block, "has_cross_attention", False)
        if added is not None and not attends and block.downsamplers:
            added = torch.nn.functional.avg_pool2d(added, 2)
        told: dict[str, Any] = {"encoder_hidden_states": text} if attends else {}
        if attends and added is not None:
            told["additional_residuals"] = repeat_rows(added, 2)
        wanted, skips = block(x.repeat(2, 1, 1, 1), emb.repeat(2, 1), **told)
        if added is not None and not attends:
            wanted = wanted + repeat_rows(added, 2)
            skips = (*skips[:-1], wanted)
        for beginning in (x, x.repeat(2, 1, 1, 1)):
            found, outputs = shared_start(block, beginning, repeat_rows(emb, len(beginning)), text, added)
            torch.testing.assert_close(repeat_rows(found, 2), wanted, atol=2e-5, rtol=1e-4)
            for ours, theirs in zip(outputs, skips, strict=True):
                torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_attentions_that_are_not_plain_are_left_as_they_are() -> None:
    draw, plain = torch.Generator().manual_seed(1), {"query_dim": 32, "cross_attention_dim": 32, "heads": 2}
    special: list[dict[str, Any]] = [
        {"residual_connection": True},
        {"norm_num_groups": 4},
        {"qk_norm": "layer_norm"},
    ]
    special += [{"cross_attention_norm": "layer_norm"}, {"spatial_norm_dim": 32}]
    for options in special:
        network = torch.nn.Module()
        network.attn2 = Attention(**plain, **options)
        with text_kept(network):
            assert type(network.attn2.processor) is AttnProcessor2_0
    network.attn2 = Attention(**plain, dim_head=4, rescale_output_factor=2.0)
    before = network.attn2.processor
    x, text = torch.randn(2, 6, 32, generator=draw), torch.randn(2, 7, 32, generator=draw)
    wanted = network.attn2(x, encoder_hidden_states=text)
    with text_kept(network):
        assert type(network.attn2.processor) is KeptText
        torch.testing.assert_close(network.attn2(x, encoder_hidden_states=text), wanted)
    assert network.attn2.processor is before


def test_what_is_not_needed_is_not_run(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    calls = {"hint": 0, "net": 0}
    parts = {"hint": controlnet.controlnet_cond_embedding, "net": controlnet.mid_block}

    def count(name: str) -> None:
        calls[name] += 1

    hooks = [part.register_forward_hook(lambda *_, name=name: count(name)) for name, part in parts.items()]
    hints = [Control(controlnet, cond(), end=0.5), Control(controlnet, cond(), scale=0.0)]
    sampling.generate(sd1, "x", controls=hints[:1], steps=4, seeds=(0, 1))
    assert calls == {"hint": 1, "net": 2 * 2}
    sampling.generate(sd1, "x", controls=hints[1:], steps=4)
    for hook in hooks:
        hook.remove()
    assert calls["net"] == 4, "a control of scale 0 was run"


def test_picture_k_of_several_is_picture_k_alone(sd1: Base) -> None:
    maps = [Control(controlnet_of(sd1), cond(batch=3))]
    several = sampling.generate(sd1, "x", controls=maps, steps=3, scheduler="euler-a", seeds=(11, 12, 13))
    assert len({picture.tobytes() for picture in several}) == 3
    one_map = Control(maps[0].adapter, cond(batch=3)[1:2])
    alone = sampling.generate(sd1, "x", controls=[one_map], steps=3, scheduler="euler-a", seeds=(12,))
    assert np.array_equal(several[1], alone[0])
    batched = sampling.generate(
        sd1, "x", controls=maps, steps=3, scheduler="euler-a", seeds=(11, 12, 13), batch_size=2
    )
    difference = np.abs(np.stack(batched).astype(int) - np.stack(several)).max()
    assert difference <= 1, "batched kernels may round differently, no more"


def test_residuals_that_are_kept_are_of_the_picture_at_hand(sd1: Base) -> None:
    """Also in its first step with a control, if that is one of those that take what there is."""
    late = [Control(controlnet_of(sd1), cond(), start=0.25)]
    request: dict[str, Any] = {"controls": late, "steps": 4, "savings": sampling.Savings(control_every=2)}
    several = sampling.generate(sd1, "x", seeds=(11, 12), batch_size=1, **request)
    assert np.array_equal(several[1], sampling.generate(sd1, "x", seeds=(12,), **request)[0])


def test_pictures_have_the_size_of_the_map(sd1: Base) -> None:
    image = np.zeros((72, 56, 3), np.uint8)
    (picture,) = sampling.generate(sd1, "x", controls=[Control(controlnet_of(sd1), image)], steps=1)
    assert picture.shape == (72, 56, 3)
    assert picture.dtype == np.uint8
    (wide,) = sampling.generate(sd1, "x", controls=[Control(controlnet_of(sd1), image)], steps=1, width=80)
    assert wide.shape == (104, 80, 3)


def test_the_default_size(sd1: Base) -> None:
    assert sampling.picture_size(sd1, None) == (64, 64)
    assert sampling.picture_size(sd1, (60, 70)) == (64, 72)  # near the native area: its own size, to /8
    assert sampling.picture_size(sd1, (4000, 3900)) == (64, 64)  # far: its shape, to the coarsest cell
    assert sampling.picture_size(sd1, (640, 160)) == (128, 32), "which is its shape"
    assert sampling.picture_size(sd1, (1280, 704)) == (88, 48), "not 64 x 64, which would cut off 45 %"
    assert sampling.picture_size(sd1, None, width=32) == (32, 64)
    assert sampling.picture_size(sd1, (640, 480), width=96) == (96, 72), "in the map's shape"
    assert sampling.picture_size(sd1, (640, 480), height=96) == (128, 96)
    assert sampling.picture_size(sd1, (640, 480), width=96, height=32) == (96, 32)
    assert sampling.picture_size(sd1, (9000, 3), width=96) == (96, 16)
    assert sampling.picture_size(sd1, (30_000, 20)) == (2480, 16)
    assert sampling.picture_size(sd1, (1_000_000, 1)) == (8192, 16)
    assert sampling.picture_size(sd1, (2048, 2)) == (2048, 16), "sides that `limits.check_size` would refuse"


def test_steps_are_counted_over_all_pictures(sd1: Base) -> None:
    seen: list[tuple[int, int]] = []
    sampling.generate(
        sd1, "x", steps=2, seeds=(0, 1), callback=lambda done, total, latents: seen.append((done, total))
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_damaged_weights_are_an_error_that_names_the_step(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    controlnet.controlnet_mid_block.bias.fill_(float("nan"))
    control = Control(controlnet, cond(), start=0.5)
    with pytest.raises(ValueError, match=r"stopped being finite at step 3 of 4: .*damaged weights"):
        sampling.generate(sd1, "x", controls=[control], steps=4)


@pytest.mark.parametrize("scheduler", ["lcm", "tcd"])
def test_all_steps_of_a_distillation_can_be_taken(sd1: Base, scheduler: str) -> None:
    assert make_schedule(scheduler, sd1, steps=50).steps == 50
    with pytest.raises(ValueError, match=f"scheduler '{scheduler}' takes at most 50 steps, not 51"):
        make_schedule(scheduler, sd1, steps=51)


def test_the_spread_of_a_guided_prediction_is_each_pictures_own() -> None:
    """Lin et al. 2023, equations 15 and 16."""
    uncond, cond = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond[1] *= 3
    together = sampling.Guidance(5.0, 0.7).apply(uncond, cond)
    for k in range(2):
        guided = uncond[k] + 5 * (cond[k] - uncond[k])
        expected = 0.7 * guided * cond[k].std() / guided.std() + 0.3 * guided
        torch.testing.assert_close(together[k], expected)


def test_as_many_steps_as_were_trained_do_not_fit_behind_an_offset(sd1: Base) -> None:
    assert sd1.scheduler_config["steps_offset"] == 1
    with pytest.raises(ValueError, match="1000 steps do not fit into the base's 1000 timesteps"):
        sampling.generate(sd1, "x", steps=1000)


@pytest.mark.parametrize("scheduler", ["dpm++", "dpm++-sde", "unipc"])
def test_a_timestep_is_not_taken_twice_by_solvers_that_divide_by_the_distance(
    sd1: Base, scheduler: str
) -> None:
    """They space one step more than they take, and rounding makes one of two."""
    base = replace(sd1, scheduler_config={**sd1.scheduler_config, "timestep_spacing": "linspace"})
    assert make_schedule(scheduler, base, steps=999).steps == 999
    with pytest.raises(ValueError, match="1000 steps do not fit into the base's 1000 timesteps"):
        make_schedule(scheduler, base, steps=1000)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, not 0"),
        ({"steps": 1001}, "from 1 to 1000"),
        ({"guidance": float("nan")}, "guidance must be a number from 0 to 100, not nan"),
        ({"width": 60}, r"width must be a multiple of 8 .* not 60 \(nearest: 64\)"),
        ({"height": 0}, "height must be a multiple of 8"),
        ({"width": "64"}, r"width must be a multiple of 8 from 16 to 8192, not '64'$"),
        ({"width": float("nan")}, "width must be a multiple of 8 from 16 to 8192, not nan$"),
        ({"clip_skip": True}, "clip_skip must be a whole number from 1"),
        ({"prompt_syntax": None}, "unknown prompt syntax 'None'; choose from: a1111, plain"),
        ({"seeds": (-1,)}, "a seed must be a whole number from 0"),
        ({"seeds": ()}, "no seed given"),
        ({"temperature": 1.5}, "temperature must be a number from 0 to 1 for ddim, not 1.5"),
        ({"temperature": 0.5, "scheduler": "euler"}, "euler injects none: take one of ddim, ddpm"),
        ({"guidance_rescale": -0.1}, "guidance_rescale must be a number from 0 to 1"),
        ({"scheduler": "dim"}, "unknown scheduler 'dim' .did you mean 'ddim'"),
        ({"scheduler": None}, "unknown scheduler 'None'; choose from: ddim"),
        ({"batch_size": -1, "seeds": (1, 2)}, "batch_size must be a whole number from 1, not -1"),
        ({"batch_size": 1.5}, "batch_size must be a whole number from 1, not 1.5"),
        ({"seeds": 5}, r"seeds is a list of whole numbers, as \[0\], one per picture, not one int"),
        ({"seeds": np.zeros((2, 2), int)}, "seeds is a list of whole numbers"),
        ({"seeds": np.zeros(2)}, "a seed must be a whole number from 0 to 9223372036854775807, not 0.0"),
        ({"guidance": "7"}, "guidance must be a number from 0 to 100, not '7'"),
        ({"steps": "3"}, "steps must be a whole number from 1 to 1000, not '3'"),
        ({"callback": 5}, "callback is a function, not an int"),
        ({"preview": "live.png"}, "preview is a function, not a str"),
        ({"finished": [print]}, "finished is a function, not a list"),
        ({"prompt": ["a", "b"]}, "prompt is one text for all pictures, not a list"),
        ({"prompt": None}, "prompt is one text for all pictures, not a NoneType"),
        ({"prompt": "a \udcff"}, "prompt is not valid Unicode"),
        ({"base": "tiny"}, r"base is a Base, as load_base\(.tiny.\), not a str"),
        ({"base": torch.nn.Identity()}, r"base is a Base, as .*, not an Identity"),
        ({"picture_prompts": ["x"]}, "picture_prompts is a list of PicturePrompt, and a str is in it"),
        ({"picture_prompts": "x"}, r"picture_prompts is a list, as \[picture_prompt\(...\)\], not a str"),
        ({"negative_prompt": ["a"]}, "negative_prompt is one text for all pictures, not a list"),
        ({"controls": Control(torch.nn.Identity(), cond())}, r"controls is a list, as .*, not a Control"),
        ({"controls": [None]}, "controls is a list of Control, and a NoneType is in it"),
        ({"start": "photo.png"}, r"start is a Start, as Start\(picture\), not a str"),
        ({"tiles": 64}, r"tiles is a Tiles, as Tiles\(512\), not an int"),
        ({"savings": 3}, r"savings is a Savings, as Savings\(control_every=2\), not an int"),
        ({"memory": "4GB"}, r"memory is a Memory, as Memory\(batch_size=1\), not a str"),
        ({"told": 1}, r"told is a Told, as Told\(class_label=1\), not an int"),
        ({"clip_guidance": 30}, r"clip_guidance is a ClipGuidance, as ClipGuidance\(clip, 30\), not an int"),
        ({"execution": True}, r"execution is an Execution, as Execution\(compiled=True\), not a bool"),
    ],
)
def test_numbers_outside_their_range(sd1: Base, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        sampling.generate(**{"base": sd1, "prompt": "x", **request_})
    assert "\n" not in str(raised.value)


def test_numbers_of_arrays_are_numbers(sd1: Base) -> None:
    """Of numpy and of torch, one or several, as what they are in Python."""
    given: dict[str, Any] = {"steps": 1, "width": SIZE, "height": SIZE}
    two = sampling.generate(sd1, "x", seeds=(1, 2), **given)
    for seeds in (np.arange(1, 3), torch.tensor([1, 2]), range(1, 3)):
        assert np.array_equal(sampling.generate(sd1, "x", seeds=seeds, **given), two)
    controlnet = controlnet_of(sd1)
    for scale in (np.float32(0.5), np.array(0.5), torch.tensor(0.5), 0.5):
        control = Control(controlnet, cond(), scale=scale)  # type: ignore[arg-type]
        assert [control.scale_at(i, 3) for i in range(3)] == [0.5] * 3
    several = Control(controlnet, cond(), scale=np.linspace(1, 0, 3))  # type: ignore[arg-type]
    assert [several.scale_at(i, 3) for i in range(3)] == [1.0, 0.5, 0.0]
    skipped = sampling.generate(sd1, "x", clip_skip=np.int64(2), **given)
    assert np.array_equal(skipped, sampling.generate(sd1, "x", clip_skip=2, **given))
    for wrong in (None, "much", torch.tensor(11.0)):
        with pytest.raises(ValueError, match="a control's scale must be a number from -10 to 10, not"):
            Control(controlnet, cond(), scale=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("pictures", [0, -1, 1.5])
def test_memory_for_no_picture(pictures: Any) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be a whole number from 1, not {pictures}"):
        sampling.Memory(pictures)


def test_a_map_may_be_given_in_any_way(sd1: Base, tmp_path: Path) -> None:
    controlnet = controlnet_of(sd1)
    edges = np.where(np.random.default_rng(0).random((SIZE, SIZE)) < 0.1, 255, 0).astype(np.uint8)
    coloured = np.dstack([edges] * 3)
    Image.fromarray(edges).save(tmp_path / "edges.png")
    expected = torch.from_numpy(edges / 255).float().expand(1, 3, -1, -1)
    opaque = np.dstack([coloured, np.full_like(edges, 255)])
    drawn = np.dstack([np.full_like(coloured, 255), edges])
    ways = [
        coloured,
        drawn,
        coloured[None],
        [coloured],
        opaque,
        edges,
        edges[..., None],
        edges > 0,
        edges / 255,
        (coloured / 255).astype(np.float32),
        coloured.astype(np.uint16) * 257,
        Image.fromarray(edges),
        Image.fromarray(coloured).convert("RGBA"),
        torch.from_numpy(coloured).permute(2, 0, 1),
        torch.from_numpy(coloured).permute(2, 0, 1)[None],
        torch.from_numpy(coloured).permute(2, 0, 1)[None] / 255,
        tmp_path / "edges.png",
        (tmp_path / "edges.png").read_bytes(),
    ]
    for way in ways:
        assert torch.equal(Control(controlnet, way).cond_for(SIZE, SIZE), expected), type(way)
    two = Control(controlnet, [edges, 255 - edges]).cond_for(SIZE, SIZE)
    assert torch.equal(two, torch.cat([expected, 1 - expected]))


def test_a_network_of_one_channel_gets_the_grey(sd1: Base) -> None:
    controlnet = from_base(sd1, conditioning_channels=1)
    grey = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE), np.uint8)
    assert torch.equal(
        Control(controlnet, grey).cond_for(SIZE, SIZE), torch.from_numpy(grey / 255).float()[None, None]
    )
    with pytest.raises(ValueError, match="takes grey maps, and the map is coloured"):
        Control(controlnet, np.dstack([grey, grey, 255 - grey])).cond_for(SIZE, SIZE)


def test_lines_stay_thin_and_whole_at_another_size(sd1: Base) -> None:
    drawn = np.zeros((96, 96), np.uint8)
    cv2.polylines(drawn, [np.array([[10, 12], [80, 30], [50, 85]])], isClosed=True, color=255)
    light = Control(controlnet_of(sd1), drawn).cond_for(SIZE, SIZE)[0, 0].numpy()
    dark = Control(controlnet_of(sd1), 255 - drawn).cond_for(SIZE, SIZE)[0, 0].numpy()
    assert set(np.unique(light)) == {0, 1}
    assert np.array_equal(dark, 1 - light)
    lines = (255 * light).astype(np.uint8)
    assert cv2.connectedComponents(lines, connectivity=8)[0] == 2  # the ground, and one line
    assert (lines > 0).mean() < 1.8 * (drawn > 0).mean()


def test_controls_outside_their_range(sd1: Base) -> None:
    controlnet = controlnet_of(sd1)
    with pytest.raises(ValueError, match="scale must be a number from -10 to 10, not nan"):
        Control(controlnet, cond(), scale=float("nan"))
    with pytest.raises(ValueError, match="start < end"):
        Control(controlnet, cond(), start=0.5, end=0.5)
    with pytest.raises(ValueError, match="float values from nan to nan; they must lie in"):
        Control(controlnet, np.full((8, 8, 3), np.nan))
    with pytest.raises(ValueError, match="a picture is a path, bytes, a PIL image, an array or a tensor"):
        Control(controlnet, None)
    with pytest.raises(ValueError, match=r"values in \[0, 1\], or -1 in a hole, not 0 to 255"):
        Control(controlnet, 255 * torch.eye(8)[None, None])
    with pytest.raises(ValueError, match="no map given"):
        Control(controlnet, [])
    with pytest.raises(ValueError, match=r"a map given as a tensor is empty: \(1, 3, 64, 0\)"):
        Control(controlnet, cond()[..., :0])
    with pytest.raises(ValueError, match=r"picture 1 of the batch: gone.png"):
        Control(controlnet, [np.zeros((8, 8), np.uint8), "gone.png"])
    with pytest.raises(ValueError, match="must have the size of the picture, 64x64, not 32x64"):
        sampling.generate(sd1, "x", controls=[Control(controlnet, cond()[..., :32])], width=64, height=64)
    with pytest.raises(ValueError, match="2 maps for 3 pictures"):
        sampling.generate(sd1, "x", controls=[Control(controlnet, cond(batch=2))], seeds=(0, 1, 2))


def test_a_control_of_another_family_is_refused_with_the_sizes(load: Callable[[str], Base]) -> None:
    stranger = Control(controlnet_of(load("sdxl")), cond())
    with pytest.raises(ValueError, match="SDXL"):
        sampling.generate(load("sd1"), "x", controls=[stranger])


def test_every_scheduler_has_a_name_in_the_infotext() -> None:
    assert set(sampling.SCHEDULERS) == set(SAMPLER_NAMES)


def test_pictures_are_handed_over_as_they_are_made(sd1: Base) -> None:
    made: list[tuple[int, int]] = []
    steps: list[int] = []
    pictures = sampling.generate(
        sd1,
        "a cube",
        steps=2,
        seeds=[3, 4],
        callback=lambda done, total, latents: steps.append(done),
        finished=lambda index, picture: made.append((index, len(steps))),
    )
    assert made == [(0, 2), (1, 4)]
    assert len(pictures) == 2


# --- threads ---


def test_threads_that_share_networks_take_turns(sd1: Base) -> None:
    """Each gets the picture that it would get alone, and the networks are left as they were."""
    controls = [Control(controlnet_of(sd1), cond())]
    request: dict[str, Any] = {"controls": controls, "steps": 3, "width": SIZE, "height": SIZE}
    alone = sampling.generate(sd1, "x", **request)
    processors = [type(processor) for processor in sd1.unet.attn_processors.values()]
    made: list[np.ndarray] = []
    steps: list[str] = []
    second = threading.Thread(
        target=lambda: made.extend(
            sampling.generate(sd1, "x", **request, callback=lambda *_: steps.append("second"))
        )
    )

    def begin_another(done: int, *_: Any) -> None:
        steps.append("first")
        if done == 1:
            second.start()
            second.join(0.5)

    made += sampling.generate(sd1, "x", **request, callback=begin_another)
    second.join()
    assert steps == ["first"] * 3 + ["second"] * 3
    assert all(np.array_equal(picture, alone[0]) for picture in made)
    assert [type(processor) for processor in sd1.unet.attn_processors.values()] == processors


@pytest.mark.parametrize("name", ["ddim", "heun", "euler"])
def test_a_part_of_the_steps_is_the_last_of_them(sd1: Base, name: str) -> None:
    whole, part = (make_schedule(name, sd1, steps=10, strength=strength) for strength in (1.0, 0.55))
    order = part.scheduler.order
    assert part.first == 5 * order
    assert torch.equal(part.timesteps, whole.timesteps[5 * order :])
    if name != "ddim":
        assert part.scheduler.begin_index == 5 * order
    assert make_schedule(name, sd1, steps=10, strength=0.01).first == 9 * order  # one is left
    latents, noise = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    assert part.add_noise(latents, noise, part.steps) is latents
    assert part.add_noise(latents, noise, part.steps - 1).any()


def test_noise_levels_that_share_a_timestep_are_each_taken(sd1: Base) -> None:
    """As the first ones of dpm++-karras do where the schedule goes down to pure noise."""
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    base = replace(sd1, scheduler_config={**sd1.scheduler_config, **zero})
    schedule = make_schedule("dpm++-karras", base, steps=30)
    assert schedule.timesteps[0] == schedule.timesteps[1]
    latents = torch.ones(1, 4, 2, 2)
    for done, t in enumerate(schedule.timesteps, start=1):
        latents = schedule.scheduler.step(torch.zeros_like(latents), t, latents, return_dict=False)[0]
        assert schedule.scheduler.step_index == done
    assert torch.isfinite(latents).all()


def test_a_temperature_of_0_draws_nothing_and_what_fails_leaves_the_draws(sd1: Base) -> None:
    scheduler = sampling.make_scheduler("ddpm", sd1)
    module = sys.modules[type(scheduler).__module__]
    drawn = module.randn_tensor  # type: ignore[attr-defined]

    def failing() -> None:
        with scaled_noise(scheduler, 0.0):
            assert not module.randn_tensor((2, 2)).any()  # type: ignore[attr-defined]
            raise ValueError("it fails")

    with pytest.raises(ValueError, match="it fails"):
        failing()
    assert module.randn_tensor is drawn  # type: ignore[attr-defined]
    for name in ("ddim", "tcd"):  # which are told
        options = step_options(sampling.make_scheduler(name, sd1), temperature=0.3, generators=None)
        assert options == {"eta": 0.3}


def test_threads_do_not_scale_each_others_noise(sd1: Base) -> None:
    """diffusers' schedulers draw by a function of their module, which all threads share."""
    scheduler = sampling.make_scheduler("ddpm", sd1)
    module = sys.modules[type(scheduler).__module__]
    drawn = module.randn_tensor  # type: ignore[attr-defined]

    def draw() -> None:
        with scaled_noise(scheduler, 0.5):
            pass

    other = threading.Thread(target=draw)
    with scaled_noise(scheduler, 0.25):
        other.start()
        other.join(0.2)
        assert other.is_alive(), "it waits"
    other.join()
    assert module.randn_tensor is drawn  # type: ignore[attr-defined]

"""Generations that start from a picture, whole or with a hole, against diffusers' pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image
from sampling_peers import SIZE, assert_same, cond, controlnet_of, our_latents, parts_of
from torch import Tensor

from controlkit import images, sampling
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.figures import render
from controlkit.infotext import SAMPLER_NAMES
from controlkit.starting import Start, inpaint_cond

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")


def picture(seed: int = 0, *, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def mask(*, width: int = SIZE, height: int = SIZE) -> np.ndarray:
    made = np.zeros((height, width), np.uint8)
    made[height // 4 : height // 2, width // 4 :] = 255
    return made


def theirs(name: str, base: Base, control: Control, start: Start, **request: Any) -> Tensor:
    """The latents of one of diffusers' pipelines that start from a picture."""
    import diffusers

    seed, steps, scheduler = request.pop("seed"), request.pop("steps"), request.pop("scheduler")
    parts = parts_of(base, [control], scheduler)
    xl = {} if base.family != "sdxl" else {"add_watermarker": False}
    sd = {} if xl else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    parts["controlnet"] = parts["controlnet"][0]
    pipeline = getattr(diffusers, name)(**parts, **xl, **sd)
    pipeline.set_progress_bar_config(disable=True)
    given: dict[str, Any] = {
        "image": Image.fromarray(start.picture),
        "control_image": control.controlnet_cond,
    }
    if start.mask is not None:
        given["mask_image"] = Image.fromarray(start.mask)
    return pipeline(
        "a red cube",
        **given,
        strength=start.strength,
        controlnet_conditioning_scale=control.scale,
        control_guidance_end=control.end,
        num_inference_steps=steps,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
    )[0]


IMG2IMG = {
    "sd1": "StableDiffusionControlNetImg2ImgPipeline",
    "sd2": "StableDiffusionControlNetImg2ImgPipeline",
    "sdxl": "StableDiffusionXLControlNetImg2ImgPipeline",
}


@pytest.mark.parametrize(("family", "strength"), [*((family, 0.6) for family in IMG2IMG), ("sd1", 1.0)])
def test_from_a_picture_equals_the_pipeline(
    load: Callable[[str], Base], family: str, strength: float
) -> None:
    """At a strength of 1, too, something of the picture shines through the noisiest step."""
    base = load(family)
    control = Control(controlnet_of(base), cond(), scale=0.8, end=0.75)
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim"}
    start = Start(picture(), strength)
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(IMG2IMG[family], base, control, start, **request))
    other = our_latents(base, [control], start=Start(picture(1), strength), **request)
    assert (ours - other).abs().max() > 1e-2, "the picture does nothing"


OFTEN = ("ddpm", "euler-a", "dpm++", "heun", "pndm")  # the others are slow tests


@pytest.mark.parametrize(
    "scheduler",
    [*OFTEN, *(pytest.param(s, marks=pytest.mark.slow) for s in ("euler", "unipc", "lms", "lcm"))],
)
def test_from_a_picture_equals_the_pipeline_with_every_scheduler(sd1: Base, scheduler: str) -> None:
    control = Control(controlnet_of(sd1), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 6, "scheduler": scheduler}
    start = Start(picture(), strength=0.5)
    ours = our_latents(sd1, [control], start=start, **request)
    assert_same(ours, theirs(IMG2IMG["sd1"], sd1, control, start, **request))


INPAINT = {
    "sd1": "StableDiffusionControlNetInpaintPipeline",
    "sdxl": "StableDiffusionXLControlNetInpaintPipeline",
}


@pytest.mark.parametrize("family", INPAINT)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_hole_is_filled_as_by_the_pipeline(
    load: Callable[[str], Base], family: str, strength: float
) -> None:
    base = load(family)
    control = Control(controlnet_of(base), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim"}
    start = Start(picture(), strength=strength, mask=mask())
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(INPAINT[family], base, control, start, **request))


@pytest.mark.parametrize(
    "scheduler",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in SAMPLER_NAMES],
)
def test_a_hole_is_filled_as_by_the_pipeline_with_every_scheduler(sd1: Base, scheduler: str) -> None:
    control = Control(controlnet_of(sd1), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 6, "scheduler": scheduler}
    start = Start(picture(), strength=0.6, mask=mask())
    ours = our_latents(sd1, [control], start=start, **request)
    assert_same(ours, theirs(INPAINT["sd1"], sd1, control, start, **request))


@pytest.mark.parametrize("middle", [np.uint8(128), np.float32(0.5), np.float64(0.5)])
def test_from_the_middle_value_up_it_is_redrawn(middle: np.generic) -> None:
    """As diffusers binarizes a mask."""
    grey = np.full((SIZE, SIZE), middle)
    grey[:, 0] -= 1 if grey.dtype == np.uint8 else 0.01
    start = Start(picture(), mask=grey)
    assert start.hole().mean() == 1 - 1 / SIZE
    assert np.array_equal(start.fitted(SIZE, SIZE).hole(), start.hole())


def test_a_hole_that_is_cropped_away(sd1: Base) -> None:
    left = np.zeros((64, 64), np.uint8)
    left[:, :8] = 255
    with pytest.raises(
        ValueError, match="at 32x64 the picture is cropped, and all that is white in the mask"
    ):
        sampling.generate(sd1, "x", start=Start(picture(), 1.0, left), width=32, height=64, steps=1)


def test_a_hole_between_the_latents_is_too_small(sd1: Base) -> None:
    small = np.zeros((64, 64), np.uint8)
    small[1:7, 1:7] = 255
    with pytest.raises(ValueError, match="the hole is too small: it falls between the latents"):
        sampling.generate(sd1, "x", start=Start(picture(), 1.0, small), steps=1)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_base_of_nine_channels_equals_the_pipeline(
    tmp_path: Any, load: Callable[[str], Base], strength: float
) -> None:
    base = tiny_models.nine_channels(load("sd1"))
    control = Control(controlnet_of(load("sd1")), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim"}
    start = Start(picture(), strength=strength, mask=mask())
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(INPAINT["sd1"], base, control, start, **request))
    with pytest.raises(ValueError, match="fills holes in pictures: give a picture and a mask"):
        sampling.generate(base, "x", steps=1)


def test_what_lies_outside_the_mask_stays_to_the_bit(sd1: Base) -> None:
    before = picture()
    start = Start(before, strength=1.0, mask=mask())
    (after,) = sampling.generate(sd1, "x", start=start, steps=2)
    inside = mask() > 0
    assert np.array_equal(after[~inside], before[~inside])
    assert not np.array_equal(after[inside], before[inside])
    (unpasted,) = sampling.generate(sd1, "x", start=Start(before, 1.0, mask(), paste=False), steps=2)
    assert not np.array_equal(unpasted[~inside], before[~inside])


def test_a_low_strength_keeps_more_of_the_picture() -> None:
    base, before = load_base("tiny"), render(3).picture
    through = base.decode_latents(base.encode_pictures(images.picture_to_tensor([before])))
    kept = images.tensor_to_pictures(through)[0].astype(float)
    far = []
    for strength in (0.1, 0.5, 1.0):
        (after,) = sampling.generate(base, "a red figure", start=Start(before, strength), steps=10)
        far.append(np.abs(after - kept).mean())
    assert far[0] < 0.5 * far[1] < far[1] < far[2]


def test_the_picture_decides_the_size_and_the_mask_follows(sd1: Base) -> None:
    before = picture(width=72, height=56)
    (after,) = sampling.generate(sd1, "x", start=Start(before, mask=mask(width=72, height=56)), steps=2)
    assert after.shape == before.shape
    (resized,) = sampling.generate(
        sd1, "x", start=Start(before, mask=mask(width=72, height=56)), steps=2, width=64, height=64
    )
    assert resized.shape == (64, 64, 3)


def test_the_map_of_an_inpainting_adapter_is_minus_one_in_the_hole(sd1: Base) -> None:
    before, hole = picture(), mask() > 0
    made = inpaint_cond(before, hole)
    assert made.shape == (1, 3, SIZE, SIZE)
    assert bool((made[0][:, torch.from_numpy(hole)] == -1).all())
    outside = made[0].permute(1, 2, 0).numpy()[~hole]
    assert np.array_equal(outside, before[~hole].astype(np.float32) / 255)
    control = Control(controlnet_of(sd1), made)
    start = Start(before, mask=mask())
    (filled,) = sampling.generate(sd1, "x", controls=[control], start=start, steps=2)
    assert filled.shape == before.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strength": 0.0}, "strength must be a number above 0 and at most 1, not 0.0"),
        ({"strength": float("nan")}, "strength must be a number above 0"),
        ({"mask": np.zeros((SIZE, SIZE), np.uint8)}, "the mask is black: there is nothing to redraw"),
        ({"mask": np.ones((8, 16), np.uint8) * 255}, r"the mask is \(16, 8\) .* and its picture \(64, 64\)"),
        ({"mask": np.ones((SIZE, SIZE), np.int64)}, "a mask is uint8, bool, or float"),
        ({"picture": np.full((8, 8), 7.0)}, "float values from 7 to 7; they must lie in"),
        ({"picture": "gone.png"}, "gone.png does not exist"),
        ({"picture": None}, "a picture is a path, bytes, a PIL image, an array or a tensor, not NoneType"),
        (
            {"mask": torch.ones(SIZE, SIZE)},
            "a mask is a path, a PIL image, or an array, uint8, bool or float .*, not a Tensor",
        ),
        ({"strength": None}, "strength must be a number above 0 and at most 1, not None"),
    ],
)
def test_starts_that_are_not_allowed(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Start(**{"picture": picture(), **given})


def test_a_picture_to_start_from_may_be_given_in_any_way(tmp_path: Path) -> None:
    before = picture()
    images.write_png(tmp_path / "photo.png", before)
    for given in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(before)):
        assert np.array_equal(Start(given).picture, before)  # type: ignore[arg-type]


def test_a_mask_may_be_a_file_or_a_pil_image(tmp_path: Path) -> None:
    as_image = Image.fromarray(mask()).convert("L")
    as_image.save(tmp_path / "hole.png")
    for given in (as_image, tmp_path / "hole.png", str(tmp_path / "hole.png")):
        start = Start(picture(), mask=given)  # type: ignore[arg-type]
        assert np.array_equal(start.hole(), Start(picture(), mask=mask()).hole())
        controls = [Control(torch.nn.Identity(), cond(), mask=one) for one in (given, mask())]
        assert torch.equal(*(control.region(SIZE, SIZE) for control in controls))

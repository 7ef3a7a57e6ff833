"""CLIP guidance with a tiny CLIP of random weights: its gradient, what it changes, and the command."""

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from outcomes import Run
from sampling_peers import cond, controlnet_of

from controlkit import diffusion, images, sampling
from controlkit.base import Base, load_base
from controlkit.clip_guidance import Clip, ClipGuidance, ClipGuide, load_clip, spherical_distance
from controlkit.control import Control
from controlkit.images import read_png_text
from controlkit.memory import Memory
from controlkit.memory_plan import Estimate, Request, peak_of
from controlkit.sampling import Savings, Start, Tiles

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder))


def test_vectors_are_those_of_the_library(clip: Clip, folder: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder, local_files_only=True)
    smooth = np.kron(np.random.default_rng(0).integers(60, 190, (4, 6, 3)), np.ones((16, 16, 1)))
    picture = smooth.astype(np.uint8)
    seen = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)(picture, return_tensors="pt")
    tokens = clip.tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        result = model(**seen, **tokens)
        ours = clip.encode_pixels(images.picture_to_tensor([picture]))
    torch.testing.assert_close(clip.encode_prompt(PROMPT), result.text_embeds, atol=1e-5, rtol=0)
    # The library rounds the resized pixels to whole numbers.
    torch.testing.assert_close(ours, result.image_embeds, atol=2e-2, rtol=0)
    assert torch.equal(clip.encode_prompt("a (red:1.3) cube", syntax="a1111"), clip.encode_prompt(PROMPT))
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_the_distance_is_half_the_squared_angle() -> None:
    angles = torch.tensor([0.0, 0.3, 1.0, 2.5, torch.pi], dtype=torch.float64)
    a = torch.stack([angles.cos(), angles.sin()], dim=1)
    b = torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand_as(a)
    torch.testing.assert_close(spherical_distance(a, b), angles**2 / 2, atol=1e-2, rtol=0)
    torch.testing.assert_close(spherical_distance(a, b)[:-1], angles[:-1] ** 2 / 2)
    for same in (a[:1], -a[:1]):  # together and opposite: nothing is not a number
        a_0 = same.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(spherical_distance(a_0, b[:1]).sum(), a_0)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("side", [8, 16])
def test_the_gradient_is_that_of_finite_differences(sd1: Base, clip: Clip, side: int) -> None:
    """In float64; 16 latents are 128 pixels, of which the CLIP of 32 pixels is shown a fourth."""
    double = replace(
        clip, model=copy.deepcopy(clip.model).double(), mean=clip.mean.double(), std=clip.std.double()
    )
    base = replace(sd1, vae=copy.deepcopy(sd1.vae).double())
    guide = ClipGuide(base, ClipGuidance(double, 1.0), PROMPT)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn((1, 4, side, side), generator=generator, dtype=torch.float64)
    gradient = guide.gradient(x_0)
    assert gradient.dtype == torch.float64
    for _ in range(3):
        way = torch.randn(x_0.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            further, back = (guide.distance(x_0 + sign * 1e-5 * way) for sign in (1, -1))
        slope = float((further - back) / 2e-5)
        assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-5)
        assert abs(slope) > 1e-5


def test_what_is_judged_is_the_picture_that_the_base_would_decode(sd1: Base, clip: Clip) -> None:
    """Of fewer latents where it is larger than the CLIP's on both sides: here 64 pixels high, not 32."""
    x_0 = torch.randn((1, 4, 8, 16), generator=torch.Generator().manual_seed(0))
    guide = ClipGuide(sd1, ClipGuidance(clip, 50.0), PROMPT)
    with torch.no_grad():
        pixels = sd1.decode_latents(torch.nn.functional.avg_pool2d(x_0, 2))
        wanted = spherical_distance(clip.encode_pixels(pixels), clip.encode_prompt(PROMPT))
        torch.testing.assert_close(guide.distance(x_0), wanted)
    found = [guide(x_0, x_0, torch.tensor(t)) for t in (399.6, 400.0)]  # as Euler's timesteps are
    assert torch.equal(*found)
    assert clip.encode_prompt(" ".join([PROMPT] * 60)).shape == guide.target.shape  # its end is cut off


def test_half_precision_has_the_same_gradient(clip: Clip, folder: Path) -> None:
    x_0 = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(0))
    gradients = [
        ClipGuide(
            load_base("tiny", dtype=dtype), ClipGuidance(load_clip(str(folder), dtype=dtype), 1.0), PROMPT
        ).gradient(x_0)
        for dtype in (torch.float32, torch.float16)
    ]
    single, half = gradients
    assert half.dtype == torch.float32
    assert (single - half).norm() < 0.05 * single.norm()


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_the_prediction_implies_the_moved_latents(sd1: Base, clip: Clip, prediction_type: str) -> None:
    base = replace(sd1, scheduler_config={**sd1.scheduler_config, "prediction_type": prediction_type})
    generator = torch.Generator().manual_seed(1)
    model_pred, x_t = torch.randn((2, 2, 4, 8, 8), generator=generator)
    for step in (5, 400, 950):
        t = torch.tensor([step, step])
        told = (x_t, t, base.alphas_cumprod)
        x_0 = diffusion.predict_x0(prediction_type, model_pred, *told)
        torch.testing.assert_close(
            diffusion.prediction_of(prediction_type, x_0, *told), model_pred, atol=2e-5, rtol=1e-5
        )
        guide = ClipGuide(base, ClipGuidance(clip, 50.0), PROMPT)
        moved = diffusion.predict_x0(prediction_type, guide(model_pred, x_t, torch.tensor(step)), *told)
        expected = x_0 - float(1 - base.alphas_cumprod[step]) * 50.0 * torch.cat(
            [guide.gradient(row[None]) for row in x_0]
        )
        torch.testing.assert_close(moved, expected, atol=1e-4, rtol=1e-4)


def test_an_unknown_prediction_type() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="unknown prediction type 'noise'"):
        diffusion.prediction_of("noise", x, x, torch.tensor([0]), torch.tensor([0.5]))


def distances(base: Base, clip: Clip, scale: float, **request: Any) -> list[float]:
    """How far finished pictures are from the prompt."""
    pictures = sampling.generate(base, PROMPT, clip_guidance=ClipGuidance(clip, scale), **request)
    with torch.no_grad():
        vectors = clip.encode_pixels(images.picture_to_tensor(pictures))
        return spherical_distance(vectors, clip.encode_prompt(PROMPT)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["euler", "ddim", "dpm++"])
def test_pictures_come_nearer_to_the_prompt_as_the_scale_rises(clip: Clip, scheduler: str) -> None:
    """With the bundled base, for every seed; what a VAE of random weights decodes hardly changes."""
    base = load_base("tiny")
    request: dict[str, Any] = {"seeds": range(3), "steps": 6, "scheduler": scheduler}
    off, some, much = (np.array(distances(base, clip, scale, **request)) for scale in (0.0, 50.0, 500.0))
    assert (some < off).all()
    assert (much < some).all()
    assert (off - much).min() > 0.01


def test_scale_0_and_a_share_of_no_steps_are_bit_for_bit_without(sd1: Base, clip: Clip) -> None:
    controls = [Control(controlnet_of(sd1), cond())]

    def made(**options: Any) -> np.ndarray:
        return sampling.generate(sd1, PROMPT, controls=controls, steps=3, **options)[0]

    assert np.array_equal(made(), made(clip_guidance=ClipGuidance(clip, 0.0)))
    strong = {"clip_guidance": ClipGuidance(clip, 1e3)}
    assert not np.array_equal(made(), made(**strong))
    never, half = (Savings(guidance_until=share) for share in (0.0, 0.5))
    assert np.array_equal(made(savings=never), made(savings=never, **strong))
    assert not np.array_equal(made(savings=half), made(savings=half, **strong))


def test_picture_k_of_several_is_picture_k_alone(sd1: Base, clip: Clip) -> None:
    request: dict[str, Any] = {"steps": 3, "clip_guidance": ClipGuidance(clip, 1e3)}
    several = sampling.generate(sd1, PROMPT, seeds=(1, 2, 3), **request)
    (alone,) = sampling.generate(sd1, PROMPT, seeds=(2,), **request)
    assert np.array_equal(several[1], alone)
    (small,) = sampling.generate(sd1, PROMPT, seeds=(2,), memory=Memory(1, True, True), **request)
    assert np.array_equal(small, alone)
    batched = sampling.generate(sd1, PROMPT, seeds=(1, 2, 3), batch_size=3, **request)
    assert np.abs(np.stack(batched).astype(int) - np.stack(several)).max() <= 1
    guide = ClipGuide(sd1, ClipGuidance(clip, 1e3), PROMPT)
    x = torch.randn((2, 3, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(guide(*x, torch.tensor(500))[1:2], guide(*x[:, 1:2], torch.tensor(500)))


def test_where_little_memory_is_the_clip_and_the_decoder_are_at_work_in_the_loop(
    sd1: Base, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_work: list[Any] = []
    real = sampling.at_work

    @contextlib.contextmanager
    def noted(memory: Memory | None, base: Base, *networks: Any) -> Iterator[None]:
        with real(memory, base, *networks):
            at_work.extend(networks)
            yield
            at_work.clear()

    monkeypatch.setattr(sampling, "at_work", noted)
    ran: list[str] = []

    def check(network: torch.nn.Module, name: str) -> None:
        ran.append(name)
        assert network in at_work, name

    networks = {"clip": clip.model, "vae": sd1.vae, "unet": sd1.unet}
    parts = {
        "clip": [clip.model.vision_model, clip.model.text_model],
        "vae": [sd1.vae.decoder],
        "unet": [sd1.unet.mid_block],
    }
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: check(networks[name], name))
        for name, own in parts.items()
        for part in own
    ]
    request: dict[str, Any] = {"steps": 2, "clip_guidance": ClipGuidance(clip, 10.0)}
    sampling.generate(sd1, PROMPT, memory=Memory(1, offload=True), guidance=1.0, **request)
    for hook in hooks:
        hook.remove()
    assert ran == ["clip", *["unet", "vae", "clip"] * 2, "vae"]


@pytest.mark.slow
def test_memory_is_reckoned_with_the_gradient(sd1: Base, clip: Clip) -> None:
    plain, guided = (Estimate(sd1, [], Request(96, 64), judge) for judge in (None, clip))
    weights = sum(parameter.nbytes for parameter in clip.model.parameters())
    assert guided.phases(Memory(1))["text"] - plain.phases(Memory(1))["text"] >= weights
    guide = ClipGuide(sd1, ClipGuidance(clip, 1.0), PROMPT)
    x_0 = torch.randn((1, 4, 8, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        forward = peak_of(lambda: guide.distance(x_0))
        truth = peak_of(lambda: guide.gradient(x_0))
    assert truth > 1.5 * forward
    assert guided._looking() == pytest.approx(truth, rel=0.05)


def test_it_goes_with_starts_holes_and_tiles_and_keeps_no_graph(sd1: Base, clip: Clip) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    mask = np.zeros((64, 96), np.uint8)
    mask[:, :40] = 255
    seen: list[torch.Tensor] = []
    for more in ({"start": Start(picture, 0.7)}, {"start": Start(picture, 1.0, mask)}, {"tiles": Tiles(64)}):
        made, plain = (
            sampling.generate(
                sd1,
                PROMPT,
                steps=3,
                width=96,
                height=64,
                guidance=1.0,
                clip_guidance=ClipGuidance(clip, scale),
                callback=lambda done, n, latents: seen.append(latents),
                **more,  # type: ignore[arg-type]
            )[0]
            for scale in (1e3, 0.0)
        )
        assert not np.array_equal(made, plain)
        if more.get("start") is not None and more["start"].mask is not None:  # type: ignore[union-attr]
            assert np.array_equal(made[:, 48:], picture[:, 48:])
    assert not any(latents.requires_grad for latents in seen)
    assert all(parameter.grad is None for parameter in (*sd1.vae.parameters(), *clip.model.parameters()))


def test_inference_mode_is_no_hindrance_within_it_or_after_it(folder: Path) -> None:
    """Weights that are laid out in it would let no gradient pass, neither CLIP's nor a training's."""
    with torch.inference_mode():
        base, clip = load_base("tiny"), load_clip(str(folder))
        network = controlnet_of(base)
        request: dict[str, Any] = {"steps": 2, "clip_guidance": ClipGuidance(clip, 30.0)}
        (within,) = sampling.generate(base, PROMPT, controls=[Control(network, cond())], width=64, height=64)
        (guided,) = sampling.generate(base, PROMPT, **request)
    assert not any(weight.is_inference() for part in (base.unet, base.vae) for weight in part.parameters())
    (after,) = sampling.generate(base, PROMPT, controls=[Control(network, cond())], width=64, height=64)
    assert np.array_equal(within, after)
    assert np.array_equal(guided, sampling.generate(base, PROMPT, **request)[0])


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf"), 1000.5])
def test_scales_outside_their_range(clip: Clip, scale: float) -> None:
    with pytest.raises(ValueError, match="clip_guidance must be a number from 0 to 1000, not"):
        ClipGuidance(clip, scale)


def test_folders_that_hold_no_clip(folder: Path, tmp_path: Path, sd1: Base) -> None:
    def refusal(place: object) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_clip(str(place))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "holds no CLIP: it has no config.json" in refusal(tmp_path)
    assert "'clip_text_model', not a CLIP with both halves" in refusal(Path(sd1.name) / "text_encoder")
    assert "no CLIP called 'clip-x' (did you mean 'clip-" in refusal("clip-x")
    assert "no CLIP 'openai/clip-vit-large-patch14': there is no such folder" in refusal("clip-l")
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "preprocessor_config.json").write_text('{"image_std": [1, 0, 1]}')
    assert "image_mean and image_std must be three numbers each" in refusal(broken)
    (broken / "preprocessor_config.json").unlink()
    assert load_clip(str(broken)).mean.flatten().tolist() == pytest.approx([0.4815, 0.4578, 0.4082], abs=1e-4)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is cut short" in refusal(broken)
    shutil.rmtree(broken)


@pytest.mark.slow
def test_the_command_records_and_repeats_it(generate: Run, run: Run, folder: Path, photo: Path) -> None:
    asked = ["--clip", folder, "--clip-guidance", 1000]
    generate("-o", "plain.png").done()
    generate(*asked, "-n", 2, "-o", "out.png").done()
    told = json.loads(read_png_text("out-2.png")["controlkit"])
    assert (told["clip"], told["clip_guidance"]) == (str(folder), 1000)
    run("generate", "--like", "out-2.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out-2.png").read_bytes()
    run("generate", "--like", "out-1.png", "--clip-guidance", 0, "-o", "off.png").done()
    assert np.array_equal(images.load_picture("off.png"), images.load_picture("plain.png"))
    assert not np.array_equal(images.load_picture("out-1.png"), images.load_picture("plain.png"))
    generate(*asked, "--hires", 1.5, "-o", "two.png").done()
    generate(*asked, "--memory", "4GB", "-o", "small.png").done()
    generate("--clip", folder, "--grid", "clip_guidance=0,1000", "-o", "grid.png").done()
    assert "add --clip MODEL" in generate("--clip-guidance", 100).refused()
    assert "add --clip MODEL" in generate("--grid", "clip_guidance=0,10").refused()
    assert "from 0 to 1000, not nan" in generate("--clip", folder, "--clip-guidance", "nan").refused()
    assert "no CLIP called 'nowhere'" in generate("--clip", "nowhere", "--clip-guidance", 9).refused()
    assert "holds no CLIP: it" in generate("--clip", photo.parent, "--clip-guidance", 9).refused()

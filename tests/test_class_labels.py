"""Bases that are told a picture or a class, against diffusers' pipeline and plain loops of its networks."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from outcomes import Run
from PIL import Image
from sampling_peers import assert_same, cond, controlnet_of, our_latents, parts_of

from controlkit import sampling
from controlkit.base import Base, load_base
from controlkit.base_parts import is_complete
from controlkit.class_labels import Labels, Told
from controlkit.control import Control
from controlkit.controlnet import from_base, lock, predict
from controlkit.folders import quiet_libraries
from controlkit.images import read_png_text, write_png
from controlkit.memory import Memory
from controlkit.memory_plan import Estimate, Request
from controlkit.sampling import Tiles

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

PICTURE = np.random.default_rng(3).integers(0, 256, (50, 70, 3), np.uint8)
CLASSES = 5


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("told")
    return {
        "unclip": tiny_models.build_unclip(folder / "unclip"),
        "classes": tiny_models.build(folder / "classes", "sd1", sample_size=8, num_class_embeds=CLASSES),
    }


@pytest.fixture(scope="module")
def unclip(folders: dict[str, Path]) -> Base:
    return load_base(str(folders["unclip"]))


@pytest.fixture(scope="module")
def classes(folders: dict[str, Path]) -> Base:
    return load_base(str(folders["classes"]))


def pipeline_latents(base: Base, *, seed: int, scheduler: str, level: int, **rest: Any) -> torch.Tensor:
    """What diffusers' pipeline makes of PICTURE."""
    from diffusers import StableUnCLIPImg2ImgPipeline

    with quiet_libraries():
        theirs = StableUnCLIPImg2ImgPipeline.from_pretrained(base.name, local_files_only=True)
    parts = {**theirs.components, **parts_of(base, [], scheduler)}
    del parts["controlnet"]
    pipeline = StableUnCLIPImg2ImgPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        Image.fromarray(PICTURE),
        "a red cube",
        height=64,
        width=64,
        noise_level=level,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
        **rest,
    )[0]


@pytest.mark.parametrize(("level", "scheduler"), [(0, "ddim"), (300, "ddim"), (999, "euler-a")])
def test_a_picture_is_told_as_the_pipeline_tells_it(unclip: Base, level: int, scheduler: str) -> None:
    assert unclip.prediction_type == "v_prediction"
    assert sampling.default_guidance(unclip) == 10.0
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": scheduler}
    ours = our_latents(unclip, [], **request, guidance=5.0, told=Told(PICTURE, level))
    theirs = pipeline_latents(
        unclip, seed=7, scheduler=scheduler, level=level, num_inference_steps=4, guidance_scale=5.0
    )
    assert_same(ours, theirs)
    other = our_latents(unclip, [], **request, guidance=5.0, told=Told(255 - PICTURE, level))
    assert level == 999 or (ours - other).abs().max() > 1e-2


def test_a_picture_without_guidance_and_with_a_negative_prompt_equals_the_pipeline(unclip: Base) -> None:
    request: dict[str, Any] = {"seed": 3, "steps": 3, "scheduler": "ddim", "told": Told(PICTURE, 50)}
    same: dict[str, Any] = {"seed": 3, "scheduler": "ddim", "level": 50, "num_inference_steps": 3}
    assert_same(
        our_latents(unclip, [], **request, guidance=1.0), pipeline_latents(unclip, **same, guidance_scale=1.0)
    )
    assert_same(
        our_latents(unclip, [], **request, guidance=4.0, negative_prompt="blue"),
        pipeline_latents(unclip, **same, guidance_scale=4.0, negative_prompt="blue"),
    )


def plain_loop(
    base: Base, controlnet: Any, labels: torch.Tensor, told: torch.Tensor | None, latents: torch.Tensor
) -> torch.Tensor:
    """Four steps of DDIM with guidance 5, made of nothing but diffusers' forward passes."""
    text = base.encode_prompts(["", "a red cube"]).encoder_hidden_states
    scheduler = sampling.make_scheduler("ddim", base)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        both = torch.cat([latents, latents])
        down, mid = controlnet(
            both, t, text, torch.cat([cond(), cond()]), 0.7, class_labels=told, return_dict=False
        )
        model_pred = base.unet(
            both,
            t,
            text,
            class_labels=labels,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample
        uncond, conditional = model_pred.chunk(2)
        latents = scheduler.step(uncond + 5 * (conditional - uncond), t, latents).prev_sample
    return latents


def copy_told(base: Base) -> Any:
    """A control network that is told what the base is."""
    from diffusers import ControlNetModel

    return lock(tiny_models.randomize_zero_convs(ControlNetModel.from_unet(base.unet)))


@pytest.mark.parametrize("is_told", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("kind", ["unclip", "classes"])
def test_with_a_control_it_equals_a_plain_loop(
    load: Callable[[str], Base], unclip: Base, classes: Base, kind: str, is_told: bool
) -> None:
    """The networks of the family's other bases are told nothing; a copy of the encoder is told the same."""
    base = unclip if kind == "unclip" else classes
    controlnet = copy_told(base) if is_told else controlnet_of(load(base.family))
    told = Told(PICTURE, 20) if kind == "unclip" else Told(class_label=3)
    ours = our_latents(
        base, [Control(controlnet, cond(), scale=0.7)], seed=7, steps=4, scheduler="ddim", told=told
    )
    generator = torch.Generator().manual_seed(7)
    if kind == "unclip":
        encoder = base.picture_encoder
        assert encoder is not None
        vector = encoder.noised(encoder.encode(PICTURE), 20, [generator])
        labels = torch.cat([torch.zeros_like(vector), vector])
    else:
        labels = torch.tensor([3, 3])
    noise = torch.randn((1, 4, 8, 8), generator=generator)
    with torch.no_grad():
        theirs = plain_loop(base, controlnet, labels, labels if is_told else None, noise)
    assert_same(ours, theirs)
    other = Told(255 - PICTURE, 20) if kind == "unclip" else Told(class_label=2)
    different = our_latents(
        base, [Control(controlnet, cond(), scale=0.7)], seed=7, steps=4, scheduler="ddim", told=other
    )
    assert (ours - different).abs().max() > 1e-3


def test_an_sdxl_that_is_told_a_class_predicts_what_the_library_does() -> None:
    unet = tiny_models.tiny_unet("sdxl", num_class_embeds=CLASSES)
    generator = torch.Generator().manual_seed(0)
    x, text, pooled = (
        torch.randn(size, generator=generator) for size in ((2, 4, 8, 8), (2, 77, 64), (2, 32))
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
    t, labels = torch.tensor([7, 500]), torch.tensor([1, 4])
    with torch.no_grad():
        ours = predict(unet, x, t, text, added_cond=added, class_labels=labels)
        theirs = unet(x, t, text, class_labels=labels, added_cond_kwargs=added).sample
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["unclip", "classes"])
def test_picture_k_of_several_is_picture_k_alone_and_the_picture_is_encoded_once(
    unclip: Base, classes: Base, kind: str
) -> None:
    base = unclip if kind == "unclip" else classes
    told = Told(PICTURE, 400) if kind == "unclip" else Told(class_label=1)
    request: dict[str, Any] = {"steps": 3, "scheduler": "euler-a", "told": told}
    calls: list[int] = []
    hooks = [
        part.register_forward_hook(lambda *_: calls.append(1))
        for part in base.encoders
        if hasattr(part, "vision_model")
    ]
    several = sampling.generate(base, "x", seeds=(4, 5, 6), **request)
    for hook in hooks:
        hook.remove()
    assert len(calls) == (kind == "unclip")
    assert len({picture.tobytes() for picture in several}) == 3
    (alone,) = sampling.generate(base, "x", seeds=(5,), **request)
    assert np.array_equal(several[1], alone)
    for more in ({"batch_size": 3}, {"memory": Memory(3, one_branch=True)}):
        batched = sampling.generate(base, "x", seeds=(4, 5, 6), **request, **more)
        assert np.abs(np.stack(batched).astype(int) - np.stack(several)).max() <= 1


def test_the_first_class_is_told_as_any_other(classes: Base) -> None:
    one = [torch.Generator()]
    labels = [Labels(classes, Told(class_label=k)).draw(one, branches=2) for k in (0, 4)]
    assert [label.tolist() for label in labels if label is not None] == [[0], [4]]


def test_what_both_branches_are_told_alike_keeps_their_common_start(unclip: Base, classes: Base) -> None:
    rows: list[int] = []
    for base, told, expected in ((classes, Told(class_label=1), 1), (unclip, Told(PICTURE), 2)):
        rows.clear()
        resnet = base.unet.down_blocks[0].resnets[0]
        hook = resnet.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        our_latents(base, [], seed=0, steps=1, scheduler="ddim", told=told)
        hook.remove()
        assert rows == [expected]


@pytest.mark.slow
def test_tiles_and_little_memory(unclip: Base) -> None:
    told, size = Told(PICTURE, 10), {"width": 96, "height": 64}
    (tiled,) = sampling.generate(unclip, "x", steps=2, told=told, tiles=Tiles(64), **size)
    assert tiled.shape == (64, 96, 3)
    (plain,) = sampling.generate(unclip, "x", steps=2, told=told, **size)
    (small,) = sampling.generate(unclip, "x", steps=2, told=told, memory=Memory(1, offload=True), **size)
    assert np.array_equal(plain, small)
    on_gpu = replace(unclip, device=torch.device("cuda"))
    text, alone = (
        Estimate(base, [], Request(64, 64)).phases(Memory(1, offload=True))["text"]
        for base in (on_gpu, replace(on_gpu, picture_encoder=None))
    )
    assert unclip.picture_encoder is not None
    encoder = unclip.picture_encoder.image_encoder
    assert text - alone >= sum(p.nbytes for p in encoder.parameters())


@pytest.mark.slow
def test_a_class_does_not_stop_the_reckoning(classes: Base) -> None:
    estimate = Estimate(classes, [], Request(64, 64, pictures=2))
    assert estimate.total(Memory(1)) < estimate.total(Memory(2))


@pytest.mark.parametrize(
    ("kind", "told", "message"),
    [
        ("unclip", Told(), "is told a picture besides the text: give one with --image PICTURE"),
        ("unclip", Told(PICTURE, class_label=0), "is told no class"),
        (
            "sd1",
            Told(PICTURE),
            r"told no picture: bases of the unCLIP kind are, as stabilityai/.*give --from",
        ),
        ("sd1", Told(class_label=0), "is told no class: it knows none"),
        ("classes", Told(), "is told a class: give --class N, from 0 to 4"),
        ("classes", Told(class_label=5), "knows 5 classes: --class must be from 0 to 4, not 5"),
    ],
)
def test_what_a_base_is_not_told(
    sd1: Base, unclip: Base, classes: Base, kind: str, told: Told, message: str
) -> None:
    base = {"sd1": sd1, "unclip": unclip, "classes": classes}[kind]
    with pytest.raises(ValueError, match=message):
        sampling.generate(base, "x", told=told)


def test_numbers_outside_their_range() -> None:
    with pytest.raises(ValueError, match="image_noise must be a whole number from 0 to 999, not 1000"):
        Told(PICTURE, 1000)
    with pytest.raises(ValueError, match="a class must be a whole number from 0, not -1"):
        Told(class_label=-1)
    with pytest.raises(ValueError, match=r"is uint8 \(H, W, 3\), not float64"):
        Told(PICTURE / 255)
    with pytest.raises(ValueError, match="a picture that a base is told is an array, not str"):
        Told("photo.png")  # type: ignore[arg-type]


def test_no_control_network_is_copied_from_such_a_base_or_fits_another(
    load: Callable[[str], Base], unclip: Base, classes: Base
) -> None:
    for base in (unclip, classes):
        with pytest.raises(ValueError, match=r"told a class or a picture .* train the adapter on the base"):
            from_base(base)
    for base, told in ((unclip, "a vector of 64 numbers"), (classes, "one of 5 classes")):
        control = Control(copy_told(base), cond())
        with pytest.raises(ValueError, match=f"told {told} besides the text, and the base .* nothing"):
            sampling.generate(load(base.family), "x", controls=[control])


def test_the_lock_covers_the_pictures_encoder(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["unclip"]))
    before = base.digest()
    assert base.picture_encoder is not None
    weight = base.picture_encoder.image_encoder.visual_projection.weight
    assert not weight.requires_grad
    weight.data += 1
    assert base.digest() != before


def test_folders_of_which_a_part_is_missing_or_does_not_fit(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["unclip"], tmp_path / "broken")

    def refusal() -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            load_base(str(folder))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = folder / "unet" / "config.json"
    whole = config.read_text()
    told = json.loads(whole)
    config.write_text(json.dumps({**told, "class_embed_type": "identity"}))
    assert "class_embed_type" in refusal()
    config.write_text(json.dumps({**told, "class_embeddings_concat": True}))
    assert "class_embeddings_concat" in refusal()
    config.write_text(whole)
    normalizer = folder / "image_normalizer" / "config.json"
    file = folder / "feature_extractor" / "preprocessor_config.json"
    for damaged in (normalizer, file):
        kept = damaged.read_text()
        damaged.write_text("{")
        assert f"{damaged} is not valid JSON" in refusal()
        damaged.write_text(kept)
    assert is_complete(folder)
    tiny_models.replace_image_encoder(folder, projection_dim=48)
    assert "is told 64 numbers, which must be twice those of image_encoder (48)" in refusal()
    shutil.rmtree(folder / "image_encoder")
    assert not is_complete(folder), "or a cached copy of it would not be completed"
    assert "has no image_encoder/: its U-Net is told a vector" in refusal()


@pytest.mark.slow
def test_a_picture_on_the_command_line(run: Run, folders: dict[str, Path], photo: Path) -> None:
    fixed = ["generate", "a cube", "--base", folders["unclip"], "--steps", 2]
    run(*fixed, "--image", photo, "--image-noise", 30, "-n", 2, "-o", "out.png").done()
    told = json.loads(read_png_text("out-2.png")["controlkit"])
    assert (told["image"]["path"], told["image_noise"], told["class_label"]) == (str(photo), 30, None)
    again = run("generate", "--like", "out-2.png", "-o", "again.png")
    again.done()
    assert Path("again.png").read_bytes() == Path("out-2.png").read_bytes()
    write_png("other.png", PICTURE)
    run("generate", "--like", "out-2.png", "--image", "other.png", "-o", "other-out.png").done()
    assert Path("other-out.png").read_bytes() != Path("out-2.png").read_bytes()
    run(*fixed, "--image", photo, "--memory", "8GB", "--hires", 1.5, "-o", "two.png").done()
    run(*fixed, "--image", photo, "--grid", "image_noise=0,500", "-o", "grid.png").done()
    run("generate", "--like", "out-2.png", "--base", "tiny", "--steps", 1, "-o", "tiny.png").done()
    assert json.loads(read_png_text("tiny.png")["controlkit"])["image"] is None
    assert "give one with --image PICTURE" in run(*fixed).refused()
    assert "from 0 to 999, not 1000" in run(*fixed, "--image", photo, "--image-noise", 1000).refused()
    assert "add --image PICTURE" in run(*fixed, "--image-noise", 10).refused()
    assert "would overwrite" in run(*fixed, "--image", photo, "-o", photo).refused()
    assert "nowhere.png does not exist" in run(*fixed, "--image", "nowhere.png").refused()
    assert "told no picture" in run("generate", "x", "--image", photo).refused()
    write_png(photo, PICTURE)
    assert (
        "which has changed since; to use it as it is now, add --image"
        in run("generate", "--like", "out-2.png").refused()
    )


@pytest.mark.slow
def test_a_class_on_the_command_line(run: Run, folders: dict[str, Path]) -> None:
    fixed = ["generate", "a cube", "--base", folders["classes"], "--steps", 2]
    run(*fixed, "--class", 2, "-o", "out.png").done()
    assert json.loads(read_png_text("out.png")["controlkit"])["class_label"] == 2
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    run("generate", "--like", "out.png", "--class", 0, "-o", "other.png").done()
    assert Path("other.png").read_bytes() != Path("out.png").read_bytes()
    run(*fixed, "--grid", "class_label=0..2", "-o", "grid.png").done()
    assert "must be from 0 to 4, not 5" in run(*fixed, "--class", 5).refused()
    assert "whole number from 0, not -1" in run(*fixed, "--class", -1).refused()
    assert "is told a class: give --class N" in run(*fixed).refused()
    assert "the base tiny is told no class" in run("generate", "x", "--class", 1).refused()

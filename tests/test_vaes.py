"""Another autoencoder for a base: pictures equal diffusers' pipelines with it, and what is refused."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flops
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from fakes import faked
from outcomes import Run
from safetensors.torch import load_file, save_file
from sampling_peers import assert_same, cond, controlnet_of, our_latents, pipeline_of
from test_starting import IMG2IMG, INPAINT, mask, picture, theirs
from torch._subclasses.fake_tensor import FakeTensorMode

from controlkit import sampling
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.hub import wanted_files
from controlkit.images import load_picture, picture_to_tensor, read_png_text, tensor_to_pictures
from controlkit.memory import HOST, Memory
from controlkit.memory_plan import Estimate, Request
from controlkit.sampling import Start, Tiles
from controlkit.vaes import HUB_FILES, check_vae, with_vae

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

KINDS = ("tiny", "kl")
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
    "num_encoder_blocks": (1, 1, 1, 1),
    "num_decoder_blocks": (1, 1, 1, 1),
    "scaling_factor": 0.9,
}
KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "norm_num_groups": 4,
    "sample_size": 64,
}


def write(folder: Path, kind: str, **changes: Any) -> Path:
    """An autoencoder of random weights, as its repository holds it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        vae = AutoencoderTiny(**{**TINY, **changes}) if kind == "tiny" else AutoencoderKL(**{**KL, **changes})
    vae.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind."""
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def refusal(base: Base, name: object) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what is looked at
        with_vae(base, str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_the_given_base_stays_as_it_is(sd1: Base, folders: dict[str, Path], kind: str) -> None:
    before = sd1.digest()
    other = with_vae(sd1, str(folders[kind]))
    assert sd1.digest() == before != other.digest()
    assert (other.unet, other.name, other.vae_factor) == (sd1.unet, sd1.name, 8)
    assert not other.vae.training
    assert not any(p.requires_grad for p in other.vae.parameters())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_equal_the_pipelines(
    load: Callable[[str], Base], folders: dict[str, Path], family: str, kind: str
) -> None:
    base = with_vae(load(family), str(folders[kind]))
    control = Control(controlnet_of(base), cond(), scale=0.8)
    (ours,) = sampling.generate(base, "a cube", controls=[control], steps=3, guidance=5.0, seeds=(7,))
    pixels = pipeline_of(base, [control], "ddim")(
        "a cube",
        image=[control.controlnet_cond],
        controlnet_conditioning_scale=[0.8],
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images
    (expected,) = tensor_to_pictures(pixels * 2 - 1)
    assert expected.std() > 5
    assert np.abs(ours.astype(int) - expected).max() <= 1
    latents = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        decoded = base.vae.decode(latents / base.vae.config.scaling_factor, return_dict=False)[0]
    assert torch.equal(base.decode_latents(latents), decoded)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheduler", [pytest.param("ddim", marks=pytest.mark.slow), "euler-a"])
def test_from_a_picture_equals_the_pipeline(
    load: Callable[[str], Base], folders: dict[str, Path], family: str, kind: str, scheduler: str
) -> None:
    """A scheduler that draws, too, draws what it would: a tiny autoencoder draws nothing before it."""
    base = with_vae(load(family), str(folders[kind]))
    control = Control(controlnet_of(base), cond(), scale=0.8)
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": scheduler}
    start = Start(picture(), strength=0.6)
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(IMG2IMG[family], base, control, start, **request))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [pytest.param(1.0, marks=pytest.mark.slow), 0.6])
def test_a_hole_is_filled_as_by_the_pipeline(
    load: Callable[[str], Base], folders: dict[str, Path], family: str, kind: str, strength: float
) -> None:
    base = with_vae(load(family), str(folders[kind]))
    control = Control(controlnet_of(base), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim"}
    start = Start(picture(), strength=strength, mask=mask())
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(INPAINT[family], base, control, start, **request))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_a_base_of_nine_channels_equals_the_pipeline(
    sd1: Base, folders: dict[str, Path], strength: float
) -> None:
    base = with_vae(tiny_models.nine_channels(sd1), str(folders["tiny"]))
    control = Control(controlnet_of(sd1), cond())
    request: dict[str, Any] = {"seed": 7, "steps": 5, "scheduler": "ddim"}
    start = Start(picture(), strength=strength, mask=mask())
    ours = our_latents(base, [control], start=start, **request)
    assert_same(ours, theirs(INPAINT["sd1"], base, control, start, **request))


def test_a_tiny_autoencoder_draws_nothing(sd1: Base, folders: dict[str, Path]) -> None:
    base = with_vae(sd1, str(folders["tiny"]))
    pixel_values = picture_to_tensor([picture()])
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    latents = base.encode_pictures(pixel_values, generator=generator)
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(latents, base.encode_pictures(pixel_values))
    with torch.no_grad():
        assert torch.equal(latents, base.vae.encode(pixel_values).latents * 0.9)


def test_what_a_tiny_autoencoder_saves() -> None:
    """TAESD's real size beside SD1.5's autoencoder, for a picture of 512 pixels."""
    spent = []
    for made in (AutoencoderTiny, partial(AutoencoderKL, **tiny_models.SD15_VAE)):
        with torch.device("meta"):
            vae = made()
        with FakeTensorMode(), torch.no_grad(), flops.counter() as counter:
            faked(vae).decode(torch.empty(1, 4, 64, 64))
        spent.append(counter.get_total_flops())
    assert 17 < spent[1] / spent[0] < 18.5


# --- memory ---


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_one_by_one(sd1: Base, folders: dict[str, Path], kind: str) -> None:
    base = with_vae(sd1, str(folders[kind]))
    told: dict[str, Any] = {"steps": 1, "seeds": (1, 2)}
    plain = sampling.generate(base, "a cube", **told)
    small = sampling.generate(base, "a cube", **told, memory=Memory(2, sliced_vae=True))
    assert np.abs(np.stack(plain).astype(int) - np.stack(small)).max() <= 1
    assert not base.vae.use_slicing


def test_a_tiny_autoencoder_in_tiles_is_near(sd1: Base, folders: dict[str, Path]) -> None:
    base = with_vae(sd1, str(folders["tiny"]))
    start = Start(picture(width=576, height=64))
    request: dict[str, Any] = {"steps": 2, "start": start, "width": 576, "height": 64}
    (whole,) = sampling.generate(base, "a cube", **request)
    (tiled,) = sampling.generate(base, "a cube", **request, memory=Memory(1, tiled_vae=True))
    assert 0 < np.abs(whole.astype(int) - tiled).mean() < 1
    assert not base.vae.use_tiling
    (tiles,) = sampling.generate(base, "a cube", **request, tiles=Tiles(64))
    assert tiles.shape == whole.shape


@pytest.mark.slow
def test_what_decoding_needs_is_reckoned(sd1: Base, folders: dict[str, Path]) -> None:
    tiny = with_vae(sd1, str(folders["tiny"]))
    for request in (Request(1024, 1024), Request(1024, 1024, starts=True)):
        estimate = Estimate(replace(tiny, device=torch.device("cuda")), [], request)
        whole, tiled = (estimate.phases(Memory(1, tiled_vae=tiles))["decoding"] for tiles in (False, True))
        own = Estimate(replace(sd1, device=torch.device("cuda")), [], request)
        assert tiled < whole < own.phases(Memory(1))["decoding"]


def test_it_rests_where_the_base_rests(sd1: Base, folders: dict[str, Path]) -> None:
    rests = replace(sd1, device=torch.device("cuda"))
    assert with_vae(rests, str(folders["tiny"])).vae.device.type == HOST


@pytest.mark.parametrize(
    ("kind", "changes", "expected"),
    [("tiny", {}, torch.float16), ("kl", {}, torch.float32), ("kl", {"force_upcast": False}, torch.float16)],
)
def test_half_precision_keeps_in_float32_what_would_overflow(
    models: Path, tmp_path: Path, kind: str, changes: dict[str, Any], expected: torch.dtype
) -> None:
    base = load_base(str(models / "sdxl"), dtype=torch.float16)
    vae = with_vae(base, str(write(tmp_path / "vae", kind, **changes))).vae
    assert vae.dtype == expected


# --- where it is found, and what is refused ---


def test_a_folder_within_that_of_a_base(sd1: Base, models: Path) -> None:
    other = with_vae(sd1, str(models / "sd1"))
    latents = torch.ones(1, 4, 8, 8)
    assert torch.equal(other.decode_latents(latents), load_base(str(models / "sd1")).decode_latents(latents))


@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_cached_repository(sd1: Base, folders: dict[str, Path], inner: str) -> None:
    from huggingface_hub import constants

    owner = f"someone{inner}"
    repo = Path(constants.HF_HUB_CACHE) / f"models--{owner}--small"
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(folders["tiny"], snapshot / inner, dirs_exist_ok=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    check_vae(f"{owner}/small")
    assert isinstance(with_vae(sd1, f"{owner}/small").vae, AutoencoderTiny)
    for weights in (snapshot / inner).glob("*.safetensors"):
        weights.unlink()
    assert "only a part of it is in the cache" in refusal(sd1, f"{owner}/small")


def test_of_a_repository_only_the_autoencoder_is_downloaded() -> None:
    taesd = ["README.md", "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
    taesd += ["taesd_decoder.safetensors", "taesd_encoder.safetensors"]
    assert wanted_files(taesd, HUB_FILES) == ["config.json", "diffusion_pytorch_model.safetensors"]
    base = [
        f"{part}/diffusion_pytorch_model.{kind}" for part in ("unet", "vae") for kind in ("bin", "fp16.bin")
    ]
    base += ["model_index.json", "unet/config.json", "vae/config.json"]
    assert wanted_files(base, HUB_FILES) == ["vae/diffusion_pytorch_model.bin", "vae/config.json"]


def test_names_that_lead_nowhere(sd1: Base, tmp_path: Path, folders: dict[str, Path]) -> None:
    assert "no autoencoder called 'taesdd' (did you mean 'taesd'?)" in refusal(sd1, "taesdd")
    assert "no autoencoder 'madebyollin/taesd': there is no such folder, it is not in" in refusal(
        sd1, "taesd"
    )
    with pytest.raises(ValueError, match="no autoencoder called 'no where'"):
        check_vae("no where")
    assert "holds no autoencoder: neither config.json nor vae/config.json" in refusal(sd1, tmp_path)
    assert "this is a file" in refusal(sd1, folders["tiny"] / "config.json")


def test_damaged_files(sd1: Base, tmp_path: Path) -> None:
    folder = write(tmp_path / "vae", "tiny")
    weights = folder / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "is cut short" in refusal(sd1, folder)
    weights.write_bytes(b"version https://git-lfs")
    assert "is a Git LFS pointer" in refusal(sd1, folder)
    weights.unlink()
    assert "has no weights" in refusal(sd1, folder)
    weights.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        (
            {"_class_name": "UNet2DModel"},
            "the autoencoder is UNet2DModel, not AutoencoderKL or AutoencoderTi",
        ),
        ({"scaling_factor": "much"}, "says scaling_factor 'much': it is a number"),
        ({"scaling_factor": 0}, "scaling_factor must be a number above 0, not 0"),
        ({"shift_factor": 0.1}, "shift_factor 0.1 is not supported"),
        ({"num_decoder_blocks": [1, 2, 1, 1]}, "weights in"),
        ({"num_decoder_blocks": [1, 1]}, "cannot build AutoencoderTiny from"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        assert message in refusal(sd1, folder)
    (folder / "config.json").write_text("{")
    assert "is not valid JSON" in refusal(sd1, folder)


def test_a_tiny_autoencoder_in_one_file(sd1: Base, tmp_path: Path) -> None:
    vae = AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4)
    vae.save_pretrained(tmp_path / "taesd")
    file = tmp_path / "taesd" / "diffusion_pytorch_model.safetensors"
    check_vae(str(file))
    ours, theirs = (with_vae(sd1, str(place)).vae for place in (file, file.parent))
    assert type(ours) is AutoencoderTiny
    assert ours.config.scaling_factor == theirs.config.scaling_factor == 1
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    state = load_file(file)
    half = {key.removeprefix("encoder.layers."): t for key, t in state.items() if key.startswith("encoder.")}
    save_file(half, tmp_path / "taesd_encoder.safetensors")
    message = "is no autoencoder: it is a taesd, or one half of it, in its author's names, which are not read"
    assert message in refusal(sd1, tmp_path / "taesd_encoder.safetensors")
    save_file({f"encoder.layers.{key}": tensor for key, tensor in half.items()}, file)
    assert "is no autoencoder as SD1, SD2 and SDXL have it: it holds encoder.layers" in refusal(sd1, file)
    save_file({key: tensor for key, tensor in state.items() if "encoder.layers.1." not in key}, file)
    assert "lacks what is encoder.layers.1.conv.0.weight in AutoencoderTiny" in refusal(sd1, file)


def test_latents_that_are_not_like_the_bases(sd1: Base, tmp_path: Path) -> None:
    sixteen = write(tmp_path / "sixteen", "tiny", latent_channels=16)
    assert "its latents have 16 channels, and those of the base" in refusal(sd1, sixteen)
    three = {name: value[:3] for name, value in TINY.items() if isinstance(value, tuple)}
    coarse = write(tmp_path / "coarse", "tiny", **three)
    assert "its latents have 4 pixels to a side, and those of the base" in refusal(sd1, coarse)
    with pytest.warns(UserWarning, match=r"scales latents by 0\.13025, and that of the base .* by 0\.18215"):
        with_vae(sd1, str(write(tmp_path / "xl", "kl", scaling_factor=0.13025)))


def test_training_keeps_to_the_bases_own(models: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    """No latents are cached from a tiny autoencoder: a base that comes with one is refused when loaded."""
    folder = shutil.copytree(models / "sd1", tmp_path / "base")
    shutil.rmtree(folder / "vae")
    shutil.copytree(folders["tiny"], folder / "vae")
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="vae is AutoencoderTiny, not AutoencoderKL"):
        load_base(str(folder))


# --- the command ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tiny", "kl"])
def test_the_command_records_and_repeats_it(
    generate: Run, run: Run, folders: dict[str, Path], photo: Path, kind: str
) -> None:
    generate("-o", "plain.png").done()
    generate("--vae", folders[kind], "--from", photo, "--memory", "8GB", "-o", "out.png").done()
    text = read_png_text("out.png")
    assert json.loads(text["controlkit"])["vae"] == str(folders[kind])
    assert f"VAE: {folders[kind]}" in text["parameters"]
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    generate("--vae", folders[kind], "-o", "other.png").done()
    assert not np.array_equal(load_picture("other.png"), load_picture("plain.png"))
    run("generate", "--like", "other.png", "--vae", "", "-o", "own.png").done()
    assert Path("own.png").read_bytes() == Path("plain.png").read_bytes()


def test_another_base_decides_its_own(
    generate: Run, run: Run, folders: dict[str, Path], models: Path
) -> None:
    generate("--vae", folders["tiny"], "-o", "out.png").done()
    adapter = f"canny={models / 'canny-sdxl'}"
    run(
        "generate", "--like", "out.png", "--base", models / "sdxl", "--adapter", adapter, "-o", "xl.png"
    ).done()
    assert json.loads(read_png_text("xl.png")["controlkit"])["vae"] == ""


def test_a_name_is_checked_before_anything_is_loaded(generate: Run) -> None:
    refused = generate("--vae", "nowhere/at-all")
    assert "no autoencoder 'nowhere/at-all'" in refused.refused()
    assert "canny" not in refused.err

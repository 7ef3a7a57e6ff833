"""The locked base against diffusers' own pipelines, and every way in which loading one can fail."""

import copy
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from huggingface_hub import constants

from controlkit import base as bases
from controlkit import controlnet as pair
from controlkit import notices
from controlkit.base import Base, load_base, long_prompts_told_together
from controlkit.folders import quiet_libraries
from controlkit.images import picture_to_tensor
from controlkit.schedulers import make_scheduler

PROMPTS = ["a red figure", "", "Héllo 世界 👋", "a red figure"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: tiny_models.build(root / family, family) for family in tiny_models.FAMILIES}


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Base]:
    return {family: load_base(str(folder)) for family, folder in folders.items()}


@pytest.fixture
def broken(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the SD1 folder, to be damaged."""
    return Path(shutil.copytree(folders["sd1"], tmp_path / "base"))


def pipeline(folder: Path, family: str):
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    cls = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    with quiet_libraries():
        pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rewrite(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def message_of(folder: Path | str, **options: object) -> str:
    """The error of loading a folder: a ValueError of one line, within five seconds."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        load_base(str(folder), **options)
    assert time.monotonic() - start < 5
    return str(error.value)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_a_base_knows_of_itself(family: str, loaded: dict[str, Base]) -> None:
    base = loaded[family]
    assert base.family == family
    assert base.prediction_type == tiny_models.PREDICTION_TYPES[family]
    assert (base.resolution, base.vae_factor) == (128, 8)
    assert base.alphas_cumprod.dtype == torch.float64
    assert base.alphas_cumprod[-1].item() == pytest.approx(0.0046600, rel=1e-4)  # Stable Diffusion's


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_it_encodes_and_decodes_as_the_pipeline_does(
    family: str, folders: dict[str, Path], loaded: dict[str, Base]
) -> None:
    base, pipe = loaded[family], pipeline(folders[family], family)
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    for prompt in PROMPTS:
        text = base.encode_prompts([prompt])
        with torch.no_grad():
            theirs = pipe.encode_prompt(prompt, **options)
        assert torch.equal(text.encoder_hidden_states, theirs[0])
        assert text.encoder_hidden_states.shape[:2] == (1, 77)
        assert (text.pooled is None) == (family != "sdxl")
        if text.pooled is not None:
            assert torch.equal(text.pooled, theirs[2])

    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
        scale = pipe.vae.config.scaling_factor
        drawn = base.encode_pictures(pixels, generator=torch.Generator().manual_seed(1))
        assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(1)) * scale)
        latents = base.encode_pictures(pixels)
        assert torch.equal(latents, posterior.mean * scale)
        assert torch.equal(base.decode_latents(latents), pipe.vae.decode(latents / scale).sample)
    assert latents.shape == (1, 4, 8, 12)


def test_sdxl_conditioning_is_the_pipelines(folders: dict[str, Path], loaded: dict[str, Base]) -> None:
    base, pipe = loaded["sdxl"], pipeline(folders["sdxl"], "sdxl")
    pooled = base.encode_prompts(["a", "b"]).pooled
    added = base.added_cond(pooled, height=64, width=96)
    theirs = pipe._get_add_time_ids((64, 96), (0, 0), (64, 96), torch.float32, 32)
    assert added is not None
    assert torch.equal(added["time_ids"], theirs.expand(2, -1))
    assert torch.equal(added["text_embeds"], pooled)
    assert loaded["sd1"].added_cond(None, height=64, width=96) is None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_prompt_is_encoded_alike_alone_and_in_company(family: str, loaded: dict[str, Base]) -> None:
    together = loaded[family].encode_prompts(PROMPTS)
    assert len(together.encoder_hidden_states) == len(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = loaded[family].encode_prompts([prompt])
        assert torch.equal(together.encoder_hidden_states[row : row + 1], alone.encoder_hidden_states)
        if alone.pooled is not None and together.pooled is not None:
            assert torch.equal(together.pooled[row : row + 1], alone.pooled)


def test_a_long_prompt_is_cut_with_a_warning(loaded: dict[str, Base]) -> None:
    long = "word " * 100
    with pytest.warns(UserWarning, match="more than 77 tokens; the rest is ignored"):
        text = loaded["sd1"].encode_prompts([long])
    assert text.encoder_hidden_states.shape == (1, 77, 32)
    with pytest.raises(ValueError, match="no prompts"):
        loaded["sd1"].encode_prompts([])


def test_locked_means_the_same_bytes_after_training(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["sd1"]))
    modules = [base.unet, base.vae, *base.text_encoders]
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)
    before = base.digest()

    def train(*, sd_locked: bool) -> None:
        controlnet = tiny_models.randomize_zero_convs(pair.from_base(base, seed=0))
        optimizer = torch.optim.AdamW(pair.trainable_parameters(controlnet, base.unet, sd_locked=sd_locked))
        text = base.encode_prompts(["a"]).encoder_hidden_states
        latents = base.encode_pictures(torch.zeros(1, 3, 64, 64))
        hint = pair.encode_hint(controlnet, torch.ones(1, 3, 64, 64))
        given = (latents, torch.tensor([500]), text)
        residuals = pair.control_residuals(controlnet, *given, hint)
        pair.predict(base.unet, *given, residuals=residuals).square().mean().backward()
        optimizer.step()

    train(sd_locked=True)
    assert base.digest() == before
    train(sd_locked=False)
    assert base.digest() != before


def test_half_precision_keeps_sdxls_vae_in_float32(folders: dict[str, Path]) -> None:
    base = load_base(str(folders["sdxl"]), dtype=torch.float16)
    assert base.unet.dtype == torch.float16
    assert base.vae.dtype == torch.float32
    assert base.encode_pictures(torch.zeros(1, 3, 64, 64)).dtype == torch.float16
    assert load_base(str(folders["sd1"]), dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_float16_files_are_loaded_in_the_precision_asked_for(tmp_path: Path, loaded: dict[str, Base]) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_models.build(tmp_path / "half", "sd1")
    for file in folder.rglob("*.safetensors"):
        save_file({key: tensor.half() for key, tensor in load_file(file).items()}, file)
        file.rename(file.with_suffix(".fp16.safetensors"))
    base = load_base(str(folder))
    weight = base.unet.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, loaded["sd1"].unet.conv_in.weight.half().float())


def test_sharded_weights_are_loaded_and_a_missing_shard_is_named(
    broken: Path, loaded: dict[str, Base]
) -> None:
    (broken / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with quiet_libraries():
        loaded["sd1"].unet.save_pretrained(broken / "unet", max_shard_size="1MB")
    shards = sorted((broken / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    assert load_base(str(broken)).digest() == loaded["sd1"].digest()
    shards[1].unlink()
    assert f"{shards[1]} is missing" in message_of(broken)


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    load_base(str(folders["sdxl"]))
    assert capfd.readouterr() == ("", "")
    assert logging.is_progress_bar_enabled() == had_bar


@pytest.mark.parametrize(
    ("numbers", "said"), [(5, "aesthetic score"), (7, "an SDXL is told 32 + 6 x 8 numbers")]
)
def test_an_sdxl_that_is_told_other_sizes_is_refused(tmp_path: Path, numbers: int, said: str) -> None:
    width = tiny_models.UNETS["sdxl"]["addition_time_embed_dim"]
    told = {"projection_class_embeddings_input_dim": 32 + numbers * width}
    folder = tiny_models.build(tmp_path / "base", "sdxl", **told)
    assert said in message_of(folder)
    shutil.rmtree(folder / "text_encoder")  # which a refiner has not
    assert said in message_of(folder)


def test_wrong_folders(tmp_path: Path, broken: Path) -> None:
    assert "no model_index.json" in message_of(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    assert "is a text, not weights" in message_of(file)
    assert "give one of tiny, sd15, sd21, sdxl, an existing folder" in message_of(
        tmp_path / "none" / "at" / "all"
    )
    shutil.rmtree(broken / "tokenizer")
    assert "has no tokenizer/" in message_of(broken)


def test_missing_parts_and_files(broken: Path) -> None:
    (broken / "tokenizer" / "tokenizer.json").unlink()
    assert "neither tokenizer.json nor vocab.json" in message_of(broken)
    (broken / "text_encoder" / "model.safetensors").unlink()
    assert f"{broken / 'text_encoder'} has no weights" in message_of(broken)
    for name, words in (("model.fp16.safetensors", "is empty"), ("pytorch_model.bin", "cannot build")):
        (broken / "text_encoder" / name).write_bytes(b"\0anything" if name.endswith("bin") else b"")
        assert words in message_of(broken)
        (broken / "text_encoder" / name).unlink()
    (broken / "text_encoder" / "pytorch_model.bin").write_bytes(b"<html>")
    assert "pytorch_model.bin is a web page" in message_of(broken)
    (broken / "scheduler" / "scheduler_config.json").unlink()
    assert "scheduler_config.json is missing" in message_of(broken)
    (broken / "unet" / "config.json").write_text("{ not json")
    assert "unet/config.json is not valid JSON" in message_of(broken)
    (broken / "unet" / "config.json").unlink()
    assert "unet/config.json is missing" in message_of(broken)
    shutil.rmtree(broken / "vae")
    (broken / "unet" / "config.json").write_text("{}")
    assert "has no vae/" in message_of(broken)


def test_bases_of_another_kind(broken: Path) -> None:
    rewrite(broken / "unet" / "config.json", in_channels=8)
    assert "takes 8 channels but its VAE makes 4: bases that edit by instruction" in message_of(broken)
    rewrite(broken / "unet" / "config.json", in_channels=4, class_embed_type="timestep")
    assert "has class_embed_type 'timestep'" in message_of(broken)
    rewrite(broken / "unet" / "config.json", class_embed_type=None)
    rewrite(broken / "scheduler" / "scheduler_config.json", beta_schedule="sigmoid")
    assert "beta_schedule 'sigmoid' is not one of linear, scaled_linear" in message_of(broken)
    rewrite(broken / "scheduler" / "scheduler_config.json", _class_name="EDMEulerScheduler")
    assert "was trained for EDMEulerScheduler, which has no beta_schedule" in message_of(broken)
    rewrite(broken / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    rewrite(broken / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    assert "scheduler_config.json: unknown prediction type 'flow_prediction'" in message_of(broken)
    rewrite(broken / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    assert "text_encoder is T5EncoderModel, not CLIPTextModel" in message_of(broken)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": None}, "unknown prediction type 'None'"),
        (
            "scheduler/scheduler_config.json",
            {"beta_start": "small"},
            "beta_start must be a number, not 'small'",
        ),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": None}, "must be a number, not None"),
        (
            "scheduler/scheduler_config.json",
            {"steps_offset": None},
            "steps_offset must be a number, not None",
        ),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}, "trained_betas, a noise schedule"),
        ("unet/config.json", {"sample_size": "64"}, "sample_size must be a number of latents, not '64'"),
        ("unet/config.json", {"norm_num_groups": 0}, "cannot build UNet2DConditionModel"),
        ("unet/config.json", {"attention_head_dim": 0}, "cannot build UNet2DConditionModel"),
        ("vae/config.json", {"scaling_factor": None}, "scaling_factor must be a number, not None"),
        (
            "vae/config.json",
            {"block_out_channels": []},
            "vae/config.json says block_out_channels []: it is a list of whole numbers",
        ),
        (
            "vae/config.json",
            {"up_block_types": ["UpDecoderBlock2D"]},
            "has 4 down_block_types and 1 up_block",
        ),
        ("unet/config.json", {"mid_block_scale_factor": [1]}, "mid_block_scale_factor [1]: it is a number"),
        ("vae/config.json", {"norm_num_groups": True}, "says norm_num_groups True: it is a whole number"),
        ("vae/config.json", {"latent_channels": [1, 2]}, "says latent_channels [1, 2]: it is a whole number"),
        ("vae/config.json", {"act_fn": 5}, "vae/config.json says act_fn 5: it is a name"),
        ("unet/config.json", {"norm_eps": {}}, "unet/config.json says norm_eps {}: it is a number"),
        ("unet/config.json", {"down_block_types": "x"}, "says down_block_types 'x': it is a list of names"),
        (
            "unet/config.json",
            {"use_linear_projection": 5},
            "says use_linear_projection 5: it is true or false",
        ),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "cannot build CLIPTextModel"),
        ("text_encoder/config.json", {"eos_token_id": [1]}, "says eos_token_id [1]: it is a whole number"),
        ("scheduler/scheduler_config.json", {"beta_schedule": ["linear"]}, "is not one of"),
        ("model_index.json", {"tokenizer": True}, "model_index.json: tokenizer is True, not CLIPTokenizer"),
        ("model_index.json", {"unet": [[1]]}, "model_index.json: unet is [[1]], not UNet2DConditionModel"),
        ("text_encoder/config.json", {"eos_token_id": None}, "says eos_token_id None: it is a whole number"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "networks have 0 to 1000"),
        ("unet/config.json", {"layers_per_block": 10**9}, "networks have 0 to 1000"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": [77]}, "cannot read the tokenizer"),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "has no pad_token"),
    ],
)
def test_odd_values_are_one_plain_line(
    broken: Path, file: str, changes: dict[str, object], message: str
) -> None:
    rewrite(broken / file, **changes)
    assert message in message_of(broken)


def test_legal_values_that_are_rare(broken: Path) -> None:
    rewrite(broken / "scheduler" / "scheduler_config.json", num_train_timesteps=1000.0)
    for size, side in ((None, 512), ([16, 24], 192)):
        rewrite(broken / "unet" / "config.json", sample_size=size)
        base = load_base(str(broken))
        assert (base.resolution, len(base.alphas_cumprod)) == (side, 1000)


def test_tokenizers_that_cannot_be_read(broken: Path) -> None:
    folder = broken / "tokenizer"
    whole = (folder / "tokenizer.json").read_text()
    for text in ("{}", whole[:200], "[]", ""):
        (folder / "tokenizer.json").write_text(text)
        assert f"cannot read the tokenizer in {folder}: " in message_of(broken)
    (folder / "tokenizer.json").write_text(whole)
    (folder / "tokenizer_config.json").unlink()  # it holds the length, which the text encoder knows, too
    assert load_base(str(broken)).encode_prompts(["a cube"]).encoder_hidden_states.shape[1] == 77


def test_a_long_prompt_is_told_once_and_by_us(
    loaded: dict[str, Base], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="more than 77 tokens") as caught:
        loaded["sd1"].encode_prompts(["a red figure " * 40])
    assert len(caught) == 1
    assert capfd.readouterr() == ("", "")


def test_long_prompts_are_counted_in_one_line(loaded: dict[str, Base]) -> None:
    prompts = [f"{n} {'a red figure ' * 40}" for n in range(3)]
    told = "3 prompts have more than 77 tokens, such as '0 a red figure a red figure a red figure...'"
    for family in ("sd1", "sdxl"):  # which has two encoders
        with pytest.warns(UserWarning, match=re.escape(f"{told}; the rest of each is ignored")) as caught:
            loaded[family].encode_prompts(["short", *prompts])
        assert len(caught) == 1
    lines: list[str] = []
    with notices.heard(lines.append), long_prompts_told_together():
        for prompt in prompts:
            loaded["sd1"].encode_prompts([prompt])
    assert lines == [f"{told}; the rest of each is ignored"]


@pytest.mark.parametrize("shards", [False, True])
def test_half_precision_files_alone_are_enough(
    folders: dict[str, Path], tmp_path: Path, shards: bool
) -> None:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = Path(shutil.copytree(folders["sd2"], tmp_path / "base"))
    expected = load_base(str(folder)).digest()
    for part, cls in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        model = cls.from_pretrained(folder / part, local_files_only=True)
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(
            folder / part, variant="fp16", max_shard_size="1MB" if shards and part == "unet" else "1GB"
        )
    names = sorted(file.name for file in (folder / "unet").iterdir())
    assert ("diffusion_pytorch_model.safetensors.index.fp16.json" in names) == shards
    assert load_base(str(folder)).digest() == expected


def test_pickled_weights_are_read_but_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "base"))
    expected = load_base(str(folder)).digest()
    for part, old, new in (
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ):
        torch.save(load_file(folder / part / old), folder / part / new)
        (folder / part / old).unlink()
    assert load_base(str(folder)).digest() == expected

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "harm"),)

    for part, new in (
        ("text_encoder", "pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.bin"),
    ):
        whole = (folder / part / new).read_bytes()
        torch.save({"conv_in.weight": Harmful()}, folder / part / new)
        assert "cannot build" in message_of(folder)
        (folder / part / new).write_bytes(whole[: len(whole) // 2])
        assert "cannot build" in message_of(folder)
        (folder / part / new).write_bytes(whole)
    assert not (tmp_path / "harm").exists()


def test_weights_that_do_not_fit_their_configuration(broken: Path) -> None:
    from safetensors.torch import load_file, save_file

    for part, name, key in (
        ("unet", "diffusion_pytorch_model", "conv_in.weight"),
        ("text_encoder", "model", "final_layer_norm.weight"),
    ):
        file = broken / part / f"{name}.safetensors"
        whole = load_file(file)
        key = next(known for known in whole if known.endswith(key))
        save_file({known: tensor for known, tensor in whole.items() if known != key}, file)
        assert f"the weights in {broken / part} lack" in message_of(broken)
        save_file(whole | {key: torch.zeros(3)}, file)
        message = message_of(broken)
        assert str(broken / part) in message
        assert key in message
        save_file(whole, file)
    load_base(str(broken))


def test_names_that_lead_nowhere() -> None:
    assert "did you mean 'tiny'?" in message_of("tinny")
    cache = constants.HF_HUB_CACHE
    for name, repo_id in (("sd15", bases.ALIASES["sd15"]), ("nobody/nothing", "nobody/nothing")):
        message = message_of(name)
        assert f"no base '{repo_id}': there is no such folder, it is not in the cache {cache}" in message
        assert "HF_HUB_OFFLINE" in message


def test_devices_that_are_not_there(folders: dict[str, Path]) -> None:
    assert "unknown device 'gpu'" in message_of(folders["sd1"], device="gpu")
    assert "device 'cuda:99' is not available here" in message_of(folders["sd1"], device="cuda:99")


def test_an_autoencoder_with_statistics_of_its_own(folders: dict[str, Path], tmp_path: Path) -> None:
    """latents_mean and latents_std, as diffusers' SDXL pipelines take them; so does training."""
    from controlkit.sampling import generate
    from controlkit.training.data.encoding import encode_pictures, picture_encoder_id

    folder = Path(shutil.copytree(folders["sdxl"], tmp_path / "base"))
    plain = load_base(str(folder))
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    rewrite(folder / "vae" / "config.json", latents_mean=mean, latents_std=std, scaling_factor=0.5)
    base = load_base(str(folder))
    ours = generate(base, "a red figure", steps=3, seeds=[1])[0]
    pipe = pipeline(folder, "sdxl")
    pipe.scheduler = make_scheduler("ddim", base)
    height, width = ours.shape[:2]
    noise = torch.Generator().manual_seed(1)
    theirs = pipe("a red figure", num_inference_steps=3, generator=noise, height=height, width=width)
    assert np.abs(ours.astype(int) - np.asarray(theirs.images[0]).astype(int)).max() <= 1
    picture = np.ascontiguousarray(ours)
    latents = base.encode_pictures(picture_to_tensor([picture]))
    assert torch.allclose(
        base.decode_latents(latents), base.vae.decode(encoded(base, picture)).sample, atol=1e-4
    )
    kept, posterior = (
        encode_pictures(base, [picture]),
        base.vae.encode(picture_to_tensor([picture])).latent_dist,
    )
    assert torch.allclose(kept.mean.float(), latents, atol=2e-3)
    spread = posterior.std * 0.5 / torch.tensor(std)[None, :, None, None]
    assert torch.allclose(kept.std.float(), spread, rtol=2e-3, atol=1e-6)
    assert picture_encoder_id(base) != picture_encoder_id(plain)


@pytest.mark.parametrize(
    ("file", "changes", "changed"),
    [
        ("vae/config.json", {"act_fn": "relu"}, "picture"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "text"),
        ("tokenizer/tokenizer_config.json", {"pad_token": "!"}, "text"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}, ""),
        ("text_encoder/config.json", {"_name_or_path": "elsewhere", "transformers_version": "4.0"}, ""),
    ],
)
def test_what_is_kept_of_a_base_is_named_by_all_that_decides_it(
    broken: Path, loaded: dict[str, Base], file: str, changes: dict[str, object], changed: str
) -> None:
    """Weights alone do not; and where a base lies, or what was asked of it before, decides nothing."""
    from controlkit.training.data.encoding import picture_encoder_id, text_encoder_id

    rewrite(broken / file, **changes)
    mine, plain = load_base(str(broken)), loaded["sd1"]
    assert (picture_encoder_id(mine) == picture_encoder_id(plain)) == (changed != "picture")
    before = text_encoder_id(mine)
    assert (before == text_encoder_id(plain)) == (changed != "text")
    mine.tokenizers[0]("a red figure", padding="max_length", truncation=True, max_length=20)
    assert text_encoder_id(mine) == before


def test_how_a_base_reads_a_caption_names_what_is_kept_of_it(loaded: dict[str, Base]) -> None:
    from controlkit.training.data.encoding import picture_encoder_id, text_encoder_id

    base = loaded["sd1"]
    others = [base, replace(base, clip_skip=2), replace(base, words={"<cat>": (5, 6)})]  # type: ignore[dict-item]
    assert len(set(map(text_encoder_id, others))) == 3
    vae = copy.deepcopy(base.vae)
    with torch.no_grad():
        vae.quant_conv.weight.add_(1)
    assert picture_encoder_id(replace(base, vae=vae)) != picture_encoder_id(base)


def test_the_merges_of_a_tokenizer_name_what_is_kept(loaded: dict[str, Base], tmp_path: Path) -> None:
    from controlkit.base_parts import load_tokenizer
    from controlkit.training.data.encoding import text_encoder_id

    folder = Path(shutil.copytree(bases.find_base("tiny") / "tokenizer", tmp_path / "tokenizer"))
    plain = load_tokenizer(folder)
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["merges"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(rules))
    other = load_tokenizer(folder)
    assert other.get_vocab() == plain.get_vocab()
    first, second = (text_encoder_id(replace(loaded["sd1"], tokenizers=[one])) for one in (plain, other))
    assert first != second


def encoded(base: Base, picture: np.ndarray) -> torch.Tensor:
    """What the encoder itself gives, in its own units."""
    with torch.no_grad():
        return base.vae.encode(picture_to_tensor([picture])).latent_dist.mode()


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # in diffusers' own schedulers
def test_latents_are_never_clipped_like_pixels(loaded: dict[str, Base]) -> None:
    """Whatever the base's file says, as in diffusers' pipelines."""
    base = replace(loaded["sd1"], scheduler_config={**loaded["sd1"].scheduler_config, "clip_sample": True})
    for name in ("ddim", "ddpm", "heun", "lcm", "tcd"):  # those that can clip
        assert make_scheduler(name, base).config.clip_sample is False, name


def test_weights_in_shards_of_pickles_and_in_bfloat16(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    folder = Path(shutil.copytree(folders["sd1"], tmp_path / "base"))
    whole = load_base(str(folder)).unet.state_dict()
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    for options in (
        {"safe_serialization": False, "max_shard_size": "1MB"},
        {"variant": "bf16"},
    ):
        shutil.rmtree(folder / "unet")
        unet.save_pretrained(folder / "unet", **options)
        assert len(list((folder / "unet").glob("*.*"))) >= 2
        again = load_base(str(folder)).unet.state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_a_configuration_with_a_byte_order_mark_is_named(broken: Path) -> None:
    file = broken / "unet" / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert "unet/config.json begins with a byte order mark" in message_of(broken)


def test_a_file_that_is_too_long_is_not_called_short(broken: Path) -> None:
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    assert "is damaged: " in message_of(broken)

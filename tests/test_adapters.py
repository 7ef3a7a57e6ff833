"""Adapters on disk: what they say of themselves, that other software reads them, and every damaged file."""

import json
import os
import re
import shutil
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import ControlNetModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from controlkit import (
    Embedding,
    Lora,
    adapters,
    load_clip,
    picture_prompt,
    with_embeddings,
    with_loras,
    with_vae,
    write_adapter,
)
from controlkit.adapters import MAPS, AdapterInfo, MapSpec, load_adapter, read_info, save_adapter
from controlkit.base import Base, load_base
from controlkit.controlnet import from_base
from controlkit.folders import quiet_libraries, read_header
from controlkit.formats.adapter_file import open_adapter_file

WEIGHTS = adapters.WEIGHTS_NAME
INFO = AdapterInfo(
    map=MAPS["canny"],
    family="sd1",
    prediction_type="epsilon",
    base="tests/tiny-sd1",
    resolution=128,
    title="Kanten für den Test 🙂",
    training={"steps": 400, "seed": 7, "scores": {"edge_f1": 0.5}},
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    root = tmp_path_factory.mktemp("bases")
    return {
        family: load_base(str(tiny_models.build(root / family, family))) for family in tiny_models.FAMILIES
    }


@pytest.fixture(scope="module")
def controlnet(bases: dict[str, Base]) -> ControlNetModel:
    return tiny_models.randomize_zero_convs(from_base(bases["sd1"], seed=0))


@pytest.fixture
def folder(controlnet: ControlNetModel, tmp_path: Path) -> Path:
    save_adapter(controlnet, tmp_path / "adapter", info=INFO, dtype=torch.float32)
    return tmp_path / "adapter"


def refusal(folder: Path | str, base: Base, message: str) -> None:
    """Loading raises a ValueError of one line that contains the message."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_adapter(str(folder), base=base)
    assert "\n" not in str(error.value)


def same(a: ControlNetModel, b: ControlNetModel) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_what_is_saved_comes_back(folder: Path, controlnet: ControlNetModel, bases: dict[str, Base]) -> None:
    adapter = load_adapter(str(folder), base=bases["sd1"])
    assert same(adapter.controlnet, controlnet)
    assert adapter.info == INFO
    assert adapter.name == str(folder)
    assert adapter.controlnet.training is False
    assert not any(p.requires_grad for p in adapter.controlnet.parameters())
    assert controlnet.training is True
    half = load_adapter(str(folder), base=bases["sd1"], dtype=torch.bfloat16)
    assert half.controlnet.dtype == torch.bfloat16


def test_diffusers_reads_ours(folder: Path, controlnet: ControlNetModel) -> None:
    with quiet_libraries():
        theirs = ControlNetModel.from_pretrained(folder)
    assert same(theirs, controlnet)
    ours = json.loads(controlnet.to_json_string())
    assert json.loads(theirs.to_json_string()) == ours | {"_name_or_path": str(folder)}


def test_we_read_diffusers(controlnet: ControlNetModel, bases: dict[str, Base], tmp_path: Path) -> None:
    with quiet_libraries():
        controlnet.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(str(tmp_path / "theirs"), base=bases["sd1"])
    assert same(adapter.controlnet, controlnet)
    assert adapter.info == AdapterInfo(map=MapSpec(), family="sd1")


def test_the_default_is_float16_and_the_header_is_for_everybody(
    controlnet: ControlNetModel, tmp_path: Path
) -> None:
    save_adapter(controlnet, tmp_path / "a", info=INFO)
    weights = load_file(tmp_path / "a" / WEIGHTS)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert next(controlnet.parameters()).dtype == torch.float32
    metadata = read_header(tmp_path / "a" / WEIGHTS)["__metadata__"]
    assert metadata["format"] == "pt"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/controlnet"
    assert metadata["modelspec.resolution"] == "128x128"
    assert metadata["modelspec.title"] == INFO.title
    described = json.loads(metadata["controlkit"])
    assert described["map"]["thresholds"] == {"low": 100, "high": 200}
    assert described["version"] == 1


def test_the_same_network_gives_the_same_bytes(controlnet: ControlNetModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(controlnet, tmp_path / name, info=INFO)
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    metadata = read_header(tmp_path / "a" / WEIGHTS)["__metadata__"]
    assert list(metadata) == sorted(metadata)
    loaded = ControlNetModel.from_pretrained(tmp_path / "a")
    save_adapter(loaded, tmp_path / "c", info=INFO)  # which diffusers gave the path it came from
    assert str(tmp_path) not in (tmp_path / "c" / "config.json").read_text()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_are_as_readable_as_the_umask_says(
    umask: int, mode: int, controlnet: ControlNetModel, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        save_adapter(controlnet, tmp_path / "a", info=INFO)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "a").iterdir()} == {mode}


def test_saving_replaces_an_adapter_and_nothing_else(
    folder: Path, controlnet: ControlNetModel, tmp_path: Path
) -> None:
    save_adapter(controlnet, folder, info=replace(INFO, title="second"))
    assert read_info(folder).title == "second"
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "one.png").write_bytes(b"picture")
    with pytest.raises(ValueError, match=r"cannot save the adapter over what is there: .*no config\.json"):
        save_adapter(controlnet, precious, info=INFO)
    assert [file.name for file in precious.iterdir()] == ["one.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "photos"]


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_numbers_that_are_not_finite_are_not_saved(
    value: float, dtype: torch.dtype, bases: dict[str, Base], tmp_path: Path
) -> None:
    broken = from_base(bases["sd1"], seed=0)
    with torch.no_grad():
        broken.conv_in.weight[0, 0, 0, 0] = value
    with pytest.raises(
        ValueError, match=r"as float(16|32): the weights in conv_in.weight are not all finite"
    ):
        save_adapter(broken, tmp_path / "a", info=INFO, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda whole: b"", "is empty (0 bytes); fetch it again"),
        (lambda whole: whole[: len(whole) // 2], "is cut short:"),
        (lambda whole: whole[:100], "is cut short or is not a safetensors file (100 bytes)"),
        (lambda whole: whole[:5], "is cut short or is not a safetensors file (5 bytes)"),
        (
            lambda whole: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "Git LFS pointer",
        ),
        (lambda whole: b"\n<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (lambda whole: struct.pack("<Q", 4) + b"nope" + whole, "its header is not readable"),
        (lambda whole: struct.pack("<Q", 2) + b"[]" + whole, "its header is not readable"),
        (lambda whole: b"\x80\x04cposix\nsystem\n", "is not a safetensors file"),
    ],
)
def test_damaged_weights_are_named(damage, message: str, folder: Path, bases: dict[str, Base]) -> None:
    file = folder / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    refusal(folder, bases["sd1"], str(file))
    refusal(folder, bases["sd1"], message)


def test_weights_that_are_not_this_networks(folder: Path, bases: dict[str, Base]) -> None:
    file = folder / WEIGHTS
    whole = load_file(file)
    save_file({key: tensor for key, tensor in whole.items() if "zero" not in key and "mid" not in key}, file)
    refusal(folder, bases["sd1"], f"the weights in {folder} lack controlnet_mid_block.bias and")
    save_file(whole | {"conv_in.weight": torch.zeros(2)}, file)
    refusal(folder, bases["sd1"], "conv_in.weight expected shape")
    save_file(whole | {"conv_in.bias": torch.full((16,), float("inf"))}, file)
    refusal(folder, bases["sd1"], f"{folder}: the weights in conv_in.bias are not all finite numbers")
    save_file(whole, file, metadata={"controlkit": "{"})
    refusal(folder, bases["sd1"], "its controlkit description cannot be read")
    file.unlink()
    refusal(folder, bases["sd1"], f"{folder} has no weights")


def test_folders_that_hold_something_else(folder: Path, bases: dict[str, Base], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    refusal(run, bases["sd1"], f"{run} is not an adapter folder: it has no config.json")
    shutil.copytree(folder, run / "controlnet")
    refusal(run, bases["sd1"], f"did you mean {run / 'controlnet'}?")
    with pytest.raises(ValueError, match=r"run has no weights .*\(did you mean .*controlnet\?\)"):
        open_adapter_file(run)
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    refusal(folder, bases["sd1"], "holds a UNet2DConditionModel, not a ControlNetModel")
    refusal(folder / "config.json", bases["sd1"], "config.json is a text, not weights")


def test_a_device_that_is_not_there(bases: dict[str, Base]) -> None:
    with pytest.raises(ValueError, match="unknown device 'gpu': use cpu, cuda, cuda:0 or mps"):
        load_adapter("canny", base=bases["sd1"], device="gpu")
    with pytest.raises(ValueError, match="unknown device None: use cpu, cuda, cuda:0 or mps"):
        load_base("tiny", device=None)  # type: ignore[arg-type]


def test_a_precision_may_be_named(folder: Path, bases: dict[str, Base], tmp_path: Path) -> None:
    for name, dtype in (("fp16", torch.float16), ("bfloat16", torch.bfloat16)):
        assert load_adapter(str(folder), base=bases["sd1"], dtype=name).controlnet.dtype == dtype
        assert load_base("tiny", dtype=name).unet.dtype == load_base("tiny", dtype=name).dtype == dtype
    for wrong, message in (("half", "unknown precision 'half'"), (torch.int8, "dtype is a precision, as")):
        with pytest.raises(ValueError, match=message):
            load_adapter(str(folder), base=bases["sd1"], dtype=wrong)
        with pytest.raises(ValueError, match=message):
            load_base("tiny", dtype=wrong)
        with pytest.raises(ValueError, match=message):  # whole numbers would be an adapter of almost nothing
            write_adapter(load_adapter(folder, base=bases["sd1"]), tmp_path / "none", dtype=wrong)
    write_adapter(load_adapter(folder, base=bases["sd1"]), tmp_path / "half", dtype="fp16")
    assert {t.dtype for t in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.float16}
    assert not (tmp_path / "none").exists()


def test_models_may_be_named_by_paths(folder: Path, tmp_path: Path) -> None:
    base = load_base(tiny_models.build(tmp_path / "base", "sd1"))
    assert base.name == str(tmp_path / "base")
    assert load_adapter(folder, base=base).name == str(folder)
    load_clip(tiny_models.build_clip(tmp_path / "clip"))
    nowhere, picture = tmp_path / "none.safetensors", np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match=r"there is no LoRA .*none.safetensors"):
        with_loras(base, [Lora(nowhere)])
    with pytest.raises(ValueError, match=r"there is no IP-Adapter .*none.safetensors"):
        picture_prompt(base, nowhere, [picture])
    with pytest.raises(ValueError, match=r"none.safetensors"):
        with_vae(base, nowhere)


def test_what_is_no_base_or_no_list_is_told_in_a_line(bases: dict[str, Base], tmp_path: Path) -> None:
    base, name, word = bases["sd1"], str(tmp_path / "none.safetensors"), Embedding("none.safetensors")
    no_base: list[Callable[[Any], object]] = [
        lambda base: load_adapter("canny", base=base),
        lambda base: with_loras(base, []),
        lambda base: with_embeddings(base, []),
        lambda base: with_vae(base, name),
        lambda base: picture_prompt(base, name, []),
    ]
    for make in no_base:
        with pytest.raises(ValueError, match=r'^base is a Base, as load_base\("tiny"\), not a str$'):
            make("tiny")
    no_list: list[tuple[Callable[[Any, Any], object], object, str]] = [
        (with_loras, Lora(name), r'loras is a list, as \[Lora\("file.safetensors"\)\], not a Lora'),
        (with_loras, [name], "loras is a list of Lora, and a str is in it"),
        (with_embeddings, word, r"embeddings is a list, as \[Embedding\(.*\)\], not an Embedding"),
        (with_embeddings, name, r"embeddings is a list, as .*, not a str"),
        (with_embeddings, [name], "embeddings is a list of Embedding, and a str is in it"),
    ]
    for change, given, message in no_list:
        with pytest.raises(ValueError, match=f"^{message}$"):
            change(base, given)


def test_names_that_lead_nowhere(bases: dict[str, Base]) -> None:
    refusal(
        "cany", bases["sd1"], "no adapter called 'cany' (did you mean 'canny'?); give one of canny, openpose"
    )
    refusal(
        "lllyasviel/sd-controlnet-canny", bases["sd1"], f"it is not in the cache {constants.HF_HUB_CACHE}"
    )


def test_an_adapter_of_another_family_is_refused_with_the_sizes(
    controlnet: ControlNetModel, folder: Path, bases: dict[str, Base]
) -> None:
    refusal(folder, bases["sdxl"], "it is for SD1 (block_out_channels 16/32/32/32, cross_attention_dim 32")
    refusal(folder, bases["sdxl"], "the base is SDXL (block_out_channels 16/32/32, cross_attention_dim 64")
    refusal(folder, bases["sd2"], "it is for SD1 (other attention), the base is SD2")
    adapters.check_fits(controlnet, bases["sd1"])
    with pytest.raises(ValueError, match=r"control network does not fit the base .*: it is for SD1"):
        adapters.check_fits(controlnet, bases["sdxl"])


def test_another_prediction_type_is_a_warning(
    folder: Path, controlnet: ControlNetModel, bases: dict[str, Base]
) -> None:
    save_adapter(controlnet, folder, info=replace(INFO, prediction_type="v_prediction"))
    with pytest.warns(UserWarning, match=r"trained for v_prediction and the base .* predicts epsilon"):
        load_adapter(str(folder), base=bases["sd1"])


def test_every_family_round_trips(bases: dict[str, Base], tmp_path: Path) -> None:
    for family, base in bases.items():
        network = tiny_models.randomize_zero_convs(from_base(base, seed=1, conditioning_channels=5))
        info = AdapterInfo(map=MapSpec("normals", range=(-1.0, 1.0), channels=5), family=family)
        save_adapter(network, tmp_path / family, info=info, dtype=torch.float32)
        adapter = load_adapter(str(tmp_path / family), base=base)
        assert same(adapter.controlnet, network)
        assert adapter.info == info


def test_published_adapters_are_known_by_their_names(folder: Path, bases: dict[str, Base]) -> None:
    """Their files say nothing of the map; the table of default adapters does."""
    shutil.rmtree(folder)
    with quiet_libraries():
        from_base(bases["sd1"], seed=0).save_pretrained(folder)
    repo = Path(constants.HF_HUB_CACHE) / "models--lllyasviel--sd-controlnet-canny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    try:
        shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
        adapter = load_adapter("lllyasviel/sd-controlnet-canny", base=bases["sd1"])
    finally:
        shutil.rmtree(repo)
    assert adapter.info == AdapterInfo(map=MAPS["canny"], family="sd1")


def test_default_adapters(bases: dict[str, Base]) -> None:
    assert adapters.default_adapter("canny", bases["sd1"]) == "lllyasviel/control_v11p_sd15_canny"
    assert adapters.default_adapter("depth", bases["sdxl"]) == "diffusers/controlnet-depth-sdxl-1.0"
    assert adapters.default_adapter("depth", replace(bases["sd2"], name="tiny")) == "depth"
    meant = r"unknown control for the base .* 'dept' \(did you mean 'depth'\?\)"
    with pytest.raises(ValueError, match=meant):
        adapters.default_adapter("dept", bases["sd2"])
    assert set(adapters.BUNDLED_ADAPTERS) == set(MAPS)

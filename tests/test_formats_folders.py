"""Adapters in folders that others have filled: what `info` says of them is what loading does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import controlnet_of, original_controlnet, refusal, residuals, same, saved
from diffusers import ControlNetModel
from outcomes import Run

from controlkit.adapters import load_adapter
from controlkit.base import Base
from controlkit.formats.adapter_file import open_adapter_file

USUAL = "diffusion_pytorch_model"


def changed(folder: Path, **entries: Any) -> Path:
    """A folder whose config.json says something else; an entry that is None is taken out."""
    config = folder / "config.json"
    told = {**json.loads(config.read_text()), **entries}
    config.write_text(json.dumps({key: value for key, value in told.items() if value is not None}))
    return folder


@pytest.mark.parametrize("is_safe", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool])
def test_numbers_that_are_no_floats(
    dtype: torch.dtype, is_safe: bool, sd1: Base, run: Run, tmp_path: Path
) -> None:
    """diffusers casts them, and the network is another one."""
    network = controlnet_of(sd1)
    network.save_pretrained(tmp_path / "a", safe_serialization=is_safe)
    (file,) = (tmp_path / "a").glob(f"{USUAL}.*")
    state = network.state_dict()
    saved({**state, "conv_in.weight": (state["conv_in.weight"] * 50).to(dtype)}, file)
    for name in (tmp_path / "a", file):
        refusal(name, sd1, f"{file} stores conv_in.weight as ")
        assert "a quantization that is not supported" in run("info", name).refused()


def test_a_pickle_that_is_cut_short_is_named_in_a_folder(sd1: Base, run: Run, tmp_path: Path) -> None:
    controlnet_of(sd1).save_pretrained(tmp_path / "a", safe_serialization=False)
    file = tmp_path / "a" / f"{USUAL}.bin"
    file.write_bytes(file.read_bytes()[:-1000])
    refusal(tmp_path / "a", sd1, f"{file} is cut short: fetch it again")
    assert "is cut short: fetch it again" in run("info", tmp_path / "a").refused()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (f"{USUAL}.safetensors", "original"),
        (f"{USUAL}.safetensors", "module."),
        (f"{USUAL}.safetensors", "pickle"),
        (f"{USUAL}.bin", "safetensors"),
        (f"{USUAL}.bin", "trained"),
        ("pytorch_model.bin", "as saved"),
    ],
)
def test_weights_that_diffusers_would_not_read(
    name: str, form: str, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    """Names and formats of others under the name that diffusers gives its file."""
    network = controlnet_of(sd1)
    network.save_config(tmp_path / "a")
    file, state = tmp_path / "a" / name, dict(network.state_dict())
    if form == "original":
        state = original_controlnet(network, prefix="control_model.")
    if form == "module.":
        state = {f"module.{key}": tensor for key, tensor in state.items()}
    if form == "trained":
        state["global_step"] = torch.tensor(5)
    is_safe = form == "safetensors" or (name.endswith(".safetensors") and form != "pickle")
    saved(state, tmp_path / ("b.safetensors" if is_safe else "b.pth")).rename(file)
    torch.save({"a": torch.zeros(1)}, tmp_path / "a" / "optimizer.bin")
    controlnet = load_adapter(str(tmp_path / "a"), base=sd1).controlnet
    assert same(residuals(controlnet, sd1), residuals(network, sd1))
    base = models / "sd1"
    assert f"fits {base}: yes" in run("info", tmp_path / "a", "--base", base).done()


@pytest.mark.parametrize("class_name", ["FluxControlNetModel", "UNet2DConditionModel", 5])
def test_a_folder_of_another_class(class_name: Any, sd1: Base, run: Run, tmp_path: Path) -> None:
    controlnet_of(sd1).save_pretrained(tmp_path / "a")
    changed(tmp_path / "a", _class_name=class_name)
    message = f"{tmp_path / 'a'} holds a {class_name}, not a ControlNetModel"
    refusal(tmp_path / "a", sd1, message)
    assert message in run("info", tmp_path / "a").refused()
    load_adapter(str(tmp_path / "a" / f"{USUAL}.safetensors"), base=sd1)  # which tells by itself


def test_a_folder_that_does_not_say_its_class(sd1: Base, run: Run, tmp_path: Path) -> None:
    controlnet_of(sd1).save_pretrained(tmp_path / "a")
    changed(tmp_path / "a", _class_name=None)
    assert "does not say of which class it is (_class_name)" in run("info", tmp_path / "a").refused()


@pytest.mark.parametrize("key", ["layers_per_block", "in_channels", "conditioning_channels"])
def test_what_a_configuration_leaves_out_is_as_in_diffusers(
    key: str, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    network = controlnet_of(sd1)
    network.save_pretrained(tmp_path / "a")
    changed(tmp_path / "a", **{key: None})
    controlnet = load_adapter(str(tmp_path / "a"), base=sd1).controlnet
    assert same(residuals(controlnet, sd1), residuals(network, sd1))
    assert ": yes" in run("info", tmp_path / "a", "--base", models / "sd1").done()


def test_sizes_that_are_left_out_are_compared_as_diffusers_has_them(sd1: Base, tmp_path: Path) -> None:
    controlnet_of(sd1).save_pretrained(tmp_path / "a")
    changed(tmp_path / "a", cross_attention_dim=None)
    refusal(tmp_path / "a", sd1, "it is for SD1 (cross_attention_dim 1280)")


@pytest.mark.parametrize("name", [f"{USUAL} (1).safetensors", "control_v11p_sd15_canny.safetensors"])
def test_another_networks_config_beside_a_file_is_left_aside(
    name: str, sd1: Base, run: Run, tmp_path: Path
) -> None:
    """What no shape tells is then the base's, and not the stranger's."""
    network = controlnet_of(sd1)
    own = {key: value for key, value in network.config.items() if not key.startswith("_")}
    foreign = {
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
        "global_pool_conditions": True,
        "controlnet_conditioning_channel_order": "bgr",
    }
    ControlNetModel(**{**own, **foreign}).save_config(tmp_path / "a")
    file = saved(network.state_dict(), tmp_path / "a" / name)
    controlnet = load_adapter(str(file), base=sd1).controlnet
    assert same(residuals(controlnet, sd1), residuals(network, sd1))
    config = controlnet.config
    assert not config.global_pool_conditions
    assert config.controlnet_conditioning_channel_order == "rgb"
    assert "a ControlNet for SD1" in run("info", file).done()


@pytest.mark.parametrize("says_linear", [True, False])
def test_a_files_own_config_is_used(says_linear: bool, sd1: Base, tmp_path: Path) -> None:
    """Also where SD1's projections are stored as matrices, of which a configuration may say either."""
    network = controlnet_of(sd1)
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    config |= {"cross_attention_dim": 768, "global_pool_conditions": True}
    network = ControlNetModel(**config)
    network.register_to_config(use_linear_projection=says_linear)
    network.save_config(tmp_path / "a")
    projected = ("proj_in.weight", "proj_out.weight")
    state = {
        key: tensor.flatten(1) if key.endswith(projected) else tensor
        for key, tensor in network.state_dict().items()
    }
    opened = open_adapter_file(saved(state, tmp_path / "a" / f"{USUAL}.safetensors"))
    assert opened.is_told
    assert opened.config["global_pool_conditions"]

"""Control-LoRA files through `convert`, `info` and `load_adapter`, and LLLite files in the loader."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from adapter_files import controlnet_of, refusal, residuals
from diffusers import ControlNetModel
from outcomes import Run
from safetensors.torch import load_file, save_file

from controlkit.adapters import AdapterInfo, load_adapter, save_adapter, write_adapter
from controlkit.base import Base, load_base
from controlkit.controlnet import from_base
from controlkit.formats import control_lora, keys
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.lllite import LLLite


def test_a_control_lora_goes_both_ways(run: Run, models: Path) -> None:
    base = load_base(str(models / "sd1"))
    network = controlnet_of(base)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():  # changes of rank 1, as training would make them
        for parameter in network.down_blocks.parameters():
            if parameter.ndim == 2:
                one, other = (torch.randn(side, generator=generator) for side in parameter.shape)
                parameter.add_(0.1 * torch.outer(one, other))
    write_adapter(network, "whole.safetensors", layout="single")
    to_lora = ("convert", "whole.safetensors", "lora.safetensors", "--to", "control-lora")
    made = run(*to_lora, "--base", models / "sd1", "--rank", 1).done()
    assert "wrote lora.safetensors: a Control-LoRA of rank 1 for SD1, original keys" in made
    assert "rank 1 keeps 100.0% of what was changed in its base's weights" in made
    assert "smaller" not in made
    large = ("convert", "lora.safetensors", "large.safetensors", "--to", "control-lora", "--rank", 64)
    assert "it is not smaller than what it was made from (" in run(*large, "--base", models / "sd1").done()
    tensors = load_file("lora.safetensors")
    assert open_adapter_file("lora.safetensors").kind == "control-lora"
    assert {len(tensor) for name, tensor in tensors.items() if name.endswith(".down")} == {1}
    adapter = load_adapter("lora.safetensors", base=base)
    for ours, theirs in zip(residuals(adapter.controlnet, base), residuals(network, base), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    back = ("convert", "lora.safetensors", "back.safetensors", "--to", "original")
    assert "name the base that it is for" in run(*back).refused()
    run(*back, "--base", models / "sd1").done()
    again = load_adapter("back.safetensors", base=base).controlnet.state_dict()
    assert all(torch.equal(again[key], tensor) for key, tensor in adapter.controlnet.state_dict().items())
    broken = {key: tensor for key, tensor in tensors.items() if key != "middle_block_out.0.weight"}
    save_file({key: value for key, value in broken.items() if "bias" not in key}, "broken.safetensors")
    refusal("broken.safetensors", base, "lacks ")


def test_lllite_files_load(tmp_path: Path, models: Path) -> None:
    base = load_base(str(models / "sdxl"))
    place = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    shapes = {
        "conditioning1.0.weight": (8, 3, 4, 4),
        "conditioning1.0.bias": (8,),
        "conditioning1.2.weight": (16, 8, 4, 4),
        "conditioning1.2.bias": (16,),
        "down.0.weight": (4, 32),
        "down.0.bias": (4,),
        "mid.0.weight": (4, 20),
        "mid.0.bias": (4,),
        "up.0.weight": (32, 4),
        "up.0.bias": (32,),
    }
    save_file(
        {f"{place}.{key}": torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "l.safetensors"
    )
    assert isinstance(load_adapter(str(tmp_path / "l.safetensors"), base=base).controlnet, LLLite)


def test_a_control_lora_keeps_how_the_map_is_taken(tmp_path: Path, run: Run, models: Path) -> None:
    network = controlnet_of(load_base(str(models / "sd1")))
    network.register_to_config(global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    save_adapter(network, tmp_path / "pool", info=AdapterInfo(family="sd1"), dtype=torch.float32)
    made = tmp_path / "lora.safetensors"
    run("convert", tmp_path / "pool", made, "--to", "control-lora", "--base", models / "sd1").done()
    config = load_adapter(str(made), base=load_base(str(models / "sd1"))).controlnet.config
    assert (config.global_pool_conditions, config.controlnet_conditioning_channel_order) == (True, "bgr")


def test_a_control_lora_that_overflows_is_refused(tmp_path: Path, run: Run, models: Path) -> None:
    network = controlnet_of(load_base(str(models / "sd1")))
    network.controlnet_cond_embedding.conv_in.weight.data *= 1e7
    save_adapter(network, tmp_path / "big", info=AdapterInfo(family="sd1"), dtype=torch.float32)
    made = tmp_path / "lora.safetensors"
    order = ("convert", tmp_path / "big", made, "--to", "control-lora", "--base", models / "sd1")
    assert "cannot save the Control-LoRA as float16" in run(*order, "--dtype", "fp16").refused()
    assert not made.exists()


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_norm_and_bias_is_written(family: str, load: Callable[[str], Base]) -> None:
    """sd-webui-controlnet binds matrices and convolutions alone to the base: a norm it lacks stays 1, 0."""
    unet = load(family).unet.state_dict()
    state = from_base(load(family), seed=1).state_dict()
    moved = "mid_block.resnets.0.conv1.weight"
    state[moved] = state[moved] + torch.outer(torch.ones(32), torch.ones(288)).reshape(32, 32, 3, 3)
    tensors = control_lora.reduce(state, unet, 1)
    names = {key: keys.to_original(key) for key in state}
    assert all(names[key] in tensors for key, tensor in state.items() if tensor.ndim < 2)
    own = [key for key in unet if key.startswith(control_lora.COPIED) and unet[key].ndim > 1]
    assert not any(names[key] in tensors for key in own), "an unchanged matrix is the base's"
    assert [name for name in tensors if name.endswith(".up")] == ["middle_block.0.in_layers.2.up"]
    whole = control_lora.expand(tensors, unet)
    assert all(torch.equal(whole[key], tensor) for key, tensor in state.items() if key != moved)


@pytest.mark.parametrize(
    "types", [("DownBlock2D",) * 3, ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D")]
)
def test_a_part_of_an_encoder_has_no_control_lora(
    types: tuple[str, ...], run: Run, models: Path, tmp_path: Path
) -> None:
    """What a Control-LoRA leaves out is the base's: SDXL's small networks would come back as large ones."""
    config = dict(controlnet_of(load_base(str(models / "sdxl"))).config)
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    config |= {"down_block_types": types, "transformer_layers_per_block": 1}
    if len(set(types)) == 1:
        config["mid_block_type"] = "UNetMidBlock2D"
    with torch.random.fork_rng(devices=[]):
        ControlNetModel(**config).save_pretrained(tmp_path / "small")
    order = ("convert", "small", "lora.safetensors", "--to", "control-lora", "--base", models / "sdxl")
    told = run(*order).refused()
    assert "copies a part of this base's encoder alone (it lacks down_blocks.1.attentions.0.norm" in told
    assert "is the base's: write it as diffusers, single or original" in told
    assert not (tmp_path / "lora.safetensors").exists()

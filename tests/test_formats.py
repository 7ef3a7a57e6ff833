"""Adapter files of every layout: recognised, loaded with the same residuals, and every key accounted for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapter_files import controlnet_of, original_controlnet, residuals, same, saved
from diffusers import ControlNetModel

from controlkit.adapters import Adapter, load_adapter
from controlkit.base import Base
from controlkit.formats import keys, t2i_keys
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.formats.structure import Shapes, controlnet_config, with_untold
from controlkit.formats.weight_file import Stored

Load = Callable[[str], Base]
FULL_SIZE = {
    "sd1": tiny_models.SD15_UNET,
    "sd2": tiny_models.SD21_UNET,
    "sdxl": tiny_models.SDXL_UNET,
}


@pytest.mark.parametrize("family", FULL_SIZE)
def test_every_key_of_the_real_sizes_has_its_name_in_both_layouts(family: str) -> None:
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(**FULL_SIZE[family])
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    theirs = original_controlnet(network)
    ours = network.state_dict()
    assert len(theirs) == len(ours) == {"sd1": 340, "sd2": 340, "sdxl": 844}[family]
    there = {key: keys.to_original(key) for key in ours}
    assert set(there.values()) == set(theirs)
    for key, name in there.items():
        assert name is not None
        assert theirs[name].shape == ours[key].shape
        assert keys.to_diffusers(name) == key
    assert keys.counts_of_original(theirs) == keys.counts_of_diffusers(ours) == keys.PUBLISHED
    entries = {key: Stored("F16", tuple(tensor.shape)) for key, tensor in ours.items()}
    config = with_untold(controlnet_config(Shapes(entries, "the file")), None)
    with torch.device("meta"):
        again = ControlNetModel(**config)
    wanted = {key: _plain(value) for key, value in network.config.items() if not key.startswith("_")}
    assert {key: _plain(value) for key, value in again.config.items() if not key.startswith("_")} == wanted


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("levels", [1, 2, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_map_holds_for_any_number_of_levels_and_layers(levels: int, layers: int) -> None:
    with torch.device("meta"):
        network = ControlNetModel(
            block_out_channels=(32,) * levels,
            layers_per_block=layers,
            down_block_types=("CrossAttnDownBlock2D",) * levels,
            conditioning_embedding_out_channels=(8, 16, 16)[: max(levels, 2)],
        )
    theirs, ours = original_controlnet(network), network.state_dict()
    counts = keys.counts_of_original(theirs)
    assert counts == keys.counts_of_diffusers(ours)
    assert {keys.to_original(key, counts) for key in ours} == set(theirs)
    assert {keys.to_diffusers(key, counts) for key in theirs} == set(ours)


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.3.0.in_layers.0.weight",
        "input_hint_block.1.weight",
        "input_hint_block.16.weight",
        "zero_convs.0.weight",
        "middle_block.3.0.weight",
        "input_blocks.1.1.lora.weight",
        "input_blocks.0.1.proj_in.weight",
        "input_blocks.1.0.in_layers.1.weight",
        "time_embed.0.scale",
        "conv_in",
        "a.b",
        "down_blocks.0.resnets.2.conv1.weight",
        "down_blocks.0.attentions.2.proj_in.weight",
        "controlnet_cond_embedding.blocks.6.weight",
    ],
)
def test_names_that_no_controlnet_has(name: str) -> None:
    assert keys.to_diffusers(name) is None
    assert keys.to_original(name) is None


@pytest.mark.parametrize(
    ("name", "light"),
    [
        ("body.1.in_conv.weight", False),  # only the first block of a level widens
        ("body.0.out_conv.weight", False),
        ("body.0.body.0.block1.weight", False),
        ("body.0.block1.weight", True),
        ("body.0.body.0.in_conv.weight", True),
        ("conv_in.weight", True),
        ("adapter.body.0.resnets.0.in_conv.weight", False),
        ("adapter.body.0.out_conv.weight", False),
        ("adapter.conv_in.weight", True),
    ],
)
def test_names_that_no_t2i_adapter_has(name: str, light: bool) -> None:
    assert t2i_keys.to_diffusers(name, light=light) is None
    assert t2i_keys.to_original(name, light=light) is None


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_the_original_layout_gives_the_same_residuals(
    family: str, suffix: str, prefix: str, load: Load, tmp_path: Path
) -> None:
    base = load(family)
    network = controlnet_of(base, conditioning_channels=4)
    file = saved(original_controlnet(network, prefix=prefix), tmp_path / f"a{suffix}")
    adapter = load_adapter(str(file), base=base)
    assert same(residuals(adapter.controlnet, base, 4), residuals(network, base, 4))
    assert adapter.info.family == family
    assert adapter.info.map.channels == 4
    assert not any(parameter.requires_grad for parameter in adapter.controlnet.parameters())
    opened = open_adapter_file(file)
    assert (opened.kind, opened.layout, opened.family) == ("controlnet", "original", family)
    assert opened.dtype == "float32"
    assert opened.parameters == sum(tensor.numel() for tensor in network.state_dict().values())


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_one_file_with_diffusers_keys(family: str, load: Load, tmp_path: Path) -> None:
    base = load(family)
    network = controlnet_of(base)
    file = saved(network.state_dict(), tmp_path / "anything.safetensors")
    adapter: Adapter = load_adapter(str(file), base=base)
    assert same(residuals(adapter.controlnet, base), residuals(network, base))
    config = {key: _plain(value) for key, value in network.config.items() if not key.startswith("_")}
    got = {key: _plain(value) for key, value in adapter.controlnet.config.items() if not key.startswith("_")}
    assert {key: got[key] for key in got if got[key] != config[key]} == {}
    alone = load_adapter(str(tmp_path), base=base)  # the folder holds one weight file, of another name
    assert same(residuals(alone.controlnet, base), residuals(network, base))

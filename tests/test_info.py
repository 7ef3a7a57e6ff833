"""`controlkit info`: what it says of a file by its header alone is what loading does with it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapter_files import controlnet_of, original_controlnet, original_t2i, refusal, saved
from cases import seldom
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    T2IAdapter,
    UNet2DConditionModel,
)
from outcomes import Run
from torch import Tensor

from controlkit import light, union
from controlkit.adapters import AdapterInfo, MapSpec, load_adapter, write_adapter
from controlkit.base import Base
from controlkit.base_structure import read_base
from controlkit.families import ALIASES
from controlkit.formats import control_lora, expected
from controlkit.formats.lllite_keys import part_tensors, width_at
from controlkit.light import LightControl
from controlkit.lllite import Part

ROOT = Path(__file__).resolve().parent.parent
Load = Callable[[str], Base]
PUBLISHED = {"sd15": tiny_models.SD15_UNET, "sd21": tiny_models.SD21_UNET, "sdxl": tiny_models.SDXL_UNET}


def shapes(network: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}


def fits(run: Run, file: Path, base: object) -> str:
    """What `info` says of a file and a base: "yes", or "no, ..."."""
    lines = run("info", file, "--base", base).done().splitlines()
    (line,) = [line for line in lines if line.startswith(f"fits {base}: ")]
    said = line.removeprefix(f"fits {base}: ")
    assert (said == "yes") == lines[-1].startswith("  controlkit generate ")
    return said


def small_lora(base: Base, rank: int = 2) -> dict[str, Tensor]:
    """A Control-LoRA of a network that differs from its base in every weight."""
    network = controlnet_of(base)
    for parameter in network.parameters():
        parameter.data += 0.1
    return control_lora.reduce(network.state_dict(), base.unet.state_dict(), rank)


def lllite(place: str, width: int) -> dict[str, Tensor]:
    parts = {
        "conditioning1.0.weight": (4, 3, 4, 4),
        "conditioning1.2.weight": (8, 4, 4, 4),
        "down.0.weight": (4, width),
        "mid.0.weight": (4, 12),
        "up.0.weight": (width, 4),
    }
    parts |= {key.replace("weight", "bias"): shape[:1] for key, shape in parts.items()}
    return {f"lllite_unet_{place}.{key}": torch.zeros(shape) for key, shape in parts.items()}


@pytest.mark.parametrize("name", [*PUBLISHED, *tiny_models.FAMILIES])
def test_what_is_expected_is_what_diffusers_builds(name: str) -> None:
    config = PUBLISHED.get(name) or {"norm_num_groups": 8, **tiny_models.UNETS[name]}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        network = ControlNetModel.from_unet(unet, load_weights_from_unet=False, conditioning_channels=1)
    assert expected.controlnet_tensors(network.config) == shapes(network)
    copied = {key: shape for key, shape in shapes(unet).items() if key.startswith(expected.COPIED)}
    assert expected.encoder_tensors(unet.config) == copied
    if name in PUBLISHED:  # what is known of a base without its files
        assert expected.encoder_tensors(read_base(name).unet) == copied


def test_what_is_expected_of_the_other_kinds() -> None:
    sizes = {"block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 24}
    types = ("CrossAttnDownBlock2D", "DownBlock2D")
    variants: list[dict[str, Any]] = [
        {"adapter_type": "full_adapter", "channels": [16, 32, 32]},
        {"adapter_type": "light_adapter", "channels": [16, 32], "num_res_blocks": 3, "in_channels": 1},
        {"adapter_type": "full_adapter_xl", "channels": [16, 32, 32, 32], "downscale_factor": 16},
    ]
    with torch.device("meta"):
        several = ControlNetUnionModel(
            **sizes,
            down_block_types=types,
            addition_time_embed_dim=8,
            num_trans_channel=16,
            num_trans_layer=2,
        )
        plain = ControlNetModel(**sizes, down_block_types=types, mid_block_type="UNetMidBlock2D")
        adapters = [T2IAdapter(**variant) for variant in variants]
        lite = LightControl(1, (16, 32), (4, 8, 16), layers=3)
    assert expected.union_tensors(several.config) == shapes(several)
    assert expected.controlnet_tensors(plain.config) == shapes(plain)
    assert expected.lite_tensors(lite.config) == shapes(lite)
    assert expected.lite_tensors({**lite.config, "widths": [12]}) is None  # no norm has 8 groups of these
    for adapter in adapters:
        assert expected.t2i_tensors(adapter.config) == shapes(adapter)
    for change in (
        {"class_embed_type": "timestep"},
        {"attention_head_dim": 5},
        {"down_block_types": ("A", "B")},
    ):
        assert expected.controlnet_tensors({**plain.config, **change}) is None


@pytest.mark.parametrize("layout", ["diffusers", "original", "difference"])
def test_a_file_that_is_not_whole_is_named_as_loading_names_it(
    layout: str, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    network = controlnet_of(sd1)
    state = original_controlnet(network) if layout == "original" else dict(network.state_dict())
    if layout == "difference":
        state["difference"] = torch.zeros(0)
    assert fits(run, saved(state, tmp_path / "whole.safetensors"), models / "sd1") == "yes"
    bias = "middle_block.0.in_layers.2.bias" if layout == "original" else "mid_block.resnets.0.conv1.bias"
    gone = bias if layout == "original" else "controlnet_mid_block.bias"  # no base has this one
    named = "mid_block.resnets.0.conv1.bias" if layout == "original" else gone
    for name, broken, message in (
        ("lacks", {k: v for k, v in state.items() if k != gone}, f"lacks {named}"),
        (
            "wrong",
            {**state, bias: torch.zeros(3)},
            "the shape of mid_block.resnets.0.conv1.bias is 3 instead of",
        ),
    ):
        file = saved(broken, tmp_path / f"{name}.safetensors")
        told = message
        if (layout, name) == ("difference", "wrong"):
            told = "is the difference to another base: mid_block.resnets.0.conv1.bias is 3 in it and 32 in"
        refusal(file, sd1, told)
        assert told in fits(run, file, models / "sd1")
        alone = run("info", file).done().splitlines()
        assert alone[-1].startswith("can be used: no, ")
        assert message in alone[-1]


@pytest.mark.parametrize("kind", ["union", "t2i", "xs", "lite"])
def test_every_other_kind_is_checked_for_wholeness(
    kind: str, load: Load, models: Path, run: Run, tmp_path: Path
) -> None:
    base = load("sdxl")
    network: Any = {
        "union": lambda: union.from_base(base, 6, hint_channels=(4, 8)),
        "t2i": lambda: T2IAdapter(3, [16, 32, 32, 32], 2, 16, "full_adapter_xl"),
        "xs": lambda: ControlNetXSAdapter.from_unet(base.unet, block_out_channels=[8, 16, 16]),
        "lite": lambda: light.from_base(base),
    }[kind]()
    state = dict(network.state_dict())
    assert fits(run, saved(state, tmp_path / "a.safetensors"), models / "sdxl") == "yes"
    lost = [key for key in state if key.endswith(".bias") and "conv_in" not in key][-1]
    del state[lost]
    file = saved(state, tmp_path / "b.safetensors")
    refusal(file, base, f"lacks {lost}")
    assert f"lacks {lost}" in fits(run, file, models / "sdxl")
    assert f"lacks {lost}" in run("info", file).done().splitlines()[-1]


def test_a_control_lora_is_held_against_its_base(load: Load, models: Path, run: Run, tmp_path: Path) -> None:
    tensors = small_lora(load("sd1"))
    file = saved(tensors, tmp_path / "a.safetensors")
    assert fits(run, file, models / "sd1") == "yes"
    assert "changes 16x36 weights, and the base has 320x36 there" in fits(run, file, "sd15")
    assert "--base BASE " in run("info", file).done()
    up = next(name for name in tensors if name.endswith("to_q.up"))
    for name, broken, message in (
        ("alone", {k: v for k, v in tensors.items() if k != up}, "has only one of "),
        ("rank", {**tensors, up: tensors[up][:, :1]}, "to_q.up is of rank 1 and its "),
        ("flat", {**tensors, up.removesuffix("up") + "down": torch.zeros(())}, "to_q.down are no matrices"),
        ("zero", {k: v for k, v in tensors.items() if k != "zero_convs.2.0.weight"}, "lacks "),
    ):
        file = saved(broken, tmp_path / f"{name}.safetensors")
        refusal(file, load("sd1"), message)
        assert message in fits(run, file, models / "sd1")
        assert message in run("info", file).done().splitlines()[-1]


def test_an_lllite_is_held_against_its_base(load: Load, models: Path, run: Run, tmp_path: Path) -> None:
    place = "input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    file = saved(lllite(place, 32), tmp_path / "a.safetensors")
    assert fits(run, file, models / "sdxl") == "yes"
    assert "takes 640 channels there, and 32 in the file" in fits(run, file, "sdxl")
    assert "--base BASE " in run("info", file).done()
    wide = saved(lllite(place, 640), tmp_path / "b.safetensors")
    assert fits(run, wide, "sdxl") == "yes"
    assert "takes 32 channels there, and 640 in the file" in fits(run, wide, models / "sdxl")
    assert "--base sdxl " in run("info", wide).done()


def test_the_command_has_the_base_that_the_file_names(
    sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    def told(base: str, name: str = "a.safetensors") -> str:
        info = AdapterInfo(map=MapSpec("canny"), family="sd1", base=base)
        write_adapter(controlnet_of(sd1), tmp_path / name, layout="single", info=info)
        return run("info", name).done().splitlines()[-1].split(" --control ")[0]

    beginning = "  controlkit generate PROMPT --base "
    assert told("my-own-sd1") == f"{beginning}BASE"  # a folder's name, which is not here
    assert told("somebody/some-base") == f"{beginning}somebody/some-base"
    assert told(str(models / "sd1")) == f"{beginning}{models / 'sd1'}"
    assert told(str(models / "sdxl")) == f"{beginning}BASE"
    assert told("sd15") == f"{beginning}BASE"  # whose sizes are others
    assert told(ALIASES["sd15"]) == f"{beginning}BASE"
    assert told("") == f"{beginning}BASE"


def test_a_t2i_adapter_is_of_the_family_that_it_says(run: Run, tmp_path: Path) -> None:
    network = T2IAdapter(3, [16, 32, 32], 1, 16, "full_adapter_xl")
    write_adapter(network, tmp_path / "a.safetensors", layout="single", info=AdapterInfo(family="sd2"))
    assert "a T2I-Adapter for SD2, " in run("info", "a.safetensors").done()
    saved(original_t2i(network), tmp_path / "b.safetensors")
    assert "a T2I-Adapter for SDXL, " in run("info", "b.safetensors").done()


def test_a_changed_byte_is_named(sd1: Base, models: Path, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(controlnet_of(sd1), file, layout="single", info=AdapterInfo(family="sd1"))
    assert fits(run, file, models / "sd1") == "yes"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "a.safetensors is damaged: its weights are not those" in fits(run, file, models / "sd1")
    assert run("info", file).done().splitlines()[-1].startswith("can be used: no, ")


@pytest.mark.parametrize("name", ["gone.safetensors", "runs/gone.pth", "./gone.ckpt"])
def test_a_file_that_is_not_there_is_said_to_be_no_file(name: str, run: Run) -> None:
    message = f"no adapter called '{name}': there is no such file"
    assert run("info", name).refused() == message
    assert message in run("convert", name, "b.safetensors", "--to", "single").refused()


def test_a_control_lora_gets_the_rank_that_it_was_trained_with(
    sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    network = controlnet_of(sd1)
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    for adapter, rank, message in (
        ("control-lora", 4, "rank 4 keeps"),
        ("controlnet", 4, "rank 128 keeps"),
    ):
        info = AdapterInfo(family="sd1", training={"recipe": {"adapter": adapter, "rank": rank}})
        write_adapter(network, tmp_path / "a.safetensors", layout="single", info=info)
        order = (
            "convert",
            "a.safetensors",
            "b.safetensors",
            "--to",
            "control-lora",
            "--base",
            models / "sd1",
        )
        assert message in run(*order).done()
    assert "rank 2 keeps" in run(*order, "--rank", 2).done()


def test_a_sharded_file_is_as_large_as_all_of_its_shards(sd1: Base, run: Run, tmp_path: Path) -> None:
    controlnet_of(sd1).save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    total = sum(file.stat().st_size for file in (tmp_path / "shards").glob("*.safetensors"))
    assert f", {total / 1e6:.1f} MB" in run("info", "shards").done().splitlines()[0]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_where_an_lllite_may_be_is_where_the_unet_has_projections(family: str, load: Load) -> None:
    unet = load(family).unet
    own = {
        name: projection.in_features
        for name, projection in unet.named_modules()
        if name.endswith((".attn1.to_q", ".attn2.to_q"))
    }
    sides = (*(f"{side}_blocks.{level}" for side in ("down", "up") for level in range(5)), "mid_block")
    for side in sides:
        for layer in range(4):
            for block in range(3):
                for attention in ("attn1", "attn2"):
                    place = f"{side}.attentions.{layer}.transformer_blocks.{block}.{attention}.to_q"
                    assert width_at(place, unet.config) == own.get(place), place


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_what_is_expected_of_a_part_of_an_lllite(depth: int) -> None:
    assert part_tensors(10, 8, 3, depth) == shapes(Part(10, 8, 3, depth))


def test_common_files_need_no_libraries(load: Load, models: Path, tmp_path: Path) -> None:
    """A Control-LoRA and an LLLite among them, which are held against the base's configuration."""
    saved(small_lora(load("sdxl")), tmp_path / "a.safetensors")
    saved(lllite("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 32), tmp_path / "b.safetensors")
    saved(dict(light.from_base(load("sdxl")).state_dict()), tmp_path / "c.safetensors")
    saved(union.from_base(load("sdxl"), 6, hint_channels=(4, 8)).state_dict(), tmp_path / "d.safetensors")
    saved(T2IAdapter(3, [16, 32, 32, 32], 2, 16, "full_adapter_xl").state_dict(), tmp_path / "e.safetensors")
    code = (
        "import sys\nfrom controlkit import info_job\n"
        "for name in 'abcde':\n"
        "    told = info_job.describe(f'{name}.safetensors', base=sys.argv[1])\n"
        "    assert f'fits {sys.argv[1]}: yes' in told, told\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(models / "sdxl")]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


CONTRADICTIONS = {
    "cross_attention_dim": 64,
    "layers_per_block": 1,
    "conditioning_channels": 4,
    "block_out_channels": [16, 32, 64, 64],
    "use_linear_projection": True,
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_a_folder_with_another_networks_config_says_so(
    run: Run, models: Path, load: Load, tmp_path: Path, key: str
) -> None:
    folder = tmp_path / "adapter"
    controlnet_of(load("sd1")).save_pretrained(folder)
    assert fits(run, folder, models / "sd1") == "yes"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: CONTRADICTIONS[key]}))
    said = fits(run, folder, models / "sd1")
    assert said.startswith(f"no, {folder / 'config.json'} says {key} ")
    assert said.endswith(
        "it is another network's (the file diffusion_pytorch_model.safetensors tells by itself)"
    )
    refusal(folder, load("sd1"), said.removeprefix("no, "))
    assert fits(run, folder / "diffusion_pytorch_model.safetensors", models / "sd1") == "yes"


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, "inf"),
        (torch.bfloat16, "nan"),
        *seldom((torch.float32, "nan"), (torch.float16, "-inf")),
    ],
    ids=str,
)
def test_numbers_that_are_not_finite_are_named_as_loading_names_them(
    run: Run, models: Path, load: Load, tmp_path: Path, dtype: torch.dtype, value: str
) -> None:
    state = {key: tensor.to(dtype) for key, tensor in controlnet_of(load("sd1")).state_dict().items()}
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    state["conv_in.bias"][0], state["conv_in.bias"][1] = -largest, largest
    for suffix in ("safetensors", "pth"):
        path = tmp_path / f"whole.{suffix}"
        saved(state, path) if suffix == "safetensors" else torch.save(state, path)
        assert fits(run, path, models / "sd1") == "yes"
        load_adapter(str(path), base=load("sd1"))
    state["conv_in.bias"][1] = float(value)
    for suffix in ("safetensors", "pth"):
        path = tmp_path / f"damaged.{suffix}"
        saved(state, path) if suffix == "safetensors" else torch.save(state, path)
        why = f"{path}: the weights in conv_in.bias are not all finite numbers"
        assert fits(run, path, models / "sd1") == f"no, {why}"
        with pytest.raises(ValueError, match=re.escape(why)):
            load_adapter(str(path), base=load("sd1"))

"""The other kinds of adapter files: differences, whole checkpoints, T2I, Union, XS, and what is not run."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapter_files import (
    controlnet_of,
    original_controlnet,
    original_t2i,
    refusal,
    residuals,
    same,
    saved,
)
from cases import seldom
from diffusers import ControlNetUnionModel, ControlNetXSAdapter, T2IAdapter, UNetControlNetXSModel
from outcomes import Run
from safetensors.torch import load_file
from torch import Tensor

from controlkit.adapters import Adapter, AdapterInfo, MapSpec, load_adapter, write_adapter
from controlkit.base import Base
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.formats.writing import config_of

Load = Callable[[str], Base]


def is_same(left: Any, right: Any) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def filled(network: Any) -> Any:
    return tiny_models.randomize_zero_convs(network).eval()


# Differences and whole checkpoints


def difference(network: Any, base: Base) -> dict[str, Tensor]:
    """A ControlNet minus its base, as the webui's difference files hold it: the copied part alone."""
    trunk = base.unet.state_dict()
    changed = type(network).from_config(network.config)
    changed.load_state_dict(
        {key: value - trunk[key] if key in trunk else value for key, value in network.state_dict().items()}
    )
    return {**original_controlnet(changed, prefix="control_model."), "difference": torch.ones(1)}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("suffix", [".safetensors", *seldom(".pth")])
def test_a_difference_is_added_to_its_base(family: str, suffix: str, load: Load, tmp_path: Path) -> None:
    base = load(family)
    network = controlnet_of(base, seed=1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    file = saved(difference(network, base), tmp_path / f"diff{suffix}")
    assert open_adapter_file(file).kind == "controlnet-difference"
    adapter = load_adapter(str(file), base=base)
    for ours, theirs in zip(residuals(adapter.controlnet, base), residuals(network, base), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    without = {key: value for key, value in load_adapter_state(file).items() if key != "difference"}
    plain = load_adapter(str(saved(without, tmp_path / "plain.safetensors")), base=base)
    assert not same(residuals(plain.controlnet, base), residuals(network, base)), "it is another network"


def test_a_difference_with_diffusers_keys_is_one(load: Load, tmp_path: Path) -> None:
    base = load("sd1")
    network, trunk = controlnet_of(base), base.unet.state_dict()
    state = {
        key: value - trunk[key] if key in trunk else value for key, value in network.state_dict().items()
    }
    file = saved({**state, "difference": torch.ones(1)}, tmp_path / "a.safetensors")
    assert open_adapter_file(file).kind == "controlnet-difference"
    assert is_same(load_adapter(str(file), base=base).controlnet, network)


def test_a_difference_need_not_hold_what_has_not_changed(
    load: Load, models: Path, run: Run, tmp_path: Path
) -> None:
    """As sd-webui-controlnet's extract_controlnet_diff.py writes them."""
    base = load("sd1")
    network = controlnet_of(base, seed=3)  # whose copy has not been trained
    with torch.no_grad():
        network.mid_block.resnets[0].conv1.weight.add_(0.1)
        network.down_blocks[0].resnets[0].norm1.bias.sub_(0.1)
    held = difference(network, base)
    same = [key for key, tensor in held.items() if tensor.abs().max() < 1e-6]
    left_out = {key for key in same if re.search(r"\.bias$|norm|attn1|\.ff\.|to_v|to_out", key)}
    whole = saved(held, tmp_path / "whole.safetensors")
    file = saved({k: v for k, v in held.items() if k not in left_out}, tmp_path / "changes.safetensors")
    assert len(left_out) > 100
    loaded = load_adapter(str(file), base=base).controlnet
    assert is_same(loaded, load_adapter(str(whole), base=base).controlnet)
    own, of_base = loaded.state_dict(), base.unet.state_dict()
    assert not any(own[key].data_ptr() == of_base[key].data_ptr() for key in own if key in of_base)
    for base_of in ((), ("--base", models / "sd1")):
        told = run("info", file, *base_of).done()
        assert f"it leaves out {len(left_out)} tensors, which are the base's unchanged" in told
        assert "no, " not in told


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_mark_may_be_a_plain_value_or_have_the_prefix_of_all_keys(
    wrapped: bool, load: Load, tmp_path: Path
) -> None:
    state = original_controlnet(controlnet_of(load("sd1")), prefix="control_model.")

    def kind(mark: dict[str, Any]) -> str:
        held = {"state_dict": state, **mark} if wrapped else {**state, **mark}
        torch.save(held, tmp_path / "a.pth")
        return open_adapter_file(tmp_path / "a.pth").kind

    assert kind({"difference": True}) == "controlnet-difference"
    assert kind({"difference": False}) == "controlnet"
    saved({**state, "control_model.difference": torch.ones(1)}, tmp_path / "b.safetensors")
    assert open_adapter_file(tmp_path / "b.safetensors").kind == "controlnet-difference"


def load_adapter_state(file: Path) -> dict[str, Tensor]:
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


def test_a_difference_needs_its_base(load: Load, models: Path, run: Run, tmp_path: Path) -> None:
    base = load("sd1")
    file = saved(difference(controlnet_of(base), base), tmp_path / "d.safetensors")
    refused = run("convert", file, "whole.safetensors", "--to", "single").refused()
    assert "is a ControlNet stored as the difference to its base: name the base that it is for" in refused
    run("convert", file, "whole.safetensors", "--to", "single", "--base", models / "sd1").done()
    whole = load_adapter("whole.safetensors", base=base).controlnet
    assert is_same(whole, load_adapter(str(file), base=base).controlnet)
    told = run("info", file, "--base", models / "sd1").done()
    assert "a ControlNet stored as the difference to its base for SD1, original keys" in told
    assert "its weights are changes to its base's" in told
    nine = tiny_models.nine_channels(base)
    assert is_same(load_adapter(str(file), base=nine).controlnet, whole)


@pytest.mark.parametrize("wrapped", [False, True])
def test_of_a_whole_checkpoint_the_control_part_is_taken(wrapped: bool, load: Load, tmp_path: Path) -> None:
    base = load("sd1")
    network = controlnet_of(base)
    state: dict[str, Any] = {
        **{f"model.diffusion_model.{key}": tensor for key, tensor in original_controlnet(network).items()},
        **original_controlnet(network, prefix="control_model."),
        "first_stage_model.encoder.conv_in.weight": torch.randn(4, 3, 3, 3),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77),
        "betas": torch.rand(1000),
        "alphas_cumprod_prev": torch.rand(1000),
        "sqrt_one_minus_alphas_cumprod": torch.rand(1000),
    }
    whole: Any = {"state_dict": state, "epoch": 3, "global_step": 400} if wrapped else state
    file = saved(whole, tmp_path / "control_sd15_canny.pth") if not wrapped else tmp_path / "a.ckpt"
    if wrapped:
        torch.save(whole, file)
    adapter = load_adapter(str(file), base=base)
    assert same(residuals(adapter.controlnet, base), residuals(network, base))
    assert open_adapter_file(file).parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda state: {key: value.half() for key, value in state.items()}, "float16"),
        (lambda state: {key: value.bfloat16() for key, value in state.items()}, "bfloat16"),
        (
            lambda state: {k: v.half() if "norm" not in k else v for k, v in state.items()},
            "mixed (float16, float32)",
        ),
    ],
)
def test_every_precision_is_read(change: Any, dtype: str, load: Load, tmp_path: Path) -> None:
    base = load("sd1")
    network = controlnet_of(base)
    file = saved(change(network.state_dict()), tmp_path / "a.safetensors")
    assert open_adapter_file(file).dtype == dtype
    adapter = load_adapter(str(file), base=base)
    assert {parameter.dtype for parameter in adapter.controlnet.parameters()} == {torch.float32}
    for ours, theirs in zip(residuals(adapter.controlnet, base), residuals(network, base), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_projections_stored_as_matrices(load: Load, tmp_path: Path) -> None:
    """Some files hold SD1's 1x1 convolutions as matrices; the width of the text tells that they are SD1."""
    folder = tiny_models.build(tmp_path / "base", "sd1", sample_size=8, cross_attention_dim=768)
    from controlkit.base import load_base

    base = load_base(str(folder))
    network = controlnet_of(base)
    state = {
        key: value.flatten(1) if "proj_in.weight" in key or "proj_out.weight" in key else value
        for key, value in network.state_dict().items()
    }
    file = saved(state, tmp_path / "a.safetensors")
    adapter = load_adapter(str(file), base=base)
    assert adapter.info.family == "sd1"
    assert same(residuals(adapter.controlnet, base), residuals(network, base))


# T2I-Adapters


T2I: dict[str, dict[str, Any]] = {
    "full": {"channels": [16, 32, 32, 32], "adapter_type": "full_adapter"},
    "grey": {"channels": [16, 32, 32, 32], "adapter_type": "full_adapter", "in_channels": 1},
    "deep": {"channels": [16, 32, 32, 32], "adapter_type": "full_adapter", "num_res_blocks": 3},
    "light": {"channels": [16, 32, 32], "adapter_type": "light_adapter", "num_res_blocks": 4},
    "xl": {"channels": [16, 32, 32, 32], "adapter_type": "full_adapter_xl", "downscale_factor": 16},
}


@pytest.mark.parametrize("variant", T2I)
def test_t2i_adapters_in_both_layouts(variant: str, load: Load, tmp_path: Path) -> None:
    base = load("sdxl" if variant == "xl" else "sd1")
    torch.manual_seed(4)
    network = T2IAdapter(**T2I[variant]).eval()
    channels = T2I[variant].get("in_channels", 3)
    picture = torch.rand(1, channels, 128, 128)
    files = {
        "theirs.pth": original_t2i(network),
        "theirs.safetensors": original_t2i(network),
        "ours.safetensors": network.state_dict(),
        "prefixed.safetensors": {f"adapter.{key}": value for key, value in original_t2i(network).items()},
    }
    for name, state in files.items():
        file = saved(state, tmp_path / name)
        opened = open_adapter_file(file)
        assert (opened.kind, opened.layout) == ("t2i-adapter", "diffusers" if "ours" in name else "original")
        assert opened.family == ("sdxl" if variant == "xl" else "")
        adapter = load_adapter(str(file), base=base)
        assert isinstance(adapter.controlnet, T2IAdapter)
        assert adapter.info.map.channels == channels
        with torch.no_grad():
            assert same(adapter.controlnet(picture), network(picture))
    info = AdapterInfo(map=MapSpec("sketch", channels=channels))
    for layout in ("single", "original", "diffusers"):
        path = tmp_path / ("folder" if layout == "diffusers" else f"{layout}.safetensors")
        write_adapter(network, path, layout=layout, info=info)
        read = load_adapter(str(path), base=base)
        assert is_same(read.controlnet, network)
        assert read.info == info
        assert dict(read.controlnet.config)["adapter_type"] == T2I[variant]["adapter_type"]
    assert load_file(tmp_path / "original.safetensors").keys() == original_t2i(network).keys()


def test_who_reads_a_light_t2i_adapter_is_said(tmp_path: Path, run: Run) -> None:
    note = "ComfyUI and sd-webui-controlnet read a light T2I-Adapter by the original's keys: --to original"
    for variant, to, notes in (("light", "single", 1), ("light", "original", 0), ("full", "single", 0)):
        write_adapter(T2IAdapter(**T2I[variant]), tmp_path / "a.safetensors", layout="original")
        told = run("convert", tmp_path / "a.safetensors", f"{variant}-{to}.safetensors", "--to", to).done()
        assert told.splitlines().count(note) == notes


def test_nested_and_published_t2i_files(load: Load, tmp_path: Path, run: Run) -> None:
    network = T2IAdapter(channels=[320, 640, 1280, 1280])
    torch.save({"adapter": original_t2i(network)}, tmp_path / "t2i.pth")
    told = run("info", tmp_path / "t2i.pth", "--base", "sd15").done()
    assert "a T2I-Adapter for SD1 or SD2, original keys, " in told
    assert "fits sd15: yes" in told
    other = run("info", tmp_path / "t2i.pth", "--base", "sdxl").done()
    assert "fits sdxl: no, " in other
    assert "it is for SD1 or SD2 (adapter_type full_adapter), the base is SDXL" in other
    refusal(
        tmp_path / "t2i.pth",
        load("sd1"),
        "(channels 320/640/1280/1280), the base is SD1 (channels 16/32/32/32)",
    )


def test_an_adapter_of_another_family_is_told_with_both_sizes(load: Load, tmp_path: Path) -> None:
    small = T2IAdapter(**T2I["xl"])
    file = saved(small.state_dict(), tmp_path / "xl.safetensors")
    refusal(file, load("sd1"), "does not fit the base")
    refusal(file, load("sd1"), "it is for SDXL")


# Union and XS


def union_of(base: Base, kinds: int = 8) -> ControlNetUnionModel:
    config = base.unet.config
    names = ("block_out_channels", "down_block_types", "cross_attention_dim", "attention_head_dim")
    more = ("transformer_layers_per_block", "use_linear_projection", "norm_num_groups", "addition_embed_type")
    same_as_base = {name: config[name] for name in (*names, *more)}
    torch.manual_seed(5)
    return filled(
        ControlNetUnionModel(
            **same_as_base,
            addition_time_embed_dim=config.addition_time_embed_dim,
            projection_class_embeddings_input_dim=config.projection_class_embeddings_input_dim,
            conditioning_embedding_out_channels=(16, 32, 96, 256),
            num_control_type=kinds,
            num_trans_channel=16,
            num_proj_channel=16,
        )
    )


@pytest.mark.parametrize("kinds", [6, 8])
def test_union_files(kinds: int, load: Load, tmp_path: Path, run: Run) -> None:
    base = load("sdxl")
    network = union_of(base, kinds)
    file = saved(network.state_dict(), tmp_path / "union.safetensors")
    opened = open_adapter_file(file)
    assert (opened.kind, opened.family) == ("controlnet-union", "sdxl")
    assert opened.config["num_control_type"] == kinds
    adapter = load_adapter(str(file), base=base)
    assert isinstance(adapter.controlnet, ControlNetUnionModel)
    assert is_same(adapter.controlnet, network)
    assert union_output(adapter.controlnet, kinds) == union_output(network, kinds)
    assert f"a ControlNet-Union of {kinds} kinds for SDXL, diffusers keys" in run("info", file).done()
    round_trips(adapter, base, tmp_path, network)
    with pytest.raises(ValueError, match="a ControlNetUnionModel has no original layout"):
        write_adapter(network, tmp_path / "b.safetensors", layout="original")
    refusal(file, load("sd1"), "it is for SDXL")


@pytest.mark.parametrize("called", ["ControlNetUnionModel", "ControlNetModel_Union", "ControlNetModel"])
def test_a_folder_is_a_union_by_its_weights(called: str, load: Load, tmp_path: Path) -> None:
    """Whatever its configuration calls it; and what this version's class does not take of it is left."""
    base = load("sdxl")
    network = union_of(base)
    network.save_pretrained(tmp_path / "union")
    config = tmp_path / "union" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({**told, "_class_name": called, "of_a_later_version": 5}))
    read = load_adapter(str(tmp_path / "union"), base=base).controlnet
    assert isinstance(read, ControlNetUnionModel)
    assert union_output(read, 8) == union_output(network, 8)


def union_output(network: Any, kinds: int) -> float:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        down, mid = network(
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.tensor([300]),
            torch.randn(1, 77, 64, generator=generator),
            [torch.rand(1, 3, 64, 64, generator=generator)],
            control_type=torch.eye(kinds)[:1],
            control_type_idx=[0],
            added_cond_kwargs={"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)},
            return_dict=False,
        )
    return float(mid.double().sum() + sum(skip.double().sum() for skip in down))


def round_trips(adapter: Adapter, base: Base, folder: Path, network: Any) -> None:
    info = AdapterInfo(map=MapSpec("canny"), family=base.family)
    write_adapter(adapter, folder / "one.safetensors", layout="single", info=info)
    write_adapter(adapter, folder / "folder", info=info)
    for place in (folder / "one.safetensors", folder / "folder"):
        read = load_adapter(str(place), base=base)
        assert is_same(read.controlnet, network)
        assert read.info == info
        assert public(read.controlnet) == public(adapter.controlnet)


def public(network: Any) -> dict[str, Any]:
    """A network's configuration as JSON has it, without what diffusers remembers of how it was made."""
    return {key: value for key, value in config_of(network).items() if not key.startswith("_")}


@pytest.mark.parametrize(
    ("family", "learns_time"),
    [
        ("sd1", False),
        ("sd2", True),
        *(
            pytest.param(*way, marks=pytest.mark.slow)
            for way in (("sd1", True), ("sd2", False), ("sdxl", False), ("sdxl", True))
        ),
    ],
)
def test_xs_files(family: str, learns_time: bool, load: Load, tmp_path: Path, run: Run) -> None:
    base = load(family)
    torch.manual_seed(6)
    widths = [8, 16, 16, 16][: len(base.unet.config.block_out_channels)]
    network = filled(
        ControlNetXSAdapter.from_unet(base.unet, block_out_channels=widths, learn_time_embedding=learns_time)
    )
    file = saved(network.state_dict(), tmp_path / "xs.safetensors")
    assert open_adapter_file(file).kind == "controlnet-xs"
    adapter = load_adapter(str(file), base=base)
    assert isinstance(adapter.controlnet, ControlNetXSAdapter)
    assert is_same(adapter.controlnet, network)
    pair = [UNetControlNetXSModel.from_unet(base.unet, net).eval() for net in (adapter.controlnet, network)]
    assert xs_output(pair[0], base) == xs_output(pair[1], base)
    round_trips(adapter, base, tmp_path, network)
    assert "a ControlNet-XS for " in run("info", file).done()
    run("convert", file, "b.safetensors", "--to", "single").done()  # which needs no network
    assert load_file("b.safetensors").keys() == network.state_dict().keys()
    refused = run("convert", file, "b", "--to", "diffusers").refused()
    assert "does not say how many attention heads it has" in refused
    other = load("sd1" if family == "sdxl" else "sdxl")
    refusal(file, other, "does not fit the base")


def xs_output(model: Any, base: Base) -> float:
    generator = torch.Generator().manual_seed(1)
    added = (
        {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)} if base.family == "sdxl" else None
    )
    with torch.no_grad():
        (sample,) = model(
            torch.randn(1, 4, 16, 16, generator=generator),
            torch.tensor([300]),
            torch.randn(1, 77, base.unet.config.cross_attention_dim, generator=generator),
            torch.rand(1, 3, 128, 128, generator=generator),
            added_cond_kwargs=added,
            return_dict=False,
        )
    return float(sample.double().abs().sum())


# Those that are recognised and not run


def lllite_state() -> dict[str, Tensor]:
    place = "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    parts = {
        "conditioning1.0.weight": (16, 3, 4, 4),
        "conditioning1.2.weight": (32, 16, 4, 4),
        "down.0.weight": (16, 640),
        "mid.0.weight": (16, 48),
        "up.0.weight": (640, 16),
    }
    parts |= {key.replace("weight", "bias"): shape[:1] for key, shape in parts.items()}
    return {f"{place}.{key}": torch.randn(shape) for key, shape in parts.items()}


def test_lllite_and_controlnext_are_named(load: Load, tmp_path: Path, run: Run) -> None:
    lllite = saved(lllite_state(), tmp_path / "lllite.safetensors")
    opened = open_adapter_file(lllite)
    assert (opened.kind, opened.layout, opened.family) == ("lllite", "kohya", "sdxl")
    refusal(lllite, load("sd1"), "it is for SDXL, the base is SD1")
    told = run("info", lllite).done()
    assert "a ControlNet-LLLite for SDXL, kohya keys" in told
    assert "--base sdxl --map KIND=MAP --adapter KIND=" in told
    refused = run("convert", lllite, "b.safetensors", "--to", "single").refused()
    assert "a ControlNet-LLLite is read only" in refused
    state = {"down_res.0.conv1.weight": torch.zeros(2, 2), "mid_convs.0.0.weight": torch.zeros(2, 2)}
    next_ = saved(state, tmp_path / "next.safetensors")
    refusal(next_, load("sd1"), "is a ControlNeXt, which controlkit does not run")


def test_8_bit_floats_are_read(load: Load, tmp_path: Path, run: Run) -> None:
    base = load("sd1")
    state = {key: value.to(torch.float8_e4m3fn) for key, value in controlnet_of(base).state_dict().items()}
    file = saved(state, tmp_path / "a.safetensors")
    assert open_adapter_file(file).dtype == "float8_e4m3fn"
    network = load_adapter(str(file), base=base).controlnet
    assert all(torch.equal(network.state_dict()[key], value.float()) for key, value in state.items())
    assert "float8_e4m3fn" in run("info", file).done()

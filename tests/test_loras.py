"""LoRA files on a base: against a plain computation, and against diffusers' pipelines where peft is there."""

import copy
import json
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import Run
from safetensors.torch import load_file, save_file
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents
from torch import Tensor

from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.files import sha256_file
from controlkit.formats.finding import mark_of_lora
from controlkit.images import load_picture, read_png_text
from controlkit.loras import Lora, with_loras

# Of each family: the layer's path -> its name in kohya's files. Linear and convolution layers, of both parts.
SD1 = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_down_blocks_0_attentions_0_"
    "transformer_blocks_0_attn1_to_q",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": "lora_unet_mid_block_attentions_0_"
    "transformer_blocks_0_attn2_to_k",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0": "lora_unet_up_blocks_1_attentions_0_"
    "transformer_blocks_0_attn2_to_out_0",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": "lora_unet_up_blocks_1_attentions_0_"
    "transformer_blocks_0_ff_net_0_proj",
    "unet.down_blocks.0.attentions.0.proj_in": "lora_unet_down_blocks_0_attentions_0_proj_in",
    "unet.down_blocks.0.resnets.0.conv1": "lora_unet_down_blocks_0_resnets_0_conv1",
    "text_encoder.encoder.layers.0.self_attn.q_proj": "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
    "text_encoder.encoder.layers.0.self_attn.out_proj": "lora_te_text_model_encoder_layers_0_"
    "self_attn_out_proj",
    "text_encoder.encoder.layers.2.mlp.fc1": "lora_te_text_model_encoder_layers_2_mlp_fc1",
}
SDXL = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "lora_unet_input_blocks_4_1_"
    "transformer_blocks_0_attn1_to_q",
    "unet.mid_block.attentions.0.transformer_blocks.1.attn2.to_v": "lora_unet_middle_block_1_"
    "transformer_blocks_1_attn2_to_v",
    "unet.up_blocks.0.attentions.2.proj_in": "lora_unet_output_blocks_2_1_proj_in",
    "unet.down_blocks.0.resnets.0.conv1": "lora_unet_input_blocks_1_0_in_layers_2",
    "text_encoder.encoder.layers.0.self_attn.k_proj": "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
    "text_encoder.encoder.layers.0.self_attn.out_proj": "lora_te1_text_model_encoder_layers_0_"
    "self_attn_out_proj",
    "text_encoder_2.text_model.encoder.layers.1.self_attn.out_proj": "lora_te2_text_model_encoder_layers_1_"
    "self_attn_out_proj",
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "lora_te2_text_model_encoder_layers_0_mlp_fc2",
}
# Layers in the names that ComfyUI writes: the original U-Net's, and its own for the text encoders.
COMFY = {
    "sd1": {
        "unet.conv_in": "diffusion_model.input_blocks.0.0",
        "unet.time_embedding.linear_2": "diffusion_model.time_embed.2",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "diffusion_model.input_blocks.1.1."
        "transformer_blocks.0.attn1.to_q",
        "unet.down_blocks.0.downsamplers.0.conv": "diffusion_model.input_blocks.3.0.op",
        "unet.mid_block.resnets.1.time_emb_proj": "diffusion_model.middle_block.2.emb_layers.1",
        "unet.up_blocks.0.upsamplers.0.conv": "diffusion_model.output_blocks.2.1.conv",
        "unet.up_blocks.1.upsamplers.0.conv": "diffusion_model.output_blocks.5.2.conv",
        "unet.up_blocks.3.attentions.1.proj_in": "diffusion_model.output_blocks.10.1.proj_in",
        "unet.up_blocks.3.resnets.2.conv_shortcut": "diffusion_model.output_blocks.11.0.skip_connection",
        "unet.conv_out": "diffusion_model.out.2",
        "text_encoder.encoder.layers.2.mlp.fc1": "text_encoders.clip_l.transformer.text_model.encoder.layers."
        "2.mlp.fc1",
    },
    "sdxl": {
        "unet.add_embedding.linear_1": "diffusion_model.label_emb.0.0",
        "unet.up_blocks.0.upsamplers.0.conv": "diffusion_model.output_blocks.2.2.conv",
        "unet.up_blocks.0.attentions.2.proj_in": "diffusion_model.output_blocks.2.1.proj_in",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc2": "text_encoders.clip_g.transformer.text_model."
        "encoder.layers.0.mlp.fc2",
    },
}
LAYERS = {"sd1": SD1, "sdxl": SDXL}
WEIGHT = 0.8

# By the layer's place and rank. A file without alphas means its ranks.
ALPHAS: dict[str, Callable[[int, int], float]] = {
    "differ": lambda index, rank: 3.0 if index % 3 else 1.5,
    "equal": lambda index, rank: 3.0,
    "none": lambda index, rank: float(rank),
}

Factors = dict[str, tuple[Tensor, Tensor, float]]


def part(base: Base, name: str) -> tuple[Any, str]:
    """The network and the path in it."""
    network, _, path = name.partition(".")
    return {
        "unet": base.unet,
        **dict(zip(("text_encoder", "text_encoder_2"), base.text_encoders, strict=False)),
    }[network], path


def layer(base: Base, name: str) -> Any:
    network, path = part(base, name)
    for found in (path, path.removeprefix("text_model."), f"text_model.{path}"):
        try:
            return network.get_submodule(found)
        except AttributeError:
            continue
    raise AssertionError(name)


def random_factors(
    base: Base,
    family: str,
    *,
    alphas: Callable[[int, int], float] = ALPHAS["differ"],
    names: Iterable[str] | None = None,
) -> Factors:
    """Down, up and alpha of every layer, or of these; the ranks differ."""
    generator = torch.Generator().manual_seed(3)
    found = {}
    for index, name in enumerate(names or LAYERS[family]):
        shape, rank = layer(base, name).weight.shape, 2 + index % 2
        down = 0.3 * torch.randn((rank, *shape[1:]), generator=generator)
        up = 0.3 * torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=generator)
        found[name] = (down, up, alphas(index, rank))
    return found


def kohya(factors: Factors, family: str) -> dict[str, Tensor]:
    return named(factors, LAYERS[family])


def named(factors: Factors, stems: Mapping[str, str]) -> dict[str, Tensor]:
    """What kohya's files hold of each layer, with other names of the layers."""
    state = {}
    for name, (down, up, alpha) in factors.items():
        stem = stems[name]
        state |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    return state


def with_text_model(name: str) -> str:
    """How files name a layer of CLIP, whatever the libraries here call it."""
    return name.replace("text_encoder.encoder", "text_encoder.text_model.encoder")


def peft_keys(factors: Factors, family: str) -> dict[str, Tensor]:
    state = {}
    for name, (down, up, _) in factors.items():
        stem = with_text_model(name)
        state |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    return state


def diffusers_keys(factors: Factors, family: str) -> dict[str, Tensor]:
    state = {}
    for name, (down, up, _) in factors.items():
        kind = "lora_linear_layer" if name.startswith("text") else "lora"
        stem = with_text_model(name)
        state |= {f"{stem}.{kind}.down.weight": down, f"{stem}.{kind}.up.weight": up}
    return state


STYLES: dict[str, Callable[[Factors, str], dict[str, Tensor]]] = {
    "kohya": kohya,
    "peft": peft_keys,
    "diffusers": diffusers_keys,
}


def write(path: Path, base: Base, family: str, style: str, alphas: str = "differ") -> tuple[Path, Factors]:
    factors = random_factors(base, family, alphas=ALPHAS[alphas if style == "kohya" else "none"])
    state = {key: tensor.contiguous() for key, tensor in STYLES[style](factors, family).items()}
    save_file(state, path)
    return path, factors


def merged(weight: Tensor, down: Tensor, up: Tensor, alpha: float) -> Tensor:
    """W + 0.8 alpha/rank B A, in words of its own."""
    if weight.ndim == 2:
        change = torch.einsum("or,ri->oi", up, down)
    else:
        change = torch.einsum("or,rihw->oihw", up[..., 0, 0], down)
    return weight + WEIGHT * alpha / len(down) * change


def copied(base: Base) -> Base:
    """The same base in tensors of its own."""
    return replace(
        base,
        unet=copy.deepcopy(base.unet),
        text_encoders=[copy.deepcopy(part) for part in base.text_encoders],
    )


def assert_merged(base: Base, changed: Base, factors: Factors) -> None:
    for name, (down, up, alpha) in factors.items():
        expected = merged(layer(base, name).weight, down, up, alpha)
        torch.testing.assert_close(layer(changed, name).weight.data, expected, rtol=1e-5, atol=1e-6)
        assert (expected - layer(base, name).weight).abs().max() > 1e-2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("family", LAYERS)
def test_a_lora_is_merged_into_a_copy(
    load: Callable[[str], Base], tmp_path: Path, family: str, style: str
) -> None:
    base = load(family)
    before = base.digest()
    file, factors = write(tmp_path / "lora.safetensors", base, family, style)
    changed = with_loras(base, [Lora(str(file), WEIGHT)])
    assert base.digest() == before
    assert_merged(base, changed, factors)
    kept = {
        id(parameter) for network in (base.unet, *base.text_encoders) for parameter in network.parameters()
    }
    others = [p for network in (changed.unet, *changed.text_encoders) for p in network.parameters()]
    assert sum(id(parameter) not in kept for parameter in others) == len(factors), "the rest is shared"
    assert not any(parameter.requires_grad for parameter in others)


@pytest.mark.parametrize(
    "style", ["kohya", *(pytest.param(s, marks=pytest.mark.slow) for s in ("peft", "diffusers"))]
)
@pytest.mark.parametrize("family", LAYERS)
def test_pictures_with_a_lora_equal_the_pipelines(
    load: Callable[[str], Base], tmp_path: Path, family: str, style: str
) -> None:
    pytest.importorskip("peft")
    base = load(family)
    # Of alphas that differ diffusers 0.42.1 loses those of attentions (peft 0.21.2 warns of it).
    file, _ = write(tmp_path / "lora.safetensors", base, family, style, alphas="equal")
    controls = [Control(controlnet_of(base), cond())]

    def fused(pipeline: Any) -> None:
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        pipeline.fuse_lora(lora_scale=WEIGHT)

    request: dict[str, Any] = {"seed": 7, "steps": 3, "scheduler": "ddim"}
    ours = our_latents(with_loras(base, [Lora(str(file), WEIGHT)]), controls, **request)
    assert_same(ours, their_latents(copied(base), controls, **request, prepare=fused))
    assert (ours - our_latents(base, controls, **request)).abs().max() > 1e-2


def test_the_oldest_names_are_read(sd1: Base, tmp_path: Path) -> None:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up, _ = random_factors(sd1, "sd1", alphas=ALPHAS["none"])[name]
    for prefix in ("unet.", ""):
        stem = prefix + "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
        save_file({f"{stem}.down.weight": down, f"{stem}.up.weight": up}, tmp_path / "old.safetensors")
        changed = with_loras(sd1, [Lora(str(tmp_path / "old.safetensors"), WEIGHT)])
        expected = merged(layer(sd1, name).weight, down, up, len(down))
        torch.testing.assert_close(layer(changed, name).weight.data, expected)


@pytest.mark.parametrize("family", COMFY)
def test_names_of_comfyui_are_read(load: Callable[[str], Base], tmp_path: Path, family: str) -> None:
    base, file = load(family), tmp_path / "lora.safetensors"
    factors = random_factors(base, family, names=COMFY[family])
    save_file(named(factors, COMFY[family]), file)
    assert_merged(base, with_loras(base, [Lora(str(file), WEIGHT)]), factors)


@pytest.mark.parametrize(
    ("stem", "ends"),
    [
        ("base_model.model.{path}", ("lora_A", "lora_B")),
        ("unet.{path}", ("lora_A.default", "lora_B.default")),
        ("unet.base_model.model.{path}", ("lora_A.some_name", "lora_B.some_name")),
        ("unet.{path}", ("lora_down", "lora_up")),
        ("lycoris_{flat}", ("lora_down", "lora_up")),
    ],
)
def test_names_of_other_programs_are_read(
    sd1: Base, tmp_path: Path, stem: str, ends: tuple[str, str]
) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = random_factors(sd1, "sd1", names=[name])
    down, up, alpha = factors[name]
    path = name.removeprefix("unet.")
    stem = stem.format(path=path, flat=path.replace(".", "_"))
    state = {f"{stem}.{end}.weight": factor for end, factor in zip(ends, (down, up), strict=True)}
    save_file({**state, f"{stem}.alpha": torch.tensor(alpha)}, tmp_path / "lora.safetensors")
    assert_merged(sd1, with_loras(sd1, [Lora(str(tmp_path / "lora.safetensors"), WEIGHT)]), factors)


@pytest.mark.parametrize(
    "stem",
    [
        "text_encoders.clip_h.transformer.text_model.encoder.layers.2.mlp.fc1",  # of an SD2
        "lycoris_text_model_encoder_layers_2_mlp_fc1",
    ],
)
def test_names_of_the_text_encoder_are_read(sd1: Base, tmp_path: Path, stem: str) -> None:
    name = "text_encoder.encoder.layers.2.mlp.fc1"
    factors = random_factors(sd1, "sd1", names=[name])
    save_file(named(factors, {name: stem}), tmp_path / "lora.safetensors")
    assert_merged(sd1, with_loras(sd1, [Lora(str(tmp_path / "lora.safetensors"), WEIGHT)]), factors)


def test_a_file_may_mix_names(load: Callable[[str], Base], tmp_path: Path) -> None:
    base, file = load("sdxl"), tmp_path / "lora.safetensors"
    first = "unet.add_embedding.linear_2"
    of_unet = random_factors(base, "sdxl", names=[first])
    of_text = random_factors(base, "sdxl", names=list(SDXL)[4:], alphas=ALPHAS["none"])
    state = named(of_unet, {first: "lora_unet_add_embedding_linear_2"})
    save_file({**state, **peft_keys(of_text, "sdxl")}, file)
    assert_merged(base, with_loras(base, [Lora(str(file), WEIGHT)]), of_unet | of_text)
    again = {key.replace("lora_unet_", "lycoris_"): tensor.clone() for key, tensor in state.items()}
    save_file({**state, **again}, file)
    assert "holds the layer unet.add_embedding.linear_2 twice: as l" in refusal(base, file)


def test_alphas_stand_in_the_header_of_newer_files(sd1: Base, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    factors = random_factors(sd1, "sd1", alphas=ALPHAS["none"])
    down, up, _ = factors[name]
    rules = {"unet.lora_alpha": 1, "unet.alpha_pattern": {"attn2.to_k": 5}}
    for told, alpha in (
        (rules, 5.0),
        ({"unet.lora_alpha": 1, "unet.alpha_pattern": {"attn2.to_k": 5, "to_k": 9}}, 5.0),  # the first counts
        ({"unet.lora_alpha": 2, "unet.alpha_pattern": {"2.to_k": 5, "attn2": 5, "attn.": 5}}, 2.0),
        ({"unet.lora_alpha": 7, "unet.use_rslora": True}, 7 * len(down) ** 0.5),
    ):
        file = tmp_path / "lora.safetensors"
        save_file(peft_keys({name: factors[name]}, "sd1"), file, {"lora_adapter_metadata": json.dumps(told)})
        changed = with_loras(sd1, [Lora(str(file), WEIGHT)])
        expected = merged(layer(sd1, name).weight, down, up, alpha)
        torch.testing.assert_close(layer(changed, name).weight.data, expected)


def test_a_folder_of_peft_says_its_strength_beside_the_weights(sd1: Base, tmp_path: Path) -> None:
    of_unet, of_text = (
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "text_encoder.encoder.layers.2.mlp.fc1",
    )
    for name, path in ((of_unet, of_unet[len("unet.") :]), (of_text, of_text[len("text_encoder.") :])):
        down, up, _ = random_factors(sd1, "sd1", names=[name])[name]
        stem, file = f"base_model.model.{path}", tmp_path / "adapter_model.safetensors"
        save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, file)
        for told, alpha in (
            ({"lora_alpha": 16, "alpha_pattern": {}}, 16.0),
            ({"lora_alpha": 16, "use_rslora": True}, 16 * len(down) ** 0.5),
            ({"lora_alpha": 16, "alpha_pattern": {path: 5}}, 5.0),
        ):
            (tmp_path / "adapter_config.json").write_text(json.dumps(told))
            expected = merged(layer(sd1, name).weight, down, up, alpha)
            for source in (file, tmp_path):
                changed = with_loras(sd1, [Lora(str(source), WEIGHT)])
                torch.testing.assert_close(layer(changed, name).weight.data, expected)
    before = mark_of_lora(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 7}))
    assert mark_of_lora(str(tmp_path)) != before
    (tmp_path / "adapter_config.json").unlink()
    with pytest.warns(UserWarning, match=r"peft writes into adapter_config\.json beside it, and that"):
        with_loras(sd1, [Lora(str(tmp_path))])


def test_several_loras_add_up_and_a_folder_is_searched(sd1: Base, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    file, factors = write(tmp_path / "folder" / "some.safetensors", sd1, "sd1", "kohya")
    twice = with_loras(sd1, [Lora(str(file), 0.5 * WEIGHT), Lora(str(file.parent), 0.5 * WEIGHT)])
    for name, (down, up, alpha) in factors.items():
        expected = merged(layer(sd1, name).weight, down, up, alpha)
        torch.testing.assert_close(layer(twice, name).weight.data, expected, rtol=1e-5, atol=1e-6)
    assert with_loras(sd1, []).digest() == sd1.digest()
    assert with_loras(sd1, [Lora(str(file), 0)]).digest() == sd1.digest()
    save_file({k: t * (not k.endswith("alpha")) for k, t in load_file(file).items()}, file)  # alphas of 0
    assert with_loras(sd1, [Lora(str(file))]).digest() == sd1.digest()


def test_a_half_precision_base_is_rounded_once(sd1: Base, tmp_path: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    base = replace(sd1, unet=copy.deepcopy(sd1.unet).to(torch.bfloat16), dtype=torch.bfloat16)
    factors, file = random_factors(sd1, "sd1", names=[name]), tmp_path / "lora.safetensors"
    save_file(kohya(factors, "sd1"), file)
    changed = with_loras(base, [Lora(str(file), 0.01 * WEIGHT)] * 100)  # each is about a rounding
    expected = merged(layer(base, name).weight.float(), *factors[name]).to(torch.bfloat16)
    assert layer(changed, name).weight.dtype == torch.bfloat16
    torch.testing.assert_close(layer(changed, name).weight.data, expected, rtol=2**-8, atol=1e-3)


def refusal(base: Base, source: object, weight: float = 1.0) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        with_loras(base, [Lora(str(source), weight)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_lora_for_this_base(load: Callable[[str], Base], tmp_path: Path) -> None:
    sd1, file = load("sd1"), tmp_path / "lora.safetensors"
    for style in STYLES:
        write(file, load("sdxl"), "sdxl", style)
        assert refusal(sd1, file) == (
            f"{file} was made for a base whose text is 64 wide; that of the SD1 base {sd1.name} is 32 wide"
        )
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 17), f"{stem}.lora_B.weight": torch.ones(16, 2)}, file)
    assert f"{stem} is 16x17 in it and 16x16 in the base" in refusal(sd1, file)
    save_file(
        {"transformer.x.lora_A.weight": torch.ones(2, 2), "transformer.x.lora_B.weight": torch.ones(2, 2)},
        file,
    )
    assert "has no layer unet.transformer.x" in refusal(sd1, file)
    stem = "lora_unet_nonsense_block"
    save_file(
        {f"{stem}.lora_down.weight": torch.ones(2, 2), f"{stem}.lora_up.weight": torch.ones(2, 2)}, file
    )
    assert refusal(sd1, file).endswith("which has no layer lora_unet_nonsense_block")
    assert "a LoRA's weight must be a number from -10 to 10, not 11" in refusal(sd1, file, 11)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_unet_mid_block_attentions_0_proj_in.dora_scale", "is a DoRA (lora_unet_mid_block"),
        ("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "is a LoHa (lora_unet_mid_block"),
        ("lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", "is a LoCon with a core tensor"),
        ("unet.conv_in.lora_B.bias", "holds unet.conv_in.lora_B.bias, which is no part of a LoRA"),
    ],
)
def test_other_kinds_are_named(sd1: Base, tmp_path: Path, key: str, message: str) -> None:
    file, _ = write(tmp_path / "lora.safetensors", sd1, "sd1", "kohya")
    save_file({**load_file(file), key: torch.ones(2)}, file)
    assert message in refusal(sd1, file)


@pytest.mark.parametrize(
    ("layer", "network"),
    [
        ("lora_unet_double_blocks_0_img_attn_proj", "Flux or a network like it"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "Flux or a network like it"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", "SD3"),
        ("diffusion_model.blocks.0.self_attn.q", "Wan"),
        ("transformer.transformer_blocks.0.attn.to_q", "a diffusion transformer like SD3 or Flux"),
    ],
)
def test_loras_for_other_networks_are_named(sd1: Base, tmp_path: Path, layer: str, network: str) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 2), f"{layer}.lora_B.weight": torch.ones(2, 2)}, file)
    assert refusal(sd1, file) == (
        f"{file} is a LoRA for {network} ({layer}.lora_A.weight), not for the SD1 base {sd1.name}"
    )


@pytest.mark.parametrize(
    ("kept", "missing"),
    [(("alpha",), "down"), (("down", "alpha"), "up"), (("up", "alpha"), "down"), (("up",), "down")],
)
def test_the_key_that_a_file_lacks_is_named(
    sd1: Base, tmp_path: Path, kept: tuple[str, ...], missing: str
) -> None:
    file, _ = write(tmp_path / "lora.safetensors", sd1, "sd1", "kohya")
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    keys = {"down": f"{stem}.lora_down.weight", "up": f"{stem}.lora_up.weight", "alpha": f"{stem}.alpha"}
    shapes = {"down": (2, 32, 1, 1), "up": (32, 2, 1, 1), "alpha": ()}
    save_file({**load_file(file), **{keys[part]: torch.ones(shapes[part]) for part in kept}}, file)
    assert refusal(sd1, file) == (
        f"{file} is damaged: {stem} has not both factors of a LoRA: there is no {keys[missing]}"
    )


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), [1.0, 2.0]])
def test_alphas_that_are_no_numbers(sd1: Base, tmp_path: Path, alpha: Any) -> None:
    file, _ = write(tmp_path / "lora.safetensors", sd1, "sd1", "kohya")
    state = load_file(file)
    key = next(key for key in state if key.endswith(".alpha"))
    save_file({**state, key: torch.tensor(alpha)}, file)
    assert refusal(sd1, file) == f"{file} is damaged: its {key} is no finite number"


def test_damaged_files(sd1: Base, tmp_path: Path) -> None:
    file, _ = write(tmp_path / "lora.safetensors", sd1, "sd1", "peft")
    state, whole = load_file(file), file.read_bytes()
    first = next(iter(state))
    for changes, message in (
        ({first: torch.full_like(state[first], float("nan"))}, "holds no finite matrix"),
        ({first: torch.ones(5, state[first].shape[1])}, "which no product fits"),
    ):
        save_file({**state, **changes}, file)
        assert message in refusal(sd1, file)
    conv = "unet.down_blocks.0.resnets.0.conv1"
    for part, shape, message in (
        ("lora_A", (3, 16, 1, 1), f"{conv} is 16x16 in it and 16x16x3x3 in the base"),
        ("lora_B", (16, 3, 3, 3), "which no product fits"),
    ):
        save_file({**state, f"{conv}.{part}.weight": torch.ones(shape)}, file)
        assert message in refusal(sd1, file)
    save_file({key: tensor for key, tensor in state.items() if key != first}, file)
    assert "has not both factors" in refusal(sd1, file)
    save_file(state, file, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": float("nan")})})
    assert "in its lora_adapter_metadata is no finite number" in refusal(sd1, file)
    file.write_bytes(whole[:-10])
    assert "is cut short" in refusal(sd1, file)
    save_file({"conv_in.weight": torch.ones(2)}, file)
    assert "is not a LoRA: it holds conv_in.weight" in refusal(sd1, file)
    save_file({}, file)
    assert "is empty" in refusal(sd1, file)
    pickle = tmp_path / "lora.pt"
    torch.save(state, pickle)
    assert "is a pickle, which could run code" in refusal(sd1, pickle)
    assert "there is no LoRA nowhere.safetensors" in refusal(sd1, "nowhere.safetensors")
    assert "of owner/name is needed: it is not in the cache" in refusal(sd1, "owner/name")
    (tmp_path / "empty").mkdir()
    assert "the folder holds no .safetensors files" in refusal(sd1, tmp_path / "empty")


def test_loras_on_the_command_line(generate: Run, run: Run, models: Path) -> None:
    base = load_base(str(models / "sd1"))
    file, _ = write(Path("ein Stil.safetensors"), base, "sd1", "kohya")
    generate("-o", "plain.png").done()
    generate("--lora", f"{file}:0.5", "-o", "out.png").done()
    told = read_png_text("out.png")
    (lora,) = json.loads(told["controlkit"])["loras"]
    assert (lora["source"], lora["weight"], lora["sha256"]) == (str(file), 0.5, sha256_file(file))
    assert told["parameters"].splitlines()[0] == "a cube <lora:ein Stil:0.5>"
    assert not np.array_equal(load_picture("out.png"), load_picture("plain.png"))
    Path("moved").mkdir()
    for moved in (file, Path("out.png")):
        shutil.copy(moved, "moved")
    file.unlink()
    run("generate", "--like", "moved/out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    shutil.copy(Path("moved") / file, file)
    run("generate", "--like", "out.png", "--lora", f"{file}:0", "-o", "off.png").done()
    assert np.array_equal(load_picture("off.png"), load_picture("plain.png"))
    assert "from -10 to 10, not 11" in generate("--lora", f"{file}:11").refused()
    assert "there is no LoRA nowhere" in generate("--lora", "nowhere").refused()
    assert f"behind {file} stands '0,5', and not a number" in generate("--lora", f"{file}:0,5").refused()
    shutil.copy(file, "second.safetensors")
    generate("--lora", f"{file}:0.5", "--lora", "second.safetensors:0.25", "-o", "out.png").done()
    write(file, base, "sd1", "peft")
    changed = run("generate", "--like", "out.png").refused()
    assert f"was made from {file}, which has changed since" in changed
    advice = shlex.split(changed.partition("to use it as it is now, add ")[2])
    assert advice == ["--lora", f"{file}:0.5", "--lora", "second.safetensors:0.25"]

"""Adapter files for tests: networks that do something, and files of other projects.

The latter are written out module by module, without our map of keys.

The names follow the original ControlNet's and T2I-Adapter's modules: blocks are counted in the order in which
a picture passes them, and every layer is named by its place in its block.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from diffusers import ControlNetModel
from safetensors.torch import save_file
from torch import Tensor, nn

from controlkit.adapters import load_adapter
from controlkit.base import Base
from controlkit.controlnet import from_base


def controlnet_of(base: Base, *, seed: int = 1, **changes: Any) -> ControlNetModel:
    """A control network of a base that does something, as after training."""
    return tiny_models.randomize_zero_convs(from_base(base, seed=seed, **changes)).eval()


def residuals(network: Any, base: Base, channels: int = 3) -> list[Tensor]:
    """What diffusers' own forward pass of a control network gives for one input."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    text = base.unet.config.cross_attention_dim
    added = None
    if base.family == "sdxl":
        added = {"text_embeds": draw(1, 32), "time_ids": draw(1, 6)}
    with torch.no_grad():
        down, mid = network(
            draw(1, 4, 8, 8),
            torch.tensor([400]),
            draw(1, 77, text),
            torch.rand(1, channels, 64, 64, generator=generator),
            added_cond_kwargs=added,
            return_dict=False,
        )
    return [*down, mid]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def saved(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    tensors = {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path, metadata)
    else:
        torch.save(tensors, path)
    return path


def refusal(path: Path | str, base: Base, message: str) -> None:
    """Loading raises a ValueError of one line that contains the message."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        load_adapter(str(path), base=base)
    assert "\n" not in str(error.value)


def original_controlnet(network: Any, *, prefix: str = "") -> dict[str, Tensor]:
    """The state of a diffusers ControlNetModel as ``cldm.ControlNet`` would save it."""
    state: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        state.update({f"{prefix}{name}.{key}": tensor.clone() for key, tensor in module.state_dict().items()})

    def put_resnet(name: str, resnet: Any) -> None:
        put(f"{name}.in_layers.0", resnet.norm1)
        put(f"{name}.in_layers.2", resnet.conv1)
        put(f"{name}.emb_layers.1", resnet.time_emb_proj)
        put(f"{name}.out_layers.0", resnet.norm2)
        put(f"{name}.out_layers.3", resnet.conv2)
        if resnet.conv_shortcut is not None:
            put(f"{name}.skip_connection", resnet.conv_shortcut)

    put("time_embed.0", network.time_embedding.linear_1)
    put("time_embed.2", network.time_embedding.linear_2)
    if network.config.addition_embed_type == "text_time":
        put("label_emb.0.0", network.add_embedding.linear_1)
        put("label_emb.0.2", network.add_embedding.linear_2)
    put("input_blocks.0.0", network.conv_in)
    number = 0
    for level in network.down_blocks:
        for layer, resnet in enumerate(level.resnets):
            number += 1
            put_resnet(f"input_blocks.{number}.0", resnet)
            if getattr(level, "attentions", None):
                put(f"input_blocks.{number}.1", level.attentions[layer])
        if level.downsamplers is not None:
            number += 1
            put(f"input_blocks.{number}.0.op", level.downsamplers[0].conv)
    put_resnet("middle_block.0", network.mid_block.resnets[0])
    put("middle_block.1", network.mid_block.attentions[0])
    put_resnet("middle_block.2", network.mid_block.resnets[1])
    for index, zero_conv in enumerate(network.controlnet_down_blocks):
        put(f"zero_convs.{index}.0", zero_conv)
    put("middle_block_out.0", network.controlnet_mid_block)
    hint = network.controlnet_cond_embedding
    for index, conv in enumerate([hint.conv_in, *hint.blocks, hint.conv_out]):
        put(f"input_hint_block.{2 * index}", conv)
    return state


def original_t2i(network: Any) -> dict[str, Tensor]:
    """The state of a diffusers T2IAdapter as TencentARC's ``Adapter`` or ``Adapter_light`` would save it."""
    state: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        state.update({f"{name}.{key}": tensor.clone() for key, tensor in module.state_dict().items()})

    if network.config.adapter_type == "light_adapter":
        for number, level in enumerate(network.adapter.body):
            put(f"body.{number}.in_conv", level.in_conv)
            for index, resnet in enumerate(level.resnets):
                put(f"body.{number}.body.{index}.block1", resnet.block1)
                put(f"body.{number}.body.{index}.block2", resnet.block2)
            put(f"body.{number}.out_conv", level.out_conv)
        return state
    put("conv_in", network.adapter.conv_in)
    number = 0
    for level in network.adapter.body:
        if level.in_conv is not None:
            put(f"body.{number}.in_conv", level.in_conv)
        for resnet in level.resnets:
            put(f"body.{number}.block1", resnet.block1)
            put(f"body.{number}.block2", resnet.block2)
            number += 1
    return state

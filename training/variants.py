"""The networks that can be trained: how they are made, and which of their weights are trained.

| `adapter` | network | source |
|---|---|---|
| controlnet | the whole copy of the encoder | Zhang et al. 2023 (arXiv:2302.05543) |
| control-lora | low-rank updates of the copy, through peft | Hu et al. 2021 (arXiv:2106.09685) |
| controlnet-xs | a narrow encoder, connected both ways | Zavadski et al. 2023 (arXiv:2312.06573) |
| t2i-adapter | features of the map, once for a picture | Mou et al. 2023 (arXiv:2302.08453) |
| controlnet-union | a copy for several kinds of maps | see `controlkit.union` |
| lite | one encoder of the map, added once | after ControlNeXt (arXiv:2408.06070), see `controlkit.light` |
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from controlkit import union
from controlkit.base import BUNDLED
from controlkit.controlnet import (
    HINT_CHANNELS,
    check_copyable,
    from_base,
    seeded,
    to_train,
    trainable_parameters,
)
from controlkit.families import t2i_shape
from controlkit.formats.description import ENCODER
from controlkit.kinds import kind_of
from controlkit.training.config_adapter import COPIES, ControlNetRecipe

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from controlkit.adapters import Adapter
    from controlkit.base import Base

_TRUNK = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
_LORA = "lora_"


def make_network(
    recipe: ControlNetRecipe,
    unet: UNet2DConditionModel,
    channels: int,
    *,
    hint_channels: Sequence[int] | None = None,
) -> Any:
    """An untrained network of the recipe's variant for maps of so many channels, float32.

    hint_channels: widths of a hint encoder of a ControlNet's kind, by default the recipe's.

    Raises ValueError for a base that it cannot be made for, and where peft is wanted and missing.
    """
    check_copyable(unet.config)
    if recipe.adapter in ("t2i-adapter", "lite"):
        return (_t2i if recipe.adapter == "t2i-adapter" else _light)(recipe, unet, channels)
    usual = (8, 16, 48, 96) if recipe.base in BUNDLED else HINT_CHANNELS
    widths = tuple(hint_channels or recipe.hint_channels or usual)
    if recipe.adapter == "controlnet-xs":
        return _cross(recipe, unet, channels, widths)
    if recipe.adapter == "controlnet-union":
        kinds = len(recipe.data.map_column)
        return union.from_base(unet, kinds, hint_channels=widths, seed=recipe.seed)
    network = from_base(unet, conditioning_channels=channels, hint_channels=widths, seed=recipe.seed)
    return with_low_rank(network, recipe.rank, seed=recipe.seed) if is_low_rank(recipe) else network


def started_from(
    recipe: ControlNetRecipe,
    base: Base,
    channels: int,
    *,
    report: Callable[[str], None] | None = None,
) -> Any:
    """The network of the recipe's `init`, float32, to be trained on.

    ``report``: is told where `init` seems to have another base than the recipe says.

    Raises ValueError for one that does not fit the base, the recipe's variant, or the maps.
    """
    from controlkit.adapters import load_adapter

    assert recipe.init is not None
    adapter = load_adapter(recipe.init, base=base, dtype=torch.float32)
    network = adapter.controlnet
    _check_init(recipe, adapter, channels)
    if recipe.adapter in COPIES and not _is_made_whole(recipe.init):
        _carry_over(recipe, adapter, base, report)
    if recipe.only_mid_control:  # what is not trained shall not act, wherever the result is used
        with torch.no_grad():
            for parameter in network.controlnet_down_blocks.parameters():
                parameter.zero_()
    return with_low_rank(network, recipe.rank, seed=recipe.seed) if is_low_rank(recipe) else network


def _check_init(recipe: ControlNetRecipe, adapter: Adapter, channels: int) -> None:
    """Raise ValueError for an adapter of another variant than the recipe's, or for other maps."""
    network = adapter.controlnet
    kind = kind_of(network)
    wanted = "controlnet" if recipe.adapter in COPIES else recipe.adapter
    if kind.name != wanted:
        raise ValueError(f"init {recipe.init!r} is a {kind.title}, and adapter={recipe.adapter} is trained")
    if kind.trained_channels(network) != channels:
        raise ValueError(
            f"init {recipe.init!r} takes maps of {kind.trained_channels(network)} channels, and the data's"
            f" have {channels}"
        )
    widths = tuple(network.config.get("conditioning_embedding_out_channels", ()))
    if recipe.hint_channels and widths and widths != tuple(recipe.hint_channels):
        raise ValueError(
            f"init {recipe.init!r} has a hint encoder of the widths {list(widths)}, and hint_channels are"
            f" {list(recipe.hint_channels)}: leave them out"
        )
    columns, known = " + ".join(recipe.data.map_column), adapter.info.map.kind
    if recipe.adapter == "controlnet-union" and known != columns:
        raise ValueError(
            f"init {recipe.init!r} knows the maps {known or 'of others'}, in this order, and data.map_column"
            f" has {columns}"
        )


def _is_made_whole(init: str) -> bool:
    """Whether a file holds changes to a base, so that loading it made it of the present one already."""
    from controlkit.formats.adapter_file import open_adapter_file
    from controlkit.formats.finding import find_adapter_file
    from controlkit.formats.recognise import OF_BASE

    file = find_adapter_file(init)
    return file is not None and open_adapter_file(file).kind in OF_BASE


def _carry_over(
    recipe: ControlNetRecipe, adapter: Adapter, base: Base, report: Callable[[str], None] | None
) -> None:
    """Move an adapter of the recipe's `init_base` to the base, and say what speaks against its coming from
    there.
    """
    from controlkit.base_parts import load_unet
    from controlkit.transfer import transfer_state

    new = base.unet.state_dict()
    old = new if recipe.init_base is None else load_unet(recipe.init_base).state_dict()
    state = adapter.controlnet.state_dict()
    moved = state if old is new else transfer_state(state, old, new)
    if report is not None:
        doubt = _doubt(state, adapter.info.training.get(ENCODER), old, new)
        if doubt:
            report(doubt.format(init=recipe.init, old=recipe.init_base, new=recipe.base))
    adapter.controlnet.load_state_dict(moved)


def _doubt(
    state: Mapping[str, Tensor], made_from: str | None, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> str:
    """What speaks against an adapter's coming from the U-Net ``old``; "" if nothing.

    ``made_from``: what it says itself; None of other software's, where distances tell.
    """
    from controlkit.transfer import distances, encoder_digest

    if made_from is None:
        if old is new or (gaps := distances(state, old, new)).old <= gaps.new:
            return ""
        return (
            "init {init} is nearer to the base {new} than to init_base={old}: are they the right way round?"
        )
    if encoder_digest(old) == made_from:
        return ""
    if old is new:
        return "init {init} was trained on another base than {new}: init_base=ITS_BASE carries it over"
    return "init {init} was trained on another base than init_base={old}"


def is_low_rank(recipe: ControlNetRecipe) -> bool:
    """Whether updates of low rank are trained, and not the weights themselves."""
    return recipe.adapter == "control-lora"


def _cross(recipe: ControlNetRecipe, unet: Any, channels: int, hint_channels: Sequence[int]) -> Any:
    from diffusers import ControlNetXSAdapter

    if unet.config.layers_per_block != 2:
        raise ValueError(
            f"controlnet-xs needs a base with 2 layers in each block, not {unet.config.layers_per_block}"
        )
    widths = [max(int(width * recipe.size_ratio) // 8 * 8, 8) for width in unet.config.block_out_channels]
    heads = [max(width // 64, 1) for width in widths]
    with seeded(recipe.seed):  # what `ControlNetXSAdapter.from_unet` does, without moving it
        network = ControlNetXSAdapter(
            conditioning_channels=channels,
            conditioning_embedding_out_channels=tuple(hint_channels),
            learn_time_embedding=True,
            num_attention_heads=heads,
            block_out_channels=widths,
            base_block_out_channels=unet.config.block_out_channels,
            cross_attention_dim=unet.config.cross_attention_dim,
            down_block_types=unet.config.down_block_types,
            sample_size=unet.config.sample_size,
            transformer_layers_per_block=unet.config.transformer_layers_per_block,
            upcast_attention=unet.config.upcast_attention,
            max_norm_num_groups=unet.config.norm_num_groups,
            use_linear_projection=unet.config.use_linear_projection,
        )
    network.time_embedding.load_state_dict(unet.time_embedding.state_dict())
    return to_train(network, unet)


def _t2i(recipe: ControlNetRecipe, unet: Any, channels: int) -> Any:
    from diffusers import T2IAdapter

    shape = t2i_shape(unet.config)
    with seeded(recipe.seed):
        network = T2IAdapter(
            in_channels=channels,
            channels=list(shape.channels),
            downscale_factor=shape.factor,
            adapter_type=shape.adapter_type,
        )
    return to_train(network, unet)


def _light(recipe: ControlNetRecipe, unet: Any, channels: int) -> Any:
    from controlkit.light import from_base as light

    return light(unet, conditioning_channels=channels, seed=recipe.seed)


def with_low_rank(network: Any, rank: int, *, seed: int) -> Any:
    """The copy with a low-rank update beside each of its trunk's matrices and convolutions, zero at first.

    Raises ValueError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("adapter=control-lora needs peft: pip install controlkit[lora]") from error
    names = [
        name
        for name, module in network.named_modules()
        if name.startswith(_TRUNK) and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
    first = next(network.parameters())
    if not isinstance(first, FakeTensor):
        with seeded(seed):
            inject_adapter_in_model(config, network)
        return network
    with unset_fake_temporarily():  # peft moves what it makes, which tensors without content cannot be
        inject_adapter_in_model(config, network)
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not isinstance(parameter, FakeTensor):
                    setattr(module, name, nn.Parameter(first.fake_mode.from_tensor(parameter.data)))
    return network


def without_low_rank(network: Any) -> Any:
    """A copy of the network in which the updates are part of the weights: a plain ControlNet."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(network)
    layers = [(name, module) for name, module in merged.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(merged.get_submodule(parent), own, layer.get_base_layer())
    return merged


def mark_trained(network: Any, unet: UNet2DConditionModel, recipe: ControlNetRecipe) -> None:
    """Require gradients of what the recipe trains, and of nothing else."""
    trainable_parameters(network, unet, sd_locked=recipe.sd_locked)
    kind = kind_of(network)
    if is_low_rank(recipe):
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(_LORA in name or kind.starts_at_zero(name) or name.startswith(kind.hint))
    if recipe.only_mid_control:
        network.controlnet_down_blocks.requires_grad_(False)
    if recipe.gradient_checkpointing:
        if network._supports_gradient_checkpointing:
            network.enable_gradient_checkpointing()
        unet.enable_gradient_checkpointing()

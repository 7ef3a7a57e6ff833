"""The kinds of control networks: what the sampler and the training ask of a network, whatever it is.

A network is an instance of one of diffusers' classes, or of `light.LightControl`; its kind is found by its
class. `encode` runs once for a map. What acts in a step is either residuals (`control_residuals`), or, for
networks that work with the U-Net layer by layer, a crossing (`cross.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from controlkit import controlnet as pair
from controlkit import union
from controlkit.controlnet import Residuals, check_channels
from controlkit.rules import connection_levels, layer_weights

Hint = tuple[Tensor, ...]
"""What `encode` makes of a map: one tensor, or several, each (1|B, ...)."""


class Kind:
    """A ControlNet, and what the other kinds have in common with it."""

    class_name = "ControlNetModel"
    name = "controlnet"
    title = "ControlNet"
    crosses = False
    """Whether it works with the U-Net layer by layer."""
    hooks = False
    """Whether it acts within the U-Net's layers."""
    can_rest = True
    """Whether it is run by itself in each step, of which some can be left out."""
    enters_encoder = False
    """Whether its residuals change the U-Net's encoder, too."""
    local = True
    """Whether a part of its hint is the hint of a part of the map."""
    bands = True
    """Whether its hint may be made of bands of the map."""
    zero: tuple[str, ...] = ("controlnet_down_blocks", "controlnet_mid_block")
    """Beginnings of the names of parameters that start at zero."""
    hint: tuple[str, ...] = ("controlnet_cond_embedding",)
    """Beginnings of the names of the map's encoder's parameters."""

    def starts_at_zero(self, name: str) -> bool:
        """Whether a parameter of this name is zero before training."""
        return name.startswith(self.zero)

    def channels(self, network: Any) -> int:
        """Of the map."""
        return int(network.config.conditioning_channels)

    def trained_channels(self, network: Any) -> int:
        """Of the maps that it is trained on: of several kinds, one behind the other."""
        return self.channels(network)

    def pools(self, network: Any) -> bool:
        """Whether it acts on the picture as a whole."""
        return bool(network.config.get("global_pool_conditions", False))

    def levels(self, network: Any) -> list[int]:
        """How often each connection to the U-Net was halved in size; one connection has no order."""
        return connection_levels(network.config)

    def number(self, network: Any, map_kind: str, own: Sequence[str]) -> int:
        """The place of a kind of map among those that the network knows, ``own`` by its own account."""
        return 0

    def curve(self, name: str, levels: Sequence[int]) -> tuple[float, ...]:
        """The weights of a named curve of layers (`rules.CURVES`)."""
        return layer_weights(name, levels) if len(levels) > 1 else (1.0,)

    def connections(self, count: int) -> str:
        """Its connections in words, the first first."""
        if count == 1:
            return "1 connection"
        return f"{count} connections: {count - 1} skips, the shallowest first, and the middle block"

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        """(B, C, 8h, 8w) in [0, 1] to what `residuals` takes. number: see `number`."""
        return (pair.encode_hint(network, controlnet_cond),)

    def residuals(
        self,
        network: Any,
        noisy_latents: Tensor,
        timesteps: Tensor,
        encoder_hidden_states: Tensor,
        *,
        hint: Hint,
        added_cond: Mapping[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
    ) -> Residuals:
        """What the network adds in one step. hint: what `encode` made."""
        return pair.control_residuals(
            network,
            noisy_latents,
            timesteps,
            encoder_hidden_states,
            hint[0],
            added_cond=added_cond,
            class_labels=class_labels,
        )


class _T2I(Kind):
    """A T2I-Adapter: features of the map at every size, once for a picture, added within the encoder.

    Mou et al. 2023 (arXiv:2302.08453), section 3.2, equation 3.
    """

    class_name = "T2IAdapter"
    name, title, local, enters_encoder, can_rest = "t2i-adapter", "T2I-Adapter", False, True, False
    zero, hint = (), ("adapter.conv_in", "adapter.body.0.in_conv")

    def channels(self, network: Any) -> int:
        return int(network.config.in_channels)

    def levels(self, network: Any) -> list[int]:
        full_size = network.config.adapter_type != "full_adapter_xl"
        return ([0, 1, 2, 3] if full_size else [1, 1, 2, 2])[: len(network.adapter.body)]

    def curve(self, name: str, levels: Sequence[int]) -> tuple[float, ...]:
        if name == "soft-webui" and len(levels) == 4:
            return (0.25, 0.62, 0.825, 1.0)  # as sd-webui-controlnet has them (scripts/hook.py)
        return super().curve(name, levels)

    def connections(self, count: int) -> str:
        return f"{count} connections, the largest features first"

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        """SDXL's adapters halve the U-Net's cells: a map that ends within a pair of them is continued at its
        edge, as the U-Net rounds up, too. (diffusers' pipeline makes a smaller picture instead.)
        """
        check_channels(self.channels(network), controlnet_cond)
        height, width = (-side % network.downscale_factor for side in controlnet_cond.shape[-2:])
        if height or width:
            controlnet_cond = nn.functional.pad(controlnet_cond, (0, width, 0, height), mode="replicate")
        return tuple(network(controlnet_cond.to(network.device, network.dtype)))

    def residuals(self, network: Any, *_: Any, hint: Hint, **__: Any) -> Residuals:
        return Residuals(inner=hint)


class _Union(Kind):
    """See `union.py`."""

    class_name = "ControlNetUnionModel"
    name, title, bands = "controlnet-union", "ControlNet-Union", False

    def number(self, network: Any, map_kind: str, own: Sequence[str]) -> int:
        return union.kind_number(network, map_kind, own)

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        if controlnet_cond.dim() == 4 and controlnet_cond.shape[1] == self.trained_channels(network):
            return union.encode_stack(network, controlnet_cond)
        check_channels(self.channels(network), controlnet_cond)
        return union.encode_hint(network, controlnet_cond, number)

    def trained_channels(self, network: Any) -> int:
        return 3 * int(network.config.num_control_type)

    def residuals(self, network: Any, *given: Any, **told: Any) -> Residuals:
        return union.control_residuals(network, *given, **told)


class _Single(Kind):
    """A network with one connection to the U-Net, or whose connections have no order."""

    def levels(self, network: Any) -> list[int]:
        return [0]


class _Light(_Single):
    """See `light.py`."""

    class_name = "LightControl"
    name, title, bands, enters_encoder = "lite", "light network", False, True
    zero, hint = ("time_embedding.linear_2",), ("encoder",)

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        check_channels(self.channels(network), controlnet_cond)
        return (network.encode(controlnet_cond.to(network.device, network.dtype)),)

    def residuals(
        self, network: Any, noisy_latents: Tensor, timesteps: Tensor, *_: Any, hint: Hint, **__: Any
    ) -> Residuals:
        return network.residuals(noisy_latents, timesteps, hint[0])


class _LLLite(_Single):
    """See `lllite.py`."""

    class_name = "LLLite"
    name, title, hooks, local, bands = "lllite", "ControlNet-LLLite", True, False, False
    can_rest = False

    def channels(self, network: Any) -> int:
        return 3

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        from controlkit import lllite

        check_channels(3, controlnet_cond)
        return lllite.encode_hint(network, controlnet_cond)


class _Cross(_Single):
    """See `cross.py`."""

    class_name = "ControlNetXSAdapter"
    name, title, crosses, can_rest = "controlnet-xs", "ControlNet-XS", True, False

    def starts_at_zero(self, name: str) -> bool:
        return any(part in name for part in ("control_to_base", "ctrl_to_base", "base_to_ctrl"))

    def encode(self, network: Any, controlnet_cond: Tensor, number: int = 0) -> Hint:
        check_channels(self.channels(network), controlnet_cond)
        if network.config.conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(1)
        return (network.controlnet_cond_embedding(controlnet_cond.to(network.device, network.dtype)),)


_KINDS: Mapping[str, Kind] = {
    kind.class_name: kind for kind in (Kind(), _Union(), _T2I(), _Light(), _LLLite(), _Cross())
}


def kind_of(network: nn.Module) -> Kind:
    """What a network is. Raises ValueError for a class that is none of the known ones."""
    for cls in type(network).__mro__:
        if cls.__name__ in _KINDS:
            return _KINDS[cls.__name__]
    raise ValueError(f"a {type(network).__name__} is no control network: {', '.join(_KINDS)} are known")


def encode_hint(network: nn.Module, controlnet_cond: Tensor, number: int = 0) -> Hint:
    """The map's encoder, whatever the network's kind: see `Kind.encode`."""
    return kind_of(network).encode(network, controlnet_cond, number)


def control_residuals(
    network: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    hint: Hint,
    *,
    added_cond: Mapping[str, Tensor] | None = None,
    class_labels: Tensor | None = None,
) -> Residuals:
    """What a network adds in one step, whatever its kind: see `Kind.residuals`."""
    return kind_of(network).residuals(
        network,
        noisy_latents,
        timesteps,
        encoder_hidden_states,
        hint=hint,
        added_cond=added_cond,
        class_labels=class_labels,
    )


def map_hint(hint: Hint, change: Callable[[Tensor], Tensor]) -> Hint:
    """The same with every tensor changed."""
    return tuple(change(part) for part in hint)


def join_hints(hints: Sequence[Hint]) -> Hint:
    """Hints of single pictures as those of a batch."""
    return tuple(torch.cat(parts) for parts in zip(*hints, strict=True))


def predict_pair(
    network: Any | None,
    unet: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    hint: Hint,
    *,
    added_cond: Mapping[str, Tensor] | None = None,
    sd_locked: bool = True,
    only_mid_control: bool = False,
) -> Tensor:
    """``model_pred`` of a U-Net under one control network of any kind, each in its own precision; for None
    that of the U-Net alone. For training: the sampler has `predicting.Predictor`."""
    own = unet.dtype
    given = (noisy_latents.to(own), timesteps, encoder_hidden_states.to(own))
    added = in_precision(added_cond, own)
    if network is None:
        return pair.predict(unet, *given, added_cond=added, sd_locked=sd_locked)
    if kind_of(network).crosses:
        from controlkit import cross

        crossing = cross.Crossing(network, hint[0])
        return cross.predict(unet, *given, crossing=crossing, added_cond=added)
    dtype = network.dtype
    residuals = control_residuals(
        network,
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states.to(dtype),
        hint,
        added_cond=in_precision(added_cond, dtype),
    )
    return pair.predict(
        unet,
        *given,
        residuals=residuals.map(lambda residual: residual.to(own)),
        added_cond=added,
        sd_locked=sd_locked,
        only_mid_control=only_mid_control,
    )


def in_precision(added_cond: Mapping[str, Tensor] | None, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """SDXL's further conditioning in a network's precision; None for the other families."""
    return None if added_cond is None else {key: tensor.to(dtype) for key, tensor in added_cond.items()}

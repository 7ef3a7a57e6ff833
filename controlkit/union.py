"""ControlNet-Union: one control network for several kinds of maps, one or more of them at once.

Beside the map it is told its kind: in the map's encoding (a learned vector for each kind) and in the time
embedding (which kinds are there). The networks are diffusers' `ControlNetUnionModel` (xinsir's
controlnet-union-sdxl-1.0); results equal its `forward` for one picture at a time.

In that class the small transformer over the maps' mean features runs along the batch, not along the maps:
for one picture each sees itself alone, and its attention is the projection of its own value. Here that is so
whatever the batch, so that a picture does not depend on its neighbours.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from controlkit.controlnet import Residuals, check_hint_size, copy_residuals, time_embedding
from controlkit.known_adapters import same_kind
from controlkit.reuse import repeat_rows

PUBLISHED_KINDS: tuple[tuple[str, ...], ...] = (
    ("openpose",),
    ("depth",),
    ("softedge", "scribble"),
    ("canny", "lineart", "lineart_anime", "mlsd"),
    ("normal",),
    ("seg",),
    ("tile",),
    ("inpaint",),
)
"""The kinds that the published networks know, in their order; those of six end with "seg"."""


def kind_number(network: Any, kind: str, own: Sequence[str] = ()) -> int:
    """The place of a kind of map among those that a network knows.

    own: those that it says it knows, one for each of its places; else it is taken for a published one.
    Raises ValueError for a kind that it does not know, and where none is given.
    """
    count = network.config.num_control_type
    known = [(name,) for name in own] if len(own) == count else PUBLISHED_KINDS[:count]
    for number, names in enumerate(known):
        if same_kind(kind) in map(same_kind, names):
            return number
    told = ", ".join(name for names in known for name in names)
    what = f"no maps of kind {kind!r}" if kind else "several kinds of maps, and is not told which"
    raise ValueError(f"this ControlNet-Union knows {what}: give the kind, one of {told}")


def encode_hint(network: Any, controlnet_cond: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """A map of the kind of that number: (B, 3, 8h, 8w) in [0, 1].

    Returns its features (B, C_0, h, w), their mean with the vector of the kind (B, C_0), and which kinds
    there are, (B, n) of 0 and 1.
    """
    condition = network.controlnet_cond_embedding(controlnet_cond.to(network.device, network.dtype))
    there = torch.zeros(len(condition), network.config.num_control_type, device=condition.device)
    there[:, number] = 1
    return condition, condition.mean(dim=(2, 3)) + network.task_embedding[number], there


def encode_stack(network: Any, controlnet_cond: Tensor) -> tuple[Tensor, Tensor]:
    """A map of every kind, one behind the other, (B, 3 n, 8h, 8w) in [0, 1], or -1 all over where it is not
    there: the sum of those that are (B, C_0, h, w), and which are there (B, n)."""
    parts = controlnet_cond.split(3, dim=1)
    present = torch.stack([part.amin(dim=(1, 2, 3)) >= 0 for part in parts], dim=1)
    there = present.to(network.device, network.dtype)
    total: Tensor | None = None
    for number, part in enumerate(parts):
        condition, token, _ = encode_hint(network, part, number)
        own = (condition + _alpha(network, token)) * there[:, number, None, None, None]
        total = own if total is None else total + own
    assert total is not None
    return total, there


def joined(
    network: Any, hints: Sequence[tuple[Tensor, ...]], scales: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Several maps with their scales, as the network takes them: the sum (B, C_0, h, w), and the kinds."""
    sums = [
        (condition + _alpha(network, token * scale)) * scale
        for (condition, token, _), scale in zip(hints, scales, strict=True)
    ]
    there = hints[0][2]
    for hint in hints[1:]:
        there = torch.maximum(there, hint[2])
    return sum(sums[1:], sums[0]), there


def absent_marked(controlnet_cond: Tensor, present: Tensor) -> Tensor:
    """Maps as `encode_stack` takes them, -1 where ``present`` (B, n) is false."""
    kept = present.repeat_interleave(3, dim=1)[:, :, None, None]
    return torch.where(kept, controlnet_cond, -torch.ones_like(controlnet_cond[:1, :1, :1, :1]))


def _alpha(network: Any, token: Tensor) -> Tensor:
    """What is added to every pixel's features, (B, C_0, 1, 1)."""
    width = token.shape[1]
    for layer in network.transformer_layes:  # the class's own spelling
        attention, told = layer.attn, layer.ln_1(token)
        weight, bias = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
        token = token + attention.out_proj(torch.nn.functional.linear(told, weight, bias))
        token = token + layer.mlp(layer.ln_2(token))
    alpha: Tensor = network.spatial_ch_projs(token)
    return alpha[:, :, None, None]


def control_residuals(
    network: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    hint: tuple[Tensor, ...],
    *,
    added_cond: Mapping[str, Tensor] | None = None,
    class_labels: Tensor | None = None,
) -> Residuals:
    """See `controlnet.control_residuals`; ``hint`` is `encode_hint`'s or `joined`'s."""
    condition, there = joined(network, [hint], [1.0]) if len(hint) == 3 else hint
    check_hint_size(condition, noisy_latents)
    emb = time_embedding(network, noisy_latents, timesteps, added_cond, class_labels=class_labels)
    sinusoids = network.control_type_proj(there.flatten()).reshape(len(there), -1)
    told = network.control_add_embedding(sinusoids.to(emb.dtype))
    emb = emb + (told if len(told) == 1 else repeat_rows(told, len(emb)))
    return copy_residuals(network, network.conv_in(noisy_latents) + condition, emb, encoder_hidden_states)


def from_base(base_or_unet: Any, kinds: int, *, hint_channels: Sequence[int], seed: int | None = None) -> Any:
    """An untrained network for so many kinds of maps: weights copied, zero convolutions zero, float32."""
    from diffusers import ControlNetUnionModel

    from controlkit.controlnet import seeded, to_train

    unet = getattr(base_or_unet, "unet", base_or_unet)
    first = unet.config.block_out_channels[0]
    taken = inspect.signature(ControlNetUnionModel.__init__).parameters
    config = {key: value for key, value in unet.config.items() if key in taken}
    config |= {
        "addition_time_embed_dim": unet.config.addition_time_embed_dim or 256,
        "conditioning_embedding_out_channels": tuple(hint_channels),
        "num_control_type": kinds,
        "num_trans_channel": first,
        "num_trans_head": 8,
        "num_proj_channel": first,
    }
    with seeded(seed):
        network = ControlNetUnionModel(**config)
    names = ("conv_in", "time_proj", "time_embedding", "add_embedding", "down_blocks", "mid_block")
    for name in names:
        part = getattr(unet, name, None)
        if part is not None:
            getattr(network, name).load_state_dict(part.state_dict())
    return to_train(network, unet)

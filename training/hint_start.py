"""How the hint encoder starts: the one part of a ControlNet that is copied from nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from controlkit.training.draws import derived_seed

_LEAST_SPREAD = 1e-3  # of a channel that a map leaves all but constant


@torch.no_grad()
def start_hint_encoder(controlnet: Any, controlnet_cond: Tensor, *, seed: int) -> None:
    """Start the hint encoder so that every channel of every layer has mean 0 and spread 1 on real maps.

    ``controlnet_cond``: (N, C, H, W) in [0, 1], some of the maps that are trained on. Weights are orthogonal
    (Saxe et al. 2013, arXiv:1312.6120); one pass over the maps then sets each layer's scale and bias by what
    comes out of it (Mishkin & Matas 2015, arXiv:1511.06422).

    The original starts the last convolution at zero, and the layers before it at a scale at which the map all
    but vanishes, so that control has to grow there first. Nothing is lost by this start: the zero
    convolutions behind the copy keep the untrained pair equal to the base, bit for bit, and their first
    gradient already knows the map.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, "hint encoder"))
    encoder: Any = controlnet.controlnet_cond_embedding
    x = controlnet_cond.to(encoder.conv_in.weight.device, controlnet.dtype)
    if controlnet.config.get("controlnet_conditioning_channel_order") == "bgr":
        x = x.flip(1)
    for layer in [encoder.conv_in, *encoder.blocks, encoder.conv_out]:
        flat = torch.empty(layer.weight.flatten(1).shape)
        nn.init.orthogonal_(flat, generator=generator)
        layer.weight.copy_(flat.reshape(layer.weight.shape))
        layer.bias.zero_()
        out = layer(x)
        spread, middle = out.std((0, 2, 3)).clamp_min(_LEAST_SPREAD), out.mean((0, 2, 3))
        layer.weight.div_(spread[:, None, None, None])
        layer.bias.copy_(-middle / spread)
        x = nn.functional.silu(layer(x))

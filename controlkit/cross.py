"""ControlNet-XS: a small encoder beside the locked U-Net, with connections both ways at every layer.

Zavadski, Feiden & Rother 2023, "ControlNet-XS: Rethinking the Control of Text-to-Image Diffusion Models as
Feedback-Control Systems" (arXiv:2312.06573, figure 3, type B): before each of its layers the control encoder
is shown what the U-Net's layer is shown, and after it the U-Net is given what it made. The networks are
diffusers' `ControlNetXSAdapter` and the base's own U-Net: none is copied. The result is that of
`UNetControlNetXSModel`, which copies both into one, but for the base's norms: there they have an epsilon of
1e-6, whatever the base's (diffusers 0.42.1), here the base's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from controlkit.controlnet import Residuals, check_hint_size, time_embedding
from controlkit.reuse import repeat_rows

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


@dataclass(frozen=True, eq=False)
class Crossing:
    """How a ControlNet-XS acts in one step.

    network: diffusers' `ControlNetXSAdapter`. hint: (1|B, C, h, w). scale: on all that enters the U-Net.
    region: where it enters, in [0, 1], as `EncodedControl.region_at` tells; None is everywhere.
    """

    network: Any
    hint: Tensor
    scale: float = 1.0
    region: Callable[[int, int, Tensor], Tensor] | None = None

    def entering(self, x: Tensor, made: Tensor) -> Tensor:
        """``x`` of the U-Net with what the control encoder made for it."""
        if self.region is not None:
            made = made * self.region(made.shape[-2], made.shape[-1], made)
        return x + (made if self.scale == 1 else made * self.scale)


@dataclass
class _State:
    """Both networks' activations and skips on the way down."""

    base: Tensor
    ctrl: Tensor
    base_skips: list[Tensor]
    ctrl_skips: list[Tensor]

    def keep(self) -> None:
        self.base_skips.append(self.base)
        self.ctrl_skips.append(self.ctrl)


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    *,
    crossing: Crossing,
    text_beside: Tensor | None = None,
    residuals: Residuals | None = None,
    added_cond: Mapping[str, Tensor] | None = None,
    timestep_cond: Tensor | None = None,
    class_labels: Tensor | None = None,
) -> Tensor:
    """``model_pred`` of the U-Net under a ControlNet-XS: see `controlkit.controlnet.predict`.

    ``text_beside``: what the control encoder reads, where the U-Net reads more. ``residuals``: what other
    control networks add to skips and mid block besides.
    """
    network, rows = crossing.network, len(encoder_hidden_states)
    text = (encoder_hidden_states, encoder_hidden_states if text_beside is None else text_beside)
    check_hint_size(crossing.hint, noisy_latents)
    emb = _time(unet, network, noisy_latents, timesteps, added_cond, timestep_cond, class_labels)
    emb, noisy_latents = repeat_rows(emb, rows), repeat_rows(noisy_latents, rows)
    hint = crossing.hint if len(crossing.hint) == 1 else repeat_rows(crossing.hint, rows)

    ctrl = network.conv_in(noisy_latents[:, : network.conv_in.in_channels]) + hint
    base = crossing.entering(unet.conv_in(noisy_latents), network.control_to_base_for_conv_in(ctrl))
    state = _State(base, ctrl, [base], [ctrl])
    for block, beside in zip(unet.down_blocks, network.down_blocks, strict=True):
        _down(block, beside, state, emb, text, crossing)

    beside = network.mid_block
    shown = torch.cat([state.ctrl, beside.base_to_ctrl(state.base)], dim=1)
    x = unet.mid_block(state.base, emb, encoder_hidden_states=text[0])
    made = beside.midblock(shown, emb, encoder_hidden_states=text[1])
    x = crossing.entering(x, beside.ctrl_to_base(made))
    if residuals is not None and residuals.mid is not None:
        x = x + residuals.mid
    if residuals is not None and residuals.down:
        pairs = zip(state.base_skips, residuals.down, strict=True)
        state.base_skips = [skip + residual for skip, residual in pairs]
    for block, beside in zip(unet.up_blocks, network.up_connections, strict=True):
        x = _up(block, beside, state, x, emb, text[0], crossing)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def _time(
    unet: Any,
    network: Any,
    noisy_latents: Tensor,
    timesteps: Tensor,
    added_cond: Mapping[str, Tensor] | None,
    timestep_cond: Tensor | None,
    class_labels: Tensor | None,
) -> Tensor:
    """The U-Net's time embedding, or its mixture with one of the adapter's own (as diffusers mixes them)."""
    emb = time_embedding(unet, noisy_latents, timesteps, added_cond, timestep_cond, class_labels=class_labels)
    if network.time_embedding is None:
        return emb
    timesteps = timesteps.to(noisy_latents.device).reshape(-1).expand(len(noisy_latents))
    sinusoids = unet.time_proj(timesteps).to(noisy_latents.dtype)
    share = network.config.time_embedding_mix**0.3
    own, others = network.time_embedding(sinusoids), unet.time_embedding(sinusoids, timestep_cond)
    return emb + repeat_rows((own - others) * share, len(emb))


def _down(
    block: Any, beside: Any, state: _State, emb: Tensor, text: tuple[Tensor, Tensor], crossing: Crossing
) -> None:
    """One block of both encoders, layer by layer."""
    layers = zip(block.resnets, _attentions(block), beside.resnets, _attentions(beside), strict=True)
    for k, (base_resnet, base_attention, resnet, attention) in enumerate(layers):
        shown = torch.cat([state.ctrl, beside.base_to_ctrl[k](state.base)], dim=1)
        base = _layer(base_resnet, base_attention, state.base, emb, text[0])
        state.ctrl = _layer(resnet, attention, shown, emb, text[1])
        state.base = crossing.entering(base, beside.ctrl_to_base[k](state.ctrl))
        state.keep()
    for downsampler in block.downsamplers or ():
        shown = torch.cat([state.ctrl, beside.base_to_ctrl[-1](state.base)], dim=1)
        base = downsampler(state.base)
        state.ctrl = beside.downsamplers(shown)
        state.base = crossing.entering(base, beside.ctrl_to_base[-1](state.ctrl))
        state.keep()


def _up(
    block: Any, beside: Any, state: _State, x: Tensor, emb: Tensor, text: Tensor, crossing: Crossing
) -> Tensor:
    """One block of the decoder, each of whose layers is given what the control encoder made there."""
    for resnet, attention, connection in zip(
        block.resnets, _attentions(block), beside.ctrl_to_base, strict=True
    ):
        x = crossing.entering(x, connection(state.ctrl_skips.pop()))
        x = _layer(resnet, attention, torch.cat([x, state.base_skips.pop()], dim=1), emb, text)
    for upsampler in block.upsamplers or ():
        # Not always twice the size: odd latents were rounded up on the way down.
        x = upsampler(x, state.base_skips[-1].shape[2:])
    return x


def _attentions(block: Any) -> Sequence[Any]:
    return getattr(block, "attentions", None) or [None] * len(block.resnets)


def _layer(resnet: Any, attention: Any, x: Tensor, emb: Tensor, text: Tensor) -> Tensor:
    x = resnet(x, emb)
    if attention is not None:
        x = attention(x, encoder_hidden_states=text, return_dict=False)[0]
    return x

"""What is the same in every step of a generation, or in both branches of guidance, computed once.

Exact but for rounding: the text's keys and values in every cross-attention, which depend on nothing but the
prompt (`text_kept`), and the start of a network, which does not see the text yet and is therefore the same
for the unconditional and the conditional branch (`shared_start`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


def repeat_rows(x: Tensor, rows: int) -> Tensor:
    """A batch, again and again until it has so many rows."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def add_rows(x: Tensor, added: Tensor) -> Tensor:
    """The sum of two batches, the one with fewer rows repeated."""
    rows = max(len(x), len(added))
    return repeat_rows(x, rows) + (added if len(added) == 1 else repeat_rows(added, rows))


def text_for(block: nn.Module, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
    """The text, if the block attends to it; plain residual blocks do not take it."""
    attends = getattr(block, "has_cross_attention", False)
    return {"encoder_hidden_states": encoder_hidden_states} if attends else {}


def whole_block(
    block: Any, x: Tensor, emb: Tensor, encoder_hidden_states: Tensor, added: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """A down block of diffusers: its output and skips. ``added``: see `controlnet.Residuals.inner`."""
    told = text_for(block, encoder_hidden_states)
    if added is not None and told:
        told["additional_residuals"] = repeat_rows(added, len(x)) if len(added) > 1 else added
    x, outputs = block(x, emb, **told)
    if added is None or told:
        return x, list(outputs)
    x = add_rows(x, added)
    return x, [*outputs[:-1], x]


def shared_start(
    block: Any, x: Tensor, emb: Tensor, encoder_hidden_states: Tensor, added: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """A down block of diffusers on ``x`` (B, C, h, w), for branches x B rows of text.

    What comes before the first cross-attention runs on B rows. ``emb`` has as many rows as ``x`` or as the
    text; in the latter case (SDXL, where it knows the prompt, and bases that are told a picture in one branch
    alone) nothing is shared. Returns what the block does:
    the output and the skips, with the text's number of rows; a block without cross-attention that shares all
    of itself leaves its output at B rows. ``added``: see `controlnet.Residuals.inner`.
    """
    rows = len(encoder_hidden_states)
    if len(emb) != len(x):
        x = repeat_rows(x, rows)
    if not getattr(block, "has_cross_attention", False):
        x, outputs = whole_block(block, x, emb, encoder_hidden_states, added)
        return x, [repeat_rows(output, rows) for output in outputs]
    outputs = []
    for resnet, attention in zip(block.resnets, block.attentions, strict=True):
        x = resnet(x, repeat_rows(emb, len(x)))
        if len(x) < rows:
            x = _transformer(attention, x, encoder_hidden_states)
        else:
            x = attention(x, encoder_hidden_states=encoder_hidden_states, return_dict=False)[0]
        if added is not None and resnet is block.resnets[-1]:
            x = add_rows(x, added)
        outputs.append(x)
    for downsampler in block.downsamplers or ():
        x = downsampler(x)
        outputs.append(x)
    return x, outputs


def _transformer(transformer: Any, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """diffusers' `Transformer2DModel` on ``x`` (B, C, h, w), its first self-attention done once for all
    branches."""
    rows, (count, _, height, width) = len(encoder_hidden_states), x.shape
    residual, x = repeat_rows(x, rows), transformer.norm(x)
    if transformer.use_linear_projection:
        x = transformer.proj_in(x.permute(0, 2, 3, 1).reshape(count, height * width, -1))
    else:
        x = transformer.proj_in(x).permute(0, 2, 3, 1).reshape(count, height * width, -1)
    first, others = transformer.transformer_blocks[:1], transformer.transformer_blocks[1:]
    x = _transformer_block(first[0], x, encoder_hidden_states) if first else repeat_rows(x, rows)
    for block in others:
        x = block(x, encoder_hidden_states=encoder_hidden_states)
    x = transformer.proj_out(x) if transformer.use_linear_projection else x
    x = x.reshape(rows, height, width, -1).permute(0, 3, 1, 2).contiguous()
    return (x if transformer.use_linear_projection else transformer.proj_out(x)) + residual


def _transformer_block(block: Any, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """diffusers' `BasicTransformerBlock`, up to its cross-attention on B rows."""
    plain = block.norm_type == "layer_norm" and block.pos_embed is None and not block.only_cross_attention
    if not plain:
        return block(repeat_rows(x, len(encoder_hidden_states)), encoder_hidden_states=encoder_hidden_states)
    x = block.attn1(block.norm1(x)) + x
    x = repeat_rows(x, len(encoder_hidden_states))
    x = block.attn2(block.norm2(x), encoder_hidden_states=encoder_hidden_states) + x
    return block.ff(block.norm3(x)) + x


class PicturePart(NamedTuple):
    """What one cross-attention reads of pictures behind the text (`ip_adapter`).

    tokens: how many. to_k, to_v: (heads x d, D). scale: of what they add.
    """

    tokens: int
    to_k: Tensor
    to_v: Tensor
    scale: float


class KeptText:
    """diffusers' `AttnProcessor2_0` for a text that stays the same: its keys and values are computed once.

    They are remembered by the text tensor itself: as long as the same object is given, it is the same text.
    pictures: what stands behind the text in it, in its order; each is attended to by itself.
    """

    def __init__(self, pictures: Sequence[PicturePart] = ()) -> None:
        self.pictures = pictures
        self.fixed: list[tuple[Tensor, Tensor]] | None = None
        self.kept: list[tuple[Tensor, list[tuple[Tensor, Tensor]]]] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output for ``hidden_states`` (B, S, C) and ``encoder_hidden_states`` (B, 77, D)."""
        assert encoder_hidden_states is not None
        assert attention_mask is None
        pairs = self._keys_and_values(attn, encoder_hidden_states) if self.fixed is None else self.fixed
        (key, value), *others = pairs
        query = _heads(attn, attn.to_q(hidden_states))
        out = nn.functional.scaled_dot_product_attention(query, key, value)
        for part, (key, value) in zip(self.pictures, others, strict=True):
            if part.scale:
                out = out + part.scale * nn.functional.scaled_dot_product_attention(query, key, value)
        out = attn.to_out[0](out.transpose(1, 2).flatten(2))  # (B, heads, S, d) to (B, S, heads x d)
        return out / attn.rescale_output_factor if attn.rescale_output_factor != 1 else out

    def read(self, pictures: Sequence[PicturePart]) -> None:
        """From now on it is these pictures."""
        self.pictures, self.fixed, self.kept = pictures, None, []

    def fix(self, attn: Any, told: Tensor) -> None:
        """From now on it is this text, whatever is given: compiled code would ask again and again."""
        self.fixed = self._keys_and_values(attn, told)

    def _keys_and_values(self, attn: Any, told: Tensor) -> list[tuple[Tensor, Tensor]]:
        for known, pairs in self.kept:
            if known is told:
                return pairs
        counts = [part.tokens for part in self.pictures]
        text, *tokens = told.split([told.shape[1] - sum(counts), *counts], dim=1)
        pairs = [(_heads(attn, attn.to_k(text)), _heads(attn, attn.to_v(text)))]
        for part, rows in zip(self.pictures, tokens, strict=True):
            projected = (nn.functional.linear(rows, w.to(rows.device)) for w in (part.to_k, part.to_v))
            key, value = (_heads(attn, x) for x in projected)
            pairs.append((key, value))
        self.kept = [*self.kept[-3:], (told, pairs)]  # both branches, of two stages
        return pairs


def _heads(attn: Any, x: Tensor) -> Tensor:
    """(B, S, heads x d) to (B, heads, S, d)."""
    return x.view(len(x), x.shape[1], attn.heads, -1).transpose(1, 2)


@contextlib.contextmanager
def text_kept(*networks: nn.Module) -> Iterator[None]:
    """Within the block the cross-attentions of the networks compute a text's keys and values once.

    Attentions that are not diffusers' plain ones stay as they are. Nothing may change the networks' weights
    within the block. Blocks may be nested, as generations are: the inner one leaves the outer one as it was.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    changed: list[Any] = []
    try:
        for network in networks:
            for module in filter(_is_plain, cross_attentions(network)):
                if type(module.processor) in (AttnProcessor2_0, KeptText):
                    changed.append((module, module.processor))
                    module.processor = KeptText()
        yield
    finally:
        for module, processor in changed:
            module.processor = processor


def text_fixed(network: nn.Module, told: Tensor) -> None:
    """Tell a network's cross-attentions, within `text_kept`, that the next call is about this text."""
    for attention in cross_attentions(network):
        if type(attention.processor) is KeptText:
            attention.processor.fix(attention, told)


def kept_text(*networks: nn.Module) -> list[object]:
    """The keys and values that the networks' cross-attentions remember."""
    attentions = (attention for network in networks for attention in cross_attentions(network))
    return [list(a.processor.kept) for a in attentions if type(a.processor) is KeptText]


def cross_attentions(network: nn.Module) -> Iterator[Any]:
    """The attentions of a network that read the text, in the order of its modules."""
    return (module for name, module in network.named_modules() if name.endswith("attn2"))


def _is_plain(attn: Any) -> bool:
    special = (attn.spatial_norm, attn.group_norm, attn.norm_cross, attn.norm_q, attn.norm_k)
    return not any(special) and not attn.residual_connection

"""The pair: a locked U-Net and a trainable copy of its encoder, joined by zero convolutions.

For one block F with locked parameters Θ and trainable copy Θ_c, the paper's equation 2 is

    y_c = F(x; Θ) + Z(F(x + Z(c; Θ_z1); Θ_c); Θ_z2)

where c is the hint and Z a convolution whose weights and biases start at zero, so that y_c = F(x; Θ) before
training (Zhang, Rao & Agrawala 2023, "Adding Conditional Control to Text-to-Image Diffusion Models",
arXiv:2302.05543). For Stable Diffusion the copy is the whole encoder and the mid block. The hint enters it
once, after its first convolution; each of its outputs passes its own zero convolution and is added to the
locked U-Net's skip connection of the same place, or to its mid block's output.

:func:`control_residuals` is the second term of that sum, :func:`predict` the whole. Both walk the blocks of
diffusers' own model classes, and give bit for bit what those classes' ``forward`` gives.

Shapes: ``noisy_latents`` (B, 4, h, w), where h and w are the picture's height and width divided by 8;
``timesteps`` (B,); ``encoder_hidden_states`` (B, 77, D); ``controlnet_cond`` (B, C, 8h, 8w) in [0, 1].
``added_cond`` is SDXL's ``{"text_embeds": (B, P), "time_ids": (B, 6)}`` and None for the other families.
``class_labels`` is what some bases are told besides (`class_labels.py`): classes, (B,), or vectors, (B, P).

The text (and ``added_cond`` and ``class_labels``) may have a multiple of the latents' rows: the branches of
classifier-free guidance, one after the other, which all see the same latents. The result has the text's rows,
and what does not depend on the text is computed once (``reuse.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from controlkit.naming import kind_of_value
from controlkit.perturbed import looking_nowhere, twice
from controlkit.reuse import repeat_rows, shared_start, text_for, whole_block

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

    from controlkit.base import Base

HINT_CHANNELS = (16, 32, 96, 256)

# U-Net options that change the forward pass, and the values that the families of Stable Diffusion have.
_KNOWN_STRUCTURE: Mapping[str, tuple[object, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "encoder_hid_dim": (None,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Residuals(NamedTuple):
    """What a control network adds to the U-Net, and where.

    ``down``: to the skip connections, 12 tensors for SD1 and SD2, 9 for SDXL, from the shallowest (B, C_0, h,
    w) to the deepest; ``mid``: to the mid block's output, (B, C_last, h/8, w/8), for SDXL (B, C_last, h/4,
    w/4). Models with ``global_pool_conditions`` have spatial size 1x1.

    ``inner``: within the encoder, behind each of its blocks (before it halves the size, where it attends to
    the text) and, where there is one more, behind the mid block, as T2I-Adapters do. ``first``: behind the
    first convolution, (B, C_0, h, w), in units of the spread of what it is added to (`light.py`).
    """

    down: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    inner: tuple[Tensor, ...] = ()
    first: Tensor | None = None

    @property
    def enters_encoder(self) -> bool:
        """Whether the U-Net's encoder is changed, too."""
        return bool(self.inner) or self.first is not None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the connections."""
        single = (part for part in (self.mid, *self.inner, self.first) if part is not None)
        return (*self.down, *single)

    def map(self, change: Callable[[Tensor], Tensor]) -> Residuals:
        """The same with every tensor changed, in the order of `tensors`."""
        return Residuals(
            tuple(map(change, self.down)),
            None if self.mid is None else change(self.mid),
            tuple(map(change, self.inner)),
            None if self.first is None else change(self.first),
        )


def from_base(
    base_or_unet: Base | UNet2DConditionModel,
    *,
    conditioning_channels: int = 3,
    hint_channels: Sequence[int] = HINT_CHANNELS,
    seed: int | None = None,
) -> ControlNetModel:
    """The trainable copy of a base's encoder: weights copied, zero convolutions zero, hint encoder new.

    ``conditioning_channels`` is the hint's number of channels. ``hint_channels`` are the hint encoder's
    widths: each after the first halves the resolution, so four of them take pixels to latents at 1/8.
    ``seed`` makes the hint encoder's random weights repeatable and leaves the global generator untouched;
    None draws from it.

    The copy is float32 whatever the base's precision, because it is there to be trained, and lies on the
    same device.

    Raises ValueError for what is neither, a U-Net that is none of SD1, SD2, SDXL, one that fills holes or is
    told the guidance, a class or a picture, or for channel numbers below 1.
    """
    from diffusers import ControlNetModel

    unet: UNet2DConditionModel = getattr(base_or_unet, "unet", base_or_unet)
    if not hasattr(unet, "config"):
        raise ValueError(f"a control network is copied from a base or its U-Net, not {kind_of_value(unet)}")
    check_copyable(unet.config)
    if min(conditioning_channels, *hint_channels) < 1:
        raise ValueError(
            f"conditioning_channels {conditioning_channels} and hint_channels {tuple(hint_channels)}"
            " must be 1 or more"
        )
    with seeded(seed):
        controlnet = ControlNetModel.from_unet(
            unet,
            conditioning_channels=conditioning_channels,
            conditioning_embedding_out_channels=tuple(hint_channels),
        )
    return to_train(controlnet, unet)


def to_train(network: ModuleT, unet: UNet2DConditionModel) -> ModuleT:
    """A new network in float32 on the device of its U-Net; as it is, where it is so already."""
    first = next(network.parameters())
    if first.device == unet.device and first.dtype == torch.float32:
        return network  # tensors without content cannot be moved, not even nowhere
    return network.to(unet.device, torch.float32)


def encode_hint(controlnet: ControlNetModel, controlnet_cond: Tensor) -> Tensor:
    """The hint encoder: (B, C, 8h, 8w) in [0, 1] -> (B, C_0, h, w), the precision of the control network.

    It depends on nothing but the map, so one call serves every step of a generation. Raises ValueError when
    the number of channels is not the control network's.
    """
    check_channels(controlnet.config.conditioning_channels, controlnet_cond)
    if controlnet.config.controlnet_conditioning_channel_order == "bgr":
        controlnet_cond = controlnet_cond.flip(1)
    return controlnet.controlnet_cond_embedding(controlnet_cond.to(controlnet.device, controlnet.dtype))


def check_channels(expected: int, controlnet_cond: Tensor) -> None:
    """Raise ValueError for a map of another number of channels than a network takes."""
    if controlnet_cond.dim() != 4 or controlnet_cond.shape[1] != expected:
        raise ValueError(
            f"the map has shape {tuple(controlnet_cond.shape)};"
            f" this control network takes (batch, {expected}, height, width)"
        )


def control_residuals(
    controlnet: ControlNetModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    hint: Tensor,
    *,
    added_cond: Mapping[str, Tensor] | None = None,
    class_labels: Tensor | None = None,
) -> Residuals:
    """Z(F(x + hint; Θ_c)): what the trainable copy adds to the locked U-Net.

    ``hint`` is :func:`encode_hint`'s output, (B, C_0, h, w) or (1, C_0, h, w) for one map shared by the
    batch. ``class_labels`` may be given to networks that take none: they are not told. Raises ValueError when
    the hint's height and width are not those of the latents.
    """
    check_hint_size(hint, noisy_latents)
    emb = time_embedding(controlnet, noisy_latents, timesteps, added_cond, class_labels=class_labels)
    x = controlnet.conv_in(noisy_latents) + hint  # (B, C_0, h, w)
    return copy_residuals(controlnet, x, emb, encoder_hidden_states)


def check_hint_size(hint: Tensor, noisy_latents: Tensor) -> None:
    """Raise ValueError unless an encoded map has the height and width of the latents."""
    if hint.shape[-2:] != noisy_latents.shape[-2:]:
        raise ValueError(
            f"the encoded map is {tuple(hint.shape[-2:])} (height, width) but the latents are"
            f" {tuple(noisy_latents.shape[-2:])}: give a map of the picture's size"
        )


def copy_residuals(controlnet: Any, x: Tensor, emb: Tensor, encoder_hidden_states: Tensor) -> Residuals:
    """What the trainable copy adds, of what enters its first block, ``x`` (B, C_0, h, w)."""
    x, skips, emb = _encoder(controlnet, x, emb, encoder_hidden_states)
    x = controlnet.mid_block(x, emb, **text_for(controlnet.mid_block, encoder_hidden_states))

    zero_convs = controlnet.controlnet_down_blocks
    down = tuple(zero_conv(skip) for zero_conv, skip in zip(zero_convs, skips, strict=True))
    residuals = Residuals(down, controlnet.controlnet_mid_block(x))
    return _pool(residuals) if controlnet.config.global_pool_conditions else residuals


class Deep:
    """What the U-Net's outermost decoder block was given last, for steps that take it as it is (lossy)."""

    def __init__(self) -> None:
        self.x: Tensor | None = None


def predict(
    unet: UNet2DConditionModel,
    noisy_latents: Tensor,
    timesteps: Tensor,
    encoder_hidden_states: Tensor,
    *,
    residuals: Residuals | None = None,
    added_cond: Mapping[str, Tensor] | None = None,
    timestep_cond: Tensor | None = None,
    class_labels: Tensor | None = None,
    sd_locked: bool = True,
    only_mid_control: bool = False,
    deep: Deep | None = None,
    perturbed: Tensor | None = None,
) -> Tensor:
    """The U-Net's output with the control network's residuals added: ``model_pred`` (B, 4, h, w).

    With ``sd_locked`` the encoder and the mid block run without a graph: the residuals enter behind them,
    so no gradient has to pass. The decoder keeps its graph, which is how the loss reaches the residuals.
    Without it, and for residuals that enter the encoder, the graph goes wherever ``requires_grad`` says.

    ``only_mid_control`` adds the mid residual alone and leaves the skips as they are.

    ``timestep_cond`` (1 or B, D) is the guidance as `predicting.guidance_embedding` tells it to U-Nets that
    were distilled to take it, and None for all others.

    ``deep``: remembers what the outermost decoder block is given; where it does already, only the outermost
    blocks of encoder and decoder are run (DeepCache: Ma et al. 2023, arXiv:2312.00858).

    ``perturbed`` (B + P, n, D): ``encoder_hidden_states`` and its last P rows again. Behind the encoder these
    go on a second time, with no self-attention in the middle block (`controlkit.perturbed`), and stand last
    in the result. Not together with ``deep``.
    """
    assert deep is None or perturbed is None
    residuals = residuals or Residuals()
    shallow = deep is not None and deep.x is not None
    no_graph = sd_locked and not residuals.enters_encoder
    with torch.no_grad() if no_graph else contextlib.nullcontext():
        emb = time_embedding(
            unet, noisy_latents, timesteps, added_cond, timestep_cond, class_labels=class_labels
        )
        x = unet.conv_in(noisy_latents)  # (B, C_0, h, w)
        x, skips, emb = _encoder(
            unet, x, emb, encoder_hidden_states, blocks=1 if shallow else None, residuals=residuals
        )
        looking: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if perturbed is not None:
            rows, tail = len(encoder_hidden_states), len(perturbed) - len(encoder_hidden_states)
            again = partial(twice, rows=rows, tail=tail)
            x, emb, skips = again(x), again(emb), [again(skip) for skip in skips]
            residuals, encoder_hidden_states = residuals.map(again), perturbed
            looking = looking_nowhere(unet.mid_block, tail)
        if not shallow:
            with looking:  # (B, C_last, h/8, w/8)
                x = unet.mid_block(x, emb, encoder_hidden_states=encoder_hidden_states)
            if len(residuals.inner) > len(unet.down_blocks):
                x = x + residuals.inner[-1]

    if residuals.mid is not None and not shallow:
        x = x + residuals.mid
    if residuals.down and not only_mid_control:  # in a shallow step there are fewer skips
        skips = [skip + residual for skip, residual in zip(skips, residuals.down, strict=False)]
    x = _decoder(unet, x, skips, emb, encoder_hidden_states, deep)
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def weigh_residuals(residuals: Residuals, weights: Sequence[float]) -> Residuals:
    """Each residual multiplied by its weight, in the order of `Residuals.tensors`."""
    assert len(weights) == len(residuals.tensors), (len(weights), len(residuals.tensors))
    left = iter(weights)

    def weigh(residual: Tensor) -> Tensor:
        weight = next(left)
        return residual if weight == 1 else residual * weight

    return residuals.map(weigh)


def add_residuals(first: Residuals, *others: Residuals) -> Residuals:
    """The sum of several controls' residuals, in the order given (which decides the rounding)."""
    for other in others:
        first = Residuals(
            _summed(first.down, other.down),
            _sum(first.mid, other.mid),
            _summed(first.inner, other.inner),
            _sum(first.first, other.first),
        )
    return first


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _summed(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True)) if a and b else a or b


def digest_of_weights(modules: Sequence[nn.Module]) -> str:
    """SHA-256 over every weight and buffer with its name, type and shape: equal digests, equal bytes."""
    total = hashlib.sha256()
    for index, module in enumerate(modules):
        for key, tensor in sorted(module.state_dict().items()):
            total.update(f"{index}.{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def lock(module: ModuleT) -> ModuleT:
    """Evaluation mode and no gradients for any parameter. Returns the same module."""
    return module.eval().requires_grad_(False)


def trainable_parameters(
    controlnet: ControlNetModel, unet: UNet2DConditionModel, *, sd_locked: bool = True
) -> list[nn.Parameter]:
    """Mark what training moves as requiring gradients, everything else as not, and return the former.

    That is the control network, and with ``sd_locked=False`` the U-Net's decoder and output layers too
    (they have no counterpart in the copy; unlocking them is the original project's option for data far from
    the base's).
    """
    lock(unet)
    trained: list[nn.Module] = [controlnet]
    if not sd_locked:
        trained += [unet.up_blocks, unet.conv_norm_out, unet.conv_out]
    parameters = [parameter for module in trained for parameter in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def check_structure(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a U-Net's ``config`` asks for a forward pass that this module does not walk.

    Passed are the structures of SD1, SD2 and SDXL at any width and depth.
    """
    for option, known in _KNOWN_STRUCTURE.items():
        value = config.get(option, known[0])
        if value not in known:
            raise ValueError(
                f"this U-Net has {option} {value!r}; only the structures of SD1, SD2 and SDXL are known"
            )


def check_copyable(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a control network cannot be made of the U-Net with this ``config``."""
    check_structure(config)
    taken = config.get("in_channels", 4)
    if taken != config.get("out_channels", 4):
        raise ValueError(
            f"this base fills holes (its U-Net takes {taken} channels): train the adapter"
            " on the base that it was made from; it will fit this one, too"
        )
    told = config.get("class_embed_type") or config.get("num_class_embeds")
    if told:
        raise ValueError(
            "this base is told a class or a picture (class_embed_type, num_class_embeds): train the adapter"
            " on the base that it was made from; it will fit this one, too"
        )
    if config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            "this base is told the guidance (time_cond_proj_dim), as those distilled to few steps: train the"
            " adapter on the base that it was distilled from; it will fit this one, too"
        )


def time_embedding(
    network: ControlNetModel | UNet2DConditionModel,
    x: Tensor,
    timesteps: Tensor,
    added_cond: Mapping[str, Tensor] | None,
    timestep_cond: Tensor | None = None,
    *,
    class_labels: Tensor | None = None,
) -> Tensor:
    """(B, 4 C_0): the timestep's sinusoids through two layers, plus what the network is told of classes or
    pictures, plus SDXL's pooled text and picture sizes."""
    timesteps = timesteps.to(x.device).reshape(-1).expand(x.shape[0])
    sinusoids = network.time_proj(timesteps)  # (B, C_0), always float32
    emb = network.time_embedding(sinusoids.to(x.dtype), timestep_cond)
    if network.class_embedding is not None:
        assert class_labels is not None, "this network is told class_labels: Labels.draw makes them"
        emb = repeat_rows(emb, len(class_labels)) + network.class_embedding(class_labels).to(emb.dtype)
    if network.config.addition_embed_type is None:
        return emb
    assert added_cond is not None, "SDXL's networks need added_cond: Base.added_cond makes it"
    pooled, time_ids = added_cond["text_embeds"], added_cond["time_ids"]
    sizes = network.add_time_proj(time_ids.flatten()).reshape(pooled.shape[0], -1)  # (B, 6 x 256)
    return repeat_rows(emb, len(pooled)) + network.add_embedding(
        torch.cat([pooled, sizes], dim=-1).to(emb.dtype)
    )


def _encoder(
    network: ControlNetModel | UNet2DConditionModel,
    x: Tensor,
    emb: Tensor,
    encoder_hidden_states: Tensor,
    *,
    blocks: int | None = None,
    residuals: Residuals | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """The down blocks, which both networks share: the last output, and every skip from the shallowest on.

    Both leave with the text's number of rows, and so does the time embedding, which comes back, too.
    ``blocks``: only so many. ``residuals``: those that enter here.
    """
    rows, inner = len(encoder_hidden_states), residuals.inner if residuals else ()
    if residuals is not None and residuals.first is not None:
        x = repeat_rows(x, max(len(x), len(residuals.first)))
        x = x + residuals.first * x.std(dim=(1, 2, 3), keepdim=True)
    skips = [repeat_rows(x, rows)]
    for k, block in enumerate(network.down_blocks[:blocks]):
        added = inner[k] if k < len(inner) else None
        if len(x) < rows:
            x, outputs = shared_start(block, x, emb, encoder_hidden_states, added)
        else:
            x, outputs = whole_block(block, x, repeat_rows(emb, rows), encoder_hidden_states, added)
        skips.extend(outputs)
    return repeat_rows(x, rows), skips, repeat_rows(emb, rows)


def _decoder(
    unet: UNet2DConditionModel,
    x: Tensor,
    skips: Sequence[Tensor],
    emb: Tensor,
    encoder_hidden_states: Tensor,
    deep: Deep | None,
) -> Tensor:
    """The up blocks. Each takes its skips from the deep end and grows to the size of the next block's
    skips. With a known ``deep`` only the last block runs, on what it was given then."""
    *inner, last = unet.up_blocks
    outer, remaining = list(skips[: len(last.resnets)]), list(skips[len(last.resnets) :])
    if deep is not None and deep.x is not None:
        x = deep.x
    else:
        for block in inner:
            taken = len(block.resnets)
            block_skips, remaining = tuple(remaining[-taken:]), remaining[:-taken]
            # Not always twice the size: odd latents were rounded up on the way down.
            size = (remaining or outer)[-1].shape[2:]
            x = block(x, block_skips, emb, upsample_size=size, **text_for(block, encoder_hidden_states))
        if deep is not None:
            deep.x = x
    return last(x, tuple(outer), emb, upsample_size=None, **text_for(last, encoder_hidden_states))


def _pool(residuals: Residuals) -> Residuals:
    """Each residual's mean over the picture, (B, C, 1, 1): for controls that carry style but no layout."""
    return residuals.map(lambda residual: residual.mean(dim=(2, 3), keepdim=True))


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run with torch's CPU generator set to ``seed``, and put its state back; None changes nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield

"""Control-LoRA: a ControlNet as changes of low rank to its base's encoder, made whole and made anew.

Stability AI's format (stabilityai/control-lora), which ComfyUI and sd-webui-controlnet read: an empty tensor
`lora_controlnet` as a mark; the original project's names without prefix; for a matrix or convolution W of the
copied encoder two factors, ``NAME.up`` (out, rank[, 1, 1]) and ``NAME.down`` (rank, in[, k, k]), with

    W = W_base + up.flatten(1) @ down.flatten(1)

and everything else whole: biases and norms, the hint encoder, the zero convolutions. What is absent is the
base's, as in ComfyUI; sd-webui-controlnet takes matrices and convolutions from the base, and neither norms
nor biases. Tensors here are dicts by name, the file's names on one side and diffusers' on the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from controlkit.formats import keys
from controlkit.formats.expected import COPIED as COPIED
from controlkit.formats.weight_file import LORA_KEY
from controlkit.naming import first_of

_UP, _DOWN = ".up", ".down"
_END = "middle_block_out.0.weight"  # the last of what is a ControlNet's own, not its base's


def expand(tensors: Mapping[str, Tensor], unet_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole ControlNet, float32, of a file's tensors and the base's U-Net, both on the CPU.

    Raises ValueError for a factor without its partner, factors of another shape than the base's weight, a
    name that the base's encoder has not, and where a ControlNet's own parts are missing.
    """
    left = {name: tensor for name, tensor in tensors.items() if name != LORA_KEY}
    # How many layers a level has is the base's to say: of the file's names some may be absent.
    layers = keys.counts_of_diffusers(unet_state).layers
    counts = keys.Counts(layers, keys.counts_of_original(left).hint_convs)
    state = {}
    for key, own in encoder_of(unet_state).items():
        name = keys.to_original(key, counts)
        assert name is not None, key
        state[key] = _whole(name, own.float(), left)
    for theirs in list(left):
        ours = keys.to_diffusers(theirs, counts)
        if ours is not None and not ours.startswith(COPIED):
            state[ours] = left.pop(theirs).float()
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(f"the Control-LoRA holds {min(left)}{more}, which the base's encoder does not have")
    if not any(key.startswith("controlnet_mid_block.") for key in state):
        raise ValueError(f"the Control-LoRA lacks {_END}, a ControlNet's own part")
    return state


def _whole(name: str, own: Tensor, left: dict[str, Tensor]) -> Tensor:
    """A weight of the base's as the file has it: changed, replaced, or as it is."""
    stem = name.removesuffix(".weight")
    _check_pair(stem, left)
    up, down = left.pop(stem + _UP, None), left.pop(stem + _DOWN, None)
    stored = left.pop(name, None)
    if stored is not None:
        own = stored.float()
    if up is None or down is None:
        return own
    first, second = up.flatten(1).float(), down.flatten(1).float()
    sides = (first.shape[0], second.shape[1])
    if sides != (own.shape[0], own.flatten(1).shape[1]):
        raise ValueError(
            f"the Control-LoRA does not fit the base: {stem} changes {sides[0]}x{sides[1]} weights,"
            f" and the base has {own.shape[0]}x{own.flatten(1).shape[1]} there"
        )
    return own + (first @ second).reshape(own.shape)


def check_pairs(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for what is wrong with a file whatever its base.

    That is a factor without a partner of the same rank, and a gap in a ControlNet's own parts.
    """
    for name in sorted(tensors):
        if name.endswith((_UP, _DOWN)):
            _check_pair(name.rpartition(".")[0], tensors)
    for part, step in (("zero_convs.{}.0", 1), ("input_hint_block.{}", 2)):
        pattern = re.escape(part).replace(r"\{\}", r"(\d+)")
        numbers = [int(found[1]) for name in tensors if (found := re.match(pattern, name))]
        for number in range(0, max(numbers, default=0) + 1, step):
            _check_there(f"{part.format(number)}.weight", tensors)
            _check_there(f"{part.format(number)}.bias", tensors)
    _check_there(_END, tensors)


def _check_there(name: str, tensors: Mapping[str, Tensor]) -> None:
    if name not in tensors:
        raise ValueError(f"the Control-LoRA lacks {name}, a ControlNet's own part")


def _check_pair(stem: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for one of two factors alone, and for two that cannot be multiplied."""
    up, down = tensors.get(stem + _UP), tensors.get(stem + _DOWN)
    if up is None and down is None:
        return
    if up is None or down is None:
        raise ValueError(f"the Control-LoRA has only one of {stem}.up and {stem}.down")
    if up.dim() < 2 or down.dim() < 2:
        raise ValueError(f"the Control-LoRA's {stem}.up and {stem}.down are no matrices: it is damaged")
    ranks = up.flatten(1).shape[1], down.shape[0]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"the Control-LoRA's {stem}.up is of rank {ranks[0]} and its {stem}.down of rank {ranks[1]}:"
            " it is damaged"
        )


def reduce(
    controlnet_state: Mapping[str, Tensor], unet_state: Mapping[str, Tensor], rank: int
) -> dict[str, Tensor]:
    """The tensors of a Control-LoRA of this rank, float32: the nearest changes of that rank in each weight.

    That is the truncated singular value decomposition of what was changed (Eckart & Young 1936), found
    through the eigenvectors of the smaller side's products, in float64. What is no smaller as factors is kept
    whole, and so is every norm and bias; a matrix or convolution that was not changed is left out.

    Raises ValueError for a ControlNet that is no copy of this base's encoder, or of a part of it alone.
    """
    counts = keys.counts_of_diffusers(controlnet_state)
    base = encoder_of(unet_state)
    _check_complete(controlnet_state, base)
    tensors = {LORA_KEY: torch.zeros(0)}
    for key, tensor in controlnet_state.items():
        name = keys.to_original(key, counts)
        if name is None:
            raise ValueError(f"a Control-LoRA has no place for {key}")
        if key not in base:
            tensors[name] = tensor.float()
            continue
        own = base[key].float()
        if own.shape.numel() != tensor.shape.numel():
            raise ValueError(
                f"the ControlNet is no copy of this base's encoder: {key} is {tuple(tensor.shape)},"
                f" and the base's {tuple(own.shape)}"
            )
        delta = tensor.float() - own.reshape(tensor.shape)
        if delta.any() or delta.dim() < 2:  # not every reader takes norms and biases from the base
            tensors |= _reduced(name, tensor.float(), delta, rank)
    return tensors


def _check_complete(controlnet_state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a ControlNet lacks parts of its base's encoder, which a file cannot say."""
    absent = [key for key in base if key not in controlnet_state]
    if absent:
        raise ValueError(
            f"the ControlNet copies a part of this base's encoder alone (it lacks {first_of(absent)}), and"
            " what a Control-LoRA leaves out is the base's: write it as diffusers, single or original"
        )


def _reduced(name: str, tensor: Tensor, delta: Tensor, rank: int) -> dict[str, Tensor]:
    """A changed weight as its factors, or whole."""
    if delta.dim() < 2:
        return {name: tensor}
    out, inner = delta.shape[0], delta.flatten(1).shape[1]
    rank = min(rank, out, inner)
    if rank * (out + inner) >= out * inner:
        return {name: tensor}
    up, down = factors(delta.flatten(1), rank)
    if delta.dim() == 4:
        up, down = up[..., None, None], down.reshape(rank, *delta.shape[1:])
    stem = name.removesuffix(".weight")
    return {stem + _UP: up.contiguous(), stem + _DOWN: down.contiguous()}


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of that rank to a matrix (m, n): (m, rank) and (rank, n), of one size, float32."""
    wide = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().T
    _, vectors = torch.linalg.eigh(wide @ wide.T)
    left = vectors[:, -rank:]
    right = left.T @ wide
    root = right.norm(dim=1).clamp_min(1e-30).sqrt()
    left, right = left * root, right / root[:, None]
    up, down = (left, right) if delta.shape[0] <= delta.shape[1] else (right.T, left.T)
    return up.float(), down.float()


def kept_share(
    controlnet_state: Mapping[str, Tensor], unet_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> float:
    """How much of the change to the base a file keeps: 1 minus the share of its squares that is lost."""
    whole, changed, lost = expand(tensors, unet_state), 0.0, 0.0
    for key, own in encoder_of(unet_state).items():
        tensor = controlnet_state[key].double()
        changed += float((tensor - own.double().reshape(tensor.shape)).square().sum())
        lost += float((tensor - whole[key].double().reshape(tensor.shape)).square().sum())
    return 1 - lost / changed if changed else 1.0


def encoder_of(unet_state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a ControlNet copies of a U-Net, by diffusers' names, on the CPU (or, of shapes alone, nowhere).

    Of a base that fills holes the first convolution sees the latents' four channels, which come first.
    """
    copied = {key: tensor for key, tensor in unet_state.items() if key.startswith(COPIED)}
    copied = {key: tensor if tensor.is_meta else tensor.cpu() for key, tensor in copied.items()}
    if (first := copied.get("conv_in.weight")) is not None and first.shape[1] == 9:
        copied["conv_in.weight"] = first[:, :4]
    return copied

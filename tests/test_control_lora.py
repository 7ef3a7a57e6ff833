"""Control-LoRA files, and ControlNets carried over to another base."""

from collections.abc import Callable

import pytest
import tiny_models
import torch
from sampling_peers import controlnet_of

from controlkit.base import Base
from controlkit.controlnet import from_base
from controlkit.formats import control_lora, keys
from controlkit.transfer import transfer_state


def trained(base: Base, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """A copy whose weights have moved, as after training."""
    network = controlnet_of(base, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network.state_dict()


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    gaps = [float((first[k] - second[k].reshape(first[k].shape)).square().sum()) for k in first]
    return sum(gaps) ** 0.5


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_all_ranks_keep_all_and_fewer_keep_the_most_they_can(
    load: Callable[[str], Base], family: str
) -> None:
    base, state = load(family), trained(load(family))
    unet = base.unet.state_dict()
    gaps, shares = [], []
    for rank in (1, 4, 8, 4096):
        tensors = control_lora.reduce(state, unet, rank)
        assert "lora_controlnet" in tensors
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
        gaps.append(distance(state, control_lora.expand(tensors, unet)))
        shares.append(control_lora.kept_share(state, unet, tensors))
        ranks = {len(tensor) for name, tensor in tensors.items() if name.endswith(".down")}
        assert max(ranks, default=0) == (rank if rank < 10 else 0)
    assert gaps[0] > gaps[1] > gaps[2] > 1
    assert gaps[3] < 1e-4
    assert 0.05 < shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[3] == pytest.approx(1)


def test_the_factors_are_the_singular_value_decompositions() -> None:
    generator = torch.Generator().manual_seed(1)
    for shape in ((6, 20), (20, 6), (9, 9)):
        delta = torch.randn(shape, generator=generator)
        up, down = control_lora.factors(delta, 3)
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        assert torch.allclose(up @ down, best, atol=1e-5)
        assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-3)
    single = torch.zeros(4, 5)  # of lower rank than asked for
    single[1, 2] = 3
    up, down = control_lora.factors(single, 2)
    assert torch.allclose(up @ down, single, atol=1e-6)


def test_a_file_written_by_hand_is_the_base_changed_by_its_factors(sd1: Base) -> None:
    """By the format's description: names of the original, `up` and `down`, the rest whole or the base's."""
    generator = torch.Generator().manual_seed(2)
    unet, own = sd1.unet.state_dict(), controlnet_of(sd1).state_dict()
    tensors = {"lora_controlnet": torch.zeros(0)}
    for k in range(12):
        for part in ("weight", "bias"):
            tensors[f"zero_convs.{k}.0.{part}"] = own[f"controlnet_down_blocks.{k}.{part}"]
            tensors[f"middle_block_out.0.{part}"] = own[f"controlnet_mid_block.{part}"]
    names = ["conv_in", *(f"blocks.{k}" for k in range(6)), "conv_out"]
    for k, name in enumerate(names):
        for part in ("weight", "bias"):
            key = f"controlnet_cond_embedding.{name}.{part}"
            tensors[f"input_hint_block.{2 * k}.{part}"] = own[key]
    changed = {
        "input_blocks.4.0.in_layers.2": "down_blocks.1.resnets.0.conv1",
        "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
        ),
        "time_embed.2": "time_embedding.linear_2",
    }
    expected = {key: unet.get(key, tensor).clone() for key, tensor in own.items()}
    for theirs, ours in changed.items():
        weight = unet[f"{ours}.weight"]
        shape = weight.shape
        up = torch.randn(shape[0], 2, *([1, 1] if weight.dim() == 4 else []), generator=generator)
        down = torch.randn(2, *shape[1:], generator=generator)
        tensors |= {f"{theirs}.up": up, f"{theirs}.down": down}
        expected[f"{ours}.weight"] = weight + torch.einsum(
            "or,ri->oi", up.reshape(shape[0], 2), down.reshape(2, -1)
        ).reshape(shape)
    tensors["middle_block.0.in_layers.0.bias"] = torch.arange(32.0)
    expected["mid_block.resnets.0.norm1.bias"] = torch.arange(32.0)
    state = control_lora.expand(tensors, unet)
    assert state.keys() == expected.keys()
    assert all(torch.allclose(state[key], expected[key], atol=1e-6) for key in state)


def test_a_damaged_control_lora_is_refused(sd1: Base, load: Callable[[str], Base]) -> None:
    unet = sd1.unet.state_dict()
    tensors = control_lora.reduce(trained(sd1), unet, 2)
    up = next(name for name in tensors if name.endswith("to_q.up"))
    with pytest.raises(ValueError, match=r"has only one of input_blocks.*\.up and"):
        control_lora.expand({k: v for k, v in tensors.items() if k != up}, unet)
    with pytest.raises(ValueError, match=r"holds input_blocks.77.0.op.up, which the base's encoder"):
        control_lora.expand(tensors | {"input_blocks.77.0.op.up": torch.zeros(1)}, unet)
    with pytest.raises(ValueError, match=r"does not fit the base: .* changes 7x"):
        control_lora.expand(tensors | {up: torch.zeros(7, 2)}, unet)
    narrow = tensors | {up: tensors[up][:, :1]}
    for check in (control_lora.check_pairs, lambda file: control_lora.expand(file, unet)):
        with pytest.raises(
            ValueError, match=r"to_q.up is of rank 1 and its .*to_q.down of rank 2: it is damaged"
        ):
            check(narrow)
    for name in (
        "zero_convs.2.0.bias",
        "input_hint_block.4.weight",
        "middle_block_out.0.weight",
        "zero_convs.11.0.weight",
    ):
        with pytest.raises(ValueError, match=f"lacks {name}, a ControlNet's own part"):
            control_lora.check_pairs({k: v for k, v in tensors.items() if k != name})
    control_lora.check_pairs(tensors)
    with pytest.raises(ValueError, match="lacks middle_block_out"):
        control_lora.expand({k: v for k, v in tensors.items() if "middle_block_out" not in k}, unet)
    with pytest.raises(ValueError, match="no copy of this base's encoder"):
        control_lora.reduce(trained(sd1), {k: torch.cat([v, v]) for k, v in unet.items()}, 2)


def test_of_a_base_that_fills_holes_the_latents_channels_count(sd1: Base) -> None:
    plain, wide = (
        control_lora.encoder_of(base.unet.state_dict()) for base in (sd1, tiny_models.nine_channels(sd1))
    )
    assert plain.keys() == wide.keys()
    assert all(torch.equal(plain[key], wide[key]) for key in plain)


def test_what_was_not_changed_is_left_out_but_norms_and_biases(sd1: Base) -> None:
    """Other programs take these from the file alone, as Stability's files have them."""
    untrained = from_base(sd1, seed=1).state_dict()
    tensors = control_lora.reduce(untrained, sd1.unet.state_dict(), 4)
    own = {k for k, weight in untrained.items() if k.startswith("controlnet_") or weight.ndim < 2}
    counts = keys.counts_of_diffusers(untrained)
    assert tensors.keys() == {"lora_controlnet", *(keys.to_original(key, counts) for key in own)}
    assert distance(untrained, control_lora.expand(tensors, sd1.unet.state_dict())) == 0


# --- another base ---


def other_of(base: Base) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for key, tensor in base.unet.state_dict().items()
    }


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_an_adapter_is_carried_over_by_what_it_learned(load: Callable[[str], Base], family: str) -> None:
    base, state = load(family), trained(load(family))
    old, new = base.unet.state_dict(), other_of(load(family))
    moved = transfer_state(state, old, new)
    for key, tensor in state.items():
        expected = tensor if key.startswith("controlnet_") else tensor + new[key] - old[key]
        assert torch.allclose(moved[key], expected, atol=1e-6), key
    back = transfer_state(moved, new, old)
    assert all(torch.allclose(back[key], state[key], atol=1e-6) for key in state)
    same = transfer_state(state, old, old)
    assert all(torch.equal(same[key], state[key]) for key in state)


def test_an_untrained_copy_becomes_the_other_bases_copy(sd1: Base) -> None:
    old, new = sd1.unet.state_dict(), other_of(sd1)
    moved = transfer_state(from_base(sd1, seed=1).state_dict(), old, new)
    assert all(torch.equal(moved[key], new[key]) for key in moved if key in new)


def test_bases_of_other_shapes_are_refused(load: Callable[[str], Base]) -> None:
    sd1, sdxl = load("sd1"), load("sdxl")
    state, old = trained(sd1), sd1.unet.state_dict()
    with pytest.raises(ValueError, match=r"the same structure: .* differs"):
        transfer_state(state, old, sdxl.unet.state_dict())
    with pytest.raises(ValueError, match=r"differ in .*: it is \(.*in the old base and"):
        transfer_state(state, old, {key: torch.cat([v, v]) for key, v in old.items()})

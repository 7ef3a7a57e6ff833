"""The pair: what a control network adds, and that the walk over the blocks is the libraries' own forward."""

import functools
from typing import NamedTuple

import pytest
import tiny_models
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from controlkit import controlnet as pair
from controlkit.controlnet import Residuals

FAMILIES = tiny_models.FAMILIES


class Inputs(NamedTuple):
    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    controlnet_cond: torch.Tensor
    added_cond: dict[str, torch.Tensor] | None

    @property
    def first(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.noisy_latents, self.timesteps, self.encoder_hidden_states


def inputs(family: str, *, height: int = 16, width: int = 16, channels: int = 3) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    added = None
    if family == "sdxl":
        sizes = torch.tensor([[8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width]])
        added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": sizes.expand(2, -1)}
    return Inputs(
        torch.randn(2, 4, height, width, generator=generator),
        torch.tensor([3, 801]),
        torch.randn(2, 77, tiny_models.UNETS[family]["cross_attention_dim"], generator=generator),
        torch.rand(2, channels, 8 * height, 8 * width, generator=generator),
        added,
    )


@functools.cache
def locked_unet(family: str) -> UNet2DConditionModel:
    return pair.lock(tiny_models.tiny_unet(family))


def fresh(family: str, **options: object) -> ControlNetModel:
    return pair.from_base(locked_unet(family), seed=0, **options)


def trained(family: str, **options: object) -> ControlNetModel:
    return tiny_models.randomize_zero_convs(fresh(family, **options)).eval()


def residuals_of(controlnet: ControlNetModel, given: Inputs) -> Residuals:
    hint = pair.encode_hint(controlnet, given.controlnet_cond)
    return pair.control_residuals(controlnet, *given.first, hint, added_cond=given.added_cond)


def loss_of(
    controlnet: ControlNetModel, unet: UNet2DConditionModel, given: Inputs, **options: bool
) -> torch.Tensor:
    residuals = residuals_of(controlnet, given)
    model_pred = pair.predict(unet, *given.first, residuals=residuals, added_cond=given.added_cond, **options)
    return (model_pred - torch.linspace(-1, 1, model_pred.numel()).reshape(model_pred.shape)).square().mean()


def names_with_gradient(controlnet: ControlNetModel) -> set[str]:
    return {name for name, p in controlnet.named_parameters() if p.grad is not None and p.grad.any()}


def is_zero_conv(name: str) -> bool:
    return name.startswith(
        ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_fresh_copy_changes_nothing_bitwise(family: str) -> None:
    given, unet = inputs(family), locked_unet(family)
    residuals = residuals_of(fresh(family), given)
    assert not any(tensor.any() for tensor in (*residuals.down, residuals.mid))
    alone = unet(*given.first, added_cond_kwargs=given.added_cond).sample
    assert torch.equal(pair.predict(unet, *given.first, added_cond=given.added_cond), alone)
    paired = pair.predict(unet, *given.first, residuals=residuals, added_cond=given.added_cond)
    assert torch.equal(paired, alone)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("height", "width"), [(16, 16), (14, 9)])  # odd latents grow by less than twice
@torch.no_grad()
def test_the_walk_is_bit_equal_to_the_libraries_forward(family: str, height: int, width: int) -> None:
    given, unet = inputs(family, height=height, width=width), locked_unet(family)
    controlnet = trained(family)
    down, mid = controlnet(
        *given.first, given.controlnet_cond, added_cond_kwargs=given.added_cond, return_dict=False
    )
    ours = residuals_of(controlnet, given)
    assert mid.any()
    assert len(ours.down) == len(down)
    assert all(torch.equal(a, b) for a, b in zip((*ours.down, ours.mid), (*down, mid), strict=True))

    theirs = unet(
        *given.first,
        added_cond_kwargs=given.added_cond,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    model_pred = pair.predict(unet, *given.first, residuals=ours, added_cond=given.added_cond)
    assert torch.equal(model_pred, theirs)
    assert not torch.equal(model_pred, pair.predict(unet, *given.first, added_cond=given.added_cond))


@torch.no_grad()
def test_one_timestep_for_the_batch_and_one_hint_for_the_batch() -> None:
    given, controlnet = inputs("sd1"), trained("sd1")
    x, _, text = given.first
    shared = given.controlnet_cond[:1]
    one = pair.control_residuals(controlnet, x, torch.tensor(7), text, pair.encode_hint(controlnet, shared))
    both = pair.encode_hint(controlnet, shared.expand(2, -1, -1, -1))
    assert torch.equal(one.mid, pair.control_residuals(controlnet, x, torch.tensor([7, 7]), text, both).mid)


@torch.no_grad()
def test_the_hint_is_encoded_once_for_all_steps() -> None:
    given, controlnet = inputs("sd2"), trained("sd2")
    hint = pair.encode_hint(controlnet, given.controlnet_cond)
    kept = hint.clone()
    for t in (900, 500, 100):
        given = given._replace(timesteps=torch.tensor([t, t]))
        reused = pair.control_residuals(controlnet, *given.first, hint)
        assert torch.equal(reused.mid, residuals_of(controlnet, given).mid)
    assert torch.equal(hint, kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_step_moves_only_the_zero_convolutions_second_the_hint_encoder(family: str) -> None:
    given, unet, controlnet = inputs(family), locked_unet(family), fresh(family).train()
    parameters = pair.trainable_parameters(controlnet, unet)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    loss_of(controlnet, unet, given).backward()
    moved = names_with_gradient(controlnet)
    outputs = {
        name for name, _ in controlnet.named_parameters() if is_zero_conv(name) and "cond_emb" not in name
    }
    assert moved == outputs

    optimizer.step()
    optimizer.zero_grad()
    loss_of(controlnet, unet, given).backward()
    moved = names_with_gradient(controlnet)
    assert {"controlnet_cond_embedding.conv_out.weight", "controlnet_cond_embedding.conv_out.bias"} <= moved
    assert any(name.startswith("down_blocks") for name in moved)

    optimizer.step()
    optimizer.zero_grad()
    loss_of(controlnet, unet, given).backward()
    assert "controlnet_cond_embedding.conv_in.weight" in names_with_gradient(controlnet)
    assert all(p.grad is None for p in unet.parameters())


def test_sd_locked_builds_no_graph_for_encoder_and_mid_but_gives_the_same_gradient() -> None:
    given, controlnet = inputs("sd1"), trained("sd1")
    unet = tiny_models.tiny_unet("sd1").requires_grad_(True)
    gradients = []
    for locked in (True, False):
        controlnet.zero_grad()
        unet.zero_grad()
        loss_of(controlnet, unet, given, sd_locked=locked).backward()
        gradients.append([p.grad.clone() for p in controlnet.parameters()])
        encoder = [*unet.conv_in.parameters(), *unet.down_blocks.parameters(), *unet.mid_block.parameters()]
        assert all((p.grad is None) == locked for p in encoder)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_gradient_checkpointing_in_both_networks_gives_the_same_gradient() -> None:
    given, controlnet = inputs("sd1"), trained("sd1").train()
    unet = tiny_models.tiny_unet("sd1")
    parameters = pair.trainable_parameters(controlnet, unet)
    loss_of(controlnet, unet, given).backward()
    plain = [p.grad.clone() for p in parameters]
    controlnet.zero_grad()
    for network in (controlnet, unet):
        network.enable_gradient_checkpointing()
    unet.train()  # the libraries checkpoint in training mode only
    assert unet.is_gradient_checkpointing
    loss_of(controlnet, unet, given).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, parameters, strict=True))


@pytest.mark.parametrize("sd_locked", [True, False])
def test_what_training_moves(sd_locked: bool) -> None:
    given, unet, controlnet = inputs("sd1"), tiny_models.tiny_unet("sd1"), trained("sd1")
    before = {name: p.clone() for name, p in unet.named_parameters()}
    parameters = pair.trainable_parameters(controlnet, unet, sd_locked=sd_locked)
    loss_of(controlnet, unet, given).backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    moved = {name for name, p in unet.named_parameters() if not torch.equal(p, before[name])}
    decoder = {name for name in before if name.startswith(("up_blocks", "conv_norm_out", "conv_out"))}
    assert moved <= (set() if sd_locked else decoder)
    assert sd_locked or {"conv_out.weight", "up_blocks.0.resnets.0.conv1.weight"} <= moved
    assert {id(p) for p in controlnet.parameters()} <= {id(p) for p in parameters}
    assert unet.training is False


@torch.no_grad()
def test_only_mid_control_leaves_the_skips_alone() -> None:
    given, unet = inputs("sd1"), locked_unet("sd1")
    residuals = residuals_of(trained("sd1"), given)
    mid_only = pair.predict(unet, *given.first, residuals=residuals, only_mid_control=True)
    silenced = Residuals(tuple(torch.zeros_like(tensor) for tensor in residuals.down), residuals.mid)
    assert torch.equal(mid_only, pair.predict(unet, *given.first, residuals=silenced))
    assert not torch.equal(mid_only, pair.predict(unet, *given.first, residuals=residuals))


@torch.no_grad()
def test_scaling_and_adding_residuals() -> None:
    given, controlnet = inputs("sd1"), trained("sd1")
    a = residuals_of(controlnet, given)
    down, mid = controlnet(*given.first, given.controlnet_cond, conditioning_scale=0.7, return_dict=False)
    scaled = pair.weigh_residuals(a, [0.7] * 13)
    assert all(torch.equal(x, y) for x, y in zip((*scaled.down, scaled.mid), (*down, mid), strict=True))
    total = pair.add_residuals(a, scaled, a)
    assert torch.equal(total.mid, a.mid + scaled.mid + a.mid)
    assert all(torch.equal(t, x + y + x) for t, x, y in zip(total.down, a.down, scaled.down, strict=True))
    assert pair.add_residuals(a) is a


@torch.no_grad()
def test_bgr_and_pooled_control_networks_are_read_as_their_configuration_says() -> None:
    given, controlnet = inputs("sd1"), trained("sd1")
    controlnet.register_to_config(controlnet_conditioning_channel_order="bgr", global_pool_conditions=True)
    down, mid = controlnet(*given.first, given.controlnet_cond, return_dict=False)
    ours = residuals_of(controlnet, given)
    assert ours.mid.shape[2:] == (1, 1)
    assert all(torch.equal(a, b) for a, b in zip((*ours.down, ours.mid), (*down, mid), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_copy_is_diffusers_own(family: str) -> None:
    ours = fresh(family)
    theirs = ControlNetModel.from_unet(locked_unet(family))
    assert ours.config == theirs.config
    copied = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block")
    theirs_state = theirs.state_dict()
    assert ours.state_dict().keys() == theirs_state.keys()
    for name, tensor in ours.state_dict().items():
        if name.startswith(copied) or is_zero_conv(name):
            assert torch.equal(tensor, theirs_state[name]), name


def test_the_seed_decides_the_hint_encoder_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    one, two, other = (pair.from_base(locked_unet("sd1"), seed=seed).state_dict() for seed in (4, 4, 5))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(*(state["controlnet_cond_embedding.conv_in.weight"] for state in (one, other)))


def test_the_copy_is_float32_and_the_hint_takes_its_precision() -> None:
    unet = tiny_models.tiny_unet("sd1")
    for parameter in unet.parameters():
        parameter.data = parameter.data.bfloat16()
    controlnet = pair.from_base(unet)
    assert {p.dtype for p in controlnet.parameters()} == {torch.float32}
    assert pair.encode_hint(controlnet, inputs("sd1").controlnet_cond.double()).dtype == torch.float32


@pytest.mark.parametrize("channels", [1, 4, 22])
@torch.no_grad()
def test_any_number_of_hint_channels(channels: int) -> None:
    controlnet = trained("sd1", conditioning_channels=channels, hint_channels=(4, 8, 16, 24))
    given = inputs("sd1", channels=channels)
    assert residuals_of(controlnet, given).mid.shape == (2, 32, 2, 2)
    assert controlnet.config.conditioning_channels == channels
    with pytest.raises(ValueError, match=rf"takes \(batch, {channels}, height, width\)"):
        pair.encode_hint(controlnet, given.controlnet_cond.repeat(1, 2, 1, 1))


def test_user_errors() -> None:
    given, controlnet = inputs("sd1"), fresh("sd1")
    hint = pair.encode_hint(controlnet, given.controlnet_cond[..., :64])
    with pytest.raises(ValueError, match=r"encoded map is \(16, 8\).*latents are \(16, 16\)"):
        pair.control_residuals(controlnet, *given.first, hint)
    with pytest.raises(ValueError, match="must be 1 or more"):
        pair.from_base(locked_unet("sd1"), conditioning_channels=0)
    labelled = tiny_models.tiny_unet("sd1", class_embed_type="identity")
    with pytest.raises(
        ValueError, match="class_embed_type 'identity'; only the structures of SD1, SD2 and SDXL"
    ):
        pair.from_base(labelled)


SHAPES = {
    "sd15": [(320, 64)] * 3
    + [(320, 32)]
    + [(640, 32)] * 2
    + [(640, 16)]
    + [(1280, 16)] * 2
    + [(1280, 8)] * 4,
    "sdxl": [(320, 128)] * 3 + [(320, 64)] + [(640, 64)] * 2 + [(640, 32)] + [(1280, 32)] * 3,
}


@pytest.mark.parametrize(
    ("name", "config", "unet_count", "controlnet_count", "size"),
    [
        ("sd15", tiny_models.SD15_UNET, 859_520_964, 361_279_120, 64),
        pytest.param(
            "sdxl", tiny_models.SDXL_UNET, 2_567_463_684, 1_251_014_160, 128, marks=pytest.mark.slow
        ),
    ],
)
@torch.no_grad()
def test_the_real_sizes(name: str, config: dict, unet_count: int, controlnet_count: int, size: int) -> None:
    """The published parameter counts, and 13 and 10 residuals, at full size on the meta device."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        controlnet = pair.from_base(unet)
        added = (
            {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)} if name == "sdxl" else None
        )
        given = (
            torch.empty(1, 4, size, size),
            torch.empty(1),
            torch.empty(1, 77, config["cross_attention_dim"]),
        )
        hint = pair.encode_hint(controlnet, torch.empty(1, 3, 8 * size, 8 * size))
        residuals = pair.control_residuals(controlnet, *given, hint, added_cond=added)
        model_pred = pair.predict(unet, *given, residuals=residuals, added_cond=added)
    assert sum(p.numel() for p in unet.parameters()) == unet_count
    assert sum(p.numel() for p in controlnet.parameters()) == controlnet_count
    shapes = [tuple(tensor.shape) for tensor in (*residuals.down, residuals.mid)]
    assert shapes == [(1, channels, side, side) for channels, side in SHAPES[name]]
    assert model_pred.shape == (1, 4, size, size)

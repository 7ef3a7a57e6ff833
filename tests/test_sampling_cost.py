"""What a generation costs, in figures that no noise can move: arithmetic, operators, waiting for a device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import flops
import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from fakes import faked
from sampling_peers import SIZE, cond, controlnet_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPTextConfig, CLIPTextModel

from controlkit.applying import EncodedControl, Rows, encode_controls
from controlkit.base import Base
from controlkit.control import Control
from controlkit.controlnet import encode_hint, from_base, lock
from controlkit.predicting import Guidance, Predictor, Savings
from controlkit.reuse import text_kept
from controlkit.schedulers import SCHEDULERS, make_schedule

# diffusers' schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 20


def fake_base(unet: Any, vae: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Base:
    return Base("fake", "sd1", unet, vae, [], [], {}, torch.ones(1000), torch.device(device), dtype)


def stable_diffusion() -> tuple[Any, Any]:
    """The U-Net and the control network of Stable Diffusion 1.5, to be `faked`."""
    with torch.device("meta"):
        unet = lock(UNet2DConditionModel(**tiny_models.SD15_UNET))
        return unet, lock(from_base(unet))


def fake_predictor(
    networks: tuple[Any, Any],
    device: str = "cpu",
    *,
    savings: Savings | None = None,
    guidance: Guidance | None = None,
    **settings: Any,
) -> Predictor:
    """Stable Diffusion 1.5 at 512 pixels under one control, of tensors without content."""
    unet, controlnet = (faked(network, device) for network in networks)
    control = Control(controlnet, torch.zeros(1, 3, 512, 512), **settings)
    hint = torch.empty(1, 320, 64, 64, device=device)
    encoded = EncodedControl(control, hint, control.weights())
    rows = Rows(torch.empty(2, 77, 768, device=device), None, 1)
    base = fake_base(unet, None, device)
    return Predictor(base, rows, [encoded], guidance or Guidance(7.5), STEPS, savings or Savings())


def flops_of(steps: int = STEPS, **settings: Any) -> list[float]:
    """Floating point operations of the first steps of a generation."""
    counted, networks = [], stable_diffusion()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        predictor = fake_predictor(networks, **settings)
        with text_kept(*networks):
            for step in range(steps):
                with flops.counter() as counter:
                    predictor(torch.empty(1, 4, 64, 64), torch.empty((), dtype=torch.int64), step)
                counted.append(counter.get_total_flops())
    return counted


@pytest.fixture(scope="module")
def around() -> float:
    """What is done once for a picture: the hint, both texts, the decoder."""
    with torch.device("meta"):
        vae = AutoencoderKL(**tiny_models.SD15_VAE)
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
            )
        )
        controlnet = ControlNetModel.from_unet(UNet2DConditionModel(**tiny_models.SD15_UNET))
    with FakeTensorMode(), torch.no_grad(), flops.counter() as counter:
        encode_hint(faked(controlnet), torch.empty(1, 3, 512, 512))
        faked(text)(torch.zeros(2, 77, dtype=torch.int64))
        faked(vae).decode(torch.empty(1, 4, 64, 64))
    return float(counter.get_total_flops())


def test_flops_of_a_picture_of_stable_diffusion(around: float) -> None:
    first, second = flops_of(2)
    total = around + first + (STEPS - 1) * second
    assert 40e12 < total <= 43.7e12
    assert second < first, "the text's keys and values are computed in the first step alone"


def test_flops_with_control_ending_at_half(around: float) -> None:
    first, second, *_ = flops_of(3, end=0.5)
    (alone,) = flops_of(1, start=0.5)
    assert around + first + 9 * second + 10 * alone <= 38.8e12


@pytest.mark.slow
def test_flops_of_a_mode_that_controls_one_branch(around: float) -> None:
    assert flops_of(2, mode="guess")[1] < 0.9 * flops_of(2)[1]


@pytest.mark.parametrize(
    ("savings", "share"),
    [
        (Savings(control_every=2), 0.89),
        (Savings(features_every=2), 0.65),
        (Savings(guidance_until=0.1), 0.77),
        (Savings(merge_tokens=0.5), 0.91),
        (Savings(merge_tokens=0.75), 0.88),
    ],
)
@pytest.mark.slow
def test_flops_of_what_is_left_out(savings: Savings, share: float) -> None:
    assert sum(flops_of(4, savings=savings)) < share * sum(flops_of(4))


@pytest.mark.slow
def test_flops_of_perturbed_attention() -> None:
    """diffusers runs both networks for a third row of the batch; here the encoders' work serves both."""
    plain, perturbed = (flops_of(2, guidance=Guidance(7.5, perturbed=pag))[1] for pag in (0.0, 3.0))
    assert perturbed / plain == pytest.approx(1.269, abs=0.002)


@pytest.mark.slow
def test_flops_of_attention_among_merged_tokens() -> None:
    """Half as many tokens are a quarter of the products, in every self-attention of the highest resolution:
    five of the U-Net and two of the control network, of which the first of each has a row for both branches.
    """
    spent, networks = [], stable_diffusion()
    for share in (0.0, 0.5):
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            predictor = fake_predictor(networks, savings=Savings(merge_tokens=share))
            with flops.counter() as counter:
                predictor(torch.empty(1, 4, 64, 64), torch.empty((), dtype=torch.int64), 0)
        operators = counter.get_flop_counts()["Global"].items()
        spent.append(sum(count for name, count in operators if "scaled_dot_product" in str(name)))
    rows = 2 * (5 + 2) - 2
    assert spent[0] - spent[1] == rows * 4 * 320 * (4096**2 - 2048**2)


# --- operators, and waiting for a device ---


class Operators(TorchDispatchMode):
    """Counts operators that do something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and "view" not in str(func):
            self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def predictor_of(base: Base, **settings: Any) -> Iterator[tuple[Predictor, Tensor]]:
    """A predictor of real tensors, and latents."""
    control = Control(controlnet_of(base), cond(), **settings)
    text = base.encode_prompts(["", "a cube"]).encoder_hidden_states
    encoded = encode_controls([control], width=SIZE, height=SIZE, pictures=1)
    with torch.no_grad(), text_kept(base.unet, control.controlnet):
        yield Predictor(base, Rows(text, None, 1), encoded, Guidance(5.0), STEPS), torch.randn(1, 4, 8, 8)


def test_operators_of_a_step(sd1: Base) -> None:
    with predictor_of(sd1) as (predictor, latents):
        predictor(latents, torch.tensor(500), 0)
        with Operators() as operators:
            predictor(latents, torch.tensor(480), 1)
    linears = operators.counted["aten.addmm.default"] + operators.counted["aten.mm.default"]
    with predictor_of(sd1) as (predictor, latents), Operators() as first:
        networks = (sd1.unet, predictor.controls[0].control.controlnet)
        attentions = sum(name.endswith("attn2") for net in networks for name, _ in net.named_modules())
        predictor(latents, torch.tensor(500), 0)
    assert first.counted["aten.addmm.default"] + first.counted["aten.mm.default"] == linears + 2 * attentions
    with Operators() as theirs, torch.no_grad():
        control = predictor.controls[0].control
        twice, text_of = torch.cat([latents, latents]), predictor.rows.encoder_hidden_states
        down, mid = control.controlnet(twice, 480, text_of, torch.cat([cond(), cond()]), return_dict=False)
        sd1.unet(twice, 480, text_of, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert operators.counted.total() <= theirs.counted.total() - 80
    assert not operators.counted["aten._local_scalar_dense.default"], "nothing reads a number back"


@pytest.mark.slow
def test_a_step_never_waits_for_a_gpu() -> None:
    """With tensors that are said to be on a GPU and have no content, reading one back is an error, and so is
    mixing devices."""
    networks = stable_diffusion()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for settings in ({}, {"mode": "guess", "layers": "soft"}, {"savings": Savings(merge_tokens=0.5)}):
            predictor = fake_predictor(networks, "cuda", **settings)
            with text_kept(*networks):
                for step in (0, 1):
                    latents = torch.empty(1, 4, 64, 64, device="cuda")
                    model_pred = predictor(latents, torch.empty((), dtype=torch.int64, device="cuda"), step)
                    assert (model_pred.device.type, model_pred.shape) == ("cuda", latents.shape)
        with pytest.raises(RuntimeError, match=r"same device|two different devices"):
            predictor(torch.empty(1, 4, 64, 64), torch.empty((), dtype=torch.int64), 2)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_look_up_their_numbers_on_the_cpu(sd1: Base, name: str) -> None:
    schedule = make_schedule(name, sd1, steps=5)
    assert schedule.timesteps.device.type == "cpu"
    tables = [value for value in vars(schedule.scheduler).values() if isinstance(value, Tensor)]
    assert tables
    assert {table.device.type for table in tables} == {"cpu"}

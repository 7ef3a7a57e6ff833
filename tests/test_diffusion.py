"""The forward process against diffusers' schedulers, closed forms and its own inverses."""

import math
import re

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr as rescale_betas

from controlkit import diffusion

DIFFUSERS_NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def ddpm(schedule: str = "scaled_linear", prediction_type: str = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(
        beta_schedule=DIFFUSERS_NAMES[schedule],
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
    )


def samples(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64)
    noise = torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64)
    return x_0.to(dtype), noise.to(dtype), torch.tensor([0, 1, 250, 777, 999])


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_schedules_are_those_of_diffusers_in_float64(schedule: str) -> None:
    ours = diffusion.alphas_cumprod(schedule)
    assert ours.dtype == torch.float64
    assert ours.shape == (1000,)
    assert (ours.diff() < 0).all()
    # diffusers multiplies 1000 factors in float32, which is where the difference comes from.
    torch.testing.assert_close(ours, ddpm(schedule).alphas_cumprod.double(), rtol=2e-4, atol=1e-9)


def test_stable_diffusion_ends_where_its_paper_trail_says() -> None:
    ours = diffusion.alphas_cumprod()
    product = 1.0
    for i in range(1000):
        beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999) ** 2
        product *= 1 - beta
    assert ours[-1].item() == pytest.approx(product, rel=1e-12)
    assert ours[0].item() == pytest.approx(1 - 0.00085, rel=1e-15)


def test_cosine_schedule_is_the_closed_form_until_beta_is_capped() -> None:
    ours = diffusion.alphas_cumprod("cosine", num_train_timesteps=100)
    t = torch.arange(101, dtype=torch.float64) / 100
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(ours[:99], (f / f[0])[1:100], rtol=1e-12, atol=0)
    assert ours[99].item() == pytest.approx(ours[98].item() * 0.001, rel=1e-9)


def test_zero_terminal_snr_is_algorithm_1() -> None:
    ours = diffusion.alphas_cumprod(zero_terminal_snr=True)
    plain = diffusion.alphas_cumprod()
    assert ours[-1].item() == 0.0
    assert ours[0].item() == pytest.approx(plain[0].item(), rel=1e-14)
    betas = 1 - plain / torch.cat([plain.new_ones(1), plain[:-1]])
    torch.testing.assert_close(ours, torch.cumprod(1 - rescale_betas(betas), 0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_q_sample_equals_diffusers(schedule: str) -> None:
    x_0, noise, t = samples()
    ours = diffusion.q_sample(x_0, noise, t, diffusion.alphas_cumprod(schedule))
    torch.testing.assert_close(ours, ddpm(schedule).add_noise(x_0, noise, t), rtol=0, atol=1e-5)


def test_q_sample_is_bit_equal_to_diffusers_given_its_schedule() -> None:
    x_0, noise, t = samples()
    scheduler = ddpm()
    ours = diffusion.q_sample(x_0, noise, t, scheduler.alphas_cumprod)
    assert torch.equal(ours, scheduler.add_noise(x_0, noise, t))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    x_0, noise, t = samples(dtype)
    schedule = diffusion.alphas_cumprod()
    exact = diffusion.q_sample(x_0.double(), noise.double(), t, schedule)
    ours = diffusion.q_sample(x_0, noise, t, schedule)
    assert ours.dtype == dtype
    half_a_unit = torch.finfo(dtype).eps / 2
    assert ((ours.double() - exact).abs() <= half_a_unit * exact.abs() * 1.01 + 1e-6).all()


def test_v_target_equals_diffusers_velocity() -> None:
    x_0, noise, t = samples()
    ours = diffusion.target("v_prediction", x_0, noise, t, diffusion.alphas_cumprod())
    theirs = ddpm(prediction_type="v_prediction").get_velocity(x_0, noise, t)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_a_perfect_prediction_gives_back_sample_and_noise(prediction_type: str) -> None:
    x_0, noise, t = samples(torch.float64)
    schedule = diffusion.alphas_cumprod()
    x_t = diffusion.q_sample(x_0, noise, t, schedule)
    perfect = diffusion.target(prediction_type, x_0, noise, t, schedule)
    torch.testing.assert_close(diffusion.predict_x0(prediction_type, perfect, x_t, t, schedule), x_0)
    torch.testing.assert_close(diffusion.predict_noise(prediction_type, perfect, x_t, t, schedule), noise)


def test_v_is_defined_at_zero_terminal_snr() -> None:
    x_0, noise, _ = samples(torch.float64)
    last = torch.full((5,), 999)
    schedule = diffusion.alphas_cumprod(zero_terminal_snr=True)
    assert torch.equal(diffusion.q_sample(x_0, noise, last, schedule), noise)
    assert torch.equal(diffusion.target("v_prediction", x_0, noise, last, schedule), -x_0)


def test_snr_and_its_weights() -> None:
    schedule = torch.tensor([0.99, 0.9, 0.5, 0.0], dtype=torch.float64)
    ratio = diffusion.snr(schedule, torch.tensor([0, 1, 2, 3, 2]))
    torch.testing.assert_close(ratio, torch.tensor([99.0, 9.0, 1.0, 0.0, 1.0]))
    weights = {
        kind: diffusion.min_snr_weight(ratio, 5.0, kind).tolist() for kind in diffusion.PREDICTION_TYPES
    }
    assert weights["sample"] == pytest.approx([5, 5, 1, 0, 1])
    assert weights["epsilon"] == pytest.approx([5 / 99, 5 / 9, 1, 1, 1])
    assert weights["v_prediction"] == pytest.approx([5 / 100, 5 / 10, 1 / 2, 0, 1 / 2])


@pytest.mark.parametrize("prediction_type", diffusion.PREDICTION_TYPES)
def test_min_snr_weighs_the_same_error_of_x_0_alike(prediction_type: str) -> None:
    """weight * |prediction error|² = min(SNR, γ) * |x_0 error|², whatever is predicted."""
    x_0, noise, t = samples(torch.float64)
    schedule = diffusion.alphas_cumprod()
    x_t = diffusion.q_sample(x_0, noise, t, schedule)
    wrong = diffusion.target(prediction_type, x_0, noise, t, schedule) + 0.1
    x_0_error = (diffusion.predict_x0(prediction_type, wrong, x_t, t, schedule) - x_0)[:, 0, 0, 0].abs()
    ratio = diffusion.snr(schedule, t)
    weight = diffusion.min_snr_weight(ratio, 5.0, prediction_type)
    torch.testing.assert_close(weight * 0.1**2, (ratio.clamp(max=5) * x_0_error**2).float())


def test_soft_min_snr_and_debiased_weights_at_known_ratios() -> None:
    ratio = torch.tensor([45.0, 5.0, 4.0, 0.0])
    soft = {
        kind: diffusion.min_snr_weight(ratio, 5.0, kind, soft=True).tolist()
        for kind in diffusion.PREDICTION_TYPES
    }
    assert soft["sample"] == pytest.approx([4.5, 2.5, 20 / 9, 0])
    assert soft["epsilon"] == pytest.approx([0.1, 0.5, 5 / 9, 1])
    assert soft["v_prediction"] == pytest.approx([4.5 / 46, 2.5 / 6, 4 / 9, 0])
    debiased = {kind: diffusion.debiased_weight(ratio, kind).tolist() for kind in diffusion.PREDICTION_TYPES}
    assert debiased["epsilon"] == pytest.approx([45**-0.5, 5**-0.5, 0.5, float("inf")])
    assert debiased["sample"] == pytest.approx([45**0.5, 5**0.5, 2, 0])
    assert debiased["v_prediction"] == pytest.approx([45**0.5 / 46, 5**0.5 / 6, 0.4, 0])


def test_multires_noise_has_a_spread_of_1_and_a_coarse_part() -> None:
    """Means over quarters of plain noise spread by 1/√(h·w/4); those of coarser noises do not fall so."""

    def noises(levels: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        plain = [torch.randn((4, 32, 32), generator=generator) for _ in range(64)]
        return torch.stack([diffusion.multires_noise(n, levels, 0.5, generator) for n in plain])

    def coarse(noise: torch.Tensor) -> float:
        return torch.nn.functional.avg_pool2d(noise, 16).std().item()

    none, six = noises(0), noises(6)
    torch.testing.assert_close(none.flatten(1).std(dim=1), torch.ones(64))
    torch.testing.assert_close(six.flatten(1).std(dim=1), torch.ones(64))
    assert coarse(none) == pytest.approx(1 / 16, rel=0.1)
    assert coarse(six) > 2 * coarse(none)


def test_multires_noise_of_few_rows_ends_where_a_level_has_one() -> None:
    noise, generator = torch.randn((4, 2, 9)), torch.Generator().manual_seed(0)
    assert diffusion.multires_noise(noise, 100, 1.0, generator).isfinite().all()


@pytest.mark.parametrize("kind", diffusion.TIMESTEP_KINDS)
def test_timesteps_are_in_range_and_repeatable(kind: str) -> None:
    draws = [
        diffusion.sample_timesteps(4000, kind=kind, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.int64
    seldom = kind in ("logit-normal", "structure")  # at the ends
    assert 0 <= draws[0].min() < (200 if seldom else 10)
    assert (900 if seldom else 990) < draws[0].max() <= 999


def test_the_kinds_of_timesteps_have_their_distributions() -> None:
    def draw(kind: str, n: int) -> torch.Tensor:
        return diffusion.sample_timesteps(n, kind=kind, generator=torch.Generator().manual_seed(5)).double()

    assert draw("uniform", 20_000).mean().item() == pytest.approx(499.5, abs=8)
    assert draw("cubic", 20_000).mean().item() == pytest.approx(750, abs=8)  # E[1 - u³] = 3/4
    stratified = draw("stratified", 10)
    assert torch.equal((stratified // 100).sort().values, torch.arange(10).double())
    assert not torch.equal(stratified, stratified.sort().values)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: diffusion.alphas_cumprod("scaled-linear"),
            "unknown noise schedule 'scaled-linear' (did you mean",
        ),
        (
            lambda: diffusion.alphas_cumprod(beta_start=0.02),
            "beta_start 0.02 and beta_end 0.012 must satisfy",
        ),
        (lambda: diffusion.alphas_cumprod(beta_end=float("nan")), "must satisfy 0 < start <= end < 1"),
        (lambda: diffusion.alphas_cumprod(num_train_timesteps=0), "num_train_timesteps is 0"),
        (lambda: diffusion.sample_timesteps(1, kind="unifrom"), "unknown timestep sampling 'unifrom'"),
        (lambda: diffusion.min_snr_weight(torch.ones(1), 0.0, "epsilon"), "gamma is 0.0"),
        (lambda: diffusion.min_snr_weight(torch.ones(1), 5.0, "eps"), "unknown prediction type 'eps'"),
        (lambda: diffusion.min_snr_weight(torch.ones(1), 5.0, "eps", soft=True), "unknown prediction type"),
        (lambda: diffusion.debiased_weight(torch.ones(1), "eps"), "unknown prediction type 'eps'"),
        (lambda: diffusion.target("eps", *samples(), diffusion.alphas_cumprod()), "choose from: epsilon"),
        (
            lambda: diffusion.predict_x0("v", *samples(), diffusion.alphas_cumprod()),
            "unknown prediction type",
        ),
        (
            lambda: diffusion.predict_noise("v", *samples(), diffusion.alphas_cumprod()),
            "unknown prediction type",
        ),
    ],
)
def test_user_errors_are_one_line(call, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", diffusion.PREDICTION_TYPES)
def test_a_network_in_half_precision_gives_what_the_latents_are_kept_in(kind: str) -> None:
    x_t, output, timesteps = samples()
    alphas = diffusion.alphas_cumprod()
    output = output.half()
    for implied in (diffusion.predict_x0, diffusion.predict_noise, diffusion.prediction_of):
        assert implied(kind, output, x_t, timesteps, alphas).dtype == x_t.dtype
    assert diffusion.target(kind, x_t, output, timesteps, alphas).dtype == x_t.dtype


def test_a_schedule_has_a_whole_number_of_steps() -> None:
    for steps in (10.5, "10", None):
        with pytest.raises(ValueError, match=r"num_train_timesteps is .*; a noise schedule needs"):
            diffusion.alphas_cumprod(num_train_timesteps=steps)  # type: ignore[arg-type]

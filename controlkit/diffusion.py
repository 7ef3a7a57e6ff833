"""The forward process, its targets and its weightings: pure functions that read like the papers.

Notation, with the code's name for each symbol:

- ``alphas_cumprod[t]``: ᾱ_t = ∏_{s<=t} (1 - β_s), shape (T,), float64. Signal power; noise power is 1 - ᾱ_t.
- ``x_0``: the clean sample (a latent), ``noise``: ε ~ N(0, I), ``x_t``: the noisy sample.
- ``timesteps``: integers in [0, T-1], shape (B,). DDPM counts 1..T; index 0 here is its first step.

Samples have shape (B, ...). Schedules are kept in float64; a coefficient is computed there and rounded
once, to float32 (to float64 for float64 samples). The sample arithmetic runs in that precision and the
result has the sample's dtype, so half-precision latents lose nothing to the schedule.

Sources: DDPM, Ho et al. 2020, arXiv:2006.11239. Cosine schedule, Nichol & Dhariwal 2021, arXiv:2102.09672.
v-prediction, Salimans & Ho 2022, arXiv:2202.00512. Min-SNR, Hang et al. 2023, arXiv:2303.09556; soft,
Crowson et al. 2024, arXiv:2401.11605. Debiased estimation, Yu et al. 2023, arXiv:2310.08442. Zero terminal
SNR, Lin et al. 2023, arXiv:2305.08891. Prediction types and schedules carry diffusers' names.
"""

import math

import torch
from torch import Tensor

from controlkit.limits import is_whole, number
from controlkit.naming import unknown

SCHEDULES = ("linear", "scaled_linear", "cosine")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_KINDS = ("uniform", "stratified", "cubic", "logit-normal", "structure")
_STRUCTURE_SHIFT = 0.8  # of the logit-normal: its median is 0.69 T, where a picture's layout is decided

_COSINE_OFFSET = 0.008  # s in Nichol & Dhariwal, section 3.2: keeps β_1 from vanishing
_MAX_BETA = 0.999  # same section: keeps the last steps from being singular


def alphas_cumprod(
    schedule: str = "scaled_linear",
    *,
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> Tensor:
    """ᾱ for every timestep: shape (T,), float64, strictly decreasing, from below 1 to above 0.

    ``linear`` is DDPM's schedule (section 4; its paper uses 1e-4 to 0.02), ``scaled_linear`` is Stable
    Diffusion's (√β is linear; the defaults are its values), ``cosine`` is Nichol & Dhariwal's and ignores
    the two betas. ``zero_terminal_snr`` rescales the result so that the last step is pure noise, ᾱ = 0.

    Raises ValueError for an unknown schedule, less than two timesteps, or betas not in 0 < start <= end < 1.
    """
    if not is_whole(num_train_timesteps) or num_train_timesteps < 2:
        raise ValueError(f"num_train_timesteps is {num_train_timesteps}; a noise schedule needs at least 2")
    if not 0 < number(beta_start) <= number(beta_end) < 1:
        raise ValueError(f"beta_start {beta_start} and beta_end {beta_end} must satisfy 0 < start <= end < 1")
    betas = _betas(schedule, num_train_timesteps, beta_start, beta_end)
    cumulative = torch.cumprod(1 - betas, dim=0)
    return rescale_zero_terminal_snr(cumulative) if zero_terminal_snr else cumulative


def _betas(schedule: str, steps: int, start: float, end: float) -> Tensor:
    if schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if schedule == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((t + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2  # (T + 1,), eq. 17
        return (1 - f[1:] / f[:-1]).clamp(max=_MAX_BETA)
    raise unknown("noise schedule", schedule, SCHEDULES)


def rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale √ᾱ so that ᾱ_T = 0 and ᾱ_1 stays: Lin et al. 2023, algorithm 1. Shape and dtype stay.

    Training at the last step then sees no signal at all, as sampling does. Epsilon prediction is undefined
    there (the input already is the noise): train with ``v_prediction`` or ``sample``.
    """
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)) ** 2


def q_sample(x_0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Draw x_t ~ q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I): DDPM, eq. 4. Shape and dtype of ``x_0``."""
    signal, spread = _coefficients(x_0, timesteps, alphas_cumprod)
    return (signal * x_0 + spread * noise).to(x_0.dtype)


def target(
    prediction_type: str, x_0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """What the network is trained to output at x_t. Shape and dtype of ``x_0``.

    ``epsilon``: ε (DDPM, eq. 14). ``v_prediction``: v = √ᾱ_t ε - √(1 - ᾱ_t) x_0 (Salimans & Ho, section 4).
    ``sample``: x_0. Raises ValueError for any other type.
    """
    if prediction_type == "epsilon":
        return noise.to(x_0.dtype)
    if prediction_type == "sample":
        return x_0
    if prediction_type == "v_prediction":
        signal, spread = _coefficients(x_0, timesteps, alphas_cumprod)
        return (signal * noise - spread * x_0).to(x_0.dtype)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def predict_x0(
    prediction_type: str, model_pred: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The clean sample that ``model_pred`` implies at x_t: the inverse of :func:`target`. Dtype of ``x_t``.

    ``epsilon``: (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t (DDPM, eq. 15), not finite where ᾱ_t = 0.
    ``v_prediction``: √ᾱ_t x_t - √(1 - ᾱ_t) v. Raises ValueError for an unknown type.
    """
    if prediction_type == "sample":
        return model_pred.to(x_t.dtype)
    signal, spread = _coefficients(x_t, timesteps, alphas_cumprod)
    if prediction_type == "epsilon":
        return ((x_t - spread * model_pred) / signal).to(x_t.dtype)
    if prediction_type == "v_prediction":
        return (signal * x_t - spread * model_pred).to(x_t.dtype)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def prediction_of(
    prediction_type: str, x_0: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The ``model_pred`` that implies ``x_0`` at x_t: the inverse of :func:`predict_x0`. Dtype of ``x_t``.

    ``epsilon``: (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t). ``v_prediction``: (√ᾱ_t x_t - x_0) / √(1 - ᾱ_t).
    Raises ValueError for an unknown type.
    """
    if prediction_type == "sample":
        return x_0.to(x_t.dtype)
    signal, spread = _coefficients(x_t, timesteps, alphas_cumprod)
    if prediction_type == "epsilon":
        return ((x_t - signal * x_0) / spread).to(x_t.dtype)
    if prediction_type == "v_prediction":
        return ((signal * x_t - x_0) / spread).to(x_t.dtype)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def predict_noise(
    prediction_type: str, model_pred: Tensor, x_t: Tensor, timesteps: Tensor, alphas_cumprod: Tensor
) -> Tensor:
    """The noise that ``model_pred`` implies at x_t: the companion of :func:`predict_x0`. Dtype of ``x_t``.

    ``v_prediction``: √ᾱ_t v + √(1 - ᾱ_t) x_t. ``sample``: (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t).
    Raises ValueError for an unknown type.
    """
    if prediction_type == "epsilon":
        return model_pred.to(x_t.dtype)
    signal, spread = _coefficients(x_t, timesteps, alphas_cumprod)
    if prediction_type == "sample":
        return ((x_t - signal * model_pred) / spread).to(x_t.dtype)
    if prediction_type == "v_prediction":
        return (signal * model_pred + spread * x_t).to(x_t.dtype)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def snr(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ᾱ_t / (1 - ᾱ_t) at each timestep: shape (B,), on the timesteps' device.

    Computed in the schedule's dtype and returned as float32 (float64 has no home on some devices).
    """
    ratio = (alphas_cumprod / (1 - alphas_cumprod)).to(torch.float32)
    return ratio.to(timesteps.device)[timesteps]


def min_snr_weight(snr: Tensor, gamma: float, prediction_type: str, *, soft: bool = False) -> Tensor:
    """The loss factor that weighs x_0's error by min(SNR, γ): Hang et al., section 3.4. Shape of ``snr``.

    ``sample``: min(SNR, γ). ``epsilon``: min(SNR, γ) / SNR, written as min(1, γ / SNR) so that it is 1, its
    limit, where the SNR is 0. ``v_prediction``: min(SNR, γ) / (SNR + 1). The paper's γ is 5.

    ``soft``: SNR γ / (SNR + γ) in the minimum's place, which has no corner (Crowson et al.).

    Raises ValueError for γ <= 0 or not finite, or an unknown prediction type.
    """
    if not 0 < number(gamma) < math.inf:
        raise ValueError(f"min-SNR gamma is {gamma}; it must be a positive number (the paper uses 5)")
    if prediction_type == "sample":
        return snr * gamma / (snr + gamma) if soft else snr.clamp(max=gamma)
    if prediction_type == "epsilon":
        return gamma / (snr + gamma) if soft else (gamma / snr).clamp(max=1)
    if prediction_type == "v_prediction":
        return min_snr_weight(snr, gamma, "sample", soft=soft) / (snr + 1)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def debiased_weight(snr: Tensor, prediction_type: str) -> Tensor:
    """The loss factor that weighs x_0's error by sqrt(SNR): Yu et al. Shape of ``snr``.

    ``epsilon``: 1 / sqrt(SNR), as the paper and kohya's trainers have it, infinite where the SNR is 0.
    ``sample``: sqrt(SNR). ``v_prediction``: sqrt(SNR) / (SNR + 1), the same weighting; kohya's trainers take
    1 / (SNR + 1) there.

    Raises ValueError for an unknown prediction type.
    """
    if prediction_type == "epsilon":
        return snr.rsqrt()
    if prediction_type == "sample":
        return snr.sqrt()
    if prediction_type == "v_prediction":
        return snr.sqrt() / (snr + 1)
    raise unknown("prediction type", prediction_type, PREDICTION_TYPES)


def multires_noise(noise: Tensor, iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """One sample's ``noise`` (C, H, W) with coarser noises added, at a spread of 1: J. Whitaker 2023,
    "Multi-resolution noise for diffusion model training", as kohya's trainers have it.

    Level i of ``iterations``, from 0, is drawn ``r^i`` times smaller, r uniform in [2, 4) at each level,
    scaled up bilinearly and added ``discount^i`` times; a level of one row or column is the last.
    """
    height, width = noise.shape[-2:]
    for level in range(iterations):
        smaller = (2 + 2 * float(torch.rand((), generator=generator))) ** level
        rows, columns = max(1, int(height / smaller)), max(1, int(width / smaller))
        coarse = torch.randn((1, noise.shape[0], rows, columns), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
        noise = noise + discount**level * fine[0]
        if min(rows, columns) == 1:
            break
    return noise / noise.std()


def sample_timesteps(
    n: int,
    *,
    num_train_timesteps: int = 1000,
    kind: str = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw ``n`` training timesteps: shape (n,), int64, on the CPU, each in [0, num_train_timesteps - 1].

    ``uniform``: independent and uniform (DDPM, algorithm 1). ``stratified``: one draw, then equal spacing
    around the circle, in random order: still uniform for each element, but a batch covers the whole range
    (Kingma et al. 2021, arXiv:2107.00630, appendix I.1). ``cubic``: t = (1 - u³) T, more often noisy, where
    the layout that a control decides is made (T2I-Adapter's non-uniform sampling, Mou et al. 2023,
    arXiv:2302.08453). ``logit-normal``, ``structure``: see :func:`place_timesteps`.

    Raises ValueError for an unknown kind.
    """
    if kind == "uniform":
        return torch.randint(num_train_timesteps, (n,), generator=generator)
    if kind == "stratified":
        start = torch.rand((), generator=generator, dtype=torch.float64)
        u = (start + torch.randperm(n, generator=generator) / n) % 1.0
    else:
        u = torch.rand(n, generator=generator, dtype=torch.float64)
    return place_timesteps(u, kind, num_train_timesteps=num_train_timesteps)


def place_timesteps(u: Tensor, kind: str, *, num_train_timesteps: int = 1000) -> Tensor:
    """Timesteps, int64, of uniform numbers ``u`` in [0, 1], float64, for a kind of :func:`sample_timesteps`.

    ``logit-normal``: t/T = 1 / (1 + exp(-z)), z normal: seldom very noisy or very clean (Esser et al. 2024,
    arXiv:2403.03206, section 3.1). ``structure``: the same shifted towards noise, where layout is decided.
    Raises ValueError for an unknown kind.
    """
    if kind == "cubic":
        u = 1 - u**3
    elif kind in ("logit-normal", "structure"):
        u = torch.sigmoid(torch.special.ndtri(u) + (_STRUCTURE_SHIFT if kind == "structure" else 0.0))
    elif kind not in ("uniform", "stratified"):
        raise unknown("timestep sampling", kind, TIMESTEP_KINDS)
    return (u * num_train_timesteps).long().clamp(max=num_train_timesteps - 1)  # u = 1 would fall off the end


def _coefficients(x: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    """√ᾱ_t and √(1 - ᾱ_t), shaped (B, 1, ...) to multiply ``x`` (B, ...), on its device, at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (-1,) + (1,) * (x.dim() - 1)
    timesteps = timesteps.to(x.device)
    signal = alphas_cumprod.sqrt().to(x.device, dtype)[timesteps]
    spread = (1 - alphas_cumprod).sqrt().to(x.device, dtype)[timesteps]
    return signal.reshape(shape), spread.reshape(shape)

"""The convergence monitor: is the map used, and since when?

A ControlNet's training loss says little: it is dominated by noise that no map can predict, and it falls, too,
where the copy merely learns the look of the data. So the same held-out pictures, noised once with fixed noise
at fixed timesteps, are denoised three ways, and only the differences count:

- with the true map,
- with another held-out picture's map (rotated by one): as good a map as any, of the wrong picture,
- with no map: the residuals left out, which is the base alone.

The signal is the relative gap ``(other - true) / other``, taken at each timestep and averaged over them: at
one timestep the errors of epsilon, v and x_0 differ by a constant factor, so the gap means the same for every
base, and no timestep drowns the others. Both terms come from the same network on the same noise, so whatever
it has learned about the data as such cancels, and what remains is what this map says about this picture. A
black map is no substitute for "no map": to the network it is a map like others ("no edges
here", "all is far away"), and it answers to it. The base alone is the reference for another question, whether
the adapter does harm: its loss with the true map should not stay above the base's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import diffusion, images
from controlkit.kinds import Hint, encode_hint, join_hints, map_hint, predict_pair
from controlkit.training.draws import derived_seed
from controlkit.training.reporting.convergence import advice as advice
from controlkit.training.reporting.convergence import took_hold as took_hold

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

    from controlkit.base import Base

LEVELS = (0.3, 0.5, 0.7, 0.85)
"""Timesteps of a look, in units of the schedule's length: few where the map can say little (near the clean
picture the noise is all there is to find), more where the layout is decided."""


@dataclass(frozen=True)
class Gap:
    """What one look saw: mean squared errors in what the base predicts, unweighted."""

    loss_map: float
    loss_no_map: float
    loss_other_map: float
    gap: float
    """How much worse another picture's map is than the true one, the mean of (other - true) / other over
    timesteps.
    """
    gap_error: float
    """Standard error of the gap over the pictures."""
    gap_pictures: int
    """How many pictures there are."""

    def row(self) -> dict[str, float]:
        """The entries of metrics.jsonl; numbers that are not finite are left out, for JSON has none."""
        return {name: value for name, value in asdict(self).items() if math.isfinite(value)}


class Monitor:
    """Fixed held-out pictures, noises and timesteps, to look at with a control network in training."""

    def __init__(
        self,
        base: Base,
        latents: Tensor,
        controlnet_cond: Tensor | Sequence[NDArray[Any]] | NDArray[Any],
        encoder_hidden_states: Tensor,
        added_cond: Mapping[str, Tensor] | None = None,
        *,
        seed: int,
        timesteps: Sequence[int] | None = None,
        alphas_cumprod: Tensor | None = None,
        only_mid_control: bool = False,
        batch_size: int = 8,
    ) -> None:
        """Noise the pictures once and keep everything on the base's device.

        latents: (N, 4, h, w), scaled. controlnet_cond: float (N, C, 8h, 8w) in [0, 1], or N maps uint8 or
        uint16 (8h, 8w, C). encoder_hidden_states: (N, 77, D). added_cond: SDXL's, N rows each. timesteps:
        of every picture, by default those of `LEVELS`. alphas_cumprod: the noise schedule, by default the
        base's. batch_size: rows (a picture at a timestep) that go through the networks at once.

        Raises ValueError for fewer than two pictures, which have no other picture's map, or a timestep
        outside the schedule.
        """
        if len(latents) < 2:
            raise ValueError(
                f"the monitor compares maps of held-out pictures and needs at least 2, not {len(latents)}:"
                " raise data.holdout, or switch it off with monitor_every=0"
            )
        self.base, self.only_mid_control, self.batch_size = base, only_mid_control, batch_size
        schedule = base.alphas_cumprod if alphas_cumprod is None else alphas_cumprod
        levels = _levels(len(schedule), timesteps)
        device = base.device
        self._cond = as_cond(controlnet_cond).to(device)
        self._text = encoder_hidden_states.to(device)
        self._added = {name: rows.to(device) for name, rows in (added_cond or {}).items()} or None

        # Row k is picture k // levels at timestep k % levels, each with noise of its own.
        self._picture = torch.arange(len(latents)).repeat_interleave(len(levels))
        self._timesteps = torch.tensor(levels).repeat(len(latents))
        x_0 = latents.detach().cpu().float()[self._picture]
        generator = torch.Generator().manual_seed(derived_seed(seed, "monitor"))
        noise = torch.randn(x_0.shape, generator=generator)
        args = (x_0, noise, self._timesteps, schedule)
        self._noisy = diffusion.q_sample(*args).to(device)
        self._target = diffusion.target(base.prediction_type, *args).to(device)
        self._base_alone: Tensor | None = None

    def look(self, controlnet: ControlNetModel, unet: UNet2DConditionModel | None = None) -> Gap:
        """The three losses of the network as it is now.

        unet: where the U-Net is trained, too (``sd_locked=False``); "no map" is then this U-Net alone. The
        networks are left as they were, and no random number is drawn.
        """
        return _summary(*self.errors(controlnet, unet))

    def errors(
        self, controlnet: ControlNetModel, unet: UNet2DConditionModel | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `look` is the summary of: errors with the true map, without one, and with another's, each
        (pictures, levels).
        """
        with torch.no_grad(), evaluating(controlnet, unet):
            hints = join_hints([encode_hint(controlnet, rows) for rows in self._cond.split(self.batch_size)])
            true = self._losses(controlnet, hints, unet)
            other = self._losses(controlnet, map_hint(hints, lambda part: part.roll(1, dims=0)), unet)
            alone = self._losses(None, hints, unet) if unet is not None else self._alone(hints)
        count = len(self._text)
        return true.reshape(count, -1), alone.reshape(count, -1), other.reshape(count, -1)

    def _alone(self, hints: Hint) -> Tensor:
        if self._base_alone is None:  # a locked base answers the same at every look
            self._base_alone = self._losses(None, hints, None)
        return self._base_alone

    def _losses(
        self, controlnet: ControlNetModel | None, hints: Hint, unet: UNet2DConditionModel | None
    ) -> Tensor:
        """The mean squared error of each row, float64 (rows,) on the CPU."""
        rows = torch.arange(len(self._picture))
        parts = [self._chunk_losses(controlnet, hints, unet, chunk) for chunk in rows.split(self.batch_size)]
        return torch.cat(parts).cpu().double()

    def _chunk_losses(
        self,
        controlnet: ControlNetModel | None,
        hints: Hint,
        unet: UNet2DConditionModel | None,
        rows: Tensor,
    ) -> Tensor:
        network = self.base.unet if unet is None else unet
        picture, device = self._picture[rows], self.base.device
        noisy, timesteps = self._noisy[rows.to(device)], self._timesteps[rows].to(device)
        text = self._text[picture.to(device)]
        added = self._added and {name: part[picture.to(device)] for name, part in self._added.items()}
        model_pred = predict_pair(
            controlnet,
            network,
            noisy,
            timesteps,
            text,
            map_hint(hints, lambda part: part[picture.to(device)]),
            added_cond=added,
            only_mid_control=self.only_mid_control,
        )
        return (model_pred.float() - self._target[rows.to(device)]).square().mean(dim=(1, 2, 3))


def look_at_all(
    monitors: Sequence[Monitor], controlnet: ControlNetModel, unet: UNet2DConditionModel | None = None
) -> Gap:
    """One look at the pictures of several monitors, each of pictures of one size: see `Monitor.look`."""
    errors = [monitor.errors(controlnet, unet) for monitor in monitors]
    return _summary(*(torch.cat(parts) for parts in zip(*errors, strict=True)))


def as_cond(maps: Tensor | Sequence[NDArray[Any]] | NDArray[Any]) -> Tensor:
    """Maps as a network takes them: float32 (N, C, H, W) in [0, 1]; a float tensor stays what it is.

    maps: uint8 or uint16, (H, W, C) each, all of one size.
    """
    if isinstance(maps, Tensor):
        assert maps.is_floating_point(), maps.dtype
        return maps.detach().float()
    return images.levels_to_cond(images.maps_to_levels(list(maps)))


def _levels(count: int, timesteps: Sequence[int] | None) -> list[int]:
    levels = [round(level * (count - 1)) for level in LEVELS] if timesteps is None else list(timesteps)
    for level in levels:
        if not 0 <= level < count:
            raise ValueError(f"timestep {level} of the monitor is outside the schedule, 0 to {count - 1}")
    assert levels, "no timesteps"
    return levels


@contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every module is in the mode in which it was."""
    modules = [module for network in networks if network is not None for module in network.modules()]
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _summary(true: Tensor, alone: Tensor, other: Tensor) -> Gap:
    """From errors (pictures, levels) each."""
    relative = ((other - true) / other.mean(dim=0)).mean(dim=1)  # (pictures,)
    return Gap(
        loss_map=float(true.mean()),
        loss_no_map=float(alone.mean()),
        loss_other_map=float(other.mean()),
        gap=float(relative.mean()),
        gap_error=float(relative.std() / math.sqrt(len(relative))),
        gap_pictures=len(relative),
    )

"""What is applied while denoising: which ControlNet, to which map, when and how strongly.

The formulas, for step i of n (i counts from 0) and control c with scale s_c and window [start_c, end_c]:

    active(c, i)  =  s_c != 0  and  start_c <= i / n  and  (i + 1) / n <= end_c
    residual_k    =  sum over active c of  s_c * ControlNet_c(x_t, t, text, map_c)_k

where k runs over the U-Net's skip connections and its middle block. This is the gate of diffusers'
pipelines. A control that is not active is not run at all; a residual of zero is what it would have given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from controlkit import images
from controlkit.adapters import Adapter
from controlkit.controlnet import Residuals, add_residuals, control_residuals, encode_hint, scale_residuals
from controlkit.limits import check_scale, check_window

if TYPE_CHECKING:
    from diffusers import ControlNetModel

SHARP_KINDS = ("canny", "openpose")  # maps of pure colours: resized by nearest neighbour, never blended


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet, the map it follows, how strongly and when.

    adapter: a loaded adapter, or a bare diffusers `ControlNetModel`.
    controlnet_cond: the map. Either a picture, uint8 (H, W, 3) RGB, which is scaled and centre-cropped to
        the size that is generated; or a float tensor (1, C, H, W) or (B, C, H, W) in [0, 1] of exactly
        that size, with B the number of pictures.
    scale: factor on the residuals, from -10 to 10; 1 is what the network was trained for, 0 switches it off.
    start, end: the window in fractions of the denoising steps, 0 <= start < end <= 1.

    Raises ValueError for a number outside its range or a map of another shape.
    """

    adapter: Adapter | ControlNetModel
    controlnet_cond: np.ndarray | torch.Tensor
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)
        check_window(self.start, self.end)
        cond = self.controlnet_cond
        if isinstance(cond, torch.Tensor):
            if cond.ndim != 4 or not cond.is_floating_point():
                raise ValueError(
                    "a map given as a tensor must be float (B, C, H, W) in [0, 1], "
                    f"not {cond.dtype} {tuple(cond.shape)}"
                )
        elif not isinstance(cond, np.ndarray):
            given = type(cond).__name__
            raise ValueError(f"a map is an array or a tensor, not {given}: see images.load_picture")
        elif cond.ndim != 3 or cond.dtype != np.uint8:
            raise ValueError(f"a map given as an array is uint8 (H, W, 3), not {cond.dtype} {cond.shape}")

    @property
    def controlnet(self) -> ControlNetModel:
        """The network itself."""
        return self.adapter.controlnet if isinstance(self.adapter, Adapter) else self.adapter

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the map, in pixels."""
        if isinstance(self.controlnet_cond, torch.Tensor):
            return self.controlnet_cond.shape[-1], self.controlnet_cond.shape[-2]
        return self.controlnet_cond.shape[1], self.controlnet_cond.shape[0]

    def active(self, i: int, n: int) -> bool:
        """Whether the control is applied in step `i` (from 0) of `n`: diffusers' gate."""
        return self.scale != 0 and not (i / n < self.start or (i + 1) / n > self.end)

    def cond_for(self, width: int, height: int) -> torch.Tensor:
        """The map as the network takes it: float32 (1|B, C, height, width) in [0, 1].

        Raises ValueError when a map given as a tensor has another size.
        """
        if isinstance(self.controlnet_cond, torch.Tensor):
            if self.size != (width, height):
                raise ValueError(
                    f"a map given as a tensor must have the size of the picture, {width}x{height}, "
                    f"not {self.size[0]}x{self.size[1]}"
                )
            return self.controlnet_cond
        sharp = isinstance(self.adapter, Adapter) and self.adapter.info.map.kind in SHARP_KINDS
        return images.map_to_cond([images.cover(self.controlnet_cond, width, height, nearest=sharp)])


@dataclass(frozen=True, eq=False)
class EncodedControl:
    """A control whose map has been through the hint encoder, once for all steps and pictures.

    hint: (1|B, C0, height/8, width/8), the hint encoder's output.
    """

    control: Control
    hint: torch.Tensor

    def rows(self, first: int, last: int) -> EncodedControl:
        """The control for pictures `first` to `last` (exclusive) of the B."""
        return self if len(self.hint) == 1 else EncodedControl(self.control, self.hint[first:last])


def encode_controls(
    controls: Sequence[Control], *, width: int, height: int, pictures: int
) -> list[EncodedControl]:
    """Run each hint encoder once, for `pictures` pictures of width x height pixels.

    Raises ValueError when a map's size or number fits neither one nor all of the pictures.
    """
    encoded = []
    for control in controls:
        controlnet = control.controlnet
        cond = control.cond_for(width, height)
        if len(cond) not in (1, pictures):
            raise ValueError(f"{len(cond)} maps for {pictures} pictures: give one map, or one per picture")
        cond = cond.to(device=controlnet.device, dtype=controlnet.dtype)
        # one map at a time, so that a picture's hint does not depend on its neighbours in the batch
        encoded.append(
            EncodedControl(control, torch.cat([encode_hint(controlnet, row[None]) for row in cond]))
        )
    return encoded


def summed_residuals(
    controls: Sequence[EncodedControl],
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    *,
    step: int,
    steps: int,
    branches: int = 1,
    added_cond: Mapping[str, torch.Tensor] | None = None,
) -> Residuals | None:
    """The residuals of all controls active in this step, scaled and summed; None when there are none.

    noisy_latents is (R, C, h, w), where R is the number of pictures times `branches`: 2 under classifier-free
    guidance, with all unconditional rows first. A hint of several rows is repeated to R. A network that pools
    its residuals (`global_pool_conditions`, as "shuffle") acts on the conditional rows alone, as in
    diffusers' pipelines.
    """
    terms = []
    for encoded in controls:
        control, hint = encoded.control, encoded.hint
        if not control.active(step, steps):
            continue
        controlnet, rows = control.controlnet, len(noisy_latents)
        skipped = rows // 2 if branches == 2 and controlnet.config.global_pool_conditions else 0
        if len(hint) > 1:
            hint = hint.repeat((rows - skipped) // len(hint), 1, 1, 1)
        residuals = control_residuals(
            controlnet,
            noisy_latents[skipped:],
            timesteps,
            encoder_hidden_states[skipped:],
            hint,
            added_cond=None if added_cond is None else {k: v[skipped:] for k, v in added_cond.items()},
        )
        if skipped:
            residuals = Residuals(tuple(map(_after_zeros, residuals.down)), _after_zeros(residuals.mid))
        terms.append(scale_residuals(residuals, control.scale))
    return add_residuals(*terms) if terms else None


def _after_zeros(residual: torch.Tensor) -> torch.Tensor:
    """Rows of zeros for the unconditional branch, then the residual of the conditional one."""
    return torch.cat([torch.zeros_like(residual), residual])

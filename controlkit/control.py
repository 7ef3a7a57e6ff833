"""What is applied while denoising: which ControlNet, to which map, when, how strongly, where, and to what.

The formulas stand in `rules.py`, with the systems that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from controlkit import images
from controlkit.adapters import Adapter
from controlkit.rules import CURVES as CURVES
from controlkit.rules import GATES as GATES
from controlkit.rules import MODES as MODES
from controlkit.rules import check_rule, connection_levels, gate_open, layer_weights, scale_at

if TYPE_CHECKING:
    from diffusers import ControlNetModel

SHARP_KINDS = ("canny", "openpose")  # maps of pure colours: resized by nearest neighbour, never blended


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet, the map it follows, how strongly, when, where and in which mode.

    adapter: a loaded adapter, or a bare diffusers `ControlNetModel`.
    controlnet_cond: the map. Either a picture, uint8 (H, W, 3) RGB, which is scaled and centre-cropped to
        the size that is generated; or a float tensor (1, C, H, W) or (B, C, H, W) of exactly that size, in
        [0, 1] (-1 marks the hole of an inpainting map), with B the number of pictures.
    scale: factor on the residuals, from -10 to 10; 1 is what the network was trained for, 0 switches it off.
        Two or more numbers are a schedule: one for each step if there are as many, else points at equal
        distances from the first step to the last with straight lines between them.
    start, end: the window in fractions of the denoising steps, 0 <= start < end <= 1.
    gate: how the window is read, one of `GATES`. mode: one of `MODES`.
    layers: weights of the connections, shallowest first and the middle block last (13 numbers for SD1 and
        SD2, 10 for SDXL), or one of `CURVES`; None leaves the mode's.
    mask: where the control acts, (H, W), uint8 (255 is everywhere) or float in [0, 1]; it is stretched to
        each residual bilinearly, as A1111's effective region mask is. None is everywhere.
    only_mid: leave out all residuals but the middle block's, as the original's `only_mid_control`.

    A network that pools its residuals (`global_pool_conditions`, as "shuffle") acts on the conditional branch
    with a flat curve in every mode, as in diffusers' pipelines.

    Raises ValueError for a number or a name that is not allowed, or a map or mask of another shape.
    """

    adapter: Adapter | ControlNetModel
    controlnet_cond: np.ndarray | torch.Tensor
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    gate: str = "diffusers"
    mode: str = "balanced"
    layers: str | Sequence[float] | None = None
    mask: np.ndarray | torch.Tensor | None = None
    only_mid: bool = False

    def __post_init__(self) -> None:
        check_rule(self.scale, self.start, self.end, self.gate, self.mode, self.layers)
        _check_map(self.controlnet_cond)
        if self.mask is not None:
            _check_mask(self.mask)

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
        """Whether the control is applied in step `i` (from 0) of `n`."""
        return self.scale_at(i, n) != 0 and gate_open(self.gate, i, n, start=self.start, end=self.end)

    def scale_at(self, i: int, n: int) -> float:
        """The scale in step `i` (from 0) of `n`."""
        return scale_at(self.scale, i, n)

    def acts_on_both(self) -> bool:
        """Whether the unconditional branch is controlled, too."""
        return MODES[self.mode].both and not self.controlnet.config.global_pool_conditions

    def weights(self) -> tuple[float, ...]:
        """The weight of every connection, the middle block's last. Raises ValueError for a wrong count."""
        levels = connection_levels(self.controlnet.config)
        pools = self.controlnet.config.global_pool_conditions
        curve = ("flat" if pools else MODES[self.mode].curve) if self.layers is None else self.layers
        weights = layer_weights(curve, levels) if isinstance(curve, str) else tuple(map(float, curve))
        if len(weights) != len(levels):
            raise ValueError(
                f"layers has {len(weights)} weights; this control network has {len(levels)} connections:"
                f" {len(levels) - 1} skips, the shallowest first, and the middle block"
            )
        return (0.0,) * (len(weights) - 1) + weights[-1:] if self.only_mid else weights

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

    def region(self) -> torch.Tensor | None:
        """The mask as float32 (1, 1, H, W) in [0, 1], or None."""
        if self.mask is None:
            return None
        mask = torch.as_tensor(self.mask)
        scaled = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
        return scaled[None, None]


def _check_map(cond: np.ndarray | torch.Tensor) -> None:
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


def _check_mask(mask: np.ndarray | torch.Tensor) -> None:
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise ValueError(f"a control's mask is an array or a tensor, not {type(mask).__name__}")
    tensor = torch.as_tensor(mask)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"a control's mask must be (H, W), not {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        return
    if not tensor.is_floating_point() or not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise ValueError("a control's mask must be uint8, or float with values in [0, 1]")

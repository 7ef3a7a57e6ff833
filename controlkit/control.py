"""What is applied while denoising: which ControlNet, to which map, when, how strongly, where, and to what.

For step i of n (i counts from 0), the unconditional and the conditional branch of classifier-free guidance,
and connection k of the U-Net (0 is the shallowest skip, K the middle block: K = 12 for SD1 and SD2, 9 for
SDXL), a control c adds

    residual_k  =  s_c(i) * w_c(k) * m_c * ControlNet_c(x_t, t, text, map_c)_k      if  active(c, i)

to the branches that its mode names. Several controls are summed. s is `scale`, w `layers` or the mode's
curve (`layer_weights`), m the region `mask`, resized to each connection, and active the `gate`. A control
that is not active is not run at all, nor on a branch that its mode ignores.

Systems disagree about three of these, and every one of their ways is there under a name of its own:

    mode             branches     curve       whose
    balanced         both         flat        everybody's default
    prompt           both         soft-webui  A1111 "My prompt is more important"
    control          conditional  soft-webui  A1111 "ControlNet is more important"
    guess            conditional  soft        guess mode of the original (lllyasviel/ControlNet)
    guess-diffusers  conditional  logspace    `guess_mode=True` of diffusers
    more-prompt      both         logspace    InvokeAI "more prompt"
    more-control     conditional  logspace    InvokeAI "more control"
    unbalanced       conditional  flat        InvokeAI "unbalanced"
    paper            conditional  resolution  Zhang et al. 2023, section 3.3, "CFG resolution weighting"

    curve            w(k)
    flat             1
    soft             0.825^(K - k)            the original's 13 numbers; the middle block has 1 in any family
    soft-webui       0.825^(12 - k)           A1111's, whose SDXL list is the first ten of those 13
    logspace         10^(-1 + k / K)          diffusers' and InvokeAI's
    resolution       64 / h_k                 h_k: height of connection k in a latent of height 64: 1, 2, 4, 8

    gate             active in step i of n
    diffusers        start <= i / n  and  (i + 1) / n <= end
    webui            start <= i / n <= end
    invoke           floor(start n) <= i <= ceil(end n)

A1111's numbers were read in sd-webui-controlnet (`scripts/hook.py`), where both of its modes have the soft
curve; `layers` takes the place of a mode's curve there, and does so here, but is multiplied by the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from controlkit import images
from controlkit.adapters import Adapter
from controlkit.limits import check_scale, check_window
from controlkit.naming import unknown

if TYPE_CHECKING:
    from diffusers import ControlNetModel

SHARP_KINDS = ("canny", "openpose")  # maps of pure colours: resized by nearest neighbour, never blended
CURVES = ("flat", "soft", "soft-webui", "logspace", "resolution")
GATES = ("diffusers", "webui", "invoke")


class Mode(NamedTuple):
    """What a mode stands for: whether the unconditional branch is controlled, too, and a curve's name."""

    both: bool
    curve: str


MODES: Mapping[str, Mode] = {
    "balanced": Mode(True, "flat"),
    "prompt": Mode(True, "soft-webui"),
    "control": Mode(False, "soft-webui"),
    "guess": Mode(False, "soft"),
    "guess-diffusers": Mode(False, "logspace"),
    "more-prompt": Mode(True, "logspace"),
    "more-control": Mode(False, "logspace"),
    "unbalanced": Mode(False, "flat"),
    "paper": Mode(False, "resolution"),
}


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


def check_rule(
    scale: float | Sequence[float],
    start: float,
    end: float,
    gate: str,
    mode: str,
    layers: str | Sequence[float] | None,
) -> None:
    """Raise ValueError for a control's number or name that is not allowed (see `Control`)."""
    numbers = (scale,) if isinstance(scale, int | float) else tuple(scale)
    if not numbers:
        raise ValueError("a schedule of scales needs two numbers or more")
    for number in numbers:
        check_scale(number)
    check_window(start, end)
    for name, value, known in (("gate", gate, GATES), ("mode", mode, MODES)):
        if value not in known:
            raise unknown(name, value, known)
    if isinstance(layers, str):
        if layers not in CURVES:
            raise unknown("curve of layers", layers, CURVES)
    elif layers is not None and not all(math.isfinite(weight) for weight in layers):
        raise ValueError(f"layers must be finite numbers, not {list(layers)}")


def gate_open(gate: str, i: int, n: int, *, start: float, end: float) -> bool:
    """Whether step `i` (from 0) of `n` lies in a window, as the system of that name reads it."""
    if gate == "webui":
        return start <= i / n <= end
    if gate == "invoke":
        return math.floor(start * n) <= i <= math.ceil(end * n)
    return not (i / n < start or (i + 1) / n > end)


def scale_at(scale: float | Sequence[float], i: int, n: int) -> float:
    """The scale in step `i` (from 0) of `n`: see `Control`."""
    if isinstance(scale, int | float):
        return float(scale)
    points = [float(number) for number in scale]
    if len(points) in (1, n):
        return points[min(i, len(points) - 1)]
    place = i / max(n - 1, 1) * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    return points[left] + (place - left) * (points[left + 1] - points[left])


def layer_weights(curve: str, levels: Sequence[int]) -> tuple[float, ...]:
    """The weights w(k) of a named curve; `levels`: how often each connection was halved in size."""
    last = len(levels) - 1
    if curve == "soft":
        return tuple(0.825 ** (last - k) for k in range(last + 1))
    if curve == "soft-webui":
        return tuple(0.825 ** (12 - k) for k in range(last + 1))
    if curve == "logspace":
        return tuple(10 ** (-1 + k / last) for k in range(last + 1))
    if curve == "resolution":
        return tuple(float(2**level) for level in levels)
    return (1.0,) * (last + 1)


def connection_levels(config: Mapping[str, object]) -> list[int]:
    """How often each connection of a control network was halved in size, the middle block's last."""
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]  # type: ignore[arg-type]
    levels = [0]
    for block in range(blocks):
        levels += [block] * (layers if isinstance(layers, int) else layers[block])  # type: ignore[index]
        if block < blocks - 1:
            levels.append(block + 1)
    return [*levels, blocks - 1]


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

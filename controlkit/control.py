"""What is applied while denoising: which ControlNet, to which map, when, how strongly, where, and to what.

The formulas stand in `rules.py`, with the systems that they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from controlkit import images, limits
from controlkit.adapters import Adapter
from controlkit.kinds import kind_of
from controlkit.map_sizes import fit_map, fit_region
from controlkit.naming import kind_of_value
from controlkit.rules import CURVES as CURVES
from controlkit.rules import FITS as FITS
from controlkit.rules import GATES as GATES
from controlkit.rules import MODES as MODES
from controlkit.rules import USUAL_FIT, USUAL_GATE, USUAL_MODE, check_rule, gate_open, scale_at

if TYPE_CHECKING:
    from torch import nn

MapSource = Any
"""A path, bytes, a PIL image, an array or a tensor: see `images.load_pictures`."""


@dataclass(frozen=True, eq=False)
class Control:
    """One ControlNet, the map it follows, how strongly, when, where and in which mode.

    adapter: a loaded adapter, or a bare network of one of the kinds in `kinds.py`.
    controlnet_cond: the map, or one for each picture. Either whatever `images.load_pictures` takes (a path, a
        PIL image, an array (H, W[, C]) or (N, H, W, C) of uint8, or of floats in [0, 1], a list of these),
        which is brought to the size that is generated (see fit); or a float tensor (1, C, H, W) or
        (B, C, H, W) of exactly that size, in [0, 1] (-1 marks the hole of an inpainting map), which the
        network gets as it is.
    scale: factor on the residuals, from -10 to 10; 1 is what the network was trained for, 0 switches it off.
        Two or more numbers are a schedule: one for each step if there are as many, else points at equal
        distances from the first step to the last with straight lines between them. Of several maps of one
        ControlNet-Union each scales its map, not the residuals, as in diffusers: small ones stay strong, and
        one of 0, or outside its window, still counts as a map without features. Where none of them acts,
        nothing does (diffusers goes on with maps without features), and beside a second Union nothing
        changes (there, diffusers scales the residuals by the first map's).
    start, end: the window in fractions of the denoising steps, 0 <= start < end <= 1.
    gate: how the window is read, one of `GATES`. mode: one of `MODES`.
    layers: weights of the connections, shallowest first and the middle block last (13 numbers for SD1 and
        SD2, 10 for SDXL), or one of `CURVES`; None leaves the mode's.
    mask: where the control acts, (H, W), uint8 (255 is where it acts), bool or float in [0, 1], or a path or
        a PIL image, as `images.load_mask` reads them; it is stretched to each residual bilinearly, as A1111's
        effective region mask is. One of the shape of a map that is scaled and cropped is so, too, and stays
        on it (`controlkit generate` crops the mask's file, whatever its shape, and says so). None is
        everywhere.
    only_mid: leave out all residuals but the middle block's, as the original's `only_mid_control`.
    kind: of the map, for networks that know several (ControlNet-Union); "" is the adapter's own.
    fit: how a map of another shape than the picture's is brought to it, one of `FITS`.

    A network that pools its residuals (`global_pool_conditions`, as "shuffle") acts on the conditional branch
    with a flat curve in every mode, as in diffusers' pipelines.

    Raises ValueError for a number or a name that is not allowed, or a map or mask of another shape.
    """

    adapter: Adapter | nn.Module
    controlnet_cond: MapSource
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    gate: str = USUAL_GATE
    mode: str = USUAL_MODE
    layers: str | Sequence[float] | None = None
    mask: np.ndarray | torch.Tensor | None = None
    only_mid: bool = False
    kind: str = ""
    fit: str = USUAL_FIT
    maps: torch.Tensor | list[np.ndarray] = field(init=False, repr=False)
    """The tensor that was given, or the pictures, uint8 (H, W, 3) each."""

    def __post_init__(self) -> None:
        check_rule(self.scale, self.start, self.end, self.gate, self.mode, self.layers, self.fit)
        if not isinstance(self.kind, str):
            raise ValueError(f"a control's kind is a name, as 'canny', not {kind_of_value(self.kind)}")
        object.__setattr__(self, "maps", _read(self.controlnet_cond))
        object.__setattr__(self, "mask", images.mask_as_read(self.mask))
        if self.mask is not None:
            _check_mask(self.mask)

    @property
    def controlnet(self) -> Any:
        """The network itself."""
        return self.adapter.controlnet if isinstance(self.adapter, Adapter) else self.adapter

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the map, in pixels."""
        if isinstance(self.maps, torch.Tensor):
            return self.maps.shape[-1], self.maps.shape[-2]
        return self.maps[0].shape[1], self.maps[0].shape[0]

    def active(self, i: int, n: int) -> bool:
        """Whether the control is applied in step `i` (from 0) of `n`."""
        return self.scale_at(i, n) != 0 and gate_open(self.gate, i, n, start=self.start, end=self.end)

    def scale_at(self, i: int, n: int) -> float:
        """The scale in step `i` (from 0) of `n`."""
        return scale_at(self.scale, i, n)

    def acts_on_both(self) -> bool:
        """Whether the unconditional branch is controlled, too."""
        return MODES[self.mode].both and not self._pools

    @property
    def _pools(self) -> bool:
        return kind_of(self.controlnet).pools(self.controlnet)

    @property
    def map_kind(self) -> str:
        """What the map is; "" where nobody says."""
        return self.kind or " + ".join(self._known)

    @property
    def _known(self) -> list[str]:
        """The kinds of maps that the adapter says it takes."""
        return self.adapter.info.map.kind.split(" + ") if isinstance(self.adapter, Adapter) else []

    @property
    def number(self) -> int:
        """The place of the map's kind among those that the network knows. Raises ValueError if it is none.

        Of maps of all kinds, one behind the other as in training, it is 0: each has its own place.
        """
        kind = kind_of(self.controlnet)
        channels = kind.trained_channels(self.controlnet)
        stacked = isinstance(self.maps, torch.Tensor) and self.maps.shape[1] == channels
        if stacked and channels != kind.channels(self.controlnet):
            return 0
        return kind.number(self.controlnet, self.map_kind, self._known)

    def weights(self) -> tuple[float, ...]:
        """The weight of every connection, the middle block's last. Raises ValueError for a wrong count."""
        kind = kind_of(self.controlnet)
        levels = kind.levels(self.controlnet)
        curve = ("flat" if self._pools else MODES[self.mode].curve) if self.layers is None else self.layers
        weights = kind.curve(curve, levels) if isinstance(curve, str) else tuple(map(float, curve))
        if len(weights) != len(levels):
            raise ValueError(
                f"layers has {len(weights)} weights; this {kind.title} has {kind.connections(len(levels))}"
            )
        return (0.0,) * (len(weights) - 1) + weights[-1:] if self.only_mid else weights

    def cond_for(self, width: int, height: int) -> torch.Tensor:
        """The map as the network takes it: float32 (1|B, C, height, width) in [0, 1].

        A network with one channel is given the grey of a picture. Raises ValueError when a map given as a
        tensor has another size, or one for such a network is coloured.
        """
        if isinstance(self.maps, torch.Tensor):
            if self.size != (width, height):
                raise ValueError(
                    f"a map given as a tensor must have the size of the picture, {width}x{height}, "
                    f"not {self.size[0]}x{self.size[1]}"
                )
            return self.maps
        how = {"kind": self.map_kind, "fit": self.fit}
        cond = images.map_to_cond([fit_map(picture, width, height, **how) for picture in self.maps])
        if kind_of(self.controlnet).channels(self.controlnet) != 1:
            return cond
        if not torch.equal(cond, cond[:, :1].expand_as(cond)):
            raise ValueError("this control network takes grey maps, and the map is coloured")
        return cond[:, :1]

    def region(self, width: int, height: int) -> torch.Tensor | None:
        """The mask for pictures of width x height as float32 (1, 1, H, W) in [0, 1], or None.

        It has that size where it covers the picture as its map does, else its own.
        """
        if self.mask is None:
            return None
        mask = _as_tensor(self.mask)
        scaled = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
        if not isinstance(self.maps, torch.Tensor) and _same_shape(mask, self.maps[0]):
            fitted = fit_region(scaled.detach().cpu().numpy(), width, height, fit=self.fit)
            scaled = torch.from_numpy(fitted).clamp(0, 1)  # what grows overshoots a little
        return scaled[None, None]


def _read(given: MapSource) -> torch.Tensor | list[np.ndarray]:
    if isinstance(given, torch.Tensor) and given.ndim == 4 and given.is_floating_point():
        if 0 in given.shape:
            raise ValueError(f"a map given as a tensor is empty: {tuple(given.shape)}")
        here = type(given) is torch.Tensor and given.device.type == "cpu"  # elsewhere one would have to wait
        if here and not bool(((given >= -1) & (given <= 1)).all()):
            raise ValueError(
                "a map given as a tensor has values in [0, 1], or -1 in a hole, not"
                f" {float(given.min()):g} to {float(given.max()):g}"
            )
        return given
    pictures, _ = images.load_pictures(given, behind=0)
    if not pictures:
        raise ValueError("no map given")
    return pictures


def _check_mask(mask: np.ndarray | torch.Tensor) -> None:
    if not isinstance(mask, np.ndarray | torch.Tensor):
        raise ValueError(
            f"a control's mask is a path, a PIL image, an array or a tensor, not {kind_of_value(mask)}"
        )
    if isinstance(mask, np.ndarray) and mask.dtype.kind not in "biuf":
        raise ValueError(f"a control's mask must be uint8, or float, or bool, not {mask.dtype}")
    tensor = _as_tensor(mask)
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"a control's mask must be (H, W), not {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8:
        if int(tensor.max()) < limits.LEAST_WHITE:  # of 0 and 1, say, which would switch the control off
            raise ValueError(
                "a control's mask is white (255) where the control acts, and the largest value of this one,"
                f" uint8, is {int(tensor.max())}"
            )
        return
    in_range = tensor.is_floating_point() and bool(((tensor >= 0) & (tensor <= 1)).all())
    if not (in_range or tensor.dtype == torch.bool):
        raise ValueError("a control's mask must be uint8, or float with values in [0, 1], or bool")
    if not bool(tensor.any()):
        raise ValueError("a control's mask is 0 everywhere: the control would act nowhere")


def _as_tensor(mask: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A mask as a tensor; an array may be turned round, protected, or in another byte order."""
    if isinstance(mask, torch.Tensor):
        return mask
    return torch.from_numpy(np.array(mask, mask.dtype.newbyteorder("="), order="C"))


def _same_shape(mask: torch.Tensor, picture: np.ndarray) -> bool:
    """Whether a mask has the shape of a picture, at whatever size."""
    return mask.shape[0] * picture.shape[1] == mask.shape[1] * picture.shape[0]

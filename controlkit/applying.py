"""Running the controls of a generation: hints once, then in each step the residuals that are due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlkit import union
from controlkit.control import Control
from controlkit.controlnet import Residuals, add_residuals, predict, weigh_residuals
from controlkit.kinds import Hint, control_residuals, encode_hint, join_hints, kind_of, map_hint
from controlkit.reuse import text_fixed

BAND = 512  # pixels of a large map that are encoded at a time
_MARGIN = 32  # pixels that a band sees beyond its own; the hint encoder looks 23 to each side


@dataclass(frozen=True, eq=False)
class EncodedControl:
    """A control whose map has been through the hint encoder, once for all steps and pictures.

    hint: the encoder's output, tensors (1|B, ...), of a ControlNet one of (1|B, C0, height/8, width/8).
    weights: of the connections. region: the mask, (1, 1, H, W), or None.
    """

    control: Control
    hint: Hint
    weights: tuple[float, ...]
    region: Tensor | None = None
    regions: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """The mask at the sizes that were asked for."""
    last: dict[tuple[int, ...], Residuals] = field(default_factory=dict)
    """What the network gave last, by the rows it was told and the controls that it ran for."""

    def rows(self, first: int, last: int) -> EncodedControl:
        """The control for pictures `first` to `last` (exclusive) of the B."""
        hint = map_hint(self.hint, lambda part: part if len(part) == 1 else part[first:last])
        return replace(self, hint=hint, last={})

    def within_region(self, residual: Tensor) -> Tensor:
        """A residual where the mask lets it act."""
        return residual * self.region_at(residual.shape[-2], residual.shape[-1], residual)

    def region_at(self, height: int, width: int, like: Tensor) -> Tensor:
        """The mask at another size, (1, 1, height, width), on the device and in the precision of `like`."""
        assert self.region is not None
        size = (height, width)
        if size not in self.regions:  # a copy to a device would be waited for: once, and not in every step
            stretched = torch.nn.functional.interpolate(self.region, size=size, mode="bilinear")
            self.regions[size] = stretched.to(like.device, like.dtype)
        return self.regions[size]


@dataclass(frozen=True, eq=False)
class Rows:
    """What the networks are told by text, for every row of a generation: the same tensors in each step.

    encoder_hidden_states: (branches x pictures, 77, D), all unconditional rows first where there are two
    branches. added_cond: SDXL's, with as many rows; else None. for_unet: what the U-Net reads, the text with
    pictures' tokens behind it (`ip_adapter`); the text itself where there are none. class_labels: with as
    many rows, or with one for each picture where both branches are told the same; None for most bases.
    """

    encoder_hidden_states: Tensor
    added_cond: Mapping[str, Tensor] | None
    pictures: int
    is_conditional: bool = True
    """Whether the last rows are conditional ones."""
    for_unet: Tensor | None = None
    class_labels: Tensor | None = None

    @property
    def unet_states(self) -> Tensor:
        """What the U-Net reads."""
        return self.encoder_hidden_states if self.for_unet is None else self.for_unet

    @cached_property
    def perturbed_states(self) -> Tensor:
        """What the U-Net reads where the last pictures' rows stand there twice (`controlkit.perturbed`)."""
        return torch.cat([self.unet_states, self.unet_states[-self.pictures :]])

    @property
    def branches(self) -> int:
        """2 under classifier-free guidance, else 1."""
        return len(self.encoder_hidden_states) // self.pictures

    @cached_property
    def unconditional(self) -> Rows:
        """The unconditional rows alone."""
        assert self.branches == 2
        return self._part(slice(None, self.pictures), is_conditional=False)

    @cached_property
    def conditional(self) -> Rows:
        """The conditional rows alone."""
        return self if self.branches == 1 else self._part(slice(self.pictures, None), is_conditional=True)

    def with_added(self, added_cond: Mapping[str, Tensor]) -> Rows:
        """The same text under another `added_cond`; the halves share their text, too."""
        rows = replace(self, added_cond=added_cond)
        if self.branches == 2:
            for name in ("unconditional", "conditional"):
                half: Rows = getattr(self, name)
                part = slice(None, self.pictures) if name == "unconditional" else slice(self.pictures, None)
                added = {key: tensor[part] for key, tensor in added_cond.items()}
                rows.__dict__[name] = replace(half, added_cond=added)
        return rows

    def _part(self, which: slice, *, is_conditional: bool) -> Rows:
        added, labels, told = self.added_cond, self.class_labels, self.for_unet
        return Rows(
            self.encoder_hidden_states[which],
            None if added is None else {name: rows[which] for name, rows in added.items()},
            self.pictures,
            is_conditional=is_conditional,
            for_unet=None if told is None else told[which],
            class_labels=labels if labels is None or len(labels) == self.pictures else labels[which],
        )


class Networks(NamedTuple):
    """The functions that run the two networks, as they are or compiled (`execution`)."""

    predict: Callable[..., Tensor] = predict
    control_residuals: Callable[..., Residuals] = control_residuals
    compiled: bool = False
    graphs: bool = False
    """Whether they are the compiler's CUDA graphs, whose results the next step writes over."""


EAGER = Networks()


def encode_controls(
    controls: Sequence[Control], *, width: int, height: int, pictures: int, in_bands: bool = False
) -> list[EncodedControl]:
    """Run each hint encoder once, for `pictures` pictures of width x height pixels.

    in_bands: a part of the map at a time, so that memory stays bounded, with the same result.

    Raises ValueError when a map's size or number fits neither one nor all of the pictures, and for layers
    that are not as many as the network's connections.
    """
    encoded = []
    for control in controls:
        controlnet, weights = control.controlnet, control.weights()
        if control.mask is not None and kind_of(controlnet).pools(controlnet):
            raise ValueError("a control network that pools its residuals acts nowhere in particular: no mask")
        cond = control.cond_for(width, height)
        if len(cond) not in (1, pictures):
            raise ValueError(f"{len(cond)} maps for {pictures} pictures: give one map, or one per picture")
        cond = cond.to(device=controlnet.device, dtype=controlnet.dtype)
        hint = _hints(controlnet, cond, in_bands, control.number)
        encoded.append(EncodedControl(control, hint, weights, control.region(width, height)))
    return encoded


def _hints(controlnet: Any, cond: Tensor, in_bands: bool, number: int) -> Hint:
    """Hints of maps (B, C, H, W), one at a time: none depends on its neighbours in the batch."""
    kind = kind_of(controlnet)
    if in_bands and not kind.local:
        raise ValueError(f"a {kind.title} sees the map as a whole, and does not go with tiles")
    if in_bands and kind.bands:
        return join_hints([(_hint_in_bands(controlnet, row[None], number),) for row in cond])
    return join_hints([encode_hint(controlnet, row[None], number) for row in cond])


def _hint_in_bands(controlnet: Any, cond: Tensor, number: int) -> Tensor:
    height, bands = cond.shape[-2], []
    for top in range(0, height, BAND):
        bottom = min(top + BAND, height)
        above = max(top - _MARGIN, 0)
        (hint,) = encode_hint(controlnet, cond[..., above : bottom + _MARGIN, :], number)
        bands.append(hint[..., (top - above) // 8 : (bottom - above) // 8, :])
    return torch.cat(bands, dim=-2)


def summed_residuals(
    controls: Sequence[EncodedControl],
    noisy_latents: Tensor,
    timesteps: Tensor,
    rows: Rows,
    *,
    step: int,
    steps: int,
    again: bool = False,
    keep: bool = False,
    networks: Networks = EAGER,
) -> Residuals | None:
    """The residuals of all controls active in this step, weighed and summed; None when there are none.

    ``noisy_latents`` (B, C, h, w), one row for each picture: guidance shows both branches the same ones. The
    residuals have a row for each of `rows`; those of a branch that no control acts on are zero. `again`
    (lossy): what the networks gave before, where they were run before and it was to `keep`. networks: what
    runs them.
    """
    terms = []
    for group in _together([e for e in controls if not acts_inside(e)]):
        active = [each.control.active(step, steps) for each in group]
        if not any(active):
            continue
        encoded, control = group[0], group[0].control
        told = rows if control.acts_on_both() else rows.conditional
        if not told.is_conditional and not control.acts_on_both():
            continue
        hint, scale = encoded.hint, control.scale_at(step, steps)
        if len(group) > 1:
            # as in diffusers: one that does not act weighs nothing, and is there
            acting = [e.control.scale_at(step, steps) * on for e, on in zip(group, active, strict=True)]
            scale, hint = 1.0, union.joined(control.controlnet, [each.hint for each in group], acting)
        key = (id(told), *(id(e.control) for e, on in zip(group, active, strict=True) if on))
        residuals = encoded.last.get(key) if again else None
        if residuals is None:
            if networks.compiled:
                text_fixed(control.controlnet, told.encoder_hidden_states)
            residuals = networks.control_residuals(
                control.controlnet,
                noisy_latents,
                timesteps,
                told.encoder_hidden_states,
                hint,
                added_cond=told.added_cond,
                class_labels=told.class_labels,
            )
            if keep:
                encoded.last[key] = residuals.map(torch.clone) if networks.graphs else residuals
        residuals = weigh_residuals(residuals, [scale * weight for weight in encoded.weights])
        if encoded.region is not None:
            residuals = residuals.map(encoded.within_region)
        if told is not rows:
            residuals = residuals.map(lambda part: _after_zeros(part, rows.pictures))
        terms.append(residuals)
    return add_residuals(*terms) if terms else None


def _together(controls: Sequence[EncodedControl]) -> list[list[EncodedControl]]:
    """The controls in groups, each of which is one run of a network: several maps of one ControlNet-Union."""
    groups: dict[object, list[EncodedControl]] = {}
    for number, encoded in enumerate(controls):
        network = encoded.control.controlnet
        joins = kind_of(network).name == "controlnet-union" and encoded.region is None
        key = (id(network), encoded.control.acts_on_both(), encoded.weights) if joins else number
        groups.setdefault(key, []).append(encoded)
    return list(groups.values())


def acts_inside(encoded: EncodedControl) -> bool:
    """Whether a control acts within the U-Net, and not by residuals."""
    kind = kind_of(encoded.control.controlnet)
    return kind.crosses or kind.hooks


def inside_at(
    controls: Sequence[EncodedControl], rows: Rows, *, step: int, steps: int
) -> list[EncodedControl]:
    """The controls that act within the U-Net in this step, on these rows."""
    return [
        encoded
        for encoded in controls
        if acts_inside(encoded)
        and encoded.control.active(step, steps)
        and (encoded.control.acts_on_both() or rows.is_conditional)
    ]


def _after_zeros(residual: Tensor, pictures: int) -> Tensor:
    """Rows of zeros for the unconditional branch, then the residual of the conditional one."""
    residual = residual.expand(max(len(residual), pictures), *residual.shape[1:])
    return torch.cat([torch.zeros_like(residual), residual])

"""Where a generation starts: from noise, from a picture, or from a picture with a hole to fill.

From a picture (SDEdit, Meng et al. 2021, arXiv:2108.01073): its latents, as noisy as they are `strength` of
the way back, and the remaining steps. With a mask, what lies outside the hole is put back after every step,
as noisy as the step leaves the rest (Avrahami et al. 2022, arXiv:2111.14818, algorithm 1, in latents); bases
with nine channels are shown the mask and the picture without the hole besides, in every step. The draws come
in the order of diffusers' pipelines: the encoder's, the noise, the masked picture's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from controlkit import images, limits
from controlkit.naming import kind_of_value
from controlkit.settings import USUAL_STRENGTH

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.schedulers import Schedule

INPAINT_CHANNELS = 9  # of a U-Net that is shown the mask and the masked picture


@dataclass(frozen=True, eq=False)
class Start:
    """A picture to start from.

    picture: whatever `images.load_picture` takes (a path, a PIL image, an array, a tensor), which becomes
        uint8 (H, W, 3) RGB; it is scaled and centre-cropped to the size that is generated.
    strength: above 0, up to 1: the share of the steps that are taken, 1 keeping nothing of the picture but
        what lies outside the mask.
    mask: (H, W) of the picture's size, uint8, bool or float in [0, 1]; from the middle value up it is
        redrawn. Or a path or a PIL image, as `images.load_mask` reads them. None redraws everything.
    paste: put the picture's own pixels back outside the mask when all is done. The autoencoder would
        otherwise change them a little.

    Raises ValueError for a strength outside its range, a picture or a mask of another kind, or an empty mask.
    """

    picture: np.ndarray
    strength: float = USUAL_STRENGTH
    mask: np.ndarray | None = None
    paste: bool = True

    def __post_init__(self) -> None:
        limits.check_strength(self.strength)
        object.__setattr__(self, "picture", images.load_picture(self.picture))
        object.__setattr__(self, "mask", images.mask_as_read(self.mask))
        if self.mask is None:
            return
        if not isinstance(self.mask, np.ndarray):
            raise ValueError(
                "a mask is a path, a PIL image, or an array, uint8, bool or float in [0, 1], not"
                f" {kind_of_value(self.mask)}"
            )
        if self.mask.ndim != 2:
            raise ValueError(f"a mask is (H, W), not {self.mask.shape}")
        if self.mask.shape != self.picture.shape[:2]:
            raise ValueError(
                f"the mask is {self.mask.shape[::-1]} (width, height) and its picture"
                f" {self.picture.shape[1::-1]}: they must be equal"
            )
        if self.mask.dtype == np.bool_:
            object.__setattr__(self, "mask", self.mask.astype(np.float32))
        elif np.issubdtype(self.mask.dtype, np.floating):
            if not ((self.mask >= 0) & (self.mask <= 1)).all():
                raise ValueError(
                    f"a mask of floats has values in [0, 1], not {self.mask.min():g} to {self.mask.max():g}"
                )
        elif self.mask.dtype != np.uint8:
            raise ValueError(f"a mask is uint8, bool, or float in [0, 1], not {self.mask.dtype}")
        if not self.hole().any():
            raise ValueError("the mask is black: there is nothing to redraw")

    def hole(self) -> np.ndarray:
        """Where it is redrawn: bool (H, W)."""
        assert self.mask is not None
        return self.mask >= (128 if self.mask.dtype == np.uint8 else 0.5)

    def fitted(self, width: int, height: int) -> Start:
        """The same at another size."""
        mask = None
        if self.mask is not None:
            mask = np.where(self.hole(), np.uint8(255), np.uint8(0))
            mask = images.cover(mask, width, height, nearest=True)
            if not mask.any():
                raise ValueError(
                    f"at {width}x{height} the picture is cropped, and all that is white in the mask with it"
                )
        return Start(images.cover(self.picture, width, height), self.strength, mask, self.paste)

    def pasted(self, picture: np.ndarray) -> np.ndarray:
        """A finished picture of the same size with the original's pixels outside the mask."""
        if self.mask is None or not self.paste:
            return picture
        return np.where(self.hole()[..., None], picture, self.picture)


@dataclass(frozen=True, eq=False)
class Begun:
    """What the loop starts from.

    latents: (B, C, h, w), as noisy as the first step expects. noise: what was drawn, of that shape. kept:
    the picture's latents, and hole: (1, 1, h, w), 1 where it is redrawn; or None. shown: further channels of
    every step's input, (B, 5, h, w), for bases that take them.
    """

    latents: Tensor
    noise: Tensor
    kept: Tensor | None = None
    hole: Tensor | None = None
    shown: Tensor | None = None

    def with_kept(self, latents: Tensor, schedule: Schedule, step: int) -> Tensor:
        """The latents after step `step` (from 0), with what lies outside the hole put back."""
        if self.kept is None or self.hole is None:
            return latents
        around = schedule.add_noise(self.kept, self.noise, step + 1)
        return (1 - self.hole) * around + self.hole * latents


def draw_noise(base: Base, generators: Sequence[torch.Generator], *, width: int, height: int) -> Tensor:
    """Unit Gaussian noise: float32 (B, C, height/8, width/8) on the base's device, one CPU generator each."""
    channels = base.vae.config.latent_channels
    shape = (1, channels, height // base.vae_factor, width // base.vae_factor)
    noise = [torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators]
    return torch.cat(noise).to(base.device)


def begin(
    base: Base,
    schedule: Schedule,
    generators: Sequence[torch.Generator],
    *,
    width: int,
    height: int,
    start: Start | None = None,
) -> Begun:
    """The latents of the first step, for pictures of width x height pixels, one generator each.

    start: of that size (`Start.fitted`). Raises ValueError for a base that fills holes where none is given.
    """
    fills_holes = base.unet.config.in_channels == INPAINT_CHANNELS
    if fills_holes and (start is None or start.mask is None):
        raise ValueError(f"the base {base.name} fills holes in pictures: give a picture and a mask")
    if start is None:
        noise = draw_noise(base, generators, width=width, height=height)
        return Begun(noise * schedule.scheduler.init_noise_sigma, noise)
    pixel_values = images.picture_to_tensor([start.picture])
    fresh = start.strength == 1 and start.mask is not None
    encoded = None if fresh and fills_holes else _encoded(base, pixel_values, generators)
    noise = draw_noise(base, generators, width=width, height=height)
    if fresh:
        latents = noise * schedule.scheduler.init_noise_sigma
    else:
        assert encoded is not None
        latents = schedule.add_noise(encoded, noise, 0)
    if start.mask is None:
        return Begun(latents, noise)
    hole = torch.from_numpy(start.hole()).float()[None, None]
    small = torch.nn.functional.interpolate(hole, size=latents.shape[-2:]).to(latents.device)
    if not small.any():
        raise ValueError("the hole is too small: it falls between the latents, of 8x8 pixels each")
    if not fills_holes:
        _skip_masked(base, noise, generators)
        return Begun(latents, noise, encoded, small)
    around = _encoded(base, pixel_values * (hole < 0.5), generators)
    shown = torch.cat([small.expand(len(latents), -1, -1, -1), around], dim=1)
    return Begun(latents, noise, shown=shown)


def _skip_masked(base: Base, noise: Tensor, generators: Sequence[torch.Generator]) -> None:
    """Draw what diffusers' pipelines draw for a masked picture that nobody sees, or later draws differ."""
    from diffusers import AutoencoderTiny

    for generator in () if isinstance(base.vae, AutoencoderTiny) else generators:  # which draws nothing
        torch.randn((1, *noise.shape[1:]), generator=generator, dtype=base.vae.dtype)


def inpaint_cond(picture: np.ndarray, hole: np.ndarray) -> Tensor:
    """The map of an inpainting adapter: float32 (1, 3, H, W), the picture in [0, 1] and -1 in the hole.

    picture: uint8 (H, W, 3); hole: bool (H, W). The convention is that of ControlNet v1.1's inpainting model
    (lllyasviel/control_v11p_sd15_inpaint), as diffusers and A1111 feed it.
    """
    cond = images.map_to_cond([picture])
    return torch.where(torch.from_numpy(hole)[None, None], torch.tensor(-1.0), cond)


def _encoded(base: Base, pixel_values: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws from the encoder's distribution for one picture, one for each generator, float32."""
    drawn = [base.encode_pictures(pixel_values, generator=generator) for generator in generators]
    return torch.cat(drawn).float().to(base.device)

"""Bases that are told a class or a picture besides the text.

Both enter where the time does (diffusers' ``class_labels``): what they amount to is added to the time
embedding. A class is a row of a table that was learned with the U-Net. A picture is CLIP's vector of it, as
noisy as is asked for (Ramesh et al. 2022, arXiv:2204.06125, in the form of Stable unCLIP:
stabilityai/stable-diffusion-2-1-unclip). Numbers and the order of draws are those of diffusers'
``StableUnCLIPImg2ImgPipeline``: the vector's noise comes before the latents', from the same generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from controlkit import diffusion, limits
from controlkit.controlnet import lock
from controlkit.families import takes_picture
from controlkit.folders import load_part, quiet_libraries, read_json
from controlkit.hub import first_sentence
from controlkit.told_sizes import Sizes

if TYPE_CHECKING:
    from diffusers import ControlNetModel
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    from controlkit.base import Base

PICTURE_PARTS = ("feature_extractor", "image_encoder", "image_normalizer", "image_noising_scheduler")
"""What a base that is told a picture has besides the usual parts, by diffusers' names."""

EXAMPLE = "stabilityai/stable-diffusion-2-1-unclip"  # for messages: a base that is told a picture


def classes_of(unet_config: Mapping[str, Any]) -> int:
    """How many classes a U-Net of this configuration knows; 0 where it is told none."""
    return 0 if takes_picture(unet_config) else unet_config.get("num_class_embeds") or 0


@dataclass(frozen=True, eq=False)
class Told:
    """What a base is told besides the text.

    picture: uint8 (H, W, 3) RGB, for bases that are told one. noise_level: 0 to 999, how far the picture's
    vector is on the way to pure noise; more of it gives freer variations. class_label: from 0, for bases that
    know classes. sizes: of SDXL, see `told_sizes.Sizes`; None is the size that is generated, whole.
    negative_sizes: those of the negative prompt's branch; None is what the other one is told.

    Raises ValueError for a number outside its range or a picture of another kind.
    """

    picture: np.ndarray | None = None
    noise_level: int = 0
    class_label: int | None = None
    sizes: Sizes | None = None
    negative_sizes: Sizes | None = None

    def __post_init__(self) -> None:
        limits.check_noise_level(self.noise_level)
        limits.check_class(self.class_label)
        for sizes in (self.sizes, self.negative_sizes):
            if sizes is not None and not isinstance(sizes, Sizes):
                raise ValueError(f"sizes that a base is told are Sizes(...), not {type(sizes).__name__}")
        picture = self.picture
        if picture is None:
            return
        if not isinstance(picture, np.ndarray):
            raise ValueError(f"a picture that a base is told is an array, not {type(picture).__name__}")
        if picture.ndim != 3 or picture.dtype != np.uint8:
            raise ValueError(
                f"a picture that a base is told is uint8 (H, W, 3), not {picture.dtype} {picture.shape}"
            )

    def of_branches(self, branches: int) -> tuple[Sizes, ...]:
        """The sizes of each branch, the negative prompt's first; () where the base is told what is made."""
        if self.sizes is None and self.negative_sizes is None:
            return ()
        sizes = self.sizes or Sizes()
        return (sizes,) if branches == 1 else (self.negative_sizes or sizes, sizes)


def check_told(base: Base, told: Told) -> None:
    """Raise ValueError unless a base is told what it takes, no more and no less."""
    name, classes = base.name, classes_of(base.unet.config)
    if told.picture is None and base.picture_encoder is not None:
        raise ValueError(f"the base {name} is told a picture besides the text: give one with --image PICTURE")
    if told.picture is not None and base.picture_encoder is None:
        raise ValueError(
            f"the base {name} is told no picture: bases of the unCLIP kind are, as {EXAMPLE};"
            " to start from a picture, give --from PICTURE"
        )
    if told.class_label is None and classes:
        raise ValueError(f"the base {name} is told a class: give --class N, from 0 to {classes - 1}")
    if told.class_label is not None and not classes:
        raise ValueError(f"the base {name} is told no class: it knows none, so leave out --class")
    if told.class_label is not None and told.class_label >= classes:
        raise ValueError(
            f"the base {name} knows {classes} classes: --class must be from 0 to {classes - 1},"
            f" not {told.class_label}"
        )
    if told.of_branches(1) and base.family != "sdxl":
        option = "--negative-original-size" if told.sizes is None else "--original-size"
        raise ValueError(f"the base {name} is told no sizes: only SDXL is, so leave out {option}")


def check_labels_fit(controlnet: ControlNetModel, base: Base) -> None:
    """Raise ValueError for a control network that is told something else than the base is.

    One that is told nothing fits every base: the adapters of SD2.1 work on its unCLIP relatives.
    """
    own, given = _kind(controlnet.config), _kind(base.unet.config)
    if own not in ("nothing", given):
        raise ValueError(
            f"the control network is told {own} besides the text, and the base {base.name} {given}"
        )


def _kind(config: Mapping[str, Any]) -> str:
    if takes_picture(config):
        return f"a vector of {config.get('projection_class_embeddings_input_dim')} numbers"
    return f"one of {classes_of(config)} classes" if classes_of(config) else "nothing"


class Labels:
    """What a base is told besides the text, ready to be drawn for one batch after the other.

    The picture is encoded here, once for all batches and steps. Raises ValueError as `check_told`.
    """

    def __init__(self, base: Base, told: Told) -> None:
        check_told(base, told)
        self.base, self.told = base, told
        encoder = base.picture_encoder
        self.embedding = None if encoder is None or told.picture is None else encoder.encode(told.picture)

    def draw(self, generators: Sequence[torch.Generator], *, branches: int) -> Tensor | None:
        """The ``class_labels`` of a batch, one CPU generator for each picture; None for other bases.

        Of a picture: (branches x B, 2 D), zeros for the unconditional branch, as diffusers has it. Of a
        class: (B,), int64, the same for both branches, which guidance then tells apart by the text alone.
        """
        base, told = self.base, self.told
        if told.class_label is not None:
            return torch.full((len(generators),), told.class_label, device=base.device)
        if self.embedding is None:
            return None
        assert base.picture_encoder is not None
        rows = base.picture_encoder.noised(self.embedding, told.noise_level, generators)
        rows = rows.to(base.device, base.dtype)
        return rows if branches == 1 else torch.cat([torch.zeros_like(rows), rows])


@dataclass(frozen=True, eq=False)
class PictureEncoder:
    """What makes of a picture the vector that an unCLIP base is told. Build it with `load_picture_encoder`.

    mean, std: (1, D), of CLIP's vectors, between which the noise is measured. alphas_cumprod: the noise's
    schedule, (T,) float64; both on the CPU.
    """

    feature_extractor: CLIPImageProcessor = field(repr=False)
    image_encoder: CLIPVisionModelWithProjection = field(repr=False)
    mean: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    alphas_cumprod: Tensor = field(repr=False)

    @torch.no_grad()
    def encode(self, picture: np.ndarray) -> Tensor:
        """CLIP's vector of a picture, uint8 (H, W, 3) RGB of any size: (1, D), float32 on the CPU."""
        from PIL import Image

        encoder = self.image_encoder
        seen = self.feature_extractor(images=Image.fromarray(picture), return_tensors="pt").pixel_values
        return encoder(seen.to(encoder.device, encoder.dtype)).image_embeds.float().cpu()

    def noised(self, embedding: Tensor, level: int, generators: Sequence[torch.Generator]) -> Tensor:
        """A noisy copy of a vector (1, D) for each generator, and behind each the level: (B, 2 D), float32.

        The noise is that of step `level` of the encoder's own schedule, so that level 0 adds a little, too.
        The level is told in sinusoids.
        """
        from diffusers.models.embeddings import get_timestep_embedding

        shape = embedding.shape
        noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        levels = torch.full((len(noise),), level)
        rows = ((embedding - self.mean) / self.std).expand_as(noise)
        rows = diffusion.q_sample(rows, noise, levels, self.alphas_cumprod) * self.std + self.mean
        told = get_timestep_embedding(levels, shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
        return torch.cat([rows, told], dim=1)


def load_picture_encoder(
    folder: Path, unet_config: Mapping[str, Any], alphas_cumprod: Tensor, *, dtype: torch.dtype
) -> PictureEncoder:
    """The picture's side of an unCLIP base, from its pipeline folder, locked, on the CPU.

    alphas_cumprod: of its ``image_noising_scheduler``. Raises ValueError, naming the part, for one that is
    missing, damaged, or of another size than the U-Net expects.
    """
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPVisionModelWithProjection

    encoder = load_part(CLIPVisionModelWithProjection, folder / "image_encoder", dtype=dtype)
    normalizer = load_part(StableUnCLIPImageNormalizer, folder / "image_normalizer", dtype=torch.float32)
    sizes = encoder.config.projection_dim, normalizer.mean.shape[-1]
    expected = unet_config.get("projection_class_embeddings_input_dim")
    if any(2 * size != expected for size in sizes):
        raise ValueError(
            f"{folder}: its U-Net is told {expected} numbers, which must be twice those of image_encoder"
            f" ({sizes[0]}) and image_normalizer ({sizes[1]})"
        )
    mean, std = normalizer.mean.detach(), normalizer.std.detach()
    return PictureEncoder(
        _feature_extractor(folder / "feature_extractor"), lock(encoder), mean, std, alphas_cumprod
    )


def check_picture_parts(folder: Path) -> None:
    """Raise ValueError unless a folder has every part that a base needs to be told a picture."""
    missing = next((part for part in PICTURE_PARTS if not (folder / part).is_dir()), None)
    if missing is not None:
        raise ValueError(
            f"{folder} has no {missing}/: its U-Net is told a vector, and only bases that make it of a"
            f" picture are supported, as {EXAMPLE}"
        )


def _feature_extractor(folder: Path) -> CLIPImageProcessor:
    from transformers import CLIPImageProcessor

    read_json(folder / "preprocessor_config.json")
    with quiet_libraries():
        try:
            return CLIPImageProcessor.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"cannot read {folder}: {first_sentence(error)}") from error

"""The settings of a generation that are asked for, recorded and repeated in the same words.

`generate_plan.Options` adds what may be left to the base or the device, `infotext.PictureRecord` what was
decided. Needs neither torch nor numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from controlkit import limits, prompt_syntax
from controlkit.freeu import parse_freeu
from controlkit.told_sizes import Sizes, parse_sizes

USUAL_STEPS, USUAL_SCHEDULER = 20, "ddim"
USUAL_STRENGTH = 0.75  # of a start from a whole picture


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a picture is made with, in plain values; as in `sampling.generate` and `cascade.refine`.

    negative_prompt: None for none, which to an SDXL is not the same as "" (`sampling.encode_text`). vae:
    another autoencoder than the base's own, as in `vaes.with_vae`, or "". memory: the measures of
    `memory.Memory` by name, none where memory is not limited. clip: the name of the CLIP that `clip_guidance`
    asks, "" for none. freeu: as `freeu.parse_freeu` reads it, "" for none. original_size: what SDXL is told,
    as `told_sizes.parse_sizes` reads it, "" for the size that is made; negative_original_size: of the
    negative prompt's branch, "" for the same.
    """

    prompt: str
    negative_prompt: str | None
    base: str
    steps: int
    scheduler: str
    seed: int
    guidance_rescale: float = 0.0
    pag: float = 0.0
    temperature: float | None = None
    hires: float = 1.0
    hires_strength: float = 0.5
    tile: int | None = None
    control_every: int = 1
    features_every: int = 1
    guidance_until: float = 1.0
    merge_tokens: float = 0.0
    freeu: str = ""
    prompt_syntax: str = "plain"
    clip_skip: int = 1
    vae: str = ""
    memory: tuple[str, ...] = ()
    compile: bool = False
    cuda_graph: bool = False
    image_noise: int = 0
    class_label: int | None = None
    clip_guidance: float = 0.0
    clip: str = ""
    original_size: str = ""
    negative_original_size: str = ""

    def sizes(self, *, negative: bool = False) -> Sizes | None:
        """What SDXL is told of sizes, None where nothing is said. Raises ValueError for what is no size."""
        name = "negative_original_size" if negative else "original_size"
        text = getattr(self, name)
        return parse_sizes(text, name) if text else None

    def check(self) -> None:
        """Raise ValueError for the first number outside its range, or a prompt that cannot be read."""
        limits.check_steps(self.steps)
        limits.check_seeds([self.seed])
        limits.check_rescale(self.guidance_rescale)
        limits.check_pag(self.pag)
        limits.check_clip_skip(self.clip_skip)
        limits.check_temperature(self.temperature, self.scheduler)
        limits.check_strength(self.hires_strength, "hires_strength")
        if self.hires != 1:
            limits.check_factor(self.hires)
        if self.tile is not None:
            limits.check_tile(self.tile)
        limits.check_every("control_every", self.control_every)
        limits.check_every("features_every", self.features_every)
        limits.check_share("guidance_until", self.guidance_until)
        limits.check_noise_level(self.image_noise)
        limits.check_class(self.class_label)
        limits.check_clip_guidance(self.clip_guidance)
        if self.clip_guidance and not self.clip:
            raise ValueError(
                "CLIP guidance asks a CLIP for pictures and texts, and no base holds one: add --clip MODEL"
            )
        limits.check_merged(self.merge_tokens)
        if self.sizes() or self.sizes(negative=True):
            limits.check_told_whole(self.tile)
        if self.freeu:
            parse_freeu(self.freeu)
        limits.check_every_step(self.features_every, pag=self.pag > 0, freeu=bool(self.freeu))
        limits.check_compiled(
            self.compile,
            features_every=self.features_every > 1,
            merge_tokens=self.merge_tokens > 0,
            pag=self.pag > 0,
            freeu=bool(self.freeu),
        )
        prompt_syntax.check_syntax(self.prompt_syntax)
        if self.prompt_syntax == "a1111":
            for text in (self.prompt, self.negative_prompt or ""):
                prompt_syntax.parse(text)


def shared(settings: Settings) -> dict[str, Any]:
    """The fields of `Settings` alone, by name."""
    return {field.name: getattr(settings, field.name) for field in fields(Settings)}

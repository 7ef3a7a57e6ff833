"""The locked base: a Stable Diffusion (SD1, SD2 or SDXL) and what it needs to encode and decode.

Its parts are loaded by ``base_parts.py``; the pair's forward pass (``controlnet.py``) and the denoising loop
(``sampling.py``) are ours. Locked means evaluation mode, no gradients, and the same bytes after any training:
:meth:`Base.digest` tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from controlkit import latent_scale, notices
from controlkit.base_parts import ALIASES as ALIASES
from controlkit.base_parts import BUNDLED as BUNDLED
from controlkit.base_parts import FAMILY_TITLES as FAMILY_TITLES
from controlkit.base_parts import check_base as check_base
from controlkit.base_parts import (
    check_parts,
    find_base,
    load_models,
    load_picture_side,
    load_tokenizer,
    part_of,
    read_family,
    read_scheduler,
    zeros_for_empty_negative,
)
from controlkit.class_labels import PictureEncoder
from controlkit.controlnet import digest_of_weights, lock
from controlkit.devices import check_device, check_dtype
from controlkit.files import as_text
from controlkit.folders import alone, quiet_libraries, read_json
from controlkit.naming import check_list_of, kind_of_value
from controlkit.told_sizes import Sizes
from controlkit.usual_guidance import is_told_guidance, is_turbo
from controlkit.words import Words, saved_by_diffusers, with_all_vectors

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

SHOWN = 40  # letters of a prompt that a message repeats
_too_long: ContextVar[dict[str, int] | None] = ContextVar("too_long", default=None)
"""Prompts that are longer than the text encoder reads, and how much it reads; see
`long_prompts_told_together`."""
_READ = {"sd1": 1, "sd2": 2, "sdxl": 2}  # the layer that a family reads, counted from the last
_SAMPLE_SIZE = {"sd1": 64, "sd2": 64, "sdxl": 128}  # where a U-Net does not say


class Conditioning(NamedTuple):
    """What the U-Net is told by text.

    ``encoder_hidden_states``: (B, 77, D), one row per token. ``pooled``: (B, P), one vector per prompt, for
    SDXL; None for the other families.
    """

    encoder_hidden_states: Tensor
    pooled: Tensor | None


@dataclass(frozen=True, eq=False)
class Base:
    """A locked Stable Diffusion. Build it with :func:`load_base`.

    ``family`` is "sd1", "sd2" or "sdxl". ``prediction_type`` is what the U-Net outputs: "epsilon",
    "v_prediction" or "sample". ``resolution`` is the side in pixels that it was trained for, ``vae_factor``
    how many pixels make one latent (8). ``alphas_cumprod`` is its noise schedule, (T,) float64 on the CPU.
    ``words``: those that were learned (`embeddings.py`), and the tokens of each one's vectors. ``clip_skip``:
    which layer of the text encoders is read, counted from the last as in A1111 and Forge: 2 is the last but
    one, which SD2 and SDXL read anyway. ``zeros_for_empty_negative``: an SDXL that was trained with zeros for
    no text, not with the encoding of "" (diffusers' ``force_zeros_for_empty_prompt``). ``picture_encoder``:
    of a base that is told a picture.
    """

    name: str
    family: str
    unet: UNet2DConditionModel = field(repr=False)
    vae: AutoencoderKL | AutoencoderTiny = field(repr=False)
    text_encoders: list[CLIPTextModel] = field(repr=False)
    tokenizers: list[CLIPTokenizer] = field(repr=False)
    scheduler_config: dict[str, Any] = field(repr=False)
    alphas_cumprod: Tensor = field(repr=False)
    device: torch.device
    dtype: torch.dtype
    words: Words = field(default_factory=dict, repr=False)
    clip_skip: int = 1
    zeros_for_empty_negative: bool = True
    picture_encoder: PictureEncoder | None = field(default=None, repr=False)

    @property
    def prediction_type(self) -> str:
        """What the U-Net was trained to output: a name of ``diffusion.PREDICTION_TYPES``."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def encoders(self) -> list[Any]:
        """The networks that are run before the denoising alone: the text's, and the picture's if any."""
        picture = [] if self.picture_encoder is None else [self.picture_encoder.image_encoder]
        return [*self.text_encoders, *picture]

    @property
    def is_told_guidance(self) -> bool:
        """Whether the U-Net takes the guidance scale as an input, as latent consistency models do."""
        return is_told_guidance(self.unet.config)

    @property
    def is_turbo(self) -> bool:
        """Whether it was distilled to few steps without guidance: see `usual_guidance.is_turbo`."""
        return is_turbo(self.scheduler_config)

    @property
    def vae_factor(self) -> int:
        """Pixels per latent along each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """The side, in pixels, of the pictures that the U-Net was trained on."""
        size = self.unet.config.sample_size or _SAMPLE_SIZE[self.family]
        return int(max(size) if isinstance(size, list | tuple) else size) * self.vae_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts: row k depends on prompt k alone, bit for bit, whatever else is in the list.

        Each distinct prompt is encoded once, by itself: a batch would round differently.
        Warns, in one line, when prompts are longer than the 77 tokens that the text encoder reads. Raises
        ValueError for an empty list, and for anything but a list of texts, as one text by itself.
        """
        check_list_of("prompts", prompts, str, '"a red figure"')
        if not prompts:
            raise ValueError("no prompts given")
        with long_prompts_told_together():
            encoded = {prompt: self._encode_prompt(prompt) for prompt in dict.fromkeys(prompts)}
        hidden = torch.cat([encoded[prompt].encoder_hidden_states for prompt in prompts])
        pooled = [row for prompt in prompts if (row := encoded[prompt].pooled) is not None]
        return Conditioning(hidden, torch.cat(pooled) if pooled else None)

    def added_cond(
        self, pooled: Tensor | None, *, height: int, width: int, sizes: Sequence[Sizes] = ()
    ) -> dict[str, Tensor] | None:
        """SDXL's extra conditioning for pictures of ``height`` x ``width`` pixels; None for other families.

        ``text_embeds`` is ``pooled`` (B, P); ``time_ids`` (B, 6) holds what `told_sizes.Sizes` says: of each
        one in ``sizes`` for an equal part of the rows, or of the whole picture where there are none.
        """
        if self.family != "sdxl":
            return None
        assert pooled is not None, "SDXL needs the pooled text: encode_prompts gives it"
        told = [one.ids(height=height, width=width) for one in sizes or (Sizes(),)]
        time_ids = torch.tensor(told, dtype=pooled.dtype, device=pooled.device)
        return {
            "text_embeds": pooled,
            "time_ids": time_ids.repeat_interleave(len(pooled) // len(told), dim=0),
        }

    @torch.no_grad()
    def encode_pictures(self, pixel_values: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8), scaled to about unit variance.

        Without a ``generator`` the result is the mean of the encoder's distribution; with one (a CPU
        generator gives the same latents on every device) it is a draw from it. A tiny autoencoder has no
        distribution, and draws nothing.
        """
        encoded = self.vae.encode(pixel_values.to(self.vae.device, self.vae.dtype))
        if hasattr(encoded, "latents"):
            latents = encoded.latents
        else:
            posterior = encoded.latent_dist
            latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latent_scale.scaled(latents, self.vae).to(self.dtype)

    @torch.no_grad()
    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to pixels (B, 3, 8h, 8w), float32, in [-1, 1] but for a little overshoot."""
        seen = latent_scale.unscaled(latents.to(self.vae.device, self.vae.dtype), self.vae)
        return self.vae.decode(seen).sample.float()

    def digest(self) -> str:
        """SHA-256 over every weight and buffer with its name, type and shape: equal digests, equal bytes."""
        return digest_of_weights([self.unet, self.vae, *self.encoders])

    def encode_tokens(self, tokens: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], Tensor | None]:
        """What each text encoder gives for its own ``input_ids`` and ``attention_mask`` (B, 77).

        Returns each encoder's (B, 77, D), which the U-Net takes side by side, and the pooled text (B, P). Of
        an SDXL these are both encoders' last layer but one and the second encoder's projection; else the last
        layer and None. With ``clip_skip`` an earlier layer, which outside SDXL goes through the last norm.
        (diffusers' ``clip_skip`` is one less for SD1, and two less for SD2, whose file lacks the last layer,
        and for SDXL.)

        Raises ValueError where there is no such layer.
        """
        layers = min(encoder.config.num_hidden_layers for encoder in self.text_encoders)
        skipped = max(self.clip_skip - _READ[self.family], 0)
        if skipped + (self.family == "sdxl") >= layers:
            raise ValueError(
                f"clip_skip {self.clip_skip} leaves no layer of the base's text encoder ({layers})"
            )
        outputs = [
            encoder(**_wanted(told, encoder), output_hidden_states=True)
            for told, encoder in zip(tokens, self.text_encoders, strict=True)
        ]
        if self.family != "sdxl":
            if not skipped:
                return [outputs[0].last_hidden_state.to(self.dtype)], None
            encoder: Any = self.text_encoders[0]
            norm = getattr(encoder, "text_model", encoder).final_layer_norm  # by the version of transformers
            return [norm(outputs[0].hidden_states[-1 - skipped]).to(self.dtype)], None
        hidden = [output.hidden_states[-2 - skipped].to(self.dtype) for output in outputs]
        return hidden, outputs[1].text_embeds.to(self.dtype)

    def _encode_prompt(self, prompt: str) -> Conditioning:
        tokens = [
            self._tokens(prompt, tokenizer, encoder)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        ]
        hidden, pooled = self.encode_tokens(tokens)
        return Conditioning(torch.cat(hidden, dim=-1), pooled)

    def _tokens(self, prompt: str, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> dict[str, Tensor]:
        """The prompt's token ids (1, 77), padded or cut, and the padding's mask."""
        length = encoder.config.max_position_embeddings  # the tokenizer's own limit is a setting, often wrong
        read = tokenizer(prompt, verbose=False).input_ids
        ids = [one for word in with_all_vectors(read, self.words, tokenizer) for one in word]
        if len(ids) > length:
            noted = _too_long.get()
            assert noted is not None  # `encode_prompts` has them noted
            noted[prompt] = length
            ids = [*ids[: length - 1], ids[-1]]  # the end stays
        filling = length - len(ids)
        return {
            "input_ids": torch.tensor([ids + filling * [tokenizer.pad_token_id]]),
            "attention_mask": torch.tensor([len(ids) * [1] + filling * [0]]),
        }


def check_base_given(base: object) -> None:
    """Raise ValueError where a base is something else, as the name of one."""
    if not isinstance(base, Base):
        raise ValueError(f'base is a Base, as load_base("tiny"), not {kind_of_value(base)}')


@contextmanager
def long_prompts_told_together() -> Iterator[None]:
    """Within the block prompts that are too long are noted, and at its end told in one line."""
    if _too_long.get() is not None:  # the block around this one tells
        yield
        return
    found: dict[str, int] = {}
    before = _too_long.set(found)
    try:
        yield
    finally:
        _too_long.reset(before)
    if found:
        prompt, length = next(iter(found.items()))
        shown = f"{prompt[:SHOWN].rstrip()}..." if len(prompt) > SHOWN else prompt
        line = f"the prompt {shown!r} has more than {length} tokens; the rest is ignored"
        if len(found) > 1:
            many = f"{len(found):,} prompts have more than {length} tokens, such as {shown!r}"
            line = f"{many}; the rest of each is ignored"
        notices.warn(line, stacklevel=4)


def _wanted(tokens: Mapping[str, Tensor], encoder: CLIPTextModel) -> dict[str, Tensor]:
    """What a text encoder is to be told of its tokens, on its device: the mask only where it asks for it."""
    asks = getattr(encoder.config, "use_attention_mask", False)
    keys = ("input_ids", "attention_mask") if asks else ("input_ids",)
    return {key: tokens[key].to(encoder.device) for key in keys}


@alone
def load_base(
    name_or_path: str | os.PathLike[str] = "tiny",
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> Base:
    """Load a locked base by its bundled name, short name (``ALIASES``), diffusers pipeline folder, hub id, or
    checkpoint in one file.

    SDXL's VAE stays float32 when ``dtype`` is float16, whose range its activations exceed (its
    configuration's ``force_upcast``).

    Raises ValueError, one line within about 5 seconds, for an unknown name, a hub id that is neither cached
    nor reachable, a missing or broken part, a base that is none of SD1, SD2, SDXL, a device that is not
    there, or an unknown precision.
    """
    device, dtype = check_device(device), check_dtype(dtype)
    name_or_path = as_text("a base", name_or_path)
    folder = find_base(name_or_path)
    unet_config = read_json(part_of(folder, "unet") / "config.json")
    family = read_family(folder, unet_config)
    check_parts(folder, family)
    scheduler_config, alphas_cumprod = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    with quiet_libraries():
        unet, vae, text_encoders = load_models(folder, family, dtype=dtype)
        picture_encoder = load_picture_side(folder, unet_config, dtype=dtype)
        tokenizers = [
            load_tokenizer(folder / part) for part in ("tokenizer", "tokenizer_2")[: len(text_encoders)]
        ]
    if picture_encoder is not None:
        picture_encoder.image_encoder.to(device)
    return Base(
        name=name_or_path,
        family=family,
        unet=lock(unet).to(device),
        vae=lock(vae).to(device),
        text_encoders=[lock(encoder).to(device) for encoder in text_encoders],
        tokenizers=tokenizers,
        scheduler_config=scheduler_config,
        alphas_cumprod=alphas_cumprod,
        device=device,
        dtype=dtype,
        words={word: tokens for one in tokenizers for word, tokens in saved_by_diffusers(one).items()},
        zeros_for_empty_negative=zeros_for_empty_negative(folder),
        picture_encoder=picture_encoder,
    )

"""Our denoising loop and diffusers' own pipelines on the same random weights of the real classes."""

from typing import Any

import tiny_models
import torch

from controlkit import sampling
from controlkit.applying import encode_controls
from controlkit.base import Base
from controlkit.class_labels import Labels, Told
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.sampling import Guidance
from controlkit.schedulers import make_schedule
from controlkit.starting import begin

SIZE = 64  # pixels; latents of 8x8


def controlnet_of(base: Base, *, seed: int = 0) -> Any:
    """A control network that does something: its zero convolutions are random."""
    return (
        tiny_models.randomize_zero_convs(from_base(base, seed=seed), seed=seed).eval().requires_grad_(False)
    )


def cond(seed: int = 0, *, batch: int = 1, size: int = SIZE) -> torch.Tensor:
    return torch.rand((batch, 3, size, size), generator=torch.Generator().manual_seed(seed))


def our_latents(
    base: Base, controls: list[Control], *, seed: int, steps: int, scheduler: str, **rest: Any
) -> torch.Tensor:
    """What `generate` computes before it decodes."""
    size = rest.pop("size", SIZE)
    guidance = rest.pop("guidance", 5.0)
    generators = [torch.Generator().manual_seed(seed)]
    start = rest.pop("start", None)
    schedule = make_schedule(scheduler, base, steps=steps, strength=start.strength if start else 1.0)
    with torch.no_grad():
        text = sampling.encode_text(
            base,
            rest.pop("prompt", "a red cube"),
            rest.pop("negative_prompt", None),
            guidance=guidance,
            syntax=rest.pop("syntax", "plain"),
        )
        labels = Labels(base, rest.pop("told", Told()))
        class_labels = labels.draw(generators, branches=len(text.encoder_hidden_states))
        return sampling.denoise(
            base,
            text,
            begin(base, schedule, generators, width=size, height=size, start=start),
            controls=encode_controls(controls, width=size, height=size, pictures=1),
            schedule=schedule,
            guidance=Guidance(guidance, rest.pop("rescale", 0.0), rest.pop("pag", 0.0)),
            generators=generators,
            class_labels=class_labels,
            **rest,
        )


def parts_of(base: Base, controls: list[Control], scheduler: str) -> dict[str, Any]:
    """What diffusers' pipelines are made of, on the same weights."""
    parts: dict[str, Any] = {
        "vae": base.vae,
        "unet": base.unet,
        "text_encoder": base.text_encoders[0],
        "tokenizer": base.tokenizers[0],
        "scheduler": sampling.make_scheduler(scheduler, base),
        "controlnet": [control.controlnet for control in controls],
    }
    if base.family == "sdxl":
        parts |= {"text_encoder_2": base.text_encoders[1], "tokenizer_2": base.tokenizers[1]}
        parts["force_zeros_for_empty_prompt"] = base.zeros_for_empty_negative
    return parts


def pipeline_of(base: Base, controls: list[Control], scheduler: str, *, pag: bool = False) -> Any:
    """diffusers' pipeline on the same weights."""
    import diffusers

    parts = parts_of(base, controls, scheduler)
    plain, xl = "StableDiffusionControlNetPipeline", "StableDiffusionXLControlNetPipeline"
    if pag:
        plain, xl = (name.replace("Pipeline", "PAGPipeline") for name in (plain, xl))
    if base.family == "sdxl":
        pipeline = getattr(diffusers, xl)(**parts, add_watermarker=False)
    else:
        pipeline = getattr(diffusers, plain)(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_latents(
    base: Base, controls: list[Control], *, seed: int, steps: int, scheduler: str, **rest: Any
) -> torch.Tensor:
    """What diffusers' pipeline makes; `prepare` is called with it first."""
    rest.pop("size", None)  # the maps' own
    if pag := rest.pop("pag", 0.0):
        rest["pag_scale"] = pag
    pipeline = pipeline_of(base, controls, scheduler, pag=pag > 0)
    rest.pop("prepare", lambda pipeline: None)(pipeline)
    return pipeline(
        rest.pop("prompt", "a red cube"),
        image=[control.controlnet_cond for control in controls],
        controlnet_conditioning_scale=[control.scale for control in controls],
        control_guidance_start=[control.start for control in controls],
        control_guidance_end=[control.end for control in controls],
        num_inference_steps=steps,
        guidance_scale=rest.pop("guidance", 5.0),
        generator=torch.Generator().manual_seed(seed),
        eta=rest.pop("temperature", 0.0),
        output_type="latent",
        return_dict=False,
        **rest,
    )[0]


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-4 * max(1.0, float(theirs.abs().max()))

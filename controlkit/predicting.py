"""One prediction of the pair under guidance: what the loop asks for in every step, and what may be left out.

`Savings` are lossy and off by default; what they cost in control and how far pictures move is measured by
`tests/benchmarks/sample.py --lossy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from controlkit import limits
from controlkit.applying import EAGER, EncodedControl, Networks, Rows, inside_at, summed_residuals
from controlkit.base import Base
from controlkit.controlnet import Deep, Residuals
from controlkit.kinds import kind_of
from controlkit.reuse import text_fixed
from controlkit.rules import guided_at
from controlkit.token_merging import TokenMerging


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: ``eps_u + scale * (eps_c - eps_u)``, and ``perturbed * (eps_c - eps_p)``.

    rescale: 0 to 1, the share of the result whose spread is brought back to that of eps_c (Lin et al. 2023,
    arXiv:2305.08891, equations 15 and 16), against the washed-out pictures of large scales. perturbed: 0 to
    100, how far away from what is predicted without self-attention: see `controlkit.perturbed`.
    """

    scale: float
    rescale: float = 0.0
    perturbed: float = 0.0

    def __post_init__(self) -> None:
        limits.check_guidance(self.scale)
        limits.check_rescale(self.rescale)
        limits.check_pag(self.perturbed)

    def apply(self, uncond: Tensor, cond: Tensor, perturbed: Tensor | None = None) -> Tensor:
        """The guided prediction of the branches' (B, C, h, w)."""
        guided = uncond + self.scale * (cond - uncond)
        if perturbed is not None:
            guided = guided + self.perturbed * (cond - perturbed)
        if not self.rescale:
            return guided
        axes = tuple(range(1, cond.ndim))
        rescaled = guided * (cond.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
        return self.rescale * rescaled + (1 - self.rescale) * guided

    def away(self, cond: Tensor, perturbed: Tensor) -> Tensor:
        """The prediction where there is no unconditional one to move away from."""
        return cond + self.perturbed * (cond - perturbed)


def guidance_embedding(base: Base, scale: float) -> Tensor | None:
    """The guidance as a latent consistency model is told it, (1, D); None for all other bases.

    Such a U-Net learned what guidance of that scale gives, so that one branch does (Luo et al. 2023,
    arXiv:2310.04378, section 4.2; diffusers' pipelines tell it scale - 1, in sinusoids).
    """
    size = base.unet.config.time_cond_proj_dim
    if size is None:
        return None
    from diffusers.models.embeddings import get_timestep_embedding

    told = torch.tensor([1000.0 * (scale - 1)], device=base.device)
    return get_timestep_embedding(told, size, downscale_freq_shift=1).to(base.dtype)


@dataclass(frozen=True)
class Savings:
    """Work that is left out at the price of another picture.

    control_every: run the control networks in every k-th step, and use their last residuals in between.
    features_every: run the deep part of all networks in every k-th step, and the outermost blocks alone in
        between, on the last deep features (DeepCache: Ma et al. 2023, arXiv:2312.00858).
    guidance_until: guide the first share of the steps, 0 to 1, and follow the prompt alone after it.
    merge_tokens: the share of like tokens, 0 to 0.75, that the self-attentions at the highest resolution see
        as one (ToMe: Bolya & Hoffman 2023, arXiv:2303.17604), see `token_merging`. Where tokens are few
        (the bundled base at 128 pixels) finding like ones takes longer than it saves.

    Raises ValueError for a number outside its range.
    """

    control_every: int = 1
    features_every: int = 1
    guidance_until: float = 1.0
    merge_tokens: float = 0.0

    def __post_init__(self) -> None:
        limits.check_every("control_every", self.control_every)
        limits.check_every("features_every", self.features_every)
        limits.check_share("guidance_until", self.guidance_until)
        limits.check_merged(self.merge_tokens)


def check_together(networks: Sequence[Any], savings: Savings, *, pag: float = 0.0) -> None:
    """Raise ValueError for control networks that cannot act in one generation.

    One that works with the U-Net layer by layer needs the encoder as it is, and every layer in every step.
    pag: of `Guidance`.
    """
    kinds = [kind_of(network) for network in networks]
    inside = [kind.title for kind in kinds if kind.hooks or kind.crosses]
    if pag and inside:
        raise ValueError(f"pag does not go with a {inside[0]}, which acts within the U-Net's layers")
    hooked = [kind.title for kind in kinds if kind.hooks]
    if hooked and savings.merge_tokens:
        raise ValueError(f"merge_tokens does not go with a {hooked[0]}, which knows each token's place")
    crossing = [kind for kind in kinds if kind.crosses]
    if not crossing:
        return
    title = crossing[0].title
    others = [kind.title for kind in kinds if kind.enters_encoder] + [kind.title for kind in crossing[1:]]
    if others:
        raise ValueError(f"a {title} does not go with a {others[0]} in one picture: both change the encoder")
    if savings.features_every > 1:
        raise ValueError(f"features_every does not go with a {title}, which takes part in every layer")


@dataclass(eq=False)
class Predictor:
    """The pair of a generation: `base` under `controls`, told `rows`, in `steps` steps.

    shown: further channels of the U-Net's input (B, 5, h, w), for bases that fill holes.
    one_branch_at_a_time: the same result with half of the memory for activations. networks: what runs them.
    """

    base: Base
    rows: Rows
    controls: Sequence[EncodedControl]
    guidance: Guidance
    steps: int
    savings: Savings = Savings()
    shown: Tensor | None = None
    one_branch_at_a_time: bool = False
    networks: Networks = EAGER
    deep: dict[int, Deep] = field(default_factory=dict)

    @cached_property
    def timestep_cond(self) -> Tensor | None:
        """The guidance, for a base that is told it."""
        return guidance_embedding(self.base, self.guidance.scale)

    @cached_property
    def merging(self) -> TokenMerging:
        """What merges tokens, in all steps."""
        return TokenMerging(self.savings.merge_tokens)

    def __call__(self, noisy_latents: Tensor, timestep: Tensor, step: int) -> Tensor:
        """``model_pred`` (B, C, h, w), float32, for ``noisy_latents`` of that shape in step `step` (from 0).

        ``timestep``: a number on the networks' device.
        """
        if self.networks.graphs:  # else each run of a network ends the life of the others' results
            torch.compiler.cudagraph_mark_step_begin()
        noisy_latents = noisy_latents.to(self.base.dtype).contiguous(memory_format=torch.channels_last)
        rows = self.rows
        if rows.branches == 1 or not self.guides(step):
            parts = [rows.conditional]
        else:
            parts = [rows.unconditional, rows.conditional] if self.one_branch_at_a_time else [rows]
        found = [self._predict(noisy_latents, timestep, part, step) for part in parts]
        branches = [branch for part in found for branch in part.split(rows.pictures)]
        if len(branches) == 1:
            return branches[0]
        if rows.branches == 1:
            return self.guidance.away(*branches)
        return self.guidance.apply(*branches)

    def _perturbs(self, step: int) -> bool:
        return self.guidance.perturbed > 0 and self.guides(step)

    def guides(self, step: int) -> bool:
        """Whether a step is one of those that are guided."""
        return guided_at(step, self.steps, self.savings.guidance_until)

    def settings_at(self, step: int) -> tuple[object, ...]:
        """What a step does apart from its latents and timestep: the same of two steps, the same work."""
        controls = tuple(
            (control.control.active(step, self.steps), control.control.scale_at(step, self.steps))
            for control in self.controls
        )
        return self.guides(step), controls

    def reads(self) -> tuple[object, ...]:
        """What every step reads where it is: the text, the hints, the regions, what a hole is shown."""
        held = [part for c in self.controls for part in (c.control, *c.hint, c.region)]
        return (self.rows, *held, self.shown)

    @property
    def controlnets(self) -> list[Any]:
        """The control networks, each once."""
        return list({id(c.control.controlnet): c.control.controlnet for c in self.controls}.values())

    @property
    def keeps_nothing(self) -> bool:
        """Whether a step depends on no other step."""
        return self.savings.control_every == 1 and self.savings.features_every == 1

    def _predict(self, noisy_latents: Tensor, timestep: Tensor, rows: Rows, step: int) -> Tensor:
        with self.merging.within(self.base.unet, *self.controlnets):
            return self._pair(noisy_latents, timestep, rows, step)

    def _pair(self, noisy_latents: Tensor, timestep: Tensor, rows: Rows, step: int) -> Tensor:
        inside = inside_at(self.controls, rows, step=step, steps=self.steps)
        if rows.branches == 2 and not all(encoded.control.acts_on_both() for encoded in inside):
            parts = (rows.unconditional, rows.conditional)
            return torch.cat([self._pair(noisy_latents, timestep, part, step) for part in parts])
        savings, deep = self.savings, None
        if savings.features_every > 1:
            if step % savings.features_every == 0:
                self.deep[id(rows)] = Deep()
            deep = self.deep.setdefault(id(rows), Deep())
        shallow = deep is not None and deep.x is not None
        residuals = summed_residuals(
            self.controls,
            noisy_latents,
            timestep,
            rows,
            step=step,
            steps=self.steps,
            again=shallow or step % savings.control_every != 0,
            keep=not self.keeps_nothing,
            networks=self.networks,
        )
        if self.networks.compiled:
            text_fixed(self.base.unet, rows.unet_states)
        perturbs = rows.is_conditional and self._perturbs(step)
        if inside:
            return self._inside(noisy_latents, timestep, rows, step, inside, residuals, deep)
        model_pred = self.networks.predict(
            self.base.unet,
            self._with_shown(noisy_latents),
            timestep,
            rows.unet_states,
            residuals=residuals,
            added_cond=rows.added_cond,
            timestep_cond=self.timestep_cond,
            class_labels=rows.class_labels,
            deep=deep,
            perturbed=rows.perturbed_states if perturbs else None,
        )
        return model_pred.to(torch.float32, copy=self.networks.graphs)

    def _inside(
        self,
        noisy_latents: Tensor,
        timestep: Tensor,
        rows: Rows,
        step: int,
        inside: Sequence[EncodedControl],
        residuals: Residuals | None,
        deep: Deep | None,
    ) -> Tensor:
        """The prediction under control networks that act within the U-Net's layers."""
        from controlkit import cross, lllite

        hooked, crossing = [], None
        for encoded in inside:
            control = encoded.control
            scale = control.scale_at(step, self.steps) * encoded.weights[0]
            region = None if encoded.region is None else encoded.region_at
            if kind_of(control.controlnet).hooks:
                hooked.append(lllite.Acting(control.controlnet, encoded.hint, scale, region))
            else:
                crossing = cross.Crossing(control.controlnet, encoded.hint[0], scale, region)
        given = (self.base.unet, self._with_shown(noisy_latents), timestep, rows.unet_states)
        told: dict[str, Any] = {
            "residuals": residuals,
            "added_cond": rows.added_cond,
            "timestep_cond": self.timestep_cond,
            "class_labels": rows.class_labels,
        }
        height, width = noisy_latents.shape[-2:]
        with lllite.acting(self.base.unet, hooked, height=height, width=width):
            if crossing is None:
                return EAGER.predict(*given, deep=deep, **told).float()
            beside = rows.encoder_hidden_states
            return cross.predict(*given, crossing=crossing, text_beside=beside, **told).float()

    def _with_shown(self, noisy_latents: Tensor) -> Tensor:
        """The latents, and the mask and the masked picture for a base that takes them."""
        if self.shown is None:
            return noisy_latents
        return torch.cat([noisy_latents, self.shown.to(noisy_latents.dtype)], dim=1)

"""What a step of a control network computes with: a micro-batch's data, and what is drawn for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from controlkit.base import Base
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoded import Encoded, Given, Outline, Sample
from controlkit.training.data.resident import Resident
from controlkit.training.draws import derived_seed
from controlkit.training.machine import Machine
from controlkit.training.memory import put
from controlkit.training.noising import draw_batch, timesteps_of, used
from controlkit.training.pair import PairsPart


class Inputs:
    """The inputs of steps, on the device where they are computed."""

    def __init__(
        self,
        recipe: ControlNetRecipe,
        base: Base,
        machine: Machine,
        encoded: Encoded,
        resident: Resident | None,
        *,
        levels: int,
    ) -> None:
        """resident: the data on the device, if it lies there. levels: how many timesteps there are."""
        self.recipe, self.family, self.machine = recipe, base.family, machine
        self.encoded, self.resident, self.levels = encoded, resident, levels

    def of(self, part: PairsPart) -> dict[str, Tensor]:
        """Of a micro-batch of B pairs, by name.

        mean, std: of the latents, (B, C, h, w). levels: the maps' pixels. encoder_hidden_states: (B, n, d).
        timesteps: (B,). What is drawn: `noising.used`. present: (B, n) bool, which of several maps each pair
        is shown. text_embeds, time_ids: of SDXL. opaque: (B, h, w) uint8, with `data.alpha_mask`.
        """
        given, device = self._given(part), self.machine.device
        seeds = [sample.visit.seed for sample in part.samples]
        drawn = draw_batch(seeds, given.moments.mean.shape[1:], self.recipe)
        places = self._places(part, drawn.place)
        found = {
            **given.moments._asdict(),
            "levels": given.levels,
            "encoder_hidden_states": given.text.encoder_hidden_states,
            **{name: put(tensor, device) for name, tensor in used(drawn, self.recipe).items()},
            "timesteps": put(timesteps_of(places, self.recipe, part.step, self.levels), device),
        }
        if given.opaque is not None:
            found["opaque"] = given.opaque
        if self.recipe.adapter == "controlnet-union":
            found["present"] = put(self._present(part), device)
        return found | (self.added_cond(given.text.pooled, part.samples) or {})

    def _given(self, part: PairsPart) -> Given:
        captions = self._captions(part)
        if self.resident is not None and not isinstance(part.samples[0], Sample):
            return self.resident.given(part.samples, captions)
        samples = [sample for sample in part.samples if isinstance(sample, Sample)]
        return self.encoded.given(samples, captions, self.machine.device)

    def _captions(self, part: PairsPart) -> list[str]:
        """What each pair is told: its caption, of several one, or nothing at a share of visits."""
        dropped = [
            float(np.random.default_rng(derived_seed(s.visit.seed, "caption")).random())
            < self.recipe.caption_dropout
            for s in part.samples
        ]
        return ["" if drop else _one_caption(s) for s, drop in zip(part.samples, dropped, strict=True)]

    def _present(self, part: PairsPart) -> Tensor:
        """Which of several maps each pair is shown, (B, n) bool: at least one."""
        count, rows = len(self.recipe.data.map_column), []
        for sample in part.samples:
            draw = np.random.default_rng(derived_seed(sample.visit.seed, "maps"))
            kept = draw.random(count) >= self.recipe.map_dropout
            kept[draw.integers(count)] |= not kept.any()
            rows.append(torch.from_numpy(kept))
        return torch.stack(rows)

    def _places(self, part: PairsPart, drawn: Tensor) -> Tensor:
        """Uniform numbers for the timesteps: each pair's own, or spread evenly over the step's batch."""
        if not self.recipe.stratified:
            return drawn
        start = np.random.default_rng(derived_seed(self.recipe.seed, "stratum", part.step)).random()
        rows = torch.tensor(list(part.rows), dtype=torch.float64)
        return (start + rows / part.batch) % 1.0

    def added_cond(self, pooled: Tensor | None, samples: Sequence[Outline]) -> dict[str, Tensor] | None:
        """SDXL's further conditioning: size, cut, and size again (Podell et al. 2023, section 2.2)."""
        if self.family != "sdxl":
            return None
        assert pooled is not None
        rows = [
            (s.size[1], s.size[0], s.view.top, s.view.seen_left, s.view.height, s.view.width) for s in samples
        ]
        if self.recipe.size_conditioning == "seen":
            rows = [(height, width, 0, 0, height, width) for *_, height, width in rows]
        return {
            "text_embeds": pooled.to(self.machine.device, torch.float32),
            "time_ids": put(torch.tensor(rows, dtype=torch.float32), self.machine.device),
        }


def _one_caption(sample: Outline) -> str:
    """Of several captions one, drawn for the visit, as diffusers' train_controlnet.py draws them."""
    captions = sample.example.captions
    if len(captions) == 1:
        return captions[0]
    return captions[derived_seed(sample.visit.seed, "which caption") % len(captions)]

"""Training a ControlNet on a locked base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import images
from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.controlnet import control_residuals, encode_hint, from_base, predict, trainable_parameters
from controlkit.sampling import generate
from controlkit.training.base_model import noised
from controlkit.training.cache import cached_latents, cached_text
from controlkit.training.config import ControlNetRecipe
from controlkit.training.draws import Draws
from controlkit.training.world import World

_SHOWN = 4
_LINTED = 16
_NEW_PARTS = ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block")


def _report_bad_maps(kind: str, maps: Sequence[NDArray[np.uint8]], report: Callable[[str], None]) -> None:
    """Say before the first step what is wrong with the maps, each thing once."""
    from controlkit.preprocessors import lint

    found = Counter(f"{finding.message}; {finding.cure}" for image in maps for finding in lint(image, kind))
    for text, count in found.items():
        report(f"{count} of the first {len(maps)} {kind} maps: {text}")


class ControlNetTask:
    """The pair on the bundled world: the base's loss, with the trainable copy told the map."""

    def __init__(
        self,
        recipe: ControlNetRecipe,
        world: World,
        validation: World,
        device: torch.device,
        report: Callable[[str], None],
    ) -> None:
        self.recipe, self.world, self.validation, self.device = recipe, world, validation, device
        self.base = load_base(recipe.base, device=device)
        if self.base.family == "sdxl":
            raise ValueError(
                f"base {recipe.base!r} is an SDXL: adapters can be trained for SD1 and SD2 so far"
            )
        _report_bad_maps(
            recipe.map, [world.map(recipe.map, i) for i in range(min(len(world), _LINTED))], report
        )
        self.latents = cached_latents(world, self.base.vae, report=report)
        self.text = cached_text(
            world.captions, self.base.text_encoders[0], self.base.tokenizers[0], report=report
        )
        if recipe.init is None:
            self.controlnet = from_base(self.base, hint_channels=recipe.hint_channels or (8, 16, 48, 96), seed=recipe.seed)
        else:
            self.controlnet = load_adapter(recipe.init, base=self.base, dtype=torch.float32).controlnet
        trainable_parameters(self.controlnet, self.base.unet)

    def modules(self) -> dict[str, nn.Module]:
        return {"controlnet": self.controlnet}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Zero convolutions and hint encoder start from nothing and learn faster than the copied trunk."""
        named = list(self.controlnet.named_parameters())
        new = [parameter for name, parameter in named if name.startswith(_NEW_PARTS)]
        trunk = [parameter for name, parameter in named if not name.startswith(_NEW_PARTS)]
        return [{"params": trunk, "rate": 1.0}, {"params": new, "rate": self.recipe.zero_convolution_rate}]

    def loss(self, draws: Draws) -> Tensor:
        rows = draws.indices(len(self.world), self.recipe.batch_size)
        controlnet_cond = images.map_to_cond([self._map(row, draws) for row in rows]).to(self.device)
        indices = torch.tensor(rows)
        dropped = draws.chosen(len(rows), self.recipe.caption_dropout)
        encoder_hidden_states = (
            self.text[torch.where(dropped, len(self.text) - 1, indices)].float().to(self.device)
        )
        latents = self.latents[indices].float().to(self.device)
        noisy_latents, timesteps, target = noised(latents, draws, self.base)
        hint = encode_hint(self.controlnet, controlnet_cond)
        residuals = control_residuals(self.controlnet, noisy_latents, timesteps, encoder_hidden_states, hint)
        model_pred = predict(
            self.base.unet, noisy_latents, timesteps, encoder_hidden_states, residuals=residuals
        )
        return nn.functional.mse_loss(model_pred.float(), target)

    def _map(self, index: int, draws: Draws) -> NDArray[np.uint8]:
        """The exact map, for depth half the time blurred: estimators draw softer outlines than renderers."""
        image = self.world.map(self.recipe.map, index)
        if self.recipe.map == "depth" and draws.numpy.random() < 0.5:
            import cv2

            return np.asarray(cv2.GaussianBlur(image, (0, 0), float(draws.numpy.uniform(0.4, 2.0))))
        return image

    def sample(self) -> NDArray[np.uint8]:
        """Rows of map, picture, and two samples under control, for held-out scenes."""
        columns = []
        for index in range(_SHOWN):
            image = self.validation.map(self.recipe.map, index)
            control = Control(self.controlnet, image)
            samples = generate(self.base, self.validation.captions[index], controls=[control], seeds=[0, 1])
            columns.append(np.vstack([image, self.validation.picture[index], *samples]))
        return np.hstack(columns)

    def export(self, folder: Path) -> None:
        recipe = self.recipe
        told = recipe.model_dump(mode="json", exclude={"out", "device", "threads", "base", "init"})
        info = AdapterInfo(
            map=MAPS[recipe.map],
            family=self.base.family,
            prediction_type=self.base.prediction_type,
            base=recipe.base if recipe.base == "tiny" else "",
            resolution=self.base.resolution,
            title=f"{recipe.map} for the bundled base" if recipe.base == "tiny" else recipe.map,
            training={"recipe": told},
        )
        save_adapter(self.controlnet, folder, info=info)

"""How soon a training recipe gives control: samples and seconds until the canny score nears its ceiling.

`uv run python tests/benchmarks/recipe.py --recipes plain ours --seeds 1 2 3 --out runs/recipe` trains on the
bundled world until the score has been 0.8 of its ceiling twice in a row, and prints a table. What was
measured lies in OUT/examinations.jsonl, the state of a training in OUT/RECIPE-SEED.pt, and the same command
goes on where it was stopped. `--samples N` trains exactly N samples instead: the quality at equal cost.

Score: the edges' F1 between each map and the picture made under it (DDIM, guidance 2, averaged weights where
a recipe has them), over 64 validation scenes, divided by that of the true pictures passed through the
autoencoder. Seconds: processor time of the training alone, on one thread. Base, data and their order, noise,
batch and code are common; `plain` is what diffusers' train_controlnet.py does, at a rate for this base.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from controlkit import diffusion, images
from controlkit.base import load_base
from controlkit.controlnet import control_residuals, encode_hint, from_base, predict, trainable_parameters
from controlkit.metrics import edge_f1
from controlkit.preprocessors import get
from controlkit.training.cache import cached_latents, cached_text
from controlkit.training.draws import Draws
from controlkit.training.hint_start import start_hint_encoder
from controlkit.training.world import load_world

HINT_CHANNELS = (8, 16, 48, 96)
TRAIN, SCENES = 16000, 64  # scenes trained on, and held out
STEPS, GUIDANCE, GOAL = 8, 2.0, 0.8
LAYOUT = 500  # timesteps from here on decide where things are
LAYOUT_LOGIT = 0.8  # mean of logit(t / T) at first; the spread is 1
BEGUN = 0.6  # pictures are worth scoring once the map has brought the layout's loss to this share
Row = dict[str, Any]  # one examination
EVERY = ((2000, 400), (4000, 800), (10**9, 1600))  # up to so many samples, examined after each so many


@dataclass(frozen=True)
class Recipe:
    """How to train; as it stands, what diffusers' script does.

    Rates of zero convolutions and hint encoder are factors. After `decay_after` steps the rate falls with
    their root. `ema`: highest decay of the average; `ema_share`: the share of all steps that it reaches back
    over. `hint_start` "unit": see `start_hint_encoder`; "vae": from there, `start_as_vae`. `layout_steps`: so
    long timesteps are logit-normal in t / T, with a growing share of uniform ones. `growing`: batches of a
    quarter up to 400 samples and of a half up to 1600; the rates are the same.
    """

    learning_rate: float = 2e-3
    zero_rate: float = 1.0
    hint_rate: float = 1.0
    beta2: float = 0.999
    warmup: int = 50
    decay_after: int = 0
    ema: float = 0.0
    ema_share: float = 0.1
    caption_dropout: float = 0.0
    hint_start: str = "default"
    layout_steps: int = 0
    batch_size: int = 16
    growing: bool = False


_OURS = Recipe(2e-3, 6.0, 3.0, 0.99, 20, decay_after=50, ema=0.995, ema_share=0.3)
_OURS = replace(_OURS, hint_start="unit", layout_steps=1000)
RECIPES = {
    "plain": Recipe(),
    "plain at 1e-5": Recipe(learning_rate=1e-5, warmup=500),
    "plain at 1e-3": Recipe(learning_rate=1e-3),
    "plain, unit": Recipe(hint_start="unit"),
    "before": Recipe(4e-4, 10.0, 10.0, beta2=0.99, ema=0.98, caption_dropout=0.1),
    "ours": _OURS,
    "ours, default hint encoder": replace(_OURS, hint_start="default"),
    "ours, uniform timesteps": replace(_OURS, layout_steps=0),
    "ours, sooner uniform": replace(_OURS, layout_steps=200),
    "ours, one rate": replace(_OURS, zero_rate=1.0, hint_rate=1.0),
    "ours, constant": replace(_OURS, decay_after=0, ema=0.98, ema_share=0.1),
    "ours, as VAE": replace(_OURS, hint_start="vae"),
    "ours, growing batch": replace(_OURS, growing=True),
    "ours, batch 8": replace(_OURS, batch_size=8, warmup=40, decay_after=100, layout_steps=2000),
}


class World:
    """The locked base, the training data and the held-out data."""

    def __init__(self, folder: Path) -> None:
        self.base = load_base("tiny")
        self.unet = self.base.unet.to(memory_format=torch.channels_last)
        encoder, tokenizer = self.base.text_encoders[0], self.base.tokenizers[0]
        world, held = load_world("train", TRAIN, report=print), load_world("validation", SCENES, report=print)
        self.latents = cached_latents(world, self.base.vae, report=print)
        self.text = cached_text(world.captions, encoder, tokenizer, report=print)
        if not (folder / "maps.npy").exists():
            maps = (world.map("canny", i)[..., 0] > 0 for i in range(TRAIN))
            np.save(folder / "maps.npy", np.stack([np.packbits(edges, axis=-1) for edges in maps]))
        self.maps = np.load(folder / "maps.npy")
        self.canny = get("canny")
        self.held_maps = [held.map("canny", i) for i in range(SCENES)]
        self.held_cond = images.map_to_cond(self.held_maps)
        self.held_latents = self.base.encode_pictures(images.picture_to_tensor(list(held.picture)))
        self.held_text = self.base.encode_prompts(held.captions).encoder_hidden_states
        self.no_text = self.base.encode_prompts([""]).encoder_hidden_states
        generator = torch.Generator().manual_seed(7)
        self.held_noise = torch.randn(self.held_latents.shape, generator=generator)
        self.held_t = ((torch.randperm(SCENES, generator=generator) + 0.5) * 1000 / SCENES).long()
        self.ceiling = self.edges(images.tensor_to_pictures(self.base.decode_latents(self.held_latents)))
        self.alone = self.held_losses(None)

    def cond(self, rows: Sequence[int]) -> Tensor:
        """Maps of training scenes: (B, 3, S, S), 0 or 1."""
        bits = torch.from_numpy(np.unpackbits(self.maps[list(rows)], axis=-1)).float()
        return bits[:, None].expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)

    def edges(self, pictures: Sequence[np.ndarray]) -> float:
        """Mean F1 of the pictures' edges with the held-out maps."""
        pairs = zip(pictures, self.held_maps, strict=True)
        return mean(edge_f1(self.canny(picture).image, held).f1 for picture, held in pairs)

    @torch.no_grad()
    def held_losses(self, controlnet: Any | None) -> tuple[float, float]:
        """Held-out loss at fixed timesteps and noises, below and from `LAYOUT`; None is the base alone."""
        errors = []
        for first in range(0, SCENES, 16):
            part = slice(first, first + 16)
            held = (self.held_latents, self.held_noise, self.held_t, self.held_text, self.held_cond)
            errors.append(squared_error(self, controlnet, *(tensor[part] for tensor in held)))
        error, high = torch.cat(errors), self.held_t >= LAYOUT
        return float(error[~high].mean()), float(error[high].mean())

    @torch.no_grad()
    def pictures(self, controlnet: Any) -> list[np.ndarray]:
        """DDIM with trailing timesteps (Song et al. 2020, eq. 12), every scene with its caption, at once."""
        acp = self.base.alphas_cumprod
        times = [round(1000 - i * 1000 / STEPS) - 1 for i in range(STEPS)]
        hint = encode_hint(controlnet, self.held_cond).repeat(2, 1, 1, 1)
        text = torch.cat([self.no_text.expand(SCENES, -1, -1), self.held_text])
        x = self.held_noise
        for time_, following in zip(times, [*times[1:], 0], strict=True):
            t = torch.full((2 * SCENES,), time_)
            twice = torch.cat([x, x]).to(memory_format=torch.channels_last)
            residuals = control_residuals(controlnet, twice, t, text, hint)
            uncond, cond = predict(self.unet, twice, t, text, residuals=residuals).chunk(2)
            model_pred = uncond + GUIDANCE * (cond - uncond)
            told = (self.base.prediction_type, model_pred, x, t[:SCENES], acp)
            signal, spread = acp[following].sqrt().item(), (1 - acp[following]).sqrt().item()
            x = signal * diffusion.predict_x0(*told) + spread * diffusion.predict_noise(*told)
        return images.tensor_to_pictures(self.base.decode_latents(x))


def squared_error(
    world: World, controlnet: Any | None, x_0: Tensor, noise: Tensor, t: Tensor, text: Tensor, cond: Tensor
) -> Tensor:
    """Mean squared error of each sample's prediction (B,); None is the base alone."""
    acp, kind = world.base.alphas_cumprod, world.base.prediction_type
    x_t = diffusion.q_sample(x_0, noise, t, acp).to(memory_format=torch.channels_last)
    residuals = None
    if controlnet is not None:
        residuals = control_residuals(controlnet, x_t, t, text, encode_hint(controlnet, cond))
    model_pred = predict(world.unet, x_t, t, text, residuals=residuals)
    return (model_pred - diffusion.target(kind, x_0, noise, t, acp)).square().mean(dim=(1, 2, 3))


def batch_size(recipe: Recipe, samples: int) -> int:
    """Pairs of the step after so many samples."""
    divisor = (4 if samples < 400 else 2 if samples < 1600 else 1) if recipe.growing else 1
    return recipe.batch_size // divisor


def rows_of(seed: int, samples: int, count: int) -> list[int]:
    """The next training scenes: all recipes see the same ones in the same order."""
    return [row for first in range(samples, samples + count) for row in Draws(seed, first).indices(TRAIN, 1)]


@torch.enable_grad()
def start_as_vae(world: World, controlnet: Any, *, maps: int = 1024, steps: int = 128) -> None:
    """Teach the hint encoder what the copy's first layer makes of the map as a picture: conv_in(E(map)).

    A hint that stands beside the noisy latents as latents do, as from an encoder that is a VAE's.
    """
    told = [world.cond(range(first, first + 16)) for first in range(0, maps, 16)]
    with torch.no_grad():
        latents = [world.base.encode_pictures(2 * cond - 1) for cond in told]
        wanted = [controlnet.conv_in(each) - controlnet.conv_in.bias[:, None, None] for each in latents]
    encoder = controlnet.controlnet_cond_embedding
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, fused=True)
    for step in range(steps):
        here = step % len(told)
        (encode_hint(controlnet, told[here]) - wanted[here]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def draw_timesteps(recipe: Recipe, count: int, step: int, generator: torch.Generator) -> Tensor:
    """Training timesteps (B,) of one batch."""
    even = min(1.0, step / max(recipe.layout_steps, 1))
    if not recipe.layout_steps:
        return diffusion.sample_timesteps(count, generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    u = (start + torch.randperm(count, generator=generator) / count) % 1.0  # stratified, in [0, 1)
    within = ((u - even) / max(1 - even, 1e-9)).clamp(1e-4, 1 - 1e-4)
    logit_normal = torch.special.ndtri(within).add(LAYOUT_LOGIT).sigmoid()
    share = torch.where(u < even, u / max(even, 1e-9), logit_normal)
    return (share * 1000).long().clamp(0, 999)


class Training:
    """One recipe with one seed, and its state."""

    def __init__(self, world: World, name: str, seed: int, folder: Path) -> None:
        self.world, self.name, self.recipe, self.seed = world, name, RECIPES[name], seed
        self.file = folder / f"{name.replace(' ', '-')}-{seed}.pt"
        self.controlnet = from_base(world.base, hint_channels=HINT_CHANNELS, seed=seed)
        self.controlnet.to(memory_format=torch.channels_last).train()
        self.parameters: list[Tensor] = [*trainable_parameters(self.controlnet, world.unet)]
        if self.recipe.hint_start != "default":
            start_hint_encoder(self.controlnet, world.cond(range(32)), seed=seed)
        rates = dict.fromkeys(("controlnet_down_blocks", "controlnet_mid_block"), self.recipe.zero_rate)
        rates["controlnet_cond_embedding"] = self.recipe.hint_rate
        parts = self.controlnet.named_children()
        groups = [{"params": [*part.parameters()], "rate": rates.get(name, 1.0)} for name, part in parts]
        betas = (0.9, self.recipe.beta2)
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=0.01, fused=True)
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.step, self.samples, self.seconds = 0, 0, 0.0
        if self.recipe.hint_start == "vae" and not self.file.exists():
            began = time.process_time()
            start_as_vae(world, self.controlnet)
            self.seconds = time.process_time() - began
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            assert state["recipe"] == str(self.recipe), f"{self.file} is of another recipe: delete it"
            self.controlnet.load_state_dict(state["controlnet"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average, self.step, self.samples, self.seconds = state["rest"]

    def train_step(self) -> None:
        """One optimizer step, on the clock."""
        began, recipe, world = time.process_time(), self.recipe, self.world
        draws = Draws(self.seed, self.step)
        size = batch_size(recipe, self.samples)
        rows = rows_of(self.seed, self.samples, size)
        dropped = draws.chosen(len(rows), recipe.caption_dropout)
        text = world.text[torch.where(dropped, len(world.text) - 1, torch.tensor(rows))].float()
        x_0 = world.latents[rows].float()
        noise, t = draws.normal(*x_0.shape), draw_timesteps(recipe, size, self.step, draws.generator)
        loss = squared_error(world, self.controlnet, x_0, noise, t, text, world.cond(rows)).mean()
        assert math.isfinite(loss.item()), f"{self.name}: the loss of step {self.step} is {loss.item()}"
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        factor = min(1.0, (self.step + 1) / recipe.warmup)
        if recipe.decay_after:
            factor = min(factor, math.sqrt(recipe.decay_after / (self.step + 1)))
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate * group["rate"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.samples = self.step + 1, self.samples + size
        decay = min(recipe.ema, 1 - 1 / (1 + recipe.ema_share * self.step))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self.parameters], 1 - decay)
        self.seconds += time.process_time() - began

    @torch.no_grad()
    def examine(self) -> Row:
        """Losses relative to the base alone and, once they have begun to fall, the score of control."""
        world, kept = self.world, [parameter.detach().clone() for parameter in self.parameters]
        torch._foreach_copy_(self.parameters, self.average)
        losses = zip(world.held_losses(self.controlnet), world.alone, strict=True)
        low, high = (ours / alone for ours, alone in losses)
        begun = high < BEGUN
        score = round(world.edges(world.pictures(self.controlnet)) / world.ceiling, 4) if begun else None
        torch._foreach_copy_(self.parameters, kept)
        told = {"recipe": self.name, "seed": self.seed, "samples": self.samples, "score": score}
        return told | {"seconds": round(self.seconds, 1), "low": round(low, 4), "layout": round(high, 4)}

    def save(self) -> None:
        """Write everything that the next step depends on."""
        state = {"controlnet": self.controlnet.state_dict(), "optimizer": self.optimizer.state_dict()}
        rest = (self.average, self.step, self.samples, self.seconds)
        torch.save({**state, "rest": rest, "recipe": str(self.recipe)}, self.file.with_suffix(".part"))
        self.file.with_suffix(".part").replace(self.file)


def recorded(file: Path, name: str, seed: int) -> list[Row]:
    """What has been found of one training, by samples."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [row for row in map(json.loads, lines) if (row["recipe"], row["seed"]) == (name, seed)]
    return list({row["samples"]: row for row in rows}.values())


def finished(rows: Sequence[Row], limit: int | None) -> bool:
    """Whether the last two examinations both met the goal, or the limit of samples is reached."""
    if limit:
        return bool(rows) and rows[-1]["samples"] >= limit
    return len(rows) > 1 and min(row["score"] or 0 for row in rows[-2:]) >= GOAL


def crossing(rows: Sequence[Row]) -> tuple[float, ...]:
    """Samples and seconds where the score first met the goal, interpolated; not a number where it did not."""
    for before, row in zip([None, *rows], rows, strict=False):
        if (row["score"] or 0) >= GOAL:
            if before is None or not before["score"]:
                return row["samples"], row["seconds"]
            share = (GOAL - before["score"]) / (row["score"] - before["score"])
            return tuple(before[key] + share * (row[key] - before[key]) for key in ("samples", "seconds"))
    return math.nan, math.nan


def measure(world: World, name: str, seed: int, folder: Path, limit: int | None) -> list[Row]:
    """Train one recipe until it reaches the goal, or exactly `limit` samples; its examinations."""
    file = folder / "examinations.jsonl"
    training = None
    while not finished(rows := recorded(file, name, seed), limit):
        training = training or Training(world, name, seed, folder)
        training.train_step()
        every = next(every for until, every in EVERY if training.samples <= until)
        if training.samples % every == 0 or training.samples == limit:
            row = json.dumps(training.examine())
            with file.open("a", encoding="utf-8") as lines:
                lines.write(row + "\n")
            training.save()
            print(row, flush=True)
    return rows


def table(found: dict[str, list[list[Row]]]) -> str:
    """A Markdown table: one row for each recipe, means over its seeds and the range of the samples."""
    lines = ["| recipe | seeds | samples to 0.8 (range) | seconds | last score |", "|---|---|---|---|---|"]
    for name, seeds in found.items():
        samples, seconds = zip(*(crossing(rows) for rows in seeds), strict=True)
        last = ", ".join(f"{rows[-1]['score'] or 0:.3f} at {rows[-1]['samples']}" for rows in seeds)
        span = f"{mean(samples):.0f} ({min(samples):.0f} to {max(samples):.0f})"
        lines.append(f"| {name} | {len(seeds)} | {span} | {mean(seconds):.0f} | {last} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="How soon a recipe gives control.")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["plain", "ours"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--samples", type=int, help="train so many samples, whatever the score")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="where results are kept")
    given = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    world = World(given.out)
    found: dict[str, list[list[Row]]] = {name: [] for name in given.recipes}
    for seed, name in itertools.product(given.seeds, given.recipes):
        found[name].append(measure(world, name, seed, given.out, given.samples))
    print(table(found))


if __name__ == "__main__":
    main()

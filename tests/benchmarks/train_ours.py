"""ControlKit's own training, one step at a time: the very functions that `controlkit train` runs."""

import tomllib
from pathlib import Path

import torch
from train_models import SIZES, base_of
from train_script import Given, Pairs, Script, Setting, collate

from controlkit import diffusion
from controlkit.training.adapter import ControlNetTask, PairsPart
from controlkit.training.config import ControlNetRecipe, parse_recipe
from controlkit.training.data.encoding import KEPT
from controlkit.training.flags import from_diffusers_flags
from controlkit.training.loop import open_run, train_step
from controlkit.training.machine import Machine
from controlkit.training.noising import draw_batch


def recipe_for(name: str, folder: Path, data: Path, setting: Setting) -> ControlNetRecipe:
    """The recipe that trains what the script would, told by the script's own flags; nothing is shown."""
    flags = [
        f"--pretrained_model_name_or_path='{base_of(name, folder)}'",
        f"--controlnet_model_name_or_path='{folder / 'controlnet'}'",
        f"--train_data_dir='{data}' --train_batch_size={setting.batch} --max_train_steps=1000000",
        f"--mixed_precision={'no' if setting.precision == 'fp32' else setting.precision} --seed=0",
        f"--resolution={SIZES[name].resolution} --report_to=none",
    ]
    table = tomllib.loads(from_diffusers_flags(" ".join(flags)))
    table |= {"map": "canny", "device": setting.device, "monitor_every": 0}
    table["data"]["check"] = False
    recipe = parse_recipe(table, where="the benchmark")
    assert isinstance(recipe, ControlNetRecipe)
    return recipe


class Ours:
    """A training from the cache, standing before its next step."""

    def __init__(self, name: str, folder: Path, data: Path, setting: Setting, *, out: Path) -> None:
        """Encodes what the cache lacks. ``out`` is a folder that the run may have for itself."""
        recipe = recipe_for(name, folder, data, setting)
        machine = Machine(recipe)
        self.task = ControlNetTask(recipe, machine, lambda _: None)
        self.run = open_run(self.task, recipe, out, machine, lambda _: None)
        for module in self.task.modules().values():
            module.train()

    def step(self) -> None:
        """One step."""
        train_step(self.run)

    def step_with_loss(self) -> float:
        """One step, and its loss."""
        window = self.run.read_losses()
        before = window.loss, window.samples
        self.step()
        window = self.run.read_losses()
        return (window.loss - before[0]) / (window.samples - before[1])

    def next_part(self) -> PairsPart:
        """The batch that the next step takes."""
        (part,) = self.task.parts(self.run.step)
        return part

    def next_choices(self, pairs: Pairs) -> Given:
        """What the next step draws, and the same pairs as the script prepares them."""
        part, device = self.next_part(), self.task.machine.device
        view, base = part.samples[0].view, self.task.base  # data on the device has no moments here
        sides = (side // base.vae_factor for side in (view.height, view.width))
        latents = torch.Size((base.vae.config.latent_channels, *sides))
        drawn = draw_batch([sample.visit.seed for sample in part.samples], latents, self.task.recipe)
        timesteps = diffusion.place_timesteps(drawn.place, "uniform")
        rows = [Path(sample.example.name).stem for sample in part.samples]
        return Given(
            collate(pairs.__getitems__([int(row) for row in rows])),
            drawn.posterior.to(device),
            drawn.noise.to(device),
            timesteps.to(device),
            KEPT,
        )


def compare_losses(script: Script, ours: Ours, pairs: Pairs, *, steps: int) -> list[tuple[float, float]]:
    """Take steps with the same pairs, noises and timesteps: (the script's loss, ours) of each."""
    losses = []
    for _ in range(steps):
        given = ours.next_choices(pairs)
        losses.append((script.step(given), ours.step_with_loss()))
    return losses

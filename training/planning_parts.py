"""The memory of a training, part by part and phase by phase, from what the simulated step says."""

from __future__ import annotations

from dataclasses import dataclass

from controlkit.free_memory import available_memory, resident_memory
from controlkit.training.config_adapter import ControlNetRecipe
from controlkit.training.data.encoding import KEPT
from controlkit.training.data.resident import SHARE
from controlkit.training.optimizers import keeps_layout
from controlkit.training.planning_memory import Simulated, optimizer_bytes, weight_bytes
from controlkit.training.planning_networks import (
    TOKENS,
    Networks,
    simulate_decoding,
    simulate_encoding,
    simulate_reward,
)
from controlkit.training.together import BUCKET

_IMPORTED = 820 * 2**20  # Python, torch and the model libraries, where the system does not tell
_FIRST_USE = 90 * 2**20  # kernels that are read in when they first run, threads' stacks
_CUDA_CONTEXT = 700 * 10**6  # with cuBLAS' and cuDNN's workspaces
# What is lost between allocations: bytes, and a share of what comes and goes within a step. Measured for
# glibc's heap on trainings of 7 and 34 million parameters; with gradient checkpointing pieces of every size
# are freed and filled throughout.
_HEAP_WASTE = (20 * 2**20, 0.28)
_HEAP_WASTE_RECOMPUTED = (110 * 2**20, 0.4)
_CACHE_WASTE = (0, 0.08)  # of torch's own allocator on GPUs
_SHOWN_AT_ONCE = 2
_MOVED_AT_ONCE = 8  # pictures encoded at once on a GPU; a CPU encodes one by one


@dataclass(frozen=True)
class Place:
    """Where a training runs, and on pictures of which size (in pixels)."""

    device: str
    imported: int
    """Bytes of the process before anything is built."""
    processes: int
    width: int
    height: int
    pictures: int | None = None
    """How many views there are, if anyone knows."""

    @property
    def on_cpu(self) -> bool:
        """Whether the device's memory is the process's own."""
        return self.device == "cpu"

    @property
    def encoded_at_once(self) -> int:
        """Pictures that the autoencoder encodes at once."""
        return 1 if self.on_cpu else _MOVED_AT_ONCE


@dataclass(frozen=True)
class Memory:
    """Predicted bytes on the device in the phase that needs most, by what they are for: they add up."""

    phase: str
    parts: dict[str, int]
    phases: dict[str, int]
    """The total of each phase."""

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())


def imported_bytes() -> int:
    """Bytes of this process with every library imported that a training needs."""
    from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
    from transformers import CLIPTextModel

    assert all((AutoencoderKL, ControlNetModel, UNet2DConditionModel, CLIPTextModel))
    return resident_memory() or _IMPORTED


def count_memory(networks: Networks, recipe: ControlNetRecipe, step: Simulated, place: Place) -> Memory:
    """The parts of the phase that needs most, and the totals of all."""
    base = _base(networks, place)
    trained = _trained(networks, recipe)
    encoders = _encoders(networks)
    stays = place.on_cpu or not recipe.data.cache
    phases = {
        "encoding": {**_unhalved(networks, base, place), **encoders, "at work": _encoding(networks, place)},
        "training": {
            **base,
            **(encoders if stays else {}),
            **trained,
            **_step(networks, recipe, step, place),
            **_recorded(recipe, step, place),
            **_resident(networks, recipe, place),
            **_rewarded(networks, recipe, step, place, stays=stays),
            **_saved(recipe, trained, place),
        },
        "sampling": {**base, **encoders, **trained, "at work": _decoding(networks, place)},
    }
    totals = {name: sum(parts.values()) for name, parts in phases.items()}
    worst = max(totals, key=lambda name: totals[name])
    return Memory(worst, phases[worst], totals)


def _base(networks: Networks, place: Place) -> dict[str, int]:
    process = place.imported + _FIRST_USE if place.on_cpu else _CUDA_CONTEXT
    return {"process and libraries": process, "locked U-Net": weight_bytes([networks.unet], trained=False)}


def _unhalved(networks: Networks, base: dict[str, int], place: Place) -> dict[str, int]:
    """The U-Net while pictures are encoded: all of it in fp32, in the host's memory."""
    whole = 4 * sum(parameter.numel() for parameter in networks.unet.parameters())
    return base | {"locked U-Net": whole if place.on_cpu else 0}


def _encoders(networks: Networks) -> dict[str, int]:
    return {"autoencoder": weight_bytes([networks.vae]), "text encoders": 4 * networks.text_parameters}


def _trained(networks: Networks, recipe: ControlNetRecipe) -> dict[str, int]:
    """What stays from step to step: the optimizer moves fp32 weights whatever the network computes in."""
    pair = [networks.unet, networks.controlnet]
    trained = [parameter for module in pair for parameter in module.parameters() if parameter.requires_grad]
    whole = 4 * sum(parameter.numel() for parameter in trained)
    return {
        "trained weights": weight_bytes(pair, trained=True),
        "fp32 masters of them": whole if recipe.precision == "bf16" else 0,
        "moving average": whole if recipe.ema else 0,
        f"optimizer ({recipe.optimizer})": optimizer_bytes(recipe.optimizer, trained)[0],
    }


def _step(networks: Networks, recipe: ControlNetRecipe, step: Simulated, place: Place) -> dict[str, int]:
    """What comes and goes within a step, at its worst moment: in the backward pass or in the update."""
    pair = [networks.unet, networks.controlnet]
    trained = [parameter for module in pair for parameter in module.parameters() if parameter.requires_grad]
    whole = 4 * sum(parameter.numel() for parameter in trained)
    waiting = whole if recipe.precision == "bf16" and recipe.accumulation > 1 else 0
    passing = optimizer_bytes(recipe.optimizer, trained)[1]
    worst, saved, workspace = step.worst, step.worst.saved, step.worst.workspace
    gradients = worst.gradients + waiting
    if saved + gradients + workspace < whole + passing:
        saved, gradients, workspace = 0, whole, passing
    recomputes = recipe.gradient_checkpointing
    heap = _HEAP_WASTE_RECOMPUTED if recomputes else _HEAP_WASTE
    fixed, share = heap if place.on_cpu else _CACHE_WASTE
    return {
        "gradients": gradients,
        "gradients of other processes": _exchanged(recipe, whole) if place.processes > 1 else 0,
        "activations kept for backward": saved,
        "workspace": workspace,
        "lost between allocations": fixed + int(share * (saved + workspace)),
    }


def _exchanged(recipe: ControlNetRecipe, whole: int) -> int:
    """What averaging over processes holds beside the gradients: DDP as much again, of masters a bucket."""
    return min(whole, BUCKET) if recipe.precision == "bf16" else whole


def _recorded(recipe: ControlNetRecipe, step: Simulated, place: Place) -> dict[str, int]:
    """The memory of recorded graphs: a step's own, beside that of the step that was run to compare."""
    if place.on_cpu or not recipe.cuda_graph:
        return {}
    return {"recorded graphs": step.worst.saved + step.worst.workspace}


def _resident(networks: Networks, recipe: ControlNetRecipe, place: Place) -> dict[str, int]:
    """The data that stays on the device, as `data.resident` puts it there; captions are counted as all
    different.
    """
    wanted = recipe.data.resident
    if place.pictures is None or wanted is False or (wanted == "auto" and place.on_cpu):
        return {}
    latents = 2 * networks.vae.config.latent_channels * place.width * place.height // networks.factor**2
    text = TOKENS * networks.unet.config.cross_attention_dim
    channels = networks.conditioning_channels
    each = KEPT.itemsize * (latents + text) + channels * place.width * place.height
    if wanted == "auto" and place.pictures * each > SHARE * (available_memory(place.device) or 0):
        return {}
    return {"data on the device": place.pictures * each}


def _rewarded(
    networks: Networks, recipe: ControlNetRecipe, step: Simulated, place: Place, *, stays: bool
) -> dict[str, int]:
    """What the reward adds: a picture is decoded on top of what the forward pass keeps, and its gradient
    taken; and the autoencoder, where it would not stay without.
    """
    if not recipe.reward:
        return {}
    decoding = simulate_reward(networks, width=place.width, height=place.height).worst.total
    further = max(0, step.saved + decoding - step.worst.total)
    return {"reward": further + (0 if stays else weight_bytes([networks.vae]))}


def _saved(recipe: ControlNetRecipe, trained: dict[str, int], place: Place) -> dict[str, int]:
    """The copy that is written to disk beside the training; on a GPU it lies in the host's memory."""
    if not place.on_cpu or recipe.checkpoint_every >= recipe.steps:
        return {}
    whole = trained["fp32 masters of them"] or trained["trained weights"]
    weights, states = whole + trained["moving average"], trained[f"optimizer ({recipe.optimizer})"]
    laid_out = recipe.channels_last and keeps_layout(recipe)  # files hold the usual layout
    return {"copy for the checkpoint": weights + states + (max(weights, states) if laid_out else 0)}


def _encoding(networks: Networks, place: Place) -> int:
    size = {"width": place.width, "height": place.height}
    return simulate_encoding(networks, **size, batch_size=place.encoded_at_once).worst.total


def _decoding(networks: Networks, place: Place) -> int:
    size = {"width": place.width, "height": place.height}
    return simulate_decoding(networks, **size, batch_size=_SHOWN_AT_ONCE).worst.total

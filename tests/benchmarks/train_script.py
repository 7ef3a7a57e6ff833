"""What diffusers' train_controlnet.py does for every step, written anew, to be measured beside.

The same calls of diffusers' classes in the same order as `examples/controlnet/train_controlnet.py` (diffusers
58eb52c of August 2026): decode, resize and normalise in a DataLoader; VAE and text encoder; ControlNet under
autocast and U-Net; mean squared error; clip, AdamW, schedule, zeroed gradients; the loss read for the
progress bar. What accelerate adds for one process is written out: autocast round the ControlNet, its outputs
in float32, the gradient scaler of fp16. Left out are the bar itself, trackers, checkpoints and validation.

`tuned` has what its documentation offers beside: worker processes, pinned memory, channels_last, fused AdamW,
TF32, --set_grads_to_none, and torch.compile on a GPU.
"""

import contextlib
import copy
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from train_models import Models

from controlkit.folders import quiet_libraries

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RATE = 5e-6  # the script's default

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a measurement is of."""

    batch: int
    device: str = "cpu"
    precision: str = "fp32"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.precision != "fp32")


class Pairs(Dataset[Batch]):
    """The script's data set: whatever happens to a pair happens at every visit."""

    def __init__(self, folder: Path, models: Models) -> None:
        from torchvision import transforms

        self.folder, self.tokenizer = folder, models.tokenizer
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        side = models.size.resolution
        fit = [transforms.Resize(side), transforms.CenterCrop(side), transforms.ToTensor()]
        self.picture = transforms.Compose([*fit, transforms.Normalize([0.5], [0.5])])
        self.conditioning = transforms.Compose(fit)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        """A batch at once, as the library datasets hands it to the script's transform."""
        rows = [self.rows[index] for index in indices]
        pictures = [self.picture(self._open(row["file_name"])) for row in rows]
        maps = [self.conditioning(self._open(row["conditioning_image_file_name"])) for row in rows]
        tokens = self.tokenizer(
            [row["text"] for row in rows],
            max_length=self.tokenizer.model_max_length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        columns = zip(pictures, maps, tokens, strict=True)
        return [{"pixels": p, "conditioning": c, "tokens": t} for p, c, t in columns]

    def _open(self, name: str) -> Image.Image:
        return Image.open(self.folder / name).convert("RGB")


def collate(pairs: list[Batch]) -> Batch:
    """A batch of pairs, as the script stacks them."""
    stacked = {key: torch.stack([pair[key] for pair in pairs]) for key in pairs[0]}
    for key in ("pixels", "conditioning"):
        stacked[key] = stacked[key].to(memory_format=torch.contiguous_format).float()
    return stacked


def _endless(pairs: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from torch.randperm(pairs, generator=generator).tolist()


def load(models: Models, folder: Path, setting: Setting, *, tuned: bool = False) -> Iterator[Batch]:
    """The script's batches, shuffled, without end: made in this process, or, tuned, in others."""
    pairs = Pairs(folder, models)
    return iter(
        DataLoader(
            pairs,
            sampler=_endless(len(pairs)),  # type: ignore[arg-type]
            collate_fn=collate,
            batch_size=setting.batch,
            num_workers=min(8, os.cpu_count() or 1) if tuned else 0,
            pin_memory=tuned and setting.device == "cuda",
            persistent_workers=tuned,
        )
    )


class Given(NamedTuple):
    """Choices that a step is to make, instead of drawing them, for comparing losses."""

    batch: Batch
    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    kept: torch.dtype
    """The precision in which the encoders' results are kept by a cache."""


class Script:
    """A training as the script does it, standing before its next step."""

    def __init__(
        self, models: Models, batches: Iterator[Batch], setting: Setting, *, tuned: bool = False
    ) -> None:
        self.setting, self.tuned, self.batches = setting, tuned, batches
        self.scheduler, gpu = models.scheduler, setting.device == "cuda"
        self.vae = _placed(models.vae, setting, channels_last=tuned)
        self.text_encoder = _placed(models.text_encoder, setting, channels_last=False)
        self.unet = _placed(models.unet, setting, channels_last=tuned)
        layout = torch.channels_last if tuned else torch.preserve_format
        self.controlnet = models.copy_trained().to(setting.device, memory_format=layout)
        self.parameters = list(self.controlnet.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8, fused=tuned or None
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.scaler = torch.amp.GradScaler(setting.device, enabled=setting.precision == "fp16")
        if tuned and gpu:
            self.controlnet.compile()
            self.unet.compile()

    def step(self, given: Given | None = None) -> float:
        """One step; returns the loss."""
        torch.backends.cuda.matmul.allow_tf32 = self.tuned
        loss = self.forward_backward(given)
        self.update()
        return loss.detach().item()

    def forward_backward(self, given: Given | None = None) -> Tensor:
        """The gradient of a batch, and its loss."""
        dtype, device = self.setting.dtype, self.setting.device
        batch = next(self.batches) if given is None else given.batch
        batch = {key: value.to(device, non_blocking=self.tuned) for key, value in batch.items()}
        latents, noise, timesteps = self._draw(batch["pixels"].to(dtype=dtype), given)
        noisy_latents = self.scheduler.add_noise(latents.float(), noise.float(), timesteps).to(dtype=dtype)
        encoder_hidden_states = self.text_encoder(batch["tokens"], return_dict=False)[0]
        if given is not None:
            encoder_hidden_states = encoder_hidden_states.to(given.kept).to(dtype)
        down, mid = self._residuals(
            noisy_latents, timesteps, encoder_hidden_states, batch["conditioning"].to(dtype=dtype)
        )
        model_pred = self.unet(
            noisy_latents,
            timesteps,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=[residual.to(dtype=dtype) for residual in down],
            mid_block_additional_residual=mid.to(dtype=dtype),
            return_dict=False,
        )[0]
        if self.scheduler.config.prediction_type == "epsilon":
            target = noise
        else:
            target = self.scheduler.get_velocity(latents, noise, timesteps)
        loss = nn.functional.mse_loss(model_pred.float(), target.float(), reduction="mean")
        self.scaler.scale(loss).backward()
        return loss

    def _draw(self, pixels: Tensor, given: Given | None) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, noise and timesteps."""
        posterior, scale = self.vae.encode(pixels).latent_dist, self.vae.config.scaling_factor
        if given is not None:
            mean, std = ((part * scale).to(given.kept).float() for part in (posterior.mean, posterior.std))
            return mean + std * given.posterior, given.noise, given.timesteps
        latents = posterior.sample() * scale
        timesteps = torch.randint(0, 1000, (len(latents),), device=latents.device)
        return latents, torch.randn_like(latents), timesteps.long()

    def _residuals(
        self, noisy_latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, cond: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The ControlNet as accelerate wraps it: under autocast, its outputs in float32."""
        with self.setting.autocast():
            down, mid = self.controlnet(
                noisy_latents,
                timesteps,
                encoder_hidden_states=encoder_hidden_states,
                controlnet_cond=cond,
                return_dict=False,
            )
        return [residual.float() for residual in down], mid.float()

    def update(self) -> None:
        """Clip, move the weights, and zero the gradients."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=self.tuned)

    def worker_ids(self) -> list[int]:
        """Process ids of the loader's workers."""
        return [worker.pid for worker in getattr(self.batches, "_workers", [])]


def _placed(module: Any, setting: Setting, *, channels_last: bool) -> Any:
    """A copy of a locked module as the setting wants it, or itself where nothing about it changes."""
    if setting.device == "cpu" and setting.precision == "fp32" and not channels_last:
        return module
    layout = torch.channels_last if channels_last else torch.preserve_format
    with quiet_libraries():  # a cast makes diffusers warn of layers that must not be cast, and lists none
        return copy.deepcopy(module).to(setting.device, setting.dtype).to(memory_format=layout)

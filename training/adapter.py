"""Training a control network on a locked base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from controlkit import files, images, union
from controlkit.adapters import save_adapter
from controlkit.base import Base, load_base
from controlkit.base_parts import load_unet
from controlkit.controlnet import check_copyable
from controlkit.formats.description import ENCODER
from controlkit.kinds import kind_of
from controlkit.layouts import keep_layout
from controlkit.notices import reason
from controlkit.schedulers import NO_SIGNAL, PURE_NOISE
from controlkit.training.adapter_info import info_of
from controlkit.training.adapter_inputs import Inputs
from controlkit.training.attention import Attention
from controlkit.training.config_adapter import COPIES, ControlNetRecipe
from controlkit.training.data.encoded import Outline, Sample, levels_of
from controlkit.training.data.feeds import StoredFeed, open_feed
from controlkit.training.data.loader import Loader
from controlkit.training.data.resident import open_resident
from controlkit.training.exporting import save_half
from controlkit.training.graphs import why_not
from controlkit.training.hint_start import start_hint_encoder
from controlkit.training.machine import DTYPES, Machine
from controlkit.training.memory import free_memory, uncounted
from controlkit.training.noising import (
    Noisy,
    drawn_of,
    noised,
    schedule,
    weighted_loss,
)
from controlkit.training.optimizers import keeps_layout
from controlkit.training.pair import Pair, PairsPart
from controlkit.training.reporting.scores import ControlScores
from controlkit.training.reporting.showing import Shown, is_examined
from controlkit.training.reporting.wrong_maps import LOOKED_AT, wrong_maps
from controlkit.training.reward import Reward
from controlkit.training.task import Losses
from controlkit.training.variants import (
    is_low_rank,
    make_network,
    mark_trained,
    started_from,
    without_low_rank,
)
from controlkit.transfer import encoder_digest

_OTHER_SCHEDULE = (
    "zero_terminal_snr: the base's own schedule does not end in pure noise, and samples, scores and generate"
    " take the base's: set rescale_betas_zero_snr in its scheduler_config.json, or leave this out"
)
_NOT_LAID_OUT = (
    "channels_last is for the locked weights alone: optimizer=adamw8bit lays those that it moves out anew,"
    " though not with precision=bf16"
)
_STARTED_ON = 32  # maps that a new hint encoder is fitted to


class ControlNetTask:
    """The pair on a data set: the base's loss, with the trainable copy told the map."""

    def __init__(self, recipe: ControlNetRecipe, machine: Machine, report: Callable[[str], None]) -> None:
        """Load the base and the data, encode what is not in the cache, make the copy."""
        self.recipe, self.machine, self.report = recipe, machine, report
        self.half = torch.bfloat16 if recipe.precision == "bf16" else None
        # Pictures and captions are encoded once, so in full precision; the U-Net alone is halved.
        self.base = replace(load_base(recipe.base), device=machine.device)
        self._base_digest = "" if recipe.sd_locked else self.base.digest()  # before a part of it is trained
        self._make_ready()
        check_copyable(self.base.unet.config)  # also of an adapter that is trained on: it is not told more
        copied = recipe.adapter in COPIES
        self._origin = {ENCODER: encoder_digest(self.base.unet.state_dict())} if copied else {}
        self.alphas_cumprod = schedule(recipe, self.base)
        to_noise = float(self.base.alphas_cumprod[-1]) <= NO_SIGNAL
        if recipe.zero_terminal_snr and not to_noise:
            report(_OTHER_SCHEDULE)
        if to_noise and self.base.prediction_type == "epsilon":
            report(PURE_NOISE.format(base=recipe.base))
        if self._on_gpu:  # other devices may have no float64
            self.alphas_cumprod = self.alphas_cumprod.to(machine.device)
        self.reward = Reward(recipe, self.base, self.alphas_cumprod) if recipe.reward else None
        self.feed = open_feed(recipe, self.base, machine.processes, report=report)
        self.encoded = self.feed.encoded
        if self.reward is not None:
            self.reward.check(self.encoded.visits.channels)
        meant = {"grey", "jpeg"} if recipe.data.map_blur else set()
        for line in wrong_maps(recipe.map, self.feed.first_maps(LOOKED_AT), meant=meant):
            report(line)
        self.controlnet = self._network()  # on the CPU, as the U-Net is, and before that is halved
        self._prepare()
        self.resident = open_resident(recipe, self.feed, machine.device, report)
        self._inputs = Inputs(recipe, self.base, machine, self.encoded, self.resident, levels=self.levels)
        measures = recipe.attention == "auto" and self._on_gpu and not machine.sharded
        self.attention = Attention(measures=measures, report=report)
        self.shown = Shown(
            recipe,
            replace(self.base, dtype=self._unet_dtype),
            self.encoded,
            self.feed.shown,
            held_out=self.feed.held_out,
            alphas_cumprod=self.alphas_cumprod,
            added_cond=self._inputs.added_cond,
            on_device=self._all_on_device,
            report=report,
        )
        count = machine.processes.count
        prepare: Callable[[int], Sequence[Outline]] = self.feed.samples
        workers = recipe.data.workers
        if self.resident is not None:
            assert isinstance(self.feed, StoredFeed)
            prepare, workers = self.feed.outlines, 0  # nothing is read
        self.loader = Loader(prepare, lambda number: number + count, workers=workers)

    # --- what is trained ---

    def modules(self) -> dict[str, nn.Module]:
        """The copy; and with ``sd_locked = false`` the U-Net, of which the decoder is trained."""
        locked = self.recipe.sd_locked
        return {"controlnet": self.controlnet} | ({} if locked else {"unet": self.base.unet})

    def whole(self) -> nn.Module:
        """Both networks as one module."""
        pair: nn.Module = Pair(self.controlnet, self.base.unet, self.recipe)
        if self.recipe.compile:
            shapes = len(self.encoded.visits.shapes)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * shapes)
            pair.compile(dynamic=False, mode=self._compiled_for)  # one graph for each bucket
        return pair

    @property
    def _on_gpu(self) -> bool:
        return self.machine.device.type == "cuda"

    @cached_property
    def _compiled_for(self) -> str | None:
        """The compiler's mode: with CUDA graphs of its own where the recipe asks for both."""
        wanted = self.recipe.compile and self.recipe.cuda_graph and self._on_gpu
        return "reduce-overhead" if wanted and not why_not(self.recipe, self.machine) else None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Zero convolutions and hint encoder start from nothing and learn faster than the copied trunk."""
        recipe = self.recipe
        named = [
            (n, p)
            for module in self.modules().values()
            for n, p in module.named_parameters()
            if p.requires_grad
        ]
        kind = kind_of(self.controlnet)
        zero = [p for name, p in named if kind.starts_at_zero(name)]
        hint = [p for name, p in named if name.startswith(kind.hint)]
        trunk = [p for n, p in named if not (kind.starts_at_zero(n) or n.startswith(kind.hint))]
        return [
            {"name": "trunk", "params": trunk, "rate": 1.0},
            {"name": "zero_convolutions", "params": zero, "rate": recipe.zero_convolution_rate},
            {"name": "hint_encoder", "params": hint, "rate": recipe.hint_encoder_rate},
        ]

    # --- a step ---

    def parts(self, step: int) -> Sequence[PairsPart]:
        """This process's micro-batches of a step."""
        processes, size, many = self.machine.processes, self.recipe.batch_size, self.recipe.accumulation
        first = step * many * processes.count
        parts = []
        for k in range(many):
            place = k * processes.count + processes.index
            rows = range(place * size, (place + 1) * size)
            parts.append(PairsPart(self.loader.get(first + place), rows, step, size * many * processes.count))
        return parts

    def part_of(self, pairs: int) -> PairsPart:
        """A micro-batch of so many pairs, some of them more than once: to try whether it fits."""
        samples = self.feed.samples(0)
        repeated = [samples[k % len(samples)] for k in range(pairs)]
        return PairsPart(repeated, range(pairs), 0, pairs)

    def first_size(self) -> tuple[int, int]:
        """Width and height in pixels of what the first batch sees."""
        view = self.feed.samples(0)[0].view
        return view.width, view.height

    def losses(self, whole: nn.Module, part: PairsPart) -> Losses:
        """The weighted error of each pair of a micro-batch."""
        given = self.inputs(part)
        if self.reward is None:
            return Losses(self.errors(whole, given), given["timesteps"], self.levels)
        model_pred, noisy, cond = self._predicted(whole, given)
        each = self._weighted(model_pred, noisy, given)
        rows, missed = self.reward(model_pred, noisy, cond, part.step)
        each = each.index_add(0, rows, self.recipe.reward * missed)
        return Losses(each, noisy.timesteps, self.levels, missed.detach())

    @property
    def levels(self) -> int:
        """How many timesteps there are."""
        return len(self.alphas_cumprod)

    def inputs(self, part: PairsPart) -> dict[str, Tensor]:
        """What `errors` computes with: see `Inputs.of`."""
        return self._inputs.of(part)

    def errors(self, whole: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
        """The weighted error of each pair, (B,), of `inputs`. Computes on the device alone."""
        model_pred, noisy, _ = self._predicted(whole, given)
        return self._weighted(model_pred, noisy, given)

    def _weighted(self, model_pred: Tensor, noisy: Noisy, given: Mapping[str, Tensor]) -> Tensor:
        predicted, opaque = self.base.prediction_type, given.get("opaque")
        return weighted_loss(model_pred, noisy, self.recipe, predicted, self.alphas_cumprod, opaque=opaque)

    def _predicted(self, whole: nn.Module, given: Mapping[str, Tensor]) -> tuple[Tensor, Noisy, Tensor]:
        """``model_pred`` of `inputs`, what it was predicted from, and the maps in [0, 1]."""
        recipe, cond = self.recipe, images.levels_to_cond(given["levels"])
        if "present" in given:
            cond = union.absent_marked(cond, given["present"])
        mean, std, timesteps = given["mean"], given["std"], given["timesteps"]
        noisy = noised(mean, std, drawn_of(given), timesteps, recipe, self.alphas_cumprod)
        added = {name: given[name] for name in ("text_embeds", "time_ids") if name in given} or None
        seen = (
            self._laid_out(noisy.noisy_latents),
            noisy.timesteps,
            given["encoder_hidden_states"].float(),
            self._laid_out(cond),
            added,
        )
        if self.attention.measures:
            with uncounted(self.machine.device):
                self.attention.measure(lambda: Pair(self.controlnet, self.base.unet, recipe)(*seen))
        if self._compiled_for is not None:  # beside other compiled functions each run would count as a step
            torch.compiler.cudagraph_mark_step_begin()
        with self.attention.preferred():
            return whole(*seen), noisy, cond

    def _laid_out(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if self.recipe.channels_last else tensor

    def state(self, step: int) -> dict[str, Any]:
        """Of the data: see `Feed.state`."""
        return self.feed.state(step * self.recipe.accumulation * self.machine.processes.count)

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` gave to a run that stopped."""
        self.feed.restore(state)

    # --- what is shown ---

    def look(self, step: int) -> dict[str, float]:
        """Whether the map is used, where a look is due."""
        every = self.recipe.monitor_every
        if not every or (step % every and step != self.recipe.steps):
            return {}
        return self.shown.look(self.controlnet)

    def scores_due(self, step: int) -> bool:
        """Whether scores of control are to be taken after a step."""
        return bool(self.recipe.score_every) and step % self.recipe.score_every == 0

    def scores(self) -> dict[str, float]:
        """Scores of control on the shown pairs."""
        scores = self._scored()
        return scores.row() if scores else {}

    def _scored(self, *, at_the_end: bool = False) -> ControlScores | None:
        """Scores of control; where pictures cannot be made, that is said, and the training goes on.

        at_the_end: it is said, too, where maps of this kind cannot be scored.
        """
        try:
            scores = self.shown.score(self.controlnet)
            why_not = self.shown.why_not_scored if scores is None and at_the_end else ""
        except (ValueError, RuntimeError) as error:
            if self.machine.sharded:  # the others wait for this process's share
                raise
            scores, why_not = None, reason(error)
        if why_not:
            self.report(f"no scores of control: {why_not}")
        return scores

    def remark(self, rows: Sequence[dict[str, Any]]) -> str | None:
        """When control took hold, or what to look at when it does not."""
        return self.shown.remark(rows)

    def facts(self) -> dict[str, Any]:
        """The digests of the base and of the data, and a caption to try the adapter with."""
        first = self.encoded.examples[self.feed.shown[0]]
        digest, held_out = self.feed.digest(), self.feed.held_out_digest()
        return {
            "base_sha256": self._base_digest or self.base.digest(),
            **({"data_sha256": digest} if digest else {}),
            **({"data_held_out_sha256": held_out} if held_out else {}),
            "data_pairs": self.feed.pairs,
            **({"data_left_out": left_out} if (left_out := self.feed.left_out) else {}),
            "data_held_out": len(self.feed.shown) if self.feed.held_out else 0,
            "caption": first.caption,
        }

    def final_scores(self) -> dict[str, Any]:
        """Scores of control on the shown pairs, under the weights that the network holds now."""
        if not self.recipe.score_scenes or is_examined(self.recipe):
            return {}  # not wanted, or there will be a better measure
        scores = self._scored(at_the_end=True)
        return {} if scores is None else scores.to_json()

    def sample(self) -> NDArray[np.uint8]:
        """Columns of map, picture, and two samples under control, for pairs that are shown."""
        return self.shown.sample(self.controlnet)

    @contextmanager
    def _all_on_device(self) -> Iterator[None]:
        """Within the block the base's encoders are on its device, too; otherwise they make room."""
        self._make_ready()
        try:
            yield
        finally:
            self._make_room()

    def _make_ready(self) -> None:
        """Put what encodes and decodes on the device."""
        for part in (self.base.vae, *self.base.text_encoders):
            part.to(self.machine.device)

    def _make_room(self) -> None:
        """Take autoencoder and text encoders off a device, where the cache has what they give.

        The autoencoder stays where a reward decodes with it.
        """
        if self.encoded.data.cache and self.machine.device.type != "cpu":  # streams have none
            for part in (*([] if self.reward else [self.base.vae]), *self.base.text_encoders):
                part.to("cpu")
            free_memory()

    # --- the result ---

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """The adapter's folder; with a trained decoder also the U-Net, in a folder beside it."""
        recipe = self.recipe
        info = info_of(recipe, self.base, self.encoded.visits, data=self.feed.digest(), origin=self._origin)
        network, unet = self._exact(weights)
        whole = without_low_rank(network) if is_low_rank(recipe) else network
        save_adapter(whole, folder, info=info, dtype=DTYPES[recipe.export_dtype], replaces_all=True)
        if not recipe.sd_locked:
            with files.replace_folder(folder.parent / "unet") as target:
                save_half(unet, target)

    def _exact(self, weights: Mapping[str, Tensor]) -> tuple[Any, Any]:
        """The control network and the U-Net with the weights that were trained, in all their bits.

        Those that the run computes with, where these are whole and fp32. Otherwise new ones on the CPU: of
        networks in half precision the optimizer has finer weights, and what stayed as it was the base has,
        or the adapter that the training began from: neither is needed where all of the network was trained.
        """
        if self.half is None and not self.machine.sharded:
            return self.controlnet, self.base.unet
        names = {f"controlnet.{name}" for name in self.controlnet.state_dict()}
        if self.recipe.sd_locked and not self.machine.sharded and names <= weights.keys():
            whole = copy.deepcopy(self.controlnet).to("cpu", torch.float32)
            whole.load_state_dict({name.removeprefix("controlnet."): weights[name].cpu() for name in names})
            return whole, None
        unet = load_unet(self.recipe.base)
        network = self._made(replace(self.base, unet=unet, device=torch.device("cpu")))
        for prefix, module in {"controlnet.": network, "unet.": unet}.items():
            trained = {n.removeprefix(prefix): w.cpu() for n, w in weights.items() if n.startswith(prefix)}
            _, unknown = module.load_state_dict(trained, strict=False)
            assert not unknown, unknown
        return network, unet

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()

    # --- at the start ---

    def _made(self, base: Base, report: Callable[[str], None] | None = None) -> Any:
        """A network as recipe and base have it, float32, of a base in full precision."""
        channels = self.encoded.visits.channels
        if self.recipe.init is not None:
            return started_from(self.recipe, base, channels, report=report)
        return make_network(self.recipe, base.unet, channels)

    def _network(self) -> Any:
        """The network as the training starts with it."""
        at_rest = replace(self.base, device=torch.device("cpu"))
        recipe, network = self.recipe, self._made(at_rest, self.report)
        if recipe.init is not None:
            return network
        if recipe.hint_start == "unit" and hasattr(network, "controlnet_cond_embedding"):
            cond = images.levels_to_cond(levels_of(self._alike(_STARTED_ON)))
            cond = cond.reshape(-1, kind_of(network).channels(network), *cond.shape[2:])  # of all kinds alike
            network.controlnet_cond_embedding.to(self.machine.device)
            start_hint_encoder(network, cond, seed=recipe.seed)
        return network

    def _alike(self, count: int) -> list[Sample]:
        """Samples of the first batches, as many as there are of one size, up to a count."""
        found: list[Sample] = []
        for number in range(count):
            samples = self.feed.samples(number)
            found += [s for s in samples if not found or s.levels.shape == found[0].levels.shape]
            if len(found) >= count:
                break
        return found[:count]

    @property
    def _unet_dtype(self) -> torch.dtype:
        """The precision of the U-Net's weights as it trains: fp16's stay whole where a part is trained."""
        trained_whole = self.recipe.precision == "fp16" and not self.recipe.sd_locked
        return torch.float32 if trained_whole else self.machine.weights_dtype

    def _prepare(self) -> None:
        """Mark what is trained, lay the networks out as they compute fastest, and put them on the device.

        The U-Net comes there last: until the data is encoded, that has the device to itself.
        """
        recipe, unet = self.recipe, self.base.unet
        mark_trained(self.controlnet, unet, recipe)
        if recipe.sd_locked:  # otherwise a part is trained, of fp32 weights or masters of them
            unet.to(self.machine.weights_dtype)
        if recipe.channels_last and not self.machine.sharded:  # which takes contiguous weights only
            for network in (self.controlnet, unet):
                if keeps_layout(recipe) or not any(p.requires_grad for p in network.parameters()):
                    network.to(memory_format=torch.channels_last)
            if not keeps_layout(recipe) and "channels_last" in recipe.model_fields_set:
                self.report(_NOT_LAID_OUT)
        keep_layout(self.controlnet, unet, self.base.vae)
        self._make_room()
        for network in (self.controlnet, unet):
            network.to(self.machine.device)

"""From noise and a prompt to pictures: the denoising loop.

One step, in the words of the papers (classifier-free guidance: Ho & Salimans 2022, arXiv:2207.12598):

    eps_u, eps_c  =  pair(x_t, t, [negative prompt, prompt], maps)
    eps           =  eps_u + guidance * (eps_c - eps_u)
    x_{t-1}       =  scheduler(eps, t, x_t)

The schedulers are diffusers' classes, and the result equals its ControlNet pipelines'
(tests/test_sampling.py). Done once instead of in every step: the hint encoder, and the text's keys and
values. Done once instead of for each branch: what comes before the first cross-attention. Not done at all: a
control outside its window, or on a branch that its mode ignores.

Every picture's noise comes from its own generator on the CPU, in float32, so that a seed means the same
noise on every device, alone or in a batch.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from controlkit import diffusion, images, limits
from controlkit.adapters import check_fits
from controlkit.applying import EncodedControl, Rows, encode_controls
from controlkit.base import Conditioning, check_base_given
from controlkit.class_labels import Labels
from controlkit.class_labels import Told as Told
from controlkit.clip_guidance import ClipGuidance as ClipGuidance
from controlkit.clip_guidance import ClipGuide
from controlkit.control import Control
from controlkit.execution import Execution as Execution
from controlkit.execution import Runner
from controlkit.freeu import FreeU as FreeU
from controlkit.freeu import freed
from controlkit.ip_adapter import PicturePrompt as PicturePrompt
from controlkit.ip_adapter import pictures_told, with_pictures
from controlkit.kinds import kind_of
from controlkit.layouts import lay_out
from controlkit.memory import Memory as Memory
from controlkit.memory import at_work, kept_small
from controlkit.naming import check_callables, check_list_of, kind_of_value, with_article
from controlkit.packing import LEAST_STEPS, packed
from controlkit.perturbed import check_perturbable
from controlkit.picture_sizes import natural_size
from controlkit.picture_sizes import picture_size as picture_size
from controlkit.predicting import Guidance as Guidance
from controlkit.predicting import Predictor, check_together
from controlkit.predicting import Savings as Savings
from controlkit.prompt_syntax import check_syntax
from controlkit.prompts import encode_weighted
from controlkit.reuse import text_kept
from controlkit.schedulers import SCHEDULERS as SCHEDULERS
from controlkit.schedulers import Schedule, make_schedule, scaled_noise, step_options
from controlkit.schedulers import make_scheduler as make_scheduler
from controlkit.settings import USUAL_SCHEDULER, USUAL_STEPS
from controlkit.starting import Begun, begin
from controlkit.starting import Start as Start
from controlkit.starting import draw_noise as draw_noise
from controlkit.tiling import TiledPredictor, tiled_vae
from controlkit.tiling import Tiles as Tiles
from controlkit.told_sizes import Sizes as Sizes
from controlkit.usual_guidance import usual_guidance

if TYPE_CHECKING:
    from controlkit.base import Base

DEVICE_BATCH = 4  # pictures at once on a GPU: each one more needs more memory
_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # each network's own
_giving_turns = threading.Lock()
_WAYS: Mapping[str, tuple[type, str]] = {  # what a generation takes as an object, and one that is written
    "start": (Start, "Start(picture)"),
    "savings": (Savings, "Savings(control_every=2)"),
    "tiles": (Tiles, "Tiles(512)"),
    "memory": (Memory, "Memory(batch_size=1)"),
    "execution": (Execution, "Execution(compiled=True)"),
    "told": (Told, "Told(class_label=1)"),
    "clip_guidance": (ClipGuidance, "ClipGuidance(clip, 30)"),
    "freeu": (FreeU, "FreeU(1.5, 1.6, 0.9, 0.2)"),
}

Callback = Callable[[int, int, Tensor], None]
"""Called after every step with the steps done, the steps in all, and the latents (B, C, h, w)."""


def default_guidance(base: Base) -> float:
    """The guidance scale that is used when none is given: see `usual_guidance`."""
    return usual_guidance(base.name, base.unet.config, base.scheduler_config)


def default_batch(base: Base) -> int:
    """How many pictures are denoised at once where nobody says."""
    return 1 if base.device.type == "cpu" else DEVICE_BATCH


def generate(
    base: Base,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    prompt_syntax: str = "plain",
    clip_skip: int | None = None,
    controls: Sequence[Control] = (),
    start: Start | None = None,
    picture_prompts: Sequence[PicturePrompt] = (),
    told: Told | None = None,
    steps: int = USUAL_STEPS,
    guidance: float | None = None,
    guidance_rescale: float = 0.0,
    pag: float = 0.0,
    freeu: FreeU | None = None,
    clip_guidance: ClipGuidance | None = None,
    scheduler: str = USUAL_SCHEDULER,
    temperature: float | None = None,
    seeds: Sequence[int] = (0,),
    height: int | None = None,
    width: int | None = None,
    savings: Savings | None = None,
    tiles: Tiles | None = None,
    callback: Callback | None = None,
    preview: Callable[[Tensor], None] | None = None,
    finished: Callable[[int, np.ndarray], None] | None = None,
    batch_size: int | None = None,
    memory: Memory | None = None,
    execution: Execution | None = None,
) -> list[np.ndarray]:
    """Pictures of a prompt that follow the controls' maps, one per seed: uint8 (height, width, 3) RGB each.

    prompt_syntax: how both prompts are read, one of `prompt_syntax.SYNTAXES`; "a1111" understands
    (word:1.3) and any length. clip_skip: see `Base`, 1 to 12, for both prompts (diffusers' spares the
    negative one); None is the base's. controls: their residuals are summed. start: a picture to start from,
    whole or with a hole to fill. The first map, or else that picture, decides the size where none is given
    (`picture_size`). told: the class, the picture or the sizes that the base is told besides the text.
    picture_prompts: what IP-Adapters made of pictures (`ip_adapter.picture_prompt`).
    steps: 1 to 1000. guidance: 0 to 100; at 1 or below, and by bases that are told the guidance, the negative
    prompt is not used; None is `default_guidance`. guidance_rescale: see `Guidance`. pag: perturbed-attention
    guidance, 0 to 100 (the paper's usual is 3), see `perturbed`. freeu: see `FreeU`. clip_guidance: a CLIP
    that pulls the picture towards the prompt besides, in the share of the steps that `savings` leaves guided
    (see `clip_guidance.py`). scheduler: one of `SCHEDULERS`.
    temperature: 0 to 2, how much of the noise that the scheduler injects is taken: 0 is deterministic, 1 as
    trained. For ddim it is eta (Song et al. 2020, arXiv:2010.02502, equation 16) and for tcd gamma (Zheng et
    al. 2024, arXiv:2402.19159, algorithm 4), 0 by default for both; for the other schedulers that draw
    (`limits.STOCHASTIC`) a factor on what they draw, k-diffusion's s_noise, 1 by default. Those that draw
    nothing refuse it.
    height, width: multiples of 8. savings: lossy, see `Savings`. tiles: what the networks see
    at once, for pictures larger than memory or the base's training allow, see `Tiles`.
    callback: see `Callback`; steps are counted over all pictures. preview: called after every step with the
    latents (B, C, h, w) that the network expects at the end. finished: called with the index and the
    pixels of each picture as soon as it is made, so that an interruption loses only what is unfinished.
    batch_size: pictures denoised at once, by default one on the CPU and up to four elsewhere. On the CPU
    one at a time makes picture k of several equal, bit for bit, picture k alone; batched kernels round
    differently.
    memory: measures for small devices, from `memory_plan.fit` or by name, and with them the batch's size;
    networks that rest on the CPU are taken from there.
    execution: compiled, or as CUDA graphs; see `Execution`.

    Threads that share a base or an adapter take turns: a generation changes the networks while it runs.

    Raises ValueError for a number outside its range, a control of another family, or latents that stop
    being finite.
    """
    check_callables(callback=callback, preview=preview, finished=finished)
    ways = {"savings": savings, "tiles": tiles, "memory": memory, "execution": execution}
    also = {"told": told, "clip_guidance": clip_guidance, "freeu": freeu}
    _check_kinds(base, prompt, negative_prompt, controls, picture_prompts, start=start, **ways, **also)
    guided = Guidance(default_guidance(base) if guidance is None else guidance, guidance_rescale, pag)
    execution, savings, told = execution or Execution(), savings or Savings(), told or Told()
    seeds = limits.check_seeds(seeds)
    limits.check_steps(steps)
    limits.check_batch(batch_size)
    limits.check_temperature(temperature, scheduler)
    check_syntax(prompt_syntax)
    _check_together(execution, savings, told, tiles, pag, freeu)
    _check_controls(base, controls, savings, pag)
    reader = base if clip_skip is None else replace(base, clip_skip=clip_skip)
    limits.check_clip_skip(reader.clip_skip)
    size = natural_size(controls, start)
    width, height = picture_size(base, size, width, height, any_area=tiles is not None)
    start = None if start is None else start.fitted(width, height)
    batch_size = memory.batch_size if memory else batch_size or default_batch(base)
    networks = [*{id(c.controlnet): c.controlnet for c in controls}.values()]
    judges = [] if clip_guidance is None or not clip_guidance.scale else [clip_guidance.clip.model]
    pays = memory is None and steps * len(seeds) >= LEAST_STEPS
    pictures: list[np.ndarray] = []
    with (
        _prepared(base, controls, packs=pays and execution.packed and not execution.compiled),
        pictures_told(base.unet, picture_prompts),
        freed(base.unet, freeu),
        kept_small(memory, base, *networks, *judges),
        tiled_vae(base, tiles is not None or (memory is not None and memory.tiled_vae)),
    ):
        with at_work(memory, base, *base.encoders):
            text = encode_text(reader, prompt, negative_prompt, guidance=guided.scale, syntax=prompt_syntax)
            labels = Labels(base, told)
        with at_work(memory, base, *judges):
            guide = _guide(base, clip_guidance, prompt, prompt_syntax)
        with at_work(memory, base, *networks):
            encoded = encode_controls(
                controls, width=width, height=height, pictures=len(seeds), in_bands=tiles is not None
            )
        branches = len(text.encoder_hidden_states)
        denoised = partial(
            denoise,
            base,
            text,
            guidance=guided,
            guide=guide,
            picture_prompts=picture_prompts,
            sizes=told.of_branches(branches),
            temperature=temperature,
            savings=savings,
            tiles=tiles,
            preview=preview,
            one_branch_at_a_time=memory is not None and memory.one_branch,
            runner=Runner(execution, base.device),
            moves=memory is not None and memory.offload,
        )
        batches = -(-len(seeds) // batch_size)
        for batch in range(batches):
            first, last = batch * batch_size, min((batch + 1) * batch_size, len(seeds))
            generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds[first:last]]
            class_labels = labels.draw(generators, branches=branches)  # before the noise, as in diffusers
            schedule = make_schedule(scheduler, base, steps=steps, strength=start.strength if start else 1.0)
            with at_work(memory, base, *([base.vae] if start else [])):
                begun = begin(base, schedule, generators, width=width, height=height, start=start)
            with at_work(memory, base, base.unet, *networks, *judges, *([base.vae] if judges else [])):
                latents = denoised(
                    begun,
                    controls=[control.rows(first, last) for control in encoded],
                    schedule=schedule,
                    generators=generators,
                    class_labels=class_labels,
                    callback=_counting(callback, batch=batch, batches=batches),
                )
            for picture in _decoded(base, latents, memory):
                pictures.append(picture if start is None else start.pasted(picture))
                if finished is not None:
                    finished(len(pictures) - 1, pictures[-1])
    return pictures


def _decoded(base: Base, latents: Tensor, memory: Memory | None) -> list[np.ndarray]:
    """The pictures of latents; one at a time on a GPU, where nothing else bounds what that takes."""
    with at_work(memory, base, base.vae):
        at_once = 1 if memory is None and base.device.type != "cpu" else len(latents)
        decoded = torch.cat([base.decode_latents(part) for part in latents.split(at_once)])
    try:
        return images.tensor_to_pictures(decoded)
    except ValueError as error:  # of numbers that are not finite
        raise ValueError(
            "the latents are finite, and the picture decoded from them is not: damaged weights of the VAE, or"
            " float16 overflow in it, as SDXL's first one has (another --vae, or --dtype bf16)"
        ) from error


def _guide(base: Base, guidance: ClipGuidance | None, prompt: str, syntax: str) -> ClipGuide | None:
    """CLIP's guidance towards a prompt, where there is any."""
    if guidance is None or not guidance.scale:
        return None
    return ClipGuide(base, guidance, prompt, syntax=syntax)


@contextlib.contextmanager
def _prepared(base: Base, controls: Sequence[Control], *, packs: bool = False) -> Iterator[None]:
    """Within the block the networks are this thread's, and build no graphs; they are laid out as they compute
    fastest.

    packs: with packed weights, too, where that can be done. The caller's inference mode is left: weights that
    are laid out or moved in it would let no gradient pass ever after, and CLIP's guidance needs one.
    """
    given = [base.unet, *(control.controlnet for control in controls)]
    networks = [*{id(network): network for network in given}.values()]
    with _in_turn([*networks, base.vae]), torch.inference_mode(False):
        lay_out(*networks, base.vae)
        with torch.no_grad(), text_kept(*networks), packed(networks if packs else []):
            yield


@contextlib.contextmanager
def _in_turn(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block no other thread is in such a block of any of these networks."""
    with _giving_turns:
        turns = [_turns.setdefault(network, threading.RLock()) for network in networks]
    with contextlib.ExitStack() as stack:
        for turn in sorted(turns, key=id):  # in one order: no two threads wait for each other
            stack.enter_context(turn)
        yield


def encode_text(
    base: Base, prompt: str, negative_prompt: str | None, *, guidance: float, syntax: str = "plain"
) -> Conditioning:
    """The text as `denoise` takes it: rows [negative prompt, prompt], or only the prompt where nothing is
    guided: when guidance <= 1, or for a base that is told the guidance.

    syntax: see `prompt_syntax`. An absent negative prompt (None) is the encoding of "", and zeros for an SDXL
    that was trained so, as in diffusers' pipelines; "" is the encoding of "" for both.
    """
    alone = guidance <= 1 or base.is_told_guidance
    prompts = [prompt] if alone else [negative_prompt or "", prompt]
    text = base.encode_prompts(prompts) if syntax == "plain" else encode_weighted(base, prompts)
    zeros = base.family == "sdxl" and base.zeros_for_empty_negative
    if alone or negative_prompt is not None or not zeros:
        return text
    assert text.pooled is not None, "SDXL's text encoders give a pooled vector"
    keep = torch.tensor([0.0, 1.0], device=text.pooled.device, dtype=text.pooled.dtype)[:, None]
    return Conditioning(text.encoder_hidden_states * keep[..., None], text.pooled * keep)


def denoise(
    base: Base,
    text: Conditioning,
    begun: Begun,
    *,
    controls: Sequence[EncodedControl] = (),
    picture_prompts: Sequence[PicturePrompt] = (),
    schedule: Schedule,
    guidance: Guidance,
    guide: ClipGuide | None = None,
    temperature: float | None = None,
    generators: Sequence[torch.Generator] | None = None,
    class_labels: Tensor | None = None,
    sizes: Sequence[Sizes] = (),
    savings: Savings | None = None,
    tiles: Tiles | None = None,
    callback: Callback | None = None,
    preview: Callable[[Tensor], None] | None = None,
    one_branch_at_a_time: bool = False,
    runner: Runner | None = None,
    moves: bool = False,
) -> Tensor:
    """The latents of B pictures: float32 (B, C, h, w), from what `starting.begin` gave for the schedule.

    text: what `encode_text` made with the same guidance, one row or two, shared by all pictures.
    controls: with the hint encoder's output already computed (`applying.encode_controls`).
    picture_prompts: those that the U-Net was told of, too (`ip_adapter.pictures_told`).
    schedule: fresh from `make_schedule`; the scheduler keeps its state.
    class_labels: of `Labels.draw`. sizes: of `Told.of_branches`. runner: runs the networks; the same one for
    several batches of one text. moves: the networks come and go between batches. generators: one per picture,
    for schedulers that add noise. Latents stay in float32 between the steps whatever the networks' precision.
    Raises ValueError, naming the step, when they stop being finite.
    """
    latents, scheduler, n = begun.latents, schedule.scheduler, schedule.steps
    runner = runner or Runner(Execution(), base.device)
    whole = Predictor(
        base,
        runner.rows(
            latents.shape if class_labels is None else None,  # these are drawn anew for every batch
            lambda: rows_of(base, text, latents, picture_prompts, class_labels, sizes),
        ),
        controls,
        guidance,
        steps=n,
        savings=savings or Savings(),
        shown=begun.shown,
        one_branch_at_a_time=one_branch_at_a_time,
        networks=runner.networks,
    )
    h, w = latents.shape[-2:]
    predictor = runner.predictor(whole, can_be_kept=tiles is None and not moves and whole.keeps_nothing)
    if tiles is not None:
        predictor = TiledPredictor(whole, tiles, height=h, width=w)
    options = step_options(scheduler, temperature=temperature, generators=generators)
    timesteps = schedule.timesteps.to(latents.device)  # the networks' copy; the scheduler looks up its own
    health = _Health(n, latents.device, lambda: _likely_cause(text, begun, controls, guidance))
    for i, t in enumerate(schedule.timesteps):
        noisy_latents = scheduler.scale_model_input(latents, t)
        model_pred = predictor(noisy_latents, timesteps[i], i)
        if guide is not None and whole.guides(i):
            model_pred = guide(model_pred, noisy_latents, t)
        if preview is not None:
            preview(expected_latents(base, model_pred, noisy_latents, t))
        with scaled_noise(scheduler, temperature):
            latents = scheduler.step(model_pred, t, latents, **options, return_dict=False)[0]
        latents = begun.with_kept(latents, schedule, i)
        health.check(latents)
        if callback is not None:
            callback(i + 1, n, latents)
    return latents


def expected_latents(base: Base, model_pred: Tensor, noisy_latents: Tensor, t: Tensor) -> Tensor:
    """The latents (B, C, h, w) without noise that a prediction amounts to, whatever the scheduler.

    ``noisy_latents``: as the network saw them, which is x_t of the training's process.
    """
    steps = t.round().long().expand(len(noisy_latents))
    return diffusion.predict_x0(base.prediction_type, model_pred, noisy_latents, steps, base.alphas_cumprod)


def rows_of(
    base: Base,
    text: Conditioning,
    latents: Tensor,
    picture_prompts: Sequence[PicturePrompt] = (),
    class_labels: Tensor | None = None,
    sizes: Sequence[Sizes] = (),
) -> Rows:
    """The text for every picture in ``latents`` (B, C, h, w), branch by branch."""
    pictures, _, h, w = latents.shape
    states = text.encoder_hidden_states
    pooled = None if text.pooled is None else text.pooled.repeat_interleave(pictures, dim=0)
    told = with_pictures(states, picture_prompts) if picture_prompts else None
    return Rows(
        states.repeat_interleave(pictures, dim=0),
        base.added_cond(pooled, height=h * base.vae_factor, width=w * base.vae_factor, sizes=sizes),
        pictures,
        for_unet=None if told is None else told.repeat_interleave(pictures, dim=0),
        class_labels=class_labels,
    )


class _Health:
    """Finds the step at which latents stopped being finite, with one synchronisation per run on a GPU."""

    def __init__(self, steps: int, device: torch.device, cause: Callable[[], str]) -> None:
        """cause: what is the likely one, asked for where it came to that."""
        self.steps, self.cause = steps, cause
        self.at_once = device.type == "cpu"
        self.finite: list[Tensor] = []

    def check(self, latents: Tensor) -> None:
        """Note one step; raise ValueError at once on the CPU, after the last step elsewhere."""
        self.finite.append(torch.isfinite(latents).all())
        if not self.at_once and len(self.finite) < self.steps:
            return
        finite = torch.stack(self.finite).tolist()
        if not all(finite):
            raise ValueError(
                f"the latents stopped being finite at step {finite.index(False) + 1} of {self.steps}:"
                f" {self.cause()}"
            )


_OVERFLOW = "damaged weights, or float16 overflow (bfloat16 and float32 hold larger numbers: --dtype bf16)"


def _likely_cause(
    text: Conditioning, begun: Begun, controls: Sequence[EncodedControl], guidance: Guidance
) -> str:
    """Why latents are not finite, by what came in."""
    if not torch.isfinite(text.encoder_hidden_states).all():
        return f"the text as its encoder read it was not finite to begin with: {_OVERFLOW} in it"
    if not torch.isfinite(begun.latents).all():
        return f"the picture to start from was not finite once encoded: {_OVERFLOW} in the VAE"
    large = ["a control scale"] * bool(controls) + ["guidance"] * (guidance.scale > 1)
    return f"{' or '.join(large)} that is too large, {_OVERFLOW}" if large else _OVERFLOW


def _check_kinds(
    base: object,
    prompt: object,
    negative_prompt: object,
    controls: object,
    picture_prompts: object,
    **given: object,
) -> None:
    """Raise ValueError where a base, one text, a list of controls or of picture prompts, or one of `_WAYS` is
    something else."""
    check_base_given(base)
    for name, text in (("prompt", prompt), ("negative_prompt", negative_prompt)):
        if not isinstance(text, str) and not (text is None and name == "negative_prompt"):
            raise ValueError(f"{name} is one text for all pictures, not {kind_of_value(text)}")
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"{name} is not valid Unicode, which tokenizers want: {text!r}")
    check_list_of("controls", controls, Control, "Control(...)")
    check_list_of("picture_prompts", picture_prompts, PicturePrompt, "picture_prompt(...)")
    for name, value in given.items():
        kind, example = _WAYS[name]
        if value is not None and not isinstance(value, kind):
            raise ValueError(
                f"{name} is {with_article(kind.__name__)}, as {example}, not {kind_of_value(value)}"
            )


def _check_precisions(base: Base, controlnets: Sequence[nn.Module]) -> None:
    """Raise ValueError for networks that cannot compute on the base's latents and text, outside autocast."""
    read_both = [one for one in controlnets if kind_of(one).name in ("controlnet", "controlnet-union")]
    if torch.is_autocast_enabled(base.device.type):
        return
    for name, network in [("the U-Net", base.unet), *(("a control network", one) for one in read_both)]:
        own: torch.dtype = network.dtype
        if own != base.dtype:
            raise ValueError(
                f"{name} computes in {own} and its base in {base.dtype}: load both in one precision"
                ' (dtype="bf16"), or generate within torch.autocast'
            )


def _check_together(
    execution: Execution, savings: Savings, told: Told, tiles: Tiles | None, pag: float, freeu: FreeU | None
) -> None:
    """Raise ValueError for ways to compute that exclude each other."""
    added = {"pag": pag > 0, "freeu": freeu is not None}
    limits.check_every_step(savings.features_every, **added)
    changes = {"features_every": savings.features_every > 1, "merge_tokens": savings.merge_tokens > 0}
    limits.check_compiled(execution.compiled, **changes, **added)
    if told.of_branches(1):
        limits.check_told_whole(tiles)


def _check_controls(base: Base, controls: Sequence[Control], savings: Savings, pag: float) -> None:
    """Raise ValueError for an adapter of another base, or adapters that cannot be run together."""
    if pag:
        check_perturbable(base.unet)
    for control in controls:
        check_fits(control.controlnet, base)
    _check_precisions(base, [control.controlnet for control in controls])
    check_together([control.controlnet for control in controls], savings, pag=pag)


def _counting(callback: Callback | None, *, batch: int, batches: int) -> Callback | None:
    """The callback with steps counted over all batches."""
    if callback is None:
        return None
    return lambda done, n, latents: callback(batch * n + done, batches * n, latents)

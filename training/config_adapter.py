"""The recipe of a control adapter, and its table of data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt, model_validator

from controlkit.naming import unknown
from controlkit.training.config_base import Count, Factor, Probability, Rate, Recipe, Table, Weight, Widths

WORLD_KINDS = ("canny", "openpose", "depth")  # maps that the bundled world has of itself
FORMATS = ("auto", "imagefolder", "fill50k", "paired", "huggingface", "webdataset", "world")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedule-free")
TIMESTEPS = ("uniform", "cubic", "logit-normal", "structure")
_LEAST_SIDE = 16  # pixels, of what can be generated, for samples and scores
VARIANTS = ("controlnet", "control-lora", "t2i-adapter", "controlnet-xs", "lite", "controlnet-union")
COPIES = ("controlnet", "control-lora")  # variants that are a copy of the base's encoder
_OF_VARIANT = {"map_dropout": "controlnet-union", "rank": "control-lora", "size_ratio": "controlnet-xs"}
_NOT_OF_VARIANT = {
    "hint_channels": ("t2i-adapter", "lite"),
    "hint_start": ("t2i-adapter", "lite"),
    "zero_convolution_rate": ("t2i-adapter",),
}
REWARDED = ("canny", "depth")  # kinds of map that can be taken of a picture by differentiable means


def _side(side: int) -> int:
    if 0 < side < _LEAST_SIDE:
        raise ValueError(f"it is 0, for the base's, or {_LEAST_SIDE} pixels at least")
    return side


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) and value else value or ()


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_several)]
"""One name, or several."""
Side = Annotated[int, Field(ge=0, le=16384, multiple_of=8), AfterValidator(_side)]


class DataRecipe(Table):
    """What is trained on: `[data]` in a recipe, `data.key=value` on the command line."""

    source: Annotated[str, Field(min_length=1)] = "world"
    """A folder, a metadata.jsonl or prompt.json, tar shards ("shards/*.tar"), a folder written by the library
    datasets, a hub id of a data set ("owner/name"), or "world", the bundled one.
    """
    format: Literal[FORMATS] = "auto"  # type: ignore[valid-type]
    split: str = "train"
    """Of a Hugging Face data set, or a folder with folders of several splits."""
    picture_column: str = ""
    """Column or key with the picture; "" looks for the usual names."""
    map_column: Names = ()
    """Column, key, folder or end of the file's name (`_edges`, `.png`) with the map, or the kind that it is
    named after; several are stacked into one, channel by channel. () looks for the usual names.
    """
    caption_column: str = ""
    maps: Literal["auto", "files", "made"] = "auto"
    """Maps from files (pose JSON is drawn), or made of the pictures by the preprocessor `map`; auto: files
    where the data has them.
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of the preprocessor; ranges such as "50..150" are drawn anew at each visit, a seed fixes the
    draws. Of maps from files: style (drawn poses), metric (depth that grows with the distance), fill (holes).
    """
    map_mode: Literal["auto", "rgb", "grey"] = "auto"
    """Channels of one map: 3, or 1; 16 bits are kept where grey maps have them. auto: rgb."""
    map_blur: Probability = 0.0
    """Share of visits whose map is blurred (spread 0.4 to 2 pixels): estimators draw softer depth than
    renderers.
    """
    pose_drop: Probability = 0.0
    """Of poses as JSON: with which probability each head, arm and leg is left out of what a visit sees."""
    pose_jitter: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] = 0.0
    """Of poses as JSON: by how many pixels joints are off at a visit (the standard deviation), a hand with
    its wrist, a face with its nose. Shown and scored pairs keep every joint in its place.
    """
    alpha_mask: bool = False
    """Let the loss count where pictures are opaque, and not where they are transparent (kohya's alpha_mask);
    what is shown and scored is the whole picture, on white.
    """
    caption: str = ""
    """Caption of pictures that have none."""
    resolution: Side = 0
    """Side of the squares that are trained on, or, with buckets, of a square of their area; 0: the base's."""
    buckets: bool = False
    """Keep aspect ratios: pictures go into buckets of about equal area, sides multiples of bucket_step."""
    bucket_step: Annotated[int, Field(ge=8, le=1024, multiple_of=8)] = 64
    bucket_ratio: Annotated[float, Field(ge=1, le=8, allow_inf_nan=False)] = 2.0
    """Longest side to shortest, at most; beyond it pictures are cropped."""
    crop: Literal["centre", "random"] = "centre"
    crops: PositiveInt = 4
    """How many different random crops a picture has; each visit takes one. All of them can be cached."""
    flip: Probability = 0.0
    """Share of visits that see the mirror image; the joints of poses change sides with it."""
    limit: Count = 0
    """Take the first N pairs only; 0 takes all."""
    holdout: Count = 8
    """Pairs kept back for samples, scores and the monitor, a quarter of all at most, others of the same
    pictures included; with 0, or of fewer than 8 pairs, those that are trained on are shown.
    """
    streaming: bool = False
    """Read a Hugging Face data set from beginning to end, instead of fetching it first."""
    shuffle_window: PositiveInt = 1000
    """How many pairs of a stream are shuffled among themselves."""
    bad: Literal["stop", "skip"] = "stop"
    """A pair that cannot be used: stop before the first step and name it, or leave it out and say so."""
    check: bool = True
    """Look at every pair before the first step, which bad=skip needs. Streams are never looked at."""
    cache: bool = True
    """Encode pictures and captions once and keep the result on disk, by content."""
    resident: bool | Literal["auto"] = "auto"
    """Keep latents, maps and captions on the device and gather each batch there, for the same result; auto:
    on a GPU, where the cache holds all that visits see and it takes at most a quarter of the free memory.
    """
    workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Threads that read and prepare pairs beside the training; the result does not depend on them."""


class ControlNetRecipe(Recipe):
    """A ControlNet on a locked base."""

    task: Literal["controlnet"]
    map: Annotated[str, Field(min_length=1)]
    """The kind of map: canny, openpose, depth, another that `controlkit preprocess --list` names, or, for
    maps from files, any word.
    """
    base: str = "tiny"
    adapter: Literal[VARIANTS] = "controlnet"  # type: ignore[valid-type]
    """What is trained: a whole copy of the base's encoder; low-rank updates of one (control-lora); a narrow
    encoder connected with the base's both ways (controlnet-xs); features of the map (t2i-adapter); one small
    encoder, added once (lite); a copy for several kinds of maps, those of data.map_column, which takes any of
    them and is trained on pictures that have all (controlnet-union).
    """
    map_dropout: Probability = 0.5
    """Of controlnet-union: the share of visits at which each of the maps is left out; one always stays."""
    rank: Annotated[int, Field(ge=1, le=1024)] = 32
    """Of control-lora's updates."""
    size_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.25
    """Of controlnet-xs: the width of its encoder, in units of the base's."""
    init: str | None = None
    """Adapter (bundled name, file, folder, hub id) that is trained on. None: a new one of the base."""
    init_base: str | None = None
    """The base that init was trained on, where it is another one of the family: what the adapter learned
    beyond it is carried over (weights + this base - that base).
    """
    data: DataRecipe = DataRecipe()

    accumulation: PositiveInt = 1
    """Micro-batches of batch_size per step and process."""
    hint_channels: Widths | None = None
    """Widths of the hint encoder; the last three halve the map's size. None: what the base's family has."""
    hint_start: Literal["unit", "standard"] = "unit"
    """How a new hint encoder starts. unit: every channel at mean 0 and spread 1 on the data's maps, by which
    control sets in several times sooner; standard: as diffusers and the original do.
    """
    zero_convolution_rate: Factor = 6.0
    """Learning rate of the zero convolutions, in units of learning_rate."""
    hint_encoder_rate: Factor = 3.0
    """Learning rate of the hint encoder, in units of learning_rate."""
    objective: Literal["base", "epsilon", "v_prediction", "sample"] = "base"
    """What the loss compares; base: what the base predicts. Another one is computed from the prediction."""
    min_snr_gamma: Weight = 0.0
    """Weight the loss by min(SNR, gamma); 0 does not."""
    min_snr_soft: bool = False
    """With min_snr_gamma: SNR * gamma / (SNR + gamma) in the minimum's place, which has no corner."""
    debiased: bool = False
    """Weight the loss by 1 / sqrt(SNR) where noise is predicted (debiased estimation), and alike elsewhere.
    """
    reward: Weight = 0.0
    """Weight, beside the loss, of what the picture misses of its map (canny or depth): ControlNet++. 0: off.
    """
    reward_below: Probability = 0.2
    """Share of the noise schedule, from its clean end, in which pictures are looked at for the reward."""
    reward_from: Count = 0
    """Steps before the reward begins; a new adapter has to follow the map somewhat first."""
    noise_offset: Weight = 0.0
    """Spread of a shift of each channel's noise, the same at every pixel."""
    multires_noise_iterations: Count = 0
    """How many ever coarser noises are added to the noise (kohya's users give 6 to 10); 0: none."""
    multires_noise_discount: Probability = 0.3
    """How strong each of them is in units of the one before."""
    input_perturbation: Weight = 0.0
    """Spread of further noise in what the networks see, not in what they are to predict."""
    timesteps: Literal[TIMESTEPS] = "uniform"  # type: ignore[valid-type]
    """How noise levels are drawn: see `controlkit.diffusion.place_timesteps`."""
    stratified: bool = True
    """Spread the noise levels of a step's pairs evenly over the draw; False draws each by itself."""
    layout_steps: Count = 1000
    """Over the first so many steps noise levels are drawn where layout is decided ("structure"), of which
    ever more give way to `timesteps`.
    """
    zero_terminal_snr: bool = False
    """Rescale the noise schedule so that its last step is pure noise; for bases that predict v or x_0."""
    sd_locked: bool = True
    """False trains the base's decoder, too, and writes it beside the adapter."""
    only_mid_control: bool = False
    """Train and apply the residual of the middle block alone."""
    size_conditioning: Literal["original", "seen"] = "original"
    """What an SDXL is told of size and cut. original: the picture's own, and where it was cut, as the base
    was told; seen: the size that is trained on, uncut, as diffusers' script and every generation tell it.
    """
    caption_dropout: Probability = 0.1
    """Share of visits with an empty caption, drawn anew at each visit."""

    optimizer: Literal[OPTIMIZERS] = "adamw"  # type: ignore[valid-type]
    """All but adamw and adafactor come from packages: uv sync --extra optimizers. prodigy finds its rate by
    itself, one for all parts; learning_rate is a factor on it, usually 1. schedule-free needs no schedule and
    averages the weights by itself, so ema is not used.
    """
    gradient_checkpointing: bool = False
    """Compute the forward pass twice and keep less in memory."""
    attention: Literal["auto", "torch"] = "auto"
    """The kernel of attention: torch's choice, or, on a GPU, the fastest of a measurement before the first
    step.
    """
    channels_last: bool = True
    """Lay weights out as convolutions compute fastest; with adamw8bit, but in bf16, the locked ones alone."""
    compile: bool = False
    """torch.compile; worth its minutes on a GPU, for many steps."""
    cuda_graph: bool = False
    """Record forward and backward of each shape once and let the GPU repeat them by itself: worth it at small
    batches, where the host is slower than the GPU. What is recorded is checked before it is used.
    """

    score_scenes: Count = 24
    """Held-out scenes of the bundled world on which its adapters are measured at the end. Adapters of other
    bases are measured on the pairs that are held out. 0 skips both.
    """
    score_every: Count = 0
    """Steps between scores of control on held-out pairs; 0 takes them at the end only."""
    monitor_every: Count = 50
    """Steps between looks at whether the map is used; 0 never looks."""
    bad_steps: PositiveInt = 5
    """How many steps in a row may have no finite gradient before the run stops."""
    trackers: Names = ()
    """tensorboard, wandb and whatever else accelerate knows."""
    project: str = "controlkit"
    """The name under which trackers file the run."""
    export_dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Of the result's file. fp32 keeps every bit, as diffusers' script writes it, in twice the bytes."""
    push_to_hub: str = ""
    """Repository on the hub ("owner/name") that gets the result after it is written; "" for none."""

    @model_validator(mode="after")
    def _fits_together(self) -> ControlNetRecipe:
        if self.warmup > self.steps:
            raise ValueError(
                f"warmup={self.warmup} is longer than the training, steps={self.steps}: give less"
            )
        self._check_optimizer()
        self._check_variant()
        self._check_columns()
        self._check_loss()
        if self.reward:
            self._check_reward()
        if self.data.streaming and self.data.buckets:
            raise ValueError("data.buckets needs to know every picture's size, which data.streaming does not")
        if self.data.bad == "skip" and not (self.data.check or self.data.streaming):
            raise ValueError(
                "data.bad=skip leaves out what data.check finds, and data.check=false looks for nothing:"
                " leave data.check=true, or give data.bad=stop"
            )
        if self.data.alpha_mask and self.data.source == "world":
            raise ValueError("data.alpha_mask goes by transparency, which the bundled world has none of")
        if self.data.maps == "made" or self.data.source == "world":
            from controlkit import preprocessors

            known = preprocessors.names() if self.data.maps == "made" else WORLD_KINDS
            for kind in self.data.map_column or (self.map,):
                if kind not in known:
                    raise unknown("kind of map", kind, known)
        return self

    def _check_columns(self) -> None:
        """Refuse a number of maps that the variant or the source of the data does not have."""
        columns = self.data.map_column
        if self.adapter == "controlnet-union" and len(columns) < 2:
            raise ValueError(
                "adapter controlnet-union is for two or more kinds of maps: name them with data.map_column,"
                ' such as ["canny", "depth"]'
            )
        if self.adapter == "controlnet-union" and self.data.map_mode == "grey":
            raise ValueError("adapter controlnet-union takes maps of three channels, not data.map_mode grey")
        if columns and self.data.maps == "made":
            raise ValueError("data.map_column names maps in files, and data.maps=made makes them")

    def _check_loss(self) -> None:
        """Refuse weights and noises that exclude each other."""
        if self.min_snr_soft and not self.min_snr_gamma:
            raise ValueError("min_snr_soft softens the weight of min_snr_gamma, which is 0: give 5, say")
        if self.debiased and self.min_snr_gamma:
            raise ValueError("debiased and min_snr_gamma both weight the loss: give one of them")
        if self.multires_noise_iterations and self.noise_offset:
            raise ValueError(
                "multires_noise_iterations and noise_offset both make coarse noise: give one of them"
            )

    def _check_optimizer(self) -> None:
        """Refuse numbers that mean something else to the optimizer."""
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                "optimizer=prodigy finds the learning rate by itself, and learning_rate is a factor on it:"
                f" with {self.learning_rate:g} it would hardly move; add learning_rate=1"
            )
        if self.optimizer == "schedule-free" and not self.betas[0]:
            raise ValueError("optimizer=schedule-free divides by the first of betas, which is 0: give 0.9")

    def _check_variant(self) -> None:
        """Refuse what the variant has no part for."""
        if self.only_mid_control and self.adapter not in COPIES:
            raise ValueError(f"only_mid_control goes with adapter {' and '.join(COPIES)}, not {self.adapter}")
        if self.gradient_checkpointing and self.adapter == "controlnet-xs":
            raise ValueError(
                "gradient_checkpointing does not go with adapter controlnet-xs:"
                " add gradient_checkpointing=false"
            )
        if self.init_base is not None and self.init is None:
            raise ValueError("init_base says what init was trained on, and there is no init")
        if self.init_base is not None and self.adapter not in COPIES:
            raise ValueError(f"init_base goes with adapter {' and '.join(COPIES)}, not {self.adapter}")

    def _check_reward(self) -> None:
        """Refuse what the reward cannot be taken of."""
        if self.map not in REWARDED:
            raise ValueError(f"reward is there for maps of {' and '.join(REWARDED)}, not {self.map!r}")
        if len(self.data.map_column) > 1:
            columns = ", ".join(self.data.map_column)
            raise ValueError(f"reward compares one map, and data.map_column has several: {columns}")
        if not self.reward_below:
            raise ValueError("reward_below=0 looks at no picture; reward=0 switches the reward off")
        if self.reward_from >= self.steps:
            raise ValueError(f"reward_from={self.reward_from} comes after the last step, steps={self.steps}")
        further = set(self.data.options) - {"low", "high", "seed"}
        if self.map == "canny" and further:
            raise ValueError(
                f"reward follows low and high of canny's options, and data.options has {min(further)}"
            )


def unused(recipe: ControlNetRecipe) -> list[str]:
    """What is to be said of settings that the recipe's adapter does not have."""
    of_others = {key: f": it is of {of}" for key, of in _OF_VARIANT.items() if recipe.adapter != of}
    of_others |= {key: ", which has none" for key, of in _NOT_OF_VARIANT.items() if recipe.adapter in of}
    values = {key: getattr(recipe, key) for key in of_others}
    return [
        f"{key}={f'{value:g}' if isinstance(value, float) else value} does nothing with"
        f" adapter={recipe.adapter}{of_others[key]}"
        for key, value in values.items()
        if value != type(recipe).model_fields[key].default
    ]


__all__ = ["FORMATS", "OPTIMIZERS", "TIMESTEPS", "ControlNetRecipe", "DataRecipe", "Rate", "unused"]

"""What every training's recipe shares, and the ranges of its numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt

from controlkit.files import at_home

Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

Widths = tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt]


class Table(BaseModel):
    """A table of a recipe: every key is known, checked and final."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class Recipe(Table):
    """What every training shares."""

    task: str
    out: Annotated[str, Field(min_length=1), AfterValidator(at_home)]
    """Run folder: config.toml, metrics.jsonl, checkpoints/, samples/ and the result."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Decides initial weights, the order of the data, noise, timesteps and dropout."""
    steps: PositiveInt
    batch_size: PositiveInt
    """Pairs that one process looks at at once."""
    learning_rate: Rate
    warmup: Count = 50
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine", "linear", "rsqrt"] = "cosine"
    """After the warmup: constant; a half cosine or line down to a fiftieth of the rate at the end; or rsqrt,
    constant up to twice the warmup and then falling with one over the root of the step, which needs no end.
    """
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    """Adam's decay of the gradient's mean and of its square's mean."""
    weight_decay: Weight = 0.01
    clip: Factor = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema: Decay = 0.0
    """Decay of the moving average of the weights that becomes the result; 0 takes the last weights."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: networks compute in it; the trained weights and the optimizer stay fp32."""
    device: str = "auto"
    """"auto" is cuda where there is one, else cpu."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 leaves torch's choice."""
    checkpoint_every: PositiveInt = 250
    checkpoints_kept: Annotated[int, Field(ge=2)] = 2
    """Of the newest; the others are removed once a newer one is complete."""
    sample_every: Count = 250
    """Steps between pictures of what was learned, and one at the end; 0 makes none."""
    log_every: PositiveInt = 10
    scenes: PositiveInt = 16000
    """Scenes of the bundled world to train on: seeds 0 to N-1 of its "train" split."""

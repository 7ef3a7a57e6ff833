"""Recipes: the complete, typed description of a training, read from TOML.

A recipe is found by path or by the name of a bundled one (`training/recipes/NAME.toml`); `key=value`
overrides any top-level key. Every default stands here and nowhere else.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from controlkit.naming import did_you_mean, unknown

RECIPES = Path(__file__).parent / "recipes"

Rate = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PatchSize = Literal[4, 8, 16, 32]  # of an estimator: divides the side of its pictures, 128


class Recipe(BaseModel):
    """What every training shares."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    task: str
    out: Annotated[str, Field(min_length=1)]
    """Run folder: config.toml, metrics.jsonl, checkpoints/, samples/ and the result."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    """Decides initial weights, the order of the scenes, noise, timesteps and dropout."""
    steps: PositiveInt
    batch_size: PositiveInt
    learning_rate: Rate
    warmup: Annotated[int, Field(ge=0)] = 50
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """After the warmup: constant, or a half cosine down to a fiftieth of the rate at the last step."""
    weight_decay: Weight = 0.01
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that becomes the result; 0 takes the last weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: forward pass under autocast, weights and optimizer in fp32."""
    device: str = "auto"
    """"auto" is cuda where there is one, else cpu."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """CPU threads; 0 leaves torch's choice."""
    checkpoint_every: PositiveInt = 250
    sample_every: PositiveInt = 250
    log_every: PositiveInt = 10
    scenes: PositiveInt = 16000
    """Scenes of the bundled world to train on: seeds 0 to N-1 of its "train" split."""


class VaeRecipe(Recipe):
    """The autoencoder (÷8, 4 latent channels), or only its decoder with the latents frozen."""

    task: Literal["vae"]
    train: Literal["all", "decoder"] = "all"
    init: str | None = None
    """An AutoencoderKL folder to start from; needed by train = "decoder"."""
    block_out_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (16, 16, 48, 96)
    layers_per_block: PositiveInt = 1
    norm_num_groups: PositiveInt = 2
    """Few groups: a group of two channels, normalised over the picture, would forget the picture's colour."""
    crop: Annotated[int, Field(ge=0, le=128, multiple_of=8)] = 0
    """Side of the squares that are trained on, mostly cut around the figure; 0 takes whole pictures."""
    edge_weight: Weight = 0.5
    """Weight of the difference between neighbouring pixels' differences: sharp edges, which control needs."""
    kl_weight: Weight = 5e-4
    """Weight of the divergence from a unit normal, per latent element."""
    latent_noise: Weight = 0.0
    """Spread of the noise added to frozen latents (of unit variance), so that the decoder forgives small
    errors.
    """


class TextRecipe(Recipe):
    """The text encoder, taught to hold the attributes of a caption where cross-attention can read them."""

    task: Literal["text"]
    hidden_size: PositiveInt = 96
    layers: PositiveInt = 2
    heads: PositiveInt = 4


class BaseRecipe(Recipe):
    """The U-Net, on frozen latents and a frozen text encoder; the result is a whole diffusers pipeline
    folder.
    """

    task: Literal["base"]
    vae: str
    """AutoencoderKL folder; its encoder makes the latents."""
    decoder: str | None = None
    """AutoencoderKL folder that goes into the result instead, if its decoder was trained further."""
    text: str
    """Folder with text_encoder/ and tokenizer/."""
    init: str | None = None
    """Pipeline folder whose U-Net is trained on; its shape then holds. None: a new U-Net."""
    block_out_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (64, 80, 96, 96)
    attention_levels: tuple[bool, bool, bool, bool] = (False, True, True, False)
    heads: PositiveInt = 4
    norm_num_groups: PositiveInt = 8
    caption_dropout: Probability = 0.1
    """Share of visits with an empty caption, so that classifier-free guidance works."""


class ControlNetRecipe(Recipe):
    """A ControlNet on a locked base."""

    task: Literal["controlnet"]
    map: Literal["canny", "openpose", "depth"]
    base: str = "tiny"
    init: str | None = None
    """Adapter (bundled name or folder) that is trained on. None: a fresh copy of the base's encoder."""
    hint_channels: tuple[PositiveInt, PositiveInt, PositiveInt, PositiveInt] = (8, 16, 48, 96)
    """Widths of the hint encoder; the last three halve the map's size."""
    zero_convolution_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Learning rate of zero convolutions and hint encoder, in units of learning_rate."""
    caption_dropout: Probability = 0.1
    score_scenes: Annotated[int, Field(ge=0)] = 24
    """Held-out scenes on which the scores at the end are measured; 0 skips them."""


class EstimatorRecipe(Recipe):
    """What both estimators share: a vision transformer that looks at the whole picture."""

    init: str | None = None
    """Folder of an estimator that is trained on; its shape then holds. None: a new one."""
    hidden_size: PositiveInt = 96
    heads: PositiveInt = 4
    patch_size: PatchSize = 8
    autoencoder: str | None = None
    """Base (bundled name or folder) through whose autoencoder some pictures pass, so that the estimator
    reads generated pictures too. None: true pictures only.
    """
    passed: Probability = 0.5
    """Share of visits that take the passed picture, with an autoencoder."""
    latent_noise: Weight = 0.2
    """Spread of the noise on the latents (of unit variance) between encoder and decoder."""


class PoseRecipe(EstimatorRecipe):
    """The pose estimator (VitPoseForPoseEstimation, 17 COCO joints)."""

    task: Literal["pose"]
    layers: PositiveInt = 4


class DepthRecipe(EstimatorRecipe):
    """The depth estimator (DepthAnythingForDepthEstimation, relative inverse depth)."""

    task: Literal["depth"]
    layers: Annotated[int, Field(ge=3)] = 4
    """Depth is read from the last four of the patches' embedding and the layers."""
    fusion_size: Annotated[int, Field(ge=2)] = 16


_TASKS: dict[str, type[Recipe]] = {
    "vae": VaeRecipe,
    "text": TextRecipe,
    "base": BaseRecipe,
    "controlnet": ControlNetRecipe,
    "pose": PoseRecipe,
    "depth": DepthRecipe,
}


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def find_recipe(name_or_path: str) -> Path:
    """Path of a recipe given by path or bundled name. Raises ValueError where there is none."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    bundled = RECIPES / f"{name_or_path.removesuffix('.toml')}.toml"
    if path.parent == Path() and bundled.is_file():
        return bundled
    if path.suffix == ".toml" and path.parent != Path():
        hint = did_you_mean(path.stem, recipe_names())
        raise ValueError(f"no recipe file {name_or_path}{hint}; bundled recipes: {', '.join(recipe_names())}")
    raise unknown("recipe", name_or_path, recipe_names())


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values as in TOML; bare words are strings).

    Raises ValueError, one line, for a missing file, broken TOML, an unknown key or task, or a value out of
    range.
    """
    path = find_recipe(name_or_path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.strip():
            raise ValueError(f"cannot read {override!r}: write overrides as key=value, such as steps=200")
        table[key.strip()] = _value(key.strip(), value.strip())
    return parse_recipe(table, where=str(path))


def _value(key: str, text: str) -> Any:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return text if key in _texts() and not isinstance(value, str) else value  # out=2026 is a folder


def _texts() -> set[str]:
    """Keys whose values are texts in every recipe that has them."""
    fields = [item for kind in _TASKS.values() for item in kind.model_fields.items()]
    return {name for name, field in fields if field.annotation in (str, str | None)}


def parse_recipe(table: dict[str, Any], *, where: str) -> Recipe:
    """Check a recipe's table. Raises ValueError naming `where`, the key and what is allowed."""
    if "task" not in table:
        raise ValueError(f"{where}: no task: a recipe says what to train, one of {', '.join(sorted(_TASKS))}")
    kind = _TASKS.get(str(table["task"]))
    if kind is None:
        raise unknown(f"task in {where}:", str(table["task"]), _TASKS)
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(key, kind.model_fields)}") from error
        got = "" if first["type"] == "missing" else f", not {first['input']!r}"
        raise ValueError(f"{where}: {key}: {first['msg'][:1].lower()}{first['msg'][1:]}{got}") from error


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every key, so that a run folder repeats itself without the bundled defaults."""

    def written(value: Any) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (tuple, list)):
            return "[" + ", ".join(written(item) for item in value) + "]"
        if isinstance(value, str):  # TOML's escapes are JSON's
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        return repr(value)

    lines = [f"{key} = {written(value)}" for key, value in recipe.model_dump().items() if value is not None]
    return "\n".join(lines) + "\n"

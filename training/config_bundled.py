"""Recipes of the bundled models other than adapters: autoencoder, text encoder, U-Net, estimators."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from controlkit.training.config_base import Probability, Recipe, Weight, Widths

PatchSize = Literal[4, 8, 16, 32]  # of an estimator: divides the side of its pictures, 128


class VaeRecipe(Recipe):
    """The autoencoder (÷8, 4 latent channels), or only its decoder with the latents frozen."""

    task: Literal["vae"]
    train: Literal["all", "decoder"] = "all"
    init: str | None = None
    """An AutoencoderKL folder to start from; needed by train = "decoder"."""
    block_out_channels: Widths = (16, 16, 48, 96)
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
    block_out_channels: Widths = (64, 80, 96, 96)
    attention_levels: tuple[bool, bool, bool, bool] = (False, True, True, False)
    heads: PositiveInt = 4
    norm_num_groups: PositiveInt = 8
    caption_dropout: Probability = 0.1
    """Share of visits with an empty caption, so that classifier-free guidance works."""


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

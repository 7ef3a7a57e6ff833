"""Imported once by the server that `killed_runs.py` forks from."""

import diffusers.models.autoencoders.autoencoder_kl
import diffusers.models.controlnets.controlnet
import diffusers.models.unets.unet_2d_condition
import diffusers.schedulers.scheduling_ddim  # noqa: F401
import transformers.models.clip.modeling_clip  # noqa: F401

import controlkit.training.adapter
import controlkit.training.runs  # noqa: F401

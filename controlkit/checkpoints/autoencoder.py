"""An autoencoder alone in one file, in the original's names or diffusers', or within a whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from controlkit.checkpoints import names, reading, structure
from controlkit.checkpoints.reading import check_suffix, what_else
from controlkit.formats.structure import Shapes
from controlkit.formats.weight_file import WeightFile, open_weights

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

_DIFFUSERS = "encoder.down_blocks."
_ORIGINAL = "encoder.down."
_EARLIER = (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v."), ("proj_attn.", "to_out.0."))


def check_file(file: Path) -> None:
    """Raise the ValueError of `load_autoencoder` for a file that holds no autoencoder."""
    _names(_opened(file))


def load_autoencoder(file: Path, *, scaling_factor: float, dtype: torch.dtype) -> AutoencoderKL:
    """The autoencoder in a file, on the CPU. Files do not say what its latents are scaled by.

    Raises ValueError, one line that names the file, for one that is missing, damaged, incomplete, or holds
    something else.
    """
    from diffusers import AutoencoderKL

    from controlkit.checkpoints.writing import as_wanted, hollow

    weights = _opened(file)
    weights.check_hash()
    named = _names(weights)
    shapes = Shapes({name: weights.entries[key] for key, name in named.items()}, file)
    config = structure.vae_config(shapes, scaling_factor=scaling_factor)
    read = weights.read(named)
    tensors = as_wanted({name: read[key] for key, name in named.items()}, hollow(config), file, dtype=dtype)
    vae: AutoencoderKL = AutoencoderKL.from_config(config).to(dtype)
    vae.load_state_dict(tensors)
    return vae.eval()


def _opened(file: Path) -> WeightFile:
    check_suffix(file, "autoencoder")
    return open_weights(file, what="autoencoder")


def _names(weights: WeightFile) -> dict[str, str]:
    """The autoencoder's keys and their names in diffusers. Raises ValueError for a file without any."""
    keys = list(weights.entries)
    prefix = names.VAE_PREFIX if any(key.startswith(names.VAE_PREFIX) for key in keys) else ""
    own = [key for key in keys if key.startswith(prefix)]
    if any(key.startswith(_DIFFUSERS) for key in own):
        return {key: _newer(key) for key in own}
    if not any(key.startswith(prefix + _ORIGINAL) for key in own):
        raise ValueError(f"{weights.path} is no autoencoder: it is {what_else(weights)}")
    return reading.named(weights, names.VAE, prefix, own)


def _newer(key: str) -> str:
    """A name as diffusers has it now, of one that it had before version 0.15."""
    if ".attentions." not in key:
        return key
    for old, new in _EARLIER:
        key = key.replace(f".{old}", f".{new}")
    return key

"""An autoencoder alone in one file, in the original's names or diffusers', or within a whole checkpoint; the
small one, `AutoencoderTiny`, in diffusers' names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit.checkpoints import names, reading, structure
from controlkit.checkpoints.reading import check_suffix, what_else
from controlkit.formats.structure import Config, Shapes
from controlkit.formats.weight_file import WeightFile, check_floats, open_weights
from controlkit.naming import first_of

if TYPE_CHECKING:
    import torch

_TINY = ("encoder.layers.", "decoder.layers.")
_DIFFUSERS = "encoder.down_blocks."
_ORIGINAL = "encoder.down."
_EARLIER = (("query.", "to_q."), ("key.", "to_k."), ("value.", "to_v."), ("proj_attn.", "to_out.0."))


def check_file(file: Path) -> None:
    """Raise the ValueError of `load_autoencoder` for a file that holds no autoencoder."""
    _checked_names(_opened(file))


def load_autoencoder(file: Path, *, scaling_factor: float, dtype: torch.dtype) -> Any:
    """The autoencoder in a file, on the CPU. Files do not say what its latents are scaled by; those of the
    small one are not.

    Raises ValueError, one line that names the file, for one that is missing, damaged, incomplete, or holds
    something else.
    """
    import diffusers
    from torch import nn

    from controlkit.checkpoints.writing import as_wanted, hollow

    weights = _opened(file)
    weights.check_hash()
    named = _checked_names(weights)
    shapes = Shapes({name: weights.entries[key] for key, name in named.items()}, file)
    tiny = _is_tiny(list(named.values()))
    config = _tiny_config(shapes) if tiny else structure.vae_config(shapes, scaling_factor=scaling_factor)
    read = weights.read(named)
    tensors = as_wanted({name: read[key] for key, name in named.items()}, hollow(config), file, dtype=dtype)
    vae = getattr(diffusers, config["_class_name"]).from_config(config)
    nn.Module.to(vae, dtype)  # diffusers' own warns of modules that the small one does not have
    vae.load_state_dict(tensors)
    return vae.eval()


def _is_tiny(names: list[str]) -> bool:
    return all(any(name.startswith(half) for name in names) for half in _TINY)


def _tiny_config(shapes: Shapes) -> Config:
    """The small one's configuration: equally wide all through, with as many blocks as the published ones."""
    widths = [shapes.size("encoder.layers.0.weight", 0)] * 4
    return {
        "_class_name": "AutoencoderTiny",
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "latent_channels": shapes.size("decoder.layers.0.weight", 1),
    }


def _opened(file: Path) -> WeightFile:
    check_suffix(file, "autoencoder")
    return open_weights(file, what="autoencoder")


def _checked_names(weights: WeightFile) -> dict[str, str]:
    """`_names`; raises ValueError for numbers that are no plain floats, too."""
    found = _names(weights)
    check_floats({key: weights.entries[key] for key in found}, weights.path)
    return found


def _names(weights: WeightFile) -> dict[str, str]:
    """The autoencoder's keys and their names in diffusers. Raises ValueError for a file without any."""
    keys = list(weights.entries)
    prefix = names.VAE_PREFIX if any(key.startswith(names.VAE_PREFIX) for key in keys) else ""
    own = [key for key in keys if key.startswith(prefix)]
    if any(key.startswith(_DIFFUSERS) for key in own):
        return {key: _newer(key) for key in own}
    if _is_tiny(own):
        return {key: key for key in own}
    if not any(key.startswith(prefix + _ORIGINAL) for key in own):
        if any(re.match(r"(en|de)coder\.", key.removeprefix(prefix)) for key in own):
            raise ValueError(
                f"{weights.path} is no autoencoder as SD1, SD2 and SDXL have it: it holds {first_of(own)}"
            )
        raise ValueError(f"{weights.path} is no autoencoder: it is {what_else(weights)}")
    return reading.named(weights, names.VAE, prefix, own)


def _newer(key: str) -> str:
    """A name as diffusers has it now, of one that it had before version 0.15."""
    if ".attentions." not in key:
        return key
    for old, new in _EARLIER:
        key = key.replace(f".{old}", f".{new}")
    return key

"""Another autoencoder for a base: one that was trained further, or a small one that is faster.

Either of the base's own class (as stabilityai/sd-vae-ft-mse, whose decoder draws faces better than SD1.5's),
or diffusers' `AutoencoderTiny` (as madebyollin/taesd, which decodes with an eighteenth of the work: lossy).
It takes the base's latents as they are, so it must come from the base's family; a file does not say which
that is.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controlkit import notices
from controlkit.checkpoints.autoencoder import check_file, load_autoencoder
from controlkit.files import as_text
from controlkit.folders import alone, load_part, read_json, weight_files
from controlkit.hub import check_exists, find_folder

if TYPE_CHECKING:
    from controlkit.base import Base

ALIASES: Mapping[str, str] = {
    "taesd": "madebyollin/taesd",
    "taesdxl": "madebyollin/taesdxl",
    "ft-mse": "stabilityai/sd-vae-ft-mse",
}
CLASSES = ("AutoencoderKL", "AutoencoderTiny")

_PART = "vae"  # the folder of the autoencoder within that of a whole base
_PLACES: Mapping[str, Any] = {
    "what": "autoencoder",
    "top_file": ("config.json", f"{_PART}/config.json"),
    "bundled": {},
    "aliases": ALIASES,
}
HUB_FILES = tuple(
    f"{folder}{name}"
    for folder in ("", f"{_PART}/")
    for name in ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model*.bin")
)
_UNKNOWN = ("latents_mean", "shift_factor")  # what latents may be scaled by besides; no SD1, SD2 or SDXL does


def check_vae(name: str) -> None:
    """Raise `with_vae`'s ValueError for a name that leads nowhere, without loading or downloading."""
    file = _file(name)
    if file is None:
        check_exists(name, **_PLACES)
    else:
        check_file(file)


@alone
def with_vae(base: Base, name: str | os.PathLike[str]) -> Base:
    """A base with another autoencoder; the given one stays as it is.

    name: a short name (`ALIASES`), a hub id, a folder, which holds config.json and the weights, or a
    folder vae/ with them, or one file, as A1111 keeps it. It is loaded in the base's precision, onto the
    device of the base's own.

    Raises ValueError, one line, for a name that leads nowhere, a missing or damaged file, and an autoencoder
    of another class or whose latents are not like the base's. Warns of one that scales them otherwise.
    """
    from controlkit.base import check_base_given
    from controlkit.controlnet import lock

    check_base_given(base)
    name = as_text("an autoencoder", name)
    file = _file(name)
    vae, where = _in_folder(name, base) if file is None else (_in_file(file, base), file)
    _check_fits(vae, base, where)
    return replace(base, vae=lock(vae).to(base.vae.device))


def _file(name: str) -> Path | None:
    """The file that is named as an autoencoder; None for anything else."""
    path = os.path.expanduser(name)
    return Path(path) if os.path.isfile(path) else None


def _in_file(file: Path, base: Base) -> Any:
    """An autoencoder of one file, which does not say by what it scales latents: as the base's own does."""
    from controlkit.base_parts import vae_dtype

    dtype = vae_dtype(base.vae.config, family=base.family, dtype=base.dtype)
    return load_autoencoder(file, scaling_factor=base.vae.config.scaling_factor, dtype=dtype)


def _in_folder(name: str, base: Base) -> tuple[Any, Path]:
    """An autoencoder by its name, and its folder."""
    import diffusers

    from controlkit.base_parts import vae_dtype

    folder = _part(find_folder(name, complete=_is_complete, files=HUB_FILES, **_PLACES))
    config = read_json(folder / "config.json")
    kind = config.get("_class_name")
    if kind not in CLASSES:
        raise ValueError(f"{folder}/config.json: the autoencoder is {kind}, not {' or '.join(CLASSES)}")
    dtype = vae_dtype(config, family=base.family, dtype=base.dtype)
    return load_part(getattr(diffusers, kind), folder, dtype=dtype), folder


def _part(folder: Path) -> Path:
    """The folder of the autoencoder itself. Raises ValueError where there is none."""
    for place in (folder, folder / _PART):
        if (place / "config.json").is_file():
            return place
    raise ValueError(f"{folder} holds no autoencoder: neither config.json nor {_PART}/config.json")


def _is_complete(folder: Path) -> bool:
    try:
        return all(file.is_file() for file in weight_files(_part(folder)))
    except ValueError:
        return False


def _check_fits(vae: Any, base: Base, folder: Path) -> None:
    """Raise ValueError unless an autoencoder makes such latents as the base's own, of pictures in RGB."""
    config, own = vae.config, base.vae.config
    scale = config.scaling_factor
    if isinstance(scale, bool) or not isinstance(scale, int | float) or scale <= 0:
        raise ValueError(f"{folder}/config.json: scaling_factor must be a number above 0, not {scale!r}")
    for name in _UNKNOWN:
        if config.get(name):
            raise ValueError(f"{folder}/config.json: {name} {config[name]} is not supported")
    makes = _shape(config)
    for what, found, wanted in zip(("channels", "pixels to a side"), makes, _shape(own), strict=True):
        if found != wanted:
            raise ValueError(
                f"{folder}: its latents have {found} {what}, and those of the base {base.name} {wanted}:"
                " the autoencoder belongs to another family"
            )
    if _class(vae) == _class(base.vae) and scale != own.scaling_factor:
        notices.warn(
            f"the autoencoder {folder} scales latents by {scale}, and that of the base {base.name} by"
            f" {own.scaling_factor}: it may belong to another family",
            stacklevel=3,
        )


def _class(vae: Any) -> str:
    return str(vae.config["_class_name"])


def _shape(config: Any) -> tuple[int, int]:
    """Of latents: how many channels they have, and for how many pixels along a side each stands."""
    return config.latent_channels, 2 ** (len(config.block_out_channels) - 1)

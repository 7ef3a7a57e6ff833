"""What is known of a base by its name and its small files alone, and whether an adapter at hand fits it.

So that what does not fit is refused before anything large is loaded or downloaded. Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from controlkit import naming
from controlkit.checkpoints.kept import checkpoint_file, configs
from controlkit.config_types import check_types
from controlkit.families import ALIASES, BUNDLED, short_name
from controlkit.folders import read_json
from controlkit.formats.adapter_file import as_loaded, check_config, open_adapter_file
from controlkit.formats.finding import BUNDLED_ADAPTERS, find_adapter_file
from controlkit.formats.fitting import BaseStructure, check_kind_fits
from controlkit.formats.structure import UNTOLD
from controlkit.hub import find_file

_UNET_DEFAULTS: Mapping[str, Any] = {  # diffusers', for what a published config.json leaves out
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
}
_SDXL_UNET: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "projection_class_embeddings_input_dim": 2816,
    **UNTOLD["sdxl"],
}
_PUBLISHED: Mapping[str, tuple[Mapping[str, Any], str]] = {  # the bases of `families.ALIASES`
    "sd15": ({"cross_attention_dim": 768}, "epsilon"),
    "sd21": ({"cross_attention_dim": 1024, "use_linear_projection": True, **UNTOLD["sd2"]}, "v_prediction"),
    "sdxl": (_SDXL_UNET, "epsilon"),
}


def read_base(name: str) -> BaseStructure:
    """What an adapter has to fit of a base: of a short name known here, else from its configuration files.

    Of a base on the hub only these two small files are fetched. Raises ValueError for a name that leads
    nowhere.
    """
    file = checkpoint_file(name)
    if file is not None:
        own, trained = configs(file)
        return BaseStructure(name, {**_UNET_DEFAULTS, **own}, trained["prediction_type"])
    if short_name(name) in _PUBLISHED:
        unet, prediction_type = _PUBLISHED[short_name(name)]
        return BaseStructure(name, {**_UNET_DEFAULTS, **unet}, prediction_type)
    source = str(BUNDLED.get(name, name))
    if "/" not in source and not os.path.isdir(source):
        raise naming.unknown("base", name, [*BUNDLED, *ALIASES])
    config_file = find_file(source, "unet/config.json", hint="give --base FOLDER")
    unet = read_json(config_file)
    check_types(unet, config_file)
    scheduler = read_json(find_file(source, "scheduler/scheduler_config.json", hint="give --base FOLDER"))
    return BaseStructure(name, {**_UNET_DEFAULTS, **unet}, scheduler.get("prediction_type", "epsilon"))


def structure_at_hand(name: str) -> BaseStructure | None:
    """The same of a base that is known here or lies on this machine; None for any other.

    None for a faulty one, too: loading says what it is.
    """
    is_here = short_name(name) in (*BUNDLED, *ALIASES) or os.path.exists(os.path.expanduser(name))
    try:
        return read_base(name) if is_here else None
    except ValueError:
        return None


def check_fits_at_hand(adapter: str, base: str) -> None:
    """Raise the ValueError of loading for an adapter on this machine that is none, or does not fit a base.

    An adapter of the hub, and a base whose structure is not known without a download, are left to loading.
    """
    if adapter not in BUNDLED_ADAPTERS and not os.path.exists(os.path.expanduser(adapter)):
        return
    file = open_adapter_file(adapter)
    if find_adapter_file(adapter) is None:
        check_config(file)
    structure = structure_at_hand(base)
    if structure is not None:
        loaded = as_loaded(file, adapter)
        check_kind_fits(loaded.kind, loaded.config, loaded.family, structure, name=adapter)

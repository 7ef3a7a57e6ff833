"""Writing trained models as other software reads them: diffusers and transformers folders, half precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from controlkit import files
from controlkit.folders import read_json


def save_half(model: Any, folder: Path) -> None:
    """Write a diffusers or transformers model with half-precision weights; the model itself stays as it is.

    The configuration asks for float32, in which these models compute: transformers would otherwise take the
    file's precision, and the parts of a pipeline would not fit together. It forgets the folder that the model
    was loaded from.
    """
    copy.deepcopy(model).half().save_pretrained(folder)
    config = read_json(folder / "config.json")
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    files.write_json(folder / "config.json", config)

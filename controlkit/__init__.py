"""ControlKit: ControlNet training and inference. The public names, imported when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from controlkit.adapters import Adapter as Adapter
    from controlkit.adapters import load_adapter as load_adapter
    from controlkit.adapters import write_adapter as write_adapter
    from controlkit.base import Base as Base
    from controlkit.base import load_base as load_base
    from controlkit.class_labels import Told as Told
    from controlkit.clip_guidance import ClipGuidance as ClipGuidance
    from controlkit.clip_guidance import load_clip as load_clip
    from controlkit.control import Control as Control
    from controlkit.embeddings import Embedding as Embedding
    from controlkit.embeddings import with_embeddings as with_embeddings
    from controlkit.execution import Execution as Execution
    from controlkit.formats.adapter_file import AdapterFile as AdapterFile
    from controlkit.formats.adapter_file import open_adapter_file as open_adapter_file
    from controlkit.freeu import FreeU as FreeU
    from controlkit.images import load_picture as load_picture
    from controlkit.ip_adapter import picture_prompt as picture_prompt
    from controlkit.loras import Lora as Lora
    from controlkit.loras import with_loras as with_loras
    from controlkit.memory import Memory as Memory
    from controlkit.predicting import Savings as Savings
    from controlkit.sampling import generate as generate
    from controlkit.starting import Start as Start
    from controlkit.tiling import Tiles as Tiles
    from controlkit.told_sizes import Sizes as Sizes
    from controlkit.vaes import with_vae as with_vae

__version__ = "0.1.0"

_HOME = {
    "Adapter": "adapters",
    "AdapterFile": "formats.adapter_file",
    "Base": "base",
    "ClipGuidance": "clip_guidance",
    "Control": "control",
    "Embedding": "embeddings",
    "Execution": "execution",
    "FreeU": "freeu",
    "Lora": "loras",
    "Memory": "memory",
    "Savings": "predicting",
    "Sizes": "told_sizes",
    "Start": "starting",
    "Tiles": "tiling",
    "Told": "class_labels",
    "generate": "sampling",
    "load_adapter": "adapters",
    "load_base": "base",
    "load_clip": "clip_guidance",
    "load_picture": "images",
    "open_adapter_file": "formats.adapter_file",
    "picture_prompt": "ip_adapter",
    "with_embeddings": "embeddings",
    "with_loras": "loras",
    "with_vae": "vaes",
    "write_adapter": "adapters",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'controlkit' has no attribute {name!r}")
    return getattr(import_module(f"controlkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

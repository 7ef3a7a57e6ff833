"""Training: data, cache, loop, checkpoints and recipes. Import it as `controlkit.training`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ == "training":
    raise ImportError("this folder is the package controlkit.training: import it by that name")

if TYPE_CHECKING:
    from controlkit.training.runs import Result as Result
    from controlkit.training.runs import train_recipe as train_recipe
    from controlkit.training.watch import Progress as Progress

_HOME = {"Progress": "watch", "Result": "runs", "train_recipe": "runs"}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__

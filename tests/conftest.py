"""What all tests share: no network, no model cache of the developer's, quiet libraries."""

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from controlkit.base import Base

_HUB_HOME = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Point the model hub at an empty cache and switch its network off, before any test imports it."""
    config.stash[_HUB_HOME] = tempfile.mkdtemp(prefix="controlkit-tests-")
    os.environ["HF_HOME"] = config.stash[_HUB_HOME]
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its use would warn


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the empty cache."""
    shutil.rmtree(config.stash[_HUB_HOME], ignore_errors=True)


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], Base]":
    """Tiny bases of random weights by family, each built and loaded once; nobody may change them."""
    import tiny_models

    from controlkit.base import load_base

    loaded: dict[str, Base] = {}

    def load(family: str) -> "Base":
        if family not in loaded:
            folder = tiny_models.build(tmp_path_factory.mktemp(family), family, sample_size=8)
            loaded[family] = load_base(str(folder))
        return loaded[family]

    return load


@pytest.fixture(scope="session")
def sd1(load: "Callable[[str], Base]") -> "Base":
    """The tiny SD1."""
    return load("sd1")

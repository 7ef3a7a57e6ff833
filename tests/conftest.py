"""What all tests share: no network, no model cache of the developer's, quiet libraries."""

import os
import shutil
import tempfile

import pytest

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

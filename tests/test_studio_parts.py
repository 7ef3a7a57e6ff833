"""The parts of the studio that need no page: what is kept, what may be trained on, what is told."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the studio page needs the extra ui")

from controlkit import adapters, generate_models

# gradio (6.31) and what it is built on use what Starlette is about to drop.
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the adapters that were read, none of which takes time."""
    names: list[str] = []
    base = SimpleNamespace(device="cpu", dtype=None)
    monkeypatch.setattr(generate_models, "_load_base", lambda *values, **named: base)
    monkeypatch.setattr(adapters, "load_adapter", lambda name, **named: names.append(name) or object())
    return names


def adapter_of(models: generate_models.Models, name: str) -> Any:
    """An adapter, beside the one base."""
    base = models.base("tiny", device="cpu", dtype=None)  # type: ignore[arg-type]
    return models.adapter(name, base)


def test_an_adapter_whose_weights_were_overwritten_in_place_is_read_anew(
    tmp_path: Path, loaded: list[str]
) -> None:
    weights, models = tmp_path / "diffusion_pytorch_model.safetensors", generate_models.Models()
    weights.write_bytes(b"first")
    first, before = adapter_of(models, str(tmp_path)), tmp_path.stat()
    assert adapter_of(models, str(tmp_path)) is first
    for data, later in ((b"other", 5), (b"longer", 0)):  # another time; another size at the same time
        time = weights.stat().st_mtime_ns + later
        weights.write_bytes(data)
        os.utime(weights, ns=(time, time))
        assert adapter_of(models, str(tmp_path)) is not first
        first = adapter_of(models, str(tmp_path))
    assert tmp_path.stat().st_mtime_ns == before.st_mtime_ns
    assert len(loaded) == 3


def test_the_adapters_that_were_used_last_are_kept(loaded: list[str]) -> None:
    models, most = generate_models.Models(), generate_models.MOST_ADAPTERS
    names = [f"owner/adapter-{number}" for number in range(most + 1)]
    for name in [*names[:most], names[0], names[most], names[0], names[1]]:
        adapter_of(models, name)
    assert loaded == [*names, names[1]]

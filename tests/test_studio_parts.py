"""The parts of the studio that need no page: what is kept, what may be trained on, what is told."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

gradio = pytest.importorskip("gradio", reason="the studio page needs the extra ui")

from controlkit import adapters, generate_models, infotext
from controlkit.studio import gallery, making
from controlkit.studio import page as studio_page
from controlkit.studio.engine import Engine
from controlkit.studio.uploads import Shown

# gradio (6.31) and what it is built on use what Starlette is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # its event loops are never closed
]


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


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the page's files lie."""
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(place))
    return place


@pytest.fixture
def built(tmp_path: Path, place: Path) -> Iterator[Any]:
    """The page, not served."""
    yield studio_page.build(Engine("tiny"), tmp_path / "runs")
    gc.collect()  # here, where the event loops that it leaves open are no error


def test_a_sheet_is_written_once_for_all_looks(tmp_path: Path, place: Path) -> None:
    sheet, shown = tmp_path / "step-10.png", Shown()
    sheet.write_bytes(b"first")
    first = shown.copy(sheet, "mine-step-10.png")
    assert first is not None
    assert Path(first).name == "mine-step-10.png"
    os.utime(first, (0, 0))
    assert shown.copy(sheet, "mine-step-10.png") == first
    assert Path(first).stat().st_mtime > 0, "one that is looked at grows old"
    sheet.write_bytes(b"another")
    second = shown.copy(sheet, "mine-step-10.png")
    assert second is not None
    assert second != first
    Path(second).unlink()
    assert Path(str(shown.copy(sheet, "mine-step-10.png"))).read_bytes() == b"another"
    sheet.unlink()
    assert shown.copy(sheet, "mine-step-10.png") is None
    assert len(list(place.rglob("*.png"))) == 2


def test_the_page_deletes_what_is_old_and_keeps_its_scenes(built: Any, place: Path) -> None:
    from gradio.route_utils import delete_files_created_by_app

    assert built.delete_cache is not None
    assert all(seconds > 0 for seconds in built.delete_cache)
    scenes = sorted(place.rglob("*.png"))
    assert len(scenes) > 1
    (place / "old.png").write_bytes(scenes[0].read_bytes())
    built.temp_file_sets[-1].add(str(place / "old.png"))
    delete_files_created_by_app(built, age=-1)
    assert sorted(place.rglob("*.png")) == scenes


def finished(runs: Path, name: str) -> Path:
    """The folder of a training that ended, as far as the page looks."""
    (runs / name / "controlnet").mkdir(parents=True)
    (runs / name / "config.toml").write_text('task = "controlnet"\nbase = "tiny"\nmap = "canny"\n')
    return runs / name


def test_a_page_that_is_loaded_knows_the_adapters_that_were_trained(built: Any, tmp_path: Path) -> None:
    result = finished(tmp_path / "runs", "mine") / "controlnet"
    loads = [one for one in built.fns.values() if (built._id, "load") in one.targets]
    (listed,) = [one for one in loads if {getattr(out, "label", "") for out in one.outputs} == {"Adapter"}]
    updates = listed.fn()
    assert len(updates) == len(listed.outputs) == 3
    assert all(("mine (canny)", str(result)) in update["choices"] for update in updates)


def test_an_error_while_making_is_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*values: Any) -> Any:
        raise RuntimeError("something of ours")

    made = making.Making(Engine("tiny"), tmp_path)
    monkeypatch.setattr(made, "_asked", broken)
    steps = made._make(SimpleNamespace(session_hash="one"), [])
    assert "Something went wrong inside (RuntimeError)" in next(steps)[0]
    with pytest.raises(gradio.Error, match="RuntimeError"):
        next(steps)
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [
        ("something of ours",)
    ]


def test_two_maps_of_one_kind_are_both_told() -> None:
    controls = tuple(
        infotext.ControlRecord("canny", "map.png", "", True, "canny", scale=scale) for scale in (0.5, 0.75)
    )
    record = infotext.PictureRecord(
        prompt="a cube", negative_prompt="", base="tiny", steps=1, scheduler="ddim", seed=0, controls=controls, guidance=1.0,
        width=64, height=64, device="cpu", dtype="float32", versions={},
    )  # fmt: skip
    told = gallery.about(record)
    assert told.count("<dt>canny</dt>") == 2
    assert "<dd>0.5</dd>" in told
    assert "<dd>0.75</dd>" in told

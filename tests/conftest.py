"""What all tests share: no network, no model cache of the developer's, quiet libraries."""

import asyncio
import atexit
import contextlib
import ctypes
import functools
import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer.testing
from outcomes import Outcome, Run

if TYPE_CHECKING:
    from controlkit.base import Base


def pytest_configure(config: pytest.Config) -> None:
    """Point the model hub at an empty cache and switch its network off, before any test imports it."""
    own = tempfile.mkdtemp(prefix="controlkit-tests-")
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    os.environ["HF_HOME"] = own
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_TOKEN"):
        os.environ.pop(name, None)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a fork after its use would warn
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # each has a core, which torch's threads would share
        tempfile.tempdir = os.environ["TMPDIR"] = own  # for what the libraries leave there
    # Built anew for each of some thousand runs, the command line takes as long as what many of them test.
    typer.testing._get_command = functools.cache(typer.testing._get_command)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect tests without Python's garbage collector, and then leave to it only what the tests make."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Give back what a slow test took: some take half of the memory, and another process runs beside."""
    yield
    if item.get_closest_marker("slow") is not None:
        with contextlib.suppress(OSError, AttributeError):  # of glibc alone, which keeps what was let go
            ctypes.CDLL(None).malloc_trim(0)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let go what was kept from the collector, once the program ends."""
    atexit.register(gc.unfreeze)


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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random-weight bases sd1/ and sdxl/ of 64 pixels, and a canny adapter for each."""
    import tiny_models

    from controlkit.adapters import MAPS, AdapterInfo, save_adapter
    from controlkit.base import load_base
    from controlkit.controlnet import from_base

    folder = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sdxl"):
        base = load_base(str(tiny_models.build(folder / family, family, sample_size=8)))
        controlnet = tiny_models.randomize_zero_convs(from_base(base, seed=1), seed=1)
        save_adapter(
            controlnet, folder / f"canny-{family}", info=AdapterInfo(map=MAPS["canny"], family=family)
        )
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture with edges, in a place whose name is not easy."""
    import numpy as np

    from controlkit.images import write_png

    path = tmp_path / "mein Bild #1 – été.png"
    picture = np.full((64, 64, 3), 40, np.uint8)
    picture[16:48, 20:44] = (200, 60, 90)
    write_png(path, picture)
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Run":
    """Run a command in an empty folder."""
    from typer.testing import CliRunner

    from controlkit.cli import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def generate(run: "Run", models: Path, photo: Path) -> "Run":
    """`controlkit generate` with the random SD1 base, one canny control and two steps, and more arguments."""
    adapter = f"canny={models / 'canny-sd1'}"
    fixed = [
        "generate",
        "a cube",
        "--base",
        models / "sd1",
        "--control",
        f"canny={photo}",
        "--adapter",
        adapter,
    ]
    return lambda *more: run(*fixed, "--steps", 2, *more)


@pytest.fixture(scope="module")
def page_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the studio's page has its files."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def loops() -> Iterator[None]:
    """The event loops that a page never closes end with it, where that is no error."""
    yield
    asyncio.set_event_loop(None)  # which would keep the last one
    gc.collect()


@pytest.fixture(scope="module")
def blocks(page_dir: Path, loops: None) -> Any:
    """The studio's page, not served; its runs are in `runs`."""
    from controlkit.studio import page
    from controlkit.studio.engine import Engine

    return page.build(Engine("tiny"), page_dir.with_name("runs"))

"""Stable Diffusion 1.5 at its true size, with random weights, from the command line to the file. Slow."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from typer.testing import CliRunner

from controlkit.adapters import MAPS, AdapterInfo, save_adapter
from controlkit.base import load_base
from controlkit.cli import app
from controlkit.controlnet import from_base
from controlkit.images import load_picture, write_png


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base sd15/ (2 GB) and an adapter canny/ (0.7 GB), both of random weights."""
    folder = tmp_path_factory.mktemp("sd15")
    tiny_models.build_sd15(folder / "sd15")
    base = load_base(str(folder / "sd15"), dtype=torch.float16)
    controlnet = tiny_models.randomize_zero_convs(from_base(base, seed=1), scale=0.01)
    info = AdapterInfo(map=MAPS["canny"], family="sd1", prediction_type="epsilon", resolution=512)
    save_adapter(controlnet, folder / "canny", info=info)
    return folder


@pytest.mark.slow
def test_generate_at_512(models: Path, tmp_path: Path) -> None:
    picture = np.full((1024, 1024, 3), 60, np.uint8)
    picture[256:768, 300:700] = (220, 180, 40)
    write_png(tmp_path / "photo.png", picture)
    request = [
        "generate",
        "a harbour",
        "--base",
        str(models / "sd15"),
        "--adapter",
        f"canny={models / 'canny'}",
    ]
    control = ["--control", f"canny={tmp_path / 'photo.png'}", "--steps", "2"]
    pictures = []
    for scale in ("1", "0"):
        output = tmp_path / f"scale-{scale}.png"
        arguments = [*request, *control[:1], f"{control[1]}:{scale}", *control[2:], "-o", str(output)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        pictures.append(load_picture(output))
    assert pictures[0].shape == (512, 512, 3)
    assert np.abs(pictures[0].astype(int) - pictures[1]).mean() > 1, "the control does nothing"

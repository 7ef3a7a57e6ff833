"""`controlkit generate --dtype`: what the networks compute in is chosen, recorded and repeated."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cases import seldom
from outcomes import Run

from controlkit import generate_job, infotext
from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.images import load_picture, read_png_text
from controlkit.preprocessors import get
from controlkit.sampling import generate as generate_pictures


def dtype_of(path: str) -> str:
    return infotext.parse(read_png_text(path), source=path).dtype


def test_networks_in_two_precisions_are_told_from_each_other(models: Path, photo: Path) -> None:
    base, half = (load_base(str(models / "sd1"), dtype=dtype) for dtype in ("fp32", "bf16"))
    adapter = load_adapter(str(models / "canny-sd1"), base=base, dtype="bf16")
    control = Control(adapter, photo)
    message = (
        r"^a control network computes in torch.bfloat16 and its base in torch.float32: load both in one"
        r' precision \(dtype="bf16"\), or generate within torch.autocast$'
    )
    with pytest.raises(ValueError, match=message):
        generate_pictures(base, "a cube", controls=[control], steps=1)
    assert generate_pictures(half, "a cube", controls=[control], steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generate_pictures(base, "a cube", controls=[control], steps=1)
    half.unet.float()
    with pytest.raises(ValueError, match=r"^the U-Net computes in torch.float32 and its base in torch.bfl"):
        generate_pictures(half, "a cube", steps=1)


def test_a_precision_is_used_recorded_and_repeated(
    generate: Run, run: Run, models: Path, photo: Path
) -> None:
    generate("--dtype", "bf16", "-o", "out.png").done()
    assert dtype_of("out.png") == "bfloat16"
    base = load_base(str(models / "sd1"), dtype=torch.bfloat16)
    adapter = load_adapter(str(models / "canny-sd1"), base=base, dtype=torch.bfloat16)
    control = Control(adapter, get("canny")(load_picture(photo)).image)
    (expected,) = generate_pictures(base, "a cube", controls=[control], steps=2)
    assert np.array_equal(load_picture("out.png"), expected)
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    run("generate", "--like", "out.png", "--dtype", "none", "-o", "usual.png").done()
    assert dtype_of("usual.png") == "float32"
    generate("-o", "plain.png").done()
    assert Path("usual.png").read_bytes() == Path("plain.png").read_bytes() != Path("out.png").read_bytes()


def test_an_unknown_precision_is_refused(generate: Run) -> None:
    refused = generate("--dtype", "fp61").refused()
    assert refused.endswith("unknown precision 'fp61' (did you mean 'fp16'?); choose from: bf16, fp16, fp32")
    refused = generate("--grid", "dtype=fp32,half").refused()
    assert refused.endswith("dtype cannot be 'half': it takes precisions, as fp16,bf16,fp32")


@pytest.mark.filterwarnings("default")  # the command tells it as a note
def test_half_precision_on_a_cpu_is_said_to_be_slow(generate: Run) -> None:
    assert "float16 is slow on a CPU" in generate("--dtype", "fp16").err


@pytest.mark.parametrize("can", [True, *seldom(False)])
@pytest.mark.slow
def test_a_lower_precision_is_proposed_where_it_is_fast_and_none_was_chosen(
    generate: Run, run: Run, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    monkeypatch.setattr(generate_job, "multiplies_bfloat16", lambda: can)
    assert ("--dtype bf16" in generate().done()) is can
    assert "--dtype" not in generate("--dtype", "fp32").done()
    assert "--dtype" not in run("generate", "a cube", "--steps", 1).done()  # the bundled base is too small

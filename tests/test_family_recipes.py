"""The recipes of the three families, from the first step to a picture, on tiny bases; a step at real size."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from killed_runs import write_pictures

from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.sampling import generate
from controlkit.training import train_recipe

RECIPES = {"sd1": "sd15-canny", "sd2": "sd21-canny", "sdxl": "sdxl-canny"}
SHORT = ["steps=2", "warmup=0", "batch_size=2", "accumulation=2", "device=cpu", "data.workers=0"]
SHORT += ["checkpoint_every=2", "sample_every=2", "monitor_every=2", "score_every=0", "score_scenes=0"]
SHORT += ["data.resolution=64", "data.bucket_step=16", "data.holdout=2", "log_every=1"]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in lines if "event" not in row]


def train(tmp_path: Path, family: str, *more: str) -> Path:
    """A recipe on a tiny base, for two steps."""
    write_pictures(tmp_path / "pictures", count=6)
    base, out = tmp_path / "base", tmp_path / "run"
    if not base.exists():
        tiny_models.build(base, family)
    changes = [*SHORT, f"base={base}", f"out={out}", f"data.source={tmp_path / 'pictures'}", *more]
    train_recipe(RECIPES[family], changes, progress=lambda step: None)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_familys_recipe_trains_and_its_result_draws(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    folder = train(tmp_path, family)
    assert len(losses(folder)) == 2
    assert np.isfinite(losses(folder)).all()
    base = load_base(str(tmp_path / "base"))
    adapter = load_adapter(str(folder / "controlnet"), base=base)
    assert (adapter.info.family, adapter.info.prediction_type) == (family, base.prediction_type)
    assert (base.prediction_type == "v_prediction") == (family == "sd2")
    edges = np.zeros((64, 64, 3), np.uint8)
    (picture,) = generate(base, "a cube", controls=[Control(adapter, edges)], steps=2, height=64, width=64)
    assert picture.shape == (64, 64, 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_result_is_loaded_by_a_diffusers_pipeline(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's lines, and the same latents as ours."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    folder = train(tmp_path, family)
    kind = StableDiffusionXLControlNetPipeline if family == "sdxl" else StableDiffusionControlNetPipeline
    controlnet = ControlNetModel.from_pretrained(folder / "controlnet", torch_dtype=torch.float32)
    rest = {} if family == "sdxl" else {"safety_checker": None}
    pipe = kind.from_pretrained(tmp_path / "base", controlnet=controlnet, **rest)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[10:14] = 255
    cond = torch.from_numpy(edges).permute(2, 0, 1)[None].float() / 255
    picture = pipe("a cube", image=cond, num_inference_steps=2, guidance_scale=5.0,
                   generator=torch.Generator().manual_seed(3), output_type="np").images[0]  # fmt: skip
    base = load_base(str(tmp_path / "base"))
    adapter = load_adapter(str(folder / "controlnet"), base=base)
    (ours,) = generate(
        base,
        "a cube",
        controls=[Control(adapter, edges)],
        steps=2,
        guidance=5.0,
        seeds=[3],
        height=64,
        width=64,
    )
    assert np.abs(ours / 255 - picture).max() < 0.01


@pytest.mark.slow
def test_a_step_of_sd15_at_its_real_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step on the processor, in bf16 as the recipe has it: 16 GB are enough."""
    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    tiny_models.build_sd15(tmp_path / "base")
    small = ["steps=1", "batch_size=1", "accumulation=1", "sample_every=0", "monitor_every=0"]
    folder = train(tmp_path, "sd1", *small, "checkpoint_every=1", "data.resolution=256")
    assert np.isfinite(losses(folder)).all()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    peak = max(line["peak_mb"] for line in lines if "peak_mb" in line)
    assert 5_000 < peak < 16_000
    assert (folder / "controlnet" / "diffusion_pytorch_model.safetensors").stat().st_size > 700e6

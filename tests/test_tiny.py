"""The bundled models: whole, small, loadable by other software, as good as their card says."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import controlkit
from controlkit import Control, generate, load_adapter, load_base
from controlkit.figures import render
from controlkit.preprocessors import get
from controlkit.training import train_recipe
from controlkit.training.bundle import all_runs, collect, quality_table
from controlkit.training.config import load_recipe, parse_recipe
from controlkit.training.quality import FOLLOWS, KINDS, Examination, examine

TINY = Path(controlkit.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.fixture(scope="module")
def quality():
    described = json.loads((TINY / "quality.json").read_text())
    return Examination(described["scenes"], described["scores"])


def test_all_weights_together_stay_below_40_megabytes():
    files = list(TINY.rglob("*.safetensors"))
    assert len(files) >= 8
    assert sum(path.stat().st_size for path in files) < 40e6
    assert not [path for path in TINY.rglob("*") if path.suffix in (".bin", ".pth", ".pt", ".pkl", ".ckpt")]


def test_every_weight_is_half_precision_and_finite():
    from safetensors.torch import load_file

    for path in TINY.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert not tensor.is_floating_point() or tensor.dtype == torch.float16, (path, name)
            assert not tensor.is_floating_point() or tensor.isfinite().all(), (path, name)


@pytest.mark.parametrize("run", all_runs())
def test_the_recipe_beside_the_weights_is_the_committed_one(run):
    beside = parse_recipe(tomllib.loads((TINY / "recipes" / f"{run}.toml").read_text()), where=run)
    free = {"out", "device", "threads", "log_every", "sample_every", "checkpoint_every", "score_scenes"}
    assert beside.model_dump(exclude=free) == load_recipe(run).model_dump(exclude=free)


def test_collecting_takes_the_last_results_or_nothing(tmp_path):
    runs, target = tmp_path / "runs", tmp_path / "tiny"
    for run in all_runs():
        shutil.copytree(TINY / "pose", runs / run / "result")
        shutil.copytree(TINY / "pose", runs / run / "controlnet")
        (runs / run / "config.toml").write_text(f'out = "{run}"')
    (runs / "bundled-depth-longer" / "controlnet" / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"no trained model in .*run `controlkit train bundled-depth-longer`"
    ):
        collect(runs, target)
    with pytest.raises(ValueError, match=r"unknown part 'bas' \(did you mean 'base'\?\)"):
        collect(runs, target, parts=["bas"])
    assert not target.exists()
    (runs / "bundled-base-longer" / "result" / "config.json").write_text('{"part": "second"}')
    collect(runs, target, parts=["base", "depth"])
    assert sorted(path.name for path in target.iterdir()) == ["base", "depth", "recipes"]
    assert json.loads((target / "base" / "config.json").read_text()) == {"part": "second"}
    kept = {path.stem for path in (target / "recipes").iterdir()}
    assert {"bundled-vae", "bundled-base", "bundled-base-longer", "bundled-depth-estimator"} < kept
    assert "bundled-depth" not in kept
    (runs / "bundled-text" / "config.toml").unlink()
    with pytest.raises(
        ValueError, match=r"no run in .*bundled-text: run `controlkit train bundled-text` first"
    ):
        collect(runs, target, parts=["base"])


def test_the_card_says_what_was_measured(quality):
    card = (TINY / "README.md").read_text()
    for table in quality_table(quality):
        assert table in card
    assert quality.scenes >= 200
    for run in all_runs():
        assert f"{run}.toml" in card


def test_adapters_follow_their_maps_far_better_than_the_prompt_alone(quality):
    assert quality.scores["canny"]["edge F1"] > 1.5 * quality.scores["floor"]["edge F1"]
    for kind in KINDS:
        assert quality.scores[kind]["silhouette IoU"] > 2 * quality.scores["floor"]["silhouette IoU"]
    assert quality.scores["openpose"]["joints"] > 2 * quality.scores["floor"]["joints"]


@pytest.mark.slow
def test_a_fresh_measurement_agrees_with_the_card(base, quality):
    adapters = {kind: load_adapter(kind, base=base) for kind in KINDS}
    now = examine(base, adapters, scenes=4)
    for kind in KINDS:
        score = FOLLOWS[kind]
        spread = 0.25 if kind != "depth" else 0.1
        assert now.scores[kind][score] == pytest.approx(quality.scores[kind][score], abs=spread), kind


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_the_base_and_each_adapter_as_they_are(base, kind):
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    controlnet = ControlNetModel.from_pretrained(TINY / f"controlnet-{kind}", local_files_only=True)
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        TINY / "base", controlnet=controlnet, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    scene = render(3)
    image = get("canny")(scene.picture).image
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        scene.caption,
        image=torch.from_numpy(image).permute(2, 0, 1)[None] / 255.0,
        num_inference_steps=4,
        guidance_scale=4.0,
        latents=latents,
        output_type="np",
    ).images[0]
    control = Control(load_adapter(kind, base=base), image)
    ours = generate(base, scene.caption, controls=[control], steps=4, guidance=4.0, seeds=[5])[0]
    assert np.abs(theirs * 255.0 - ours).max() <= 1.0


def test_the_same_seed_gives_the_same_picture(base):
    scene = render(3)
    control = Control(load_adapter("depth", base=base), get("depth", model="tiny")(scene.picture).image)
    options = {"controls": [control], "steps": 3}
    alone = generate(base, scene.caption, seeds=[8], **options)[0]
    several = generate(base, scene.caption, seeds=[7, 8, 9], **options)
    np.testing.assert_array_equal(alone, several[1])
    assert (several[0] != several[1]).any()


def test_any_prompt_works(base):
    for prompt in ("", "héllo 世界 🙂", "a red figure " * 60):
        if prompt.count("red") > 30:
            with pytest.warns(UserWarning, match="77 tokens"):
                picture = generate(base, prompt, steps=1)[0]
        else:
            picture = generate(base, prompt, steps=1)[0]
        assert picture.shape == (128, 128, 3)


@pytest.mark.slow
def test_an_adapter_trains_on_a_locked_base_and_loads_everywhere(tmp_path, monkeypatch):
    from diffusers import ControlNetModel

    from controlkit.training import adapter

    monkeypatch.setenv("CONTROLKIT_CACHE", str(tmp_path / "cache"))
    loaded = []
    real = adapter.load_base
    monkeypatch.setattr(adapter, "load_base", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[-1])
    before = load_base("tiny").digest()
    options = [
        f"out={tmp_path / 'run'}",
        "steps=3",
        "warmup=1",
        "scenes=8",
        "batch_size=2",
        "sample_every=3",
        "score_scenes=1",
    ]
    result = train_recipe("tiny-canny", options)
    assert loaded[0].digest() == before
    assert (tmp_path / "run" / "samples" / "step-000003.png").is_file()
    written = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert written["canny"] == result.scores
    assert 0 < result.scores["edge F1"] < written["ceiling"]["edge F1"]
    assert any("edge F1" in line for line in result.lines)
    base = load_base("tiny")
    mine = load_adapter(str(result.result), base=base)
    assert mine.info.map.kind == "canny"
    assert mine.info.prediction_type == "v_prediction"
    theirs = ControlNetModel.from_pretrained(result.result, local_files_only=True)
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor.float(), mine.controlnet.state_dict()[key].float()), key
    assert theirs.controlnet_mid_block.weight.abs().max() > 0


def test_the_card_names_no_machine():
    assert not re.search(r"(^|[\s`(\"'])(/\w+/|[A-Z]:\\)", (TINY / "README.md").read_text())

"""Plans: what a training needs, predicted without weights, against counts, identities and a real training."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny_models import SD15_TEXT, SD15_UNET, SD15_VAE, SDXL_UNET, UNETS, build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from controlkit.free_memory import available_memory
from controlkit.training import planning, planning_parts, planning_speed, previews
from controlkit.training.config import load_recipe
from controlkit.training.data.examples import ArrayPiece, Example
from controlkit.training.data.visits import Visits
from controlkit.training.planning import (
    batch_need,
    find_batch,
    is_out_of_memory,
    plan,
    try_batches,
)
from controlkit.training.planning_memory import (
    Ledger,
    Like,
    Moment,
    Operation,
    Simulated,
    optimizer_bytes,
    simulate,
)
from controlkit.training.planning_networks import build as build_networks
from controlkit.training.planning_networks import simulate_step
from controlkit.training.planning_parts import Place, count_memory


def recipe(**changes):
    return load_recipe("tiny-canny").model_copy(update=changes)


def config_only(folder, *, unet, vae=SD15_VAE, texts=(SD15_TEXT,)):
    """A base's folder with configurations and no weights: whatever reads a weight fails on it."""
    classes = [CLIPTextModel, CLIPTextModelWithProjection]
    with torch.device("meta"):
        UNet2DConditionModel(**unet).save_config(folder / "unet")
        AutoencoderKL(**vae).save_config(folder / "vae")
    for name, cls, text in zip(("text_encoder", "text_encoder_2"), classes, texts, strict=False):
        CLIPTextConfig(**text, architectures=[cls.__name__]).save_pretrained(folder / name)
    (folder / "model_index.json").write_text("{}")
    return str(folder)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    return config_only(tmp_path_factory.mktemp("sd15"), unet=SD15_UNET)


# --- counted ---


@pytest.mark.slow
def test_sd15s_parameters_and_flops_are_those_known(sd15):
    networks = build_networks(recipe(base=sd15))
    counts = [sum(p.numel() for p in m.parameters()) for m in (networks.unet, networks.controlnet)]
    assert counts == [859_520_964, 361_279_120]
    with torch.device("meta"):
        text = CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    assert networks.text_parameters == sum(p.numel() for p in text.parameters())

    step = simulate_step(networks, recipe(base=sd15, batch_size=1), width=512, height=512)
    assert sum(step.flops().values()) == pytest.approx(2330e9, rel=0.02)  # counted for the usual step
    assert set(step.flops()) == {"convolution", "matmul", "attention"}
    # Adam's two moments of every weight, in fp32.
    assert optimizer_bytes("adamw", list(networks.controlnet.parameters())) == (8 * 361_279_120, 0)


@pytest.mark.slow
def test_sdxl_is_planned(tmp_path):
    base = config_only(
        tmp_path / "sdxl", unet=SDXL_UNET, texts=(SD15_TEXT, {**SD15_TEXT, "projection_dim": 512})
    )
    networks = build_networks(recipe(base=base))
    assert sum(p.numel() for p in networks.controlnet.parameters()) == pytest.approx(1251e6, rel=0.001)
    # A quarter of 1024x1024's pixels: convolutions and projections quarter, attention less than that.
    step = simulate_step(networks, recipe(base=base, batch_size=1), width=512, height=512)
    assert 0.2 * 20.4e12 < sum(step.flops().values()) < 0.25 * 20.4e12


WAYS = [
    ("sd1", {"sd_locked": False}),
    ("sd2", {"only_mid_control": True}),
    ("sdxl", {"precision": "bf16"}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "changes"), WAYS)
def test_every_family_and_way_of_training_is_planned(family, changes, tmp_path):
    r = recipe(base=str(build(tmp_path / family, family)), batch_size=2, **changes)
    networks = build_networks(r)
    step = simulate_step(networks, r, width=128, height=128)
    trained = sum(p.numel() for p in networks.controlnet.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in networks.controlnet.parameters())
    assert (trained < everything) == r.only_mid_control
    assert step.saved > 0
    assert step.worst.total >= step.saved


@pytest.mark.slow
def test_a_reward_is_counted_and_holds_one_picture_whatever_the_batch():
    without, one, many, recomputed = (
        count(recipe(batch_size=size, **changes))
        for size, changes in (
            (1, {}),
            (1, {"reward": 0.5}),
            (8, {"reward": 0.5}),
            (1, {"reward": 0.5, "gradient_checkpointing": True}),
        )
    )
    assert "reward" not in without
    assert 0 < one["reward"] < 2**26
    assert many["reward"] <= one["reward"]
    assert recomputed["reward"] < one["reward"]


def count(r):
    """Bytes of the training phase, by what they are for, on a GPU."""
    networks = build_networks(r)
    step = simulate_step(networks, r, width=128, height=128)
    return count_memory(networks, r, step, Place("cuda", 0, 1, 128, 128)).parts


def test_what_is_saved_is_what_autograd_says_it_saves():
    mode = FakeTensorMode()
    with mode, torch.device("cpu"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3))
        x = torch.empty(2, 3, 16, 16)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        saved = {}

        def note(tensor):
            if tensor.untyped_storage()._cdata not in weights | {x.untyped_storage()._cdata}:
                saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = net(x).sum()
        expected = sum(storage.nbytes() for storage in saved.values()) + loss.untyped_storage().nbytes()
        del loss
        assert simulate(lambda: net(x).sum(), [net]).saved == expected


def test_the_ledger_notes_what_comes_and_goes():
    with FakeTensorMode(), torch.device("cpu"):
        known = torch.empty(1000)
        with Ledger([known]) as ledger:
            a = known + 1  # 4000 bytes
            b = a.view(10, 100) * 2  # 4000 more; the view is none
            del a
            assert ledger.live == 4000
            c = b + 1
            del b, c
        assert ledger.live == 0
        assert ledger.worst.total == 8000


def test_gradients_stay_where_steps_have_several_micro_batches():
    with FakeTensorMode(), torch.device("cpu"):
        net = nn.Linear(100, 100, bias=False)
        x = torch.empty(1, 100)
        alone = simulate(lambda: net(x).sum(), [net])
        held = simulate(lambda: net(x).sum(), [net], gradients_there=True)
    # The gradient of before, and the new one beside it until it is added.
    assert held.worst.total - alone.worst.total == 40_000
    assert held.saved == alone.saved


@pytest.mark.slow
def test_checkpointing_keeps_less_and_computes_more():
    plain, again = (recipe(batch_size=4, gradient_checkpointing=flag) for flag in (False, True))
    steps = [simulate_step(build_networks(r), r, width=128, height=128) for r in (plain, again)]
    assert steps[1].saved < 0.6 * steps[0].saved
    assert sum(steps[1].flops().values()) > sum(steps[0].flops().values())


def test_optimizers_keep_what_they_say():
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((64, 32, 3, 3), (128, 64), (128,))]
    for name, make in (
        ("adamw", lambda p: torch.optim.AdamW(p, fused=True)),
        ("adafactor", torch.optim.Adafactor),
    ):
        optimizer = make(parameters)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values()]
        kept = sum(value.nbytes for value in states if torch.is_tensor(value) and value.dim())
        assert optimizer_bytes(name, parameters)[0] == kept


# --- the plan ---


@pytest.fixture(scope="module")
def tiny_plan():
    return plan(recipe(batch_size=4), pictures=1000)


def test_a_plans_parts_add_up_and_are_told(tiny_plan):
    memory = tiny_plan.memory
    assert memory.total == sum(memory.parts.values()) == max(memory.phases.values())
    assert set(memory.phases) == {"encoding", "training", "sampling"}
    trained = tiny_plan.parameters["trained"]
    assert memory.parts["optimizer (adamw)"] == 8 * trained == 2 * memory.parts["moving average"]
    assert tiny_plan.step_s > 0
    assert tiny_plan.encoding_s > 0
    assert tiny_plan.fits is (memory.total <= tiny_plan.resident + tiny_plan.free)
    text = "\n".join(tiny_plan.lines())
    for word in ("GB", "steps/s", "pairs/s", "GFLOP", "it fits", "128x128"):
        assert word in text
    told = json.loads(json.dumps(tiny_plan.as_dict()))
    assert told["total_bytes"] == memory.total
    assert told["samples_per_s"] == pytest.approx(4 / tiny_plan.step_s)


@pytest.mark.slow
def test_what_encodes_stays_whole_in_half_precision(tmp_path):
    r = recipe(base=str(build(tmp_path / "base", "sd1", layers=1)), precision="bf16")
    networks = build_networks(r)
    step = simulate_step(networks, r, width=128, height=128)
    parts = count_memory(networks, r, step, Place("cpu", 0, 1, 128, 128)).parts
    assert parts["autoencoder"] == 4 * sum(p.numel() for p in networks.vae.parameters())
    assert parts["text encoders"] == 4 * networks.text_parameters
    unet = 4 * sum(p.numel() for p in networks.unet.parameters())
    assert parts["locked U-Net"] < unet
    encoders = parts["autoencoder"] + parts["text encoders"]
    for device, besides in (
        ("cpu", planning_parts._FIRST_USE + unet),  # which is halved when all is encoded
        ("cuda", planning_parts._CUDA_CONTEXT),  # to which the U-Net comes then
    ):
        place = Place(device, 0, 1, 128, 128)
        work = planning_parts._encoding(networks, place)
        assert count_memory(networks, r, step, place).phases["encoding"] == besides + encoders + work


@pytest.mark.parametrize("name", ["", "_backward"])
def test_attention_is_timed_on_a_device_that_is_no_cpu(name, monkeypatch):
    monkeypatch.setattr(planning_speed, "_synchronize", lambda device: None)
    function = getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{name}").default
    tensor = Like((1, 2, 16, 8), (256, 128, 8, 1), torch.float32)
    sums = Like((1, 2, 16), (32, 16, 1), torch.float32)
    given = (*[tensor] * 5, sums, 0.0, False) if name else (*[tensor] * 3, 0.0, False)
    operation = Operation(function, given, {}, "attention", 1000, 0, 0, 1)
    speed = planning_speed.measure_speed(Simulated(Moment(), 0, [operation], 1), "meta")
    assert speed.seconds["attention"] > 0


@pytest.mark.slow
def test_what_a_gpu_holds_besides_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(planning_parts, "available_memory", lambda device: 10**9)
    base = str(build(tmp_path / "base", "sd1"))

    def parts(pictures, **changes):
        data = changes.pop("data", {})
        r = recipe(base=base, **changes)
        r = r.model_copy(update={"data": r.data.model_copy(update=data)})
        networks = build_networks(r)
        step = simulate_step(networks, r, width=128, height=128)
        place = Place("cuda", 0, 1, 128, 128, pictures)
        return count_memory(networks, r, step, place).parts, step

    usual, _ = parts(None)
    assert "recorded graphs" not in usual
    assert "data on the device" not in usual
    graphs, step = parts(None, cuda_graph=True)
    assert graphs["recorded graphs"] == step.worst.saved + step.worst.workspace
    assert parts(1000)[0]["data on the device"] == 1000 * (
        2 * (2 * 4 * 16 * 16 + 77 * 32) + 3 * 128 * 128  # mean and spread, text, map
    )
    assert "data on the device" not in parts(10_000)[0]  # more than a quarter of what is free
    assert "data on the device" in parts(10_000, data={"resident": True})[0]
    assert "data on the device" not in parts(1000, data={"resident": False})[0]


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would(monkeypatch):
    r = recipe(batch_size=64, ema=0.0)
    monkeypatch.setattr("controlkit.training.planning.available_memory", lambda device: 500 * 10**6)
    tight = plan(r)
    assert not tight.fits
    settings = {other.setting: other for other in tight.alternatives}
    assert list(settings)[:4] == [
        "gradient_checkpointing=true",
        "batch_size=32 accumulation=2",
        "precision=bf16",
        "optimizer=adamw8bit",
    ]
    assert all(other.total < tight.memory.total for other in tight.alternatives)
    assert tight.alternatives[-1].total == min(other.total for other in tight.alternatives)
    assert "does not fit" in "\n".join(tight.lines())


def test_a_base_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="no base called"):
        plan(recipe(base="tinny"))


@pytest.mark.slow
def test_need_grows_with_the_batch_as_full_plans_do(monkeypatch):
    for measured in ("imported_bytes", "resident_memory"):  # or a speed measured in between counts, too
        monkeypatch.setattr(planning, measured, lambda: 600_000_000)
    r = recipe(batch_size=24, checkpoint_every=400, steps=400)
    need = batch_need(r, size=(128, 128))
    full = plan(r)
    assert need(24) == pytest.approx(full.memory.total - full.resident, rel=0.05)


# --- trying batches ---


def allocating(limit, tried):
    def try_batch(size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError(f"tried to allocate {size}")

    return try_batch


@pytest.mark.parametrize(
    ("limit", "start"),
    [
        (1, 4),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((7, 1), (3, 4), (13, 4), (64, 64))),
    ],
)
def test_the_largest_batch_is_found(limit, start):
    tried = []
    assert find_batch(allocating(limit, tried), start=start, limit=64) == limit
    assert max(tried) <= 64


def test_no_batch_at_all_is_said():
    with pytest.raises(ValueError, match="not even one pair"):
        find_batch(allocating(0, []), start=4, limit=64)


@pytest.mark.slow
def test_predicted_memory_decides_before_anything_is_tried():
    tried = []
    found = find_batch(
        allocating(10**9, tried), start=2, limit=64, need=lambda size: 10 * size, available=100
    )
    assert found == max(tried) == 8  # 80 of the 85 that are planned with


def test_other_errors_are_not_taken_for_a_full_memory():
    def broken(size):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        find_batch(broken, start=1, limit=4)


@pytest.mark.slow
def test_speeds_are_told_and_the_fastest_can_be_had():
    import time

    def slower(size):  # four samples take as long as one, more take very much longer
        time.sleep(0.004 if size <= 4 else 0.004 * size)

    batches = try_batches(slower, start=2, limit=8)
    assert (batches.largest, batches.fastest) == (8, 4)
    assert batches.lines()[-1] == "largest: 8; fastest: 4"
    assert find_batch(slower, start=4, limit=8, prefer="fastest") == 4


def test_a_full_memory_is_recognised():
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(full.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as other:
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not is_out_of_memory(other.value)
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA driver error: out of memory",
        "MPS backend out of memory (MPS allocated: 17 GB)",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED..",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_a_full_memory_is_recognised_by_what_libraries_say_of_it(message):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_free_memory_is_known_on_linux():
    if sys.platform == "linux":
        assert 10**8 < available_memory("cpu") < 10**14
    assert available_memory("meta") is None


# --- against a real training ---

_TRAIN = """
import json, sys
import torch
from controlkit.training.config import load_recipe
from controlkit.training.planning import plan
from controlkit.training import train_recipe
from controlkit.training.memory import peak_mb
overrides = json.loads(sys.argv[1])
predicted = plan(load_recipe("tiny-canny", overrides)).memory.total
train_recipe("tiny-canny", overrides)
print(json.dumps([predicted, 1e6 * peak_mb(torch.device("cpu"))]))
"""


def predicted_and_measured(tmp_path, *overrides):
    fixed = ["steps=3", "warmup=1", "scenes=60", "data.check=false", "score_scenes=0", "monitor_every=0"]
    fixed += ["sample_every=1000", "checkpoint_every=1000", f"out={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, "-c", _TRAIN, json.dumps([*fixed, *overrides])],
        env={**os.environ, "CONTROLKIT_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_rss = pytest.mark.skipif(sys.platform != "linux", reason="memory is read in Linux's way")


@needs_rss
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [4, 64])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_memory_is_within_15_percent_of_a_tiny_training(tmp_path, batch_size, checkpointing):
    changes = [f"batch_size={batch_size}", f"gradient_checkpointing={checkpointing}"]
    predicted, measured = predicted_and_measured(tmp_path, *changes)
    assert predicted == pytest.approx(measured, rel=0.15)


@needs_rss
@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["batch_size=16"],
        ["batch_size=16", "gradient_checkpointing=true", "ema=0"],
        ["batch_size=16", "precision=bf16"],
    ],
)
def test_memory_is_within_15_percent_of_a_training_of_34_million_parameters(tmp_path, changes):
    widths = {"block_out_channels": (64, 128, 256, 256), "norm_num_groups": 32, "attention_head_dim": 8}
    base = build(tmp_path / "base", "sd1")
    UNet2DConditionModel(**{**UNETS["sd1"], "sample_size": 16, **widths}).save_pretrained(base / "unet")
    predicted, measured = predicted_and_measured(tmp_path, f"base={base}", *changes)
    assert predicted == pytest.approx(measured, rel=0.15)


def test_data_that_is_not_there_is_not_planned_for(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the data set .*/nothing does not exist"):
        previews.plan_recipe("tiny-canny", [f"data.source={tmp_path}/nothing"])


@pytest.mark.parametrize(
    ("changes", "faces"),
    [
        ([], 1),
        (["data.flip=1"], 1),
        (["data.flip=0.5", "data.crop=random", "data.crops=8", "data.resolution=64"], 2),
        (["data.flip=0.5", "data.buckets=true", "data.bucket_step=16", "data.crop=random"], 2),
    ],
)
def test_of_the_world_every_view_is_planned_for(changes, faces) -> None:
    """As many as a training encodes: mirrored pictures are others, crops of squares are not."""
    settings = load_recipe("tiny-canny", ["scenes=10", "data.holdout=2", *changes])
    piece = ArrayPiece(np.zeros((128, 128, 3), np.uint8))
    examples = [Example("scene", piece, "", maps=(piece,))] * 12
    visits = Visits(examples, [(128, 128)] * 12, data=settings.data, kind="canny", resolution=128, seed=1)
    assert previews._views(settings) == 12 * faces == sum(len(visits.views(index)) for index in range(12))


def test_what_does_not_train_here_is_not_planned_for() -> None:
    with pytest.raises(ValueError, match="precision fp16 needs a CUDA device"):
        previews.plan_recipe("tiny-canny", ["precision=fp16", "device=cpu"])

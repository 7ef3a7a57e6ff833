"""The reward for pictures that have the map they were given: its gradients, what it favours, the training."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import prepared, recipe
from safetensors.torch import load_file

from controlkit import images
from controlkit.base import load_base
from controlkit.figures import render
from controlkit.metrics import depth_rmse_255, edge_f1
from controlkit.preprocessors import get
from controlkit.preprocessors.depthnet import DepthNetwork
from controlkit.preprocessors.weights import find_model
from controlkit.training import train_recipe
from controlkit.training.adapter import ControlNetTask
from controlkit.training.config import load_recipe
from controlkit.training.machine import Machine
from controlkit.training.noising import Noisy
from controlkit.training.reward import Reward
from controlkit.training.soft_maps import depth_missed, edges_missed, soft_edges
from controlkit.training.world import exact_map

KINDS = ("canny", "depth")


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the maps ---


def test_the_gradient_of_the_edges_is_right():
    wanted = (noise(1, 4, 3, seed=1) > 0.7).double()
    pictures = noise(1, 3, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: edges_missed(soft_edges(p, low=100, high=200), wanted), (pictures,)
    )


def test_the_gradient_of_the_depth_comparison_is_right():
    wanted = noise(2, 4, 5, seed=1)
    for sign in (1, -1):  # also where near and far are exchanged
        depth = (sign * wanted + 0.5 * noise(2, 4, 5)).requires_grad_()
        assert torch.autograd.gradcheck(lambda d: depth_missed(d, wanted), (depth,))


def test_soft_edges_are_where_canny_finds_edges():
    scores = []
    for k in range(4):
        picture = render(k, split="validation").picture
        soft = soft_edges(images.picture_to_tensor([picture]) / 2 + 0.5, low=100, high=200)[0]
        ours = np.pad((soft > 0.5).numpy(), 1)  # two pixels thick
        scores.append(edge_f1(ours, get("canny")(picture).image[..., 0], tolerance=1).f1)
    assert min(scores) > 0.9, scores


def test_the_comparison_of_edges_is_between_0_and_1_and_orders_what_it_compares():
    wanted = torch.zeros(1, 20, 20)
    wanted[:, 10] = 1
    beside, away, none = wanted.roll(1, 1), wanted.roll(4, 1), torch.zeros_like(wanted)
    found = [float(edges_missed(edges, wanted)) for edges in (wanted, beside, away, none)]
    assert found[:2] == [0.0, 0.0]  # a pixel is within the tolerance
    assert 0.9 < found[2] < 1
    assert 0.9 <= found[3] < 1
    assert float(edges_missed(none, none)) == 0.0


def test_a_map_without_edges_asks_for_a_picture_without_edges():
    edges = noise(1, 8, 8).requires_grad_()
    missed = edges_missed(edges, torch.zeros(1, 8, 8, dtype=edges.dtype))
    missed.sum().backward()
    assert 0 < missed < 1
    assert (edges.grad > 0).all()


def test_depth_is_compared_up_to_scale_and_shift():
    wanted = noise(1, 8, 8)
    assert float(depth_missed(3 * wanted + 5, wanted)) == pytest.approx(0, abs=1e-9)
    assert float(depth_missed(-wanted, wanted)) == pytest.approx(2)
    assert 0.5 < float(depth_missed(noise(1, 8, 8, seed=1), wanted)) < 1.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_depth_is_no_number_out_of_range(dtype):
    flat, slope = torch.full((1, 8, 8), 0.3, dtype=dtype), noise(1, 8, 8, dtype=dtype)
    for depth, wanted in ((flat, slope), (slope, flat), (flat, flat)):
        depth = depth.clone().requires_grad_()
        missed = depth_missed(depth, wanted)
        missed.sum().backward()
        assert float(missed.detach()) == pytest.approx(1, abs=1e-4)
        assert bool(torch.isfinite(depth.grad).all())


@pytest.mark.parametrize(("height", "width"), [(128, 128), (96, 144), (64, 64)])
def test_the_differentiable_depth_is_the_preprocessors(height, width):
    network = DepthNetwork("tiny", device="cpu", precision="fp32")
    picture = images.resize(render(3).picture, width, height)
    (expected,) = network.inverse_depth([picture])
    found = network.differentiable(images.picture_to_tensor([picture]) / 2 + 0.5)
    np.testing.assert_allclose(found[0].numpy(), expected, atol=0.02)
    assert np.corrcoef(found[0].numpy().ravel(), expected.ravel())[0, 1] > 0.9999


# --- the whole chain, on the bundled base ---


def settings(kind, *changes):
    return load_recipe(f"tiny-{kind}", ["reward=1", "reward_below=1", *changes])


@pytest.fixture(scope="module")
def base():
    return load_base("tiny")


@pytest.fixture(scope="module")
def scenes():
    return [render(k, split="validation") for k in range(4)]


def maps(kind, scenes):
    return [exact_map(kind, s.picture, s.joints, s.inverse_depth) for s in scenes]


def rewarded(kind, base, *changes):
    return Reward(settings(kind, *changes), base, base.alphas_cumprod)


@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_from_the_prediction_to_the_loss(kind):
    base = load_base("tiny", dtype=torch.float64)
    reward = rewarded(kind, base)
    if kind == "depth":
        network = DepthNetwork("tiny", device="cpu", precision="fp32")
        network._network.double()
        reward.missed = lambda pictures, wanted: depth_missed(network.differentiable(pictures), wanted)
    latents, model_pred, away = (2 * noise(2, 4, 4, 4, seed=k) - 1 for k in range(3))
    noisy = Noisy(latents, torch.tensor([300, 40]), latents, latents)
    cond = (noise(2, 1, 32, 32, seed=5) > 0.8).double().expand(-1, 3, -1, -1)
    weights = torch.tensor([0.7, 2.0], dtype=torch.float64)

    def loss(pred):
        rows, missed = reward(pred, noisy, cond, 0)
        assert rows.tolist() == [0, 1]
        return (weights * missed).sum()

    model_pred.requires_grad_()
    loss(model_pred).backward()
    epsilon = 1e-6
    with torch.no_grad():
        slope = (loss(model_pred + epsilon * away) - loss(model_pred - epsilon * away)) / (2 * epsilon)
    assert float(slope) != 0
    assert float((model_pred.grad * away).sum()) == pytest.approx(float(slope), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_true_picture_misses_less_than_others(kind, base, scenes):
    latents = base.encode_pictures(images.picture_to_tensor([scene.picture for scene in scenes]))
    cond = images.map_to_cond(maps(kind, scenes))
    reward = rewarded(kind, base)
    true = reward.of_latents(latents, cond)
    for turn in (1, 2, 3):
        assert (true < reward.of_latents(latents.roll(turn, 0), cond) - 0.05).all()


def descend(reward, latents, cond, *, steps, rate=0.08):
    latents = latents.clone().requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=rate)
    for _ in range(steps):
        reward.of_latents(latents, cond).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return latents.detach()


@pytest.mark.slow
def test_a_picture_that_follows_the_rewards_gradient_gets_the_maps_edges(base, scenes):
    wanted, others = maps("canny", scenes[:2]), [scene.picture for scene in scenes[2:]]
    start = base.encode_pictures(images.picture_to_tensor(others))
    found = descend(rewarded("canny", base), start, images.map_to_cond(wanted), steps=25)
    before, after = (
        np.mean([edge_f1(get("canny")(p).image, m).f1 for p, m in zip(pictures, wanted, strict=True)])
        for pictures in (others, images.tensor_to_pictures(base.decode_latents(found)))
    )
    assert before < 0.4
    assert after > 0.65


@pytest.mark.slow
def test_a_picture_that_follows_the_rewards_gradient_gets_the_maps_depth(base, scenes):
    (wanted,), other = maps("depth", scenes[:1]), scenes[2].picture
    start = base.encode_pictures(images.picture_to_tensor([other]))
    found = descend(rewarded("depth", base), start, images.map_to_cond([wanted]), steps=25)
    (picture,) = images.tensor_to_pictures(base.decode_latents(found))
    before, after = (depth_rmse_255(get("depth", model="tiny")(p).image, wanted) for p in (other, picture))
    assert after < before / 2


def test_a_pair_gets_the_same_whatever_stands_beside_it(base, scenes):
    latents = base.encode_pictures(images.picture_to_tensor([scene.picture for scene in scenes]))
    cond, reward = images.map_to_cond(maps("canny", scenes)), rewarded("canny", base)
    together = latents.clone().requires_grad_()
    values = reward.of_latents(together, cond)
    values.sum().backward()
    for k in range(len(latents)):
        alone = latents[k : k + 1].clone().requires_grad_()
        value = reward.of_latents(alone, cond[k : k + 1])
        value.sum().backward()
        assert torch.equal(value, values[k : k + 1])
        assert torch.equal(alone.grad, together.grad[k : k + 1])


def test_recomputing_the_decoder_changes_no_gradient(scenes):
    found = []
    for change in ("gradient_checkpointing=false", "gradient_checkpointing=true"):
        base = load_base("tiny")
        latents = base.encode_pictures(images.picture_to_tensor([scenes[0].picture])).requires_grad_()
        reward = rewarded("canny", base, change)
        reward.of_latents(latents, images.map_to_cond(maps("canny", scenes[1:2]))).sum().backward()
        found.append(latents.grad)
    torch.testing.assert_close(*found)


def test_only_low_noise_is_looked_at_and_not_before_it_begins(base):
    reward = rewarded("canny", base, "reward_below=0.2", "reward_from=3")
    timesteps = torch.tensor([0, 199, 200, 999, 5])
    assert reward.rows(timesteps, 2).tolist() == []
    assert reward.rows(timesteps, 3).tolist() == [0, 1, 4]


def test_thresholds_are_those_that_the_maps_are_made_with(base, scenes):
    picture, wanted = images.picture_to_tensor([scenes[0].picture]) / 2 + 0.5, noise(1, 128, 128).float()
    for options, (low, high) in (
        ({}, (100, 200)),
        ({"low": "50..150", "high": [150, 300]}, (100, 225)),
        ({"low": 20, "high": 40.0}, (20, 40)),
    ):
        told = settings("canny")
        told = told.model_copy(update={"data": told.data.model_copy(update={"options": options})})
        expected = edges_missed(soft_edges(picture, low=low, high=high), wanted[:, 1:-1, 1:-1])
        assert torch.equal(Reward(told, base, base.alphas_cumprod).missed(picture, wanted), expected)


# --- recipes ---


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("openpose", ["reward=1"], "reward is there for maps of canny and depth, not 'openpose'"),
        ("canny", ["reward=-1"], "reward: .* greater than or equal to 0"),
        ("canny", ["reward=inf"], "reward: "),
        ("canny", ["reward=1", "reward_below=1.5"], "reward_below: "),
        ("canny", ["reward=1", "reward_below=0"], "reward_below=0 looks at no picture"),
        ("canny", ["reward=1", "reward_from=250"], "reward_from=250 comes after the last step, steps=250"),
        ("canny", ["reward=1", "data.options.l2=true"], "follows low and high .* data.options has l2"),
        ("depth", ["reward=1", 'data.map_column=["a", "b"]'], "one map, and data.map_column has several"),
    ],
)
def test_recipes_that_cannot_be_rewarded_are_refused_in_one_line(kind, overrides, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(f"tiny-{kind}", overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("low", ["abc", "1..x", [1, 2, 3], float("inf")])
def test_thresholds_that_are_none_are_refused_in_one_line(base, low):
    told = settings("canny")
    told = told.model_copy(update={"data": told.data.model_copy(update={"options": {"low": low}})})
    with pytest.raises(ValueError, match=r"data.options.low is .*; a threshold is a number or a range"):
        Reward(told, base, base.alphas_cumprod)


def test_without_a_reward_its_other_keys_are_not_looked_at():
    assert load_recipe("tiny-openpose", ["reward_below=0", "reward_from=9999"]).reward == 0


def test_stacked_maps_are_refused(base):
    with pytest.raises(ValueError, match="reward compares one map, and the data's have 6 channels"):
        rewarded("depth", base).check(6)


def test_depth_models_that_cannot_be_followed_are_refused(base, tmp_path):
    folder = shutil.copytree(find_model("depth", "tiny", {}), tmp_path / "padding")
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"do_pad": True}))
    told = settings("depth", "base=elsewhere")

    def reward(model):
        data = told.data.model_copy(update={"options": {"model": model}})
        return Reward(told.model_copy(update={"data": data}), base, base.alphas_cumprod)

    with pytest.raises(ValueError, match=r"reward cannot follow the depth model .* pads its pictures"):
        reward(str(folder))
    with pytest.raises(ValueError, match="no depth model called 'tinny'"):
        reward("tinny")
    assert reward("tiny").missed is not None


# --- training ---


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, a base of random weights, and a cache for the runs of this module."""
    folder = tmp_path_factory.mktemp("reward")
    prepared(folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def written(place, name, **changes):
    told = {"steps": 3, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99}
    return recipe(place / name, place / "pictures", **(told | {"log_every": 1, "ema": 0.0} | changes))


def run(place, name, **changes):
    train_recipe(str(written(place, name, **changes)))
    return place / name


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = {"samples_per_s", "seconds", "peak_mb"}
    return [{k: v for k, v in row.items() if k not in timed} for row in lines if "event" not in row]


@pytest.fixture(scope="module")
def plain(place):
    return run(place, "plain")


@pytest.mark.slow
def test_without_weight_nothing_changes(place, plain):
    off = run(place, "off", reward=0.0, reward_below=0.9)
    assert rows(off) == rows(plain)
    name = "checkpoints/step-000003/weights.safetensors"
    assert (off / name).read_bytes() == (plain / name).read_bytes()
    assert not any("map_missed" in row for row in rows(off))


@pytest.mark.slow
def test_the_reward_is_added_once_it_begins_and_is_told(place, plain):
    folder = run(place, "late", reward=0.5, reward_below=1.0, reward_from=2)
    assert rows(folder)[:2] == rows(plain)[:2]
    last, without = rows(folder)[2], rows(plain)[2]
    assert 0 < last["map_missed"] < 1
    assert last["loss"] == pytest.approx(without["loss"] + 0.5 * last["map_missed"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_goes_on_equals_one_that_was_not_stopped(place):
    told = {"reward": 0.3, "reward_below": 0.8, "steps": 5, "checkpoint_every": 3, "log_every": 5, "ema": 0.9}
    whole = run(place, "whole", **told)
    stopped = shutil.copytree(whole, place / "stopped")  # as it was after its third step
    shutil.rmtree(stopped / "checkpoints" / "step-000005")
    shutil.rmtree(stopped / "controlnet")
    (stopped / "metrics.jsonl").write_text("")
    run(place, "stopped", **told)
    assert rows(stopped) == rows(whole)  # its one row counts the steps before the stop, too
    assert "map_missed" in rows(whole)[0]
    for name in ("weights", "optimizer"):
        place_of = Path("checkpoints") / "step-000005" / f"{name}.safetensors"
        assert (stopped / place_of).read_bytes() == (whole / place_of).read_bytes()


@pytest.mark.slow
def test_bf16_is_rewarded_like_fp32(place, plain):
    full, half = (
        run(place, precision, reward=0.5, reward_below=1.0, precision=precision)
        for precision in ("fp32", "bf16")
    )
    for key in ("loss", "map_missed"):
        np.testing.assert_allclose([r[key] for r in rows(half)], [r[key] for r in rows(full)], rtol=0.02)


@pytest.mark.slow
def test_depth_maps_are_rewarded_too(place):
    options = {"map": "depth", "reward": 0.5, "reward_below": 1.0, "steps": 1, "data_flip": 0.0}
    path = written(place, "depth", **options)
    text = path.read_text()
    path.write_text(text[: text.index("[data.options]")] + '[data.options]\nmodel = "tiny"\n')
    train_recipe(str(path))
    assert 0 < rows(place / "depth")[0]["map_missed"] < 2
    assert all(bool(torch.isfinite(t).all()) for t in load_file(_result(place / "depth")).values())


def _result(folder):
    return folder / "controlnet" / "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("locked", [True, False])
def test_the_reward_reaches_what_is_trained_and_nothing_else(place, locked):
    told = load_recipe(
        str(written(place, f"locked-{locked}", reward=1.0, reward_below=1.0, sd_locked=locked))
    )
    task = ControlNetTask(told, Machine(told), lambda _: None)
    try:
        part = task.parts(0)[0]
        losses = task.losses(task.whole(), part)
        assert losses.missed is not None
        assert losses.missed.shape == losses.each.shape == (2,)
        alone = losses.each.sum()
        alone.backward()
        both = gradients(task.controlnet)
        task.controlnet.zero_grad()
        task.reward = None
        task.losses(task.whole(), part).each.sum().backward()
        plain = gradients(task.controlnet)
        moved = {name for name in both if not torch.equal(both[name], plain[name])}
        assert {"controlnet_mid_block.weight", "controlnet_down_blocks.0.weight"} <= moved
        assert all(math.isfinite(float(g.sum())) for g in both.values())
        assert not gradients(task.base.vae)
        trained = gradients(task.base.unet)
        assert bool(trained) == (not locked)
        assert all(name.startswith(("up_blocks", "conv_norm_out", "conv_out")) for name in trained)
    finally:
        task.close()


def gradients(network):
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}

"""The convergence monitor: what a look sees, that it disturbs nothing, and when control has taken hold."""

import random
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch

from controlkit import diffusion, images
from controlkit.adapters import load_adapter
from controlkit.base import load_base
from controlkit.controlnet import (
    control_residuals,
    encode_hint,
    from_base,
    lock,
    predict,
    trainable_parameters,
)
from controlkit.figures import render
from controlkit.training.reporting.convergence import (
    LOOKS,
    ON_TRAINED,
    advice,
    advice_for,
    hold_told,
    least_errors,
    took_hold,
)
from controlkit.training.reporting.monitor import LEVELS, Gap, Monitor, _summary, as_cond
from controlkit.training.reporting.showing import Shown
from controlkit.training.world import exact_map

HINT = (8, 16, 16, 16)
TIMES = (300, 700)

# (gap, its error) at every tenth step of two trainings of the bundled base on canny maps (320 scenes, batch
# 8, learning rate 4e-4, ten times that for what starts from nothing): with each picture's own map, and with
# the maps shuffled among the pictures.
LEARNED = [
    (0.0000, 0.0000),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (0.0000, 0.0000),
    (-0.0000, 0.0000),
    (-0.0002, 0.0002),
    (0.0000, 0.0000),
    (-0.0001, 0.0001),
    (0.0008, 0.0007),
    (0.0002, 0.0007),
    (0.0370, 0.0169),
    (0.1929, 0.0414),
    (0.1502, 0.0320),
    (0.3341, 0.0434),
    (0.2807, 0.0394),
    (0.4732, 0.0358),
    (0.4295, 0.0441),
    (0.4787, 0.0371),
    (0.4464, 0.0373),
    (0.4796, 0.0481),
    (0.5002, 0.0411),
    (0.5560, 0.0499),
    (0.5170, 0.0523),
    (0.5079, 0.0528),
    (0.5022, 0.0447),
]
# Shuffled at 2e-3 and six times that, looked at with 16 pictures: high rates make more of chance.
SHUFFLED_FAST = [
    (0.0, 0.0),
    (-0.0003, 0.0003),
    (0.0033, 0.0032),
    (-0.0004, 0.0003),
    (-0.0001, 0.0001),
    (-0.0004, 0.0002),
]
SHUFFLED = [
    (0.0000, 0.0000),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (0.0001, 0.0001),
    (-0.0001, 0.0001),
    (0.0002, 0.0011),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (0.0000, 0.0001),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (0.0001, 0.0001),
    (0.0001, 0.0001),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (0.0002, 0.0002),
    (-0.0001, 0.0000),
    (-0.0000, 0.0000),
    (-0.0000, 0.0000),
    (-0.0001, 0.0001),
    (0.0001, 0.0000),
]


@pytest.fixture(scope="module")
def tiny():
    """The bundled base and four held-out scenes: (base, latents, maps, encoder_hidden_states)."""
    base = load_base("tiny")
    scenes = [render(seed, split="validation", size=128) for seed in range(4)]
    latents = base.encode_pictures(images.picture_to_tensor([scene.picture for scene in scenes]))
    maps = [exact_map("canny", scene.picture, scene.joints, scene.inverse_depth) for scene in scenes]
    return base, latents, maps, base.encode_prompts([s.caption for s in scenes]).encoder_hidden_states


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A base of random weights of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: load_base(str(tiny_models.build(root / family, family))) for family in ("sd1", "sdxl")}


def held_out(base, count=3, seed=0):
    """Random latents, maps and text that fit a base of tiny_models: the arguments of Monitor."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(count, 4, 16, 16, generator=generator)
    maps = torch.rand(count, 3, 128, 128, generator=generator)
    text = base.encode_prompts([f"picture {k}" for k in range(count)])
    return latents, maps, text.encoder_hidden_states, base.added_cond(text.pooled, height=128, width=128)


def network(base, **options):
    return from_base(base, hint_channels=HINT, seed=3, **options)


def states():
    return (torch.get_rng_state(), np.random.get_state()[1], random.getstate())  # noqa: NPY002


def unchanged(before):
    torch_state, numpy_state, python_state = states()
    same = torch.equal(before[0], torch_state) and (before[1] == numpy_state).all()
    return same and before[2] == python_state


# --- a look ----


def test_a_fresh_network_sees_no_map(small):
    """Zero convolutions: with any map, and without, the base alone answers, bit for bit."""
    gap = Monitor(small["sd1"], *held_out(small["sd1"]), seed=1).look(network(small["sd1"]))
    assert gap.loss_map == gap.loss_no_map == gap.loss_other_map
    assert (gap.gap, gap.gap_error) == (0, 0)


def test_a_trained_adapter_has_a_gap_and_its_own_map_helps(tiny):
    base, latents, maps, text = tiny
    adapter = load_adapter("canny", base=base)
    gap = Monitor(base, latents, maps, text, seed=1, timesteps=[500]).look(adapter.controlnet)
    assert gap.loss_map < 0.6 * gap.loss_no_map < 0.6 * gap.loss_other_map
    assert gap.gap > 0.6
    assert took_hold([{"step": step, **gap.row()} for step in range(LOOKS)]) == 0


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_losses_are_those_of_diffusers_own_forward(small, family):
    """Row by row, with the residuals of `ControlNetModel.forward` in `UNet2DConditionModel.forward`."""
    base, levels = small[family], [600, 300]
    latents, maps, text, added = held_out(base)
    controlnet = tiny_models.randomize_zero_convs(network(base))
    monitor = Monitor(base, latents, maps, text, added, seed=4, timesteps=levels)
    gap = monitor.look(controlnet)
    t, noisy, target = torch.tensor(levels * 3), monitor._noisy, monitor._target
    signal, spread = (
        part[t].sqrt()[:, None, None, None] for part in (base.alphas_cumprod, 1 - base.alphas_cumprod)
    )
    rows = lambda of_pictures: of_pictures.repeat_interleave(2, dim=0)  # noqa: E731
    # both families predict the noise
    torch.testing.assert_close(noisy, (signal * rows(latents) + spread * target).float())
    text, added = rows(text), added and {name: rows(part) for name, part in added.items()}
    expected = []
    for cond in (maps, maps.roll(1, 0), None):
        told = {}
        with torch.no_grad():
            if cond is not None:
                down, mid = controlnet(noisy, t, text, rows(cond), added_cond_kwargs=added, return_dict=False)
                told = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
            pred = base.unet(noisy, t, text, added_cond_kwargs=added, **told).sample
        expected.append((pred - target).square().mean(dim=(1, 2, 3)).double().reshape(3, 2))
    true, other, alone = expected
    for found, wanted in zip(monitor.errors(controlnet), (true, alone, other), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    found = (gap.loss_map, gap.loss_other_map, gap.loss_no_map)
    assert found == pytest.approx([float(part.mean()) for part in expected], rel=1e-5)
    relative = ((other - true) / other.mean(dim=0)).mean(dim=1)
    assert gap.gap == pytest.approx(float(relative.mean()), rel=1e-3, abs=1e-6)
    assert gap.gap_error == pytest.approx(float(relative.std() / 3**0.5), rel=1e-3, abs=1e-6)


def test_every_look_is_the_same_and_rows_may_be_split(small):
    base = small["sd1"]
    controlnet = tiny_models.randomize_zero_convs(network(base))
    args = held_out(base)
    monitor = Monitor(base, *args, seed=4, timesteps=TIMES)
    torch.randn(5)
    assert (
        monitor.look(controlnet)
        == monitor.look(controlnet)
        == Monitor(base, *args, seed=4, timesteps=TIMES).look(controlnet)
    )
    split = Monitor(base, *args, seed=4, timesteps=TIMES, batch_size=4).look(controlnet)
    assert split.loss_map == pytest.approx(monitor.look(controlnet).loss_map, rel=1e-5)
    assert Monitor(base, *args, seed=5, timesteps=TIMES).look(controlnet) != split


def test_a_look_leaves_everything_as_it_was(small):
    base = small["sd1"]
    controlnet = tiny_models.randomize_zero_convs(network(base))
    controlnet.train()
    controlnet.mid_block.eval()
    modes = [module.training for module in controlnet.modules()]
    wanted = [parameter.requires_grad for parameter in controlnet.parameters()]
    before, digest, random_state = controlnet.state_dict(), base.digest(), states()
    before = {name: tensor.clone() for name, tensor in before.items()}
    Monitor(base, *held_out(base), seed=1).look(controlnet)
    assert unchanged(random_state)
    assert modes == [module.training for module in controlnet.modules()]
    assert wanted == [parameter.requires_grad for parameter in controlnet.parameters()]
    assert all(parameter.grad is None for parameter in controlnet.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in controlnet.state_dict().items())
    assert base.digest() == digest
    with pytest.raises(ValueError, match="this control network takes"):
        Monitor(base, *held_out(base), seed=1).look(network(base, conditioning_channels=1).train())
    assert modes == [module.training for module in controlnet.modules()]


def test_a_watched_training_equals_an_unwatched_one_bit_for_bit(small):
    """Dropout is switched on in the copy, so that training draws from torch's global generator."""
    base = small["sd1"]
    args = held_out(base)

    def trained(watched):
        controlnet = tiny_models.randomize_zero_convs(network(base))
        for module in controlnet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3
        optimizer = torch.optim.AdamW(trainable_parameters(controlnet, base.unet), lr=1e-3)
        controlnet.train()
        torch.manual_seed(9)
        monitor = Monitor(base, *args, seed=1, timesteps=TIMES) if watched else None
        for step in range(2):
            if monitor:
                monitor.look(controlnet)
            latents, maps, text, _ = held_out(base, seed=step)
            t = torch.randint(1000, (3,))
            noise = torch.randn_like(latents)
            noisy = diffusion.q_sample(latents, noise, t, base.alphas_cumprod)
            residuals = control_residuals(controlnet, noisy, t, text, encode_hint(controlnet, maps))
            pred = predict(base.unet, noisy, t, text, residuals=residuals)
            torch.nn.functional.mse_loss(pred, noise).backward()
            optimizer.step()
            optimizer.zero_grad()
        return controlnet.state_dict()

    watched, alone = trained(watched=True), trained(watched=False)
    assert all(torch.equal(watched[name], tensor) for name, tensor in alone.items())


def test_no_map_is_the_base_alone_or_the_unet_that_is_trained(small):
    base = small["sd1"]
    controlnet = tiny_models.randomize_zero_convs(network(base))
    monitor = Monitor(base, *held_out(base), seed=1, timesteps=TIMES)
    first = monitor.look(controlnet)
    other = lock(tiny_models.tiny_unet("sd1", seed=8))
    second = monitor.look(controlnet, other)
    assert second.loss_no_map != first.loss_no_map
    assert monitor.look(controlnet) == first
    assert monitor.look(controlnet, base.unet) == first


def test_a_half_precision_base_takes_a_copy_in_full_precision(tiny):
    base, latents, maps, text = tiny
    controlnet = load_adapter("canny", base=base).controlnet
    exact = Monitor(base, latents, maps, text, seed=1, timesteps=[500]).look(controlnet)
    unet = lock(type(base.unet).from_config(base.unet.config))
    unet.load_state_dict(base.unet.state_dict())
    half = replace(base, unet=unet.to(torch.bfloat16), dtype=torch.bfloat16)
    found = Monitor(half, latents, maps, text, seed=1, timesteps=[500]).look(controlnet)
    assert found.gap == pytest.approx(exact.gap, abs=0.02)
    assert controlnet.dtype == torch.float32


def test_maps_of_any_depth_become_the_same_tensor():
    levels = np.array([0, 51, 255], np.uint8).reshape(1, 3, 1)
    deep = levels.astype(np.uint16) * 257
    assert as_cond([levels]).flatten().tolist() == pytest.approx([0, 0.2, 1])
    assert torch.equal(as_cond([levels]), as_cond(deep[None]))
    picture = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    torch.testing.assert_close(as_cond(picture), images.map_to_cond(list(picture)))


def test_what_cannot_be_watched_is_said_in_a_line(small):
    base = small["sd1"]
    with pytest.raises(ValueError, match=r"needs at least 2, not 1: raise data\.holdout"):
        Monitor(base, *held_out(base, count=1), seed=1)
    with pytest.raises(ValueError, match="timestep 1000 of the monitor is outside the schedule, 0 to 999"):
        Monitor(base, *held_out(base), seed=1, timesteps=[10, 1000])


def shown(base, shapes, said, held_out_pairs=True):
    """What `Shown` makes of random pictures of these sizes, as (height, width)."""
    random = np.random.default_rng(2)
    maps = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    means = [torch.from_numpy(random.normal(size=(4, h // 8, w // 8))).half() for h, w in shapes]
    samples = [
        SimpleNamespace(levels=levels, mean=mean, example=SimpleNamespace(caption=f"picture {k}"))
        for k, (levels, mean) in enumerate(zip(maps, means, strict=True))
    ]
    encoded = SimpleNamespace(
        sample=lambda turn, *, whole: samples[turn.index],
        moments=lambda alike: SimpleNamespace(mean=torch.stack([sample.mean for sample in alike])),
        text=base.encode_prompts,
    )
    recipe = SimpleNamespace(sd_locked=True, seed=5, only_mid_control=False)
    return Shown(
        recipe,
        base,
        encoded,
        range(len(shapes)),
        held_out=held_out_pairs,
        alphas_cumprod=base.alphas_cumprod,
        added_cond=lambda pooled, alike: None,
        on_device=nullcontext,
        report=said.append,
    )


def test_pictures_of_several_sizes_are_compared_each_within_its_own(small):
    base, said = small["sd1"], []
    controlnet = tiny_models.randomize_zero_convs(network(base))
    tall, wide, square = (96, 64), (64, 96), (64, 64)
    mixed = shown(base, [square, tall, wide, tall, wide, tall], said)
    found = mixed.look(controlnet)
    assert found == mixed.look(controlnet)
    assert found["gap_pictures"] == 5
    assert said == [
        "1 of 6 held-out pictures are not compared: each has a size of its own; a larger data.holdout, or"
        " data.buckets=false, lets more be compared"
    ]
    first, second = (monitor.errors(controlnet) for monitor in mixed._monitors)
    assert [len(first[0]), len(second[0])] == [3, 2]
    assert found["loss_map"] == pytest.approx(float(torch.cat([first[0], second[0]]).mean()), rel=1e-12)
    relative = [(other - true) for true, _, other in (first, second)]
    relative = (torch.cat(relative) / torch.cat([first[2], second[2]]).mean(dim=0)).mean(dim=1)
    assert found["gap"] == pytest.approx(float(relative.mean()), rel=1e-9)
    assert found["gap_error"] == pytest.approx(float(relative.std()) / 5**0.5, rel=1e-9)


def test_pictures_of_one_size_are_looked_at_as_one_monitor_does(small):
    base, said = small["sd1"], []
    controlnet = tiny_models.randomize_zero_convs(network(base))
    whole = shown(base, [(64, 96)] * 3, said)
    samples = [whole.encoded.sample(SimpleNamespace(index=k), whole=True) for k in range(3)]
    text = base.encode_prompts([sample.example.caption for sample in samples])
    latents = torch.stack([sample.mean for sample in samples]).float()
    alone = Monitor(base, latents, [s.levels for s in samples], text.encoder_hidden_states, seed=5)
    assert whole.look(controlnet) == alone.look(controlnet).row()
    assert said == []


@pytest.mark.parametrize("held", [True, False])
def test_that_nothing_can_be_watched_is_said_once(small, held):
    said = []
    alone = shown(small["sd1"], [(64, 64), (64, 96)], said, held_out_pairs=held)
    assert alone.look(network(small["sd1"])) == alone.look(network(small["sd1"])) == {}
    pictures = "held-out pictures" if held else "pictures that are shown"
    (line,) = said
    assert line.startswith(f"no look at whether the map is used: of {pictures} (2) no two have one size; a")


def test_the_gap_is_the_same_in_every_prediction_space():
    """At one timestep epsilon, v and x_0 errors differ by a factor: losses change, the gap does not."""
    generator = torch.Generator().manual_seed(0)
    true, alone, other = torch.rand(3, 5, len(LEVELS), generator=generator, dtype=torch.float64)
    factor = torch.tensor([0.1, 1.0, 5.0, 30.0], dtype=torch.float64)
    one, two = _summary(true, alone, other), _summary(factor * true, factor * alone, factor * other)
    assert (one.gap, one.gap_error) == pytest.approx((two.gap, two.gap_error))
    assert one.loss_map != two.loss_map
    assert Gap(1.0, float("nan"), 2.0, 0.5, float("inf"), 8).row() == {
        "loss_map": 1.0,
        "loss_other_map": 2.0,
        "gap": 0.5,
        "gap_pictures": 8,
    }


# --- when control has taken hold ----


def history(pairs, every=10, pictures=8):
    more = {"gap_pictures": pictures}
    rows = [
        {"step": every * k, "gap": gap, "gap_error": error, **more} for k, (gap, error) in enumerate(pairs)
    ]
    return [entry for row in rows for entry in ({"step": row["step"], "loss": 0.1}, row)]


def test_control_takes_hold_where_it_was_learned_and_never_with_shuffled_maps():
    held = took_hold(history(LEARNED))
    assert held is not None
    assert 90 <= held <= 130
    assert took_hold(history(SHUFFLED)) is None
    assert took_hold(history(SHUFFLED_FAST, pictures=16)) is None


@pytest.mark.parametrize("scale", [0.01, 1, 1.7])
def test_how_large_the_gap_is_does_not_matter(scale):
    """Of a base whose pictures say less about the noise, all gaps are smaller by a factor."""

    def scaled(rows):
        return [(scale * gap, scale * error) for gap, error in rows]

    assert took_hold(history(scaled(LEARNED))) == took_hold(history(LEARNED))
    assert took_hold(history(scaled(SHUFFLED))) is None
    assert took_hold(history(scaled(SHUFFLED_FAST), pictures=16)) is None


def test_chance_alone_is_rarely_convincing():
    random = np.random.default_rng(1)
    for pictures in (2, 3, 5, 8, 13):
        samples = random.normal(size=(400_000, pictures))
        errors = samples.std(axis=1, ddof=1) / np.sqrt(pictures)
        share = (samples.mean(axis=1) >= least_errors(pictures) * errors).mean()
        assert share == pytest.approx(1 / 200, rel=0.1)
    assert least_errors(200) == least_errors(13)
    assert least_errors(1) == least_errors(2)


def test_too_few_pictures_are_said_to_be_too_few():
    rows = history([(0.3, 0.1)] * 9, every=1000, pictures=3)
    assert took_hold(rows) is None
    assert took_hold(history([(0.3, 0.02)] * 9, pictures=3)) == 0
    told = advice(rows, **RECIPE)
    assert "worse by 30.0%, but 3 held-out pictures of a shared size are too few to be sure of it" in told
    trained = advice([{**row, ON_TRAINED: 1} for row in rows], **RECIPE)
    assert "but 3 pictures of a shared size are too few" in trained
    told = advice(history([(0.3, 0.18)] * 9, every=1000, pictures=2), **RECIPE)  # less than two errors
    assert "2 held-out pictures of a shared size are too few" in told
    assert "do not belong" not in told
    assert "do not belong" in advice(history([(0.001, 0.18)] * 9, every=1000, pictures=2), **RECIPE)
    twice = history([(0.0, 0.0), (0.3, 0.01), (0.3, 0.01)], every=1000)
    told = advice(twice, **RECIPE, finished=True)
    assert told.startswith(
        "At step 2000 another picture's map does worse by 30.0%, but it was not beyond chance"
    )
    assert "at 3 looks in a row" in told
    assert took_hold(history([(0.3, 0.1)] * 9, pictures=0)) is None  # of old runs: taken for 8


def test_a_few_looks_by_chance_are_not_enough():
    sure, chance, weak = (0.05, 0.01), (0.05, 0.02), (0.0005, 0.0)
    assert took_hold(history([sure] * (LOOKS - 1))) is None
    assert took_hold(history([sure] * LOOKS)) == 0
    assert took_hold(history([weak, sure, sure, chance, sure, sure, sure])) == 40
    assert took_hold(history([chance] * 20)) is None
    assert took_hold(history([weak] * 20)) is None
    assert took_hold([]) is None
    assert took_hold([{"step": 1, "gap": 0.5}] * 9) is None  # an error that is unknown is no certainty
    assert took_hold([{"step": 1, "gap": 0.5, "gap_error": None}] * 9) is None


def looks(step, true, gap=0.0, error=0.001):
    row = {"loss_map": true, "loss_no_map": 0.2, "loss_other_map": true, "gap": gap, "gap_error": error}
    return [{"step": s, **row} for s in range(0, step + 1, 50)]


RECIPE = {"steps": 10_000, "learning_rate": 1e-5, "zero_convolution_rate": 10.0, "warmup": 100}


def test_of_pairs_that_are_trained_on_it_is_said_that_they_are():
    assert hold_told(history(SHUFFLED)) == ""
    held = history(LEARNED)
    assert hold_told(held) == f"control took hold at step {took_hold(held)}"
    trained = [{**look, ON_TRAINED: 1} for look in held]
    assert hold_told(trained).startswith(f"{hold_told(held)} on pairs that are trained on, which may be")
    assert hold_told([{**look, "step": look["step"] * 1000} for look in held]).endswith("000")


def test_advice_comes_when_control_is_overdue():
    assert advice(looks(2000, 0.2), **RECIPE) is None
    config = {"steps": 4000, "learning_rate": 1e-3, "zero_convolution_rate": 6.0}
    assert "until about" not in str(
        advice_for(looks(2000, 0.2), {**config, "optimizer": "prodigy"}, finished=True)
    )
    assert advice_for(looks(2000, 0.2), {**config, "optimizer": "adafactor"}) is None
    assert advice_for(looks(2000, 0.2), config) is not None
    at_the_end = advice(looks(2000, 0.2), **RECIPE, finished=True)
    assert "may need until about step 3,550. Train longer, or raise learning_rate." in at_the_end
    slow = advice(looks(2000, 0.2), **RECIPE | {"zero_convolution_rate": 1.0}, finished=True)
    assert (
        "step 35,050. Train longer, or raise zero_convolution_rate (6 is what recipes have by default)."
        in slow
    )
    assert "hardly changes anything" in advice(looks(8000, 0.2), **RECIPE)
    assert "maps do not belong to their pictures" in advice(looks(8000, 0.17), **RECIPE)
    assert "learning rates are too high" in advice(looks(500, 0.26), **RECIPE)
    assert advice(looks(100, 0.26), **RECIPE) is None  # within the warmup nothing is settled
    fast = RECIPE | {"learning_rate": 0.02, "warmup": 50}  # and nothing else is said of such damage
    assert advice(looks(40, 0.26), **fast) is None
    assert "learning rates are too high" in advice(looks(40, 0.26), **fast, finished=True)
    assert advice([], **RECIPE, finished=True) is None
    usual = RECIPE | {"learning_rate": 1e-4 / 6, "zero_convolution_rate": 6.0}  # twice 0.35 after 7,000 steps
    for say in (lambda rows: advice(rows, **usual), lambda rows: advice_for(rows, usual)):
        assert say(looks(7000, 0.2)) is None  # the warmup of 100 walks half the way
        assert "hardly changes anything" in say(looks(7050, 0.2))
    assert "or raise learning_rate." in advice(looks(2000, 0.2), **usual, finished=True)


def test_pairs_that_are_learned_by_heart_are_told_from_rates_that_are_too_high():
    """Looks and losses of 15 pairs of the bundled world trained on for 400 steps, with 5 held out."""
    losses = {10: 0.212, 20: 0.143, 40: 0.103, 60: 0.083, 80: 0.049, 100: 0.053, 200: 0.036, 300: 0.037}
    true = {20: 0.194, 40: 0.253, 60: 0.252, 80: 0.262, 100: 0.257, 200: 0.293, 300: 0.303}
    rows = [{"step": step, "loss": loss} for step, loss in losses.items()]
    for row in rows:
        if row["step"] in true:
            row |= {"loss_map": true[row["step"]], "loss_no_map": 0.206, "gap": 0.4, "gap_error": 0.1}
            row |= {"gap_pictures": 5}
    recipe = {"steps": 800, "learning_rate": 2e-3, "zero_convolution_rate": 6.0, "warmup": 25}
    assert "learns the training pairs by heart" in advice(rows, **recipe)
    sure = [{**row, "gap_error": 0.01} if "gap" in row else row for row in rows]  # also where control holds
    assert took_hold(sure) is not None
    assert "learns the training pairs by heart" in advice(sure, **recipe)
    trained = [{**row, ON_TRAINED: 1} if "gap" in row else row for row in rows]  # none was held out
    assert "learning rates are too high" in advice(trained, **recipe)
    spiked = [{**row, "loss": 1.1 if row["step"] < 50 else 0.25} for row in rows]
    assert "learning rates are too high" in advice(spiked, **recipe)
    assert "learning rates are too high" in advice([{**row, "loss": 0.21} for row in rows], **recipe)


def test_advice_is_silent_where_control_holds_and_speaks_where_it_is_lost():
    held = looks(1000, 0.15, gap=0.3, error=0.01)
    assert advice(held, **RECIPE, finished=True) is None
    lost = [row | {"step": row["step"] + 2000} for row in looks(1000, 0.2)]
    assert "taken hold at step 0 and is gone at step 3000" in advice(held + lost, **RECIPE)
    assert advice_for(held + lost, RECIPE) == advice(held + lost, **RECIPE)
    lost[-2] |= {"gap": 0.3, "gap_error": 0.01}  # one weak look beside it is no loss
    assert advice(held + lost, **RECIPE) is None
    assert advice_for(looks(8000, 0.2), {"steps": "many"}) is None
    assert "\n" not in advice(looks(8000, 0.17), **RECIPE)


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_real_training_takes_hold_with_its_own_maps_alone(shuffled):
    """150 steps on the bundled base, from a fresh copy; the same with every picture's map another's."""
    base = load_base("tiny")

    def prepared(split, count):
        scenes = [render(seed, split=split, size=128) for seed in range(count)]
        pictures = images.picture_to_tensor([scene.picture for scene in scenes])
        latents = torch.cat([base.encode_pictures(rows) for rows in pictures.split(8)])
        maps = [exact_map("canny", s.picture, s.joints, s.inverse_depth) for s in scenes]
        return latents, maps, base.encode_prompts([s.caption for s in scenes]).encoder_hidden_states

    latents, maps, text = prepared("train", 160)
    monitor = Monitor(base, *prepared("validation", 8), seed=1)
    maps = maps[31:] + maps[:31] if shuffled else maps
    controlnet = from_base(base, hint_channels=(8, 16, 48, 96), seed=7)
    trainable_parameters(controlnet, base.unet)
    groups = [{"params": [], "lr": 4e-4}, {"params": [], "lr": 4e-3}]
    for name, parameter in controlnet.named_parameters():
        groups["controlnet_" in name]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    generator, rows = torch.Generator().manual_seed(7), []
    for step in range(151):
        if step >= 80 and step % 10 == 0:
            rows.append({"step": step, **monitor.look(controlnet).row()})
        indices = torch.randint(len(maps), (8,), generator=generator)
        t = torch.randint(1000, (8,), generator=generator)
        noise = torch.randn(8, 4, 16, 16, generator=generator)
        noisy = diffusion.q_sample(latents[indices], noise, t, base.alphas_cumprod)
        hint = encode_hint(controlnet, images.map_to_cond([maps[k] for k in indices]))
        residuals = control_residuals(controlnet, noisy, t, text[indices], hint)
        pred = predict(base.unet, noisy, t, text[indices], residuals=residuals)
        target = diffusion.target(base.prediction_type, latents[indices], noise, t, base.alphas_cumprod)
        torch.nn.functional.mse_loss(pred, target).backward()
        torch.nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    held = took_hold(rows)
    assert (held is None) if shuffled else (held is not None), rows
    recipe = {"steps": 150, "learning_rate": 4e-4, "zero_convolution_rate": 10.0}
    assert (advice(rows, **recipe) is not None) == shuffled

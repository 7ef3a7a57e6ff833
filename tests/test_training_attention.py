"""The choice of an attention kernel, measured on whatever device there is."""

import math

import pytest
import torch
from tiny_models import UNETS

from controlkit.controlnet import from_base, lock
from controlkit.training import attention, memory
from controlkit.training.attention import Attention, Shape, seconds, total
from controlkit.training.config import parse_recipe
from controlkit.training.pair import Pair

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def forward():
    """A forward pass of a tiny pair, with its prediction."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = lock(UNet2DConditionModel(**UNETS["sd1"], norm_num_groups=8, layers_per_block=1))
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1}
    recipe = parse_recipe({**table, "learning_rate": 1e-3, "warmup": 0}, where="here")
    pair = Pair(from_base(unet), unet, recipe)
    inputs = (
        torch.randn(2, 4, 16, 16),
        torch.tensor([9, 500]),
        torch.randn(2, 77, 32),
        torch.rand(2, 3, 128, 128),
    )
    return lambda: pair(*inputs)


def test_the_fastest_kernel_comes_first_and_is_used(forward):
    said = []
    chosen = Attention(measures=True, report=said.append)
    with torch.no_grad():
        usual = forward()
        chosen.measure(forward)
        with chosen.preferred():
            preferred = forward()
        chosen.order = ["math"]
        with chosen.preferred():
            plain = forward()
    torch.testing.assert_close(preferred, usual, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain, usual, rtol=1e-4, atol=1e-5)
    (line,) = said
    assert "flash" in line
    assert "math" in line
    assert "cudnn" not in line  # there is none here
    assert not chosen.measures


def test_every_attention_is_counted_and_each_shape_measured_once(forward, monkeypatch):
    with torch.no_grad(), attention._Seen() as seen:
        forward()
    assert {(s.tokens, s.keys) for s in seen.shapes} >= {(256, 256), (256, 77), (64, 64), (64, 77)}
    assert sum(seen.shapes.values()) == 2 * (3 + 1 + 3 + 1 + 6)  # self and cross: copy, encoder, decoder
    first = total(seen.shapes, "flash")
    monkeypatch.setattr(attention, "_timed", lambda *_: pytest.fail("measured again"))
    assert total(seen.shapes, "flash") == first


def test_the_choice_follows_the_times(monkeypatch):
    monkeypatch.setattr(
        attention, "total", lambda shapes, name: {"math": 1.0, "cudnn": 0.5}.get(name, math.inf)
    )
    chosen = Attention(measures=True, report=lambda _: None)
    chosen.measure(lambda: None)
    assert chosen.order == ["cudnn", "math"]


def test_a_kernel_that_does_not_take_a_shape_is_infinitely_slow():
    shape = Shape(1, 2, 16, 16, 8, torch.float32, CPU)
    assert math.isinf(seconds(shape, "cudnn"))
    assert 0 < seconds(shape, "flash") < 10


def test_what_measuring_takes_is_no_part_of_the_peak(monkeypatch):
    peak = [5_000_000]
    monkeypatch.setattr(memory, "_PEAKS", {})
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peak.__setitem__(0, 3_000_000))
    device = torch.device("cuda")
    with memory.uncounted(device):
        peak[0] = 9_000_000
    assert memory.peak_mb(device) == 5.0
    peak[0] = 6_000_000
    assert memory.peak_mb(device) == 6.0

"""Convolutions with packed weights: the bits of the plain ones, and used only where they are."""

import platform
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from controlkit import packing
from controlkit.adapters import load_adapter
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.figures import render
from controlkit.packing import packed
from controlkit.preprocessors import get
from controlkit.sampling import Execution, generate

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available(),
    reason="weights are packed on x86 alone",
)


@pytest.fixture(autouse=True)
def least(monkeypatch: pytest.MonkeyPatch) -> int:
    """Small weights are packed, too, which are all that most tests have; returns what is wanted of them."""
    wanted = packing.LEAST_BYTES
    monkeypatch.setattr(packing, "LEAST_BYTES", 0)
    return wanted


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[nn.Conv2d]:
    """The layers whose calls came with a packed weight."""
    layers: list[nn.Conv2d] = []
    call = packing._Packed.__call__

    def watched(one: Any, *values: Any) -> torch.Tensor:
        made = call(one, *values)
        layers.extend([one.layer] * (one.weight is not None and packing._is_plain(*values[:2])))
        return made

    monkeypatch.setattr(packing._Packed, "__call__", watched)
    return layers


def net(width: int = 64) -> nn.Sequential:
    """Layers of all sorts, laid out as networks are."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, stride=2),
        nn.Conv2d(2 * width, 2 * width, 1),
        nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
        nn.Conv2d(width, width, 3, padding=1, groups=2),
        nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect"),
    )
    return layers.to(memory_format=torch.channels_last)


def some(rows: int = 2, width: int = 64, side: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a layer is shown."""
    x = torch.randn(rows, width, side, side, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


TYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(
            not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN does not compute in it here"
        ),
    ),
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("width", [64, 320])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_layers_give_the_same_bits(calls: list[nn.Conv2d], rows: int, width: int, dtype: torch.dtype) -> None:
    layers = net(width).to(dtype)
    plain = layers(some(rows, width, dtype=dtype))
    with packed([layers]):
        for _ in range(2):
            made = layers(some(rows, width, dtype=dtype))
            torch.testing.assert_close(made, plain, rtol=0, atol=0)
            assert made.stride() == plain.stride()
        other = layers(some(1, width, 8, dtype=dtype))  # another shape than the weights were packed for
    served = [layers[0], layers[1], layers[3]]
    few = rows == 1 and width == 64  # a single small picture, which PyTorch does not give oneDNN in float32
    assert {*calls} == ({*served[1:2]} if few else {*served})
    torch.testing.assert_close(layers(some(1, width, 8, dtype=dtype)), other, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_a_networks_prediction_has_the_same_bits(base: Base, calls: list[nn.Conv2d], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shown = torch.randn(
            2, base.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0)
        )
        shown = shown.contiguous(memory_format=torch.channels_last)
        text = base.encode_prompts(["", "a red figure"]).encoder_hidden_states
        unet = base.unet.to(memory_format=torch.channels_last)
        plain = unet(shown, 500, text).sample
        with packed([unet]):
            made = unet(shown, 500, text).sample
    finally:
        torch.set_num_threads(before)
    assert len(calls) > 10
    assert torch.equal(made, plain)


def test_a_generation_gives_the_same_picture(base: Base, calls: list[nn.Conv2d]) -> None:
    edges = get("canny")(render(1).picture).image
    control = Control(load_adapter("canny", base=base), edges, end=0.5)
    made = [
        generate(base, "a red figure", controls=[control], steps=12, execution=Execution(packed=way))[0]
        for way in (True, False)
    ]
    np.testing.assert_array_equal(*made)
    assert {*base.unet.modules()} & {*calls}
    assert {*control.controlnet.modules()} & {*calls}
    assert not any("_conv_forward" in vars(layer) for layer in base.unet.modules())


def test_what_cannot_use_it_goes_on_as_usual(calls: list[nn.Conv2d]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layers = net()
    x = some()
    with packed([layers]):
        layers(x).sum().backward()  # a graph is built
        assert layers[0].weight.grad is not None
        with torch.no_grad():
            with FlopCounterMode(display=False) as counted:
                layers(x)
            with torch.autocast("cpu", torch.bfloat16):
                layers(x)
            layers(some(side=64))
            layers[0](x.contiguous())
    assert calls == []
    with FlopCounterMode(display=False) as plain:
        layers(x)
    assert counted.get_total_flops() == plain.get_total_flops() > 0


@pytest.mark.parametrize(
    "why", ["little memory", "unknown memory", "another processor", "switched off", "float16"]
)
def test_it_is_left_out(calls: list[nn.Conv2d], monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    layers = net()
    if why == "float16":
        layers = layers.half()
    elif why == "switched off":
        monkeypatch.setattr(packing.torch.backends.mkldnn, "enabled", False)
    elif why == "another processor":
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
    else:
        free = None if why == "unknown memory" else 3 * sum(p.nbytes for p in layers.parameters())
        monkeypatch.setattr(packing, "available_memory", lambda device: free)
    with packed([layers]), torch.no_grad():
        layers(some().to(layers[0].weight.dtype))
        assert not any("_conv_forward" in vars(layer) for layer in layers)
    assert calls == []


@torch.no_grad()
def test_large_weights_alone_are_packed(
    base: Base, calls: list[nn.Conv2d], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "LEAST_BYTES", least)
    large = nn.Sequential(nn.Conv2d(640, 640, 3, padding=1), nn.Conv2d(640, 64, 3, padding=1))
    large = large.to(memory_format=torch.channels_last)
    with packed([base.unet, large]):
        assert not any("_conv_forward" in vars(layer) for layer in base.unet.modules())
        large(some(width=640))
    assert calls == [large[0]]


@torch.no_grad()
def test_a_block_within_another_takes_and_leaves_what_that_one_packed(calls: list[nn.Conv2d]) -> None:
    layers = net()
    with packed([layers]):
        layers(some())
        outer = vars(layers[1])["_conv_forward"]
        with packed([layers]):
            layers(some())
            assert vars(layers[1])["_conv_forward"] is outer
        assert vars(layers[1])["_conv_forward"] is outer
        layers(some())
    assert calls.count(layers[1]) == 3
    assert "_conv_forward" not in vars(layers[1])


def test_an_error_within_leaves_nothing() -> None:
    layers = net()
    with pytest.raises(RuntimeError, match="expected input"), packed([layers]):
        layers(some(width=3))
    assert "_conv_forward" not in vars(layers[0])

"""Generations in little memory: what is chosen, that pictures stay the same, and where everything lies."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from fakes import faked
from outcomes import Run
from sampling_peers import cond, controlnet_of
from torch._subclasses.fake_tensor import FakeTensorMode

from controlkit import sampling
from controlkit.arguments import parse_bytes
from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.images import read_png_text
from controlkit.memory import HOST, Memory, at_work, kept_small
from controlkit.memory_plan import Estimate, Request, fit, peak_of

EVERYTHING = Memory(1, sliced_vae=True, offload=True, one_branch=True, tiled_vae=True)


def test_amounts_are_read() -> None:
    assert parse_bytes("4GB") == 4 * 10**9
    assert parse_bytes(" 3.5 gb ") == 3_500_000_000
    assert parse_bytes("800MB") == 8 * 10**8
    assert parse_bytes("2GiB") == 2 * 2**30
    for text in ("4", "4 kB", "GB", "-1GB", "nanGB", "0GB", "1e3GB"):
        with pytest.raises(ValueError, match="an amount of memory"):
            parse_bytes(text)


def test_measures_have_names() -> None:
    assert EVERYTHING.measures == ("sliced-vae", "offload", "one-branch", "tiled-vae", "batch=1")
    for measures in (EVERYTHING, Memory(4), Memory(2, offload=True)):
        assert Memory.of(measures.measures) == measures
    with pytest.raises(ValueError, match="'batch=0' is none of the ways"):
        Memory.of(["batch=0"])


@pytest.mark.parametrize(
    ("measures", "tolerance"),
    [
        (Memory(1, sliced_vae=True), 0),
        (Memory(1, offload=True), 0),
        (Memory(1, sliced_vae=True, offload=True), 0),
        (Memory(2, sliced_vae=True), 1),
        (Memory(1, one_branch=True), 1),
    ],
)
@pytest.mark.parametrize("family", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_pictures_stay_the_same(
    load: Callable[[str], Base], family: str, measures: Memory, tolerance: int
) -> None:
    base = load(family)
    told: dict[str, Any] = {"controls": [Control(controlnet_of(base), cond())], "steps": 2, "seeds": (1, 2)}
    plain = sampling.generate(base, "a cube", **told)
    small = sampling.generate(base, "a cube", **told, memory=measures)
    difference = np.abs(np.stack(plain).astype(int) - np.stack(small))
    assert difference.max() <= tolerance
    assert not base.vae.use_slicing


def test_a_tiled_autoencoder_is_near(sd1: Base) -> None:
    told: dict[str, Any] = {"steps": 2, "width": 128, "height": 128}
    (plain,) = sampling.generate(sd1, "a cube", **told)
    (tiled,) = sampling.generate(sd1, "a cube", **told, memory=Memory(1, tiled_vae=True))
    assert 0 < np.abs(plain.astype(int) - tiled).mean() < 12
    assert not sd1.vae.use_tiling


def test_the_peak_of_a_call() -> None:
    def call() -> torch.Tensor:
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1
        del a
        return b.view(10, 100) + 1

    assert peak_of(call) == 8000
    x = torch.ones(1000)
    assert peak_of(lambda: x.add_(1).view(10, 100)) == 0


@pytest.mark.slow
def test_each_measure_lowers_its_phase(sd1: Base) -> None:
    request = Request(128, 128, pictures=4)
    # Said to be on a GPU: only there can something be moved away.
    estimate = Estimate(
        replace(sd1, device=torch.device("cuda")), [Control(controlnet_of(sd1), cond())], request
    )
    phases = {str(m.measures): estimate.phases(m) for m in (Memory(4), Memory(2), EVERYTHING)}
    four, two, least = phases.values()
    assert two["denoising"] < four["denoising"]
    assert two["decoding"] < four["decoding"]
    assert all(least[name] < two[name] for name in two)
    assert estimate.total(Memory(4, sliced_vae=True)) < estimate.total(Memory(4))
    assert estimate.phases(Memory(1, one_branch=True))["denoising"] < estimate.phases(Memory(1))["denoising"]
    weights = sum(p.nbytes for p in sd1.unet.parameters())
    assert estimate.phases(Memory(1))["text"] - estimate.phases(EVERYTHING)["text"] > weights


@pytest.mark.slow
def test_a_base_that_fills_holes_is_reckoned_under_a_control(sd1: Base) -> None:
    base = tiny_models.nine_channels(sd1)
    controls = [Control(controlnet_of(sd1), cond())]
    larger, plain = (Estimate(one, controls, Request(64, 64)).total(Memory(1)) for one in (base, sd1))
    assert larger > plain


def test_a_base_that_is_told_the_guidance_is_reckoned_on_a_gpu(sd1: Base) -> None:
    base = replace(tiny_models.told_guidance(sd1), device=torch.device("cuda"))
    estimate = Estimate(base, [], Request(64, 64, guided=False))
    assert estimate.phases(Memory(1))["denoising"] > sum(p.nbytes for p in base.unet.parameters())


@pytest.mark.slow
def test_the_least_costly_measures_are_taken(sd1: Base) -> None:
    base = replace(sd1, device=torch.device("cuda"))
    request = Request(128, 128, pictures=4)
    estimate = Estimate(base, [], request)

    def chosen(limit: int) -> Memory:
        return fit(estimate, limit=limit, batch_size=4)[0]

    plenty = estimate.total(Memory(4))
    assert chosen(plenty) == Memory(4)
    assert chosen(plenty - 1) == Memory(4, sliced_vae=True)
    assert chosen(estimate.total(Memory(4, sliced_vae=True)) - 1).offload
    least = estimate.total(EVERYTHING)
    assert estimate.total(chosen(least)) == least
    with pytest.raises(
        ValueError, match=r"128x128 pixels do not fit into 100 MB on cuda: the least .* \d+ MB"
    ):
        fit(estimate, limit=10**8, batch_size=4)
    _, told = fit(estimate, limit=plenty - 1, batch_size=4)
    assert told.startswith("memory: about 7")
    assert told.endswith("MB on cuda, with sliced-vae, batch=4")


class Onwards:
    """A schedule and its scheduler in one, which looks nothing up: fake tensors cannot be looked into."""

    init_noise_sigma, steps = 1.0, 2

    def __init__(self) -> None:
        self.timesteps, self.scheduler = torch.empty(2, dtype=torch.int64), self

    def scale_model_input(self, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return latents

    def step(self, model_pred: torch.Tensor, t: torch.Tensor, latents: torch.Tensor, **_: Any) -> Any:
        return (latents - model_pred,)


def place(network: Any) -> str:
    return str(next(network.parameters()).device.type)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_only_what_works_is_on_the_device(
    load: Callable[[str], Base], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without content that are said to be on a GPU: mixing devices is an error."""
    base, seen = load(family), []
    copies = copy.deepcopy([base.unet, base.vae, *base.text_encoders, controlnet_of(base)])
    # What moves a network with content does not move one without.
    monkeypatch.setattr(torch.nn.Module, "to", lambda net, *at, **_: faked(net, str(at[0])) if at else net)
    monkeypatch.setattr(sampling, "make_schedule", lambda *_, **__: Onwards())
    monkeypatch.setattr(sampling._Health, "check", lambda *_: None)
    monkeypatch.setattr(sampling.images, "tensor_to_pictures", list)
    with FakeTensorMode(allow_non_fake_inputs=True):
        unet, vae, *encoders, control = map(faked, copies)
        networks = {"unet": unet, "vae": vae, "text": encoders[-1], "controlnet": control}
        last = {"unet": "conv_out", "vae": "decoder.conv_out", "text": "final_layer_norm"}
        for name, network in networks.items():
            ending = last.get(name, "controlnet_mid_block")
            (module,) = (m for path, m in network.named_modules() if f".{path}".endswith(f".{ending}"))
            module.register_forward_pre_hook(
                lambda *_, name=name: seen.append((name, {key: place(net) for key, net in networks.items()}))
            )
        pictures = sampling.generate(
            replace(base, unet=unet, vae=vae, text_encoders=encoders, device=torch.device("cuda")),
            "a cube",
            controls=[Control(control, cond())],
            memory=replace(EVERYTHING, batch_size=2, tiled_vae=False),
        )
    assert pictures[0].device.type == "cuda"  # type: ignore[attr-defined]
    assert {name for name, _ in seen} == set(networks)
    for name, places in seen:
        works = {"unet", "controlnet"} if name in ("unet", "controlnet") else {name}
        assert places == {key: "cuda" if key in works else HOST for key in networks}, name
    assert {place(network) for network in networks.values()} == {HOST}


class Movable:
    """A network as far as it is moved; one that is too large for the GPU is not."""

    def __init__(self, *, is_too_large: bool = False) -> None:
        self.device, self.is_too_large = torch.device(HOST), is_too_large

    def to(self, device: torch.device | str) -> None:
        if self.is_too_large and torch.device(device).type == "cuda":
            raise torch.OutOfMemoryError("out of memory")
        self.device = torch.device(device)


def test_a_device_that_is_too_small_for_one_network_keeps_none(sd1: Base) -> None:
    unet, vae, encoder, control = (Movable(is_too_large=k == 3) for k in range(4))
    small: Any = {"unet": unet, "vae": vae, "text_encoders": [encoder], "device": torch.device("cuda")}
    base = replace(sd1, **small)
    with pytest.raises(torch.OutOfMemoryError), kept_small(Memory(1), base, control):
        pass
    assert {network.device.type for network in (unet, vae, encoder)} == {HOST}
    with pytest.raises(torch.OutOfMemoryError), at_work(Memory(1, offload=True), base, unet, control):
        pass
    assert unet.device.type == HOST


def test_the_command_chooses_and_says_so(generate: Run, run: Run) -> None:
    outcome = generate("--memory", "4GB", "-o", "out.png")
    outcome.done()
    assert "memory: about 1." in outcome.err
    assert "GB of 4.00 GB on cpu, with batch=1" in outcome.err
    assert '"memory":["batch=1"]' in read_png_text("out.png")["controlkit"]
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    assert "64x64 pixels do not fit into 100 MB on cpu: the least" in generate("--memory", "100MB").refused()
    assert "an amount of memory is written as in 4GB" in generate("--memory", "lots").refused()


def test_measures_are_reckoned_once_for_all_pictures_that_need_the_same(
    generate: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reckoned = []

    def counted(estimate: Estimate, **how: Any) -> tuple[Memory, str]:
        reckoned.append(estimate.request)
        return fit(estimate, **how)

    monkeypatch.setattr("controlkit.memory_plan.fit", counted)
    generate("--memory", "4GB", "--steps", 1, "--grid", "seed=1..3", "guidance=1,5", "-o", "grid.png").done()
    assert [request.guided for request in reckoned] == [False, True]


@pytest.mark.slow
def test_each_picture_of_a_grid_has_the_measures_that_it_needs(run: Run, models: Path) -> None:
    base = load_base(str(models / "sd1"))
    least = Estimate(base, [], Request(64, 64, guided=False)).total(Memory(1))
    fixed = ["generate", "a cube", "--base", models / "sd1", "--steps", 1]
    fixed += ["--memory", f"{least / 1e6 + 0.001:.3f}MB"]
    alone = {}
    for guidance in (1, 5):
        run(*fixed, "--guidance", guidance, "-o", "alone.png").done()
        alone[guidance] = json.loads(read_png_text("alone.png")["controlkit"])
    assert alone[1]["memory"] != alone[5]["memory"]
    for values in ((1, 5), (5, 1)):
        run(*fixed, "--grid", "guidance={},{}".format(*values), "-o", "grid.png").done()
        told = json.loads(read_png_text("grid.png")["controlkit-grid"])
        assert told == [alone[guidance] for guidance in values]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["1536 batch=1", "1024 tiled-vae batch=1"])
def test_a_process_holds_what_was_foretold(words: str) -> None:
    trial = Path(__file__).parent / "memory_trial.py"
    done = subprocess.run([sys.executable, trial, *words.split()], capture_output=True, check=True, text=True)
    told = json.loads(done.stdout)
    assert max(told["phases"].values()) == pytest.approx(told["used"], rel=0.15)


def test_measures_that_mean_nothing_are_refused() -> None:
    assert Memory.of("offload") == Memory(1, offload=True)
    with pytest.raises(ValueError, match="5 is none of the ways to save memory"):
        Memory.of([5])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1, not None"):
        Memory(None)  # type: ignore[arg-type]

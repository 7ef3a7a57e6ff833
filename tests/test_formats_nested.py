"""Adapters as training programs save them: nested, wrapped, and with what training left beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import controlnet_of, original_controlnet, refusal, residuals, same, saved
from cases import seldom
from outcomes import Run

from controlkit.adapters import load_adapter
from controlkit.base import Base
from controlkit.formats.adapter_file import open_adapter_file

OPTIMIZER = {
    "state": {0: {"exp_avg": torch.zeros(3), "step": torch.tensor(7)}},
    "param_groups": [{"lr": 1.0}],
}


@pytest.fixture(scope="module")
def network(sd1: Base) -> Any:
    return controlnet_of(sd1)


def check(file: Path, network: Any, base: Base) -> None:
    """A file is read as this network, and of its size."""
    opened = open_adapter_file(file)
    assert opened.parameters == sum(tensor.numel() for tensor in network.state_dict().values())
    controlnet = load_adapter(str(file), base=base).controlnet
    assert same(residuals(controlnet, base), residuals(network, base))


@pytest.mark.parametrize(
    "name",
    ["model_state_dict", "net", "model", *seldom("controlnet", "params", "module", "weights", "state_dict")],
)
def test_the_entry_that_holds_the_network(name: str, network: Any, sd1: Base, tmp_path: Path) -> None:
    beside = {
        "optimizer": OPTIMIZER,
        "params_ema": {"a": torch.zeros(2)},
        "epoch": 3,
        "scheduler": {"last": 1},
    }
    for state in (dict(network.state_dict()), original_controlnet(network)):
        torch.save({name: state, **beside}, tmp_path / "a.pth")
        check(tmp_path / "a.pth", network, sd1)


def test_an_entry_within_an_entry(network: Any, sd1: Base, tmp_path: Path) -> None:
    torch.save({"model": {"state_dict": network.state_dict()}, "epoch": 1}, tmp_path / "a.pth")
    check(tmp_path / "a.pth", network, sd1)


def test_an_entry_within_itself_is_named(tmp_path: Path) -> None:
    state: dict[str, Any] = {"a": torch.zeros(1)}
    state["model"] = state
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth is damaged: its entries lie in each other without an end"):
        open_adapter_file(tmp_path / "a.pth")


@pytest.mark.parametrize("suffix", [".safetensors", *seldom(".pth")])
@pytest.mark.parametrize(
    "prefix",
    ["controlnet.", "module._orig_mod.", "model.controlnet.", *seldom("_orig_mod.", "module.", "model.")],
)
def test_a_wrapped_network(prefix: str, suffix: str, network: Any, sd1: Base, tmp_path: Path) -> None:
    for state in (
        network.state_dict(),
        original_controlnet(network),
        original_controlnet(network, prefix="control_model."),
    ):
        wrapped = {f"{prefix}{key}": tensor for key, tensor in state.items()}
        check(saved(wrapped, tmp_path / f"a{suffix}"), network, sd1)


def test_a_prefix_of_some_names_alone_is_no_wrapping(network: Any, sd1: Base, tmp_path: Path) -> None:
    state = {f"controlnet.{key}": tensor for key, tensor in network.state_dict().items()}
    for other in ("another.a", "some.a"):  # before and behind them
        file = saved({**state, other: torch.zeros(2)}, tmp_path / "a.safetensors")
        refusal(file, sd1, "is no adapter that controlkit knows")


@pytest.mark.parametrize("is_original", [True, False])
@pytest.mark.slow
def test_what_training_left_beside_the_weights(
    is_original: bool, network: Any, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    state = original_controlnet(network, prefix="control_model.") if is_original else network.state_dict()
    counted = {**state, "global_step": torch.tensor(5), "epoch": torch.tensor(1)}
    torch.save(
        {**counted, "optimizer": OPTIMIZER, "lr_scheduler": {"last": torch.tensor(1)}}, tmp_path / "a.pth"
    )
    for file in (tmp_path / "a.pth", saved(counted, tmp_path / "b.safetensors")):
        check(file, network, sd1)
        assert ": yes" in run("info", file, "--base", models / "sd1").done()
        run("convert", file, "out.safetensors", "--to", "single", "--base", models / "sd1").done()
        check(tmp_path / "out.safetensors", network, sd1)


def test_what_stands_beside_a_control_network_is_of_its_base_or_named(
    network: Any, sd1: Base, tmp_path: Path
) -> None:
    state = original_controlnet(network, prefix="control_model.")
    for other in ("some.a", "time_embed.0.weight"):
        file = saved({**state, other: torch.zeros(2)}, tmp_path / "a.safetensors")
        refusal(file, sd1, f"holds {other}, which a ControlNet does not have")


def test_counts_and_optimizers_are_no_weights(network: Any, sd1: Base, tmp_path: Path) -> None:
    beside = {"global_step": torch.tensor(5), "optimizer.state.0.exp_avg": torch.zeros(2)}
    check(saved({**network.state_dict(), **beside}, tmp_path / "a.safetensors"), network, sd1)


def test_an_optimizer_alone_is_no_adapter(sd1: Base, tmp_path: Path) -> None:
    torch.save({"optimizer": OPTIMIZER}, tmp_path / "a.pth")
    refusal(
        tmp_path / "a.pth", sd1, "is no adapter that controlkit knows: it holds optimizer.state.0.exp_avg"
    )


def test_tensors_without_numbers(network: Any, sd1: Base, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save({**network.state_dict(), "conv_in.bias": torch.zeros(16, device="meta")}, file)
    message = f"{file} has a shape for conv_in.bias and no numbers (torch's meta device)"
    refusal(file, sd1, message)
    assert message in run("info", file).refused()


@pytest.mark.parametrize("wrapping", ["", "model."])
def test_a_control_network_beside_the_networks_it_was_trained_with(
    wrapping: str, network: Any, sd1: Base, tmp_path: Path
) -> None:
    """As a checkpoint of Lightning's holds them."""
    beside = {f"{wrapping}{key}": torch.zeros(2) for key in ("unet.conv_in.bias", "vae.a", "text_encoder.b")}
    state = {f"{wrapping}controlnet.{key}": tensor for key, tensor in network.state_dict().items()}
    check(saved({**beside, **state}, tmp_path / "a.safetensors"), network, sd1)


def test_a_whole_sdxl_that_holds_a_control_network(network: Any, sd1: Base, tmp_path: Path) -> None:
    bases = ("model.diffusion_model.a", "first_stage_model.b", "conditioner.embedders.0.c", "denoiser.sigmas")
    state = original_controlnet(network, prefix="control_model.")
    check(
        saved({**{key: torch.zeros(2) for key in bases}, **state}, tmp_path / "a.safetensors"), network, sd1
    )

"""Every network that can be trained: a few steps, stopped and gone on with, written, read, and used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from killed_runs import recipe, sample_in, write_pictures
from safetensors.torch import load_file, save_file

from controlkit import union
from controlkit.adapters import AdapterInfo, MapSpec, load_adapter, save_adapter
from controlkit.base import load_base
from controlkit.control import Control
from controlkit.controlnet import from_base
from controlkit.formats import control_lora
from controlkit.formats.description import ENCODER
from controlkit.kinds import kind_of
from controlkit.sampling import generate
from controlkit.training import train_recipe
from controlkit.training.config import load_recipe, parse_recipe
from controlkit.training.config_adapter import unused
from controlkit.training.planning_networks import build
from controlkit.training.variants import make_network, started_from, without_low_rank
from controlkit.transfer import encoder_digest

VARIANTS = ("controlnet", "control-lora", "t2i-adapter", "controlnet-xs", "lite")
SMALL = {"rank": 4, "size_ratio": 0.5}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures with maps of two kinds, a base of each family, another SD1, and a cache for all runs."""
    folder = tmp_path_factory.mktemp("variants")
    write_pictures(folder / "pictures", count=6)
    for family in tiny_models.FAMILIES:
        tiny_models.build(folder / family, family)
    tiny_models.build(folder / "old", "sd1", seed=5)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    sample_in(3, patch)  # what the pictures show is no matter here
    yield folder
    patch.undo()


def run(place: Path, name: str, *, family: str = "sd1", **changes: Any) -> Path:
    settings = {"steps": 2, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 1}
    settings |= {"log_every": 1, "base": str(place / family), "data_buckets": False, **changes}
    path = recipe(place / name, place / "pictures", **settings)
    train_recipe(str(path), progress=lambda step: None)
    return place / name


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("*/weights.safetensors"))[-1]
    return load_file(newest)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in lines if "event" not in row]


@pytest.mark.parametrize(
    "adapter",
    [
        pytest.param(v, marks=pytest.mark.slow if v in ("controlnet", "control-lora", "lite") else ())
        for v in VARIANTS
    ],
)
def test_a_variant_is_trained_written_read_and_used(place: Path, adapter: str) -> None:
    folder = run(place, adapter, adapter=adapter, monitor_every=1, sample_every=2, **SMALL)
    assert all(np.isfinite(losses(folder)))
    base = load_base(str(place / "sd1"))
    loaded = load_adapter(str(folder / "controlnet"), base=base)
    assert kind_of(loaded.controlnet).name == ("controlnet" if adapter == "control-lora" else adapter)
    assert loaded.info.map.kind == "canny"
    assert loaded.info.training["recipe"]["adapter"] == adapter
    edges = np.zeros((64, 64, 3), np.uint8)
    edges[20:24] = 255
    rest: dict[str, Any] = {"steps": 2, "height": 64, "width": 64}
    (picture,) = generate(base, "a cube", controls=[Control(loaded, edges, scale=3.0)], **rest)
    (alone,) = generate(base, "a cube", **rest)
    assert (picture != alone).any()
    assert (folder / "samples" / "step-000002.png").is_file()
    told = (folder / "controlnet" / "README.md").read_text()
    pipelines = {"t2i-adapter": "StableDiffusionAdapterPipeline", "lite": "controlkit generate"}
    pipelines["controlnet-xs"] = "StableDiffusionControlNetXSPipeline"
    assert pipelines.get(adapter, "StableDiffusionControlNetPipeline") in told
    assert ("diffusers import" in told) == (adapter != "lite")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", VARIANTS[1:])
def test_a_variant_that_stopped_goes_on_bit_for_bit(
    place: Path, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from controlkit.training import loop

    whole = run(place, f"{adapter}-whole", adapter=adapter, steps=3, **SMALL)
    real, calls = loop.forward_backward, []

    def stops(*args: Any) -> Any:
        calls.append(None)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "forward_backward", stops)
    with pytest.raises(KeyboardInterrupt):
        run(place, f"{adapter}-parts", adapter=adapter, steps=3, **SMALL)
    monkeypatch.undo()
    monkeypatch.setenv("CONTROLKIT_CACHE", str(place / "cache"))
    parts = run(place, f"{adapter}-parts", adapter=adapter, steps=3, **SMALL)
    assert losses(parts) == losses(whole)
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", VARIANTS)
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_every_family_trains_every_variant(place: Path, adapter: str, family: str) -> None:
    folder = run(place, f"{family}-{adapter}", family=family, adapter=adapter, steps=1, **SMALL)
    assert all(np.isfinite(losses(folder)))
    load_adapter(str(folder / "controlnet"), base=load_base(str(place / family)))


@pytest.mark.slow
def test_only_the_updates_of_a_control_lora_are_trained(place: Path) -> None:
    folder = run(place, "lora-alone", adapter="control-lora", learning_rate=1e-3, **SMALL)
    trained = {key.removeprefix("model.") for key in weights(folder) if key.startswith("model.")}
    assert all(
        "lora_" in key or key.startswith("controlnet.controlnet_")  # zero convolutions, and the hint encoder
        for key in trained
    )
    base = load_base(str(place / "sd1"))
    network = load_adapter(str(folder / "controlnet"), base=base).controlnet
    moved = 0
    own = base.unet.state_dict()
    for key, tensor in network.state_dict().items():
        if key in own and tensor.dim() >= 2:
            delta = (tensor - own[key]).flatten(1).double()
            values = torch.linalg.svdvals(delta)
            assert not (values[4:] > 2e-3 * own[key].abs().max() * max(delta.shape) ** 0.5).any(), key
            moved += bool(values[0] > 1e-5)
        elif key in own:
            assert torch.allclose(tensor, own[key].half().float()), key
    assert moved > 20


def test_widths_of_another_hint_encoder_than_the_one_that_is_trained_on_are_refused() -> None:
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "init": "canny"}
    base = load_base("tiny")
    assert started_from(parse_recipe(table | {"hint_channels": [8, 16, 48, 96]}, where="test"), base, 3)
    with pytest.raises(
        ValueError, match=r"widths \[8, 16, 48, 96\], and hint_channels are \[8, 16, 24, 32\]"
    ):
        started_from(parse_recipe(table | {"hint_channels": [8, 16, 24, 32]}, where="test"), base, 3)


@pytest.mark.slow
def test_updates_of_low_rank_survive_half_precision(place: Path) -> None:
    """They are merged into the base's own weights in fp32: bf16 would round most of them away."""
    told = {"adapter": "control-lora", "precision": "bf16", "export_dtype": "fp32", "ema": 0.0}
    folder = run(place, "lora-half", **told, **SMALL)
    trained = {
        k.removeprefix("model.controlnet."): v for k, v in weights(folder).items() if k.startswith("model.")
    }
    own = load_base(str(place / "sd1")).unet.state_dict()
    result = load_adapter(
        str(folder / "controlnet"), base=load_base(str(place / "sd1"))
    ).controlnet.state_dict()
    moved = [
        n.removesuffix(".lora_B.default.weight") for n, t in trained.items() if "lora_B" in n and t.any()
    ]
    moved = [n for n in moved if f"{n}.weight" in own and own[f"{n}.weight"].dim() == 2]
    assert moved
    for name in moved:
        down, up = (trained[f"{name}.lora_{side}.default.weight"] for side in "AB")
        assert torch.allclose(result[f"{name}.weight"] - own[f"{name}.weight"], up @ down, atol=1e-7), name


def test_merged_updates_give_what_they_gave_beside(place: Path) -> None:
    base = load_base(str(place / "sd1"))
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "adapter": "control-lora", "rank": 3}
    network = make_network(parse_recipe(table, where="test"), base.unet, 3)
    tiny_models.randomize_zero_convs(network)
    merged = without_low_rank(network)
    assert not any("lora" in key for key in merged.state_dict())
    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32), torch.rand(1, 3, 64, 64))
    with torch.no_grad():
        first, second = (net(*inputs, return_dict=False)[1] for net in (network.eval(), merged.eval()))
    assert torch.allclose(first, second, atol=1e-4 * float(first.abs().max()))


@pytest.mark.slow
def test_one_network_learns_several_kinds(place: Path) -> None:
    """canny, openpose and depth in one, each picture shown some of them; and each used by itself."""
    changes = {
        "adapter": "controlnet-union", "map": "several", "data_source": "world", "data_maps": "auto",
        "data_map_column": ["canny", "openpose", "depth"], "scenes": 8, "base": "tiny", "data_resolution": 0,
        "data_crop": "centre", "data_flip": 0.0, "data_map_blur": 0.0, "monitor_every": 1, "sample_every": 2,
    }  # fmt: skip
    path = recipe(place / "union", place / "pictures", **{**_SETTINGS, **changes})
    path.write_text(path.read_text().replace("[data.options]", "[unused]").partition("[unused]")[0])
    said: list[str] = []
    train_recipe(str(path), progress=lambda step: said.append(step.message) if step.message else None)
    assert not [line for line in said if "no samples" in line], said
    assert (place / "union" / "samples" / "step-000002.png").is_file()
    base = load_base("tiny")
    loaded = load_adapter(str(place / "union" / "controlnet"), base=base)
    assert loaded.info.map.kind == "canny + openpose + depth"
    assert loaded.controlnet.config.num_control_type == 3
    edges = np.zeros((128, 128, 3), np.uint8)
    pictures = [
        generate(base, "a cube", controls=[Control(loaded, edges, scale=4.0, kind=kind)], steps=2)[0]
        for kind in ("canny", "depth")
    ]
    assert (pictures[0] != pictures[1]).any()


_SETTINGS = {"steps": 2, "warmup": 0, "checkpoint_every": 9, "log_every": 1}


@pytest.mark.parametrize(
    "adapter",
    [
        "controlnet-union",
        *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS),
    ],
)
def test_every_variant_is_planned(place: Path, adapter: str) -> None:
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "adapter": adapter, "base": str(place / "sd1"), **SMALL}
    if adapter == "controlnet-union":
        table["data"] = {"map_column": ["canny", "depth"]}
    parsed = parse_recipe(table, where="test")
    planned = build(parsed).controlnet  # type: ignore[arg-type]
    real = make_network(parsed, load_base(str(place / "sd1")).unet, 3)  # type: ignore[arg-type]
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    assert count(planned) == count(real)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"adapter": "controlnet-xs", "gradient_checkpointing": True},
            "not go with adapter controlnet-xs: add gradient_checkpointing=false",
        ),
        ({"adapter": "lite", "only_mid_control": True}, "goes with adapter controlnet and control-lora"),
        ({"adapter": "controlnet-union"}, "two or more kinds of maps: name them with data.map_column"),
        ({"adapter": "controlnet-sx"}, "adapter: input should be 'controlnet'"),
        ({"adapter": "control-lora", "rank": 0}, "rank: input should be greater than or equal to 1"),
        ({"init_base": "sd15"}, "there is no init"),
        ({"init": "canny", "init_base": "sd15", "adapter": "lite"}, "init_base goes with adapter"),
        ({"data": {"map_column": ["canny", "edges"]}}, "unknown kind of map 'edges'"),
    ],
)
def test_what_a_variant_has_no_part_for_is_refused(changes: dict[str, Any], message: str) -> None:
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, **changes}
    with pytest.raises(ValueError, match=message):
        parse_recipe(table, where="test")


def test_settings_of_another_variant_are_told_where_they_were_given() -> None:
    given = ["rank=4", "size_ratio=0.5", "map_dropout=0.25"]
    assert unused(load_recipe("tiny-canny", given)) == [
        "map_dropout=0.25 does nothing with adapter=controlnet: it is of controlnet-union",
        "rank=4 does nothing with adapter=controlnet: it is of control-lora",
        "size_ratio=0.5 does nothing with adapter=controlnet: it is of controlnet-xs",
    ]
    assert len(unused(load_recipe("tiny-canny", [*given, "adapter=control-lora"]))) == 2
    assert unused(load_recipe("tiny-canny", ["rank=32"])) == []
    hints = ["hint_channels=[8,16,48,96]", "hint_start=standard", "zero_convolution_rate=5"]
    assert unused(load_recipe("tiny-canny", [*hints, "adapter=t2i-adapter"])) == [
        "hint_channels=(8, 16, 48, 96) does nothing with adapter=t2i-adapter, which has none",
        "hint_start=standard does nothing with adapter=t2i-adapter, which has none",
        "zero_convolution_rate=5 does nothing with adapter=t2i-adapter, which has none",
    ]
    assert len(unused(load_recipe("tiny-canny", [*hints, "adapter=lite"]))) == 2
    assert unused(load_recipe("tiny-canny", hints)) == []


def test_a_union_is_no_start_for_other_kinds(place: Path) -> None:
    network = union.from_base(load_base(str(place / "sd1")), 2, hint_channels=(4, 8, 8, 8), seed=1)
    info = AdapterInfo(map=MapSpec("canny + depth"), family="sd1")
    save_adapter(network, place / "two", info=info)
    table = {"task": "controlnet", "map": "several", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "adapter": "controlnet-union", "init": str(place / "two")}
    base = load_base(str(place / "sd1"))
    for columns in (["depth", "canny"], ["canny", "depth"]):
        recipe_: Any = parse_recipe({**table, "data": {"map_column": columns}}, where="test")
        if columns[0] == "canny":
            started_from(recipe_, base, 6)
            continue
        with pytest.raises(ValueError, match=r"knows the maps canny \+ depth, in this order, and data"):
            started_from(recipe_, base, 6)


def test_what_was_learned_is_carried_to_another_base_once(place: Path) -> None:
    """Of a whole ControlNet by the bases' difference; a Control-LoRA is a change to any base already."""
    new = load_base(str(place / "sd1"))
    old = load_base(str(place / "old"))
    network = from_base(old, hint_channels=(4, 8, 8, 8), seed=1)
    own, changed = network.conv_in.weight.clone(), "conv_in.weight"
    network.conv_in.weight.data += 0.5
    info = AdapterInfo(map=MapSpec("canny"), family="sd1")
    save_adapter(network, place / "whole", info=info, dtype=torch.float32)
    tensors = control_lora.reduce(network.state_dict(), old.unet.state_dict(), 1)
    assert "input_blocks.0.0.up" in tensors
    save_file(tensors, place / "lora.safetensors")
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "init_base": str(place / "old")}
    started = {}
    for name in ("whole", "lora.safetensors"):
        recipe_: Any = parse_recipe({**table, "init": str(place / name)}, where="test")
        started[name] = started_from(recipe_, new, 3).state_dict()[changed]
    base = new.unet.state_dict()[changed]
    assert (base - own).abs().max() > 0.1, "the bases differ"
    torch.testing.assert_close(started["whole"], base + 0.5, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(started["lora.safetensors"], base + 0.5, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("told", [True, False])
def test_an_init_of_another_base_than_is_said_is_noted(place: Path, told: bool) -> None:
    """By what its file says of its base, or by how near its weights are to either."""
    bases = {name: load_base(str(place / name)) for name in ("sd1", "old")}
    network = from_base(bases["old"], hint_channels=(4, 8, 8, 8), seed=1)
    digests = {name: encoder_digest(base.unet.state_dict()) for name, base in bases.items()}
    assert digests["old"] != digests["sd1"]
    training = {ENCODER: digests["old"]} if told else {}
    info = AdapterInfo(map=MapSpec("canny"), family="sd1", training=training)
    save_adapter(network, place / "of-old", info=info, dtype=torch.float32)
    table = {"task": "controlnet", "map": "canny", "out": "x", "steps": 1, "batch_size": 1, "warmup": 0}
    table |= {"learning_rate": 1e-3, "init": str(place / "of-old")}

    def notes(base: str, **more: str) -> list[str]:
        said: list[str] = []
        recipe_: Any = parse_recipe(table | {"base": base} | more, where="test")
        started_from(recipe_, bases[base], 3, report=said.append)
        return said

    assert notes("old") == notes("sd1", init_base=str(place / "old")) == []
    (wrong,) = notes("old", init_base=str(place / "sd1"))
    assert (
        ("was trained on another base than init_base" in wrong) if told else ("nearer to the base" in wrong)
    )
    missing = notes("sd1")
    assert ["init_base=ITS_BASE carries it over" in note for note in missing] == [True] * told


@pytest.mark.parametrize("adapter", ["t2i-adapter", "lite", "controlnet-xs", "init"])
def test_a_base_that_fills_holes_is_refused_for_every_adapter(place: Path, adapter: str) -> None:
    folder = place / "holes"
    if not folder.exists():
        tiny_models.build(folder, "sd1", in_channels=9)
        network = from_base(load_base(str(place / "sd1")), hint_channels=(4, 8, 8, 8))
        save_adapter(network, place / "for-holes", info=AdapterInfo(map=MapSpec("canny"), family="sd1"))
    how = {"init": str(place / "for-holes")} if adapter == "init" else {"adapter": adapter}
    with pytest.raises(ValueError, match=r"fills holes \(its U-Net takes 9 channels\): train the adapter on"):
        run(place, f"holes-{adapter}", base=str(folder), steps=1, **how)


@pytest.mark.slow
def test_an_adapter_of_another_kind_is_no_start(place: Path) -> None:
    folder = run(place, "start-lite", adapter="lite", steps=1)
    with pytest.raises(ValueError, match="is a light network, and adapter=controlnet is trained"):
        run(place, "start-other", init=str(folder / "controlnet"), steps=1)
    again = run(place, "start-again", adapter="lite", init=str(folder / "controlnet"), steps=1)
    assert np.isfinite(losses(again)).all()

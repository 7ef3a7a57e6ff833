"""`controlkit transfer`: an adapter's weights on another base, its header, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from adapter_files import controlnet_of, original_controlnet, residuals, same, saved
from diffusers import T2IAdapter
from outcomes import Run
from safetensors.torch import load_file

from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter, write_adapter
from controlkit.base import Base, load_base
from controlkit.formats import control_lora
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.formats.description import ENCODER
from controlkit.formats.fitting import BaseStructure
from controlkit.transfer import encoder_digest
from controlkit.transfer_job import check_bases

Bases = tuple[Base, Base]
COPIED = ("conv_in.", "time_embedding.", "add_embedding.", "down_blocks.", "mid_block.")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bases]:
    """Two bases of a family, which differ in every weight; each pair is built once."""
    built: dict[str, Bases] = {}

    def pair(family: str) -> Bases:
        if family not in built:
            folder = tmp_path_factory.mktemp(family)
            first, second = (
                load_base(str(tiny_models.build(folder / name, family, sample_size=8, seed=seed)))
                for seed, name in enumerate(("first", "second"))
            )
            built[family] = first, second
        return built[family]

    return pair


def trained(base: Base, path: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter whose weights have moved away from its base's a little, as after training."""
    network = controlnet_of(base)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    info = AdapterInfo(
        map=MAPS["canny"],
        family=base.family,
        prediction_type=base.prediction_type,
        base=base.name,
        training={"steps": 7},
    )
    save_adapter(network, path, info=info, dtype=dtype)
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_nothing_is_written_over_the_bases(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")
    (tmp_path / "one.safetensors").write_bytes(b"a base")
    over = ["-o", "one.safetensors"]
    for bases in (["--from", "one.safetensors", "--to", new.name], ["--from", old.name, "--to", over[1]]):
        assert "would overwrite one.safetensors" in run("transfer", source, *bases, *over).refused()
    lora = ["convert", source, "one.safetensors", "--to", "control-lora", "--base"]
    assert "would overwrite one.safetensors" in run(*lora, "one.safetensors").refused()
    part = next((Path(old.name) / "unet").glob("*.safetensors"))
    assert f"would overwrite {old.name}" in run("convert", source, part, *lora[3:], old.name).refused()
    assert (tmp_path / "one.safetensors").read_bytes() == b"a base"


def test_a_folder_with_other_files_is_not_replaced(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = pair("sd1")
    source, clone = trained(old, tmp_path / "mine"), trained(old, tmp_path / "clone")
    (clone / ".git").mkdir()
    (clone / "README.md").write_text("mine")
    convert = ["convert", source, "clone", "--to", "diffusers"]
    transfer = ["transfer", source, "--from", old.name, "--to", new.name, "-o"]
    for command in (convert, [*transfer, "clone"]):
        assert (
            "besides an adapter the folder holds .git, README.md, which would be lost"
            in run(*command).refused()
        )
    assert (clone / "README.md").read_text() == "mine"
    shutil.rmtree(clone / ".git")
    (clone / "README.md").unlink()
    (clone / "diffusion_pytorch_model_old").mkdir()  # named as weights are, and none
    assert "holds diffusion_pytorch_model_old, which would be lost" in run(*convert).refused()
    (clone / "diffusion_pytorch_model_old").rmdir()
    run(*convert).done()  # an adapter alone is replaced
    monkeypatch.chdir(clone)
    for command in ([*convert[:2], ".", *convert[3:]], [*transfer, "."]):
        assert "cannot write .: the command runs in it" in run(*command).refused()


@pytest.mark.slow
def test_a_folder_called_like_a_bundled_adapter_is_meant_where_it_was_written(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")
    out = run("transfer", source, "--from", old.name, "--to", new.name, "-o", "depth").done()
    assert "wrote depth: a ControlNet for SD1" in out
    assert "--adapter canny=./depth" in out
    out = run("convert", source, "canny", "--to", "diffusers", "--base", old.name).done()
    assert "wrote canny: a ControlNet for SD1" in out
    assert "--adapter canny=./canny" in out
    run("convert", "canny", "canny", "--to", "diffusers").done()  # of the bundled one, which comes first
    run("convert", source, "tiny", "--to", "diffusers").done()  # "tiny" is a bundled base, and no adapter
    assert "tiny would overwrite tiny" in run("convert", "tiny", "tiny", "--to", "diffusers").refused()


def test_one_number_for_all_blocks_is_that_number_for_each() -> None:
    unet = {"block_out_channels": (8, 16), "in_channels": 4, "out_channels": 4, "attention_head_dim": 8}
    check_bases(BaseStructure("a", unet), BaseStructure("b", {**unet, "attention_head_dim": [8, 8]}))
    with pytest.raises(ValueError, match="attention_head_dim is 8 in the one and 8/4 in the other"):
        check_bases(BaseStructure("a", unet), BaseStructure("b", {**unet, "attention_head_dim": [8, 4]}))


@pytest.mark.parametrize(
    "family", ["sd1", *(pytest.param(family, marks=pytest.mark.slow) for family in ("sd2", "sdxl"))]
)
def test_the_command_adds_what_the_bases_differ_by(
    family: str, run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    """Against the original project's formula, w + new - old, in its own words."""
    old, new = pair(family)
    source = trained(old, tmp_path / "mine", dtype=torch.float16)
    out = run("transfer", source, "--from", old.name, "--to", new.name, "-o", "moved").done()
    assert out.startswith("wrote moved: a ControlNet for ")
    assert f"--base {new.name}" not in out.splitlines()[0]
    assert out.splitlines()[-1].endswith(f"--base {new.name} --control canny=PICTURE --adapter canny=moved")
    assert "note:" not in out
    before, after = weights(source), weights(tmp_path / "moved")
    first, second = old.unet.state_dict(), new.unet.state_dict()
    assert before.keys() == after.keys()
    copied = [key for key in before if key.startswith(COPIED)]
    assert 0 < len(copied) < len(before)
    for key in before:
        expected = before[key].float()
        if key in copied:
            expected = expected + second[key] - first[key]
        assert after[key].dtype == torch.float16
        assert torch.allclose(after[key].float(), expected, atol=2e-3 if key in copied else 0), key
    adapter = load_adapter("moved", base=new)
    assert adapter.info.base == "second"  # and not where it lies
    assert adapter.info.map == MAPS["canny"]
    history = [{"from": "first", "to": "second"}]
    assert adapter.info.training == {"steps": 7, "transfers": history, ENCODER: encoder_digest(second)}


def test_a_base_is_known_by_its_files_of_either_precision(sd1: Base) -> None:
    state = sd1.unet.state_dict()
    known = encoder_digest(state)
    assert encoder_digest({key: state[key].half() for key in reversed(state)}) == known
    assert encoder_digest({**state, "conv_out.weight": state["conv_out.weight"] + 1}) == known
    assert encoder_digest({**state, "conv_in.bias": state["conv_in.bias"] + 1}) != known


def test_there_and_back_returns_the_weights(run: Run, pair: Callable[[str], Bases], tmp_path: Path) -> None:
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")
    run("transfer", source, "--from", old.name, "--to", new.name, "-o", "there").done()
    out = run("transfer", "there", "--from", new.name, "--to", old.name, "-o", "back").done()
    before, there, back = weights(source), weights(tmp_path / "there"), weights(tmp_path / "back")
    assert all(torch.allclose(back[key], before[key], rtol=0, atol=1e-6) for key in before)
    assert any(not torch.allclose(there[key], before[key], atol=1e-2) for key in before)
    history = load_adapter("back", base=old).info.training["transfers"]
    assert history == [{"from": "first", "to": "second"}, {"from": "second", "to": "first"}]
    assert "note:" not in out


def test_one_base_leaves_every_bit(run: Run, pair: Callable[[str], Bases], tmp_path: Path) -> None:
    old, _ = pair("sdxl")
    source = trained(old, tmp_path / "mine", dtype=torch.bfloat16)
    out = run("transfer", source, "--from", old.name, "--to", old.name, "-o", "moved").done()
    assert "note: the two bases have the same encoder" in out
    before, after = weights(source), weights(tmp_path / "moved")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["sd2", *(pytest.param(f, marks=pytest.mark.slow) for f in ("sd1", "sdxl"))]
)
def test_an_untrained_copy_becomes_the_other_bases_copy(
    family: str, run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    old, new = pair(family)
    save_adapter(controlnet_of(old), tmp_path / "mine", info=AdapterInfo(), dtype=torch.float32)
    run("transfer", "mine", "--from", old.name, "--to", new.name, "-o", "moved").done()
    moved = load_adapter("moved", base=new).controlnet
    expected = controlnet_of(new)  # the same hint encoder and outputs, by the same seed
    assert same(residuals(moved, new), residuals(expected, new))
    assert not same(residuals(moved, new), residuals(controlnet_of(old), new))


def test_any_file_of_a_control_network_is_carried_over(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    """In the original's names, as a Control-LoRA, as a difference: the same network on the new base."""
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")
    network = load_adapter(str(source), base=old).controlnet
    state, unet = network.state_dict(), old.unet.state_dict()
    run("transfer", source, "--from", old.name, "--to", new.name, "-o", "expected").done()
    saved(original_controlnet(network, prefix="control_model."), tmp_path / "theirs.pth")
    saved(control_lora.reduce(state, unet, 4096), tmp_path / "lora.safetensors")
    for name in ("theirs.pth", "lora.safetensors"):
        run("transfer", name, "--from", old.name, "--to", new.name, "-o", "out.safetensors").done()
        assert open_adapter_file("out.safetensors").layout == "original"
        moved = load_adapter("out.safetensors", base=new).controlnet.state_dict()
        expected = weights(tmp_path / "expected")
        assert all(torch.allclose(moved[key], expected[key], atol=1e-6) for key in expected), name


def test_the_precision_is_the_files_unless_another_is_asked_for(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine", dtype=torch.float16)
    order = ("transfer", source, "--from", old.name, "--to", new.name, "-o", "a.safetensors")
    run(*order).done()
    half = load_file("a.safetensors")
    run(*order, "--dtype", "fp32").done()
    full = load_file("a.safetensors")
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    assert all(torch.equal(half[key], full[key].half()) for key in full)  # rounded once


@pytest.mark.slow
def test_what_may_go_wrong_is_noted(run: Run, pair: Callable[[str], Bases], tmp_path: Path) -> None:
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")
    out = run("transfer", source, "--from", new.name, "--to", old.name, "-o", "wrong").done()
    assert f"note: the adapter is nearer to the encoder of {old.name} than to that of {new.name}" in out
    assert f"note: the adapter says that it was trained on {old.name}, not on {new.name}" in out
    other = tiny_models.build(tmp_path / "v", "sd1", sample_size=8, seed=1, prediction_type="v_prediction")
    out = run("transfer", source, "--from", old.name, "--to", other, "-o", "moved").done()
    assert f"note: {old.name} predicts epsilon and {other} v_prediction: what the adapter learned" in out
    assert load_adapter("moved", base=load_base(str(other))).info.prediction_type == "v_prediction"


def test_bases_that_do_not_suit_are_refused_by_their_configurations(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    old, new = pair("sd1")
    source = trained(old, tmp_path / "mine")

    def refused(before: object, after: object) -> str:
        told = run("transfer", source, "--from", before, "--to", after, "-o", "out").refused()
        assert not Path("out").exists()
        return told

    def changed(**changes: object) -> Path:
        """A base that is only a configuration: nothing else may be asked of it."""
        folder = tmp_path / "changed"
        for part, name in (("unet", "config.json"), ("scheduler", "scheduler_config.json")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            told = json.loads((Path(new.name) / part / name).read_text())
            (folder / part / name).write_text(json.dumps(told | (changes if part == "unet" else {})))
        return folder

    xl = pair("sdxl")[0].name
    assert refused(old.name, xl).endswith(
        f"is SD1 and the base {xl} is SDXL: an adapter can only be carried over within its family"
    )
    assert "is for SD1" in refused(xl, pair("sdxl")[1].name)
    holes = changed(in_channels=9)
    assert refused(old.name, holes).startswith(f"the base {holes} fills holes (its U-Net takes 9 channels)")
    assert refused(holes, new.name).startswith(f"the base {holes} fills holes")
    wide = refused(old.name, changed(block_out_channels=[16, 32, 32, 64]))
    assert wide.endswith("block_out_channels is 16/32/32/32 in the one and 16/32/32/64 in the other")
    told = refused(old.name, changed(time_cond_proj_dim=256))
    assert told.endswith("time_cond_proj_dim is None in the one and 256 in the other")
    assert refused("nobody", new.name).startswith("unknown base 'nobody'")


def test_what_holds_no_copy_of_an_encoder_is_refused(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    old, new = pair("sd1")
    network = T2IAdapter(channels=(16, 32, 32, 32), num_res_blocks=2, adapter_type="full_adapter")
    write_adapter(network, tmp_path / "t2i.safetensors", layout="single", info=AdapterInfo())
    told = run("transfer", "t2i.safetensors", "--from", old.name, "--to", new.name, "-o", "out").refused()
    assert re.match(r"t2i.safetensors is a T2I-Adapter.*: it holds no copy of its base's encoder", told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "out.pth"), "cannot write out.pth: pickles are only read"),
        (("-o", "no/out"), "the folder no does not exist"),
        (("-o", "full"), "cannot save the adapter over what is there: full is not an adapter folder"),
        (("-o", "mine"), "mine would overwrite mine, which it is made from"),
        (("-o", "out", "--dtype", "fp15"), "unknown precision 'fp15'"),
    ],
)
def test_where_nothing_can_be_written_is_said_first(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").write_bytes(b"precious")
    assert message in run("transfer", "mine", "--from", "tiny", "--to", "tiny", *arguments).refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "mine"]
    assert (tmp_path / "full" / "photo.png").read_bytes() == b"precious"


def test_an_adapter_becomes_a_control_lora_and_says_what_is_kept(
    run: Run, pair: Callable[[str], Bases], tmp_path: Path
) -> None:
    """`convert --to control-lora` writes a file that loads again; more rank keeps more."""
    base, _ = pair("sd1")
    source = trained(base, tmp_path / "mine")
    whole = load_adapter(str(source), base=base).controlnet
    shares, gaps = [], []
    for rank in (1, 4):
        order = ("--to", "control-lora", "--base", base.name, "--rank", rank)
        out = run("convert", source, "lora.safetensors", *order).done()
        assert "a Control-LoRA" in out.splitlines()[0]
        told = re.fullmatch(
            rf"rank {rank} keeps ([\d.]+)% of what was changed in its base's weights", out.splitlines()[1]
        )
        assert told is not None
        shares.append(float(told[1]))
        adapter = load_adapter("lora.safetensors", base=base)
        assert adapter.info.map == MAPS["canny"]
        ours, theirs = residuals(adapter.controlnet, base), residuals(whole, base)
        gaps.append(sum(float((a - b).square().sum()) for a, b in zip(ours, theirs, strict=True)))
    assert 0 < shares[0] < shares[1] < 100
    assert gaps[0] > gaps[1] > 0

"""Adapters written in every layout: the same bytes again, what others read, and never a part of a file."""

import copy
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from adapter_files import controlnet_of, original_controlnet, refusal, residuals, same, saved
from diffusers import ControlNetModel
from outcomes import Run
from safetensors.torch import load_file, save_file

from controlkit import convert_job, files
from controlkit.adapters import MAPS, Adapter, AdapterInfo, MapSpec, load_adapter, write_adapter
from controlkit.base import Base
from controlkit.folders import quiet_libraries, read_header
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.formats.building import build_network, heads_are_known
from controlkit.formats.hashing import HASH_KEY, tensor_hash
from controlkit.silence import Silent

Load = Callable[[str], Base]
INFO = AdapterInfo(
    map=MAPS["canny"],
    family="sd1",
    prediction_type="epsilon",
    base="sd15",
    resolution=512,
    title="Kanten 🙂",
    training={"steps": 400, "scores": {"edge_f1": 0.5}},
)
LAYOUTS = ("diffusers", "single", "original")


def place(layout: str, folder: Path, name: str = "a") -> Path:
    return folder / (name if layout == "diffusers" else f"{name}-{layout}.safetensors")


def weights_of(path: Path) -> Path:
    return path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trips_are_bitwise(family: str, layout: str, load: Load, tmp_path: Path) -> None:
    base = load(family)
    network = controlnet_of(base)
    first = place(layout, tmp_path)
    info = replace(INFO, family=family, prediction_type=base.prediction_type)
    write_adapter(network, first, layout=layout, info=info)
    read = load_adapter(str(first), base=base)
    ours, theirs = read.controlnet.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read.info == info
    again = place(layout, tmp_path, "b")
    write_adapter(read, again, layout=layout)
    assert weights_of(first).read_bytes() == weights_of(again).read_bytes()
    opened = open_adapter_file(first)
    assert opened.layout == ("original" if layout == "original" else "diffusers")
    assert opened.is_told


def test_all_layouts_one_after_the_other_come_back_to_the_first_bytes(load: Load, tmp_path: Path) -> None:
    adapter = Adapter(controlnet_of(load("sdxl")), INFO, "a")
    write_adapter(adapter, tmp_path / "first.safetensors", layout="single", dtype=torch.bfloat16)
    for number, layout in enumerate(("original", "diffusers", "original", "single")):
        path = place(layout, tmp_path, f"step{number}")
        write_adapter(adapter, path, layout=layout, dtype=torch.bfloat16)
        adapter = load_adapter(str(path), base=load("sdxl"), dtype=torch.bfloat16)
    assert path.read_bytes() == (tmp_path / "first.safetensors").read_bytes()


def test_a_file_that_stands_alone_needs_no_base_to_be_whole(load: Load, run: Run, tmp_path: Path) -> None:
    """Its header has the configuration, the heads and norms of which no shape tells."""
    base = load("sd2")
    network = controlnet_of(base)
    write_adapter(network, tmp_path / "a.safetensors", layout="original", info=INFO)
    run("convert", "a.safetensors", "folder", "--to", "diffusers").done()
    with quiet_libraries():
        theirs = ControlNetModel.from_pretrained(tmp_path / "folder")
    theirs = copy.deepcopy(theirs)  # out of the mapped file, where some processors' kernels round otherwise
    assert same(residuals(theirs, base), residuals(network, base))
    saved(network.state_dict(), tmp_path / "bare.safetensors")
    told = run("convert", "bare.safetensors", "other", "--to", "diffusers").refused()
    assert "does not say how many attention heads it has: name the base" in told


@pytest.mark.parametrize(("width", "linear", "heads"), [(768, False, 2), (1024, True, (2, 4, 4))])
def test_heads_are_not_guessed_of_a_small_network_by_its_texts_width(
    width: int, linear: bool, heads: Any, tmp_path: Path
) -> None:
    """The published models' heads are those of the published widths alone."""
    network = ControlNetModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        cross_attention_dim=width,
        use_linear_projection=linear,
        attention_head_dim=heads,
        norm_num_groups=8,
    )
    saved(network.state_dict(), tmp_path / "bare.safetensors")
    file = open_adapter_file(str(tmp_path / "bare.safetensors"))
    assert not heads_are_known(file)
    convert_job.run(convert_job.plan(str(file.path), f"{tmp_path}/a.safetensors", to="original"), Silent())
    written = open_adapter_file(str(tmp_path / "a.safetensors"))
    assert not written.is_told  # so that the base says it
    with pytest.raises(ValueError, match="does not say how many attention heads it has: name the base"):
        build_network(file)


def from_single_file(network: Any, folder: Path, layout: str) -> Any:
    """A network written into one file and read by diffusers, with a local configuration."""
    write_adapter(network, folder / "a.safetensors", layout=layout, info=INFO)
    network.save_config(folder / "config")
    with quiet_libraries():
        theirs = ControlNetModel.from_single_file(
            str(folder / "a.safetensors"), config=str(folder / "config"), local_files_only=True
        )
    return copy.deepcopy(theirs).eval()  # out of the mapped file


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_diffusers_reads_our_original_file(family: str, load: Load, tmp_path: Path) -> None:
    """`from_single_file`: another project's map of the same names."""
    network = controlnet_of(load(family))
    theirs = from_single_file(network, tmp_path, "original")
    assert same(residuals(theirs, load(family)), residuals(network, load(family)))


def test_diffusers_reads_an_sdxl_single_file_and_no_original_one(load: Load, tmp_path: Path) -> None:
    """It has no place for the original's label_emb: when it has one, `write_adapter` may say so."""
    network = controlnet_of(load("sdxl"))
    theirs = from_single_file(network, tmp_path, "single")
    assert same(residuals(theirs, load("sdxl")), residuals(network, load("sdxl")))
    with pytest.raises(NotImplementedError, match="meta tensor"):
        from_single_file(network, tmp_path, "original")


def test_we_write_what_the_original_project_would(load: Load, tmp_path: Path) -> None:
    for family in tiny_models.FAMILIES:
        network = controlnet_of(load(family))
        write_adapter(network, tmp_path / f"{family}.safetensors", layout="original", info=INFO)
        ours = load_file(tmp_path / f"{family}.safetensors")
        theirs = original_controlnet(network, prefix="control_model.")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_header_is_for_everybody(load: Load, tmp_path: Path) -> None:
    network = controlnet_of(load("sd1"))
    write_adapter(
        network,
        tmp_path / "a.safetensors",
        layout="original",
        info=INFO,
        dtype=torch.float16,
        date="2026-11-28",
    )
    metadata = read_header(tmp_path / "a.safetensors")["__metadata__"]
    assert list(metadata) == sorted(metadata)
    described = json.loads(metadata.pop("controlkit"))
    assert described["map"]["kind"] == "canny"
    assert described["structure"]["attention_head_dim"] == 2
    assert metadata == {
        "format": "pt",
        "modelspec.architecture": "stable-diffusion-v1/controlnet",
        "modelspec.date": "2026-11-28",
        "modelspec.hash_sha256": tensor_hash(tmp_path / "a.safetensors"),
        "modelspec.implementation": "https://github.com/lllyasviel/ControlNet",
        "modelspec.prediction_type": "epsilon",
        "modelspec.preprocessor": "canny",
        "modelspec.resolution": "512x512",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": "Kanten 🙂",
        "modelspec.usage_hint": "canny: white-on-black, high 200, low 100",
    }
    write_adapter(network, tmp_path / "b.safetensors", layout="single")
    bare = read_header(tmp_path / "b.safetensors")["__metadata__"]
    assert "modelspec.date" not in bare
    assert "modelspec.usage_hint" not in bare
    assert next(network.parameters()).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_flipped_bit_is_named(layout: str, load: Load, tmp_path: Path) -> None:
    base = load("sd1")
    path = place(layout, tmp_path)
    write_adapter(controlnet_of(base), path, layout=layout, info=INFO)
    file = weights_of(path)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    refusal(path, base, f"{file} is damaged: its weights are not those it was written with (SHA-256)")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
@pytest.mark.parametrize("layout", ["single", "original"])
def test_files_are_as_readable_as_the_umask_says(
    umask: int, mode: int, layout: str, load: Load, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        write_adapter(controlnet_of(load("sd1")), tmp_path / "a.safetensors", layout=layout)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_written_leaves_the_old_file(load: Load, tmp_path: Path) -> None:
    network = controlnet_of(load("sd1"))
    file = tmp_path / "a.safetensors"
    write_adapter(network, file, layout="single")
    before = file.read_bytes()
    with torch.no_grad():
        network.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"as float16: the weights in conv_in.weight are not all finite"):
        write_adapter(network, file, layout="single", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"the name of one file of weights must end with \.safetensors"):
        write_adapter(network, tmp_path / "a.pth", layout="original")
    with pytest.raises(ValueError, match=r"unknown layout 'origina' \(did you mean 'original'\?\)"):
        write_adapter(network, tmp_path / "b.safetensors", layout="origina")
    with pytest.raises(ValueError, match="a Linear is no adapter that can be written"):
        write_adapter(torch.nn.Linear(1, 1), tmp_path / "b.safetensors", layout="single")
    with pytest.raises(ValueError, match=r"the folder .* does not exist"):
        write_adapter(network, tmp_path / "no" / "a.safetensors", layout="single")
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


_SLOW_WRITER = """
import signal, sys, time
from pathlib import Path
from controlkit import files
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
with files.replace_file(sys.argv[1]) as temporary:
    with temporary.open("wb") as file:
        file.write(b"half")
        file.flush()
        (temporary.parent / ".tmp0yZJqZ").touch()  # as safetensors does
        print("half", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_killed_while_writing_the_old_file_stays(
    how: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"old")
    child = subprocess.Popen(
        [sys.executable, "-c", _SLOW_WRITER, str(file)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    with child, child.stdout:
        assert child.stdout.readline() == b"half\n"
        child.send_signal(how)
    assert file.read_bytes() == b"old"
    left = [path.name for path in tmp_path.iterdir() if path != file]
    if how == signal.SIGINT:
        assert left == []
    else:  # nothing can be removed any more; what is left is hidden and has no model's name
        assert all(name.startswith(".") and name.endswith(".tmp") for name in left)
        monkeypatch.setattr(files, "_LEFT_FOR", 0.0)  # as if it were of yesterday
        files.write_bytes(tmp_path / "b.txt", b"")  # the next thing that is written there
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.txt"]


def test_convert_and_info(run: Run, load: Load, models: Path, tmp_path: Path) -> None:
    base = models / "sd1"
    out = run("convert", models / "canny-sd1", "canny.safetensors", "--to", "original").done()
    first, _, how = out.splitlines()
    assert first.startswith(
        "wrote canny.safetensors: a ControlNet for SD1, original keys, 724,992 parameters"
    )
    assert ", float16, " in first
    assert how == (
        "  controlkit generate PROMPT --base BASE --control canny=PICTURE --adapter canny=canny.safetensors"
    )  # of SD1, and not of its published sizes
    told = run("info", "canny.safetensors", "--base", base).done().splitlines()
    assert told[0].startswith("canny.safetensors: a ControlNet for SD1, original keys, ")
    assert "map: canny: white-on-black, high 200, low 100" in told
    assert f"fits {base}: yes" in told
    assert told[-1].endswith(f"--base {base} --control canny=PICTURE --adapter canny=canny.safetensors")
    other = run("info", "canny.safetensors", "--base", models / "sdxl").done().splitlines()
    assert other[-1].startswith(f"fits {models / 'sdxl'}: no, canny.safetensors does not fit the base")
    assert "cross_attention_dim 32" in other[-1]
    assert "cross_attention_dim 64" in other[-1]
    wide = run("convert", "canny.safetensors", "wide", "--to", "diffusers", "--dtype", "fp32").done()
    assert "wrote wide: a ControlNet for SD1, diffusers keys" in wide
    assert ", float32, " in wide
    assert (
        "is for SD1"
        in run("convert", "wide", "b.safetensors", "--to", "single", "--base", models / "sdxl").refused()
    )
    run("convert", "wide", "canny.safetensors", "--to", "original", "--dtype", "bf16").done()  # replaces it
    assert open_adapter_file("canny.safetensors").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("a", "b.safetensors", "--to", "comfy"),
            "unknown layout 'comfy'; choose from: control-lora, diffusers",
        ),
        (
            ("a", "b.safetensors", "--to", "single", "--dtype", "fp15"),
            "unknown precision 'fp15' (did you mean",
        ),
        (("a", "b.safetensors", "--to", "single", "--rank", "4"), "--rank 4 is a Control-LoRA's"),
        (("a", "b.safetensors", "--to", "control-lora"), "name that base (--base)"),
        (
            ("a", "b.safetensors", "--to", "control-lora", "--base", "tiny", "--rank", "0"),
            "rank must be a whole number from 1 to 1024, not 0",
        ),
        (("a", "b.pth", "--to", "original"), "pickles are only read; name it .safetensors"),
        (("a", "b", "--to", "single"), "--to single writes one file: name it .safetensors, not b"),
        (("a", "b.safetensors", "--to", "diffusers"), "--to diffusers writes a folder"),
        (("nobody", "b", "--to", "diffusers"), "no adapter called 'nobody'"),
        (("mine.safetensors", "mine.safetensors", "--to", "single"), "would overwrite mine.safetensors"),
        (("inside/mine.safetensors", "inside", "--to", "diffusers"), "inside would overwrite inside/mine"),
        (("canny", "no/b.safetensors", "--to", "single"), "the folder no does not exist"),
        (("canny", "full", "--to", "diffusers"), "cannot save the adapter over what is there"),
    ],
)
def test_conversions_that_are_refused(arguments: tuple[str, ...], message: str, run: Run) -> None:
    Path("inside").mkdir()
    Path("full").mkdir()
    for file in ("mine.safetensors", "inside/mine.safetensors", "full/photo.png"):
        Path(file).write_bytes(b"precious")
    assert message in run("convert", *arguments).refused()
    assert Path("mine.safetensors").read_bytes() == b"precious"
    assert [path.name for path in Path("inside").iterdir()] == ["mine.safetensors"]
    assert sorted(path.name for path in Path().iterdir()) == ["full", "inside", "mine.safetensors"]


def test_info_of_a_large_file_reads_its_header_alone_and_needs_no_torch(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = ControlNetModel(cross_attention_dim=768)
    header: dict[str, Any] = {}
    end = 0
    for key, tensor in network.state_dict().items():
        size = 2 * tensor.numel()
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "large.safetensors"
    with file.open("wb") as stream:  # a file of SD1.5's true size with a hole in it
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    code = (
        "import sys\nfrom controlkit import info_job\n"
        "print('\\n'.join(info_job.describe(sys.argv[1], base='sd15')))\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules"
    )
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    assert time.monotonic() - begun < 10  # on the busiest machine; half a second on an idle one
    lines = done.stdout.splitlines()
    assert lines[0] == (
        f"{file}: a ControlNet for SD1, diffusers keys, 361,279,120 parameters, float16, 722.6 MB"
    )
    assert lines[1:3] == ["the file says nothing of its map, its base or its training", "fits sd15: yes"]
    assert lines[-1].startswith("  controlkit generate PROMPT --base sd15 --map KIND=MAP --adapter")


def test_a_bundled_adapter_serves_as_one_file(run: Run, photo: Path, tmp_path: Path) -> None:
    """The command that `convert` prints makes the picture that the folder makes."""
    told = run("convert", "canny", "canny.safetensors", "--to", "original").done().splitlines()[-1]
    assert (
        told
        == '  controlkit generate "a red figure" --control canny=PICTURE --adapter canny=canny.safetensors'
    )
    command = ["generate", "a red figure", "--steps", 2, "--seed", 5, "--control", f"canny={photo}"]
    run(*command, "--adapter", "canny=canny.safetensors", "-o", "a.png").done()
    run(*command, "-o", "b.png").done()
    from controlkit.images import load_picture

    assert (load_picture("a.png") == load_picture("b.png")).all()


def test_the_map_spec_of_a_file_is_checked_against_its_network(load: Load, tmp_path: Path) -> None:
    info = AdapterInfo(map=MapSpec("normals", channels=5), family="sd1")
    write_adapter(controlnet_of(load("sd1")), tmp_path / "a.safetensors", layout="single", info=info)
    refusal(
        tmp_path / "a.safetensors", load("sd1"), "says that its maps have 5 channels, and its network takes 3"
    )


def test_another_prediction_type_is_a_warning(load: Load, tmp_path: Path) -> None:
    info = AdapterInfo(family="sd1", prediction_type="v_prediction")
    write_adapter(controlnet_of(load("sd1")), tmp_path / "a.safetensors", layout="single", info=info)
    with pytest.warns(UserWarning, match=r"trained for v_prediction and the base .* predicts epsilon"):
        load_adapter(str(tmp_path / "a.safetensors"), base=load("sd1"))


@pytest.mark.slow
def test_sd15_at_its_real_size_through_both_layouts(run: Run, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ControlNetModel(cross_attention_dim=768).to(torch.float16)
    theirs = original_controlnet(network, prefix="control_model.")
    saved(theirs, tmp_path / "control_v11p_sd15_canny.pth")
    out = run("convert", "control_v11p_sd15_canny.pth", "folder", "--to", "diffusers").done()
    assert "a ControlNet for SD1, diffusers keys, 361,279,120 parameters, float16, 722.6 MB" in out
    run("convert", "folder", "back.safetensors", "--to", "original").done()
    ours = load_file(tmp_path / "back.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert read_header(tmp_path / "back.safetensors")["__metadata__"][HASH_KEY].startswith("0x")
    with quiet_libraries():
        read = ControlNetModel.from_single_file(
            str(tmp_path / "back.safetensors"),
            config=str(tmp_path / "folder"),
            local_files_only=True,
            torch_dtype=torch.float16,
        )
    left, right = read.state_dict(), network.state_dict()
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_without_a_description_the_structure_is_told(load: Load, tmp_path: Path) -> None:
    for family in tiny_models.FAMILIES:
        file = tmp_path / f"{family}.safetensors"
        write_adapter(controlnet_of(load(family), conditioning_channels=1), file, layout="single")
        assert open_adapter_file(file).info == AdapterInfo(map=MapSpec(channels=1), family=family)


@pytest.mark.slow
def test_a_training_that_starts_from_a_file_is_planned_as_from_a_folder(run: Run) -> None:
    """The hint encoder's widths are read from the file: a bundled adapter's are not the usual ones."""
    from controlkit.training.config import load_recipe
    from controlkit.training.planning_networks import build

    run("convert", "canny", "canny.safetensors", "--to", "original").done()
    recipe = load_recipe("tiny-canny")
    sizes = [
        sum(
            parameter.numel()
            for parameter in build(recipe.model_copy(update={"init": init})).controlnet.parameters()
        )
        for init in ("canny.safetensors", "canny")
    ]
    assert sizes == [2_975_736, 2_975_736]


def test_a_part_of_what_is_read_is_not_written_over(run: Run, load: Load, tmp_path: Path) -> None:
    write_adapter(controlnet_of(load("sd1")), tmp_path / "own", layout="diffusers", info=INFO)
    weights = tmp_path / "own" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    message = run("convert", "own", weights, "--to", "original").refused()
    assert "would overwrite own, which it is made from" in message
    blob = tmp_path / "blob.safetensors"  # as in the hub's cache
    weights.rename(blob)
    weights.symlink_to(blob)
    assert "would overwrite own" in run("convert", "own", blob, "--to", "single").refused()
    assert blob.read_bytes() == before
    run("convert", "own", tmp_path / "own" / "half.safetensors", "--to", "single", "--dtype", "fp16").done()


@pytest.mark.parametrize("options", [{}, {"safe_serialization": False}], ids=["safetensors", "pickles"])
def test_shards_are_converted_as_they_are_loaded(
    options: dict[str, bool], run: Run, load: Load, tmp_path: Path
) -> None:
    network = controlnet_of(load("sd1"))
    network.save_pretrained(tmp_path / "shards", max_shard_size="500KB", **options)
    assert len(list((tmp_path / "shards").iterdir())) > 3
    run("convert", "shards", "whole.safetensors", "--to", "single").done()
    assert set(load_file("whole.safetensors")) == set(network.state_dict())
    for name, tensor in load_file("whole.safetensors").items():
        assert tensor.equal(network.state_dict()[name])
    assert "ControlNet" in run("info", "shards").done()


def test_files_that_others_have_written_in(load: Load, tmp_path: Path) -> None:
    base = load("sd1")
    file = tmp_path / "a.safetensors"
    write_adapter(controlnet_of(base), file, layout="single", info=INFO)
    tensors = load_file(file)
    save_file(tensors, file, {"controlkit": "junk"})  # an entry of that name which is not ours
    assert load_adapter(str(file), base=base).info.title == ""
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, file)
    unwrapped = load_adapter(str(file), base=base).controlnet.state_dict()
    assert unwrapped.keys() == tensors.keys()
    assert all(unwrapped[name].equal(tensor) for name, tensor in tensors.items())
    file.write_bytes(b"\x80\0\0\0\0")
    with pytest.raises(ValueError, match=r"is cut short or is not a safetensors file \(5 bytes\)"):
        load_adapter(str(file), base=base)
    write_adapter(controlnet_of(base), tmp_path / "folder", layout="diffusers", info=INFO)
    config = tmp_path / "folder" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps({key: value for key, value in told.items() if key != "_class_name"}))
    with pytest.raises(ValueError, match=r"_class_name\): give the file with the weights, diffusion_pytorch"):
        load_adapter(str(tmp_path / "folder"), base=base)
    load_adapter(str(tmp_path / "folder" / "diffusion_pytorch_model.safetensors"), base=base)


def test_other_names_or_another_precision_need_no_base(load: Load, run: Run, tmp_path: Path) -> None:
    base, network = load("sd1"), controlnet_of(load("sd1"))
    saved(original_controlnet(network), tmp_path / "a.safetensors")
    run("convert", "a.safetensors", "b.safetensors", "--to", "single").done()
    names = network.state_dict()
    assert load_file("b.safetensors").keys() == names.keys()
    adapter = load_adapter("b.safetensors", base=base)  # which knows what the file does not: its heads
    assert adapter.controlnet.config.attention_head_dim == base.unet.config.attention_head_dim
    run("convert", "b.safetensors", "c.safetensors", "--to", "original", "--dtype", "fp16").done()
    assert open_adapter_file("c.safetensors").dtype == "float16"
    ours, theirs = load_file("c.safetensors"), original_controlnet(network, prefix="control_model.")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key].half()) for key in theirs)
    refused = run("convert", "b.safetensors", "d", "--to", "diffusers").refused()
    assert "does not say how many attention heads it has" in refused
    saved({key: names[key] for key in list(names)[:-1]}, tmp_path / "less.safetensors")
    assert (
        "less.safetensors lacks "
        in run("convert", "less.safetensors", "e.safetensors", "--to", "single").refused()
    )
    large = {key: value * 1e9 for key, value in names.items()}
    order = (
        "convert",
        saved(large, tmp_path / "f.safetensors"),
        "g.safetensors",
        "--to",
        "single",
        "--dtype",
        "fp16",
    )
    assert "cannot save the adapter as float16" in run(*order).refused()


def test_a_file_does_not_tell_where_its_network_lay(sd1: Base, tmp_path: Path) -> None:
    network = controlnet_of(sd1)
    network.register_to_config(_name_or_path="/home/somebody/run")
    write_adapter(network, tmp_path / "one.safetensors", layout="single", info=INFO)
    assert b"somebody" not in (tmp_path / "one.safetensors").read_bytes()

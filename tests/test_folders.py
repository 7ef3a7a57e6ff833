"""Weight files and indices that are damaged: one plain line each, and none is read as something else."""

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import controlnet_of, refusal, saved
from outcomes import Run
from safetensors.torch import load_file, save_file

from controlkit.adapters import load_adapter
from controlkit.base import Base, load_base
from controlkit.folders import quiet_libraries, read_header, read_tensors, write_weights


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A safetensors file with a changed header over the same bytes."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["b"].update(dtype="F16"), "b has 64 bytes, and its type and shape (F16, 4x4) take 32"),
        (lambda h: h["b"].update(shape=[4, 5]), "b has 64 bytes, and its type and shape (F32, 4x5) take 80"),
        (lambda h: h["b"].update(shape=[]), "(F32, a single number) take 4"),
        (
            lambda h: h["b"].update(data_offsets=[8, 72]),
            "b begins at byte 8, and what lies before it ends at",
        ),
        (
            lambda h: h["b"].update(data_offsets=[0, 64]),
            "b begins at byte 0, and what lies before it ends at 16",
        ),
        (
            lambda h: h["a"].update(data_offsets=[4, 16]),
            "a begins at byte 4, and what lies before it ends at 0",
        ),
        (lambda h: h.pop("a"), "b begins at byte 16, and what lies before it ends at 0"),
        (lambda h: h["d"].update(shape=[9]), "d has 8 bytes, and its type and shape (BOOL, 9) take 9"),
    ],
)
def test_tensors_lie_where_their_types_and_shapes_say(change: Any, message: str, tmp_path: Path) -> None:
    """The library refuses such files, too; `info` reads the header alone."""
    tensors = {
        "a": torch.zeros(4),
        "b": torch.zeros(4, 4),
        "c": torch.zeros(2),
        "d": torch.zeros(8, dtype=torch.bool),
        "empty": torch.zeros(0),
    }
    file = tmp_path / "a.safetensors"
    save_file(tensors, file)
    rewritten(file, lambda header: None)
    assert read_tensors(file, tensors)["d"].dtype == torch.bool  # as it was, it is whole
    rewritten(file, change)
    with pytest.raises(ValueError, match=r"^\S+ is damaged: by its header ") as error:
        read_header(file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_every_type_of_number_has_its_size(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
    types += [torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    tensors = {str(dtype): torch.ones(3, 2).to(dtype) for dtype in types}
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_tensors(tmp_path / "a.safetensors", tensors)
    assert all(read[key].dtype == tensor.dtype for key, tensor in tensors.items())


def test_info_and_loading_refuse_the_same_header(sd1: Base, run: Run, tmp_path: Path) -> None:
    file = saved(controlnet_of(sd1).state_dict(), tmp_path / "a.safetensors")
    rewritten(file, lambda header: header["conv_in.weight"].update(dtype="F16"))
    message = "is damaged: by its header conv_in.weight has 2304 bytes"
    refusal(file, sd1, message)
    assert message in run("info", file).refused()


def test_a_header_that_is_nested_deeply(tmp_path: Path) -> None:
    text = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ValueError, match="its header is not readable"):
        read_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("is_safe", [True, False])
def test_a_shard_that_is_missing(is_safe: bool, sd1: Base, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    controlnet_of(sd1).save_pretrained(folder, max_shard_size="500KB", safe_serialization=is_safe)
    shard = sorted(folder.glob("*-00002-of-*"))[0]
    shard.unlink()
    refusal(folder, sd1, f"{shard} is missing")
    assert f"there is no file {shard}" in run("info", folder).refused()


def test_a_shard_that_is_missing_from_a_base(sd1: Base, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    from controlkit.folders import load_part

    sd1.unet.save_pretrained(tmp_path / "unet", max_shard_size="500KB", safe_serialization=False)
    shard = sorted((tmp_path / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard.name} is missing"):
        load_part(UNet2DConditionModel, tmp_path / "unet", dtype=torch.float32)


@pytest.mark.parametrize("weight_map", [["conv_in.weight"], {"conv_in.weight": 5}, "a", None])
def test_an_index_that_is_damaged(weight_map: Any, sd1: Base, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    controlnet_of(sd1).save_pretrained(folder, max_shard_size="500KB")
    (index,) = folder.glob("*.index.json")
    index.write_text(json.dumps({"weight_map": weight_map}))
    message = f"{index} is damaged: its weight_map has to name a file for every tensor"
    refusal(folder, sd1, message)
    assert message in run("info", folder).refused()


@pytest.mark.parametrize("layout", ["single", "original", "diffusers"])
def test_two_names_for_one_tensor_are_written_as_two(
    layout: str, sd1: Base, run: Run, models: Path, tmp_path: Path
) -> None:
    """A pickle keeps that two names share their memory, which a safetensors file cannot."""
    state = dict(controlnet_of(sd1).state_dict())
    first, second = (f"down_blocks.0.resnets.{number}.norm1.weight" for number in (0, 1))
    state[second] = state[first]
    torch.save(state, tmp_path / "tied.pth")
    out = "out" if layout == "diffusers" else "out.safetensors"
    run("convert", "tied.pth", out, "--to", layout, "--base", models / "sd1").done()
    written = load_adapter(out, base=sd1).controlnet.state_dict()
    assert all(torch.equal(written[key], tensor) for key, tensor in state.items())


def test_what_shares_its_memory_is_written_as_it_is_read(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    tensors = {"all": flat, "part": flat[2:6], "again": flat, "empty": torch.zeros(0), "none": torch.zeros(0)}
    write_weights(tmp_path / "a.safetensors", tensors, {})
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in tensors.items())


def test_threads_make_networks_one_after_the_other() -> None:
    """The libraries change torch for the whole process while they make one."""
    failed: list[Exception] = []

    def load() -> None:
        try:
            base = load_base("tiny")
            for kind in ("canny", "depth"):
                network = load_adapter(kind, base=base).controlnet
                assert not any(weight.is_meta for weight in network.parameters())
        except Exception as error:  # noqa: BLE001 - whatever it is
            failed.append(error)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_the_libraries_are_as_loud_as_before_after_blocks_that_overlap() -> None:
    from diffusers.utils import logging

    before = logging.get_verbosity()
    first, second = quiet_libraries(), quiet_libraries()
    first.__enter__()
    second.__enter__()
    assert logging.get_verbosity() == logging.CRITICAL
    first.__exit__(None, None, None)
    assert logging.get_verbosity() == logging.CRITICAL
    second.__exit__(None, None, None)
    assert logging.get_verbosity() == before

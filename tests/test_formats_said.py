"""What files of others say of themselves beside their tensors: whether they pool, and ModelSpec's entries."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import controlnet_of, original_controlnet, residuals, same, saved
from diffusers import T2IAdapter
from outcomes import Run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlkit.adapters import MAPS, AdapterInfo, MapSpec, load_adapter
from controlkit.base import Base
from controlkit.folders import read_header
from controlkit.formats.adapter_file import open_adapter_file
from controlkit.formats.description import described_by_others
from controlkit.formats.hashing import HASH_KEY, tensor_hash
from controlkit.formats.writing import write_file
from controlkit.generate_models import Models
from controlkit.images import load_picture
from controlkit.kinds import kind_of

YAML = "model:\n  params:\n    global_average_pooling: {}\n    control_key: hint\n"


@pytest.fixture(scope="module")
def network(sd1: Base) -> Any:
    return controlnet_of(sd1)


def pools(file: Path, base: Base, kind: str = "") -> bool:
    loaded = load_adapter(str(file), base=base, kind=kind).controlnet
    return kind_of(loaded).pools(loaded)


def test_who_pools_is_told_by_the_kind_the_description_beside_it_or_the_name(
    network: Any, sd1: Base, tmp_path: Path
) -> None:
    state = original_controlnet(network, prefix="control_model.")
    plain = saved(state, tmp_path / "plain.pth")
    assert not pools(plain, sd1)
    assert not pools(plain, sd1, "canny")
    assert pools(plain, sd1, "shuffle")
    assert pools(saved(state, tmp_path / "control_v11e_sd15_shuffle.pth"), sd1)
    (tmp_path / "plain.yaml").write_text(YAML.format("True"))
    assert pools(plain, sd1)
    (tmp_path / "control_v11e_sd15_shuffle.yaml").write_text(YAML.format("False"))
    assert not pools(tmp_path / "control_v11e_sd15_shuffle.pth", sd1, "shuffle")


def test_by_a_name_a_file_pools_only_where_nothing_else_says_of_which_kind_it_is(
    network: Any, sd1: Base, tmp_path: Path, run: Run
) -> None:
    state = original_controlnet(network)
    assert not pools(saved(state, tmp_path / "my_shuffled_cards.safetensors"), sd1)
    named = saved(state, tmp_path / "cards-shuffle.safetensors")
    assert pools(named, sd1)
    assert not pools(named, sd1, "canny")
    of_header = saved(state, tmp_path / "a_shuffle.safetensors", {"modelspec.preprocessor": "canny"})
    assert not pools(of_header, sd1)
    assert not pools(of_header, sd1, "shuffle")
    line = "pools what it adds, as ControlNets for shuffle do: its name alone says so"
    assert line in run("info", named).done()
    assert line not in run("info", of_header).done()


def test_a_conversion_says_where_a_name_decided(network: Any, models: Path, run: Run, tmp_path: Path) -> None:
    saved(original_controlnet(network), tmp_path / "a_shuffle.safetensors")
    asked = ["convert", "a_shuffle.safetensors", "b.safetensors", "--to", "single", "--base", models / "sd1"]
    said = run(*asked).done()
    assert "a_shuffle.safetensors pools what it adds, as ControlNets for shuffle do: its name alone" in said
    assert "b.safetensors does not" not in said  # its header says it
    saved(original_controlnet(network), tmp_path / "a.safetensors")
    assert "its name" not in run("convert", "a.safetensors", *asked[2:]).done()
    said = run("convert", "a.safetensors", "c_shuffle.safetensors", "--to", "original").done()
    assert (
        "\nc_shuffle.safetensors pools what it adds, by its name, unlike a.safetensors: name it without"
        in said
    )


def test_what_was_loaded_for_one_kind_is_not_taken_for_another(
    network: Any, models: Path, tmp_path: Path
) -> None:
    name = str(saved(original_controlnet(network), tmp_path / "a_shuffle.safetensors"))
    kept = Models()
    base = kept.base(str(models / "sd1"), device="cpu", dtype=torch.float32)
    pooled, canny, depth, unsaid = (
        kept.adapter(name, base, kind=kind).controlnet for kind in ("shuffle", "canny", "depth", "")
    )
    assert canny is depth
    assert [one.config.global_pool_conditions for one in (pooled, canny, unsaid)] == [True, False, True]


def test_what_a_folder_says_of_pooling_is_certain(network: Any, sd1: Base, tmp_path: Path) -> None:
    network.save_pretrained(tmp_path / "shuffle")
    assert not pools(tmp_path / "shuffle", sd1, "shuffle")


@pytest.mark.slow
def test_a_picture_by_the_originals_shuffle_is_that_of_the_pooled_folder(
    network: Any, models: Path, photo: Path, run: Run, tmp_path: Path
) -> None:
    saved(original_controlnet(network), tmp_path / "a.safetensors")
    run("convert", "a.safetensors", "flat", "--to", "diffusers", "--base", models / "sd1").done()
    saved(original_controlnet(network), tmp_path / "a_shuffle.safetensors")
    run("convert", "a_shuffle.safetensors", "pooled", "--to", "diffusers", "--base", models / "sd1").done()
    asked = ["generate", "x", "--base", models / "sd1", "--map", f"shuffle={photo}", "--steps", 1, "-o"]
    for adapter in ("a.safetensors", "pooled", "flat"):
        run(*asked, f"{Path(adapter).stem}.png", "--adapter", f"shuffle={adapter}").done()
    file, pooled, flat = (load_picture(f"{name}.png") for name in ("a", "pooled", "flat"))
    assert (file == pooled).all()
    assert (file != flat).any()


SPEC = {
    "modelspec.title": "Fine edges",
    "modelspec.author": "Ada",
    "modelspec.license": "CC-BY-NC-4.0",
    "modelspec.usage_hint": "white lines",
    "modelspec.preprocessor": "canny",
    "modelspec.prediction_type": "v",
    "modelspec.resolution": "512x512",
}


def test_what_others_say_by_modelspec_is_told_used_and_kept(
    network: Any, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    saved(original_controlnet(network), tmp_path / "a.safetensors", SPEC)
    told = run("info", "a.safetensors", "--base", models / "sd1").done()
    for line in ("title: Fine edges", "map: canny", "author: Ada", "license: CC-BY-NC-4.0"):
        assert line in told.splitlines()
    assert "badly, it was trained for v_prediction" in told
    with pytest.warns(UserWarning, match="was trained for v_prediction"):
        info = load_adapter("a.safetensors", base=sd1).info
    assert (info.map.kind, info.resolution, info.family) == ("canny", 512, "sd1")
    for to, output in (("single", "b.safetensors"), ("original", "c.safetensors"), ("diffusers", "d")):
        run("convert", "a.safetensors", output, "--to", to, "--base", models / "sd1").done()
        weights = Path(output, "diffusion_pytorch_model.safetensors") if to == "diffusers" else output
        with safe_open(weights, "pt") as file:
            written = file.metadata()
        assert {key: written[key] for key in SPEC if key != "modelspec.usage_hint"} | {
            "modelspec.usage_hint": "white lines"
        } == SPEC
        assert run("info", output).done().count("Ada") == 1


def test_what_a_header_says_cannot_steer_the_terminal(network: Any, run: Run, tmp_path: Path) -> None:
    said = {
        "title": "a\x1b[31mb\nc",
        "author": "d\r\x07e",
        "thumbnail": "data:image/jpeg;base64," + "A" * 5000,
    }
    saved(network.state_dict(), tmp_path / "a.safetensors", {f"modelspec.{k}": v for k, v in said.items()})
    told = run("info", "a.safetensors").done()
    assert {"title: a [31mb c", "author: d e"} <= set(told.splitlines())
    assert f"thumbnail: data:image/jpeg;base64,{'A' * 277}… (5,023 letters)" in told
    run("convert", "a.safetensors", "b.safetensors", "--to", "single", "--dtype", "fp16").done()
    with safe_open("b.safetensors", "pt") as file:
        assert file.metadata()["modelspec.thumbnail"] == said["thumbnail"]
    info = AdapterInfo(map=MapSpec("canny\x1b[2J"))
    write_file(network, tmp_path / "c.safetensors", layout="single", info=info)
    told = run("info", "c.safetensors").done()
    assert "\x1b" not in told
    assert "map: canny [2J" in told
    assert "--map 'canny [2J'=MAP" in told


def test_a_hash_may_stand_without_its_beginning(network: Any, tmp_path: Path) -> None:
    write_file(network, tmp_path / "a.safetensors", layout="single", info=AdapterInfo())
    header, state = (
        read_header(tmp_path / "a.safetensors")["__metadata__"],
        load_file(tmp_path / "a.safetensors"),
    )
    save_file(state, tmp_path / "a.safetensors", {**header, HASH_KEY: ""})
    right = tensor_hash(tmp_path / "a.safetensors").removeprefix("0x").upper()
    for told in (right, f"0X{right}"):
        save_file(state, tmp_path / "a.safetensors", {**header, HASH_KEY: told})
        open_adapter_file(tmp_path / "a.safetensors").check_numbers()
    save_file(state, tmp_path / "a.safetensors", {**header, HASH_KEY: right[::-1]})
    with pytest.raises(ValueError, match="its weights are not those it was written with"):
        open_adapter_file(tmp_path / "a.safetensors").check_numbers()


def test_a_family_is_told_by_the_tensors_or_where_they_cannot_tell_by_the_file(
    network: Any, tmp_path: Path
) -> None:
    def family(of: Any, said: str) -> str:
        info = AdapterInfo(map=MAPS["canny"], family=said)
        write_file(of, tmp_path / "a.safetensors", layout="single", info=info)
        return open_adapter_file(tmp_path / "a.safetensors").family

    true = family(network, "")
    assert true
    assert [family(network, said) for said in ("sd1", "sd2", "sdxl")] == [true] * 3
    t2i = T2IAdapter(3, [8, 16, 16], 1, 16, "full_adapter_xl")  # which reads no text
    assert [family(t2i, said) for said in ("", "sd1", "sdxl")] == ["sdxl", "sd1", "sdxl"]


def test_a_word_of_others_that_is_no_kind_of_map_is_kept_as_it_is(
    network: Any, sd1: Base, tmp_path: Path
) -> None:
    file = saved(network.state_dict(), tmp_path / "a.safetensors", {"modelspec.preprocessor": "none"})
    info = load_adapter(str(file), base=sd1).info
    assert info.map.kind == ""
    assert info.about == {"preprocessor": "none"}


def test_a_control_lora_with_the_originals_prefix(
    network: Any, sd1: Base, models: Path, run: Run, tmp_path: Path
) -> None:
    saved(original_controlnet(network), tmp_path / "a.safetensors")
    made = ["--to", "control-lora", "--rank", 4, "--base", models / "sd1"]
    run("convert", "a.safetensors", "lora.safetensors", *made).done()
    with safe_open("lora.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    marker = tensors.pop("lora_controlnet")
    prefixed = {f"control_model.{key}": tensor for key, tensor in tensors.items()}
    saved({**prefixed, "lora_controlnet": marker}, tmp_path / "b.safetensors")
    one, other = (load_adapter(name, base=sd1).controlnet for name in ("lora.safetensors", "b.safetensors"))
    assert same(residuals(one, sd1), residuals(other, sd1))


def test_an_address_of_the_hub_is_told_as_the_name_to_give(run: Run) -> None:
    at = "https://huggingface.co/lllyasviel/ControlNet-v1-1"
    for address, name in (
        (f"{at}/resolve/main/control_v11p_sd15_canny.pth", "ControlNet-v1-1/control_v11p_sd15_canny.pth"),
        (f"{at}/blob/main/a/b.safetensors?download=true", "ControlNet-v1-1/a/b.safetensors"),
        (at, "lllyasviel/ControlNet-v1-1"),
    ):
        assert run("info", address).refused().endswith(name)


def test_a_model_of_sd2_that_predicts_v_is_called_so(sd1: Base) -> None:
    from controlkit.formats.description import header_entries

    def architecture(family: str, prediction: str) -> str:
        entries = header_entries(AdapterInfo(family=family, prediction_type=prediction))
        return entries["modelspec.architecture"]

    assert architecture("sd2", "v_prediction") == "stable-diffusion-v2-768-v/controlnet"
    assert architecture("sd2", "epsilon") == "stable-diffusion-v2-512/controlnet"
    assert architecture("sd1", "v_prediction") == "stable-diffusion-v1/controlnet"


def test_a_flipped_bit_in_a_pickle_is_named(network: Any, sd1: Base, run: Run, tmp_path: Path) -> None:
    """torch itself does not compare the checksums that it writes."""
    state = original_controlnet(network)
    file = saved(state, tmp_path / "a.pth")
    content = bytearray(file.read_bytes())
    found = content.find(state["input_hint_block.0.weight"].numpy().tobytes())
    content[found + 5] ^= 4
    (tmp_path / "b.pth").write_bytes(content)
    load_adapter(str(file), base=sd1)
    with pytest.raises(ValueError, match=r"b\.pth is damaged: Bad CRC-32 for file .*; fetch it again$"):
        load_adapter(str(tmp_path / "b.pth"), base=sd1)
    assert "can be used: no, b.pth is damaged" in run("info", "b.pth").done()
    torch.serialization.set_crc32_options(False)
    try:
        saved(state, tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    load_adapter(str(tmp_path / "c.pth"), base=sd1)


def test_a_base_is_no_adapter(models: Path, run: Run) -> None:
    assert (
        "is a whole base, as diffusers saves it: give it as --base" in run("info", models / "sd1").refused()
    )


@pytest.mark.parametrize(
    ("said", "side"), [("512x512", 512), ("768", 768), (" 64x64 ", 64), ("512x768", 0), ("5", 0), ("", 0)]
)
def test_a_resolution_is_the_side_of_a_square(said: str, side: int) -> None:
    found = described_by_others({"modelspec.resolution": said}, channels=3, family="sd1")
    assert found.resolution == side

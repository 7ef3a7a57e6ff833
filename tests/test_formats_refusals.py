"""Files that are no adapter, or no longer one: each has its own line."""

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import controlnet_of, original_controlnet, refusal, saved
from diffusers import AutoencoderKL, T2IAdapter
from outcomes import Run
from safetensors.torch import save_file

from controlkit.adapters import MAPS, AdapterInfo, load_adapter, save_adapter, write_adapter
from controlkit.base import Base
from controlkit.folders import refuse_impostor
from controlkit.formats.adapter_file import find_adapter_file, open_adapter_file

Load = Callable[[str], Base]


def keys_alone(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2, 2) for name in names}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ckpt", ".bin", ".pt"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty (0 bytes); fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not weights"),
        (b"GGUF\x03\x00\x00\x00" + bytes(600), "is a GGUF file, whose quantized weights are not read"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(600), "is a packed archive (7z): unpack it"),
        (b"\x1f\x8b\x08" + bytes(600), "is a packed archive (gzip): unpack it"),
        (b"a text", "is a text, not weights"),
        (b'{"_class_name": "ControlNetModel"}', "is a text, not weights"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "is a picture, not weights"),
        (b"\7\0\0", "is cut short or is not a safetensors file (3 bytes)"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
        (b"PK\x03\x04 and no archive", "is cut short: fetch it again"),
        (b"\x80\x02 and no pickle", "is damaged, or holds more than tensors, which is refused"),
    ],
)
def test_what_is_no_file_of_weights(
    data: bytes, message: str, suffix: str, sd1: Base, tmp_path: Path, run: Run
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(data)
    refusal(file, sd1, f"{file} {message}")
    assert message in run("info", file).refused()


def test_of_several_files_one_is_named(sd1: Base, tmp_path: Path) -> None:
    network = controlnet_of(sd1)
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a", "b"):
        saved(network.state_dict(), two / f"{name}.safetensors")
    message = f"{two} holds several files of weights (a.safetensors, b.safetensors): name the one"
    refusal(two, sd1, message)
    network.save_config(two / "controlnet")  # as in the checkpoints of diffusers' training
    refusal(two, sd1, f"{message} (did you mean {two / 'controlnet'}?)")
    network.save_config(two)
    refusal(two, sd1, message)
    with pytest.raises(ValueError, match="name the one"):
        open_adapter_file(two)


def test_a_part_of_a_set_is_told_to_be_one(sd1: Base, tmp_path: Path) -> None:
    network = controlnet_of(sd1)
    network.save_pretrained(tmp_path / "set", max_shard_size="2MB")
    part = min((tmp_path / "set").glob("*.safetensors"))
    count = len(list((tmp_path / "set").glob("*.safetensors")))
    refusal(part, sd1, f"{part} is part 1 of a set of {count} files: give their folder, {tmp_path / 'set'}")
    index = tmp_path / "set" / "diffusion_pytorch_model.safetensors.index.json"
    index.unlink()
    message = f"is part 1 of a set of {count} files, and {index.name}, which lists them, is missing beside it"
    refusal(part, sd1, f"{part} {message}")
    refusal(part.parent, sd1, message)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.999, 0.5, 0.001])
def test_files_that_are_cut_short(suffix: str, share: float, sd1: Base, tmp_path: Path) -> None:
    file = saved(controlnet_of(sd1).state_dict(), tmp_path / f"a{suffix}")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    refusal(file, sd1, "is cut short")


def test_a_pickle_of_before_torch_1_6_is_damaged_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save({"a.weight": torch.ones(4, 4)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    for cut in range(3, len(whole), 5):
        file.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"a.pth (is cut short|is damaged|holds more)") as caught:
            open_adapter_file(file)
        assert "\n" not in str(caught.value)
    key = re.findall(rb"\d{9,}", whole)[-1]  # in the list of the numbers that follow
    file.write_bytes((b"1" * len(key)).join(whole.rsplit(key, 1)))
    with pytest.raises(ValueError, match="is damaged"):
        open_adapter_file(file)


def test_archives_that_are_no_torch_file(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("control.safetensors", bytes(9))
    with pytest.raises(ValueError, match=r"is a packed archive \(zip\): unpack it"):
        open_adapter_file(file)
    torch.save({"a.weight": torch.ones(2)}, file)
    whole = bytearray(file.read_bytes())
    whole[whole.rindex(b"PK\x06\x07") + 16] = 9  # disks
    file.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a.pth is (cut short|damaged)|no adapter that controlkit knows"):
        open_adapter_file(file)


def test_weights_of_other_libraries_are_named(tmp_path: Path) -> None:
    for name, message in (("a.onnx", "holds an ONNX network"), ("a.msgpack", "holds weights for Flax")):
        (tmp_path / name).write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(99))
        with pytest.raises(ValueError, match=f"{name} {message}: give .safetensors or .pth"):
            open_adapter_file(tmp_path / name)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".safetensors"])
def test_a_pickle_that_would_run_code_does_not(suffix: str, sd1: Base, tmp_path: Path, run: Run) -> None:
    mark = tmp_path / "ran"
    for write, message in (
        (lambda file: torch.save({"a": Evil(mark)}, file), "getattr), which is refused: it could run code"),
        (
            lambda f: f.write_bytes(pickle.dumps(Evil(mark))),
            "is damaged, or holds more than tensors, which is",
        ),
    ):
        file = tmp_path / f"evil{suffix}"
        write(file)
        refusal(file, sd1, message)
        assert "more than tensors" in run("info", file).refused()
        assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists(), "the pickle is evil indeed"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (keys_alone("conv_in.weight", "up_blocks.0.resnets.0.conv1.weight"), "is the U-Net of a base"),
        (
            keys_alone("input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"),
            "is the U-Net of a base",
        ),
        (
            keys_alone("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
            "is a LoRA: give it as --lora FILE",
        ),
        (
            keys_alone("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"),
            "is a LoRA: give it as --lora FILE",
        ),
        (keys_alone("unet.mid_block.attentions.0.to_q.lora.up.weight"), "is a LoRA"),
        (
            keys_alone("lora_te1_text_model_encoder_layers_0_mlp_fc1.hada_w1_a"),
            "is a LoHa, LoKr, DoRA or another relative of LoRA: only LoRA is supported",
        ),
        (keys_alone("lora_unet_mid_block_attentions_0_proj_in.diff"), "is the difference to a base's whole"),
        (
            keys_alone("image_proj.norm.weight", "ip_adapter.1.to_k_ip.weight"),
            "is an IP-Adapter FaceID, which reads faces by another network: not supported",
        ),
        (keys_alone("mlp.0.weight"), "is no adapter that controlkit knows: it holds mlp.0.weight"),
        (keys_alone("scaled_fp8", "input_hint_block.0.weight"), "holds scaled_fp8: numbers of 8 bits with"),
        (
            keys_alone("input_hint_block.0.weight", "input_hint_block.0.scale_weight"),
            "holds input_hint_block.0.scale_weight: numbers of 8 bits with scales of their own",
        ),
        (
            keys_alone("brushnet_mid_block.weight", "up_blocks.0.resnets.0.conv1.weight"),
            "is a BrushNet, which fills holes by a network of another kind: not supported",
        ),
        (
            keys_alone("lllite_conditioning1.conv1.weight", "lllite_dit_blocks_0_q_proj.down.weight"),
            "is a control network for a transformer (Wan, Z-Image or another)",
        ),
        (keys_alone("blocks.0.self_attn.q.weight", "b"), "is a transformer (Flux, SD3 or another)"),
        (keys_alone("vision_model.embeddings.class_embedding", "b"), "is CLIP's encoder of pictures: give"),
        (
            keys_alone("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"),
            "is an IP-Adapter: give it as --ip",
        ),
        (keys_alone("encoder.conv_in.weight", "decoder.conv_in.weight"), "is a VAE: give it as --vae"),
        ({"emb_params": torch.zeros(4, 768)}, "is a textual inversion: give it as --embedding FILE"),
        ({"<a-cat>": torch.zeros(768)}, "is a textual inversion"),
        ({"my_word": torch.zeros(3, 768)}, "is a textual inversion, by its single small tensor"),
        ({"clip_g": torch.zeros(1, 1280), "clip_l": torch.zeros(1, 768)}, "is a textual inversion"),
        (keys_alone("text_model.encoder.layers.0.mlp.fc1.weight", "a"), "is a text encoder, not an adapter"),
        (
            keys_alone("controlnet_x_embedder.weight", "transformer_blocks.0.attn.to_q.weight"),
            "is a ControlNet for a transformer (Flux, SD3 or another), which is for another family of models",
        ),
        (
            keys_alone("pos_embed_input.proj.weight", "controlnet_blocks.0.weight"),
            "is a ControlNet for a transformer",
        ),
        (keys_alone("double_blocks.0.img_attn.qkv.weight", "img_in.weight"), "is a transformer (Flux, SD3"),
        (
            keys_alone("double_blocks.0.x", "controlnet_blocks.0.weight", "input_hint_block.0.weight"),
            "is a ControlNet for a transformer (Flux, SD3",
        ),
        (
            keys_alone("vace_blocks.0.x", "vace_patch_embedding.weight"),
            "is a control network for a transformer (Wan, ",
        ),
        (
            keys_alone("control_layers.0.x", "control_all_x_embedder.2-1.weight"),
            "is a control network for a transformer",
        ),
        (keys_alone("local_adapter.input_hint_block.0.weight"), "is a Uni-ControlNet, whose layout"),
        (
            keys_alone("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"),
            "is a transformer (Flux",
        ),
        (
            keys_alone(
                "down_blocks.0.motion_modules.0.norm.weight", "controlnet_cond_embedding.conv_in.weight"
            ),
            "is a SparseCtrl",
        ),
        (
            keys_alone("base_conv_in.weight", "control_to_base_for_conv_in.weight"),
            "is a ControlNet-XS together",
        ),
        (
            keys_alone(
                "base_conv_in.weight",
                "control_to_base_for_conv_in.weight",
                "controlnet_cond_embedding.conv_in.weight",
            ),
            "is a ControlNet-XS together",
        ),
        (
            keys_alone(
                "control_model.enc_zero_convs_out.0.0.weight", "control_model.input_hint_block.0.weight"
            ),
            "is a ControlNet-XS in its authors' layout, which is not read",
        ),
        (
            keys_alone("dec_zero_convs_out.0.0.weight", "control_model.input_blocks.0.0.weight"),
            "is a ControlNet-XS in its authors' layout, which is not read",
        ),
        (
            keys_alone("body.0.block1.weight", "body.0.skep.weight"),
            "is a T2I-Adapter with convolutions on its shortcuts",
        ),
        (
            keys_alone("adapter.body.0.block1.weight", "adapter.body.2.down_opt.op.weight"),
            "is a T2I-Adapter with convolutions on its shortcuts or between its levels (sk=False or use_conv",
        ),
        (keys_alone("style_embedding", "proj"), "is a T2I style or fusing adapter"),
        (
            keys_alone("layer.weight", "b", "c"),
            "is no adapter that controlkit knows: it holds b and 2 more",
        ),
    ],
)
def test_files_that_hold_something_else(
    state: Any, message: str, sd1: Base, tmp_path: Path, run: Run
) -> None:
    file = saved(state, tmp_path / "controlnet-canny.safetensors")  # whatever its name promises
    refusal(file, sd1, f"{file} {message}")
    assert message in run("info", file).refused()
    if not message.startswith("is no adapter"):  # safetensors puts the keys in another order
        refusal(saved(state, tmp_path / "control_sd15.pth"), sd1, message)


def test_nested_pickles_of_other_things(sd1: Base, tmp_path: Path) -> None:
    nested = {
        "a.bin": (
            {"image_proj": keys_alone("proj.weight"), "ip_adapter": keys_alone("1.to_k_ip.weight")},
            "is an IP",
        ),
        "a.pt": (
            {"string_to_param": {"*": torch.zeros(1, 768)}, "name": "cat", "step": 3},
            "is a textual inv",
        ),
        "a.ckpt": ({"state_dict": keys_alone("model.diffusion_model.a.weight")}, "is a whole base model"),
        "b.ckpt": ({"state_dict": {}, "epoch": 1}, "holds no tensors"),
    }
    for name, (state, message) in nested.items():
        torch.save(state, tmp_path / name)
        refusal(tmp_path / name, sd1, message)


def test_a_whole_base_where_an_adapter_is_wanted(sd1: Base, tmp_path: Path, run: Run) -> None:
    keys = keys_alone("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.a.weight")
    file = saved(keys, tmp_path / "controlnet-canny.safetensors")
    refusal(file, sd1, "is a whole base model without a control network")
    assert "holds first_stage_model.a.weight, which no autoencoder" in run("info", file).refused()


def test_the_real_neighbours_of_an_adapter(sd1: Base, tmp_path: Path) -> None:
    unet = saved(sd1.unet.state_dict(), tmp_path / "unet.safetensors")
    refusal(unet, sd1, "is the U-Net of a base, without a control network")
    vae = saved(AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).state_dict(), tmp_path / "vae.pth")
    refusal(vae, sd1, "is a VAE: give it as --vae")
    text = saved(sd1.text_encoders[0].state_dict(), tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"is a text encoder|is no adapter"):
        load_adapter(str(text), base=sd1)


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s, n: s.pop(n("mid_block.resnets.0.conv1.bias")), "lacks mid_block.resnets.0.conv1.bias"),
        (lambda s, n: s.pop(n("conv_in.weight")), "lacks conv_in.weight: it is incomplete"),
        (
            lambda s, n: [s.pop(n(f"time_embedding.linear_{i}.bias")) for i in (1, 2)],
            "lacks time_embedding.linear_1.bias and 1 more",
        ),
        (
            lambda s, n: [
                s.pop(key)
                for key in list(s)
                if key.startswith(n("down_blocks.1.resnets.0.conv1.weight")[:-22])
            ],
            "lacks ",
        ),
        (
            lambda s, n: s.update({n("conv_in.bias"): torch.zeros(3)}),
            "the shape of conv_in.bias is 3 instead of 16",
        ),
        (
            lambda s, n: s[n("conv_in.bias")].fill_(float("nan")),
            "the weights in conv_in.bias are not all finite numbers",
        ),
        (
            lambda s, n: s[n("controlnet_mid_block.bias")].fill_(float("inf")),
            "the weights in controlnet_mid_block.bias are not all finite numbers",
        ),
        (
            lambda s, n: s.update({n("conv_in.weight"): torch.zeros(2)}),
            "has the shape 2, which no such network has",
        ),
        (
            lambda s, n: s.update({n("conv_in.bias"): torch.zeros(16, dtype=torch.int8)}),
            "as I8, a quantization that is not supported",
        ),
    ],
)
def test_adapters_that_are_not_whole(
    damage: Any, message: str, layout: str, sd1: Base, tmp_path: Path
) -> None:
    network = controlnet_of(sd1)
    state = dict(network.state_dict()) if layout == "diffusers" else original_controlnet(network)
    state = {key: value.clone() for key, value in state.items()}
    names = dict(zip(network.state_dict(), network.state_dict(), strict=True))
    if layout == "original":
        from controlkit.formats import keys

        names = {key: keys.to_original(key) or "" for key in names}
    damage(state, names.__getitem__)
    refusal(saved(state, tmp_path / "a.safetensors"), sd1, message)


@pytest.mark.parametrize(
    ("key", "layout", "message"),
    [
        ("extra.weight", "diffusers", "holds extra.weight, which no ControlNetModel has"),
        ("extra.weight", "original", "holds extra.weight, which a ControlNet does not have"),
        ("down_blocks.0.resnets.0.lora.weight", "diffusers", "which no ControlNetModel has"),
        ("input_blocks.1.0.lora.weight", "original", "holds input_blocks.1.0.lora.weight"),
        ("controlnet_down_blocks.12.weight", "diffusers", "holds controlnet_down_blocks.12.weight"),
    ],
)
def test_a_tensor_too_many_is_named(key: str, layout: str, message: str, sd1: Base, tmp_path: Path) -> None:
    network = controlnet_of(sd1)
    state = dict(network.state_dict()) if layout == "diffusers" else original_controlnet(network)
    refusal(saved({**state, key: torch.zeros(1)}, tmp_path / "a.safetensors"), sd1, message)


@pytest.mark.parametrize("is_safe", [True, False])
def test_a_folder_with_a_tensor_too_many(is_safe: bool, sd1: Base, tmp_path: Path) -> None:
    """diffusers leaves such weights out without a word."""
    network = controlnet_of(sd1)
    network.save_pretrained(tmp_path / "a", safe_serialization=is_safe)
    (file,) = (tmp_path / "a").glob("diffusion_pytorch_model.*")
    saved({**network.state_dict(), "extra.weight": torch.zeros(1)}, file)
    refusal(tmp_path / "a", sd1, "hold, beyond what the configuration tells of, extra.weight")


def test_families_are_told_apart_with_both_sizes(load: Load, tmp_path: Path) -> None:
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1"), ("sd1", "sd2"), ("sd2", "sd1")):
        file = saved(original_controlnet(controlnet_of(load(family))), tmp_path / "a.safetensors")
        title, wanted = ({"sd1": "SD1", "sd2": "SD2", "sdxl": "SDXL"}[name] for name in (family, other))
        refusal(file, load(other), f"it is for {title} (")
        refusal(file, load(other), f"the base is {wanted} (")


def test_headers_that_begin_like_a_page(tmp_path: Path) -> None:
    """A header of 15392 bytes begins with a blank and "<"."""
    state = {"a": torch.zeros(1)}
    file = tmp_path / "a.safetensors"
    save_file(state, file, {"pad": "x"})
    pad = 15392 - struct.unpack("<Q", file.read_bytes()[:8])[0] + 1
    save_file(state, file, {"pad": "x" * pad})
    start = file.read_bytes()[:512]
    assert start.startswith(b" <")
    refuse_impostor(file, start)
    with pytest.raises(ValueError, match="is a web page"):
        refuse_impostor(file, b" <html>")


def test_names_that_lead_nowhere(sd1: Base, tmp_path: Path) -> None:
    refusal(tmp_path / "no.safetensors", sd1, f"no adapter called '{tmp_path}/no.safetensors'")
    refusal(
        "owner/name/sub/file.safetensors", sd1, "sub/file.safetensors of owner/name is needed: it is not in"
    )
    folder = tmp_path / "several"
    folder.mkdir()
    for name in ("a.safetensors", "b.pth"):
        saved(keys_alone("a"), folder / name)
    refusal(folder, sd1, f"{folder} holds several files of weights (a.safetensors, b.pth): name the one")
    assert find_adapter_file(str(folder)) is None
    assert find_adapter_file("x" * 5000) is None


def test_a_hub_file_is_found_in_the_cache(sd1: Base, tmp_path: Path) -> None:
    from huggingface_hub import constants

    repo = Path(constants.HF_HUB_CACHE) / "models--lllyasviel--ControlNet-v1-1"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    try:
        saved(original_controlnet(controlnet_of(sd1)), snapshot / "control_v11p.pth")
        adapter = load_adapter("lllyasviel/ControlNet-v1-1/control_v11p.pth", base=sd1)
    finally:
        import shutil

        shutil.rmtree(repo)
    assert adapter.info.family == "sd1"
    assert adapter.name == "lllyasviel/ControlNet-v1-1/control_v11p.pth"


def test_open_adapter_file_is_public(sd1: Base, tmp_path: Path) -> None:
    import controlkit

    file = saved(original_controlnet(controlnet_of(sd1)), tmp_path / "a.pth")
    opened = controlkit.open_adapter_file(file)
    assert isinstance(opened, controlkit.AdapterFile)
    assert opened.tensors().keys() == controlnet_of(sd1).state_dict().keys()
    assert open_adapter_file("canny").info.map.kind == "canny"


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a safetensors file's header."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def described(header: dict[str, Any], **changes: Any) -> None:
    known = json.loads(header["__metadata__"]["controlkit"])
    header["__metadata__"]["controlkit"] = json.dumps({**known, **changes})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: header["control_model.zero_convs.0.0.bias"].pop("dtype"),
            "its header is not readable",
        ),
        (
            lambda header: header["control_model.zero_convs.0.0.bias"].update(shape=5),
            "its header is not readable",
        ),
        (
            lambda header: header["control_model.zero_convs.0.0.bias"].update(shape=[-1]),
            "its header is not readable",
        ),
        (
            lambda header: header["control_model.zero_convs.0.0.bias"].update(dtype=[]),
            "its header is not readable",
        ),
        (
            lambda header: header["control_model.zero_convs.0.0.bias"].update(data_offsets=[]),
            "its header is not readable",
        ),
        (lambda header: header.update(__metadata__=[1]), "its header is not readable"),
        (lambda header: header["__metadata__"].update(controlkit=5), "its header is not readable"),
        (
            lambda header: header["__metadata__"].update(controlkit="{"),
            "its controlkit description cannot be read",
        ),
        (lambda header: described(header, map=5), "its controlkit description cannot be read"),
        (lambda header: described(header, map={"thresholds": 5}), "thresholds must be a"),
        (lambda header: described(header, map={"range": ["a", "b"]}), "range must be two numbers"),
        (lambda header: described(header, title=5), "title must be a str"),
        (lambda header: described(header, resolution=True), "resolution must be a int"),
        (lambda header: described(header, training=None), "training must be a"),
        (lambda header: described(header, structure=[5]), "its controlkit description cannot be read"),
        (
            lambda header: described(header, structure={"norm_num_groups": "x"}),
            "says norm_num_groups 'x': it is a whole number",
        ),
        (lambda header: described(header, structure={"act_fn": "magic"}), "cannot build ControlNetModel"),
    ],
)
def test_headers_that_somebody_has_changed(change: Any, message: str, sd1: Base, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(controlnet_of(sd1), file, layout="original")
    rewritten(file, lambda header: None)
    load_adapter(str(file), base=sd1)  # as it was, it is whole
    rewritten(file, change)
    refusal(file, sd1, message)


def test_a_t2i_adapter_that_says_nonsense_of_itself(sd1: Base, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    network = T2IAdapter(channels=[16, 32, 32, 32])
    for nonsense in (
        {"channels": 5.0},
        {"adapter_type": "other"},
        {"channels": ["x"]},
        {"in_channels": None},
    ):
        write_adapter(network, file, layout="single")
        structure = {
            "adapter_type": "full_adapter",
            "in_channels": 3,
            "downscale_factor": 8,
            "channels": [16],
        }
        rewritten(file, lambda header, own=structure | nonsense: described(header, structure=own))
        refusal(file, sd1, "the configuration that it has of itself is no T2I-Adapter's")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"down_block_types": [["CrossAttnDownBlock2D"]]}, "it is a list of names"),
        ({"block_out_channels": "x"}, "says block_out_channels 'x': it is a list of whole numbers"),
        ({"block_out_channels": []}, "it is a list of whole numbers"),
        ({"conditioning_channels": "3"}, "says conditioning_channels '3': it is a whole number"),
        ({"cross_attention_dim": True}, "it is a whole number, or a list of them"),
    ],
)
def test_a_configuration_with_values_of_other_types(
    run: Run, sd1: Base, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "adapter"
    save_adapter(controlnet_of(sd1), folder, info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refusal(folder, sd1, message)
    assert message in run("info", folder).refused()
    network = T2IAdapter(3, [16, 32, 32, 32], 1, 16, "full_adapter_xl")
    network.save_pretrained(tmp_path / "t2i")
    config = json.loads((tmp_path / "t2i" / "config.json").read_text())
    (tmp_path / "t2i" / "config.json").write_text(json.dumps(config | {"num_res_blocks": [1]}))
    assert "says num_res_blocks [1]: it is a whole number" in run("info", tmp_path / "t2i").refused()


@pytest.mark.parametrize(
    "changes",
    [
        {"block_out_channels": None},
        {"cross_attention_dim": None},
        {"conditioning_embedding_out_channels": [16, 32]},
        {"transformer_layers_per_block": [1]},
        {"num_attention_heads": [2]},
        {"norm_num_groups": None},
        {"act_fn": "nothing"},
    ],
)
def test_what_loading_a_folder_refuses_does_not_fit(
    run: Run, sd1: Base, models: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """A ControlNet's folder is built by its config.json, which may lack what the weights' shapes tell."""
    folder = tmp_path / "adapter"
    save_adapter(controlnet_of(sd1), folder, info=AdapterInfo(map=MAPS["canny"], family="sd1"))
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="adapter"):
        load_adapter(str(folder), base=sd1)
    told = run("info", folder, "--base", models / "sd1").done()
    assert f"fits {models / 'sd1'}: no, " in told


def test_a_light_t2i_adapter_with_a_level_too_many(sd1: Base, tmp_path: Path) -> None:
    """As diffusers' class has it by default: the base's own channels are not what is said to differ."""
    network = T2IAdapter(channels=[16, 32, 32, 32], adapter_type="light_adapter", num_res_blocks=1)
    network.save_pretrained(tmp_path / "light")
    refusal(
        tmp_path / "light",
        sd1,
        "it has channels 16/32/32/32, and a T2I-Adapter of its sort for SD1 has channels 16/32/32",
    )

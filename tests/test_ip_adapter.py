"""Pictures as prompts: files of every kind in their published layout, against diffusers' pipelines."""

import copy
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from outcomes import Run
from PIL import Image
from safetensors.torch import save_file
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from controlkit.base import Base
from controlkit.control import Control
from controlkit.images import load_picture, read_png_text
from controlkit.ip_adapter import PicturePrompt, picture_prompt, pictures_told, with_pictures
from controlkit.reuse import KeptText, PicturePart, cross_attentions, text_kept
from controlkit.sampling import Memory, Savings, Tiles, generate

HIDDEN, PROJECTED, SIDE = 48, 40, 32  # of the picture encoder
KINDS = ("plain", "plus", "full")


def drawn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(shape, generator=generator)


def projection(kind: str, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """The part `image_proj` of a file, for text `width` wide."""
    shapes: dict[str, tuple[int, ...]]
    if kind == "plain":
        shapes = {"proj.weight": (4 * width, PROJECTED), "proj.bias": (4 * width,), "norm.weight": (width,)}
        shapes["norm.bias"] = (width,)
    elif kind == "full":
        shapes = {"proj.0.weight": (HIDDEN, HIDDEN), "proj.0.bias": (HIDDEN,), "proj.2.bias": (width,)}
        shapes |= {"proj.2.weight": (width, HIDDEN), "proj.3.weight": (width,), "proj.3.bias": (width,)}
    else:
        inner = 64  # one head
        shapes = {"latents": (1, 5, inner), "proj_in.weight": (inner, HIDDEN), "proj_in.bias": (inner,)}
        shapes |= {"proj_out.weight": (width, inner), "proj_out.bias": (width,)}
        shapes |= {"norm_out.weight": (width,), "norm_out.bias": (width,)}
        for layer in (f"layers.{index}" for index in range(4)):
            for norm in ("0.norm1", "0.norm2", "1.0"):
                shapes |= {f"{layer}.{norm}.{name}": (inner,) for name in ("weight", "bias")}
            shapes |= {
                f"{layer}.0.to_q.weight": (inner, inner),
                f"{layer}.0.to_kv.weight": (2 * inner, inner),
            }
            shapes |= {f"{layer}.0.to_out.weight": (inner, inner)}
            shapes |= {f"{layer}.1.1.weight": (4 * inner, inner), f"{layer}.1.3.weight": (inner, 4 * inner)}
    return {name: drawn(shape, generator) for name, shape in shapes.items()}


def adapter(base: Base, kind: str, *, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """A file's content, by its two parts."""
    generator = torch.Generator().manual_seed(seed)
    width = base.unet.config.cross_attention_dim
    names = [name for name in base.unet.attn_processors if name.endswith("attn2.processor")]
    attentions: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        rows = base.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for part in ("k", "v"):
            attentions[f"{2 * index + 1}.to_{part}_ip.weight"] = drawn((rows, width), generator)
    return {"image_proj": projection(kind, width, generator), "ip_adapter": attentions}


def flat(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.items()}


def write_encoder(folder: Path, *, projected: int = PROJECTED) -> Path:
    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=16,
        projection_dim=projected,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


def photo(seed: int, height: int = 50, width: int = 70) -> np.ndarray:
    made: np.ndarray = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, load: Callable[[str], Base]) -> Path:
    """A folder laid out as the published ones: a file for each family and kind, and the encoder beside."""
    folder = tmp_path_factory.mktemp("home") / "models"
    write_encoder(folder / "image_encoder")
    for family in ("sd1", "sdxl"):
        for seed, kind in enumerate(KINDS):
            save_file(flat(adapter(load(family), kind, seed=seed)), folder / f"{family}-{kind}.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "kind", "guidance"),
    [
        ("sd1", "plain", 5.0),
        ("sd1", "plus", 5.0),
        pytest.param("sd1", "full", 5.0, marks=pytest.mark.slow),
        pytest.param("sd1", "plus", 1.0, marks=pytest.mark.slow),
        ("sdxl", "plain", 5.0),
    ],
)
def test_pictures_equal_the_pipelines(
    load: Callable[[str], Base], home: Path, family: str, kind: str, guidance: float
) -> None:
    base, before = load(family), load(family).digest()
    pictures = [photo(1), photo(2, 40, 40)]
    file = home / f"{family}-{kind}.safetensors"
    prompt = picture_prompt(base, str(file), pictures, scale=0.7)
    controls = [Control(controlnet_of(base), cond())]
    request: dict[str, Any] = {"seed": 7, "steps": 3, "scheduler": "ddim", "guidance": guidance}
    with text_kept(base.unet), pictures_told(base.unet, [prompt]):
        ours = our_latents(base, controls, **request, picture_prompts=[prompt])
    without = our_latents(base, controls, **request)
    assert (ours - without).abs().max() > 1e-2
    assert base.digest() == before

    def told(pipeline: Any) -> None:
        pipeline.load_ip_adapter(str(home.parent), subfolder=home.name, weight_name=file.name)
        pipeline.set_ip_adapter_scale(0.7)

    theirs = their_latents(
        replace(base, unet=copy.deepcopy(base.unet)),
        controls,
        **request,
        prepare=told,
        ip_adapter_image=[[Image.fromarray(picture) for picture in pictures]],
    )
    assert_same(ours, theirs)


def test_several_adapters_and_no_scale(sd1: Base, home: Path) -> None:
    files = [str(home / "sd1-plain.safetensors"), str(home / "sd1-plus.safetensors")]
    first, second = (picture_prompt(sd1, file, [photo(1)]) for file in files)
    idle = picture_prompt(sd1, files[1], [photo(1)], scale=0)
    request: dict[str, Any] = {"steps": 2, "seeds": [0, 1], "height": 64, "width": 64}
    one, two, silent, plain = (
        generate(sd1, "x", picture_prompts=prompts, **request)
        for prompts in ([first], [first, second], [first, idle], [])
    )
    assert np.array_equal(one[0], silent[0])
    assert not np.array_equal(one[0], two[0])
    assert not np.array_equal(one[0], plain[0])
    alone = generate(sd1, "x", picture_prompts=[first, second], **{**request, "seeds": [1]})
    assert np.array_equal(two[1], alone[0])  # whatever else is made with it
    again = generate(sd1, "x", **request)
    assert np.array_equal(plain[0], again[0])  # nothing is left on the base


def test_a_base_that_is_not_guided_is_told_the_picture() -> None:
    weights = ((torch.zeros(2, 3), torch.zeros(2, 3)),)
    prompt = PicturePrompt(torch.stack([torch.zeros(4, 3), torch.ones(4, 3)]), weights)
    both = with_pictures(torch.full((2, 5, 3), 9.0), [prompt])
    assert both[:, :5].eq(9).all()
    assert (both[0, 5:].eq(0).all(), both[1, 5:].eq(1).all()) == (True, True)
    (alone,) = with_pictures(torch.full((1, 5, 3), 9.0, dtype=torch.float16), [prompt, prompt])
    assert alone.dtype == torch.float16
    assert alone[5:].eq(1).all()


@torch.no_grad()
def test_a_cross_attention_adds_what_it_reads_of_each_picture(sd1: Base) -> None:
    """By its own keys, values and scale, which may be below 0; of a text that it knows, and of others."""
    attention, draw = next(cross_attentions(sd1.unet)), torch.Generator().manual_seed(1)
    inner, width = attention.to_k.weight.shape
    shape = (inner, width)
    parts = [PicturePart(n, drawn(shape, draw), drawn(shape, draw), s) for n, s in ((3, -0.5), (2, 1.5))]
    x, told = torch.randn(2, 6, attention.to_q.in_features, generator=draw), drawn((2, 12, width), draw)

    def read(rows: Tensor, to_k: Tensor, to_v: Tensor) -> Tensor:
        split = (
            part.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for part in (rows @ to_k.T, rows @ to_v.T)
        )
        query = attention.to_q(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(query, *split).transpose(1, 2).flatten(2)

    def whole(told: Tensor) -> Tensor:
        text = read(told[:, :7], attention.to_k.weight, attention.to_v.weight)
        first, second = (
            read(rows, p.to_k, p.to_v) for rows, p in zip(told[:, 7:].split([3, 2], 1), parts, strict=True)
        )
        return attention.to_out[0](text - 0.5 * first + 1.5 * second)

    kept, other = KeptText(parts), told.flip(0).clone()
    for text in (told, other, told):
        torch.testing.assert_close(kept(attention, x, text), whole(text), atol=1e-5, rtol=1e-4)
    kept.fix(attention, told)
    torch.testing.assert_close(kept(attention, x, other), whole(told), atol=1e-5, rtol=1e-4)
    kept.read([])
    for text in (told, other):
        wanted = AttnProcessor2_0()(attention, x, encoder_hidden_states=text)
        torch.testing.assert_close(kept(attention, x, text), wanted, atol=1e-5, rtol=1e-4)


def test_a_picture_may_be_given_in_any_way(sd1: Base, home: Path, tmp_path: Path) -> None:
    """One by itself is one picture, and not as many as it has rows."""
    file, picture = home / "sd1-plain.safetensors", photo(1)
    Image.fromarray(picture).save(tmp_path / "photo.png")
    expected = picture_prompt(sd1, file, [picture]).tokens
    opaque = Image.fromarray(picture).convert("RGBA")
    for given in (picture, picture[None], [picture / 255], opaque, [opaque], tmp_path / "photo.png"):
        assert torch.equal(picture_prompt(sd1, file, given).tokens, expected)
    with pytest.raises(ValueError, match=r"^no picture given: an IP-Adapter tells of one or more$"):
        picture_prompt(sd1, file, [])
    with pytest.raises(ValueError, match=r"picture 0 of the batch: nowhere.png does not exist"):
        picture_prompt(sd1, file, ["nowhere.png"])


def test_what_was_told_another_base_is_refused(load: Callable[[str], Base], sd1: Base, home: Path) -> None:
    prompt = picture_prompt(sd1, str(home / "sd1-plain.safetensors"), [photo(1)])
    with pytest.raises(ValueError, match="a PicturePrompt was made for another base"):
        generate(load("sdxl"), "x", steps=1, picture_prompts=[prompt])
    assert generate(sd1, "x", steps=1, picture_prompts=[prompt])


def test_what_a_pickle_says_and_both_layouts(sd1: Base, home: Path, tmp_path: Path) -> None:
    torch.save(adapter(sd1, "plain"), tmp_path / "nested.bin")
    write_encoder(tmp_path / "image_encoder")
    drawn_before = torch.get_rng_state()
    ours, theirs = (
        picture_prompt(sd1, str(file), [photo(1)])
        for file in (home / "sd1-plain.safetensors", tmp_path / "nested.bin")
    )
    assert torch.equal(torch.get_rng_state(), drawn_before)  # which are the caller's numbers
    assert torch.equal(ours.tokens, theirs.tokens)
    assert all(torch.equal(a, b) for a, b in zip(sum(ours.weights, ()), sum(theirs.weights, ()), strict=True))


def test_a_checkpoint_of_the_authors_training_is_read(
    sd1: Base, home: Path, tmp_path: Path, run: Run
) -> None:
    names = {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}
    state = {
        f"{names[part]}.{key}": tensor
        for part, tensors in adapter(sd1, "plain").items()
        for key, tensor in tensors.items()
    }
    file = tmp_path / "pytorch_model.bin"
    torch.save({"unet.conv_in.bias": torch.zeros(16), **state}, file)
    write_encoder(tmp_path / "image_encoder")
    ours = picture_prompt(sd1, str(file), [photo(1)])
    theirs = picture_prompt(sd1, str(home / "sd1-plain.safetensors"), [photo(1)])
    assert torch.equal(ours.tokens, theirs.tokens)
    assert all(torch.equal(a, b) for a, b in zip(sum(ours.weights, ()), sum(theirs.weights, ()), strict=True))
    assert "is an IP-Adapter: give it as --ip-adapter FILE=PICTURE" in run("info", file).refused()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickles_of_every_name_are_read_alone_or_in_their_folder(
    suffix: str, sd1: Base, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    message = f"IP-Adapter {folder}: the folder holds no files of weights; name the one"
    with pytest.raises(ValueError, match=message):
        picture_prompt(sd1, str(folder), [photo(1)])
    torch.save(adapter(sd1, "plain"), folder / f"a{suffix}")
    write_encoder(folder / "image_encoder")
    by_name, by_folder = (
        picture_prompt(sd1, str(source), [photo(1)]) for source in (folder / f"a{suffix}", folder)
    )
    assert torch.equal(by_name.tokens, by_folder.tokens)
    asked = run("generate", "x", "--ip-adapter", f"{folder / f'a{suffix}'}=gone.png").refused()
    assert "gone.png" in asked
    (folder / "b.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match="the folder holds 2 files of weights; name the one"):
        picture_prompt(sd1, str(folder), [photo(1)])


def test_with_everything_else(sd1: Base, home: Path) -> None:
    prompt = picture_prompt(sd1, str(home / "sd1-plain.safetensors"), [photo(1)])
    control = Control(controlnet_of(sd1), cond(), mode="control")
    large = generate(sd1, "x", steps=2, picture_prompts=[prompt], tiles=Tiles(64), width=128, height=64)
    assert large[0].shape == (64, 128, 3)
    request: dict[str, Any] = {"steps": 4, "controls": [control], "picture_prompts": [prompt]}
    usual = generate(sd1, "x", **request)[0]
    one_branch = generate(sd1, "x", memory=Memory(1, one_branch=True), **request)[0]
    assert np.abs(usual.astype(int) - one_branch).max() <= 1
    for savings in (Savings(guidance_until=0.5), Savings(features_every=2), Savings(control_every=2)):
        assert not np.array_equal(generate(sd1, "x", savings=savings, **request)[0], usual)


def changed(parts: dict[str, dict[str, Tensor]], how: str) -> dict[str, dict[str, Tensor]]:
    attentions = parts["ip_adapter"]
    if how == "another family":
        return {**parts, "ip_adapter": {key: torch.zeros(8, 12) for key in attentions}}
    if how == "fewer attentions":
        return {**parts, "ip_adapter": {key: attentions[key] for key in list(attentions)[:4]}}
    if how == "one too few":
        return {**parts, "ip_adapter": {k: v for k, v in attentions.items() if k != "3.to_v_ip.weight"}}
    if how == "one too many":
        return {**parts, "ip_adapter": {**attentions, "99.to_q_ip.weight": torch.zeros(8, 12)}}
    if how.startswith("without "):
        name = how.removeprefix("without ")
        return {**parts, "image_proj": {k: v for k, v in parts["image_proj"].items() if k != name}}
    if how.startswith("with a wrong "):
        return {**parts, "image_proj": {**parts["image_proj"], how.split()[-1]: torch.zeros(8, 8)}}
    if how == "not finite":
        return {**parts, "image_proj": {**parts["image_proj"], "proj.bias": torch.full((128,), torch.nan)}}
    if how == "whole numbers":
        return {
            **parts,
            "image_proj": {**parts["image_proj"], "proj.bias": torch.ones(128, dtype=torch.int8)},
        }
    if how == "no projection":
        return {"image_proj": {}, "ip_adapter": attentions}
    if how == "a face":
        face = {"proj.0.weight": torch.zeros(8, 8), "norm.weight": torch.zeros(32)}
        return {**parts, "image_proj": face}
    if how == "an unknown projection":
        return {**parts, "image_proj": {"proj_in.weight": torch.zeros(8, 8)}}
    return {"lora": {"x": torch.zeros(1)}}


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        ("plain", "without norm.bias", "is damaged: it lacks image_proj.norm.bias"),
        ("plain", "without proj.bias", "is damaged: it lacks image_proj.proj.bias"),
        (
            "plain",
            "with a wrong more.weight",
            "is damaged: it holds, beyond what such a file has, image_proj.more",
        ),
        ("full", "without proj.3.bias", "is damaged: it lacks image_proj.proj.3.bias"),
        ("full", "with a wrong proj.2.weight", "is damaged: the shape of image_proj.proj.2.weight is 8x8"),
        ("plus", "without layers.2.0.norm2.bias", "is damaged: it lacks image_proj.layers.2.0.norm2.bias"),
        (
            "plus",
            "without layers.1.0.to_kv.weight",
            "is damaged: it lacks image_proj.layers.1.0.to_kv.weight",
        ),
        ("plus", "without layers.3.1.3.weight", "is damaged: it lacks image_proj.layers.3.1.3.weight"),
        (
            "plus",
            "with a wrong layers.3.0.to_out.weight",
            "the shape of image_proj.layers.3.0.to_out.weight is 8x8",
        ),
        ("plus", "without proj_out.weight", "(plain, plus, full): it lacks image_proj.proj_out.weight"),
    ],
)
def test_the_tensor_at_fault_in_a_projection_is_named(
    sd1: Base, tmp_path: Path, kind: str, how: str, message: str
) -> None:
    save_file(flat(changed(adapter(sd1, kind), how)), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        picture_prompt(sd1, str(tmp_path / "a.safetensors"), [photo(0)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("one too few", "is damaged: it lacks ip_adapter.3.to_v_ip.weight"),
        ("one too many", "holds ip_adapter.99.to_q_ip.weight, which an IP-Adapter for the SD1 base"),
        ("another family", "was made for another base: its 1.to_k_ip is (8, 12), and the SD1 base"),
        ("fewer attentions", "was made for a base with 2 cross-attentions; the SD1 base"),
        ("not finite", "is damaged: image_proj.proj.bias has numbers that are not finite"),
        ("whole numbers", "stores image_proj.proj.bias as int8, a quantization that is not supported"),
        ("no projection", "is not an IP-Adapter: it holds no image_proj"),
        ("a face", "is a FaceID adapter"),
        ("an unknown projection", "is none of the IP-Adapters that are known"),
        ("something else", "is not an IP-Adapter: it holds lora.x"),
    ],
)
def test_what_is_no_adapter_for_this_base(sd1: Base, tmp_path: Path, how: str, message: str) -> None:
    save_file(flat(changed(adapter(sd1, "plain"), how)), tmp_path / "a.safetensors")
    write_encoder(tmp_path / "image_encoder")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        picture_prompt(sd1, str(tmp_path / "a.safetensors"), [photo(0)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_encoder_that_fits_is_found(sd1: Base, home: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "a.safetensors"
    file.parent.mkdir()
    file.write_bytes((home / "sd1-plain.safetensors").read_bytes())
    with pytest.raises(ValueError, match="projection_dim 40, and none was found: name its folder"):
        picture_prompt(sd1, str(file), [photo(0)])
    wrong = write_encoder(file.parent / "image_encoder", projected=24)
    with pytest.raises(ValueError, match=r"that of .* has 24: name its folder"):
        picture_prompt(sd1, str(file), [photo(0)])
    elsewhere = write_encoder(tmp_path / "other" / "image_encoder")
    found = picture_prompt(sd1, str(file), [photo(0)])
    for named in (elsewhere, elsewhere.parent):
        told = picture_prompt(sd1, str(file), [photo(0)], image_encoder=str(named))
        assert torch.equal(found.tokens, told.tokens)
    with pytest.raises(ValueError, match="has 24: name its folder"):
        picture_prompt(sd1, str(file), [photo(0)], image_encoder=str(wrong))


def test_the_command_records_and_repeats(
    run: Run, models: Path, home: Path, load: Callable[[str], Base]
) -> None:
    Image.fromarray(photo(1)).save("one.png")
    Image.fromarray(photo(2)).save("two, and more.png")
    fixed = ["generate", "x", "--base", models / "sd1", "--steps", 2]
    told = ["--ip-adapter", f"{home / 'sd1-plain.safetensors'}=one.png:0.6"]
    more = ["--ip-adapter", f"{home / 'sd1-plus.safetensors'}=two, and more.png"]
    run(*fixed, "-o", "plain.png").done()
    run(*fixed, *told, *more, "-o", "out.png").done()
    assert not np.array_equal(load_picture("out.png"), load_picture("plain.png"))
    records = json.loads(read_png_text("out.png")["controlkit"])["ip_adapters"]
    assert [(record["pictures"], record["scale"]) for record in records] == [
        (["one.png"], 0.6),
        (["two, and more.png"], 1.0),
    ]
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    Image.fromarray(photo(3)).save("one.png")
    changed = run("generate", "--like", "out.png").refused()
    assert "one.png, which has changed since" in changed
    advice = shlex.split(changed.partition("to use it as it is now, add ")[2])
    assert advice == [*told, more[0], f"{more[1]}:1"]
    run("generate", "--like", "out.png", *advice, "-o", "anew.png").done()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--ip-adapter", "a.safetensors"], "must be FILE=PICTURE"),
        (["--ip-adapter", "gone.safetensors=one.png"], "there is no IP-Adapter gone.safetensors"),
        (["--ip-adapter", "{}=gone.png"], "gone.png"),
        (["--ip-adapter", "{}=one.png:11"], "an IP-Adapter's scale must be a number from -10 to 10, not 11"),
        (["--ip-adapter", "{}=one.png", "--image-encoder", "gone"], "there is no folder gone"),
        (["--image-encoder", "x"], "belongs to an --ip-adapter"),
    ],
)
def test_what_the_command_refuses(run: Run, home: Path, told: list[str], message: str) -> None:
    Image.fromarray(photo(1)).save("one.png")
    filled = [part.format(home / "sd1-plain.safetensors") for part in told]
    assert message in run("generate", "x", *filled).refused()

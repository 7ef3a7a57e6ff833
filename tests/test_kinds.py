"""Control networks of other kinds: T2I-Adapter, ControlNet-XS, ControlNet-Union, and our light network."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetXSPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
    UNetControlNetXSModel,
)
from safetensors.torch import save_file
from sampling_peers import SIZE, assert_same, cond, controlnet_of, our_latents, parts_of

from controlkit import cross, kinds, light, lllite, map_stacks, union
from controlkit.adapters import MAPS, Adapter, AdapterInfo, MapSpec, check_fits, load_adapter, save_adapter
from controlkit.applying import EncodedControl, Rows, encode_controls, summed_residuals
from controlkit.base import Base
from controlkit.control import Control
from controlkit.controlnet import lock, predict
from controlkit.families import t2i_shape
from controlkit.predicting import Savings
from controlkit.sampling import generate
from controlkit.tiling import Tiles

KINDS = ("t2i-adapter", "controlnet-xs", "controlnet-union", "lite")


def t2i_of(base: Base, *, light_weight: bool = False) -> Any:
    widths = list(base.unet.config.block_out_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if light_weight:
            return lock(T2IAdapter(3, widths[:-1], 1, 8, "light_adapter"))
        shape = t2i_shape(base.unet.config)
        return lock(T2IAdapter(3, list(shape.channels), 1, shape.factor, shape.adapter_type))


def xs_of(base: Base, **changes: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        network = ControlNetXSAdapter.from_unet(
            base.unet,
            size_ratio=0.5,
            num_attention_heads=[2] * len(base.unet.config.block_out_channels),
            conditioning_embedding_out_channels=(4, 8, 8, 8),
            **changes,
        )
    return lock(tiny_models.randomize_zero_convs(network))


def union_of(base: Base, count: int = 6) -> Any:
    network = union.from_base(base, count, hint_channels=(4, 8, 8, 8), seed=3)
    return lock(tiny_models.randomize_zero_convs(network))


def light_of(base: Base) -> Any:
    return lock(tiny_models.randomize_zero_convs(light.from_base(base, seed=4)))


def lllite_tensors(base: Base) -> dict[str, torch.Tensor]:
    """A file of kohya's layout for a tiny SDXL: one projection of each sort, depths 1 to 3."""
    generator = torch.Generator().manual_seed(5)
    strides = {1: (4, 2), 2: (4, 4), 3: (4, 4, 2)}
    names = {
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": 2,
        "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_k": 2,
        "lllite_unet_input_blocks_8_1_transformer_blocks_1_attn1_to_v": 3,
        "lllite_unet_middle_block_1_transformer_blocks_0_attn2_to_q": 3,
        "lllite_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_q": 2,
    }
    tensors = {}
    for name, depth in names.items():
        tokens, embedded, inner = 32, 8, 6
        last = len(strides[depth]) - 1
        for k, stride in enumerate(strides[depth]):
            wide = embedded if k == last else embedded // 2
            narrow = 3 if k == 0 else embedded // 2
            tensors[f"{name}.conditioning1.{2 * k}.weight"] = torch.randn(
                wide, narrow, stride, stride, generator=generator
            )
            tensors[f"{name}.conditioning1.{2 * k}.bias"] = torch.randn(wide, generator=generator)
        for part, (wide, narrow) in {
            "down": (inner, tokens),
            "mid": (inner, inner + embedded),
            "up": (tokens, inner),
        }.items():
            tensors[f"{name}.{part}.0.weight"] = torch.randn(wide, narrow, generator=generator)
            tensors[f"{name}.{part}.0.bias"] = torch.randn(wide, generator=generator)
    return tensors


def lllite_of(base: Base) -> Any:
    return lock(lllite.from_tensors(lllite_tensors(base)))


MAKE = {
    "lllite": lllite_of,
    "t2i-adapter": t2i_of,
    "controlnet-xs": xs_of,
    "controlnet-union": union_of,
    "lite": light_of,
}


def given(base: Base, batch: int = 2) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor] | None]:
    """Latents, timesteps and text of a forward pass, and SDXL's further conditioning."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, 77, base.unet.config.cross_attention_dim, generator=generator)
    latents = torch.randn(batch, 4, 8, 8, generator=generator)
    pooled = torch.randn(batch, 32, generator=generator)
    added = {"text_embeds": pooled, "time_ids": 64 * torch.ones(batch, 6)}
    return (latents, torch.tensor([500, 20][:batch]), text), added if base.family == "sdxl" else None


# --- against diffusers' classes ---


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_t2i_adapter_gives_what_the_u_net_gives_with_its_features(
    load: Callable[[str], Base], family: str
) -> None:
    base = load(family)
    inputs, added = given(base)
    for network in [t2i_of(base), *([t2i_of(base, light_weight=True)] if family != "sdxl" else [])]:
        maps = cond(batch=2)
        with torch.no_grad():
            ours = kinds.predict_pair(
                network, base.unet, *inputs, kinds.encode_hint(network, maps), added_cond=added
            )
            features = [feature.clone() for feature in network(maps)]
            theirs = base.unet(
                *inputs, down_intrablock_additional_residuals=features, added_cond_kwargs=added
            ).sample
            alone = predict(base.unet, *inputs, added_cond=added)
        assert torch.equal(ours, theirs)
        assert (theirs - alone).abs().max() > 1e-2


@pytest.mark.parametrize("learned_time", [False, True])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_controlnet_xs_gives_what_diffusers_merged_model_gives(
    load: Callable[[str], Base], family: str, learned_time: bool
) -> None:
    base = load(family)
    inputs, added = given(base)
    mixed = {"learn_time_embedding": True, "time_embedding_mix": 0.4} if learned_time else {}
    network, maps = xs_of(base, **mixed), cond(batch=2)
    merged = UNetControlNetXSModel.from_unet(base.unet, network).eval()
    _with_the_bases_epsilon(merged, base)
    with torch.no_grad():
        hint = kinds.encode_hint(network, maps)
        ours = kinds.predict_pair(network, base.unet, *inputs, hint, added_cond=added)
        theirs = merged(*inputs, controlnet_cond=maps, added_cond_kwargs=added).sample
        alone = predict(base.unet, *inputs, added_cond=added)
        half = cross.predict(
            base.unet, *inputs, crossing=cross.Crossing(network, hint[0], 0.5), added_cond=added
        )
        halved = merged(*inputs, controlnet_cond=maps, conditioning_scale=0.5, added_cond_kwargs=added).sample
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.allclose(half, halved, atol=1e-5)
    assert (theirs - alone).abs().max() > 1e-2


def _with_the_bases_epsilon(merged: Any, base: Base) -> None:
    """diffusers builds the base's blocks anew, with 1e-6 in its norms where the base has 1e-5 (0.42.1)."""
    for name, module in merged.named_modules():
        if isinstance(module, torch.nn.GroupNorm) and "ctrl" not in name and "attentions" not in name:
            module.eps = base.unet.config.norm_eps


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_union_gives_its_own_forward_for_one_map_and_for_two(
    load: Callable[[str], Base], family: str
) -> None:
    base = load(family)
    inputs, added = given(base, batch=1)
    network, maps = union_of(base), [cond(1), cond(2)]
    with torch.no_grad():
        hints = [kinds.encode_hint(network, maps[0], 3), kinds.encode_hint(network, maps[1], 1)]
        for which, scales in (([3], [1.0]), ([3, 1], [0.7, 0.4])):
            there = torch.zeros(1, 6)
            there[0, which] = 1
            theirs = network(
                *inputs, maps[: len(which)], there, which, conditioning_scale=scales, added_cond_kwargs=added
            )
            hint = hints[0] if len(which) == 1 else union.joined(network, hints, scales)
            ours = kinds.control_residuals(network, *inputs, hint, added_cond=added)
            expected = (*theirs.down_block_res_samples, theirs.mid_block_res_sample)
            pairs = zip(ours.tensors, expected, strict=True)
            assert all(torch.allclose(a, b, atol=5e-5) for a, b in pairs)
    assert (hints[0][1] - kinds.encode_hint(network, maps[0], 1)[1]).abs().max() > 1e-3, "the kind is told"


def test_a_stack_of_maps_is_those_of_it_that_are_there(sd1: Base) -> None:
    network, maps = union_of(sd1, 3), [cond(k) * (cond(k + 9) > 0.5) for k in range(3)]  # black in places
    present = torch.tensor([[True, False, True]])
    with torch.no_grad():
        stack = union.absent_marked(torch.cat(maps, dim=1), present)
        total, there = kinds.encode_hint(network, stack)
        hints = [union.encode_hint(network, maps[k], k) for k in (0, 2)]
        expected, kinds_there = union.joined(network, hints, [1.0, 1.0])
    assert torch.allclose(total, expected, atol=1e-6)
    assert torch.equal(there, kinds_there)


def test_an_lllite_stands_before_the_projections_that_it_names(load: Callable[[str], Base]) -> None:
    """Beside the same equation, written into the projections by hand."""
    base = load("sdxl")
    inputs, added = given(base)
    tensors, maps = lllite_tensors(base), cond(batch=2)
    by_hand = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": base.unet.down_blocks[1].attentions[0],
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k": base.unet.down_blocks[1].attentions[0],
        "input_blocks_8_1_transformer_blocks_1_attn1_to_v": base.unet.down_blocks[2].attentions[1],
        "middle_block_1_transformer_blocks_0_attn2_to_q": base.unet.mid_block.attentions[0],
        "output_blocks_3_1_transformer_blocks_0_attn2_to_q": base.unet.up_blocks[1].attentions[0],
    }
    handles = []
    for name, transformer in by_hand.items():
        *_, number, attention, _, letter = name.split("_")
        projection = getattr(getattr(transformer.transformer_blocks[int(number)], attention), f"to_{letter}")
        handles.append(projection.register_forward_pre_hook(_by_hand(tensors, f"lllite_unet_{name}", maps)))
    with torch.no_grad():
        theirs = predict(base.unet, *inputs, added_cond=added)
        for handle in handles:
            handle.remove()
        network = lllite_of(base)
        hint = kinds.encode_hint(network, maps)
        acting = lllite.Acting(network, hint, 0.5)
        with lllite.acting(base.unet, [acting], height=8, width=8):
            ours = predict(base.unet, *inputs, added_cond=added)
        alone = predict(base.unet, *inputs, added_cond=added)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert (ours - alone).abs().max() > 1e-2
    lllite.check_fits(network, base.unet, base="x")
    with pytest.raises(ValueError, match=r"the LLLite does not fit the base .*, which has no down_blocks"):
        generate(load("sd1"), "", controls=[Control(network, cond())], steps=1, height=SIZE, width=SIZE)


def _by_hand(tensors: dict[str, torch.Tensor], name: str, maps: torch.Tensor) -> Any:
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(name)}

    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        embedding = 2 * maps - 1
        for k in (0, 2, 4):
            if f"conditioning1.{k}.weight" in own:
                weight, bias = own[f"conditioning1.{k}.weight"], own[f"conditioning1.{k}.bias"]
                embedding = embedding.relu() if k else embedding
                embedding = torch.conv2d(embedding, weight, bias, stride=weight.shape[-1])
        embedding = embedding.reshape(2, 8, -1).permute(0, 2, 1)
        x = (args[0] @ own["down.0.weight"].T + own["down.0.bias"]).relu()
        x = (torch.cat([embedding, x], 2) @ own["mid.0.weight"].T + own["mid.0.bias"]).relu()
        return (args[0] + 0.5 * (x @ own["up.0.weight"].T + own["up.0.bias"]),)

    return hook


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k.replace("attn1", "ff"): v for k, v in t.items()}, "names no attention projection"),
        (lambda t: {k.replace("attn1_to_k", "attn2_to_k"): v for k, v in t.items()}, "names no attention"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("up.0.bias")}, "has no up.0.bias"),
        (lambda t: {k: v for k, v in t.items() if "down.0" not in k}, r"lacks down.0.weight"),
        (lambda t: {k: v[1:] if "mid.0.bias" in k else v for k, v in t.items()}, r"mid.0.bias is \(5,\)"),
        (lambda t: t | {next(iter(t)).partition(".")[0] + ".x": torch.zeros(1)}, "has a x"),
    ],
)
def test_a_damaged_lllite_is_refused(load: Callable[[str], Base], change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lllite.from_tensors(change(lllite_tensors(load("sdxl"))))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_t2i_adapter_follows_a_map_of_every_size_that_the_u_net_takes(
    load: Callable[[str], Base], family: str
) -> None:
    base = load(family)
    network, factor = t2i_of(base), base.vae_factor
    generator = torch.Generator().manual_seed(5)
    for cells in ((7, 9), (8, 5), (9, 8)):
        maps = torch.rand((1, 3, *(factor * side for side in cells)), generator=generator)
        sizes = [tuple(feature.shape[-2:]) for feature in kinds.encode_hint(network, maps)]
        halvings = kinds.kind_of(network).levels(network)
        assert sizes == [tuple(-(-side // 2**n) for side in cells) for n in halvings], "as the U-Net rounds"
        (picture,) = generate(base, "a red cube", controls=[Control(network, maps)], steps=2)
        (alone,) = generate(base, "a red cube", steps=2, width=picture.shape[1], height=picture.shape[0])
        assert picture.shape[:2] == maps.shape[2:]
        assert not np.array_equal(picture, alone)


def test_a_map_that_ends_within_a_cell_of_a_t2i_adapter_is_continued_at_its_edge(
    load: Callable[[str], Base],
) -> None:
    network = t2i_of(load("sdxl"))
    maps = torch.rand((1, 3, 56, 40), generator=torch.Generator().manual_seed(6))
    assert network.downscale_factor == 16
    continued = torch.cat([maps, maps[:, :, -1:].expand(-1, -1, 8, -1)], dim=2)
    continued = torch.cat([continued, continued[..., -1:].expand(-1, -1, -1, 8)], dim=3)
    found, expected = (kinds.encode_hint(network, one) for one in (maps, continued))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- against diffusers' pipelines ---


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_latents_under_a_t2i_adapter_equal_the_pipeline(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    network = t2i_of(base)
    parts = parts_of(base, [], "ddim")
    del parts["controlnet"]
    if family == "sdxl":
        pipeline = StableDiffusionXLAdapterPipeline(**parts, adapter=network)
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionAdapterPipeline(**parts, adapter=network, **rest)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red cube",
        image=cond(),
        adapter_conditioning_scale=0.7,
        num_inference_steps=4,
        guidance_scale=5.0,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
    )[0]
    ours = our_latents(base, [Control(network, cond(), scale=0.7)], seed=7, steps=4, scheduler="ddim")
    assert_same(ours, theirs)


def test_latents_under_a_controlnet_xs_equal_the_pipeline(sd1: Base) -> None:
    network = xs_of(sd1)
    parts = parts_of(sd1, [], "ddim") | {"controlnet": network}
    rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionControlNetXSPipeline(**parts, **rest)
    _with_the_bases_epsilon(pipeline.unet, sd1)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red cube",
        image=cond(),
        controlnet_conditioning_scale=0.7,
        num_inference_steps=4,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
    )[0]
    ours = our_latents(sd1, [Control(network, cond(), scale=0.7)], seed=7, steps=4, scheduler="ddim")
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("scales", "ends"), [((0.7, 0.4), (1.0, 1.0)), ((0.5, 0.4), (1.0, 0.5)), ((0.0, 0.5), (1.0, 1.0))]
)
def test_latents_under_two_maps_of_a_union_equal_the_pipeline(
    load: Callable[[str], Base], scales: tuple[float, float], ends: tuple[float, float]
) -> None:
    base = load("sdxl")
    network = union_of(base)
    parts = parts_of(base, [], "ddim") | {"controlnet": network}
    pipeline = StableDiffusionXLControlNetUnionPipeline(**parts, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a red cube",
        control_image=[cond(1), cond(2)],
        control_mode=[3, 1],
        controlnet_conditioning_scale=list(scales),
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=list(ends),
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        return_dict=False,
    )[0]
    controls = [
        Control(network, cond(1), scale=scales[0], end=ends[0], kind="canny"),
        Control(network, cond(2), scale=scales[1], end=ends[1], kind="depth"),
    ]
    assert_same(our_latents(base, controls, seed=7, steps=3, scheduler="ddim"), theirs)


# --- as the other controls ---


@pytest.mark.parametrize(
    "kind",
    [
        "t2i-adapter",
        "controlnet-xs",
        *(
            pytest.param(k, marks=pytest.mark.slow)
            for k in (*KINDS, "lllite")
            if k not in ("t2i-adapter", "controlnet-xs")
        ),
    ],
)
def test_every_kind_follows_window_mode_mask_and_scale(load: Callable[[str], Base], kind: str) -> None:
    # Three levels: with four, the tiny norms of a ControlNet-XS have one value in a group at this size.
    base = load("sdxl" if kind in ("controlnet-xs", "lllite") else "sd1")
    # Not as a generation before may have laid it out: kernels for another layout round otherwise.
    plain = copy.deepcopy(base.unet).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    base = replace(base, unet=plain)
    network = MAKE[kind](base)
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": "ddim"}

    def latents(**how: Any) -> torch.Tensor:
        return our_latents(base, [Control(network, cond(), kind="canny", **how)], **request)

    alone, full = our_latents(base, [], **request), latents()
    assert (full - alone).abs().max() > 1e-2
    assert torch.equal(latents(scale=0.0), alone)
    assert torch.allclose(latents(mask=torch.full((SIZE, SIZE), 1e-8)), alone, atol=1e-5)
    assert torch.allclose(latents(mask=torch.ones(SIZE, SIZE)), full, atol=1e-4)
    others = [latents(scale=0.5), latents(end=0.5), latents(mode="unbalanced"), latents(mode="prompt")]
    some = 3 if kind in ("controlnet-xs", "lite", "lllite") else 4  # one connection has no curve
    for other in others[:some]:
        assert (other - full).abs().max() > 1e-3
        assert (other - alone).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["controlnet-xs", "lllite"])
def test_a_mask_is_stretched_once_for_all_steps(
    load: Callable[[str], Base], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """It lies on the CPU: on a GPU each step would wait for the copies."""
    base, sizes = load("sdxl"), []
    plain = torch.nn.functional.interpolate

    def noting(tensor: torch.Tensor, **how: Any) -> torch.Tensor:
        if how.get("mode") == "bilinear":
            sizes.append(how["size"])
        return plain(tensor, **how)

    monkeypatch.setattr(torch.nn.functional, "interpolate", noting)
    controls = [Control(MAKE[kind](base), cond(), mask=torch.ones(SIZE, SIZE))]
    our_latents(base, controls, seed=7, steps=3, scheduler="ddim")
    assert sizes
    assert len(sizes) == len(set(sizes))


@pytest.mark.parametrize("kind", [*KINDS, "lllite"])
def test_a_mode_that_leaves_a_branch_alone_leaves_it_alone(load: Callable[[str], Base], kind: str) -> None:
    """One branch at a time gives what both at once do."""
    base = load("sdxl" if kind in ("controlnet-xs", "lllite") else "sd1")
    network = MAKE[kind](base)
    request: dict[str, Any] = {"seed": 7, "steps": 2, "scheduler": "ddim"}
    control = Control(network, cond(), kind="canny", mode="unbalanced")
    together = our_latents(base, [control], **request)
    apart = our_latents(base, [control], one_branch_at_a_time=True, **request)
    assert torch.allclose(together, apart, atol=1e-4)


@pytest.mark.parametrize("kind", [*KINDS, "lllite"])
def test_picture_k_of_a_batch_is_picture_k_alone(load: Callable[[str], Base], kind: str) -> None:
    base = load("sdxl" if kind == "lllite" else "sd1")
    network = MAKE[kind](base)
    rest: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}
    controls = [Control(network, cond(batch=2), kind="canny")]
    first, second = generate(base, "a cube", controls=controls, seeds=[3, 4], **rest)
    alone = Control(network, cond(batch=2)[1:], kind="canny")
    (picture,) = generate(base, "a cube", controls=[alone], seeds=[4], **rest)
    assert (picture == second).all()
    assert (first != second).any()


@pytest.mark.parametrize("kind", ["lite", "controlnet-xs", "controlnet-union"])
def test_an_untrained_network_leaves_the_base_as_it_is(sd1: Base, kind: str) -> None:
    inputs, _ = given(sd1)
    network = {
        "lite": lambda: light.from_base(sd1, seed=1),
        "controlnet-xs": lambda: ControlNetXSAdapter.from_unet(sd1.unet, size_ratio=0.5),
        "controlnet-union": lambda: union.from_base(sd1, 2, hint_channels=(4, 8, 8, 8), seed=1),
    }[kind]()
    with torch.no_grad():
        alone = predict(sd1.unet, *inputs)
        hint = kinds.encode_hint(network.eval(), cond(batch=2))
        found = kinds.predict_pair(network, sd1.unet, *inputs, hint)
    same = torch.allclose(found, alone, atol=1e-6) if kind == "controlnet-xs" else torch.equal(found, alone)
    assert same, kind


def test_controls_of_several_kinds_add_up(sd1: Base) -> None:
    request: dict[str, Any] = {"seed": 7, "steps": 2, "scheduler": "ddim"}
    plain = Control(controlnet_of(sd1), cond(5))
    for kind in KINDS:
        other = Control(MAKE[kind](sd1), cond(), kind="canny")
        both = our_latents(sd1, [plain, other], **request)
        for single in (plain, other):
            assert (both - our_latents(sd1, [single], **request)).abs().max() > 1e-3
    t2i, lite = (Control(MAKE[kind](sd1), cond()) for kind in ("t2i-adapter", "lite"))
    assert torch.isfinite(our_latents(sd1, [t2i, lite, plain], **request)).all()


@pytest.mark.parametrize(
    "otherwise", [{"mode": "unbalanced"}, {"layers": "soft"}, {"mask": np.eye(SIZE) > 0}, {"only_mid": True}]
)
def test_maps_of_a_union_that_act_otherwise_are_a_run_of_their_own(
    sd1: Base, otherwise: dict[str, Any]
) -> None:
    """On other branches, connections or places: nothing of one map acts where only the other does."""
    network = union_of(sd1)
    canny = Control(network, cond(1), kind="canny")
    depth = Control(network, cond(2), kind="depth", **otherwise)
    inputs, _ = given(sd1)
    rows = Rows(inputs[2], None, 1)

    def residuals(*controls: Control) -> list[torch.Tensor]:
        encoded = encode_controls(controls, width=SIZE, height=SIZE, pictures=1)
        with torch.no_grad():
            found = summed_residuals(encoded, inputs[0][:1], inputs[1][0], rows, step=0, steps=4)
        assert found is not None
        return list(found.tensors)

    for both, one, other in zip(residuals(canny, depth), residuals(canny), residuals(depth), strict=True):
        assert torch.allclose(both, one + other, atol=1e-5)
    alike = Control(network, cond(2), kind="depth")
    together, apart = residuals(canny, alike), residuals(alike)
    assert not torch.allclose(together[-1], residuals(canny)[-1] + apart[-1], atol=1e-3)


def test_lossy_steps_take_the_features_that_they_have(sd1: Base) -> None:
    request: dict[str, Any] = {"seed": 7, "steps": 4, "scheduler": "ddim"}
    for kind in ("t2i-adapter", "lite", "controlnet-union"):
        control = Control(MAKE[kind](sd1), cond(), kind="canny")
        for savings in (Savings(features_every=2), Savings(control_every=2)):
            assert torch.isfinite(our_latents(sd1, [control], savings=savings, **request)).all()


def test_tiles_cut_a_unions_map_and_not_its_kinds(sd1: Base) -> None:
    network = union_of(sd1)
    rest: dict[str, Any] = {"steps": 2, "height": 96, "width": 96}
    control = Control(network, torch.rand(1, 3, 96, 96), kind="canny")
    (whole,) = generate(sd1, "x", controls=[control], **rest)
    (tiled,) = generate(sd1, "x", controls=[control], tiles=Tiles(64), **rest)
    assert tiled.shape == whole.shape
    assert (tiled != generate(sd1, "x", tiles=Tiles(64), **rest)[0]).any()


def test_residuals_that_are_kept_are_those_of_the_maps_that_still_act(sd1: Base) -> None:
    """One of two maps of a Union ends: from then on the other acts as if that had never acted."""
    network = union_of(sd1)
    canny = Control(network, cond(1), scale=0.5, kind="canny")

    def encode(scale: float) -> Sequence[EncodedControl]:
        depth = Control(network, cond(2), scale=scale, end=0.3, kind="depth")
        return encode_controls([canny, depth], width=SIZE, height=SIZE, pictures=1)

    encoded = encode(1.0)
    inputs, _ = given(sd1, batch=1)
    rows = Rows(inputs[2], None, 1)
    latents, timestep = inputs[0], inputs[1][0]
    with torch.no_grad():
        both = summed_residuals(encoded, latents, timestep, rows, step=0, steps=4, keep=True)
        later = summed_residuals(encoded, latents, timestep, rows, step=3, steps=4, again=True)
        expected = summed_residuals(encode(0.0), latents, timestep, rows, step=3, steps=4)
    assert both is not None
    assert later is not None
    assert expected is not None
    assert all(torch.equal(a, b) for a, b in zip(later.tensors, expected.tensors, strict=True))
    assert not torch.equal(both.tensors[0], later.tensors[0])


# --- what is refused ---


def test_what_does_not_go_together_is_said(sd1: Base) -> None:
    xs, t2i = Control(xs_of(sd1), cond()), Control(t2i_of(sd1), cond())
    rest: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}
    with pytest.raises(ValueError, match="a ControlNet-XS does not go with a T2I-Adapter in one picture"):
        generate(sd1, "", controls=[xs, t2i], **rest)
    with pytest.raises(ValueError, match="a ControlNet-XS does not go with a ControlNet-XS"):
        generate(sd1, "", controls=[xs, xs], **rest)
    with pytest.raises(ValueError, match="features_every does not go with a ControlNet-XS"):
        generate(sd1, "", controls=[xs], savings=Savings(features_every=2), **rest)
    with pytest.raises(ValueError, match="a T2I-Adapter sees the map as a whole, and does not go with tiles"):
        generate(sd1, "", controls=[t2i], tiles=Tiles(64), **rest)
    with pytest.raises(ValueError, match=r"layers has 13 weights; this T2I-Adapter has 4 connections"):
        generate(sd1, "", controls=[Control(t2i_of(sd1), cond(), layers=[1.0] * 13)], **rest)
    with pytest.raises(ValueError, match="a Linear is no control network"):
        Control(torch.nn.Linear(1, 1), cond()).weights()


def stacked(channels: int) -> Adapter:
    network = ControlNetModel(block_out_channels=(8,), down_block_types=("DownBlock2D",), norm_num_groups=4)
    return Adapter(network, AdapterInfo(map=MapSpec("canny + depth", channels=channels)), "both")


@pytest.mark.parametrize("each", [1, 3])
def test_several_maps_are_one_input_in_the_networks_order(each: int) -> None:
    adapter, draw = stacked(2 * each), np.random.default_rng(0)
    grey = {kind: np.repeat(draw.integers(0, 256, (8, 8, 1), np.uint8), 3, 2) for kind in ("depth", "canny")}
    assert map_stacks.kinds_in(adapter) == ["canny", "depth"]
    given = np.concatenate([grey["canny"][..., :each], grey["depth"][..., :each]], axis=2)
    wanted = torch.from_numpy(given).permute(2, 0, 1)[None] / 255
    assert torch.equal(map_stacks.stack(adapter, grey), wanted)
    coloured = grey | {"depth": draw.integers(0, 256, (8, 8, 3), np.uint8)}
    if each == 1:
        with pytest.raises(ValueError, match="takes grey maps, and the depth map is coloured"):
            map_stacks.stack(adapter, coloured)
    else:
        assert map_stacks.stack(adapter, coloured).shape == (1, 6, 8, 8)
    with pytest.raises(ValueError, match="the depth map is made of the picture to start from"):
        map_stacks.stack(adapter, grey | {"depth": wanted})


def test_maps_of_one_input_are_given_once_and_alike() -> None:
    adapter, alike = stacked(2), [(1.0, "both")] * 2
    map_stacks.check_given(adapter, ["depth", "canny"], alike)
    for kinds_given, settings, message in (
        (["canny"], alike[:1], "as one input, each once: depth is missing"),
        (["canny", "depth", "depth"], alike, "depth is given twice"),
        (["canny", "depth", "mask"], alike, "and mask is none of them"),
        (["canny", "depth"], [(1.0, "both"), (0.5, "both")], "the same scale, window, mode and mask"),
    ):
        with pytest.raises(ValueError, match=message):
            map_stacks.check_given(adapter, kinds_given, settings)
    # A picture with a grey map in each channel is an input as it is.
    three = Adapter(adapter.controlnet, AdapterInfo(map=MapSpec("a + b + c", channels=3)), "three")
    assert [map_stacks.is_whole(one, ["a"]) for one in (three, adapter)] == [True, False]
    assert not map_stacks.is_whole(three, ["a", "b", "c"])


def test_a_union_wants_to_know_the_kind(sd1: Base) -> None:
    network = union_of(sd1)
    rest: dict[str, Any] = {"steps": 2, "height": SIZE, "width": SIZE}
    with pytest.raises(ValueError, match=r"several kinds of maps, and is not told which: give the kind"):
        generate(sd1, "", controls=[Control(network, cond())], **rest)
    with pytest.raises(ValueError, match=r"no maps of kind 'tile': give the kind, one of openpose, depth"):
        generate(sd1, "", controls=[Control(network, cond(), kind="tile")], **rest)
    for wrong in ("canny", "canny + depth + tile"):  # not one for each of its places
        other = Adapter(network, AdapterInfo(map=MapSpec(wrong)), "other")
        assert Control(other, cond(), kind="canny").number == 3
    own = Adapter(union_of(sd1, 2), AdapterInfo(map=MapSpec("canny + depth")), "own")
    assert [Control(own, cond(), kind=kind).number for kind in ("canny", "depth")] == [0, 1]
    assert [Control(network, cond(), kind=kind).number for kind in ("canny", "depth", "hed")] == [3, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_another_base_is_refused(load: Callable[[str], Base], kind: str) -> None:
    network = MAKE[kind](load("sd1"))
    check_fits(network, load("sd1"))
    with pytest.raises(ValueError, match=r"control network does not fit the base .*: it is for"):
        check_fits(network, load("sdxl"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_read(sd1: Base, tmp_path: Any, kind: str) -> None:
    network = MAKE[kind](sd1)
    info = AdapterInfo(map=MAPS["canny"], family="sd1", prediction_type="epsilon")
    save_adapter(network, tmp_path / "adapter", info=info, dtype=torch.float32)
    adapter = load_adapter(str(tmp_path / "adapter"), base=sd1)
    assert type(adapter.controlnet) is type(network)
    assert adapter.info == info
    own, read = network.state_dict(), adapter.controlnet.state_dict()
    assert own.keys() == read.keys()
    assert all(torch.equal(own[key], read[key]) for key in own)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("rest", ["nothing", "in the middle", "everywhere"])
def test_a_small_controlnet_without_attention_is_run_as_diffusers_runs_it(
    load: Callable[[str], Base], family: str, rest: str, tmp_path: Any
) -> None:
    """As diffusers' own small ones for SDXL: attention has no layers. rest: where its norm and projections
    are (there, in the middle).
    """
    base = load(family)
    config = dict(controlnet_of(base).config)
    levels = len(config["block_out_channels"])
    if rest != "everywhere":
        config |= {"down_block_types": ("DownBlock2D",) * levels}
    if rest == "nothing":
        config |= {"mid_block_type": "UNetMidBlock2D", "transformer_layers_per_block": 1}
    else:
        config |= {"transformer_layers_per_block": (0,) * levels}
    torch.manual_seed(6)
    network = lock(tiny_models.randomize_zero_convs(ControlNetModel.from_config(config)))
    check_fits(network, base)
    inputs, added = given(base)
    with torch.no_grad():
        hint = kinds.encode_hint(network, cond(batch=2))
        ours = kinds.control_residuals(network, *inputs, hint, added_cond=added)
        theirs = network(*inputs, cond(batch=2), added_cond_kwargs=added, return_dict=False)
    expected = (*theirs[0], theirs[1])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours.tensors, expected, strict=True))
    info = AdapterInfo(map=MAPS["canny"], family=family)
    save_adapter(network, tmp_path / "small", info=info, dtype=torch.float32)
    save_file(network.state_dict(), tmp_path / "small.safetensors")  # which tells by its shapes alone
    own = network.state_dict()
    for name in ("small", "small.safetensors"):
        adapter = load_adapter(str(tmp_path / name), base=base)
        read = adapter.controlnet.state_dict()
        assert own.keys() == read.keys()
        assert all(torch.equal(own[key], read[key]) for key in own)
    (picture,) = generate(base, "x", controls=[Control(adapter, cond())], steps=2, height=SIZE, width=SIZE)
    assert picture.shape == (SIZE, SIZE, 3)

"""Weights, breaks and long prompts, in A1111's syntax."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from outcomes import Run
from sampling_peers import assert_same, cond, controlnet_of, our_latents, parts_of

from controlkit import sampling
from controlkit.base import Base
from controlkit.control import Control
from controlkit.images import read_png_text
from controlkit.prompt_syntax import check_syntax, notes, parse
from controlkit.prompts import COMMA_WITHIN, chunks_of, encode_weighted, tokens_of

LONG = "a red cube on a blue floor, " * 4  # the tiny tokenizer has a token for each letter


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [[]]),
        ("a red cube", [[("a red cube", 1.0)]]),
        ("a (red:1.3) cube", [[("a ", 1.0), ("red", 1.3), (" cube", 1.0)]]),
        ("(red: .5 )", [[("red", 0.5)]]),
        ("(red:-1)", [[("red", -1.0)]]),
        ("(red) [blue]", [[("red", 1.1), (" ", 1.0), ("blue", 1 / 1.1)]]),
        ("((red))", [[("red", 1.1 * 1.1)]]),
        ("((red:1.5) cube:2)", [[("red", 3.0), (" cube", 2.0)]]),
        ("(red:1) cube", [[("red cube", 1.0)]]),
        (r"a \(red\) \[b\] \\", [[("a (red) [b] \\", 1.0)]]),
        (r"(a \(b\):1.2)", [[("a (b)", 1.2)]]),
        ("(red", [[("red", 1.1)]]),
        ("a [b (c", [[("a ", 1.0), ("b ", 1 / 1.1), ("c", 1.1 / 1.1)]]),
        ("red) cube] :1.3) :)", [[("red) cube] :1.3) :)", 1.0)]]),
        ("(a:b:1.2) 10:30", [[("a:b", 1.2), (" 10:30", 1.0)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        (r"a\b \\c\\\(d \:e", [[(r"ab \c\(d :e", 1.0)]]),
        ("a\\", [[("a", 1.0)]]),
        ("a BREAK b", [[("a ", 1.0)], [(" b", 1.0)]]),
        ("(a BREAK b:1.2)BREAK", [[("a ", 1.2)], [(" b", 1.2)], []]),
        ("BREAKFAST", [[("BREAKFAST", 1.0)]]),
        ("()", [[]]),
        ("C++ <lora:x:1>\n", [[("C++ <lora:x:1>\n", 1.0)]]),
    ],
)
def test_what_a_prompt_says(prompt: str, parts: list[list[tuple[str, float]]]) -> None:
    found = parse(prompt)
    assert [[text for text, _ in part] for part in found] == [[text for text, _ in part] for part in parts]
    for part, expected in zip(found, parts, strict=True):
        assert [weight for _, weight in part] == pytest.approx([weight for _, weight in expected])


def test_weights_that_are_none() -> None:
    with pytest.raises(ValueError, match="a weight in a prompt must be from -100 to 100, not 101"):
        parse("(a:101)")
    with pytest.raises(ValueError, match="from -100 to 100, not inf"):
        parse("(" * 9000 + "a")
    with pytest.raises(ValueError, match=r"unknown prompt syntax 'a111' .did you mean 'a1111'"):
        check_syntax("a111")


def test_what_goes_unheard_is_said() -> None:
    assert notes("a (red:1.3) cube", "plain") == [
        "'(red:1.3)' is read as text: for weights, add --prompt-syntax a1111"
    ]
    assert not notes("a (red) cube", "plain")
    assert not notes("a (red:1.3) [cube] AN AND2", "a1111")
    assert len(notes("<lora:x:1> [a:b:0.5] [a|b] x AND y", "a1111")) == 4
    for syntax in ("plain", "a1111"):
        (of_lora,), (of_other,) = notes("<lora:x:1>", syntax), notes("<hypernet:x:1>", syntax)
        assert of_lora == "'<lora:x:1>' is read as text: a LoRA is given as --lora FILE:WEIGHT"
        assert of_other == "'<hypernet:x:1>' is read as text: it is not supported"


def test_chunks_end_at_commas(sd1: Base) -> None:
    tokenizer = sd1.tokenizers[0]
    comma = tokenizer.convert_tokens_to_ids(",</w>")

    def sizes(prompt: str) -> list[int]:
        return [chunk.read - 2 for chunk in chunks_of(parse(prompt), tokenizer, 77)]

    assert sizes("") == [0]
    assert sizes("x" * 75) == [75]
    assert sizes("x" * 80) == [75, 5]
    assert sizes("x" * 60 + "," + "y" * 20) == [61, 20]
    assert sizes("x" * 75 + "," + "y" * 20) == [75, 21], "a comma that is cut off itself stays where it is"
    assert sizes("x" * 60 + "," + "x" * 14 + "," + "y" * 20) == [75, 21], "nor does one before it count"
    assert sizes("x" * (74 - COMMA_WITHIN) + "," + "y" * 30) == [75, 10]
    assert sizes("x" * (75 - COMMA_WITHIN) + "," + "y" * 30) == [76 - COMMA_WITHIN, 30]
    assert sizes("x BREAK y BREAK") == [1, 1]
    assert sizes("BREAK y") == [0, 1]
    assert sizes("x BREAK BREAK " + "y" * 76) == [1, 0, 75, 1]
    (first, *_) = chunks_of(parse("(x,:2) y"), tokenizer, 77)
    assert first.ids[2] == comma
    assert first.weights[:5] == (1.0, 2.0, 2.0, 1.0, 1.0)
    assert len(first.ids) == len(first.weights) == 77


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("prompt", ["a red cube", "", "(a:1) \\(red\\) (cube:1.0)"])
def test_a_prompt_without_weights_is_the_plain_one(
    load: Callable[[str], Base], family: str, prompt: str
) -> None:
    base = load(family)
    plain = base.encode_prompts(["a (red) cube" if "(" in prompt else prompt])
    ours = encode_weighted(base, [prompt])
    assert torch.equal(ours.encoder_hidden_states, plain.encoder_hidden_states)
    assert (ours.pooled is None) == (plain.pooled is None)
    assert ours.pooled is None or torch.equal(ours.pooled, plain.pooled)  # type: ignore[arg-type]


def test_what_fills_up_is_each_tokenizers_own(load: Callable[[str], Base]) -> None:
    """As SDXL's second one, which fills up with "!"."""
    first, second = load("sdxl").tokenizers
    filling = copy.deepcopy(second)
    filling.pad_token = "!"
    base = replace(load("sdxl"), tokenizers=[first, filling])
    plain, ours = base.encode_prompts(["a cube"]), encode_weighted(base, ["a cube"])
    assert torch.equal(ours.encoder_hidden_states, plain.encoder_hidden_states)
    assert not torch.equal(plain.encoder_hidden_states, load("sdxl").encode_prompts(["a cube"])[0])
    assert tokens_of(base, ["a cube"]) == 77
    assert (
        tokens_of(base, ["a cube", LONG]) == encode_weighted(base, [LONG]).encoder_hidden_states.shape[1] > 77
    )


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_weight_changes_its_words_and_keeps_the_mean(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    # A trained encoder's vectors have a mean; a random one's are given one.
    modules = [pair for encoder in base.text_encoders for pair in encoder.named_modules()]
    biased = [module.bias for name, module in modules if name.endswith("final_layer_norm")]
    saved = [bias.clone() for bias in biased]
    try:
        for bias in biased:
            bias.data.add_(0.2)
        plain = base.encode_prompts(["xyz abc"]).encoder_hidden_states
        (weighed,) = encode_weighted(base, ["xyz (abc:1.5)"]).encoder_hidden_states
    finally:
        for bias, before in zip(biased, saved, strict=True):
            bias.data.copy_(before)
    width = 32
    for part in range(weighed.shape[-1] // width):
        before = plain[0, :, part * width : (part + 1) * width]
        after = weighed[:, part * width : (part + 1) * width]
        factors = (after / before).median(dim=1).values
        assert torch.allclose(factors[4:7] / factors[0], torch.tensor(1.5), rtol=1e-3)
        assert torch.allclose(factors[7:] / factors[0], torch.tensor(1.0), rtol=1e-3)
        told = before.mean().abs() > 1e-3 * before.abs().mean()
        if told:
            assert torch.allclose(after.mean(), before.mean(), rtol=1e-3)
        else:
            assert torch.allclose(factors[0], torch.tensor(1.0), rtol=1e-4)
    assert family == "sdxl" or told, "the mean is restored where there is one"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_long_prompts_are_read_to_the_end(load: Callable[[str], Base], family: str) -> None:
    base = load(family)
    width = base.unet.config.cross_attention_dim
    text = sampling.encode_text(base, LONG, "ugly", guidance=5.0, syntax="a1111")
    assert text.encoder_hidden_states.shape == (2, 154, width)
    empty = base.encode_prompts(["", "ugly"])
    assert torch.equal(text.encoder_hidden_states[0, 77:], empty.encoder_hidden_states[0])
    assert torch.equal(text.encoder_hidden_states[0, :77], empty.encoder_hidden_states[1])
    other = sampling.encode_text(base, LONG + "z", "ugly", guidance=5.0, syntax="a1111")
    assert not torch.equal(text.encoder_hidden_states[1], other.encoder_hidden_states[1])
    assert torch.equal(text.encoder_hidden_states[1, :77], other.encoder_hidden_states[1, :77])
    if text.pooled is not None:
        assert other.pooled is not None
        assert torch.equal(text.pooled, other.pooled), "of the first chunk"
    assert encode_weighted(base, ["y" * 10_000]).encoder_hidden_states.shape[1] == 77 * 134


def test_an_absent_negative_prompt_of_sdxl_is_zeros_at_any_length(load: Callable[[str], Base]) -> None:
    text = sampling.encode_text(load("sdxl"), LONG, None, guidance=5.0, syntax="a1111")
    assert not text.encoder_hidden_states[0].any()
    assert text.encoder_hidden_states[1].any()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_diffusers_pipeline_makes_the_same_of_these_vectors(load: Callable[[str], Base], family: str) -> None:
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    base = load(family)
    prompt, negative = f"a (red:1.4) cube, {LONG}", "[blue]"
    control = Control(controlnet_of(base), cond())
    ours = our_latents(
        base,
        [control],
        seed=1,
        steps=3,
        scheduler="ddim",
        prompt=prompt,
        negative_prompt=negative,
        syntax="a1111",
    )
    text = sampling.encode_text(base, prompt, negative, guidance=5.0, syntax="a1111")
    told: dict[str, Any] = dict(
        zip(("negative_prompt_embeds", "prompt_embeds"), text.encoder_hidden_states.chunk(2), strict=True)
    )
    parts = parts_of(base, [control], "ddim")
    if text.pooled is not None:
        pooled = text.pooled.chunk(2)
        told |= zip(("negative_pooled_prompt_embeds", "pooled_prompt_embeds"), pooled, strict=True)
        pipeline = StableDiffusionXLControlNetPipeline(**parts, add_watermarker=False)
    else:
        pipeline = StableDiffusionControlNetPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        image=[control.controlnet_cond],
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        return_dict=False,
        **told,
    )[0]
    assert_same(ours, theirs)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_an_earlier_layer_reads_both_prompts(load: Callable[[str], Base], family: str, syntax: str) -> None:
    """Beside the layers' own outputs, caught as they compute."""
    base, outputs = load(family), []
    skip, layer = {"sd1": (2, 1), "sd2": (3, 1), "sdxl": (3, 0)}[family]  # SD2's file lacks the last layer
    hooks = []
    for encoder in base.text_encoders:
        (module,) = (m for name, m in encoder.named_modules() if name.endswith(f"encoder.layers.{layer}"))
        hooks.append(module.register_forward_hook(lambda module, args, out: outputs.append(out)))
    text = sampling.encode_text(
        replace(base, clip_skip=skip), "a red cube", "grey", guidance=5.0, syntax=syntax
    )
    for hook in hooks:
        hook.remove()
    count = len(base.text_encoders)
    rows = [outputs[k : k + count] for k in range(0, len(outputs), count)]
    if family != "sdxl":
        (norm,) = (m for n, m in base.text_encoders[0].named_modules() if n.endswith("final_layer_norm"))
        rows = [[norm(part) for part in row] for row in rows]
    expected = torch.cat([torch.cat(row, dim=-1) for row in rows])
    assert torch.equal(text.encoder_hidden_states, expected)
    usual = sampling.encode_text(base, "a red cube", "grey", guidance=5.0, syntax=syntax)
    assert not torch.allclose(usual.encoder_hidden_states, expected, atol=1e-2)
    if usual.pooled is not None:
        assert torch.equal(usual.pooled, text.pooled)
    if family != "sd1":
        read_anyway = sampling.encode_text(
            replace(base, clip_skip=2), "a red cube", "grey", guidance=5.0, syntax=syntax
        )
        assert torch.equal(read_anyway.encoder_hidden_states, usual.encoder_hidden_states)
    with pytest.raises(ValueError, match=r"clip_skip 5 leaves no layer of the base's text encoder \(3\)"):
        sampling.encode_text(replace(base, clip_skip=5), "x", None, guidance=5.0)


def test_latents_with_clip_skip_equal_the_sdxl_pipeline(load: Callable[[str], Base]) -> None:
    """Of one branch: diffusers, which counts otherwise, skips nothing for the negative prompt."""
    base = load("sdxl")
    parts = {key: part for key, part in parts_of(base, [], "ddim").items() if key != "controlnet"}
    told = {"do_classifier_free_guidance": False, "clip_skip": 1}
    theirs, _, pooled, _ = StableDiffusionXLPipeline(**parts).encode_prompt("a red cube", **told)
    ours = sampling.encode_text(replace(base, clip_skip=3), "a red cube", None, guidance=1.0)
    assert torch.equal(ours.encoder_hidden_states, theirs)
    assert torch.equal(ours.pooled, pooled)


def test_the_syntax_is_recorded_and_repeated(run: Run, models: Path) -> None:
    fixed = ["--base", models / "sd1", "--steps", 2, "--width", 64, "--height", 64]
    prompt = f"a (red:1.4) cube, {LONG}"
    run("generate", prompt, *fixed, "--prompt-syntax", "a1111", "-o", "out.png").done()
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    assert "Emphasis" not in read_png_text("out.png")["parameters"]
    outcome = run("generate", "a (red:1.4) cube", *fixed, "-o", "plain.png")
    outcome.done()
    assert "note: '(red:1.4)' is read as text" in outcome.err
    assert "Emphasis: None" in read_png_text("plain.png")["parameters"]
    assert "unknown prompt syntax 'a111'" in run("generate", "x", "--prompt-syntax", "a111").refused()
    assert "a weight in a prompt" in run("generate", "(x:999)", "--prompt-syntax", "a1111").refused()

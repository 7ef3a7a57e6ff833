"""Textual inversion: in every layout of its files, against diffusers' pipelines."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outcomes import Run
from safetensors.torch import save_file
from sampling_peers import assert_same, cond, controlnet_of, our_latents, their_latents
from torch import Tensor

from controlkit.base import Base, load_base
from controlkit.control import Control
from controlkit.embeddings import Embedding, with_embeddings
from controlkit.files import sha256_file
from controlkit.images import load_picture, read_png_text
from controlkit.prompt_syntax import parse
from controlkit.prompts import chunks_of, encode_weighted
from controlkit.words import saved_by_diffusers, with_all_vectors

WORD = "<styl>"


def vectors(count: int, seed: int = 0, width: int = 32) -> Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(seed))


def a1111(rows: Tensor) -> dict[str, Any]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "x", "step": 7}


def copied(base: Base) -> Base:
    """The same base, in parts that may be changed."""
    return replace(
        base,
        text_encoders=[copy.deepcopy(encoder) for encoder in base.text_encoders],
        tokenizers=[copy.deepcopy(tokenizer) for tokenizer in base.tokenizers],
    )


@pytest.mark.parametrize(("family", "count"), [("sd1", 1), ("sd1", 3), ("sdxl", 2)])
def test_pictures_with_a_word_equal_the_pipelines(
    load: Callable[[str], Base], tmp_path: Path, family: str, count: int
) -> None:
    base, before = load(family), load(family).digest()
    rows = [vectors(count, seed) for seed in range(len(base.text_encoders))]
    state = {"clip_l": rows[0], "clip_g": rows[-1]} if family == "sdxl" else {WORD: rows[0]}
    save_file(state, tmp_path / "word.safetensors")

    def told(pipeline: Any) -> None:
        for index, part in enumerate(rows):
            end = "_2" if index else ""
            taught = {"tokenizer": getattr(pipeline, f"tokenizer{end}")}
            taught["text_encoder"] = getattr(pipeline, f"text_encoder{end}")
            pipeline.load_textual_inversion({WORD: part}, token=WORD, **taught)

    controls = [Control(controlnet_of(base), cond())]
    request: dict[str, Any] = {"seed": 7, "steps": 2, "scheduler": "ddim", "prompt": f"a {WORD} cube"}
    ours = our_latents(
        with_embeddings(base, [Embedding(str(tmp_path / "word.safetensors"), WORD)]), controls, **request
    )
    assert_same(ours, their_latents(copied(base), controls, **request, prepare=told))
    assert (ours - our_latents(base, controls, **request)).abs().max() > 1e-3
    assert base.digest() == before
    assert WORD not in base.tokenizers[0].get_vocab()


def test_every_layout_means_the_same(sd1: Base, tmp_path: Path) -> None:
    rows = vectors(2)
    save_file({WORD: rows}, tmp_path / "one.safetensors")
    save_file({"emb_params": rows}, tmp_path / "two.safetensors")
    torch.save({WORD: rows}, tmp_path / "three.bin")
    torch.save(a1111(rows), tmp_path / "four.pt")
    words = {"one.safetensors": WORD, "two.safetensors": "two", "three.bin": WORD, "four.pt": "four"}
    said = []
    for name, word in words.items():
        known = with_embeddings(sd1, [Embedding(str(tmp_path / name))])
        said.append(known.encode_prompts([f"a {word} cube"]).encoder_hidden_states)
    assert all(torch.equal(said[0], other) for other in said)
    assert not torch.equal(said[0], sd1.encode_prompts([f"a {WORD} cube"]).encoder_hidden_states)


def test_a_word_of_several_vectors_is_all_of_them_in_a_weighted_prompt(sd1: Base, tmp_path: Path) -> None:
    save_file({WORD: vectors(3)}, tmp_path / "word.safetensors")
    known = with_embeddings(sd1, [Embedding(str(tmp_path / "word.safetensors"))])
    prompts = [f"a {WORD} cube"]
    plain, weighted = known.encode_prompts(prompts), encode_weighted(known, prompts)
    assert torch.equal(plain.encoder_hidden_states, weighted.encoder_hidden_states)


def test_several_words(sd1: Base, tmp_path: Path) -> None:
    files = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    for seed, file in enumerate(files):
        save_file({"emb_params": vectors(1, seed)}, file)
    known = with_embeddings(sd1, [Embedding(str(file)) for file in files])
    one = with_embeddings(sd1, [Embedding(str(files[1]))])
    said = known.encode_prompts(["a second"]).encoder_hidden_states
    assert torch.equal(said, one.encode_prompts(["a second"]).encoder_hidden_states)


def taught(base: Base, folder: Path, **words: Tensor) -> Base:
    for index, (word, rows) in enumerate(words.items()):
        save_file({"emb_params": rows}, folder / f"{index}.safetensors")
        base = with_embeddings(base, [Embedding(str(folder / f"{index}.safetensors"), word)])
    return base


@pytest.mark.parametrize(("word", "spelled"), [("Styl", "Styl"), ("Styl", "styl"), ("styl", "STYL")])
def test_a_word_is_all_of_its_vectors_in_any_case(sd1: Base, tmp_path: Path, word: str, spelled: str) -> None:
    known, plain = (taught(sd1, tmp_path, **{name: vectors(3)}) for name in (word, "styl"))
    for encode in (Base.encode_prompts, encode_weighted):
        expected = encode(plain, ["a styl cube"]).encoder_hidden_states
        assert torch.equal(encode(known, [f"a {spelled} cube"]).encoder_hidden_states, expected)


def test_words_within_words_are_each_their_own(sd1: Base, tmp_path: Path) -> None:
    rows = [vectors(2, seed) for seed in range(3)]
    known = taught(sd1, tmp_path, **dict(zip(("bad", "bad_1", "badhand"), rows, strict=True)))
    plain = taught(sd1, tmp_path, **dict(zip(("qq", "ww", "zz"), rows, strict=True)))
    for prompt, meant in (("bad, badhand", "qq, zz"), ("badhand bad_1 bad", "zz ww qq")):
        said = known.encode_prompts([prompt]).encoder_hidden_states
        assert torch.equal(said, plain.encode_prompts([meant]).encoder_hidden_states)


@pytest.mark.parametrize("order", [("styl", "styl_1"), ("styl_1", "styl")])
def test_a_word_is_no_vector_of_another(sd1: Base, tmp_path: Path, order: tuple[str, str]) -> None:
    rows = {"styl": vectors(1, 0), "styl_1": vectors(1, 1)}
    known = taught(sd1, tmp_path, **{word: rows[word] for word in order})
    for word in order:
        said = known.encode_prompts([f"a {word}"]).encoder_hidden_states
        alone = taught(sd1, tmp_path, qq=rows[word]).encode_prompts(["a qq"]).encoder_hidden_states
        assert torch.equal(said, alone)


def test_words_that_differ_in_case_are_the_same(sd1: Base, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows the word 'STYL' already, as 'styl'; give it another"):
        taught(sd1, tmp_path, styl=vectors(1), STYL=vectors(1))


def test_words_that_diffusers_saved_in_a_base_are_all_of_their_vectors(
    sd1: Base, models: Path, tmp_path: Path
) -> None:
    rows = vectors(2)
    there = copied(sd1)
    (tokenizer,), (encoder,) = there.tokenizers, there.text_encoders
    tokenizer.add_tokens([WORD, f"{WORD}_1"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.get_input_embeddings().weight.data[-2:] = rows
    shutil.copytree(models / "sd1", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base" / "tokenizer")
    encoder.save_pretrained(tmp_path / "base" / "text_encoder")
    said = load_base(str(tmp_path / "base")).encode_prompts([f"a {WORD} cube"]).encoder_hidden_states
    ours = taught(sd1, tmp_path, **{WORD: rows}).encode_prompts([f"a {WORD} cube"]).encoder_hidden_states
    assert torch.equal(said, ours)


def test_a_word_goes_to_the_next_chunk_as_a_whole(sd1: Base, tmp_path: Path) -> None:
    known = taught(sd1, tmp_path, six=vectors(6), long=vectors(80))
    tokenizer = known.tokenizers[0]

    def sizes(prompt: str) -> list[int]:
        return [chunk.read - 2 for chunk in chunks_of(parse(prompt), tokenizer, 77, known.words)]

    assert sizes("x" * 69 + " six") == [75]
    assert sizes("x" * 72 + " six y") == [72, 7]
    assert sizes("x" * 60 + "," + "x" * 11 + " six") == [72, 6], "a chunk that is not full ends at no comma"
    assert sizes("x" * 60 + "," + "x" * 14 + " six") == [61, 20]
    assert sizes("xx BREAK " + "x" * 72 + " six") == [2, 72, 6]
    assert sizes("x long y") == [1, 75, 6], "what fits in no chunk is cut"
    *_, last = chunks_of(parse("x" * 72 + " (six:1.5) y"), tokenizer, 77, known.words)
    assert last.weights[:9] == (1.0, *6 * [1.5], 1.0, 1.0)


def test_the_end_is_found_behind_a_new_word_under_an_old_configuration(
    load: Callable[[str], Base], tmp_path: Path
) -> None:
    save_file({"clip_l": vectors(1), "clip_g": vectors(1)}, tmp_path / "word.safetensors")
    old = copied(load("sdxl"))
    old.text_encoders[1].text_model.eos_token_id = 2  # as SDXL's own file says: the largest id is the end
    pooled = []
    for base in (load("sdxl"), old):
        known = with_embeddings(base, [Embedding(str(tmp_path / "word.safetensors"))])
        pooled.append(known.encode_prompts(["a word"]).pooled)
    assert torch.equal(pooled[0], pooled[1])
    assert old.text_encoders[1].text_model.eos_token_id == 2


def test_two_files_of_one_word_are_those_of_both_encoders(
    load: Callable[[str], Base], tmp_path: Path
) -> None:
    base, rows = load("sdxl"), [vectors(2, 0), vectors(2, 1)]
    files = [tmp_path / "learned_embeds.safetensors", tmp_path / "learned_embeds_2.safetensors"]
    for file, part in zip(files, rows, strict=True):
        save_file({WORD: part}, file)
    save_file({"clip_l": rows[0], "clip_g": rows[1]}, tmp_path / "both.safetensors")
    said = [
        with_embeddings(base, words).encode_prompts([f"a {WORD} cube"])
        for words in (
            [Embedding(str(tmp_path / "both.safetensors"), WORD)],
            [Embedding(str(file)) for file in files],
        )
    ]
    assert torch.equal(said[0].encoder_hidden_states, said[1].encoder_hidden_states)
    assert said[0].pooled is not None
    assert said[1].pooled is not None
    assert torch.equal(said[0].pooled, said[1].pooled)
    with pytest.raises(
        ValueError, match=r"the same word, as --embedding WORD=learned_embeds\.safetensors --emb"
    ):
        with_embeddings(base, [Embedding(str(files[0]))])
    save_file({WORD: rows[1][:1]}, files[1])
    with pytest.raises(ValueError, match=r"_2.safetensors: damaged, for the text encoders get different"):
        with_embeddings(base, [Embedding(str(file)) for file in files])


def test_a_word_that_one_tokenizer_knows_is_none_to_the_other(load: Callable[[str], Base]) -> None:
    """As in an SDXL folder of which one text encoder was taught: an unknown word's id is the end's."""
    one, other = load("sdxl").tokenizers
    one = copy.deepcopy(one)
    one.add_tokens([WORD, f"{WORD}_1"])
    ids = other("a cube").input_ids
    words = saved_by_diffusers(one)
    assert list(words) == [WORD]
    assert with_all_vectors(ids, words, other) == [(token,) for token in ids]
    (*_, read, _) = with_all_vectors(one(f"a {WORD}").input_ids, words, one)
    assert read == tuple(one.convert_tokens_to_ids([WORD, f"{WORD}_1"]))


def test_two_files_of_one_word_go_where_they_fit(load: Callable[[str], Base], tmp_path: Path) -> None:
    base = copied(load("sdxl"))
    base.text_encoders[1].set_input_embeddings(torch.nn.Embedding(len(base.tokenizers[1]), 48))
    rows = [vectors(1), vectors(1, width=48)]
    for index, part in enumerate(rows):
        save_file({WORD: part}, tmp_path / f"{index}.safetensors")
    for order in ((0, 1), (1, 0)):
        known = with_embeddings(base, [Embedding(str(tmp_path / f"{index}.safetensors")) for index in order])
        for encoder, part in zip(known.text_encoders, rows, strict=True):
            assert torch.equal(encoder.get_input_embeddings().weight[-1:], part)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({WORD: vectors(1, width=48)}, "whose words are 48 wide; those of the SD1 base"),
        ({"clip_l": vectors(1), "clip_g": vectors(1)}, "has vectors for 2 text encoder(s), and the SD1 base"),
        ({WORD: vectors(1) * float("inf")}, "no finite vectors"),
        ({"a": vectors(1), "b": vectors(1)}, "is no embedding: it holds a, b"),
        (
            {"<s0>": vectors(1), "<s1>": vectors(1)},
            "holds <s0>, <s1>; of several words, save each to a file of its own",
        ),
        ({"a</w>": vectors(1)}, "the base knows the word 'a</w>' already"),
    ],
)
def test_what_is_no_word_for_this_base(
    sd1: Base, tmp_path: Path, state: dict[str, Tensor], message: str
) -> None:
    save_file({key: rows.clone() for key, rows in state.items()}, tmp_path / "word.safetensors")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        with_embeddings(sd1, [Embedding(str(tmp_path / "word.safetensors"))])
    assert message in str(caught.value)


def test_files_that_cannot_be_read(sd1: Base, tmp_path: Path) -> None:
    torch.save({"x": Path("x")}, tmp_path / "code.pt")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "code.pt").read_bytes()[:60])
    save_file({WORD: vectors(1)}, tmp_path / "whole.safetensors")
    save_file({WORD: torch.tensor(1.0)}, tmp_path / "number.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-4])
    for name, message in (
        ("code.pt", r"holds more than tensors \(pathlib\S*\.PosixPath\), which is refused"),
        ("cut.bin", "is cut short: fetch it again"),
        ("cut.safetensors", "is cut short"),
        ("nowhere.pt", "there is no embedding"),
        ("number.safetensors", "number.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            with_embeddings(sd1, [Embedding(str(tmp_path / name))])


def test_words_on_the_command_line(generate: Run, run: Run) -> None:
    save_file({"emb_params": vectors(2)}, "styl.safetensors")
    generate("-o", "plain.png").done()
    outcome = generate("--embedding", "cube=styl.safetensors", "-o", "out.png")
    outcome.done()
    assert "has no effect: no prompt says it" not in outcome.err
    (told,) = json.loads(read_png_text("out.png")["controlkit"])["embeddings"]
    assert told == {"file": "styl.safetensors", "token": "cube", "sha256": sha256_file("styl.safetensors")}
    assert not np.array_equal(load_picture("out.png"), load_picture("plain.png"))
    run("generate", "--like", "out.png", "-o", "again.png").done()
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    assert "there is no embedding nowhere.pt" in generate("--embedding", "nowhere.pt").refused()
    save_file({"emb_params": vectors(1)}, "styl.safetensors")
    changed = run("generate", "--like", "out.png").refused()
    assert changed.endswith(
        "which has changed since; to use it as it is now, add --embedding cube=styl.safetensors"
    )


@pytest.mark.filterwarnings("default")  # the command shows them as notes
def test_a_word_that_no_prompt_says_is_noted(generate: Run) -> None:
    save_file({"emb_params": vectors(1)}, "Styl.safetensors")
    outcome = generate("--embedding", "Styl.safetensors", "-o", "out.png")
    outcome.done()
    assert outcome.err.count("note: the word 'Styl' has no effect: no prompt says it") == 1
    outcome = generate("--embedding", "Styl.safetensors", "--negative", "a styl", "-o", "out.png")
    assert "the word 'Styl'" not in outcome.err

"""Textual inversion: new words of a base's language, learned as vectors (Gal et al. 2022, arXiv:2208.01618).

A file holds one or more vectors for a word. A copy of the base gets a token for each in its tokenizer
(`words`), and the vectors in its text encoder; a prompt that says the word, in any case, says all of them.
The base that was given stays as it is. The result equals that of diffusers' `load_textual_inversion`
(tests/test_embeddings.py).
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit.base import FAMILY_TITLES, check_base_given
from controlkit.files import as_text
from controlkit.folders import read_state
from controlkit.loras import shallow_copy
from controlkit.naming import check_list_of
from controlkit.words import known_as, tokens_for

if TYPE_CHECKING:
    from controlkit.base import Base

_ENCODERS = ("clip_l", "clip_g")  # the keys of SDXL's files, in the order of its text encoders


@dataclass(frozen=True)
class Embedding:
    """A word to add to a base.

    file: diffusers' ``{word: vectors}``, A1111's ``string_to_param`` or ``emb_params``, or for SDXL
    ``clip_l`` and ``clip_g``, as .safetensors or as a pickle (.bin, .pt) that holds tensors and nothing else.
    token: how prompts say it; "" is the file's own word, or the file's name where it has none.

    For SDXL also two files with the same word, each with the vectors of one text encoder, as diffusers'
    training writes them.
    """

    file: str | os.PathLike[str]
    token: str = ""


@dataclass(frozen=True, eq=False)
class _Word:
    """A word, and for each text encoder its vectors and the file that they are from."""

    token: str
    parts: tuple[tuple[Path, Tensor], ...]


def with_embeddings(base: Base, embeddings: Sequence[Embedding]) -> Base:
    """A base that knows more words. The given base is not changed.

    Raises ValueError, naming the file, for one that is missing, damaged or no embedding, was made for another
    family (the sizes are named), or whose word the base knows already, in whatever case.
    """
    check_base_given(base)
    check_list_of("embeddings", embeddings, Embedding, 'Embedding("file.safetensors")')
    for word in _words(embeddings, len(base.text_encoders)):
        vectors = _fitting(word, base)
        tokenizers = [copy.deepcopy(tokenizer) for tokenizer in base.tokenizers]
        encoders = [shallow_copy(encoder) for encoder in base.text_encoders]
        tokens = tokens_for(word.token, len(vectors[0]))
        for tokenizer, encoder, rows in zip(tokenizers, encoders, vectors, strict=True):
            _add(word.parts[-1][0], tokens, tokenizer, encoder, rows)
        known = {**base.words, word.token: tokens}
        base = replace(base, tokenizers=tokenizers, text_encoders=encoders, words=known)
    return base


def _add(file: Path, tokens: Sequence[str], tokenizer: Any, encoder: Any, vectors: Tensor) -> None:
    """Teach a word of n tokens and vectors (n, D) to a tokenizer and a text encoder, which are changed."""
    from tokenizers import AddedToken

    before = known_as(tokens[0], tokenizer)
    if before is not None:
        spelled = "" if before == tokens[0] else f", as {before!r}"
        raise ValueError(
            f"{file}: the base knows the word {tokens[0]!r} already{spelled}; give it another, as WORD=FILE"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in tokens])  # in any case
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    module = encoder.get_input_embeddings()
    known = module.weight
    table = known.new_zeros((max(len(known), *(i + 1 for i in ids)), known.shape[1]))
    table[: len(known)] = known
    table[ids] = vectors.to(known.device, known.dtype)
    module.weight = nn.Parameter(table, requires_grad=False)
    module.num_embeddings = len(table)
    _find_the_end_by_its_id(encoder, tokenizer)


def _find_the_end_by_its_id(encoder: Any, tokenizer: Any) -> None:
    """Old configurations say that the end token is 2, and mean the largest id, which is a new word's now."""
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


def _words(embeddings: Sequence[Embedding], encoders: int) -> list[_Word]:
    """The words of files; files with the same word are one as long as there are text encoders for them."""
    words: list[_Word] = []
    for embedding in embeddings:
        file = Path(as_text("an embedding", embedding.file)).expanduser()
        own, parts = _parts(file, read_state(file, what="embedding"))
        new = _Word(embedding.token or own or file.stem, tuple((file, part) for part in parts))
        for k, word in enumerate(words):
            if word.token == new.token and len(word.parts) + len(new.parts) <= encoders:
                words[k] = _Word(word.token, (*word.parts, *new.parts))
                break
        else:
            words.append(new)
    return words


def _fitting(word: _Word, base: Base) -> list[Tensor]:
    """The vectors (n, D) for each text encoder. Raises ValueError as `with_embeddings`."""
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in base.text_encoders]
    _check_count(word, base)
    parts = word.parts
    found = [part.shape[-1] if part.ndim else 0 for _, part in parts]
    if widths != found == widths[::-1]:  # the second one's file was first
        parts = parts[::-1]
    vectors = [_checked(*part, width, base) for part, width in zip(parts, widths, strict=True)]
    if len({len(rows) for rows in vectors}) != 1:
        files = " and ".join(map(str, dict.fromkeys(file for file, _ in parts)))
        raise ValueError(f"{files}: damaged, for the text encoders get different numbers of vectors")
    return vectors


def _check_count(word: _Word, base: Base) -> None:
    """Raise ValueError unless each text encoder gets vectors."""
    count, encoders = len(word.parts), len(base.text_encoders)
    if count == encoders:
        return
    other = ""
    if count < encoders:
        names = ("learned_embeds.safetensors", "learned_embeds_2.safetensors")
        other = "; give two files with the same word, as " + " ".join(f"--embedding WORD={n}" for n in names)
    raise ValueError(
        f"{word.parts[0][0]} has vectors for {count} text encoder(s), and the"
        f" {FAMILY_TITLES[base.family]} base {base.name} has {encoders}{other}"
    )


def _checked(file: Path, part: Tensor, width: int, base: Base) -> Tensor:
    """Vectors (n, D) of a text encoder whose words are `width` wide."""
    rows = part[None] if part.ndim == 1 else part
    if rows.ndim != 2 or len(rows) == 0 or not torch.isfinite(rows).all():
        raise ValueError(f"{file} is damaged: {tuple(part.shape)} are no finite vectors")
    if rows.shape[1] != width:
        raise ValueError(
            f"{file} was made for a base whose words are {rows.shape[1]} wide; those of the"
            f" {FAMILY_TITLES[base.family]} base {base.name} are {width} wide"
        )
    return rows


def _parts(file: Path, state: Mapping[str, Any]) -> tuple[str, list[Tensor]]:
    """The file's own word, "" where it has none, and the vectors of each text encoder."""
    own, parts = "", list(state.values())
    if "string_to_param" in state:
        by_mark = state["string_to_param"]
        parts = list(by_mark.values()) if isinstance(by_mark, Mapping) else []
    elif set(state) == set(_ENCODERS):
        parts = [state[name] for name in _ENCODERS]
    elif len(state) == 1 and "emb_params" not in state:
        own = str(next(iter(state)))
    sized = len(parts) == (2 if set(state) == set(_ENCODERS) else 1)
    if not sized or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        held = ", ".join(map(str, list(state)[:3])) or "nothing"
        as_diffusers_does = (re.fullmatch(r"<\S+>", str(key)) for key in state)
        marked = len(state) > 1 and all(as_diffusers_does)
        cure = "; of several words, save each to a file of its own" if marked else ""
        raise ValueError(f"{file} is no embedding: it holds {held}{cure}")
    return own, parts

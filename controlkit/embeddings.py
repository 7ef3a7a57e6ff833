"""Textual inversion: new words of a base's language, learned as vectors (Gal et al. 2022, arXiv:2208.01618).

A file holds one or more vectors for a word. A copy of the base gets a token for each in its tokenizer
(`words`), and the vectors in its text encoder; a prompt that says the word, in any case, says all of them.
The base that was given stays as it is. The result equals that of diffusers' `load_textual_inversion`
(tests/test_embeddings.py).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from controlkit.base import FAMILY_TITLES
from controlkit.folders import read_state
from controlkit.loras import shallow_copy
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
    """

    file: str
    token: str = ""


def with_embeddings(base: Base, embeddings: Sequence[Embedding]) -> Base:
    """A base that knows more words. The given base is not changed.

    Raises ValueError, naming the file, for one that is missing, damaged or no embedding, was made for another
    family (the sizes are named), or whose word the base knows already, in whatever case.
    """
    for embedding in embeddings:
        token, vectors = _read(embedding, base)
        tokenizers = [copy.deepcopy(tokenizer) for tokenizer in base.tokenizers]
        encoders = [shallow_copy(encoder) for encoder in base.text_encoders]
        tokens = tokens_for(token, len(vectors[0]))
        for tokenizer, encoder, rows in zip(tokenizers, encoders, vectors, strict=True):
            _add(embedding.file, tokens, tokenizer, encoder, rows)
        known = {**base.words, token: tokens}
        base = replace(base, tokenizers=tokenizers, text_encoders=encoders, words=known)
    return base


def _add(file: str, tokens: Sequence[str], tokenizer: Any, encoder: Any, vectors: Tensor) -> None:
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


def _read(embedding: Embedding, base: Base) -> tuple[str, list[Tensor]]:
    """The word and the vectors (n, D) for each text encoder. Raises ValueError as `with_embeddings`."""
    file = Path(embedding.file).expanduser()
    own, parts = _parts(file, read_state(file, what="embedding"))
    if len(parts) != len(base.text_encoders):
        raise ValueError(
            f"{file} has vectors for {len(parts)} text encoder(s), and the {FAMILY_TITLES[base.family]} base"
            f" {base.name} has {len(base.text_encoders)}"
        )
    vectors = []
    for part, encoder in zip(parts, base.text_encoders, strict=True):
        rows = part[None] if part.ndim == 1 else part
        width = encoder.get_input_embeddings().weight.shape[1]
        if rows.ndim != 2 or len(rows) == 0 or not torch.isfinite(rows).all():
            raise ValueError(f"{file} is damaged: {tuple(part.shape)} are no finite vectors")
        if rows.shape[1] != width:
            raise ValueError(
                f"{file} was made for a base whose words are {rows.shape[1]} wide; those of the"
                f" {FAMILY_TITLES[base.family]} base {base.name} are {width} wide"
            )
        vectors.append(rows)
    if len({len(rows) for rows in vectors}) != 1:
        raise ValueError(f"{file} is damaged: its text encoders get different numbers of vectors")
    return embedding.token or own or file.stem, vectors


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
        raise ValueError(f"{file} is no embedding: it holds {held}")
    return own, parts

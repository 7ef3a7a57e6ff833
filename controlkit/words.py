"""Learned words (`embeddings.py`) in prompts: each stands for all of its vectors.

A tokenizer has a token for each vector. The first one's is the word, which prompts say in any case, as with
every other word; the longest one that fits is read. No prompt says the others: their names hold a letter of
Unicode's private use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Words = Mapping[str, tuple[str, ...]]
"""Of each word, its vectors' tokens; the first is the word."""

_PRIVATE = "\ue000"


def tokens_for(word: str, count: int) -> tuple[str, ...]:
    """The tokens of a new word of `count` vectors."""
    return (word, *(f"{word}{_PRIVATE}{index}" for index in range(1, count)))


def saved_by_diffusers(tokenizer: CLIPTokenizer) -> dict[str, tuple[str, ...]]:
    """The words of several vectors in a tokenizer that diffusers taught: ``word``, ``word_1`` ..."""
    added, found = tokenizer.added_tokens_encoder, {}
    for word in added:
        tokens = [word]
        while f"{word}_{len(tokens)}" in added:
            tokens.append(f"{word}_{len(tokens)}")
        if len(tokens) > 1:
            found[word] = tuple(tokens)
    return found


def known_as(word: str, tokenizer: CLIPTokenizer) -> str | None:
    """The token that a prompt with this word would say already; None if there is none."""
    if word in tokenizer.get_vocab():
        return word
    read = _as_read(word, tokenizer)
    return next(
        (token for token in tokenizer.added_tokens_encoder if _as_read(token, tokenizer) == read), None
    )


def with_all_vectors(ids: Iterable[int], words: Words, tokenizer: CLIPTokenizer) -> list[tuple[int, ...]]:
    """Token ids as a tokenizer reads a prompt, each alone, but those of a learned word's vectors together.

    Words that the tokenizer was not taught (one of an SDXL's two may know them alone) are passed over.
    """
    added = tokenizer.added_tokens_encoder
    vectors = {
        tokenizer.convert_tokens_to_ids(word): tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
        for word, tokens in words.items()
        if all(token in added for token in tokens)
    }
    return [vectors.get(one, (one,)) for one in ids]


def _as_read(text: str, tokenizer: CLIPTokenizer) -> str:
    """Text as the tokenizer compares it: in lower case, accents and spaces made one."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    return text if normalizer is None else str(normalizer.normalize_str(text))

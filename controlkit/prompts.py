"""Prompts with weights and of any length, as the U-Net takes them.

As in A1111 (`prompt_syntax` has the letters): a prompt is cut into chunks of 75 tokens, each is encoded
between its own start and end, and the results are laid one behind the other. A chunk's vectors are multiplied
by their words' weights, then by one factor that gives the chunk its old mean again (its "Original" emphasis).
Where a chunk is full, what stands behind a comma among its last 20 tokens goes to the next one; so does a
learned word of several vectors that has no room left for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from controlkit.base import Base, Conditioning
from controlkit.prompt_syntax import Words, parse
from controlkit.words import Words as Learned
from controlkit.words import with_all_vectors

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

COMMA_WITHIN = 20  # tokens at a chunk's end among which a comma is looked for
_NO_MEAN = 1e-3  # of the mean size: a smaller mean is rounding, and a factor from it noise


class Chunk(NamedTuple):
    """What one run of a text encoder reads: `ids` with start, end and padding, a weight for each, and how
    many there are without the padding."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    read: int


class _Token(NamedTuple):
    """A token, its weight, and how many vectors of the same learned word stand before it."""

    id: int
    weight: float
    place: int


def encode_weighted(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts in A1111's syntax: ``encoder_hidden_states`` (B, 77 n, D), n chunks of the longest one.

    Shorter ones are filled up with the encodings of "", as with A1111's "pad prompt/negative prompt to be
    same length". The pooled text of an SDXL is the first chunk's, which no weight touches. A prompt of at
    most 75 tokens whose weights are all 1 gives what `Base.encode_prompts` gives, bit for bit.

    Raises ValueError for an empty list or a weight outside `limits.WEIGHT_RANGE`.
    """
    if not prompts:
        raise ValueError("no prompts given")
    rows = [[chunks_of(parse(prompt), *pair, base.words) for pair in _readers(base)] for prompt in prompts]
    count = max(len(chunks) for row in rows for chunks in row)
    encode = _Encoder(base)
    encoded = []
    for row in rows:
        filled = [
            chunks + (count - len(chunks)) * chunks_of([[]], *pair)
            for chunks, pair in zip(row, _readers(base), strict=True)
        ]
        encoded.append([encode(chunks) for chunks in zip(*filled, strict=True)])
    hidden = torch.cat([torch.cat([chunk.encoder_hidden_states for chunk in row], dim=1) for row in encoded])
    pooled = [first.pooled for first, *_ in encoded if first.pooled is not None]
    return Conditioning(hidden, torch.cat(pooled) if pooled else None)


def tokens_of(base: Base, prompts: Sequence[str]) -> int:
    """How many tokens the U-Net sees of such prompts: 77 for each chunk of the longest."""
    return max(
        len(chunks_of(parse(text), *pair, base.words)) * pair[1]
        for text in prompts
        for pair in _readers(base)
    )


def chunks_of(
    parts: Sequence[Sequence[Words]], tokenizer: CLIPTokenizer, length: int, words: Learned | None = None
) -> list[Chunk]:
    """The chunks of a parsed prompt, for a text encoder that reads `length` tokens (77); at least one.

    words: the base's learned ones.
    """
    comma = tokenizer.convert_tokens_to_ids(",</w>")
    pieces: list[list[_Token]] = []
    for part in parts:
        tokens = [token for run in part for token in _read(run, tokenizer, words or {})]
        pieces += _pieces(tokens, comma, length - 2)
    if len(pieces) > 1 and not pieces[-1]:  # nothing behind the last BREAK
        pieces.pop()
    return [_bounded(piece, tokenizer, length) for piece in pieces]


def _read(run: Words, tokenizer: CLIPTokenizer, words: Learned) -> list[_Token]:
    ids = tokenizer(run.text, add_special_tokens=False, verbose=False).input_ids
    return [
        _Token(one, run.weight, place)
        for vectors in with_all_vectors(ids, words, tokenizer)
        for place, one in enumerate(vectors)
    ]


def _pieces(tokens: list[_Token], comma: int, size: int) -> list[list[_Token]]:
    """Tokens in pieces of at most `size`, one of them for no tokens."""
    pieces, first = [], 0
    while len(tokens) - first > size:
        cut = first + size
        begun = cut - tokens[cut].place  # where the learned word begins of which the cut would take a part
        if first < begun < cut:
            cut = begun
        elif tokens[cut].id != comma:
            near = range(cut - 1, max(cut - COMMA_WITHIN, first) - 1, -1)
            cut = next((k + 1 for k in near if tokens[k].id == comma), cut)
        pieces.append(tokens[first:cut])
        first = cut
    return [*pieces, tokens[first:]]


def _bounded(piece: list[_Token], tokenizer: CLIPTokenizer, length: int) -> Chunk:
    filling = length - 2 - len(piece)
    ids = [
        tokenizer.bos_token_id,
        *(token.id for token in piece),
        tokenizer.eos_token_id,
        *[tokenizer.pad_token_id] * filling,
    ]
    weights = (1.0, *(token.weight for token in piece), *[1.0] * (filling + 1))
    return Chunk(tuple(ids), weights, length - filling)


def _readers(base: Base) -> list[tuple[CLIPTokenizer, int]]:
    """Each tokenizer, and how many tokens its encoder reads."""
    lengths = [encoder.config.max_position_embeddings for encoder in base.text_encoders]
    return list(zip(base.tokenizers, lengths, strict=True))


class _Encoder:
    """Runs the text encoders on chunks, on each distinct one once and alone: batches round otherwise."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.known: dict[Any, Conditioning] = {}

    @torch.no_grad()
    def __call__(self, chunks: Sequence[Chunk]) -> Conditioning:
        """The encoding of one chunk, as each of the encoders reads it."""
        key = tuple(chunks)
        if key not in self.known:
            hidden, pooled = self.base.encode_tokens([_tokens(chunk) for chunk in chunks])
            weighed = [_weighed(part, chunk.weights) for part, chunk in zip(hidden, chunks, strict=True)]
            self.known[key] = Conditioning(torch.cat(weighed, dim=-1), pooled)
        return self.known[key]


def _tokens(chunk: Chunk) -> dict[str, Tensor]:
    mask = torch.arange(len(chunk.ids)) < chunk.read
    return {"input_ids": torch.tensor([chunk.ids]), "attention_mask": mask.long()[None]}


def _weighed(hidden: Tensor, weights: Sequence[float]) -> Tensor:
    """Vectors (1, 77, D) times their weights, with the old mean; untouched where all weights are 1."""
    if all(weight == 1 for weight in weights):
        return hidden
    before = hidden.float()
    after = before * torch.tensor(weights, device=hidden.device)[None, :, None]
    means = before.mean(), after.mean()
    told = torch.stack([mean.abs() for mean in means]).min() > _NO_MEAN * before.abs().mean()
    return (after * torch.where(told, means[0] / means[1], 1.0)).to(hidden.dtype)

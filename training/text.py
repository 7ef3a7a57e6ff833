"""Training the bundled text encoder and its tokenizer's vocabulary.

Stable Diffusion's U-Net reads a caption by cross-attention to the last hidden states, so those are taught
directly: small attention heads, one per attribute (colour of the figure, kind of the object, ...), read
them and classify. The heads are thrown away; what remains is a text encoder that binds "red" to "figure"
before the U-Net ever sees it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from controlkit import files
from controlkit.figures import COLOURS, OBJECTS
from controlkit.training.config import TextRecipe
from controlkit.training.draws import Draws
from controlkit.training.task import DrawnTask
from controlkit.training.world import World

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

_ACTIONS = ("", "standing", "walking", "sitting", "with raised arms")
_NONE = "none"
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "figure": tuple(COLOURS),
    "action": _ACTIONS,
    "colour": tuple(COLOURS),
    "object": OBJECTS,
    "colour2": (*COLOURS, _NONE),
    "object2": (*OBJECTS, _NONE),
    "floor": tuple(COLOURS),
    "sky": tuple(COLOURS),
}
_CAPTION = re.compile(
    r"an? (?P<figure>\w+) figure(?: (?P<action>standing|walking|sitting|with raised arms))? next to "
    r"an? (?P<colour>\w+) (?P<object>\w+)(?: and an? (?P<colour2>\w+) (?P<object2>\w+))? "
    r"on an? (?P<floor>\w+) floor under an? (?P<sky>\w+) sky"
)
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_MOST_MERGES = 400


def attributes(caption: str) -> list[int]:
    """Class of each of `ATTRIBUTES` in a caption of the bundled world."""
    match = _CAPTION.fullmatch(caption)
    assert match is not None, caption
    absent = {"action": "", "colour2": _NONE, "object2": _NONE}
    return [choices.index(match[name] or absent.get(name, "")) for name, choices in ATTRIBUTES.items()]


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A CLIP tokenizer whose merges are learned from `captions`; any other UTF-8 text falls back to bytes.

    Byte-pair encoding as in CLIP: 256 bytes, the same 256 at a word's end, merges, then the two special
    tokens, so that their ids are the last two, as in CLIP's own vocabulary. 77 positions, padded with the
    end token.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = learn_merges(captions, most=_MOST_MERGES)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *(a + b for a, b in merges), *_SPECIAL]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return cast("CLIPTokenizer", CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77))


def learn_merges(captions: list[str], *, most: int) -> list[tuple[str, str]]:
    """The commonest neighbours, merged one pair after the other: Sennrich et al. 2016, algorithm 1.

    Ties go to the pair that sorts first, so that the same captions give the same merges; the tokenizers
    library's trainer breaks them by the order of a hash table, which differs from run to run.
    """
    counts = Counter(word for caption in captions for word in caption.lower().split())
    words = {(*word[:-1], word[-1] + "</w>"): count for word, count in counts.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for parts, count in words.items():
            for pair in pairwise(parts):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = {_merged(parts, best): count for parts, count in words.items()}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return tuple(result)


class _Readers(nn.Module):
    """One attention head per attribute over the hidden states, as the U-Net's cross-attention reads them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), width) * width**-0.5)
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.classifiers = nn.ModuleList(nn.Linear(width, len(choices)) for choices in ATTRIBUTES.values())

    def forward(self, hidden: Tensor) -> list[Tensor]:
        """(B, 77, D) -> logits (B, classes) of each attribute."""
        scores = torch.einsum("qd,bnd->bqn", self.queries, self.keys(hidden)) * hidden.shape[-1] ** -0.5
        read = torch.einsum("bqn,bnd->bqd", scores.softmax(dim=-1), self.values(hidden))  # (B, Q, D)
        return [classifier(read[:, slot]) for slot, classifier in enumerate(self.classifiers)]


class TextTask(DrawnTask):
    """CLIPTextModel on the captions of the bundled world, classified by attention readers."""

    def __init__(self, recipe: TextRecipe, world: World, validation: World, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.tokenizer = build_tokenizer(world.captions)
        self.tokens = _tokens(self.tokenizer, world.captions)
        self.classes = torch.tensor([attributes(caption) for caption in world.captions])
        self.held_out = _tokens(self.tokenizer, validation.captions)
        self.held_out_classes = torch.tensor([attributes(caption) for caption in validation.captions])
        torch.manual_seed(recipe.seed)
        self.encoder = _build(recipe, self.tokenizer).to(device)
        self.readers = _Readers(recipe.hidden_size).to(device)

    def modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.encoder, "readers": self.readers}

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [*self.encoder.parameters(), *self.readers.parameters()], "rate": 1.0}]

    def loss(self, draws: Draws) -> Tensor:
        rows = torch.tensor(draws.indices(len(self.tokens), self.recipe.batch_size))
        logits = self._logits(self.tokens[rows])
        classes = self.classes[rows].to(self.device)
        losses = [nn.functional.cross_entropy(x.float(), classes[:, slot]) for slot, x in enumerate(logits)]
        return torch.stack(losses).mean()

    def _logits(self, tokens: Tensor) -> list[Tensor]:
        return cast(list[Tensor], self.readers(self.encoder(tokens.to(self.device)).last_hidden_state))

    def sample(self) -> None:
        """There is nothing to show."""

    @torch.no_grad()
    def accuracy(self) -> float:
        """Share of the attributes of held-out captions that are read correctly."""
        logits = self._logits(self.held_out)
        right = [x.argmax(-1).cpu() == self.held_out_classes[:, slot] for slot, x in enumerate(logits)]
        return float(torch.stack(right).float().mean())

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        self.encoder.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")
        files.write_json(folder / "quality.json", {"attribute accuracy": self.accuracy()})


def _tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return cast(
        Tensor,
        tokenizer(
            captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids,
    )


def _build(recipe: TextRecipe, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = len(tokenizer)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=recipe.hidden_size,
            intermediate_size=4 * recipe.hidden_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            projection_dim=recipe.hidden_size,
            max_position_embeddings=77,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )

"""Token merging: self-attention over fewer tokens, where many are nearly the same (lossy).

Bolya & Hoffman 2023, "Token Merging for Fast Stable Diffusion" (arXiv:2303.17604), section 3.2 and 4: of
every 2x2 cell of a picture's tokens one is a destination. Each of the others looks for the destination that
it is most like (bipartite soft matching, Bolya et al. 2022, arXiv:2210.09461, section 3), and those that are
most alike are averaged into theirs. The attention sees the fewer tokens, and what it gives a destination is
copied to all that were merged into it. Only self-attentions of the highest resolution are worth it: their
cost grows with the square of the tokens, and there are the most.

Which token of a cell is the destination is drawn once for a size, from a seed of its own: the same in every
step and picture, whatever the generators of a generation do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_SIMILARITIES = 2**23  # of tokens that are held at once for each row: 2048 pixels stay within 32 megabytes


class Pattern(NamedTuple):
    """Which tokens of a grid are destinations, (D,), and which are sources, (S,): indices, in order."""

    sources: Tensor
    destinations: Tensor


def pattern(height: int, width: int, *, device: torch.device | str = "cpu") -> Pattern:
    """The destinations of a grid of height x width tokens, one in every 2x2 cell; at an odd border the cells
    are cut, and have one, too."""
    rows, columns = -(-height // 2), -(-width // 2)
    generator = torch.Generator("cpu").manual_seed(0)
    place = torch.randint(0, 4, (rows, columns), generator=generator)
    y = (2 * torch.arange(rows)[:, None] + place // 2).clamp(max=height - 1)
    x = (2 * torch.arange(columns)[None, :] + place % 2).clamp(max=width - 1)
    is_source = torch.ones(height * width, dtype=torch.int64)
    is_source[(y * width + x).flatten()] = 0
    order = is_source.argsort(stable=True).to(device)  # no `nonzero`, whose size a GPU would be asked for
    return Pattern(order[rows * columns :], order[: rows * columns])


class Merge(NamedTuple):
    """Which tokens of a picture become one: made by `match`, for tokens (B, N, C) and R of them merged.

    kept: the sources that stay, (B, S - R). merged: those that do not, (B, R), and into: the place among the
    destinations of each, (B, R). slots: where each token is found after merging, (B, N).
    """

    pattern: Pattern
    kept: Tensor
    merged: Tensor
    into: Tensor
    slots: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to (B, N - R, C): the sources that are kept, and the destinations, each the mean
        of itself and of what is merged into it."""
        destinations = x[:, self.pattern.destinations].float()  # half precision cannot count to a thousand
        total = _added(destinations, self.into, _taken(x, self.merged).float())
        ones = torch.ones_like(destinations[..., :1])
        count = _added(ones, self.into, torch.ones_like(self.into, dtype=torch.float32)[..., None])
        return torch.cat([_taken(x, self.kept), (total / count).to(x.dtype)], dim=1)

    def unmerge(self, x: Tensor) -> Tensor:
        """What (B, N - R, C) were made of, (B, N, C): each token a copy of what it was merged into."""
        return _taken(x, self.slots)


def match(x: Tensor, pattern: Pattern, share: float) -> Merge:
    """The merging of tokens ``x`` (B, N, C), row by row: `share` of all N, or all sources if they are fewer.

    Likeness is the cosine. Of sources that are equally alike the first are merged.
    """
    unit = nn.functional.normalize(x, dim=-1)
    likeness, best = _best(unit[:, pattern.sources], unit[:, pattern.destinations])
    count, sources = merged_count(x.shape[1], len(pattern.sources), share), len(pattern.sources)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    into = best.gather(1, order[:, :count])
    taken = pattern.sources[order]  # (B, S), as indices of tokens
    slots = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
    places = torch.arange(x.shape[1] - count, device=x.device)
    first = sources - count  # destinations stand behind the sources that are kept
    slots[:, pattern.destinations] = places[first:]
    slots.scatter_(1, taken, torch.cat([first + into, places[:first].expand(len(x), -1)], dim=1))
    return Merge(pattern, taken[:, count:], taken[:, :count], into, slots)


def merged_count(tokens: int, sources: int, share: float) -> int:
    """How many tokens are merged: `share` of them, and no more than there are sources."""
    return min(int(tokens * share), sources)


def _best(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """For each source (B, S, C) the likeness to the destination (B, D, C) that it is most like, and which."""
    at_once = max(1, _SIMILARITIES // destinations.shape[1])
    across = destinations.transpose(1, 2)
    parts = [(part @ across).max(dim=-1) for part in sources.split(at_once, dim=1)]
    return torch.cat([part.values for part in parts], dim=1), torch.cat([p.indices for p in parts], dim=1)


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Of tokens (B, N, C) those of an index (B, M), each row its own: (B, M, C)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _added(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``x`` (B, D, C) and, added to it, values (B, R, C) at an index (B, R); always in the same order."""
    if x.device.type == "cpu":
        return x.scatter_add(1, index[..., None].expand(-1, -1, x.shape[-1]), values)
    rows = torch.arange(len(x), device=x.device)[:, None]  # on a GPU a scatter adds in any order; this sorts
    return x.index_put((rows, index), values, accumulate=True)


class TokenMerging:
    """Merging a share of the tokens, 0 to 0.75, in the networks that it is asked for. Made once for a
    generation: it remembers the pattern of each size."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._patterns: dict[tuple[int, int, torch.device], Pattern] = {}

    @contextlib.contextmanager
    def within(self, *networks: nn.Module) -> Iterator[None]:
        """Within the block the networks' self-attentions at the highest resolution see merged tokens.

        Those that are not diffusers' plain ones stay as they are.
        """
        with contextlib.ExitStack() as stack:
            for network in networks if self.share else ():
                for transformer in outermost_transformers(network):
                    stack.enter_context(self._in_transformer(transformer))
            yield

    @contextlib.contextmanager
    def _in_transformer(self, transformer: Any) -> Iterator[None]:
        """Its blocks are told of the grid by the norm, which alone sees it, whoever calls the blocks."""
        grid: list[int] = []

        def see(_: nn.Module, given: tuple[Tensor]) -> None:
            grid[:] = given[0].shape[-2:]

        watch = transformer.norm.register_forward_pre_hook(see)
        attentions = [block.attn1 for block in transformer.transformer_blocks if _attends_to_itself(block)]
        before = [attention.processor for attention in attentions]
        try:
            for attention in attentions:
                attention.processor = _Merged(attention.processor, self, grid)
            yield
        finally:
            for attention, processor in zip(attentions, before, strict=True):
                attention.processor = processor
            watch.remove()

    def pattern_for(self, height: int, width: int, device: torch.device) -> Pattern:
        """The pattern of a grid, on a device."""
        key = (height, width, device)
        if key not in self._patterns:
            self._patterns[key] = pattern(height, width, device=device)
        return self._patterns[key]


class _Merged:
    """An attention's processor that hands merged tokens to the one that was there."""

    def __init__(self, inner: Any, merging: TokenMerging, grid: list[int]) -> None:
        self.inner, self.merging, self.grid = inner, merging, grid

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """The attention's output for ``hidden_states`` (B, N, C), which attend to themselves."""
        assert encoder_hidden_states is None
        assert attention_mask is None
        height, width = self.grid
        assert height * width == hidden_states.shape[1]
        chosen = self.merging.pattern_for(height, width, hidden_states.device)
        if not merged_count(height * width, len(chosen.sources), self.merging.share):
            return self.inner(attn, hidden_states)
        merge = match(hidden_states, chosen, self.merging.share)
        return merge.unmerge(self.inner(attn, merge.merge(hidden_states)))


def outermost_transformers(network: Any) -> list[Any]:
    """A U-Net's or control network's transformers at the highest resolution at which it has any.

    That is the first level of SD1 and SD2, the second of SDXL. Networks of other kinds may have none: a
    T2I-Adapter and a light network have no such blocks at all.
    """
    downs, ups = getattr(network, "down_blocks", ()), getattr(network, "up_blocks", ())
    level = next((i for i, block in enumerate(downs) if _transformers(block)), None)
    if level is None:
        return []
    blocks = [downs[level], *([ups[len(ups) - 1 - level]] if ups else [])]
    return [transformer for block in blocks for transformer in _transformers(block)]


def _transformers(block: Any) -> list[Any]:
    return list(getattr(block, "attentions", None) or ())  # a ControlNet-XS's blocks without any have None


def _attends_to_itself(block: Any) -> bool:
    attention = block.attn1
    if isinstance(attention.processor, nn.Module):  # IP-Adapter's, say
        return False
    special = (attention.spatial_norm, attention.group_norm, attention.residual_connection)
    return not any(special) and not block.only_cross_attention

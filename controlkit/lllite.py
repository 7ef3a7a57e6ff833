"""ControlNet-LLLite: small networks in front of the U-Net's attention projections, told the map.

kohya-ss's "LoRA-like lite" control (sd-scripts, docs/train_lllite_README.md). For a projection W of an
attention (queries, keys and values of self-attention, queries of cross-attention), tokens x and the map's
embedding c at the same resolution,

    y = W (x + s * up(relu(mid([c, relu(down(x))]))))

with s the control's scale. The embedding of the map, [-1, 1] here, is computed once for each projection; the
U-Net stays as it is, and its projections are hooked while a step runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from controlkit.formats.lllite_keys import STRIDES, depth_of
from controlkit.formats.lllite_keys import place as place


class LLLite(nn.Module):
    """The small networks of a file, by their names in it.

    config: "family", "conditioning_channels", and for people the number of projections.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(modules)
        self.config = {"family": "sdxl", "conditioning_channels": 3, "projections": len(modules)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device


class Part(nn.Module):
    """The network in front of one projection."""

    def __init__(self, tokens: int, embedded: int, inner: int, depth: int) -> None:
        super().__init__()
        half, convolutions = embedded // 2, []
        strides = STRIDES[depth]
        for k, stride in enumerate(strides):
            wide = embedded if k == len(strides) - 1 else half
            convolutions += [nn.Conv2d(3 if k == 0 else half, wide, stride, stride=stride), nn.ReLU()]
        self.conditioning1 = nn.Sequential(*convolutions[:-1])
        self.down = nn.Sequential(nn.Linear(tokens, inner), nn.ReLU())
        self.mid = nn.Sequential(nn.Linear(inner + embedded, inner), nn.ReLU())
        self.up = nn.Sequential(nn.Linear(inner, tokens))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """What is added to tokens ``x`` (B, S, C), of the map's ``embedding`` (B, S, E)."""
        added: Tensor = self.up(self.mid(torch.cat([embedding, self.down(x)], dim=-1)))
        return added


def from_tensors(tensors: Mapping[str, Tensor]) -> LLLite:
    """The networks of a file's tensors (``NAME.conditioning1.0.weight`` and so on), in its precision.

    Raises ValueError for names that are no attention projection of a U-Net, for convolutions, and for
    tensors that are missing, left over or of another shape.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, inner = key.partition(".")
        found.setdefault(name, {})[inner] = tensor
    return LLLite({name: _part(name, found[name]) for name in sorted(found)})


def _part(name: str, own: Mapping[str, Tensor]) -> Part:
    place(name)
    down, first = own.get("down.0.weight"), own.get("conditioning1.0.weight")
    second = own.get("conditioning1.2.weight")
    if down is None or first is None or second is None:
        raise ValueError(f"LLLite: {name} lacks down.0.weight or its conditioning1")
    if down.dim() != 2:
        raise ValueError(f"LLLite: {name} is a convolution; only those in attention's projections are known")
    depth = depth_of({key: tuple(tensor.shape) for key, tensor in own.items()})
    part = Part(down.shape[1], 2 * first.shape[0], down.shape[0], depth).to(down.dtype)
    expected = {key: tuple(tensor.shape) for key, tensor in part.state_dict().items()}
    for key in sorted(expected.keys() ^ own.keys()):
        raise ValueError(f"LLLite: {name} has no {key}" if key in expected else f"LLLite: {name} has a {key}")
    for key, shape in expected.items():
        if tuple(own[key].shape) != shape:
            raise ValueError(f"LLLite: {name}.{key} is {tuple(own[key].shape)}, not {shape}")
    part.load_state_dict(own)
    return part


def check_fits(network: LLLite, unet: nn.Module, *, base: str) -> None:
    """Raise ValueError for projections that a U-Net does not have, or of another width."""
    for name, part in network.parts.items():
        try:
            projection: Any = unet.get_submodule(place(name))
        except AttributeError:
            raise ValueError(f"the LLLite does not fit the base {base}, which has no {place(name)}") from None
        width = part.down[0].in_features  # type: ignore[union-attr,index]
        if projection.in_features != width:
            raise ValueError(
                f"the LLLite does not fit the base {base}: {place(name)} takes {projection.in_features}"
                f" channels there, and {width} in the file"
            )


def encode_hint(network: LLLite, controlnet_cond: Tensor) -> tuple[Tensor, ...]:
    """The map's embedding for every projection, (B, E, h', w') each: (B, 3, 8h, 8w) in [0, 1]."""
    signed = controlnet_cond.to(network.device, network.dtype) * 2 - 1
    return tuple(part.conditioning1(signed) for part in network.parts.values())  # type: ignore[operator]


@dataclass(frozen=True, eq=False)
class Acting:
    """How an LLLite acts in one step: its embeddings, its scale, and its `EncodedControl.region_at`."""

    network: LLLite
    hint: Sequence[Tensor]
    scale: float = 1.0
    region: Callable[[int, int, Tensor], Tensor] | None = None


@contextlib.contextmanager
def acting(unet: nn.Module, controls: Sequence[Acting], *, height: int, width: int) -> Iterator[None]:
    """Within the block the U-Net's projections are under these controls; height, width: of the latents."""
    hooks = []
    try:
        for control in controls:
            for (name, part), embedding in zip(control.network.parts.items(), control.hint, strict=True):
                projection = unet.get_submodule(place(name))
                hook = _Hook(part, embedding, control, height, width)
                hooks.append(projection.register_forward_pre_hook(hook))
        yield
    finally:
        for handle in hooks:
            handle.remove()


class _Hook:
    """Adds to a projection's tokens what one part makes of them."""

    def __init__(self, part: nn.Module, embedding: Tensor, control: Acting, height: int, width: int) -> None:
        self.part, self.embedding, self.control = part, embedding, control
        self.height, self.width = height, width

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *rest = args
        height, width = self._size(x.shape[1])
        embedding = self.embedding
        if embedding.shape[-2:] != (height, width):
            embedding = nn.functional.interpolate(embedding, (height, width), mode="nearest-exact")
        embedding = embedding.flatten(2).transpose(1, 2)  # (1|B, S, E)
        repeats = len(x) // len(embedding)
        added = self.part(x, embedding.repeat(repeats, 1, 1)) * self.control.scale
        if self.control.region is not None:
            region = self.control.region(height, width, added)
            added = added * region.flatten(2).transpose(1, 2)
        return x + added, *rest

    def _size(self, tokens: int) -> tuple[int, int]:
        """Height and width of so many tokens: the latents', halved and rounded up until it is so many."""
        height, width = self.height, self.width
        while height * width > tokens:
            height, width = -(-height // 2), -(-width // 2)
        assert height * width == tokens, (height, width, tokens)
        return height, width

"""Which of `memory`'s measures a generation needs, reckoned before it starts.

The true networks are copied as fake tensors, which have shapes but no numbers, and the true calls are run on
them while every storage is counted as it comes and goes. To it come the weights that are on the device at
that moment, and what a device or a process takes besides. Networks that extract maps are not counted.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from controlkit.applying import EncodedControl, Rows
from controlkit.class_labels import classes_of
from controlkit.clip_guidance import ClipGuidance, ClipGuide
from controlkit.families import takes_picture
from controlkit.kinds import encode_hint, kind_of
from controlkit.memory import Memory
from controlkit.predicting import Guidance, Predictor, Savings, check_together
from controlkit.reuse import text_kept

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.clip_guidance import Clip
    from controlkit.control import Control

_CUDA_CONTEXT = 700 * 10**6  # with the workspaces of cuBLAS and cuDNN
# Of a process that has imported and once run them: tests/memory_trial.py 64 batch=1.
_LIBRARIES = 1000 * 10**6
_WASTE = {"cpu": 0.25, "cuda": 0.1}  # share of what comes and goes that is lost between allocations
_TOKENS = 77


class Peak(TorchDispatchMode):
    """The most bytes that were alive at once of what is made within it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what is new in its result."""
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)}
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in before | self._known:
                self._note(leaf.untyped_storage())
        self.most = max(self.most, self.live)
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size

        def gone() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone).atexit = False


def peak_of(call: Callable[[], object]) -> int:
    """Bytes that a call needs at most beyond what it is given, its result included."""
    with Peak() as peak:
        result = call()
    del result
    return peak.most


@dataclass(frozen=True)
class Request:
    """What is generated: pixels of a picture, how many pictures, whether guided, the tile if there are tiles,
    the tokens of the text, whether a picture is encoded first, the share of tokens that are merged, and the
    perturbed-attention guidance."""

    width: int
    height: int
    pictures: int = 1
    guided: bool = True
    tile: int | None = None
    tokens: int = _TOKENS
    starts: bool = False
    merge_tokens: float = 0.0
    pag: float = 0.0


@dataclass(eq=False)
class Estimate:
    """The bytes of a generation under given measures. Build it once; it remembers what it has reckoned.

    Raises ValueError for controls that cannot act in one generation, which nobody can reckon.
    """

    base: Base
    controls: Sequence[Control]
    request: Request
    clip: Clip | None = None
    """The CLIP that guides the denoising, if one does."""
    mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    known: dict[Any, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        networks = [control.controlnet for control in self.controls]
        check_together(networks, Savings(merge_tokens=self.request.merge_tokens), pag=self.request.pag)
        with self.mode:
            self.unet, self.vae = _copy(self.base.unet), _copy(self.base.vae)
            nets = {id(network): network for network in networks}
            copies = {key: _copy(network) for key, network in nets.items()}
            if self.clip is not None:
                self.clip = replace(self.clip, model=_copy(self.clip.model))
        self.controlnets = [copies[id(control.controlnet)] for control in self.controls]
        self.distinct = list(copies.values())

    def total(self, memory: Memory) -> int:
        """Bytes at the worst moment: on a GPU of the device, on the processor of the process."""
        return max(self.phases(memory).values())

    def phases(self, memory: Memory) -> dict[str, int]:
        """The most bytes while the text is encoded, while denoising, and while pictures are decoded."""
        kind = self.base.device.type
        weights = {
            "text": weight_bytes(*self.base.encoders),
            "denoising": weight_bytes(self.unet, *self.distinct),
            "decoding": weight_bytes(self.vae),
        }
        everything = sum(weights.values())
        if self.clip is not None:  # it looks at what the autoencoder decodes, in every step
            judge = weight_bytes(self.clip.model)
            weights["denoising"] += judge + weights["decoding"]
            everything += judge
        moving = memory.offload and kind != "cpu"
        besides = _LIBRARIES if kind == "cpu" else _CUDA_CONTEXT
        share = 1 + _WASTE.get(kind, _WASTE["cuda"])
        needed = {
            "text": 0,  # a few vectors
            "denoising": max(self._denoising(memory), self._looking()),
            "decoding": self._decoding(memory),
        }
        return {
            name: besides + int(share * needed[name]) + (weights[name] if moving else everything)
            for name in weights
        }

    def _denoising(self, memory: Memory) -> int:
        one = memory.one_branch or not self.request.guided
        key = ("denoising", memory.batch_size, one)
        if key not in self.known:
            with self.mode, torch.no_grad():
                self.known[key] = self._step(memory.batch_size, one)
        return self.known[key]

    def _step(self, batch: int, one: bool) -> int:
        """The hints of all pictures, and a step of a batch; of tiles, one tile."""
        base, request = self.base, self.request
        factor, dtype = base.vae_factor, base.dtype
        w, h = (min(side, request.tile or side) // factor for side in (request.width, request.height))
        whole = (request.width // factor) * (request.height // factor)
        encoded, hints = [], 0
        for control, network in zip(self.controls, self.controlnets, strict=True):
            channels = kind_of(network).channels(network)
            cond = torch.empty(1, channels, h * factor, w * factor, dtype=network.dtype)
            hint = encode_hint(network, cond, control.number)
            hints += sum(part.nbytes for part in hint) * whole // (h * w)
            encoded.append(EncodedControl(_Under(control, network), hint, control.weights()))  # type: ignore[arg-type]
        branches = 2 if request.guided else 1
        width = int(base.unet.config.cross_attention_dim)
        text = torch.empty(branches * batch, request.tokens, width, dtype=dtype)
        added = self._added(branches * batch)
        taken, channels = base.unet.config.in_channels, base.vae.config.latent_channels
        predictor = Predictor(
            replace(base, unet=self.unet, vae=self.vae, device=self.unet.device),  # what it makes meets them
            Rows(text, added, batch, class_labels=self._labels(batch)),
            encoded,
            Guidance(5.0 if request.guided else 1.0, perturbed=request.pag),
            1,
            Savings(merge_tokens=request.merge_tokens),
            shown=None if taken == channels else torch.empty(batch, taken - channels, h, w),
            one_branch_at_a_time=one,
        )
        latents = torch.empty(batch, channels, h, w)
        with text_kept(self.unet, *self.distinct):
            return hints + peak_of(lambda: predictor(latents, torch.empty((), dtype=torch.int64), 0))

    def _looking(self) -> int:
        """CLIP's look at one picture, forward and back."""
        if self.clip is None:
            return 0
        if "looking" not in self.known:
            base, request = self.base, self.request
            size = (request.height // base.vae_factor, request.width // base.vae_factor)
            with self.mode:
                guide = ClipGuide(replace(base, vae=self.vae), ClipGuidance(self.clip, 1.0), "")
                latents = torch.empty(1, base.vae.config.latent_channels, *size)
                self.known["looking"] = peak_of(lambda: guide.gradient(latents))
        return self.known["looking"]

    def _added(self, rows: int) -> dict[str, Tensor] | None:
        if self.base.family != "sdxl":
            return None
        config = self.base.unet.config
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return {
            "text_embeds": torch.empty(rows, pooled, dtype=self.base.dtype),
            "time_ids": torch.empty(rows, 6, dtype=self.base.dtype),
        }

    def _labels(self, pictures: int) -> Tensor | None:
        """What `class_labels.Labels` would draw."""
        config = self.base.unet.config
        if classes_of(config):
            return torch.zeros(pictures, dtype=torch.int64)
        if not takes_picture(config):
            return None
        rows = pictures * (2 if self.request.guided else 1)
        return torch.empty(rows, config.projection_class_embeddings_input_dim, dtype=self.base.dtype)

    def _decoding(self, memory: Memory) -> int:
        tiled = memory.tiled_vae or self.request.tile is not None
        at_once = 1 if memory.sliced_vae else memory.batch_size
        key = ("decoding", at_once, tiled)
        if key not in self.known:
            with self.mode, torch.no_grad():
                self.known[key] = self._decoder(at_once, tiled)
        return self.known[key] + 4 * 3 * self.request.width * self.request.height * memory.batch_size

    def _decoder(self, at_once: int, tiled: bool) -> int:
        from diffusers import AutoencoderTiny

        request, vae = self.request, self.vae
        vae.disable_tiling()
        width, height, kept = request.width, request.height, 0
        if tiled:  # one tile stands for all of them, whose results stay until the last one is there
            side = vae.tile_latent_min_size * self.base.vae_factor
            step = int(side * (1 - vae.tile_overlap_factor))
            count = -(-width // step) * -(-height // step)
            kept = at_once * 3 * (count * side * side + 2 * width * height) * vae.dtype.itemsize
            if isinstance(vae, AutoencoderTiny):  # it adds each into the picture at once, in float32
                kept = at_once * 3 * width * height * 4
            width, height = min(width, side), min(height, side)
        size = (height // self.base.vae_factor, width // self.base.vae_factor)
        latents = torch.empty(at_once, vae.config.latent_channels, *size, dtype=vae.dtype)
        most = peak_of(lambda: vae.decode(latents).sample)
        if request.starts:
            pixels = torch.empty(1, 3, height, width, dtype=vae.dtype)
            most = max(most, peak_of(lambda: vae.encode(pixels)))
        return most + kept


class _Under:
    """A control whose network is another one, of fake tensors."""

    def __init__(self, control: Control, controlnet: Any) -> None:
        self._control, self.controlnet = control, controlnet

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control, name)

    def active(self, step: int, steps: int) -> bool:
        """Always: the worst step counts."""
        return True


def _copy(network: nn.Module) -> Any:
    """The network with tensors without content, laid out as `sampling` lays them out, whatever its device."""
    tensors = [*network.parameters(), *network.buffers()]
    return copy.deepcopy(network, {id(tensor): _like(tensor) for tensor in tensors})


def _like(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=layout)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


def weight_bytes(*networks: nn.Module) -> int:
    """Bytes of the networks' weights and buffers."""
    tensors = [t for network in networks for t in (*network.parameters(), *network.buffers())]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)


def fit(estimate: Estimate, *, limit: int, batch_size: int) -> tuple[Memory, str]:
    """The least costly measures under which a generation stays within `limit` bytes, and a line that tells.

    Starting from `batch_size` pictures at once, the first measure in `memory`'s order is added that lowers
    the worst moment, until it fits. Raises ValueError, with the least that is possible, where nothing does.
    """
    request, device = estimate.request, estimate.base.device
    memory = Memory(min(batch_size, request.pictures))
    total = estimate.total(memory)
    while total > limit:
        for candidate in _next(memory):
            smaller = estimate.total(candidate)
            if smaller < total:
                memory, total = candidate, smaller
                break
        else:
            size = f"{request.width}x{request.height}"
            raise ValueError(
                f"{size} pixels do not fit into {_amount(limit)} on {device}: the least that this base"
                f" needs there, with everything done to save memory, is about {_amount(total)}"
            )
    how = ", ".join(memory.measures)
    return memory, f"memory: about {_amount(total)} of {_amount(limit)} on {device}, with {how}"


def _next(memory: Memory) -> list[Memory]:
    """What can be done besides, least costly first."""
    smaller = [replace(memory, batch_size=memory.batch_size // 2)] if memory.batch_size > 1 else []
    changes = [
        replace(memory, sliced_vae=True),
        replace(memory, offload=True),
        *smaller,
        replace(memory, one_branch=True),
        replace(memory, tiled_vae=True),
    ]
    return [change for change in changes if change != memory]


def _amount(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"

"""Pictures as prompts: IP-Adapters on a base (Ye et al. 2023, arXiv:2308.06721).

A picture becomes a few tokens, by CLIP's picture encoder and a small projection. Every cross-attention of the
U-Net reads them by keys and values of their own (equation 8; 5 where the scale is 1):

    Z  =  Attention(Q, K, V)  +  scale * Attention(Q, K', V')

Control networks keep to the text. The tokens are computed once, before the first step, and neither the
encoder nor the projection is kept. Equal to diffusers' pipelines (tests/test_ip_adapter.py), for files of the
plain, "light", "plus" and "full" kinds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from controlkit import images, limits
from controlkit.base import FAMILY_TITLES, check_base_given
from controlkit.files import as_text
from controlkit.folders import load_part, quiet_libraries, read_json, read_state
from controlkit.formats.structure import by
from controlkit.hub import PICKLES, find_file, find_weight_file, first_sentence
from controlkit.naming import first_of
from controlkit.reuse import KeptText, PicturePart, cross_attentions

if TYPE_CHECKING:
    from controlkit.base import Base
    from controlkit.images import Source

USUAL_FILE = "ip-adapter_sd15.safetensors"  # in a folder that holds several
ENCODER = "image_encoder"  # the folder of the picture encoder, beside the file's or in a folder beside that
# the names that its authors' training gives the two parts
_OF_TRAINING = {"image_proj_model": "image_proj", "adapter_modules": "ip_adapter"}
_HUB_FOLDERS = ("models", "sdxl_models")  # of h94/IP-Adapter, which hold the two encoders


@dataclass(frozen=True, eq=False)
class PicturePrompt:
    """What a base is told by pictures.

    tokens: (2, n, D), of no picture and of the pictures. weights: keys' and values' matrices (heads x d, D)
    of every cross-attention of the U-Net, in its order. scale: how much they count; 0 is nothing, 1 as
    trained.
    """

    tokens: Tensor = field(repr=False)
    weights: tuple[tuple[Tensor, Tensor], ...] = field(repr=False)
    scale: float = 1.0

    def __post_init__(self) -> None:
        limits.check_picture_scale(self.scale)

    def parts(self) -> Iterator[PicturePart]:
        """What each cross-attention needs, in the U-Net's order."""
        for to_k, to_v in self.weights:
            yield PicturePart(self.tokens.shape[1], to_k, to_v, self.scale)


def picture_prompt(
    base: Base,
    source: str | os.PathLike[str],
    pictures: Source | Sequence[Source],
    *,
    scale: float = 1.0,
    image_encoder: str | os.PathLike[str] | None = None,
) -> PicturePrompt:
    """What an IP-Adapter makes of one picture or several, for `sampling.generate`.

    pictures: whatever `images.load_pictures` takes, as a path, a PIL image or an array (H, W, 3).
    source: a file, a folder that holds one, or a hub id, ``owner/name/folder/file.safetensors``.
    scale: -10 to 10. image_encoder: the folder of CLIP's picture encoder; by default it is looked for beside
    the file, as in h94/IP-Adapter.

    Raises ValueError, naming the file, for one that leads nowhere, is damaged, none of the kinds that the
    module's text names, or made for a base of another family, and where no encoder of its width is found.
    """
    check_base_given(base)
    shown, _ = images.load_pictures(pictures)
    if not shown:
        raise ValueError("no picture given: an IP-Adapter tells of one or more")
    source = as_text("an IP-Adapter", source)
    file = _find(source)
    state = _split(file, read_state(file, what="IP-Adapter"))
    weights = _attention_weights(file, state["ip_adapter"], base)
    projection = _projection(file, state["image_proj"], base)
    encoder, size = _encoder(source, file, state["image_proj"], image_encoder, base)
    tokens = _tokens(projection, encoder, _pixels(shown, size), base)
    return PicturePrompt(tokens, weights, scale)


@contextmanager
def pictures_told(unet: Any, prompts: Sequence[PicturePrompt]) -> Iterator[None]:
    """Within the block, which is itself within `reuse.text_kept`, the U-Net reads the pictures' tokens, too.

    Raises ValueError for a U-Net whose attentions somebody has changed, and for what was told another base.
    """
    if not prompts:
        yield
        return
    attentions = list(cross_attentions(unet))
    processors = [attention.processor for attention in attentions]
    if not all(type(processor) is KeptText for processor in processors):
        raise ValueError("the U-Net has attention processors of its own, which read no pictures: remove them")
    own = [(attention.to_k.weight.shape, attention.to_v.weight.shape) for attention in attentions]
    if any([(to_k.shape, to_v.shape) for to_k, to_v in prompt.weights] != own for prompt in prompts):
        raise ValueError("a PicturePrompt was made for another base: make it with the one that generates")
    before = [processor.pictures for processor in processors]
    try:
        for processor, *parts in zip(processors, *(prompt.parts() for prompt in prompts), strict=True):
            processor.read(parts)
        yield
    finally:
        for processor, pictures in zip(processors, before, strict=True):
            processor.read(pictures)


def with_pictures(text: Tensor, prompts: Sequence[PicturePrompt]) -> Tensor:
    """What the U-Net reads: `encode_text`'s rows (1|2, 77, D) with the pictures' tokens behind them."""
    tokens = [prompt.tokens[-len(text) :].to(text.device, text.dtype) for prompt in prompts]
    return torch.cat([text, *tokens], dim=1) if tokens else text


def _find(source: str) -> Path:
    """The file, which may be a pickle: tensors and nothing else are read from it."""
    path = Path(source).expanduser()
    if path.suffix in PICKLES and os.path.isfile(path):
        return path
    if os.path.isdir(path) and not any(path.glob("*.safetensors")):
        found = sorted(file for file in path.iterdir() if file.suffix in PICKLES and file.is_file())
        if len(found) != 1:
            number = len(found) or "no"
            raise ValueError(f"IP-Adapter {source}: the folder holds {number} files of weights; name the one")
        return found[0]
    return find_weight_file(source, what="IP-Adapter", usual=USUAL_FILE)


def _split(file: Path, state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The projection's and the attentions' tensors by their keys. Raises ValueError for another file."""
    parts: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    is_of_training = any(key.partition(".")[0] in _OF_TRAINING for key in state)
    for key, value in state.items():
        name, _, rest = key.partition(".")
        if is_of_training and name == "unet":  # it lies beside what was trained, unchanged
            continue
        name = _OF_TRAINING.get(name, name)
        of_part = value if isinstance(value, Mapping) else {rest: value}
        if name not in parts or not all(isinstance(tensor, Tensor) for tensor in of_part.values()):
            raise ValueError(f"{file} is not an IP-Adapter: it holds {key}")
        parts[name] |= of_part
    for name, tensors in parts.items():
        if not tensors:
            raise ValueError(f"{file} is not an IP-Adapter: it holds no {name}")
        for key, tensor in tensors.items():
            if not tensor.is_floating_point():
                stored = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(
                    f"{file} stores {name}.{key} as {stored}, a quantization that is not supported"
                )
            if not torch.isfinite(tensor.float()).all():  # 8-bit floats cannot be asked
                raise ValueError(f"{file} is damaged: {name}.{key} has numbers that are not finite")
    of_faces = {"perceiver_resampler.proj_in.weight", "norm.weight"} & set(parts["image_proj"])
    if of_faces and "proj.weight" not in parts["image_proj"]:
        raise ValueError(f"{file} is a FaceID adapter, which reads faces by another network: not supported")
    return parts


def _attention_weights(
    file: Path, state: Mapping[str, Tensor], base: Base
) -> tuple[tuple[Tensor, Tensor], ...]:
    """The matrices for each cross-attention, which the files number 1, 3, 5 ...: self-attentions count."""
    attentions = list(cross_attentions(base.unet))
    numbers, title = _numbers(len(attentions)), FAMILY_TITLES[base.family]
    _check_attentions(file, state, len(attentions), f"the {title} base {base.name}")
    weights = []
    for number, attention in zip(numbers, attentions, strict=True):
        pair = tuple(state[f"{number}.to_{part}_ip.weight"] for part in "kv")
        for own, tensor in zip((attention.to_k.weight, attention.to_v.weight), pair, strict=True):
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{file} was made for another base: its {number}.to_k_ip is {tuple(tensor.shape)}, and"
                    f" the {title} base {base.name} has {tuple(own.shape)} there"
                )
        weights.append(tuple(tensor.to(base.unet.device, base.dtype) for tensor in pair))
    return tuple((to_k, to_v) for to_k, to_v in weights)


def _numbers(attentions: int) -> range:
    return range(1, 2 * attentions, 2)


def _keys(attentions: int) -> list[str]:
    return [f"{number}.to_{part}_ip.weight" for number in _numbers(attentions) for part in "kv"]


def _check_attentions(file: Path, state: Mapping[str, Tensor], attentions: int, base: str) -> None:
    """Raise ValueError unless a file has keys and values for each of a base's cross-attentions."""
    own = len(state) // 2
    if own != attentions and set(state) == set(_keys(own)):
        raise ValueError(f"{file} was made for a base with {own} cross-attentions; {base} has {attentions}")
    if missing := [key for key in _keys(attentions) if key not in state]:
        raise ValueError(f"{file} is damaged: it lacks ip_adapter.{first_of(missing)}")
    if strange := [key for key in state if key not in _keys(attentions)]:
        raise ValueError(
            f"{file} holds ip_adapter.{first_of(strange)}, which an IP-Adapter for {base} does not have"
        )


def _projection(file: Path, state: Mapping[str, Tensor], base: Base) -> Any:
    """diffusers' module that makes tokens of what the encoder gives; renaming the keys is its work, too."""
    with quiet_libraries(), torch.random.fork_rng(devices=[]):
        try:
            made = base.unet._convert_ip_adapter_image_proj_to_diffusers(dict(state), low_cpu_mem_usage=False)
        except (KeyError, IndexError, RuntimeError, ValueError) as error:
            raise ValueError(_fault_in_projection(file, state, error)) from error
    return made.to(base.unet.device, base.dtype).eval().requires_grad_(False)


_IN_FILES = (  # diffusers' names in the projections, and the files'
    (r"^image_embeds\.", "proj."),
    (r"^ff\.net\.0\.proj\.", "proj.0."),
    (r"^ff\.net\.2\.", "proj.2."),
    (r"\.ln0\.", ".0.norm1."),
    (r"\.ln1\.", ".0.norm2."),
    (r"\.attn\.to_[kv]\.", ".0.to_kv."),
    (r"\.attn\.to_q\.", ".0.to_q."),
    (r"\.attn\.to_out\.0\.", ".0.to_out."),
    (r"\.ff\.0\.", ".1.0."),
    (r"\.ff\.1\.net\.0\.proj\.", ".1.1."),
    (r"\.ff\.1\.net\.2\.", ".1.3."),
)


_FAULT = re.compile(
    r"(?P<how>Missing|Unexpected) key\(s\) in state_dict: \"(?P<key>[^\"]+)\""
    r"|size mismatch for (?P<shape>.+?):"
)


def _fault_in_projection(file: Path, state: Mapping[str, Tensor], error: Exception) -> str:
    """What is wrong with a projection that diffusers refuses: the tensor at fault, by the file's name."""
    unknown = f"{file} is none of the IP-Adapters that are known (plain, plus, full)"
    if isinstance(error, KeyError):
        return f"{unknown}: it lacks image_proj.{error.args[0]}"
    found = _FAULT.search(str(error))
    if found is None:
        return f"{unknown}: {first_sentence(error)}"
    name = found["key"] or found["shape"]
    for ours, theirs in _IN_FILES:
        name = re.sub(ours, theirs, name)
    if "proj.3.weight" in state:
        name = re.sub(r"^norm\.", "proj.3.", name)
    if found["shape"]:
        shape = by(tuple(state[name].shape)) if name in state else "another"
        return (
            f"{file} is damaged: the shape of image_proj.{name} is {shape}, which does not suit the others'"
        )
    how = "lacks" if found["how"] == "Missing" else "holds, beyond what such a file has,"
    return f"{file} is damaged: it {how} image_proj.{name}"


class _Wanted(NamedTuple):
    """The width of what an encoder has to give, and the name of it in the encoder's configuration."""

    width: int
    field: str


def _wanted(state: Mapping[str, Tensor]) -> _Wanted:
    if "proj.weight" in state:
        return _Wanted(state["proj.weight"].shape[1], "projection_dim")
    first = state["proj.0.weight"] if "proj.0.weight" in state else state["proj_in.weight"]
    return _Wanted(first.shape[1], "hidden_size")


def _encoder(
    source: str, file: Path, state: Mapping[str, Tensor], named: str | os.PathLike[str] | None, base: Base
) -> tuple[Any, int]:
    """CLIP's picture encoder, and the side of the pictures that it takes."""
    from transformers import CLIPVisionModelWithProjection

    wanted = _wanted(state)
    folder = _encoder_folder(source, file, wanted, named)
    encoder = load_part(CLIPVisionModelWithProjection, folder, dtype=base.dtype)
    return encoder.to(base.unet.device).requires_grad_(False), int(encoder.config.image_size)


def _encoder_folder(source: str, file: Path, wanted: _Wanted, named: str | os.PathLike[str] | None) -> Path:
    """The first folder with an encoder of the width that is wanted. Raises ValueError where there is none."""
    if named is not None:
        folder = Path(named).expanduser()
        nested = folder / ENCODER
        candidates: Iterator[Path] = iter([folder if (folder / "config.json").is_file() else nested])
    elif Path(source).expanduser().exists():
        beside = file.parent / ENCODER
        candidates = iter([beside, *sorted(file.resolve().parent.parent.glob(f"*/{ENCODER}"))])
    else:
        candidates = _hub_folders(source)
    seen = []
    for folder in candidates:
        if not (folder / "config.json").is_file():
            continue
        width = read_json(folder / "config.json").get(wanted.field)
        if width == wanted.width:
            return folder
        seen.append(f"that of {folder} has {width}")
    raise ValueError(
        f"{file.name} reads a CLIP picture encoder with {wanted.field} {wanted.width}, and"
        f" {', '.join(seen) or 'none was found'}: name its folder with --image-encoder"
    )


def _hub_folders(source: str) -> Iterator[Path]:
    """The encoders' folders of a hub repository, each downloaded when its configuration is asked for."""
    owner, name, *rest = PurePosixPath(source).parts
    for folder in dict.fromkeys(["/".join(rest[:-1]) or ".", *_HUB_FOLDERS]):
        place = str(PurePosixPath(folder, ENCODER))
        try:
            config = find_file(f"{owner}/{name}", f"{place}/config.json", hint="name it with --image-encoder")
            find_file(f"{owner}/{name}", f"{place}/model.safetensors", hint="name it with --image-encoder")
        except ValueError:
            continue
        yield config.parent


def _pixels(pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """Pictures as CLIP reads them, (N, 3, size, size): centre squares, normalised."""
    from PIL import Image
    from transformers import CLIPImageProcessor

    prepare = CLIPImageProcessor(size=size, crop_size=size)
    prepared: Tensor = prepare(
        [Image.fromarray(picture) for picture in pictures], return_tensors="pt"
    ).pixel_values
    return prepared


def _tokens(projection: Any, encoder: Any, pixels: Tensor, base: Base) -> Tensor:
    """(2, n, D): of no picture, and of all pictures one after the other.

    No picture is, to a plain adapter, an embedding of zeros, and to the others what the encoder makes of a
    grey picture (which is zero when it is normalised), as in diffusers.
    """
    from diffusers.models.embeddings import ImageProjection

    pixels = pixels.to(encoder.device, base.dtype)
    with torch.no_grad():
        if isinstance(projection, ImageProjection):
            shown = encoder(pixels).image_embeds
            nothing = torch.zeros_like(shown)
        else:
            shown, nothing = (
                encoder(x, output_hidden_states=True).hidden_states[-2]
                for x in (pixels, torch.zeros_like(pixels))
            )
        rows = [projection(embeds).flatten(0, 1) for embeds in (nothing, shown)]
    return torch.stack(rows)

"""Adapters: control networks on disk, what a file says of itself, and whether it fits a base.

On disk an adapter is the folder that ``diffusers.ControlNetModel.save_pretrained`` writes (``config.json``
and ``diffusion_pytorch_model.safetensors``), so other software loads it as it is. The header of the weight
file carries two descriptions: ours, one JSON object under the key ``controlkit`` (:class:`AdapterInfo`),
and the common ModelSpec keys (``modelspec.*``, specification 1.0.0) that model browsers show.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from controlkit import files
from controlkit.base import BUNDLED as BUNDLED_BASES
from controlkit.base import FAMILY_TITLES, Base
from controlkit.base_parts import family_of
from controlkit.class_labels import check_labels_fit
from controlkit.controlnet import lock
from controlkit.folders import is_pickle, load_part, read_header, read_json, weight_files, write_weights
from controlkit.hub import check_exists, find_folder
from controlkit.kinds import kind_of, t2i_shape
from controlkit.naming import unknown

if TYPE_CHECKING:
    from torch import nn

BUNDLED_ADAPTERS: Mapping[str, Path] = {
    kind: Path(__file__).parent / "tiny" / f"controlnet-{kind}" for kind in ("canny", "openpose", "depth")
}
DEFAULT_ADAPTERS: Mapping[str, Mapping[str, str]] = {
    "sd1": {
        "canny": "lllyasviel/sd-controlnet-canny",
        "openpose": "lllyasviel/sd-controlnet-openpose",
        "depth": "lllyasviel/sd-controlnet-depth",
    },
    "sd2": {
        "canny": "thibaud/controlnet-sd21-canny-diffusers",
        "openpose": "thibaud/controlnet-sd21-openpose-diffusers",
        "depth": "thibaud/controlnet-sd21-depth-diffusers",
    },
    "sdxl": {
        "canny": "diffusers/controlnet-canny-sdxl-1.0",
        "openpose": "thibaud/controlnet-openpose-sdxl-1.0",
        "depth": "diffusers/controlnet-depth-sdxl-1.0",
    },
}
CLASSES: Mapping[str, str] = {
    "ControlNetModel": "diffusers",
    "ControlNetXSAdapter": "diffusers",
    "ControlNetUnionModel": "diffusers",
    "T2IAdapter": "diffusers",
    "LightControl": "controlkit.light",
}
"""The classes of control networks, and the modules that have them."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
METADATA_KEY = "controlkit"
FORMAT_VERSION = 1

_HUB_FILES = (
    "config.json",
    "diffusion_pytorch_model*.safetensors",
    "diffusion_pytorch_model*.bin",
    "diffusion_pytorch_model*.index.*json",
)
_PLACES: Mapping[str, Any] = {"what": "adapter", "top_file": "config.json", "bundled": BUNDLED_ADAPTERS}
_SIZES = ("in_channels", "block_out_channels", "cross_attention_dim", "layers_per_block", "down_block_types")
_SPEC_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}


@dataclass(frozen=True)
class MapSpec:
    """What the map of an adapter is. ``MAPS`` has the standard ones.

    ``kind``: "canny", "openpose", "depth" or any other word; "" when a file does not say. ``range``: lowest
    and highest value of ``controlnet_cond``. ``polarity``: what bright means, in words. ``thresholds`` and
    ``draw_style``: how the map was made, where that applies. ``channels``: of the hint.
    """

    kind: str = ""
    range: tuple[float, float] = (0.0, 1.0)
    polarity: str = ""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    draw_style: str = ""
    channels: int = 3


@dataclass(frozen=True)
class AdapterInfo:
    """What an adapter says of itself.

    ``family`` and ``prediction_type`` are those of the base it was trained on, named by ``base``;
    ``resolution`` is in pixels (0 when unknown). ``training`` says how: recipe, seed, steps, data, scores,
    as JSON values. ``title`` is for people.
    """

    map: MapSpec = field(default_factory=MapSpec)
    family: str = ""
    prediction_type: str = ""
    base: str = ""
    resolution: int = 0
    title: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Adapter:
    """A loaded adapter: the control network, what it says of itself, and the name it was asked for by."""

    controlnet: Any
    info: AdapterInfo
    name: str


MAPS: Mapping[str, MapSpec] = {
    "canny": MapSpec("canny", polarity="white-on-black", thresholds={"low": 100, "high": 200}),
    "openpose": MapSpec("openpose", polarity="openpose-18", draw_style="v1.1"),
    "depth": MapSpec("depth", polarity="near-is-white"),
}


def default_adapter(kind: str, base: Base) -> str:
    """The adapter to use for a kind of map when none is named: bundled for a bundled base, else a hub id.

    Raises ValueError for a kind that has none.
    """
    names = {name: name for name in BUNDLED_ADAPTERS} if base.name in BUNDLED_BASES else None
    choices = names or DEFAULT_ADAPTERS[base.family]
    if kind not in choices:
        raise unknown(f"control for the base {base.name}", kind, choices)
    return choices[kind]


def load_adapter(
    name_or_path: str,
    *,
    base: Base,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Adapter:
    """Load an adapter that fits ``base``: a bundled name, a folder, or a hub id. Its network comes locked.

    ``device`` and ``dtype`` are the base's unless given. Warns when the adapter was trained for another
    prediction type than the base's.

    Raises ValueError, one line within about 5 seconds, for a name that leads nowhere, a folder that holds
    something else, damaged or non-finite weights, or a network whose sizes are not the base's (both are
    named).
    """
    folder = find_folder(name_or_path, complete=_is_complete, files=_HUB_FILES, **_PLACES)
    config = _adapter_config(folder)
    check_sizes(config, base, name=name_or_path)  # before minutes of loading
    info = read_info(folder)
    if info.prediction_type not in ("", base.prediction_type):
        warnings.warn(
            f"adapter {name_or_path} was trained for {info.prediction_type} and the base {base.name} predicts"
            f" {base.prediction_type}: it may follow its map less well",
            stacklevel=2,
        )
    if not info.map.kind:
        info = replace(info, map=_published_map(name_or_path) or info.map)
    controlnet = _load_network(folder, config["_class_name"], dtype=dtype or base.dtype)
    return Adapter(lock(controlnet).to(device or base.device), info, name_or_path)


def check_adapter(name_or_path: str) -> None:
    """Raise `load_adapter`'s ValueError for a name that leads nowhere, without loading or downloading."""
    check_exists(name_or_path, **_PLACES)


def _is_complete(folder: Path) -> bool:
    """Whether a cached copy has all of its files."""
    try:
        return all(file.is_file() for file in weight_files(folder))
    except ValueError:
        return False


def read_info(folder: Path) -> AdapterInfo:
    """What the adapter in ``folder`` says of itself; a file by other software leaves all but the structure
    open.

    Raises ValueError naming the file if its header or its description cannot be read.
    """
    config = read_json(folder / "config.json")
    file = weight_files(folder)[0]
    header = {} if is_pickle(file) else read_header(file)
    text = header.get("__metadata__", {}).get(METADATA_KEY)
    if text is None:
        return AdapterInfo(
            map=MapSpec(channels=config.get("conditioning_channels") or config.get("in_channels", 3)),
            family=family_of(config),
        )
    try:
        return _info_from_json(json.loads(text))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: its {METADATA_KEY} description cannot be read: {error}") from error


def save_adapter(
    controlnet: Any,
    folder: str | Path,
    *,
    info: AdapterInfo,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an adapter folder, all of it or nothing. The same network and ``info`` give the same bytes.

    The network itself keeps its precision. A folder that already holds an adapter is replaced as a whole.

    Raises ValueError if the folder holds something else or cannot be written, or if a weight is not finite
    (in ``dtype``).
    """
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()):
        try:
            _adapter_config(target)
        except ValueError as error:
            raise ValueError(f"cannot save the adapter over what is there: {error}") from error
    tensors = {
        key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in controlnet.state_dict().items()
    }
    _check_finite(tensors, f"cannot save the adapter as {str(dtype).removeprefix('torch.')}")
    config = json.loads(controlnet.to_json_string())
    config.pop("_name_or_path", None)  # the path on the machine that trained it
    with files.replace_folder(target) as temporary:
        files.write_json(temporary / "config.json", config)
        write_weights(temporary / WEIGHTS_NAME, tensors, _metadata(info))


def check_fits(controlnet: nn.Module, base: Base) -> None:
    """Raise ValueError, one line with both networks' sizes, unless ``controlnet`` fits this base's U-Net."""
    network: Any = controlnet
    if kind_of(network).hooks:
        from controlkit import lllite

        return lllite.check_fits(network, base.unet, base=base.name)
    config = {**network.config, "_class_name": kind_of(network).class_name}
    check_sizes(config, base, name="control network")
    check_labels_fit(network, base)


def check_sizes(config: Mapping[str, Any], base: Base, *, name: str) -> None:
    """Raise ValueError, one line with both networks' sizes, unless a network of this config fits."""
    class_name = config.get("_class_name", "ControlNetModel")
    unet = base.unet.config
    # A base that fills holes sees more besides the latents, and its control networks do not.
    own = {**{key: unet[key] for key in _SIZES}, "in_channels": unet.out_channels}
    if class_name == "ControlNetXSAdapter":
        own = {key: own[key] for key in ("cross_attention_dim", "down_block_types")}
        own["base_block_out_channels"] = unet.block_out_channels
    elif class_name == "LightControl":
        own = {"block_out_channels": unet.block_out_channels}
    elif class_name == "T2IAdapter":
        own = _t2i_sizes(config, unet)
    different = [key for key in own if _plain(config.get(key)) != _plain(own[key])]
    structured = class_name in ("ControlNetModel", "ControlNetUnionModel")
    family = family_of(config) if structured else base.family
    if not different and family == base.family:
        return
    adapter_sizes = ", ".join(f"{key} {_plain(config.get(key))}" for key in different) or "other attention"
    base_sizes = ", ".join(f"{key} {_plain(own[key])}" for key in different) or "its own"
    whose = f"for {FAMILY_TITLES[family]} " if structured else "for another one "
    raise ValueError(
        f"{name} does not fit the base {base.name}: it is {whose}({adapter_sizes}),"
        f" the base is {FAMILY_TITLES[base.family]} ({base_sizes})"
    )


def _t2i_sizes(config: Mapping[str, Any], unet: Any) -> dict[str, Any]:
    """What a T2I-Adapter's configuration has for this U-Net."""
    shape = t2i_shape(unet)
    if config.get("adapter_type") == "light_adapter" and shape.adapter_type == "full_adapter":
        return {"channels": shape.channels[:-1], "adapter_type": "light_adapter"}
    return {"channels": shape.channels, "adapter_type": shape.adapter_type}


def _plain(value: Any) -> Any:
    """A configuration's value as it prints: lists and tuples are the same, and written with slashes."""
    return "/".join(map(str, value)) if isinstance(value, list | tuple) else value


def _adapter_config(folder: Path) -> dict[str, Any]:
    """The network's configuration. Raises ValueError if the folder holds something else."""
    if not (folder / "config.json").is_file():
        inner = next(
            (path for path in sorted(folder.glob("*/config.json")) if "controlnet" in str(path)), None
        )
        hint = f" (did you mean {inner.parent}?)" if inner else ""
        raise ValueError(f"{folder} is not an adapter folder: it has no config.json{hint}")
    config = read_json(folder / "config.json")
    if config.get("_class_name") not in CLASSES:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, not a {' or '.join(CLASSES)}")
    return config


def _published_map(repo_id: str) -> MapSpec | None:
    """The map of a default adapter, whose file does not describe it; None for any other name."""
    kinds = {name: kind for names in DEFAULT_ADAPTERS.values() for kind, name in names.items()}
    return MAPS[kinds[repo_id]] if repo_id in kinds else None


def _load_network(folder: Path, class_name: str, *, dtype: torch.dtype) -> Any:
    module = importlib.import_module(CLASSES[class_name])
    controlnet = load_part(getattr(module, class_name), folder, dtype=dtype)
    _check_finite(controlnet.state_dict(), str(folder))
    return controlnet


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{where}: the weights in {key} are not all finite numbers")


def _metadata(info: AdapterInfo) -> dict[str, str]:
    """The weight file's header entries: values must be strings."""
    described = {"version": FORMAT_VERSION, **asdict(info)}
    entries = {
        "format": "pt",
        METADATA_KEY: json.dumps(described, sort_keys=True, ensure_ascii=False, allow_nan=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_SPEC_ARCHITECTURES.get(info.family, 'unknown')}/controlnet",
        "modelspec.implementation": "diffusers",
        "modelspec.title": info.title or f"ControlNet {info.map.kind}".strip(),
        "modelspec.preprocessor": info.map.kind,
        "modelspec.prediction_type": info.prediction_type.removesuffix("_prediction"),
        "modelspec.resolution": f"{info.resolution}x{info.resolution}" if info.resolution else "",
    }
    return {key: value for key, value in entries.items() if value}


def _info_from_json(described: Mapping[str, Any]) -> AdapterInfo:
    """An AdapterInfo from its JSON; keys that a later version added are left out."""
    known = {key: described[key] for key in _names(AdapterInfo) if key in described}
    spec = known.pop("map", {})
    low, high = spec.get("range", MapSpec.range)
    map_spec = MapSpec(**{key: spec[key] for key in _names(MapSpec) if key in spec} | {"range": (low, high)})
    return AdapterInfo(map=map_spec, **known)


def _names(cls: type) -> list[str]:
    return [entry.name for entry in fields(cls)]

"""What an adapter file says of itself: our description of it, and the header entries that hold it.

The header of the weight file carries two descriptions: ours, one JSON object under the key ``controlkit``
(`AdapterInfo`), and the common ModelSpec keys (``modelspec.*``, specification 1.0.0) of model browsers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from controlkit.formats.hashing import HASH_KEY, NO_HASH

METADATA_KEY = "controlkit"
FORMAT_VERSION = 1
STRUCTURE_KEY = "structure"  # within our object: the network's configuration, for a file that stands alone

_SPEC_FAMILIES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_SPEC_SOFTWARE = {"diffusers": "diffusers", "original": "https://github.com/lllyasviel/ControlNet"}

INPAINT = "inpaint"
"""The kind of control whose map is made of the picture to start from and its mask."""
ENCODER = "encoder_sha256"
"""Where ``training`` says which encoder an adapter was copied from: `controlkit.transfer.encoder_digest`."""


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


def kinds_at_once(spec: MapSpec, *, is_union: bool) -> list[str]:
    """The kinds of maps that are one input of a network, in their order; [] where it takes a map at a time.

    ``is_union``: whether it is a ControlNet-Union, which knows several kinds and takes each by itself.
    """
    kinds = spec.kind.split(" + ")
    stacked = len(kinds) > 1 and spec.channels in (len(kinds), 3 * len(kinds))
    return kinds if stacked and not is_union else []


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


MAPS: Mapping[str, MapSpec] = {
    "canny": MapSpec("canny", polarity="white-on-black", thresholds={"low": 100, "high": 200}),
    "openpose": MapSpec("openpose", polarity="openpose-18", draw_style="v1.1"),
    "depth": MapSpec("depth", polarity="near-is-white"),
}


def header_entries(
    info: AdapterInfo,
    *,
    kind: str = "controlnet",
    layout: str = "diffusers",
    structure: Mapping[str, Any] | None = None,
    date: str = "",
) -> dict[str, str]:
    """The weight file's header entries; values must be strings.

    ``kind``: of network, the second half of ModelSpec's architecture. ``layout``: whose names the tensors
    have. ``structure``: the network's configuration, for a file without a config.json beside it. ``date``:
    ISO 8601, written only if given, so that the same network gives the same bytes.
    """
    described: dict[str, Any] = {"version": FORMAT_VERSION, **asdict(info)}
    if structure:
        described[STRUCTURE_KEY] = dict(structure)
    entries = {
        "format": "pt",
        METADATA_KEY: json.dumps(described, sort_keys=True, ensure_ascii=False, allow_nan=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_SPEC_FAMILIES.get(info.family, 'unknown')}/{kind}",
        "modelspec.implementation": _SPEC_SOFTWARE[layout],
        "modelspec.title": info.title or f"ControlNet {info.map.kind}".strip(),
        "modelspec.preprocessor": info.map.kind,
        "modelspec.prediction_type": info.prediction_type.removesuffix("_prediction"),
        "modelspec.resolution": f"{info.resolution}x{info.resolution}" if info.resolution else "",
        "modelspec.usage_hint": map_in_words(info.map),
        "modelspec.date": date,
        HASH_KEY: NO_HASH,  # folders.write_weights puts the true one in its place
    }
    return {key: value for key, value in entries.items() if value}


def read_description(metadata: Mapping[str, str], where: object) -> tuple[AdapterInfo | None, dict[str, Any]]:
    """Our description in a header and the configuration in it; None and {} if there is none.

    Raises ValueError naming the file, ``where``, if it cannot be read.
    """
    text = metadata.get(METADATA_KEY)
    if text is None or not text.lstrip().startswith("{"):  # somebody else's entry of that name
        return None, {}
    try:
        described = json.loads(text)
        info = _info_from_json(described)
        _check_types(info)
        return info, dict(described.get(STRUCTURE_KEY) or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its {METADATA_KEY} description cannot be read: {error}") from error


def map_in_words(spec: MapSpec) -> str:
    """A map's kind and how it is made, as "canny: white-on-black, high 200, low 100"; "" if unknown."""
    if not spec.kind:
        return ""
    low, high = spec.range
    told = [
        spec.polarity,
        *(f"{name} {value}" for name, value in sorted(spec.thresholds.items())),
        f"drawn as {spec.draw_style}" if spec.draw_style else "",
        f"range {low:g} to {high:g}" if (low, high) != MapSpec.range else "",
        f"{spec.channels} channels" if spec.channels != MapSpec.channels else "",
    ]
    return f"{spec.kind}: {', '.join(filter(None, told))}".removesuffix(": ")


def _info_from_json(described: Mapping[str, Any]) -> AdapterInfo:
    """An AdapterInfo from its JSON; keys that a later version added are left out."""
    known = {key: described[key] for key in _names(AdapterInfo) if key in described}
    spec = known.pop("map", {})
    low, high = spec.get("range", MapSpec.range)
    map_spec = MapSpec(**{key: spec[key] for key in _names(MapSpec) if key in spec} | {"range": (low, high)})
    return AdapterInfo(map=map_spec, **known)


def _check_types(info: AdapterInfo) -> None:
    """Raise TypeError for a field of another type than ours."""
    for thing, default in ((info, AdapterInfo()), (info.map, MapSpec())):
        for name in _names(type(thing)):
            wanted = type(getattr(default, name))
            value = getattr(thing, name)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise TypeError(f"{name} must be a {wanted.__name__}")
    if info.map.channels < 1:
        raise TypeError("channels must be 1 or more")
    if not all(isinstance(value, int | float) for value in info.map.range):
        raise TypeError("range must be two numbers")


def _names(cls: type) -> list[str]:
    return [entry.name for entry in fields(cls)]

"""What an adapter file says of itself: our description of it, and the header entries that hold it.

The header of the weight file carries two descriptions: ours, one JSON object under the key ``controlkit``
(`AdapterInfo`), and the common ModelSpec keys (``modelspec.*``, specification 1.0.0) of model browsers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from controlkit.formats.hashing import HASH_KEY, NO_HASH

METADATA_KEY = "controlkit"
FORMAT_VERSION = 1
STRUCTURE_KEY = "structure"  # within our object: the network's configuration, for a file that stands alone

_SPEC_FAMILIES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
}
_SPEC_V = "stable-diffusion-v2-768-v"  # of an SD2 that predicts v
_SPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
_SPEC = "modelspec."
_SPEC_OF_FILE = ("sai_model_spec", "architecture", "implementation", "hash_sha256")  # new with each file
_SPEC_OF_INFO = ("title", "preprocessor", "prediction_type", "resolution")  # kept in fields of their own
_SPEC_OURS = ("usage_hint", "date")  # what we write ourselves, and keep of others
_SPEC_SOFTWARE = {"diffusers": "diffusers", "original": "https://github.com/lllyasviel/ControlNet"}

_KINDS = (  # words of others that mean the kind of map; what else they write is kept as it is
    *("canny", "openpose", "depth", "softedge", "scribble", "lineart", "lineart_anime", "mlsd", "normal"),
    *("normalbae", "seg", "inpaint", "tile", "shuffle", "ip2p"),
)

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
    as JSON values. ``title`` is for people. ``about``: what else its header says by ModelSpec's names, such
    as "author" and "license".
    """

    map: MapSpec = field(default_factory=MapSpec)
    family: str = ""
    prediction_type: str = ""
    base: str = ""
    resolution: int = 0
    title: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


MAPS: Mapping[str, MapSpec] = {
    "canny": MapSpec("canny", polarity="white-on-black", thresholds={"low": 100, "high": 200}),
    "openpose": MapSpec("openpose", polarity="openpose-18", draw_style="v1.1"),
    "depth": MapSpec("depth", polarity="near-is-white"),
}


def told_base(name: str) -> str:
    """A base's name for a file that others read: of a folder or file its name alone, not where it lies."""
    place = os.path.expanduser(name)
    return os.path.basename(os.path.abspath(place)) if os.path.exists(place) else name


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
    del described["about"]  # it has entries of its own
    of_v = info.family == "sd2" and info.prediction_type == "v_prediction"
    architecture = _SPEC_V if of_v else _SPEC_FAMILIES.get(info.family, "unknown")
    if structure:
        described[STRUCTURE_KEY] = dict(structure)
    entries = {
        "format": "pt",
        METADATA_KEY: json.dumps(described, sort_keys=True, ensure_ascii=False, allow_nan=False),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/{kind}",
        "modelspec.implementation": _SPEC_SOFTWARE[layout],
        "modelspec.title": info.title or f"ControlNet {info.map.kind}".strip(),
        "modelspec.preprocessor": info.map.kind,
        "modelspec.prediction_type": info.prediction_type.removesuffix("_prediction"),
        "modelspec.resolution": f"{info.resolution}x{info.resolution}" if info.resolution else "",
        "modelspec.usage_hint": map_in_words(info.map),
        "modelspec.date": date,
        **{f"{_SPEC}{name}": text for name, text in info.about.items()},
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
        info = replace(_info_from_json(described), about=_about(metadata, but=_SPEC_OURS))
        _check_types(info)
        return info, dict(described.get(STRUCTURE_KEY) or {})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: its {METADATA_KEY} description cannot be read: {error}") from error


def described_by_others(metadata: Mapping[str, str], *, channels: int, family: str) -> AdapterInfo:
    """What a header without our description says in ModelSpec's entries, which may be nothing.

    ``channels`` of its map and its ``family`` are told by the network.
    """
    said = {name: metadata.get(f"{_SPEC}{name}", "").strip() for name in _SPEC_OF_INFO}
    kind, about = said["preprocessor"].lower(), _about(metadata)
    if kind not in _KINDS:
        kind, about = "", {**about, **({"preprocessor": kind} if kind else {})}
    sides = re.fullmatch(r"(\d{2,5})(?:x\1)?", said["resolution"])
    return AdapterInfo(
        map=MapSpec(kind, channels=channels),
        family=family,
        prediction_type=_SPEC_PREDICTIONS.get(said["prediction_type"].lower(), ""),
        resolution=int(sides[1]) if sides else 0,
        title=said["title"],
        about=about,
    )


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


def _about(metadata: Mapping[str, str], *, but: Collection[str] = ()) -> dict[str, str]:
    """What ModelSpec's entries say that has no field of its own."""
    known = {*_SPEC_OF_FILE, *_SPEC_OF_INFO, *but}
    said = {key.removeprefix(_SPEC): text for key, text in metadata.items() if key.startswith(_SPEC)}
    return {name: text for name, text in sorted(said.items()) if name not in known and text.strip()}


def _info_from_json(described: Mapping[str, Any]) -> AdapterInfo:
    """An AdapterInfo from its JSON; keys that a later version added are left out."""
    known = {key: described[key] for key in _names(AdapterInfo) if key in described and key != "about"}
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

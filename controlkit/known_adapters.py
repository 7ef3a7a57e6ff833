"""Adapters on the hub that are known by name: what each is for, what its map is, and under which licence.

Of a family's adapters for a kind of map the first is the one that is used when none is named. What stands
here was read on the models' pages; a revision stands only where such a page, or code that others download by,
names that commit.
Needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from controlkit.checkpoints.kept import checkpoint_file, configs
from controlkit.families import ALIASES, BUNDLED, FAMILY_TITLES, family_of, short_name
from controlkit.folders import read_json
from controlkit.formats.description import MAPS as STANDARD_MAPS
from controlkit.formats.description import MapSpec

_POSE = replace(STANDARD_MAPS["openpose"], draw_style="")  # where nobody says how it was drawn
_INPAINT = MapSpec("inpaint", range=(-1.0, 1.0), polarity="hole-is-minus-one")
_MAPS: Mapping[str, MapSpec] = {
    **STANDARD_MAPS,
    "softedge": MapSpec("softedge", polarity="white-on-black"),
    "scribble": MapSpec("scribble", polarity="white-on-black"),
    "lineart": MapSpec("lineart", polarity="white-on-black"),
    "lineart_anime": MapSpec("lineart_anime", polarity="white-on-black"),
    "mlsd": MapSpec("mlsd", polarity="white-on-black"),
    "normalbae": MapSpec("normalbae", polarity="red-left green-up blue-to-viewer"),
    "seg": MapSpec("seg", polarity="colours-of-ade20k"),
    "inpaint": _INPAINT,
    "tile": MapSpec("tile", polarity="the-picture"),
    "shuffle": MapSpec("shuffle", polarity="the-picture"),
    "ip2p": MapSpec("ip2p", polarity="the-picture"),
}
_SAME_AS: Mapping[str, str] = {  # preprocessors of one kind of map
    **dict.fromkeys(("hed", "pidinet"), "softedge"),
    **dict.fromkeys(("leres", "midas", "zoe"), "depth"),
    "lineart_standard": "lineart",
    "normal": "normalbae",  # of the same colours
}
_ALIAS_FAMILIES: Mapping[str, str] = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}


@dataclass(frozen=True)
class KnownAdapter:
    """One adapter of the table.

    ``name``: its hub id. ``family``: of the bases that it is for. ``network``: a kind of
    `formats.recognise.KINDS`. ``licence``: as its page names it. ``revision``: a full commit, or "" for the
    newest. ``format``: "diffusers" is a folder. ``note``: what else a user should know.
    """

    name: str
    family: str
    map: MapSpec
    licence: str
    network: str = "controlnet"
    revision: str = ""
    format: str = "diffusers"
    note: str = ""


def _sd1(
    name: str, kind: str, note: str = "", *, revision: str = "", spec: MapSpec | None = None
) -> KnownAdapter:
    of_map = spec or _MAPS[kind]
    return KnownAdapter(f"lllyasviel/{name}", "sd1", of_map, "openrail", revision=revision, note=note)


def _sd2(kind: str, revision: str, spec: MapSpec) -> KnownAdapter:
    name = f"thibaud/controlnet-sd21-{kind}-diffusers"
    return KnownAdapter(name, "sd2", spec, "other", revision=revision, note="licence: its preprocessor's")


def _t2i(name: str, spec: MapSpec, revision: str = "") -> KnownAdapter:
    return KnownAdapter(
        f"TencentARC/t2i-adapter-{name}-sdxl-1.0", "sdxl", spec, "apache-2.0", "t2i-adapter", revision
    )


_V11_EDGES = "v1.1 comes first: trained with random thresholds, so that it fits ours at any setting"
_V11_POSE = "v1.1 comes first: its drawing style is the one that our poses are drawn in"
_V11_DEPTH = "v1.1 comes first: trained on MiDaS, LeReS and Zoe depths, and so on more than one estimator's"
_V11_LINES = "v1.1 comes first: white on black, as our preprocessors draw"

KNOWN: tuple[KnownAdapter, ...] = (
    _sd1("control_v11p_sd15_canny", "canny", _V11_EDGES, revision="115a470d547982438f70198e353a921996e2e819"),
    _sd1("sd-controlnet-canny", "canny", "v1.0", revision="7f2f69197050967007f6bbd23ab5e52f0384162a"),
    _sd1(
        "control_v11p_sd15_openpose",
        "openpose",
        _V11_POSE,
        revision="db722b9b8571c5cf3b1353d0f4d887060b8ae678",
    ),
    _sd1(
        "sd-controlnet-openpose",
        "openpose",
        "v1.0",
        spec=replace(_POSE, draw_style="v1.0"),
        revision="df796456519d1ac5dbe674caa0653fcc9673bca8",
    ),
    _sd1(
        "control_v11f1p_sd15_depth", "depth", _V11_DEPTH, revision="539f99181d33db39cf1af2e517cd8056785f0a87"
    ),
    _sd1("sd-controlnet-depth", "depth", "v1.0", revision="35e42a3ea49845b3c76f202f145f257b9fb1b7d4"),
    _sd1("control_v11p_sd15_softedge", "softedge", revision="b5bcad0c48e9b12f091968cf5eadbb89402d6bc9"),
    _sd1("control_v11p_sd15_scribble", "scribble", _V11_LINES),
    _sd1("sd-controlnet-scribble", "scribble", "v1.0", revision="864edcd5ccc6ee2695eeebea5b4512100c83e7b3"),
    _sd1("control_v11p_sd15_lineart", "lineart", revision="8a158f547e031c5b8fbca19ead09a74767ff4db0"),
    _sd1("control_v11p_sd15s2_lineart_anime", "lineart_anime"),
    _sd1("control_v11p_sd15_mlsd", "mlsd", _V11_LINES),
    _sd1("sd-controlnet-mlsd", "mlsd", "v1.0"),
    _sd1("control_v11p_sd15_normalbae", "normalbae", revision="cb7296e6587a219068e9d65864e38729cd862aa8"),
    _sd1("control_v11p_sd15_seg", "seg", revision="210682041b41097834006a910b8773f423343900"),
    _sd1(
        "control_v11f1e_sd15_tile",
        "tile",
        "the picture itself, small or blurred",
        revision="3f877705c37010b7221c3d10743307d6b5b6efac",
    ),
    KnownAdapter("TencentARC/t2iadapter_depth_sd15v2", "sd1", _MAPS["depth"], "apache-2.0", "t2i-adapter"),
    _sd1(
        "control_v11p_sd15_inpaint",
        "inpaint",
        "needs a hole: --from PICTURE --mask MASK",
        revision="c96e03a807e64135568ba8aecb66b3a306ec73bd",
    ),
    _sd1(
        "control_v11e_sd15_shuffle",
        "shuffle",
        "acts on the picture as a whole",
        revision="8cf275970f984acf5cc0fdfa537db8be098936a3",
    ),
    _sd1(
        "control_v11e_sd15_ip2p",
        "ip2p",
        "the prompt is an instruction",
        revision="1fed6ebb905c61929a60514830eb05b039969d6d",
    ),
    _sd2("canny", "9c3106f9154d708550f2c83d231fbd648da7b670", _MAPS["canny"]),
    _sd2("openpose", "70ba4e452ee9e331e006340744a1ed150262ca98", _POSE),
    _sd2("depth", "d09d674d3cc5e9ccbcb85a64fa6841e07582ebd6", _MAPS["depth"]),
    KnownAdapter(
        "diffusers/controlnet-canny-sdxl-1.0",
        "sdxl",
        _MAPS["canny"],
        "openrail++",
        revision="e04b87383a6ed517185cfa46b5b4f39a0b25c68f",
    ),
    KnownAdapter(
        "xinsir/controlnet-canny-sdxl-1.0",
        "sdxl",
        _MAPS["canny"],
        "apache-2.0",
        revision="e5a0a3bf724a94427aa9cce75012c4a012f8b549",
    ),
    _t2i("canny", _MAPS["canny"], "c36ec1b4c025488a5b03d3af2399ddc3bf39f155"),
    KnownAdapter("thibaud/controlnet-openpose-sdxl-1.0", "sdxl", _POSE, "other"),
    KnownAdapter(
        "xinsir/controlnet-openpose-sdxl-1.0",
        "sdxl",
        replace(_POSE, draw_style="xinsir"),
        "apache-2.0",
        revision="23f966cd5cfdd3f7729c903e243d87152162d2b7",
        note="trained on thicker lines than ours",
    ),
    _t2i("openpose", _POSE, "f90998885600ed3627cedc305316edff47b8b03f"),
    KnownAdapter(
        "diffusers/controlnet-depth-sdxl-1.0",
        "sdxl",
        _MAPS["depth"],
        "openrail++",
        revision="26144a77791daea774e4761cb6e5bf19d11c822f",
    ),
    KnownAdapter("xinsir/controlnet-depth-sdxl-1.0", "sdxl", _MAPS["depth"], "apache-2.0"),
    _t2i("depth-midas", _MAPS["depth"], "c3307da33f4e7f0f9b30a92c3161c75897cff190"),
    KnownAdapter(
        "SargeZT/controlnet-sd-xl-1.0-softedge-dexined/controlnet-sd-xl-1.0-softedge-dexined.safetensors",
        "sdxl",
        _MAPS["softedge"],
        "creativeml-openrail-m",
        format="single",
        note="trained on DexiNed edges, which none of our preprocessors draws",
    ),
    KnownAdapter(
        "xinsir/controlnet-scribble-sdxl-1.0",
        "sdxl",
        _MAPS["scribble"],
        "apache-2.0",
        revision="d8ad966a3f33d9ba6a46ad663d86edb6cd779807",
    ),
    _t2i("sketch", _MAPS["scribble"]),
    _t2i("lineart", _MAPS["lineart"], "5f1f33b049b96fa599f0aa3d77b31dbef5095e97"),
    KnownAdapter(
        "xinsir/controlnet-tile-sdxl-1.0",
        "sdxl",
        _MAPS["tile"],
        "apache-2.0",
        revision="1ae8d9529efe58f7362a987363ff86a7904dc84f",
    ),
    KnownAdapter(
        "xinsir/controlnet-union-sdxl-1.0",
        "sdxl",
        MapSpec(),
        "apache-2.0",
        "controlnet-union",
        revision="801a4a3fa3d4c936f4feea95b98607bc6726f80c",
        note="one network for several kinds of maps",
    ),
)


def same_kind(kind: str) -> str:
    """The kind of map that a preprocessor makes: "depth" of "midas"."""
    return _SAME_AS.get(kind, kind)


def learned_other(name: str, learned: str, kind: str) -> str:
    """What is to be said of an adapter that is given maps of a kind; "" where it learned to follow that kind,
    one of several ("canny + depth"), or nobody knows which ("").
    """
    if not learned or same_kind(kind) in map(same_kind, learned.split(" + ")):
        return ""
    return f"adapter {name} learned to follow {learned} maps, not {kind}"


def kinds_known() -> list[str]:
    """The kinds of maps for which a family has an adapter that is used when none is named."""
    return sorted({kind for family in _ALIAS_FAMILIES.values() for kind in defaults(family) if kind})


def defaults(family: str) -> dict[str, KnownAdapter]:
    """A family's adapters that are used when none is named, by the kind of map: ControlNets alone.

    An inpainting one is always named: it follows no map of its own.
    """
    chosen: dict[str, KnownAdapter] = {}
    for known in KNOWN:
        usable = known.network == "controlnet" and known.format == "diffusers" and known.map != _INPAINT
        if known.family == family and usable:
            chosen.setdefault(known.map.kind, known)
    return chosen


def find(name: str) -> KnownAdapter | None:
    """The adapter of the table with this hub id; None for any other name."""
    return next((known for known in KNOWN if known.name == name), None)


def revision_of(name: str) -> str | None:
    """The commit at which an adapter of the table was looked at; None for the newest."""
    known = find(name)
    return known.revision or None if known else None


def family_of_base(name: str) -> str:
    """The family of a base, as far as it can be told without a download: "" where it cannot.

    ``name``: of `load_base`. A short name is known here; a folder, a bundled base or a cached one says it in
    its U-Net's configuration, a checkpoint in its shapes (or ValueError says why it is none).
    """
    if short_name(name) in _ALIAS_FAMILIES:
        return _ALIAS_FAMILIES[short_name(name)]
    file = checkpoint_file(name)
    if file is not None:
        return family_of(configs(file)[0])
    folder = Path(os.path.expanduser(str(BUNDLED.get(name, name))))
    config: str | Path | None = folder / "unet" / "config.json"
    if not os.path.isfile(str(config)):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(ALIASES.get(name, name), "unet/config.json")
        except HFValidationError:  # no hub id: who loads it will say so
            return ""
        config = cached if isinstance(cached, str) else None
    return family_of(read_json(Path(config))) if config else ""


def check(kind: str, adapter: str, base: str) -> None:
    """Raise ValueError, before anything is loaded or downloaded, where an adapter cannot fit a base.

    ``adapter``: a name, or "" for the table's own. That is a kind that the base's family has none for, and an
    adapter of the table that is for another family; the message names what would fit.
    """
    family = "" if base in BUNDLED else family_of_base(base)
    if not family:
        return
    ours = defaults(family)
    fitting = ours.get(same_kind(kind))
    if not adapter and fitting is None:
        others = [one for one in KNOWN if (one.family, one.map.kind) == (family, same_kind(kind))]
        if others:  # of another kind of network, or with a map of its own
            named = ", ".join(f"--adapter {kind}={one.name}" for one in others)
            raise ValueError(
                f"no {kind} adapter for {FAMILY_TITLES[family]} is used unless it is named (the base is"
                f" {base}): there is {named}"
            )
        raise ValueError(
            f"no {kind} adapter for {FAMILY_TITLES[family]} is known (the base is {base}): there are"
            f" {', '.join(ours)}; or name one of your own: --adapter {kind}=NAME"
        )
    known = find(adapter)
    if known is not None and known.family != family:
        instead = f"; use {fitting.name}" if fitting else f"; it has {', '.join(ours)}"
        raise ValueError(
            f"the adapter {adapter} is for {FAMILY_TITLES[known.family]} and the base {base} is"
            f" {FAMILY_TITLES[family]}{instead}"
        )

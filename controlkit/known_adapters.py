"""Well-known adapters of the hub: which kind of map each follows, on which family, under which licence.

`controlkit models` prints this table, and `default_for` chooses from it where `generate` is given a kind of
map alone. A revision is a commit of the repository that holds its weights, as its public history shows;
where none is given, the newest is taken. Licences are those of the repositories' cards, as the hub shows
them; "" where that was not to be seen. What the maps look like: `formats.description.MAPS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from controlkit.naming import unknown

FAMILY_NAMES = {"sd1": "SD 1.5", "sd2": "SD 2.1", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Known:
    """One adapter: a hub id, and a revision to pin. default: taken for its kind where none is named."""

    name: str
    family: str
    kind: str
    network: str = "controlnet"
    licence: str = ""
    revision: str = ""
    default: bool = False
    note: str = ""


def _v11(kind: str, name: str, revision: str = "", note: str = "") -> Known:
    return Known(f"lllyasviel/{name}", "sd1", kind, "controlnet", "openrail", revision, True, note)


def _v10(kind: str, name: str, note: str = "") -> Known:
    return Known(f"lllyasviel/sd-controlnet-{name}", "sd1", kind, "controlnet", "openrail", note=note)


def _sd21(kind: str, name: str, revision: str = "", *, default: bool = True, note: str = "") -> Known:
    full = f"thibaud/controlnet-sd21-{name}-diffusers"
    return Known(full, "sd2", kind, "controlnet", "other", revision, default, note)


def _t2i(family: str, kind: str, name: str, note: str = "") -> Known:
    return Known(f"TencentARC/{name}", family, kind, "t2i-adapter", "apache-2.0", note=note)


KNOWN: tuple[Known, ...] = (
    # ControlNet 1.1 for SD 1.5: its poses are drawn as `preprocess openpose` draws them.
    _v11("canny", "control_v11p_sd15_canny", "115a470d547982438f70198e353a921996e2e819"),
    _v11("openpose", "control_v11p_sd15_openpose", "db722b9b8571c5cf3b1353d0f4d887060b8ae678"),
    _v11("depth", "control_v11f1p_sd15_depth", note="the one without f1 was withdrawn"),
    _v11("softedge", "control_v11p_sd15_softedge"),
    _v11("scribble", "control_v11p_sd15_scribble"),
    _v11("lineart", "control_v11p_sd15_lineart"),
    _v11("lineart_anime", "control_v11p_sd15s2_lineart_anime"),
    _v11("mlsd", "control_v11p_sd15_mlsd"),
    _v11("normal", "control_v11p_sd15_normalbae", note="blue to the viewer, red left, green up"),
    _v11("seg", "control_v11p_sd15_seg", note="colours of ADE20K and COCO"),
    _v11("inpaint", "control_v11p_sd15_inpaint", note="the hole is -1"),
    _v11("tile", "control_v11f1e_sd15_tile", note="the picture itself, small or blurred"),
    _v11("shuffle", "control_v11e_sd15_shuffle", note="style without layout"),
    _v11("ip2p", "control_v11e_sd15_ip2p", note="the picture itself; the prompt says what to change"),
    # ControlNet 1.0 for SD 1.5
    _v10("canny", "canny"),
    _v10("openpose", "openpose", "poses drawn in style v1.0"),
    _v10("depth", "depth"),
    _v10("softedge", "hed"),
    _v10("scribble", "scribble"),
    _v10("mlsd", "mlsd"),
    _v10("normal", "normal", "of MiDaS, by other conventions than 1.1"),
    _v10("seg", "seg", "colours of ADE20K"),
    # SD 2.1
    _sd21("canny", "canny", "9c3106f9154d708550f2c83d231fbd648da7b670"),
    _sd21("openpose", "openpose", "70ba4e452ee9e331e006340744a1ed150262ca98"),
    _sd21("openpose", "openposev2", default=False),
    _sd21("depth", "depth", "d09d674d3cc5e9ccbcb85a64fa6841e07582ebd6"),
    _sd21("depth", "zoedepth", default=False),
    _sd21("softedge", "hed"),
    _sd21("scribble", "scribble"),
    _sd21("lineart", "lineart"),
    _sd21("normal", "normalbae"),
    _sd21("seg", "ade20k", note="colours of ADE20K"),
    _sd21("color", "color", note="the picture in a grid of colours"),
    # SDXL
    Known(
        "diffusers/controlnet-canny-sdxl-1.0",
        "sdxl",
        "canny",
        licence="openrail++",
        revision="e04b87383a6ed517185cfa46b5b4f39a0b25c68f",
        default=True,
    ),
    Known(
        "diffusers/controlnet-depth-sdxl-1.0",
        "sdxl",
        "depth",
        licence="openrail++",
        revision="26144a77791daea774e4761cb6e5bf19d11c822f",
        default=True,
    ),
    Known("thibaud/controlnet-openpose-sdxl-1.0", "sdxl", "openpose", licence="other", default=True),
    Known("xinsir/controlnet-openpose-sdxl-1.0", "sdxl", "openpose", licence="apache-2.0"),
    Known("xinsir/controlnet-canny-sdxl-1.0", "sdxl", "canny"),
    Known("xinsir/controlnet-scribble-sdxl-1.0", "sdxl", "scribble", default=True),
    Known(
        "xinsir/controlnet-union-sdxl-1.0",
        "sdxl",
        "openpose, depth, softedge, canny, normal, seg",
        "controlnet-union",
        "apache-2.0",
        note="one network, told the kind",
    ),
    Known("diffusers/controlnet-canny-sdxl-1.0-small", "sdxl", "canny", licence="openrail++"),
    # T2I-Adapters
    _t2i("sd1", "canny", "t2iadapter_canny_sd15v2", "of one channel"),
    _t2i("sd1", "depth", "t2iadapter_depth_sd15v2"),
    _t2i("sdxl", "canny", "t2i-adapter-canny-sdxl-1.0"),
    _t2i("sdxl", "scribble", "t2i-adapter-sketch-sdxl-1.0"),
)
ALIKE = {
    **dict.fromkeys(("hed", "pidinet"), "softedge"),
    **dict.fromkeys(("midas", "zoe", "leres"), "depth"),
    "lineart_standard": "lineart",
    "normalbae": "normal",
}
"""Kinds of maps that adapters of another kind follow, too."""
REVISIONS = {known.name: known.revision for known in KNOWN if known.revision}


def find(name: str) -> Known | None:
    """The entry of a hub id, if it is in the table."""
    return next((known for known in KNOWN if known.name == name), None)


def matching(*, family: str = "", kind: str = "") -> list[Known]:
    """The entries for a family, a kind of map, or both.

    Raises ValueError for a kind that no entry has.
    """
    kind = ALIKE.get(kind, kind)
    kinds = sorted({part for known in KNOWN for part in known.kind.split(", ")})
    if kind and kind not in kinds:
        raise unknown("kind of map", kind, kinds)
    return [
        known
        for known in KNOWN
        if family in ("", known.family) and (not kind or kind in known.kind.split(", "))
    ]


def default_for(kind: str, family: str) -> str:
    """The hub id for a kind of map on a family. Raises ValueError, with what there is, where it has none."""
    choices = {known.kind: known.name for known in KNOWN if known.default and known.family == family}
    kind = ALIKE.get(kind, kind)
    if kind not in choices:
        raise unknown(f"control for {FAMILY_NAMES[family]}", kind, choices)
    return choices[kind]


def check_combination(kind: str, adapter: str, family: str) -> None:
    """Raise ValueError for a known adapter of another family, naming what would fit.

    kind: of the map. adapter: as it was asked for; "" for none, where the family has to have a default.
    """
    if not adapter:
        default_for(kind, family)
        return
    known = find(adapter)
    if known is None or known.family == family:
        return
    kind = ALIKE.get(kind, kind)
    fitting = [other.name for other in KNOWN if other.family == family and kind in other.kind.split(", ")]
    instead = f"; for it there is {fitting[0]}" if fitting else ""
    raise ValueError(
        f"{adapter} is for {FAMILY_NAMES[known.family]}, and the base is {FAMILY_NAMES[family]}{instead}"
    )


def table(entries: Sequence[Known], cached: Sequence[bool]) -> Iterator[str]:
    """Lines of the table, aligned; those in the cache are marked."""
    rows = [("family", "kind", "network", "licence", "revision", "", "name")]
    for known, there in zip(entries, cached, strict=True):
        revision = known.revision[:7] or "main"
        mark = ("default" if known.default else "") + (" cached" if there else "")
        name = known.name + (f"  ({known.note})" if known.note else "")
        licence = known.licence or "see its card"
        rows.append(
            (FAMILY_NAMES[known.family], known.kind, known.network, licence, revision, mark.strip(), name)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[6]]).rstrip()

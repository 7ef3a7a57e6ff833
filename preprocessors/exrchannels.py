"""Which channels of an EXR file hold its depth: renderers put many passes, layers and views into one file."""

from collections.abc import Iterable, Mapping, Sequence

_DISTANCES = ("z", "depth")
_PARTNERS = {"y": "x", "v": "u"}  # beside which a channel is a part of a vector
_Layer = Mapping[str, str]  # last parts of names, in small letters, to the whole names


def depth_channels(names: Sequence[str]) -> tuple[list[str], bool]:
    """Return the channels that hold the depth (one, or R, G and B), and whether it is a distance.

    OpenEXR reserves the name Z for the distance from the viewer; what is named depth, or lies in a layer of
    that name, is taken so, too. Y, V and colours may say anything. What lies in no layer goes first, then
    what lies in a layer named depth.

    Raises:
        ValueError: none does, or several do; the message continues the file's name.
    """
    layers: dict[str, dict[str, str]] = {}
    for name in names:
        layer, _, last = name.rpartition(".")
        layers.setdefault(layer, {})[last.casefold()] = name
    own = layers.pop("", {})
    named = [layers[layer] for layer in layers if layer.rpartition(".")[2].casefold() in _DISTANCES]
    inner = list(layers.values())
    for found in (
        _all(_distance(own)),
        _all(_distance(layer) or _value(layer) or _single(layer) for layer in named),
        _all(map(_distance, inner)),
    ):
        if found:
            return [_only(found)], True
    if colours := _only_colours(named):
        return colours, True
    return _without_distance(names, own, inner), False


def _without_distance(names: Sequence[str], own: _Layer, inner: Sequence[_Layer]) -> list[str]:
    """The channels of a file that has no Z: of what lies in no layer, else of the one layer that has any."""
    if value := _value(own):
        return [value]
    if colours := _colours(own):
        return colours
    if alone := _all(_value(layer) for layer in inner if len(layer) == 1):
        return [_only(alone)]
    if colours := _only_colours(inner):
        return colours
    if len(names) == 1:
        return list(names)
    raise ValueError(f"has no channel Z that is a depth (it has {', '.join(names)})")


def _distance(layer: _Layer) -> str:
    """The Z or depth of a layer; "" where there is none, or Z is the third part of a vector."""
    is_vector = "x" in layer and "y" in layer
    return next((layer[one] for one in _DISTANCES if one in layer and not (one == "z" and is_vector)), "")


def _value(layer: _Layer) -> str:
    return next((layer[one] for one, beside in _PARTNERS.items() if one in layer and beside not in layer), "")


def _single(layer: _Layer) -> str:
    return next(iter(layer.values())) if len(layer) == 1 else ""


def _colours(layer: _Layer) -> list[str]:
    return [layer[one] for one in "rgb"] if all(one in layer for one in "rgb") else []


def _only_colours(layers: Sequence[_Layer]) -> list[str]:
    found = [colours for colours in map(_colours, layers) if colours]
    if len(found) > 1:
        _only([colours[0] for colours in found])  # says which there are
    return found[0] if found else []


def _all(found: str | Iterable[str]) -> list[str]:
    return [name for name in ([found] if isinstance(found, str) else found) if name]


def _only(found: Sequence[str]) -> str:
    if len(found) > 1:
        raise ValueError(f"has several channels that may be its depth ({', '.join(found)}): keep one of them")
    return found[0]

"""How controls act: the formulas of their modes, gates, curves and schedules, in plain numbers.

For step i of n (i counts from 0), the unconditional and the conditional branch of classifier-free guidance,
and connection k of the U-Net (0 is the shallowest skip, K the middle block: K = 12 for SD1 and SD2, 9 for
SDXL), a control c adds

    residual_k  =  s_c(i) * w_c(k) * m_c * ControlNet_c(x_t, t, text, map_c)_k      if  active(c, i)

to the branches that its mode names. Several controls are summed. s is `scale`, w `layers` or the mode's
curve (`layer_weights`), m the region `mask`, resized to each connection, and active the `gate`. A control
that is not active is not run at all, nor on a branch that its mode ignores.

Systems disagree about three of these, and every one of their ways is there under a name of its own:

    mode             branches     curve       whose
    balanced         both         flat        everybody's default
    prompt           both         soft-webui  A1111 "My prompt is more important"
    control          conditional  soft-webui  A1111 "ControlNet is more important"
    guess            conditional  soft        guess mode of the original (lllyasviel/ControlNet)
    guess-diffusers  conditional  logspace    `guess_mode=True` of diffusers
    more-prompt      both         logspace    InvokeAI "more prompt"
    more-control     conditional  logspace    InvokeAI "more control"
    unbalanced       conditional  flat        InvokeAI "unbalanced"
    paper            conditional  resolution  Zhang et al. 2023, section 3.4, "CFG resolution weighting"

    curve            w(k)
    flat             1
    soft             0.825^(K - k)            the original's 13 numbers; the middle block has 1 in any family
    soft-webui       0.825^(12 - k)           A1111's, whose SDXL list is the first ten of those 13
    logspace         10^(-1 + k / K)          diffusers' and InvokeAI's
    resolution       64 / h_k                 h_k: height of connection k in a latent of height 64: 1, 2, 4, 8

    gate             active in step i of n
    diffusers        start <= i / n  and  (i + 1) / n <= end
    webui            start <= i / n <= end
    invoke           floor(start n) <= i <= ceil(end n)

    fit              a map of another shape than the picture's is
    crop             scaled until it covers the picture, and cut: A1111's and InvokeAI's "Crop and Resize"
    stretch          stretched: their "Just Resize", and what diffusers' pipelines do
    fill             scaled until it fits in, its border's colour (the median) around it: "Resize and Fill"

A1111's numbers were read in sd-webui-controlnet (`scripts/hook.py`), where both of its modes have the soft
curve; `layers` takes the place of a mode's curve there, and does so here, but is multiplied by the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import NamedTuple

from controlkit.limits import check_scale, check_window, number
from controlkit.naming import kind_of_value, unknown

CURVES = ("flat", "soft", "soft-webui", "logspace", "resolution")
GATES = ("diffusers", "webui", "invoke")
FITS = ("crop", "stretch", "fill")
USUAL_GATE, USUAL_MODE, USUAL_FIT = "diffusers", "balanced", "crop"


class Mode(NamedTuple):
    """What a mode stands for: whether the unconditional branch is controlled, too, and a curve's name."""

    both: bool
    curve: str


MODES: Mapping[str, Mode] = {
    "balanced": Mode(True, "flat"),
    "prompt": Mode(True, "soft-webui"),
    "control": Mode(False, "soft-webui"),
    "guess": Mode(False, "soft"),
    "guess-diffusers": Mode(False, "logspace"),
    "more-prompt": Mode(True, "logspace"),
    "more-control": Mode(False, "logspace"),
    "unbalanced": Mode(False, "flat"),
    "paper": Mode(False, "resolution"),
}


def check_rule(
    scale: float | Sequence[float],
    start: float,
    end: float,
    gate: str,
    mode: str,
    layers: str | Sequence[float] | None,
    fit: str = USUAL_FIT,
) -> None:
    """Raise ValueError for a control's number or name that is not allowed (see `control.Control`)."""
    for name, given in (("a schedule of scales", scale), ("layers", layers)):
        if isinstance(given, Iterator | Mapping | Set):  # which are read once alone, or have no order
            raise ValueError(f"{name} is a list of numbers, as [1.0, 0.5], not {kind_of_value(given)}")
    numbers = numbers_of(scale)
    if not numbers:
        raise ValueError("a schedule of scales needs a number for each point, and it has none")
    for one in numbers:
        check_scale(one)
    check_window(start, end)
    for name, value, known in (("gate", gate, GATES), ("mode", mode, tuple(MODES)), ("fit", fit, FITS)):
        if value not in known:
            raise unknown(name, value, known)
    if isinstance(layers, str):
        if layers not in CURVES:
            raise unknown("curve of layers", layers, CURVES)
    elif layers is not None:
        weights = [*layers] if isinstance(layers, Iterable) else layers
        if not isinstance(weights, list) or not all(math.isfinite(number(weight)) for weight in weights):
            raise ValueError(f"layers must be finite numbers, one for each connection, not {weights}")


def numbers_of(scale: float | Sequence[float]) -> tuple[float, ...]:
    """The numbers of a scale: of one, also numpy's or a tensor's, that one, and of a schedule all of them."""
    several = isinstance(scale, Iterable) and not isinstance(scale, str) and getattr(scale, "ndim", 1) != 0
    return tuple(scale) if several else (scale,)  # type: ignore[arg-type, return-value]


def gate_open(gate: str, i: int, n: int, *, start: float, end: float) -> bool:
    """Whether step `i` (from 0) of `n` lies in a window, as the system of that name reads it.

    Raises ValueError for another name than those of `GATES`.
    """
    if gate == "webui":
        return start <= i / n <= end
    if gate == "invoke":
        return math.floor(start * n) <= i <= math.ceil(end * n)
    if gate == "diffusers":
        return not (i / n < start or (i + 1) / n > end)
    raise unknown("gate", gate, GATES)


def guided_at(i: int, n: int, until: float) -> bool:
    """Whether step `i` (from 0) of `n` lies in the first share of the steps, which are guided: i / n < until.

    The quotient is rounded as the fraction is read: 7 / 100 is 0.07, and 0.07 x 100 more than 7.
    """
    return i / n < until


def scale_at(scale: float | Sequence[float], i: int, n: int) -> float:
    """The scale in step `i` (from 0) of `n`: see `control.Control`."""
    points = [float(one) for one in numbers_of(scale)]
    if len(points) in (1, n):
        return points[min(i, len(points) - 1)]
    place = i / max(n - 1, 1) * (len(points) - 1)
    left = min(int(place), len(points) - 2)
    return points[left] + (place - left) * (points[left + 1] - points[left])


def layer_weights(curve: str, levels: Sequence[int]) -> tuple[float, ...]:
    """The weights w(k) of a named curve; `levels`: how often each connection was halved in size.

    Raises ValueError for another name than those of `CURVES`.
    """
    last = len(levels) - 1
    if curve == "soft":
        return tuple(0.825 ** (last - k) for k in range(last + 1))
    if curve == "soft-webui":
        return tuple(0.825 ** (12 - k) for k in range(last + 1))
    if curve == "logspace":
        return tuple(10 ** (-1 + k / last) for k in range(last + 1))
    if curve == "resolution":
        return tuple(float(2**level) for level in levels)
    if curve == "flat":
        return (1.0,) * (last + 1)
    raise unknown("curve of layers", curve, CURVES)


def connection_levels(config: Mapping[str, object]) -> list[int]:
    """How often each connection of a control network was halved in size, the middle block's last."""
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]  # type: ignore[arg-type]
    levels = [0]
    for block in range(blocks):
        levels += [block] * (layers if isinstance(layers, int) else layers[block])  # type: ignore[index]
        if block < blocks - 1:
            levels.append(block + 1)
    return [*levels, blocks - 1]

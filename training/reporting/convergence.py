"""When did control take hold, and what to do when it does not: read from the monitor's looks.

A look (`controlkit.training.reporting.monitor`) is a row of metrics.jsonl with the entries of `Gap.row`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LOOKS = 3
"""How many looks in a row have to agree."""
ON_TRAINED = "gap_on_trained"
"""The entry of looks at pairs that are trained on, 1; others lack it."""
LEAST_GAP = 0.001
"""Gap below which nobody would see what the map does, however sure it is."""
# How large a gap is depends on the base and on what maps say of its pictures; how far it is beyond chance
# does not. So it is judged in its own standard errors over the pictures, by Student's t: chance alone exceeds
# these values (of 2, 3, 4 ... pictures) at one look in 200. tests/test_monitor.py has real trainings' looks.
_ONE_IN_200 = (63.66, 9.925, 5.841, 4.604, 4.032, 3.707, 3.499, 3.355, 3.25, 3.169, 3.106, 3.055)
_LIKELY = 2.0  # standard errors that a gap needs not to be called lost
_USUAL_PICTURES = 8  # of looks that do not say how many they compared
_FEW = 6  # pictures
_VISIBLE = 0.01  # gap over few pictures that proves nothing, and speaks against maps that are wrong

# Under Adam a zero convolution moves by about its learning rate per step. Control was seen to set in once
# steps x rate had come to 0.03 to 0.1 (SD1.5, where it is known for its suddenness) and to 0.35 (the bundled
# base); beyond twice that something else is wrong.
USUAL_TRAVEL = (0.03, 0.35)
_NO_CHANGE = 0.003  # relative change of the loss below which the adapter does nothing yet
_HARM = 1.25  # loss with the true map over the base's, from which the adapter is doing damage
_BY_HEART = 0.6  # training loss over the first one, and over that of held-out pairs: damage by no accident

History = Sequence[Mapping[str, Any]]


def took_hold(history: History) -> int | None:
    """The first step from which the map is used, or None.

    That is the first of `LOOKS` looks in a row, each with a gap of at least `LEAST_GAP` and `least_errors` of
    its standard errors. Rows without a gap are passed over.
    """
    agreeing: list[int] = []
    for look in _looks(history):
        agreeing = [*agreeing, int(look["step"])] if _convincing(look) else []
        if len(agreeing) == LOOKS:
            return agreeing[0]
    return None


def hold_told(history: History) -> str:
    """When control took hold, in words, and what they are worth; "" while it has not."""
    step = took_hold(history)
    if step is None:
        return ""
    if any(look.get(ON_TRAINED) for look in history):
        return (
            f"control took hold at step {step:,} on pairs that are trained on, which may be known by heart:"
            " only pairs that are held out (data.holdout) tell whether new maps are followed"
        )
    return f"control took hold at step {step:,}"


def least_errors(pictures: int) -> float:
    """How many of its standard errors a gap over so many pictures needs to be beyond chance."""
    return _ONE_IN_200[min(max(pictures - 1, 1), len(_ONE_IN_200)) - 1]


def advice(
    history: History,
    *,
    steps: int,
    learning_rate: float,
    zero_convolution_rate: float,
    warmup: int = 0,
    finished: bool = False,
    walks: bool = True,
) -> str | None:
    """What to look at where control does not take hold, or is lost again; None while there is nothing to say.

    steps: of the whole training. The three other numbers are the recipe's. walks: whether the optimizer moves
    a weight by about its rate per step; otherwise nothing is known of how long control takes. It speaks when
    control is overdue (`USUAL_TRAVEL`), when the adapter does damage or learns its pairs by heart, and at the
    end. Plain sentences, one line.
    """
    looks = _looks(history)
    if not looks:
        return None
    last, step = looks[-1], int(looks[-1]["step"])
    held = took_hold(history)
    if _ratio(last) > _HARM and _is_by_heart(history, last):
        return (
            f"At step {step} held-out pictures do worse with the adapter and their true map than without,"
            " while the training loss has gone down: it learns the training pairs by heart. More pairs help"
            " most; then data.flip and data.crop=random, fewer steps, a lower learning_rate."
        )
    if held is not None:
        return _lost(looks, held)
    if _ratio(last) > _HARM:
        if step <= warmup and not finished:  # nothing is settled yet
            return None
        return (
            f"At step {step} the base does better without the adapter than with it and the true map: the"
            " learning rates are too high. Divide learning_rate by 3, then zero_convolution_rate."
        )
    rate = learning_rate * zero_convolution_rate
    travel = rate * max(step - warmup / 2, 0)  # the warmup walks half the way
    if (travel < 2 * USUAL_TRAVEL[1] or not walks) and not (finished or step >= steps):
        return None
    few = _pictures(last) < _FEW and last["gap"] >= _VISIBLE
    if few or _exceeds(last, _LIKELY):
        return _unsure(last)
    if not walks:
        return f"By step {step} the map makes no difference yet. Train longer, or try optimizer=adamw."
    said = _diagnosis(
        last, travel, late=warmup / 2 + USUAL_TRAVEL[1] / rate, raised=zero_convolution_rate >= 6
    )
    return f"By step {step} the map makes no difference yet. {said}"


def advice_for(history: History, config: Mapping[str, Any], *, finished: bool = False) -> str | None:
    """`advice` by a recipe as config.toml has it; None where that says too little."""
    try:
        return advice(
            history,
            steps=int(config["steps"]),
            learning_rate=float(config["learning_rate"]),
            zero_convolution_rate=float(config.get("zero_convolution_rate", 1.0)),
            warmup=int(config.get("warmup", 0)),
            finished=finished,
            walks=config.get("optimizer", "adamw") not in ("adafactor", "prodigy"),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _looks(history: History) -> list[Mapping[str, Any]]:
    needed = ("step", "gap")
    return [row for row in history if all(isinstance(row.get(key), int | float) for key in needed)]


def _convincing(look: Mapping[str, Any]) -> bool:
    return _exceeds(look, least_errors(_pictures(look)))


def _exceeds(look: Mapping[str, Any], errors: float) -> bool:
    error = look.get("gap_error")
    return error is not None and bool(look["gap"] >= max(LEAST_GAP, errors * error))


def _pictures(look: Mapping[str, Any]) -> int:
    return int(look.get("gap_pictures") or _USUAL_PICTURES)


def _ratio(look: Mapping[str, Any]) -> float:
    """The loss with the true map in units of the base's without any."""
    true, alone = look.get("loss_map"), look.get("loss_no_map")
    return true / alone if true is not None and alone else math.nan


def _is_by_heart(history: History, look: Mapping[str, Any]) -> bool:
    """Whether the training pairs are known far better than they were, and than pairs that are held out."""
    if look.get(ON_TRAINED):  # nothing was held out
        return False
    losses = [row["loss"] for row in history if isinstance(row.get("loss"), int | float)]
    if len(losses) <= LOOKS:
        return False
    recent = sum(losses[-LOOKS:]) / LOOKS
    return bool(recent < _BY_HEART * min(losses[0], look["loss_map"]))


def _lost(looks: History, held: int) -> str | None:
    recent = looks[-LOOKS:]
    if len(recent) < LOOKS or any(_exceeds(look, _LIKELY) for look in recent):
        return None
    return (
        f"Control had taken hold at step {held} and is gone at step {int(recent[-1]['step'])}: the training"
        " has become unstable. Lower learning_rate; an average of the weights (ema) helps, too."
    )


def _unsure(look: Mapping[str, Any]) -> str:
    begin = f"At step {int(look['step'])} another picture's map does worse by {look['gap']:.1%}, but"
    if _pictures(look) < _FEW and not _convincing(look):
        pictures = "pictures" if look.get(ON_TRAINED) else "held-out pictures"
        return (
            f"{begin} {_pictures(look)} {pictures} of a shared size are too few to be sure of it:"
            " a larger data.holdout would tell."
        )
    return (
        f"{begin} it was not beyond chance at {LOOKS} looks in a row: train longer, or look more often"
        " (monitor_every)."
    )


def _diagnosis(look: Mapping[str, Any], travel: float, *, late: float, raised: bool) -> str:
    if travel < USUAL_TRAVEL[1]:
        cure = "learning_rate" if raised else "zero_convolution_rate (6 is what recipes have by default)"
        return (
            "That is usual: control sets in suddenly, and at these rates may need until about step"
            f" {late:,.0f}. Train longer, or raise {cure}."
        )
    if abs(_ratio(look) - 1) < _NO_CHANGE:
        return (
            "The adapter hardly changes anything, though its rates would have let it: look whether the maps"
            " are empty or all alike (controlkit data check), and whether clip or weight_decay is extreme."
        )
    return (
        "The adapter has learned something, but not from the map: most likely maps do not belong to their"
        " pictures (other order, other crop or flip), or say little about them. Look at the rows of a sample"
        " grid: does each map lie on its picture? Inverted polarity is learned as well as any, but not when"
        " init is an adapter that expects the other one."
    )

"""Maps that are made of the pictures at each visit, by a preprocessor whose options may be drawn anew."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from controlkit import preprocessors
from controlkit.naming import unknown
from controlkit.preprocessors.options import Range, known_options
from controlkit.training.draws import derived_seed

if TYPE_CHECKING:
    from controlkit.preprocessors import Preprocessor

_ALWAYS_RANDOM = {"shuffle"}


class Maker:
    """The preprocessor for a kind of map, with options as a recipe has them; safe to call from any thread.

    A range ("50..150") is drawn anew from each visit's seed: uniformly, whole numbers where the option is
    one. Canny draws its thresholds itself, from the seed and the picture. A ``seed`` among the options fixes
    its draws. A preprocessor with a network is built at its first use, serves one thread at a time, and takes
    no ranges: its network would be loaded at each visit.

    Raises:
        ValueError: one line: an unknown kind or option (with a suggestion), a range for a network's option,
            or, for preprocessors without a network, whatever :func:`controlkit.preprocessors.get` refuses.
    """

    def __init__(self, kind: str, options: Mapping[str, Any]) -> None:
        self._kind, self._options = kind, dict(options)
        known = preprocessors.options_of(kind)
        for name in options:
            if name not in known:
                error = unknown(f"{kind} option", name, known)
                raise ValueError(f"{error}; data.options={{}} clears those of the recipe")
        if options.get("model") == "file":
            raise ValueError(f"{kind} of model=file is read from files: data.maps=files")
        ranges = {name: ends for name, value in options.items() if (ends := range_ends(value)) is not None}
        self._network: Preprocessor | None = None
        self._lock = threading.Lock() if "model" in known else None
        self._drawn: dict[str, tuple[float, float, bool]] = {}
        self._is_seeded = "seed" in known and "seed" not in options
        if self._lock is None:
            self._ready = self._checked(ranges)
        elif ranges:
            raise ValueError(
                f"{kind}'s {next(iter(ranges))} is a range; only kinds without a network take ranges"
            )
        has_own_draws = self._is_seeded and (bool(ranges) or kind in _ALWAYS_RANDOM)
        self.fixed = not (self._drawn or has_own_draws)

    def __call__(self, picture: NDArray[np.uint8], *, seed: int) -> NDArray[np.uint8]:
        """The map of a picture, both uint8 (H, W, 3).

        Raises:
            ValueError: at a network's first use: missing or damaged weights, an option out of its range.
        """
        if self._lock is None:
            preprocessor = self._ready if self.fixed else self._for_visit(seed)
            return preprocessor.extract([picture])[0].image
        with self._lock:
            if self._network is None:
                self._network = preprocessors.get(self._kind, **self._options)
            return self._network.extract([picture])[0].image

    def _checked(self, ranges: Mapping[str, tuple[float, float]]) -> Preprocessor:
        """The preprocessor, both ends of its ranges tried; ``_drawn`` gets those it does not draw itself."""
        declared = known_options(type(preprocessors.get(self._kind)))
        for name, (low, high) in ranges.items():
            wanted = declared[name]
            parts = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
            if Range in parts or not (float in parts or int in parts):
                continue  # what is no number is refused below
            if low > high:
                raise ValueError(f"{self._kind}'s {name} has the range {low:g}..{high:g}: it goes upwards")
            self._drawn[name] = (low, high, float not in parts)
        at_ends = [{name: ends[k] for name, ends in self._drawn.items()} for k in (1, 0)]
        return [preprocessors.get(self._kind, **self._options | at_end) for at_end in at_ends][-1]

    def _for_visit(self, seed: int) -> Preprocessor:
        options = dict(self._options)
        for name, (low, high, is_whole) in self._drawn.items():
            random = np.random.default_rng(derived_seed(seed, "option", name))
            options[name] = (
                int(random.integers(round(low), round(high) + 1)) if is_whole else random.uniform(low, high)
            )
        if self._is_seeded:
            options["seed"] = derived_seed(seed, "map")
        return preprocessors.get(self._kind, **options)


def range_ends(value: Any) -> tuple[float, float] | None:
    """The two ends of a range as a recipe writes it, "50..150" or [50, 150]; None for anything else."""
    parts = value.split("..") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    try:
        return float(parts[0]), float(parts[1])
    except (TypeError, ValueError):
        return None

"""The allowed range of every number a user can give: one plain line when it is outside.

Needs neither torch nor numpy, so that a command can refuse a bad number before the slow imports.
"""

import math
from collections.abc import Iterable
from numbers import Integral

MAX_STEPS = 1000  # Stable Diffusion's schedules have 1000 training timesteps
MAX_SEED = 2**63 - 1
MAX_GUIDANCE = 100.0
MAX_COUNT = 1000
MAX_NOISE_LEVEL = 999
MAX_CLIP_GUIDANCE = 1000.0
SCALE_RANGE = (-10.0, 10.0)
SIZE_RANGE = (16, 8192)
WEIGHT_RANGE = (-100.0, 100.0)
MAX_RANK = 1024
LEAST_WHITE = 128  # in a region's mask, of its values from 0 to 255: half of it
STOCHASTIC = ("ddim", "ddpm", "euler-a", "dpm++-sde", "lcm", "tcd")
"""The schedulers that inject noise, of which `temperature` speaks."""


def is_whole(value: object) -> bool:
    """Whether it is a whole number, also one of numpy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def number(value: object) -> float:
    """What is one number, also one of numpy's or a tensor of one, as a float; NaN where it is none."""
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):  # the last is of tensors with several
        return math.nan


def check_steps(steps: int) -> None:
    """Raise ValueError unless `steps` is a whole number from 1 to 1000."""
    if not is_whole(steps) or not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be a whole number from 1 to {MAX_STEPS}, not {steps!r}")


def check_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds, also those of an array. Raise ValueError unless there is one and each is a whole number from
    0 to 2^63 - 1."""
    if isinstance(seeds, str) or not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) != 1:
        kind = type(seeds).__name__
        raise ValueError(f"seeds is a list of whole numbers, as [0], one per picture, not one {kind}")
    listed = [*(seeds.tolist() if hasattr(seeds, "tolist") else seeds)]
    if not listed:
        raise ValueError("no seed given: one picture is made per seed")
    for seed in listed:
        if not is_whole(seed) or not 0 <= seed <= MAX_SEED:
            raise ValueError(f"a seed must be a whole number from 0 to {MAX_SEED}, not {seed!r}")
    return listed


def check_batch(batch_size: int | None, *, may_be_none: bool = True) -> None:
    """Raise ValueError unless pictures at once, where they are given, are a whole number from 1."""
    if batch_size is None and may_be_none:
        return
    if not is_whole(batch_size) or batch_size < 1:  # type: ignore[operator]
        raise ValueError(f"batch_size must be a whole number from 1, not {batch_size!r}")


def check_guidance(guidance: float) -> None:
    """Raise ValueError unless the classifier-free guidance scale is a number from 0 to 100 (1 is none)."""
    if not 0 <= number(guidance) <= MAX_GUIDANCE:
        raise ValueError(f"guidance must be a number from 0 to {MAX_GUIDANCE:g}, not {guidance!r}")


def check_clip_skip(clip_skip: int) -> None:
    """Raise ValueError unless it is a whole number from 1 (the text encoder's last layer) to 12."""
    if not is_whole(clip_skip) or not 1 <= clip_skip <= 12:
        raise ValueError(
            f"clip_skip must be a whole number from 1 (none is skipped) to 12, not {clip_skip!r}"
        )


def check_rescale(rescale: float) -> None:
    """Raise ValueError unless guidance's rescaling is a number from 0 (none) to 1 (all)."""
    if not 0 <= number(rescale) <= 1:
        raise ValueError(f"guidance_rescale must be a number from 0 to 1, not {rescale!r}")


def check_pag(pag: float) -> None:
    """Raise ValueError unless perturbed-attention guidance is a number from 0 (none) to 100."""
    if not 0 <= number(pag) <= MAX_GUIDANCE:
        raise ValueError(f"pag must be a number from 0 to {MAX_GUIDANCE:g}, not {pag!r}")


def check_temperature(temperature: float | None, scheduler: str) -> None:
    """Raise ValueError unless the scheduler injects noise and the temperature is from 0 to 2, or to 1."""
    if temperature is None:
        return
    if scheduler not in STOCHASTIC:
        raise ValueError(
            f"temperature scales the noise that a scheduler injects, and {scheduler} injects none:"
            f" take one of {', '.join(STOCHASTIC)}"
        )
    highest = 1 if scheduler in ("ddim", "tcd") else 2
    if not 0 <= number(temperature) <= highest:
        raise ValueError(
            f"temperature must be a number from 0 to {highest} for {scheduler}, not {temperature!r}"
        )


def check_shares(workers: int | None, batch: int | None) -> None:
    """Raise ValueError unless there is at least one thread and a picture at a time, where they are given."""
    if any(number is not None and number < 1 for number in (workers, batch)):
        raise ValueError("--workers and --batch must be at least 1")


def check_strength(strength: float, name: str = "strength") -> None:
    """Raise ValueError unless the strength of a start from a picture is above 0 and at most 1."""
    if not 0 < number(strength) <= 1:
        raise ValueError(f"{name} must be a number above 0 and at most 1, not {strength!r}")


def check_share(name: str, share: float) -> None:
    """Raise ValueError unless a share is a number from 0 to 1."""
    if not 0 <= number(share) <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, not {share!r}")


def check_merged(share: float) -> None:
    """Raise ValueError unless the share of tokens to merge is a number from 0 (none) to 0.75."""
    if not 0 <= number(share) <= 0.75:  # one token of every 2x2 stays
        raise ValueError(f"merge_tokens must be a number from 0 to 0.75, not {share!r}")


def check_tile(size: int) -> None:
    """Raise ValueError unless a tile's side is a multiple of 64 from 64 to 4096 pixels."""
    if not is_whole(size) or size % 64 or not 64 <= size <= 4096:
        raise ValueError(f"a tile's side must be a multiple of 64 from 64 to 4096 pixels, not {size!r}")


def check_factor(factor: float) -> None:
    """Raise ValueError unless a picture is enlarged by a factor above 1 and up to 8."""
    if not 1 < number(factor) <= 8:
        raise ValueError(f"a picture can be enlarged by a factor above 1 and up to 8, not {factor!r}")


def enlarged(width: int | None, height: int | None, factor: float) -> tuple[int | None, int | None]:
    """Width and height times a factor, to multiples of 8; None stays unknown.

    Raises ValueError for a factor that is not above 1 and up to 8, or a side that would be too long.
    """
    check_factor(factor)
    larger = [None if side is None else round(side * factor / 8) * 8 for side in (width, height)]
    for name, before, side in zip(("width", "height"), (width, height), larger, strict=True):
        if side is not None and side > SIZE_RANGE[1]:
            raise ValueError(
                f"a {name} of {before}, {factor:g} times as large, is {side}; {SIZE_RANGE[1]} is the most"
            )
    return larger[0], larger[1]


def check_every(name: str, every: int) -> None:
    """Raise ValueError unless a number of steps is whole and from 1 to 1000."""
    if not is_whole(every) or not 1 <= every <= MAX_STEPS:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_STEPS}, not {every!r}")


def check_every_step(features_every: int, **others: bool) -> None:
    """Raise ValueError where deep features are used again and something needs them anew in every step.

    others: by the names of what does, whether it is asked for.
    """
    for name, asked in others.items():
        if features_every > 1 and asked:
            raise ValueError(f"{name} acts on the deep parts in every step: leave features_every out")


def check_compiled(compiled: bool, **changes: bool) -> None:
    """Raise ValueError for a compiled generation whose networks would be changed while it runs.

    changes: by the names of what would do so, whether it is asked for.
    """
    for name, asked in changes.items():
        if compiled and asked:
            raise ValueError(
                f"compiled networks stay as they are in all steps: compile does not go with {name}"
            )


def check_scale(scale: float) -> None:
    """Raise ValueError unless a control's scale is a finite number from -10 to 10 (1 is as trained)."""
    _check_strong("a control's scale", scale)


def check_lora_weight(weight: float) -> None:
    """Raise ValueError unless a LoRA's weight is a finite number from -10 to 10 (1 is as trained)."""
    _check_strong("a LoRA's weight", weight)


def check_picture_scale(scale: float) -> None:
    """Raise ValueError unless an IP-Adapter's scale is a finite number from -10 to 10 (1 is as trained)."""
    _check_strong("an IP-Adapter's scale", scale)


def _check_strong(what: str, given: float) -> None:
    low, high = SCALE_RANGE
    if not low <= number(given) <= high:
        raise ValueError(f"{what} must be a number from {low:g} to {high:g}, not {given!r}")


def check_noise_level(level: int) -> None:
    """Raise ValueError unless the noise on a picture that a base is told is a whole number from 0 to 999."""
    if not is_whole(level) or not 0 <= level <= MAX_NOISE_LEVEL:
        raise ValueError(f"image_noise must be a whole number from 0 to {MAX_NOISE_LEVEL}, not {level!r}")


def check_class(label: int | None) -> None:
    """Raise ValueError unless a class, where there is one, is a whole number from 0 on."""
    if label is not None and (not is_whole(label) or label < 0):
        raise ValueError(f"a class must be a whole number from 0, not {label!r}")


def check_clip_guidance(scale: float) -> None:
    """Raise ValueError unless the scale of CLIP guidance is a number from 0 (off) to 1000."""
    if not 0 <= number(scale) <= MAX_CLIP_GUIDANCE:
        raise ValueError(f"clip_guidance must be a number from 0 to {MAX_CLIP_GUIDANCE:g}, not {scale!r}")


def check_window(start: float, end: float) -> None:
    """Raise ValueError unless 0 <= start < end <= 1 (fractions of the denoising steps)."""
    if not 0 <= number(start) < number(end) <= 1:
        raise ValueError(f"a control needs 0 <= start < end <= 1, not start {start!r} and end {end!r}")


def check_size(width: int | None, height: int | None) -> None:
    """Raise ValueError unless each given side is a multiple of 8 from 16 to 8192 pixels."""
    low, high = SIZE_RANGE
    for name, side in (("width", width), ("height", height)):
        if side is None:
            continue
        if not is_whole(side) or side % 8 or not low <= side <= high:
            told = repr(side)
            if math.isfinite(given := number(side)):
                told = f"{side} (nearest: {min(max(round(given / 8) * 8, low), high)})"
            raise ValueError(f"{name} must be a multiple of 8 from {low} to {high}, not {told}")


def check_told_whole(tiles: object | None) -> None:
    """Raise ValueError for tiles of a picture whose sizes are said: SDXL is told each tile's place."""
    if tiles is not None:
        raise ValueError(
            "tiles are told the whole's size and their place in it: no other one goes with them, so leave out"
            " --original-size and --negative-original-size, or take away an earlier picture's with none"
        )


def check_count(count: int) -> None:
    """Raise ValueError unless the number of pictures is a whole number from 1 to 1000."""
    if not is_whole(count) or not 1 <= count <= MAX_COUNT:
        raise ValueError(f"the number of pictures must be from 1 to {MAX_COUNT}, not {count!r}")


def check_weight(weight: float) -> None:
    """Raise ValueError unless a weight in a prompt is a number from -100 to 100 (1 is none)."""
    low, high = WEIGHT_RANGE
    if not low <= weight <= high:
        raise ValueError(f"a weight in a prompt must be from {low:g} to {high:g}, not {weight:g}")


def check_rank(rank: int) -> None:
    """Raise ValueError unless a Control-LoRA's rank is a whole number from 1 to 1024."""
    if not is_whole(rank) or not 1 <= rank <= MAX_RANK:
        raise ValueError(f"rank must be a whole number from 1 to {MAX_RANK}, not {rank!r}")

"""DeepSpeed's configuration: what accelerate's launcher was told, checked against the recipe.

The recipe says what is trained and how; DeepSpeed's configuration says how the weights are shared among the
processes. A number that stands in both has to be the same in both ("auto" always is).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from controlkit.training.config_base import Recipe

OLDEST = "0.19.8"
"""The first DeepSpeed that this training was tested with: it passes over steps without a finite gradient."""
OPTIMIZERS = ("adamw", "lion")
"""Those that move each number by itself, so that a flat share of many weights is as good as whole ones."""

_OURS = {  # beside these, settings of DeepSpeed's that the recipe decides
    "communication_data_type", "comms_logger", "memory_breakdown", "steps_per_print", "wall_clock_breakdown",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
}  # fmt: skip
_SHARING = {
    "allgather_bucket_size", "allgather_partitions", "contiguous_gradients", "overlap_comm",
    "reduce_bucket_size", "reduce_scatter", "stage", "stage3_gather_16bit_weights_on_model_save",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size", "sub_group_size",
}  # fmt: skip
_OFFLOADED = {"device", "pin_memory", "nvme_path"}


def is_wanted() -> bool:
    """Whether the launcher asks for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"


def check_package() -> None:
    """Raise ValueError, one line with the cure, where DeepSpeed is missing or too old."""
    from packaging.version import Version

    cure = f"uv sync --extra deepspeed, or pip install 'deepspeed>={OLDEST}'"
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        raise ValueError(
            f"accelerate's configuration asks for DeepSpeed, which is not installed: {cure}"
        ) from None
    if Version(installed) < Version(OLDEST):
        raise ValueError(f"DeepSpeed {installed} is too old: {cure}")


def read(recipe: Recipe, *, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe, from what `accelerate launch` has put in the environment.

    Stages 1 to 3 of ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), with optimizer or weights in the host's
    memory where that is asked for. Raises ValueError for whatever contradicts the recipe, for what this
    training does not do with DeepSpeed, and for settings that it does not know.
    """
    from accelerate.utils import DeepSpeedPlugin

    given: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    _check_recipe(recipe)
    numbers = _numbers(recipe, given, processes=processes)
    known = _OURS | numbers.keys() | {"zero_optimization", "bf16", "fp16"}
    _check_known(given, known, place="")
    sharing = _sharing(given["zero_optimization"])
    return {
        **{key: value for key, value in given.items() if key in _OURS and value != "auto"},
        **numbers,
        **_precision(recipe, given, stage=sharing["stage"]),
        "zero_optimization": sharing,
        "zero_force_ds_cpu_optimizer": False,  # the recipe's, wherever its state is
        "zero_allow_untested_optimizer": True,  # see OPTIMIZERS
        "steps_per_print": float("inf"),
    }


def _check_recipe(recipe: Recipe) -> None:
    """What DeepSpeed is not used for."""
    if recipe.task != "controlnet":
        raise ValueError(f"DeepSpeed trains adapters (task controlnet), and this recipe's is {recipe.task}")
    name = getattr(recipe, "optimizer", "adamw")
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} does not go with DeepSpeed: use {' or '.join(OPTIMIZERS)}")
    if recipe.precision == "fp16":
        raise ValueError("precision fp16 does not go with DeepSpeed: use precision=bf16 or precision=fp32")
    if getattr(recipe, "compile", False):
        raise ValueError("compile does not go with DeepSpeed: use compile=false")


def _numbers(recipe: Recipe, given: Mapping[str, Any], *, processes: int) -> dict[str, Any]:
    """The settings of DeepSpeed's that stand in the recipe, too."""
    accumulation = getattr(recipe, "accumulation", 1)
    whole = recipe.batch_size * accumulation * processes
    told = {
        "train_micro_batch_size_per_gpu": (recipe.batch_size, "batch_size"),
        "gradient_accumulation_steps": (accumulation, "accumulation"),
        "train_batch_size": (whole, "batch_size × accumulation × processes"),
        "gradient_clipping": (recipe.clip, "clip"),
    }
    fields = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    for key, (value, name) in told.items():
        other = given.get(key, "auto")
        if key == "gradient_accumulation_steps" and other == 1 and key not in fields:
            continue  # the launcher says 1 where nobody has said anything
        if other not in ("auto", None, value):
            raise ValueError(
                f"accelerate's configuration has {key} {other}, and the recipe's {name} is {value}:"
                f" leave {key} out, or make them the same"
            )
    return {key: value for key, (value, _) in told.items()}


def _precision(recipe: Recipe, given: Mapping[str, Any], *, stage: int) -> dict[str, Any]:
    """Where networks compute in bf16: masters, sums of gradients and what processes exchange in fp32."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    wanted = {name: given.get(name, {}).get("enabled", "auto") for name in ("bf16", "fp16")}
    wrong = [name for name, on in wanted.items() if on not in ("auto", name == recipe.precision)]
    if launched not in ("no", "", recipe.precision):
        wrong.append(f"mixed_precision {launched}")
    if wrong:
        raise ValueError(
            f"accelerate's configuration sets {wrong[0]}, and the recipe's precision is {recipe.precision}:"
            f" leave it out, or set precision in the recipe"
        )
    if recipe.precision != "bf16":
        return {}
    if stage == 1:
        raise ValueError(
            "zero_stage 1 does not go with precision bf16: use zero_stage 2, which shares gradients as well"
        )
    return {
        "bf16": {"enabled": True, "check_grad_overflow": True},  # no step without a finite gradient
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": given.get("communication_data_type", "fp32"),
    }


def _sharing(given: Mapping[str, Any]) -> dict[str, Any]:
    """The stage of ZeRO and its settings; those that are "auto" are DeepSpeed's own."""
    places = {key: given.get(key) or {} for key in ("offload_optimizer", "offload_param")}
    _check_known(given, _SHARING | places.keys(), place="zero_optimization.")
    if given["stage"] not in (1, 2, 3):
        raise ValueError(
            f"zero_stage {given['stage']} shares nothing: use 1, 2 or 3, or training/recipes/two-gpus.yaml"
        )
    sharing = {key: value for key, value in given.items() if key in _SHARING and value != "auto"}
    for key, place in places.items():
        device = place.get("device", "none")
        if device not in ("none", "cpu"):
            raise ValueError(f"{key} {device} is not supported: use cpu or none")
        if device == "none":
            continue
        _check_known(place, _OFFLOADED, place=f"zero_optimization.{key}.")
        if key == "offload_param" and sharing["stage"] != 3:
            raise ValueError(f"offload_param needs zero_stage 3, and it is {sharing['stage']}")
        sharing[key] = {name: value for name, value in place.items() if value not in (None, "none", "auto")}
    return sharing


def _check_known(given: Mapping[str, Any], known: set[str], *, place: str) -> None:
    for key in given.keys() - known:
        raise ValueError(
            f"DeepSpeed's setting {place}{key} is not one that this training knows: leave it out"
            f" (known here: {', '.join(sorted(known))})"
        )

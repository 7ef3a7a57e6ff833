"""What is asked of `controlkit evaluate`, checked before anything is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from controlkit import files, known_adapters, limits, naming, preprocessors
from controlkit.arguments import parse_compared
from controlkit.base_parts import BUNDLED
from controlkit.folders import weight_files
from controlkit.formats.finding import (
    BUNDLED_ADAPTERS,
    check_adapter,
    find_adapter_file,
    find_adapter_folder,
)
from controlkit.precisions import torch_name
from controlkit.settings import USUAL_SCHEDULER
from controlkit.training import lock
from controlkit.training.data.made_maps import range_ends

WORLD = "world"
FEATURES = ("inception", "none")
PICTURES, SEEDS, STEPS = 50, 1, 20  # pairs, pictures of each, denoising steps, where nobody says
FLOOR, CEILING, TRUE = "no control", "autoencoder", "pictures"
"""What adapters are compared with: the same prompts and noise alone, the true pictures through the
autoencoder, and the true pictures themselves.
"""
_TAKEN = (FLOOR, CEILING, TRUE)


@dataclass(frozen=True)
class Compared:
    """An adapter that is measured: how it was named, and how it acts.

    kind: of map; "" asks the file. how: settings of `Control` that differ from its defaults.
    """

    name: str
    kind: str = ""
    how: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def written(self) -> str:
        """How it acts, in a phrase; "" for the usual way."""
        return ", ".join(f"{key} {_plain(value)}" for key, value in self.how.items())


@dataclass(frozen=True)
class Request:
    """Everything that decides an evaluation.

    data: "world", a data set as `data.source` of a recipe, or the folder of a run, which is measured on what
    it held out. settings: keys of the recipe's [data]. options: of the preprocessors, by kind. count: pairs,
    0 for all. seeds: pictures of each pair. guidance: None for the base's own. dtype: None for the usual
    one. features: what FID and KID see. clip: whose view of the captions counts, "" for nobody's.
    """

    data: str
    base: str
    adapters: tuple[Compared, ...]
    output: Path
    settings: dict[str, str] = field(default_factory=dict)
    options: dict[str, dict[str, str]] = field(default_factory=dict)
    count: int = PICTURES
    seeds: int = SEEDS
    steps: int = STEPS
    guidance: float | None = None
    scheduler: str = USUAL_SCHEDULER
    negative_prompt: str | None = None
    device: str = "auto"
    dtype: str | None = None
    features: str = "inception"
    clip: str = "clip-b"

    @property
    def decides(self) -> dict[str, Any]:
        """What decides the pictures without control, as JSON: it has to be the same to go on."""
        names = ("data", "base", "settings", "steps", "guidance", "scheduler", "negative_prompt")
        return {name: getattr(self, name) for name in names}


def make_request(
    data: str,
    output: str,
    *,
    adapters: Sequence[str],
    base: str | None,
    settings: Mapping[str, str],
    **given: Any,
) -> Request:
    """Check a request as the command line gives it.

    adapters: [KIND=]NAME[:HOW] each. settings: keys of the data, and KIND.OPTION of a preprocessor.
    given: further fields of `Request`; those that are None keep their defaults.

    Raises ValueError, one line: a number outside its range, a name that leads nowhere, an adapter of another
    family than the base, or an output that cannot be written.
    """
    known = {name: value for name, value in given.items() if value is not None}
    if "dtype" in known:
        known["dtype"] = torch_name(known["dtype"])
    data, base, texts, found = _of_run(data, base, list(adapters))
    compared = tuple(_compared(text, base) for text in texts)
    if not compared:
        raise ValueError("which adapter? name one with --adapter, as --adapter runs/my-run/controlnet")
    of_data, options = _split(settings)
    request = Request(
        data=data,
        base=base,
        adapters=_labelled(compared),
        output=Path(output),
        settings=found | of_data,
        options=options,
        **known,
    )
    _check(request)
    return request


def identity(compared: Compared) -> str:
    """A name for the folder of an adapter's pictures: the same weights in the same way, the same name.

    Raises ValueError where there is no such adapter.
    """
    told = [digest_of(compared.name), compared.kind, sorted(compared.how.items())]
    mark = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:10]
    label = compared.label.rpartition("/")[2]  # what others are called changes no folder
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', label).strip('-.')[:40]}-{mark}"


def digest_of(name: str) -> str:
    """SHA-256 over the bytes of an adapter's weights. Raises ValueError where there is no such adapter."""
    file = find_adapter_file(name)
    parts = [file] if file else sorted(weight_files(find_adapter_folder(name)))
    return hashlib.sha256("".join(files.sha256_file(part) for part in parts).encode()).hexdigest()


def earlier(request: Request) -> dict[str, Any] | None:
    """What an evaluation in the same folder wrote of itself; None where there is none.

    Raises ValueError where it cannot be gone on with: it was made with other settings.
    """
    path = request.output / "settings.json"
    if not path.is_file():
        held_there = os.listdir(request.output) if request.output.is_dir() else []
        if any(name != lock.NAME and not files.is_half_written(name) for name in held_there):
            raise ValueError(f"{request.output} is there and holds no evaluation: choose another -o")
        return None
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before = dict(held["decides"])
        for table in (held["pairs"], held["maps"], *held["maps"].values(), held["estimators"]):
            dict.keys(table)  # all of them are tables
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): choose another -o") from error
    for name, now in json.loads(json.dumps(request.decides)).items():
        if before.get(name) != now:
            raise ValueError(
                f"{request.output} holds an evaluation with {name} {_plain(before.get(name))}, and asked is"
                f" {_plain(now)}: choose another -o, or ask for the same to go on with it"
            )
    return held


def joined(request: Request, before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What an evaluation wrote of itself, and what is added to it: pairs, kinds of maps.

    Raises ValueError where both cannot stand in one folder.
    """
    held, choose = f"{request.output} holds an evaluation", "choose another -o"
    if before.get("device") != now["device"]:  # its precision, too, which the base's digest tells of
        raise ValueError(f"{held} made on {before.get('device')}, not {now['device']}: {choose}")
    if before.get("base") != now["base"]:
        raise ValueError(f"{held}, and the base's weights have changed since: {choose}")
    marks = {"pair": (before.get("pairs"), now["pairs"])}
    marks |= {f"{kind} map of pair": (before.get("maps", {}).get(kind), m) for kind, m in now["maps"].items()}
    for what, (old, new) in marks.items():
        changed = [number for number, mark in new.items() if (old or {}).get(number, mark) != mark]
        if changed:
            raise ValueError(f"{held}, and the {what} {', '.join(changed[:3])} has changed since: {choose}")
    for kind, given in now["estimators"].items():
        if before.get("estimators", {}).get(kind, given) != given:
            made = ", ".join(f"{k} {v}" for k, v in before["estimators"][kind].items()) or "as usual"
            asked = ", ".join(f"{k} {v}" for k, v in given.items()) or "as usual"
            raise ValueError(f"{held} whose {kind} maps were made with {made}, not {asked}: {choose}")
    maps = {
        kind: before.get("maps", {}).get(kind, {}) | now["maps"].get(kind, {})
        for kind in {**before.get("maps", {}), **now["maps"]}
    }
    return {
        **now,
        "pairs": before["pairs"] | now["pairs"],
        "maps": maps,
        "estimators": before.get("estimators", {}) | now["estimators"],
    }


def as_json(request: Request) -> dict[str, Any]:
    """The whole request, as JSON."""
    told = asdict(request)
    told["output"] = request.output.name
    return told


def run_config(data: str) -> Path | None:
    """The recipe of a run's folder; None for any other folder, even with a config.toml of another tool."""
    folder = Path(os.path.expanduser(data))
    config = folder / "config.toml"
    if not config.is_file():
        return None
    if (folder / "metrics.jsonl").is_file():
        return config
    try:
        return config if "task" in tomllib.loads(config.read_text(encoding="utf-8-sig")) else None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError):
        return None


def _of_run(data: str, base: str | None, adapters: list[str]) -> tuple[str, str, list[str], dict[str, str]]:
    """Fill in what the folder of a run says: its base, its adapter."""
    config = run_config(data)
    if config is None:
        return data, base or "tiny", adapters, {}
    from controlkit.training.config import ControlNetRecipe, load_recipe

    recipe = load_recipe(str(config), [])
    if not isinstance(recipe, ControlNetRecipe):
        raise ValueError(f"{data} is a run of {recipe.task}: only runs that train an adapter are evaluated")
    if not adapters:
        result = config.parent / "controlnet"
        if not result.is_dir():
            raise ValueError(f"{data} has no result yet (no {result}): finish the training first")
        several = recipe.data.map_column if recipe.adapter == "controlnet-union" else ()
        adapters = [f"{kind}={result}" for kind in several or (recipe.map,)]
    return data, base or recipe.base, adapters, {}


def _compared(text: str, base: str) -> Compared:
    kind, name, how = parse_compared(text)
    if base not in BUNDLED and not os.path.exists(name):
        usual = known_adapters.defaults(known_adapters.family_of_base(base))
        if name in usual:  # a kind, as in --control canny=photo.jpg
            kind, name = kind or name, usual[name].name
    known_adapters.check(kind, name, base)
    if name in BUNDLED_ADAPTERS:
        kind = kind or name
    return Compared(name, kind, how)


def _labelled(adapters: Sequence[Compared]) -> tuple[Compared, ...]:
    """The same with a short name for each, all of them different."""
    labels: list[str] = []
    shorts = _shorts([one.name for one in adapters])
    for one in adapters:
        is_of_several = len({other.kind for other in adapters if other.name == one.name}) > 1
        short = shorts[one.name]
        kind = one.kind if is_of_several and one.kind != short else ""
        how = ", ".join(part for part in (kind, one.written) if part)
        label = f"{short} ({how})" if how else short
        if label in labels or label in _TAKEN:
            number = next(k for k in range(2, len(adapters) + 2) if f"{label} {k}" not in labels)
            label = f"{label} {number}"
        labels.append(label)
    return tuple(
        Compared(one.name, one.kind, one.how, label) for one, label in zip(adapters, labels, strict=True)
    )


def _shorts(names: Sequence[str]) -> dict[str, str]:
    """For each adapter the shortest end of its path that no other's has: its own name, or "mine/canny"."""
    parts = {name: _parts(name) for name in names}
    found = {}
    for name, own in parts.items():
        others = [other for other in parts.values() if other != own]
        count = next((k for k in range(1, len(own)) if all(o[-k:] != own[-k:] for o in others)), len(own))
        found[name] = "/".join(own[-count:])
    return found


def _parts(name: str) -> list[str]:
    """The parts of an adapter's path that tell of it: up to the run for runs/x/controlnet, a file's stem."""
    parts = [part for part in re.split(r"[\\/]", name) if part not in ("", ".", "..", "~")] or [name]
    if parts[-1] == "controlnet" and len(parts) > 1:
        return parts[:-1]
    stem, suffix = os.path.splitext(parts[-1])
    return [*parts[:-1], stem if suffix in (".safetensors", ".pth", ".pt", ".ckpt", ".bin") else parts[-1]]


def _split(settings: Mapping[str, str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Tell keys of the data from options of a preprocessor, KIND.OPTION."""
    of_data: dict[str, str] = {}
    options: dict[str, dict[str, str]] = {}
    for key, value in settings.items():
        kind, dot, option = key.partition(".")
        if dot and kind != "data":
            if kind not in preprocessors.names():
                raise naming.unknown("kind of map", kind, preprocessors.names())
            options.setdefault(kind, {})[option] = value
        else:
            of_data[option if dot else key] = value
    return of_data, options


def _check(request: Request) -> None:
    from controlkit.schedulers import SCHEDULERS

    limits.check_steps(request.steps)
    if request.guidance is not None:
        limits.check_guidance(request.guidance)
    if request.count < 0:
        raise ValueError(f"-n is {request.count}: 0 for all pairs, or how many")
    limits.check_count(request.seeds)
    if request.features not in FEATURES:
        raise naming.unknown("features", request.features, FEATURES)
    for kind, options in request.options.items():
        for name, value in options.items():
            if range_ends(value) is not None:
                raise ValueError(f"{kind}.{name} is {value}: an evaluation takes one value, no range")
        if "model" not in preprocessors.options_of(kind):  # those with weights are made where they are used
            preprocessors.get(kind, **options)
    for one in request.adapters:
        check_adapter(one.name)
    if request.data != WORLD and run_config(request.data) is None:
        from controlkit.training.data.source_recipe import recipe_of
        from controlkit.training.data.sources import recognise

        kind = request.adapters[0].kind or "canny"  # where only the file tells it, that is not read yet
        recognise(recipe_of(request.data, kind, request.settings, where="evaluate"))
    if request.scheduler not in SCHEDULERS:
        raise naming.unknown("scheduler", request.scheduler, SCHEDULERS)
    if request.output.is_dir():
        files.check_writable(request.output / "settings.json")
    else:
        files.check_writable(request.output, folder=True)
    earlier(request)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

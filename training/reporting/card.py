"""The model card of an adapter folder: README.md as the hub wants it, with code that runs.

It is written beside the weights and rewritten when scores and samples are there. Everything in it comes from
the adapter's own header and from the run's folder.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controlkit import files
from controlkit.adapters import AdapterInfo, MapSpec, read_info
from controlkit.base import ALIASES, BUNDLED, FAMILY_TITLES
from controlkit.folders import read_json
from controlkit.formats.description import kinds_at_once
from controlkit.training.reporting.convergence import hold_told
from controlkit.training.reporting.publishing import is_repo_id
from controlkit.training.reporting.run_record import RunRecord, read_run, versions

NAME, GRID = "README.md", "images_0.png"
_LICENSES = {"sd1": "creativeml-openrail-m", "sd2": "openrail++", "sdxl": "openrail++"}
_FAMILY_TAGS = {
    "sd1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
}
_TAGS = ("text-to-image", "diffusers", "controlnet", "diffusers-training")
_PIPELINES = {  # diffusers', by the class of the network and whether the base is an SDXL
    ("ControlNetModel", False): "StableDiffusionControlNetPipeline",
    ("ControlNetModel", True): "StableDiffusionXLControlNetPipeline",
    ("ControlNetXSAdapter", False): "StableDiffusionControlNetXSPipeline",
    ("ControlNetXSAdapter", True): "StableDiffusionXLControlNetXSPipeline",
    ("T2IAdapter", False): "StableDiffusionAdapterPipeline",
    ("T2IAdapter", True): "StableDiffusionXLAdapterPipeline",
    ("ControlNetUnionModel", True): "StableDiffusionXLControlNetUnionPipeline",
}
_SETTINGS = {
    "steps": "steps",
    "batch_size": "pairs per process and micro-batch",
    "accumulation": "micro-batches per step",
    "learning_rate": "learning rate",
    "zero_convolution_rate": "of the zero convolutions, times",
    "optimizer": "optimizer",
    "schedule": "schedule",
    "warmup": "warmup steps",
    "precision": "precision",
    "ema": "moving average of the weights",
    "caption_dropout": "captions left out",
    "seed": "seed",
}


def write_card(folder: Path, *, run_folder: Path | None = None, repo_id: str = "") -> Path:
    """Write README.md into an adapter's folder, with the newest sample grid as images_0.png; its path.

    run_folder: of the training, for its settings, scores and samples. repo_id: where the adapter is to be
    found on the hub; without it, the card's code names the folder. Raises ValueError where the folder holds
    no adapter or cannot be written.
    """
    info = read_info(folder)
    run = read_run(run_folder) if run_folder is not None else RunRecord(folder)
    grid = _copy_grid(run, folder)
    network = str(read_json(folder / "config.json").get("_class_name", "ControlNetModel"))
    text = card(info, run, place=repo_id or folder.name, grid=grid, network=network)
    path = folder / NAME
    files.write_text(path, text)
    return path


def card(
    info: AdapterInfo, run: RunRecord, *, place: str, grid: bool, network: str = "ControlNetModel"
) -> str:
    """The card's text. place: folder or hub id for the code; grid: whether images_0.png is there; network:
    the adapter's class."""
    base = _public(info.base or str(run.config.get("base", "")))
    kind = info.map.kind or "control"
    title = info.title or f"ControlNet {kind}"
    parts = [_front_matter(info, base, grid=grid), f"# {title}\n", _intro(info, base, run)]
    if grid:
        parts.append(f"![Maps, pictures and samples]({GRID})\n")
        parts.append("From the top: maps, the pictures they come from, and samples of this adapter.\n")
    unlocked = run.config.get("sd_locked") is False
    use = _usage(info, base, kind, place, caption=_caption(run), network=network, unlocked=unlocked)
    parts += [_map_spec(info.map), use]
    parts += [_scores(run), _training(run), _origin(run)]
    return "\n".join(part for part in parts if part)


def _front_matter(info: AdapterInfo, base: str, *, grid: bool) -> str:
    """YAML, written as JSON values, which YAML reads as they are."""
    entries: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    base_id = ALIASES.get(base, base)
    if base in BUNDLED:
        entries["license"] = "apache-2.0"
    elif info.family in _LICENSES and is_repo_id(base_id):
        entries["license"] = _LICENSES[info.family]
    if base not in BUNDLED and is_repo_id(base_id):
        entries["base_model"] = base_id
    entries["tags"] = [*_FAMILY_TAGS.get(info.family, ()), *_TAGS]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    if grid:
        lines += [
            "widget:",
            f"- text: {json.dumps(info.title or info.map.kind)}",
            f"  output: {{url: {GRID}}}",
        ]
    return "\n".join(["---", *lines, "---\n"])


def _intro(info: AdapterInfo, base: str, run: RunRecord) -> str:
    family = FAMILY_TITLES.get(info.family, "a base")
    of = f"`{base}` ({family})" if base else family
    has_shapes = bool(run.config.get("data", {}).get("buckets"))
    area = f" in several shapes of the area of {info.resolution}×{info.resolution}"
    size = "" if not info.resolution else area if has_shapes else f" at {info.resolution}×{info.resolution}"
    predicts = f", which predicts `{info.prediction_type}`" if info.prediction_type else ""
    return (
        f"Control weights for {of}{predicts}, trained{size} with ControlKit. Pictures follow a"
        f" {info.map.kind or 'conditioning'} map.\n"
    )


def _map_spec(spec: MapSpec) -> str:
    rows = {
        "kind": spec.kind or "not said",
        "channels": str(spec.channels),
        "values": f"{spec.range[0]:g} to {spec.range[1]:g} (0 to 255 in a file of 8 bits)",
        "polarity": spec.polarity,
        "thresholds": ", ".join(f"{name} {value:g}" for name, value in spec.thresholds.items()),
        "drawn in the style": spec.draw_style,
    }
    return "## The map\n\n" + _table(("", ""), [(k, v) for k, v in rows.items() if v])


def _usage(
    info: AdapterInfo, base: str, kind: str, place: str, *, caption: str, network: str, unlocked: bool
) -> str:
    parts = ["## Use\n"]
    if unlocked:
        parts.append(
            "The base's decoder was trained with it (`sd_locked=false`): the whole U-Net lies in the run's"
            " folder `unet`, which an upload leaves behind, and they go together. For ControlKit, copy the"
            " base's folder, put this `unet` in the place of its own, and give that folder as `--base`.\n"
        )
    if (network, info.family == "sdxl") in _PIPELINES:
        snippet = _snippet(info, base, place, caption=caption, network=network, unlocked=unlocked)
        parts += ["With diffusers:\n", snippet]
    at_once = bool(kinds_at_once(info.map, is_union=network == "ControlNetUnionModel"))
    kinds = kind.split(" + ") if at_once else kind.split(" + ")[:1]  # of several by themselves any will do
    if at_once or info.map.channels == 3:
        prompt, base_name = (shlex.quote(word) for word in (caption, base or "BASE"))
        base_name = "BASE-WITH-THIS-UNET" if unlocked else base_name
        files = {one: "map.png" if len(kinds) == 1 else f"{one}.png" for one in kinds}
        maps = " ".join(f"--map {shlex.quote(f'{one}={file}')}" for one, file in files.items())
        adapters = " ".join(f"--adapter {shlex.quote(f'{one}={place}')}" for one in kinds)
        command = f"controlkit generate {prompt} --base {base_name} {maps} {adapters} -o picture.png"
        parts += ["With ControlKit:\n", f"```sh\n{command}\n```\n"]
    if network == "ControlNetModel" and info.map.channels == 3:  # others are fed pictures alone
        parts.append(
            "ComfyUI, Forge and A1111 load `diffusion_pytorch_model.safetensors` from their ControlNet"
            " folder.\n"
        )
    return "\n".join(parts)


def _snippet(info: AdapterInfo, base: str, place: str, *, caption: str, network: str, unlocked: bool) -> str:
    pipeline = _PIPELINES[network, info.family == "sdxl"]
    name = "adapter" if network == "T2IAdapter" else "controlnet"
    shown = "control_image=[hint], control_mode=[0]" if network == "ControlNetUnionModel" else "image=hint"
    classes = sorted([network, pipeline, *(["UNet2DConditionModel"] if unlocked else [])])
    lines = ["import torch", f"from diffusers import {', '.join(classes)}"]
    if info.map.channels == 3:
        lines.append("from diffusers.utils import load_image")
        hint = 'load_image("map.png")'
    else:  # diffusers turns every picture into RGB, but leaves a tensor alone
        lines.append("import numpy as np")
        hint = f'torch.from_numpy(np.load("map.npy"))  # float32 (1, {info.map.channels}, H, W) in [0, 1]'
    if base in BUNDLED:
        lines.append("from controlkit.base import BUNDLED")
        source, dtype, device = f'BUNDLED["{base}"]', "torch.float32", ""
    else:
        source = json.dumps(ALIASES.get(base, base) or "BASE", ensure_ascii=False)
        dtype, device = "torch.float16", '.to("cuda")'
    lines += [
        "",
        f"{name} = {network}.from_pretrained({json.dumps(place)}, torch_dtype={dtype})",
        *([f'unet = UNet2DConditionModel.from_pretrained("unet", torch_dtype={dtype})'] if unlocked else []),
        f"pipe = {pipeline}.from_pretrained(",
        f"    {source}, {name}={name}, {'unet=unet, ' * unlocked}torch_dtype={dtype}",
        f"){device}",
        f"hint = {hint}",
        f"picture = pipe({json.dumps(caption, ensure_ascii=False)}, {shown},"
        " num_inference_steps=20).images[0]",
        'picture.save("picture.png")',
    ]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _scores(run: RunRecord) -> str:
    kind = str(run.config.get("map", ""))
    named = {"floor": "no control", "control": "this adapter", kind: "this adapter", "ceiling": "ceiling"}
    names = [name for name in named if name in run.scores]
    measures = list(dict.fromkeys(m for name in names for m in run.scores[name]))
    held = hold_told(run.rows)
    held = f"{held[:1].upper()}{held[1:]}." if held else ""
    if not measures:
        return f"## Does it work\n\n{held}\n" if held else ""
    rows = [(measure, *(_number(run.scores[name].get(measure)) for name in names)) for measure in measures]
    note = (
        f"Means over {run.scored} pairs. No control: the same captions and seeds without the adapter."
        " Ceiling: the true pictures through the autoencoder."
    )
    table = _table(("", *(named[name] for name in names)), rows)
    return f"## Does it work\n\n{' '.join(filter(None, (held, note)))}\n\n{table}"


def _training(run: RunRecord) -> str:
    rows = [(label, _plain(run.config[key])) for key, label in _SETTINGS.items() if key in run.config]
    data = run.config.get("data")
    if isinstance(data, Mapping) and data.get("source"):
        rows.insert(0, ("data", _public(str(data["source"]))))
    return "## Training\n\n" + _table(("", ""), rows) if rows else ""


def _origin(run: RunRecord) -> str:
    rows = [(key, str(value)) for key, value in run.facts.items()]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions().items())))
    return "## Where it comes from\n\n" + _table(("", ""), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    """Text that neither ends a table's cell nor becomes markup."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _public(name: str) -> str:
    """A model's or data set's name for strangers: of a path on this machine the last part alone."""
    if name in BUNDLED or name in ALIASES or (is_repo_id(name) and not Path(name).exists()):
        return name
    return Path(name).name


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _caption(run: RunRecord) -> str:
    caption = run.facts.get("caption")
    return caption if isinstance(caption, str) and caption else "a picture of what the map shows"


def _copy_grid(run: RunRecord, folder: Path) -> bool:
    """Put the newest sample grid beside the card; whether there is one."""
    if run.samples:
        try:
            shutil.copyfile(run.samples[-1][1], folder / GRID)
        except OSError as error:
            raise ValueError(f"cannot write {folder / GRID}: {error.strerror or error}") from error
    return (folder / GRID).is_file()

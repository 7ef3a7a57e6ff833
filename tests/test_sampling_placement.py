"""Every sort of generation on a GPU that is made of the processor: no devices mixed, nothing read back before
the last step, the same picture.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from pretended_gpu import pretended_gpu
from recorders import Capturing
from safetensors.torch import save_file
from sampling_peers import SIZE, cond, controlnet_of
from test_ip_adapter import KINDS as IP_ADAPTERS
from test_ip_adapter import adapter, flat, photo, write_encoder
from test_kinds import MAKE
from test_starting import mask, picture

from controlkit import execution
from controlkit.base import Base, load_base
from controlkit.class_labels import Told
from controlkit.clip_guidance import ClipGuidance, load_clip
from controlkit.control import Control
from controlkit.execution import Execution
from controlkit.freeu import FreeU
from controlkit.ip_adapter import picture_prompt
from controlkit.sampling import Memory, Savings, Start, Tiles, generate
from controlkit.schedulers import SCHEDULERS

# diffusers' Euler schedulers hand torch tensors to numpy in a way that numpy 2 will drop (diffusers 0.42.1).
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:diffusers")

Given = dict[str, Any]
STEPS = 4


@dataclass(frozen=True)
class Trial:
    """A generation: its base, the options of its controls by the kind of each, and its own options."""

    base: str = "sd1"
    controls: tuple[tuple[str, Given], ...] = (("controlnet", {}),)
    options: Given | None = None


def controlled(base: str = "sd1", kind: str = "controlnet", **options: Any) -> Trial:
    return Trial(base, ((kind, options),))


def made(base: str = "sd1", **options: Any) -> Trial:
    return Trial(base, options=options)


REGION = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
TRIALS: dict[str, Trial] = {
    **{family: made(family) for family in ("sd1", "sd2", "sdxl")},
    **{f"scheduler {name}": made(scheduler=name) for name in SCHEDULERS},
    **{f"from a picture, {name}": made(scheduler=name, start=Start(picture(), 0.6)) for name in SCHEDULERS},
    **{f"mode {mode}": controlled(mode=mode) for mode in ("prompt", "control", "unbalanced")},
    **{kind: controlled("sdxl" if kind == "lllite" else "sd1", kind) for kind in MAKE if "union" not in kind},
    **{
        f"{kind} in a region": controlled("sdxl" if kind == "lllite" else "sd1", kind, mask=REGION)
        for kind in ("controlnet", "controlnet-xs", "lllite")
    },
    "two maps of one union": Trial(
        controls=(("controlnet-union", {"kind": "canny"}), ("controlnet-union", {"kind": "depth"}))
    ),
    "two controls": Trial(controls=(("controlnet", {}), ("t2i-adapter", {"mode": "control"}))),
    "window": controlled(start=0.3, end=0.8),
    "scales": controlled(scale=[1.0, 0.5, 0.2]),
    "hole": made(start=Start(picture(), mask=mask())),
    "half a hole": made("sdxl", start=Start(picture(), 0.6, mask())),
    "base for holes": made("nine", start=Start(picture(), mask=mask())),
    "told the guidance": made("lcm", scheduler="lcm"),
    "told a picture": made("unclip", told=Told(picture=picture())),
    "told a class": made("classes", told=Told(class_label=2)),
    "control kept": made(savings=Savings(control_every=2)),
    "features kept": made(savings=Savings(features_every=2)),
    "guidance ends": made(savings=Savings(guidance_until=0.5)),
    "tokens merged": made(savings=Savings(merge_tokens=0.5)),
    "tiles": made(tiles=Tiles(64), width=96, height=96),
    "little memory": made(memory=Memory(1, sliced_vae=True, one_branch=True)),
    "noise": made(temperature=0.5, guidance_rescale=0.7, negative_prompt="blurred"),
    "weighted words": made("sdxl", prompt_syntax="a1111", clip_skip=2),
    "clip": made(clip_guidance=50.0),
    "perturbed attention": made(pag=3.0),
    "weighed features": made("sdxl", freeu=FreeU(1.3, 1.4, 0.9, 0.2)),
    **{f"ip-adapter {kind}": made(picture_prompts=[kind]) for kind in IP_ADAPTERS},
}


@pytest.fixture(scope="module")
def bases(load: Callable[[str], Base], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Tiny bases by family, and those that are told more."""
    folder = tmp_path_factory.mktemp("bases")
    build: dict[str, Callable[[], Base]] = {
        "nine": lambda: tiny_models.nine_channels(load("sd1")),
        "lcm": lambda: tiny_models.told_guidance(load("sd1")),
        "unclip": lambda: load_base(str(tiny_models.build_unclip(folder / "unclip"))),
        "classes": lambda: load_base(
            str(tiny_models.build(folder / "classes", "sd1", sample_size=8, num_class_embeds=5))
        ),
    }
    return lambda name: build[name]() if name in build else load(name)


def moved(network: Any) -> Any:
    return copy.deepcopy(network).to("cuda")


def on_gpu(base: Base) -> Base:
    """As `load_base` would have put it there."""
    side = base.picture_encoder
    return replace(
        base,
        unet=moved(base.unet),
        vae=moved(base.vae),
        text_encoders=[moved(encoder) for encoder in base.text_encoders],
        picture_encoder=side and replace(side, image_encoder=moved(side.image_encoder)),
        device=torch.device("cuda"),
    )


def controls_of(trial: Trial, base: Base, plain: Base, *, gpu: bool) -> list[Control]:
    """The trial's controls, one network for each kind. plain: the base that control networks copy."""
    networks: dict[str, Any] = {}
    controls = []
    for seed, (kind, options) in enumerate(trial.controls):
        if kind not in networks:
            network = MAKE[kind](plain) if kind in MAKE else controlnet_of(plain)
            networks[kind] = moved(network) if gpu else network
        size = (trial.options or {}).get("width", SIZE)
        map_ = torch.nn.functional.interpolate(cond(seed), size=(size, size))
        controls.append(Control(networks[kind], map_, **options))
    return controls


def prepared(options: Given, base: Base, folder: Path, *, gpu: bool) -> Given:
    """The options with the networks that they need."""
    if "clip_guidance" in options:
        clip = load_clip(str(tiny_models.build_clip(folder / "clip")))
        clip = replace(clip, model=moved(clip.model)) if gpu else clip
        options = {**options, "clip_guidance": ClipGuidance(clip, options["clip_guidance"])}
    if "picture_prompts" in options:
        (kind,) = options["picture_prompts"]
        write_encoder(folder / "image_encoder")
        save_file(flat(adapter(base, kind)), folder / "ip.safetensors")
        prompt = picture_prompt(base, str(folder / "ip.safetensors"), [photo(1)], scale=0.7)
        options = {**options, "picture_prompts": [prompt]}
    return options


@dataclass(frozen=True)
class Place:
    """What trials are made of: bases by name, plain ones by family, and a folder."""

    bases: Callable[[str], Base]
    load: Callable[[str], Base]
    folder: Path

    def pictures(self, trial: Trial, *, gpu: bool, **more: Any) -> list[np.ndarray]:
        """The trial's pictures, made here or there."""
        base = self.bases(trial.base)
        plain, base = self.load(base.family), on_gpu(base) if gpu else base
        options = {"steps": STEPS, "seeds": (1,), "width": SIZE, "height": SIZE}
        if "memory" not in (trial.options or {}):
            options["batch_size"] = 1
        options |= prepared(trial.options or {}, base, self.folder, gpu=gpu) | more
        controls = controls_of(trial, base, plain, gpu=gpu)
        return generate(base, "a (red:1.2) cube", controls=controls, **options)


@pytest.fixture
def place(bases: Callable[[str], Base], load: Callable[[str], Base], tmp_path: Path) -> Place:
    return Place(bases, load, tmp_path)


def trials(*often: str, without: Sequence[str] = ()) -> list[Any]:
    """Their names; all but a few are slow tests."""
    names = [name for name in TRIALS if name not in without]
    return [pytest.param(name, marks=() if name in often else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", trials("from a picture, dpm++", "lllite in a region"))
def test_a_generation_keeps_to_its_device(name: str, place: Place) -> None:
    expected = place.pictures(TRIALS[name], gpu=False)
    reads: list[int] = []
    with pretended_gpu() as count:

        def look(done: int, _: int, latents: torch.Tensor) -> None:
            assert latents.device.type == "cuda"
            reads.append(count["read"])

        found = place.pictures(TRIALS[name], gpu=True, callback=look)
    assert reads[-2] == reads[0], "the host reads in a step that is not the last"
    assert reads[-1] == reads[0] + 1  # to see that all steps were finite
    assert np.abs(found[0].astype(int) - expected[0]).max() <= 1


# Recorded are steps of which there are several alike; see `Execution`.
UNRECORDED = ("scales", "control kept", "features kept", "tiles")


@pytest.mark.parametrize("name", trials(without=UNRECORDED))
def test_what_a_graph_records_neither_reads_nor_sends(
    name: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pretended_gpu() as count:
        expected = place.pictures(TRIALS[name], gpu=True)
        recorder = Capturing(count)
        monkeypatch.setattr(execution, "_recorder_for", lambda device: recorder)
        found = place.pictures(TRIALS[name], gpu=True, execution=Execution(cuda_graph=True))
    assert recorder.recorded
    assert np.array_equal(found, expected)

"""What a training step costs, counted where no noise can move it, beside the step of diffusers' script."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import flops
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from fakes import faked
from tiny_models import SD15_UNET
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parent / "benchmarks"))

from train_models import read, write, write_data
from train_ours import Ours, recipe_for
from train_script import Pairs, Script, Setting, collate, load

from controlkit.controlnet import from_base, lock
from controlkit.figures import render
from controlkit.preprocessors import get
from controlkit.training.adapter import Pair
from controlkit.training.data.encoded import Outline
from controlkit.training.loop import forward_backward

BATCH = 2
SETTING = Setting(BATCH)
READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """The bundled base, a ControlNet and eight pairs, as the script and as ControlKit train on them."""
    folder = write("tiny", tmp_path_factory.mktemp("bench"))
    pictures = [render(seed, size=128, split="train").picture for seed in range(8)]
    maps = [get("canny")(picture).image for picture in pictures]
    data = write_data(pictures, maps, folder / "data")
    models = read("tiny", folder)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    ours = Ours("tiny", folder, data, SETTING, out=folder / "run")
    script = Script(models, load(models, data, SETTING), SETTING)
    pairs = Pairs(data, models)
    script.step()
    ours.step()  # what happens once has happened
    yield script, ours, pairs
    ours.task.close()
    patch.undo()


class Operators(TorchDispatchMode):
    """Counts what is asked of the device, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        if not func.is_view and not (name in READS and _reading_a_file()):
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def _reading_a_file() -> bool:
    """Whether the store is reading: safetensors looks at the sizes that its files begin with."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.endswith("stores.py"):
            return True
        frame = frame.f_back
    return False


class Saved:
    """Bytes that a forward pass keeps for the backward pass, weights aside; also by part of the U-Net."""

    def __init__(self, networks, unet) -> None:
        self.weights = {p.untyped_storage().data_ptr() for n in networks for p in n.parameters()}
        self.storages: dict[int, int] = {}
        self.by_part: Counter[str] = Counter()
        self.inside = ""
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.handles = []
        for name in ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks"):
            part = getattr(unet, name)
            for module in part if isinstance(part, nn.ModuleList) else [part]:
                self.handles += [
                    module.register_forward_pre_hook(lambda *_, name=name: setattr(self, "inside", name)),
                    module.register_forward_hook(lambda *_: setattr(self, "inside", "")),
                ]

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.by_part[self.inside] += storage.nbytes()
        return tensor

    def __enter__(self):
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        for handle in self.handles:
            handle.remove()
        self.hooks.__exit__(*args)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def test_the_loss_is_the_scripts_and_the_map_matters_to_it(bench):
    script, ours, pairs = bench
    script.controlnet.load_state_dict(ours.task.controlnet.state_dict())
    given = ours.next_choices(pairs)
    with torch.no_grad():
        mine = float(ours.task.losses(ours.run.whole, ours.next_part()).each.mean())
    theirs = float(script.forward_backward(given).detach())
    given.batch["conditioning"][:] = given.batch["conditioning"].flip(3)
    mirrored = float(script.forward_backward(given).detach())
    script.optimizer.zero_grad()
    assert mine == pytest.approx(theirs, rel=1e-5)
    assert abs(mirrored / theirs - 1) > 1e-3  # another map would be noticed


def test_both_are_given_the_same_where_data_lies_on_the_device(bench, monkeypatch):
    """There a step is told of its pairs in outline, as on a GPU."""
    _, ours, pairs = bench
    expected, part = ours.next_choices(pairs), ours.next_part()
    outlines = [Outline(s.example, s.visit, s.view, s.size) for s in part.samples]
    monkeypatch.setattr(ours, "next_part", lambda: replace(part, samples=outlines))
    found = ours.next_choices(pairs)
    for name in ("posterior", "noise", "timesteps"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_no_more_operators_than_the_script_has(bench):
    script, ours, pairs = bench
    batch = collate(pairs.__getitems__(range(BATCH)))
    script.batches = iter([batch])  # what its loader does is not counted
    with Operators() as theirs:
        script.step()
    with Operators() as mine:
        ours.step()
    assert mine.count.total() < theirs.count.total()
    assert sum(mine.count.values()) < 0.95 * sum(theirs.count.values())


def test_nothing_is_read_from_the_device_between_forward_and_backward(bench):
    script, ours, pairs = bench
    with Operators() as mine:
        forward_backward(ours.run)
    ours.run.optimizer.zero_grad(set_to_none=True)
    assert [name for name in READS if mine.count[name]] == []
    script.batches = iter([collate(pairs.__getitems__(range(BATCH)))])
    with Operators() as theirs:
        script.step()
    assert theirs.count[READS[0]] >= 1  # the counter sees the loss that the script reads


def test_a_gpus_whole_step_reads_nothing_until_losses_are_read(bench):
    _, ours, _ = bench
    ours.run.reads_late = True
    with Operators() as mine:
        ours.step()
    reads = {name: mine.count[name] for name in READS if mine.count[name]}
    with Operators() as later:
        ours.run.read_losses()
    ours.run.reads_late = False
    assert reads == {}
    assert later.count[READS[0]] >= 1  # the norm


def test_no_more_is_saved_for_the_backward_pass_than_by_the_script(bench):
    script, ours, pairs = bench
    script.batches = iter([collate(pairs.__getitems__(range(BATCH)))])
    unets = script.unet, ours.task.base.unet
    with Saved([script.controlnet, script.unet], unets[0]) as theirs:
        script.forward_backward()
    script.optimizer.zero_grad()
    with Saved([ours.task.controlnet, unets[1]], unets[1]) as mine:
        forward_backward(ours.run)
    ours.run.optimizer.zero_grad(set_to_none=True)
    assert 0 < mine.total <= 1.005 * theirs.total  # the error of each pair is kept for its weight
    assert set(mine.by_part) & {"conv_in", "time_embedding", "down_blocks", "mid_block"} == set()
    assert mine.by_part["up_blocks"] > 0


def test_flops_of_a_step_of_stable_diffusion(tmp_path):
    with torch.device("meta"):
        unet = lock(UNet2DConditionModel(**SD15_UNET))
        controlnet = from_base(unet)
    recipe = recipe_for("tiny", tmp_path, tmp_path, Setting(1))
    with FakeTensorMode(), flops.counter() as counter:
        pair = Pair(faked(controlnet), faked(unet), recipe)
        model_pred = pair(
            torch.randn(1, 4, 64, 64),
            torch.tensor([500]),
            torch.randn(1, 77, 768),
            torch.rand(1, 3, 512, 512),
        )
        model_pred.square().mean().backward()
    gflop = counter.get_total_flops() / 1e9
    assert 2000 < gflop <= 2335
    assert all(p.grad is not None for p in controlnet.parameters())
    assert all(p.grad is None for p in unet.parameters())


def test_bytes_of_a_cached_sample(bench):
    """At 512 pixels: latents' mean and spread and a map of edges in 0.11 MB, a caption in 0.118 MB."""
    _, ours, _ = bench
    sample = ours.next_part().samples[0]
    edges = (np.random.default_rng(0).random((512, 512, 1)) < 0.1) * np.uint8(255)
    from controlkit.training.data.packing import pack

    map_bytes = pack(np.repeat(edges, 3, axis=2)).numel()
    latent_bytes = sample.moments.nbytes * (512 // 128) ** 2
    assert latent_bytes + map_bytes <= 0.11e6
    assert latent_bytes == 2 * 4 * 64 * 64 * 2
    text = ours.task.encoded.text([sample.example.caption]).encoder_hidden_states
    assert text.nbytes * 768 // text.shape[-1] <= 0.1183e6


def test_help_and_recipes_import_no_torch():
    code = """
import sys
import controlkit.training.config
from controlkit import cli
sys.argv = ["controlkit", "train", "--help"]
try:
    cli.main()
except SystemExit:
    pass
slow = {"torch", "diffusers", "transformers", "accelerate", "scipy", "pandas", "datasets", "cv2"}
print(sorted(slow & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"

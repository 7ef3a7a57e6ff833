"""The loss where pictures are opaque: read, fitted, kept, and weighed as its formula says."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import recipe, write_pictures
from PIL import Image
from safetensors.torch import load_file
from tiny_models import build

from controlkit.images import load_alpha, load_picture
from controlkit.training import train_recipe
from controlkit.training.config import load_recipe
from controlkit.training.config_adapter import DataRecipe
from controlkit.training.data.check import check_examples
from controlkit.training.data.examples import ArrayPiece, Example
from controlkit.training.data.sources import open_examples
from controlkit.training.data.visits import Visits
from controlkit.training.noising import Noisy, weighted_loss

ALPHAS = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alpha")
    write_pictures(folder / "whole")
    shutil.copytree(folder / "whole", folder / "pictures")
    for path in (folder / "pictures").glob("*.png"):
        picture = load_picture(path)
        alpha = np.zeros(picture.shape[:2], np.uint8)
        alpha[8:-24, 16:-8] = 255
        Image.fromarray(np.dstack([picture, alpha])).save(path)
    build(folder / "base", "sd1", layers=1)
    patch = pytest.MonkeyPatch()
    patch.setenv("CONTROLKIT_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


def run(place: Path, name: str, *, pictures: str = "pictures", **changes):
    """Losses, weights, and what was said; without augmentation of maps, which the device could not keep."""
    fixed = {"data_map_blur": 0.0, "low": 80, "high": 200}
    settings = {"steps": 3, "warmup": 0, "sample_every": 0, "monitor_every": 0, "checkpoint_every": 99}
    path = recipe(place / name, place / pictures, **{**settings, "log_every": 1, **fixed, **changes})
    said = []
    train_recipe(str(path), progress=lambda step: said.append(step.message) if step.message else None)
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (place / name / "checkpoints").glob("*/weights.safetensors")
    return [row["loss"] for row in lines if "loss" in row], load_file(weights), said


def content(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_alpha_of_every_sort_of_picture():
    alpha = np.zeros((6, 4), np.uint8)
    alpha[1, 2], alpha[4, 0] = 255, 77
    grey = np.full((6, 4), 90, np.uint8)
    rgba = np.dstack([grey, grey, grey, alpha])
    for image in (Image.fromarray(rgba), Image.fromarray(np.dstack([grey, alpha]), "LA")):
        assert np.array_equal(load_alpha(content(image)), alpha)
    assert np.array_equal(load_alpha(rgba), alpha)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = load_alpha(content(Image.fromarray(rgba), "WEBP", lossless=True, exif=exif))
    assert np.array_equal(turned, np.rot90(alpha, -1))
    palette = Image.fromarray((grey > 255).astype(np.uint8) + (alpha > 0), "P")
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert np.array_equal(load_alpha(content(palette, transparency=0)), 255 * (alpha > 0))
    for whole in (Image.fromarray(rgba[..., :3]), Image.fromarray(grey), Image.new("RGBA", (4, 6), "red")):
        assert load_alpha(content(whole)) is None
    assert load_alpha(rgba[..., :3]) is None


@pytest.mark.filterwarnings("error")
def test_it_is_cut_and_mirrored_as_its_picture_is():
    picture = np.zeros((64, 128, 4), np.uint8)
    picture[16:40, 40:64, 3] = 255
    examples = [Example("pair", ArrayPiece(picture), "")]
    data = DataRecipe(alpha_mask=True, maps="made", flip=0.5, crop="centre")
    visits = Visits(examples, [(128, 64)], data=data, kind="canny", resolution=64, seed=1)
    plain, mirrored = visits.views(0)
    assert (plain.left, mirrored.mirrored) == (32, True)
    wanted = np.zeros((8, 8), np.uint8)
    wanted[2:5, 1:4] = 255
    assert np.array_equal(visits.opaque(0, plain, 8), wanted)
    assert np.array_equal(visits.opaque(0, mirrored, 8), wanted[:, ::-1])
    finer = visits.opaque(0, plain, 4)
    assert np.array_equal(finer.reshape(8, 2, 8, 2).mean((1, 3)), wanted)


def test_the_loss_counts_what_is_opaque_over_all_places():
    """kohya's masked loss: the squares times the mask, and the mean over everything."""
    random = torch.Generator().manual_seed(0)
    noisy_latents, latents, noise, pred = torch.randn(4, 2, 4, 8, 8, generator=random)
    noisy = Noisy(noisy_latents, torch.tensor([5, 900]), latents, noise)
    opaque = torch.randint(0, 256, (2, 8, 8), generator=random, dtype=torch.uint8)
    opaque[0, :4] = 0
    settings = load_recipe("tiny-canny", [])
    found = weighted_loss(pred, noisy, settings, "epsilon", ALPHAS, opaque=opaque)
    for k in range(2):
        wanted = sum(
            (float(opaque[k, y, x]) / 255) * float((pred[k, c, y, x] - noise[k, c, y, x]) ** 2)
            for c in range(4)
            for y in range(8)
            for x in range(8)
        )
        assert float(found[k]) == pytest.approx(wanted / 256, rel=1e-5)
    whole = weighted_loss(pred, noisy, settings, "epsilon", ALPHAS)
    white = torch.full_like(opaque, 255)
    assert torch.equal(weighted_loss(pred, noisy, settings, "epsilon", ALPHAS, opaque=white), whole)
    pred[0, :, :4] += 100
    hidden = weighted_loss(pred, noisy, settings, "epsilon", ALPHAS, opaque=opaque)
    assert torch.equal(hidden, found)


def test_a_run_masks_alike_however_its_data_are_kept(place):
    losses, weights, said = run(place, "kept", data_alpha_mask=True, data_resident=False)
    assert not any("alpha_mask" in line for line in said)
    for name, how in (("gathered", {"data_resident": True}), ("made", {"data_cache": False})):
        again, moved, _ = run(place, name, data_alpha_mask=True, **how)
        assert again == losses
        assert all(torch.equal(moved[key], weights[key]) for key in weights)
    unmasked, other, _ = run(place, "unmasked")
    assert all(masked < loss for masked, loss in zip(losses, unmasked, strict=True))
    assert any(not torch.equal(other[key], weights[key]) for key in weights)


def test_where_nothing_is_transparent_nothing_changes_and_that_is_said(place):
    losses, weights, said = run(place, "whole-masked", pictures="whole", data_alpha_mask=True)
    (line,) = [line for line in said if "alpha_mask" in line]
    assert line.startswith(
        "data.alpha_mask has no effect so far: of 11 pictures that were looked at, none is"
    )
    again, moved, _ = run(place, "whole-plain", pictures="whole")
    assert again == losses
    assert all(torch.equal(moved[key], weights[key]) for key in weights)


def test_what_is_wholly_transparent_is_found_by_the_check(place, tmp_path):
    shutil.copytree(place / "pictures", tmp_path / "set")
    for mask in (False, True, True):  # the second time from memory
        if mask:
            Image.new("RGBA", (96, 96)).save(tmp_path / "set" / "03.png")
        data = DataRecipe(source=str(tmp_path / "set"), maps="made", alpha_mask=mask)
        examples = open_examples(data, kind="canny", report=lambda _: None)
        check = check_examples(examples, data=data, kind="canny")
        assert len(check.errors) == mask
        assert (
            "03.png is wholly transparent, and with data.alpha_mask nothing of it" in check.problem()
        ) == mask


def test_the_bundled_world_has_nothing_transparent():
    with pytest.raises(
        ValueError, match=r"data.alpha_mask goes by transparency, which the bundled world has"
    ):
        load_recipe("tiny-canny", ["data.alpha_mask=true"])

"""FID, KID, CLIP score and LPIPS in an evaluation: real networks at their real size, with random weights."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from torch.nn.functional import cosine_similarity

from controlkit import images
from controlkit.clip_guidance import load_clip
from controlkit.figures import render
from controlkit.training.evaluation import inception
from controlkit.training.evaluation.picture_scores import ALEXNET, Shot, picture_scores
from controlkit.training.evaluation.weights_at_hand import NotAtHand, cached_file, without_home


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """PyTorch's cache with the weights of Inception and AlexNet, random ones."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
    from torchvision.models import alexnet

    class Unfilled(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_options):
            pass

    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save({}, folder / "nothing.pth")
    network = Unfilled("unfilled", ["2048"], feature_extractor_weights_path=str(folder / "nothing.pth"))
    for name, weight in network.state_dict().items():
        if weight.ndim == 4:  # pictures have to differ at the end: the usual start shrinks what goes through
            torch.nn.init.kaiming_normal_(weight, nonlinearity="relu")
            assert name.endswith("conv.weight")
    torch.save(network.state_dict(), folder / Path(URL_INCEPTION_V3).name)
    torch.save(alexnet(weights=None).state_dict(), folder / Path(ALEXNET).name)
    return folder.parent.parent


@pytest.fixture
def home(hub, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(hub))
    return hub


@pytest.fixture
def shots(tmp_path) -> dict[str, list[Shot]]:
    """Arms: 52 true pictures; the same with a little noise, and other ones, two seeds of each."""
    random, found = np.random.default_rng(0), {"true": [], "noisy": [], "other": []}
    for number in range(52):
        scene = render(number % 4, size=64)
        noisy = np.clip(scene.picture + random.normal(0, 1, scene.picture.shape), 0, 255).astype(np.uint8)
        for arm, seed, picture in (
            ("true", 0, scene.picture),
            ("noisy", 0, noisy),
            ("noisy", 1, noisy),
            ("other", 0, np.ascontiguousarray(scene.picture[::-1])),
            ("other", 1, 255 - scene.picture),
        ):
            path = tmp_path / f"{arm}-{number}-{seed}.png"
            images.write_png(path, picture)
            found[arm].append(Shot(path, number, scene.caption))
    return found


def test_the_network_is_torch_fidelitys(home):
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    file = cached_file(URL_INCEPTION_V3, what="Inception")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(file)).eval()
    picture = render(5, size=128).picture
    resized = inception.clean_resize(picture).round().clip(0, 255).astype(np.uint8)  # theirs takes 8 bits
    with torch.inference_mode():
        (wanted,) = theirs(torch.from_numpy(resized).permute(2, 0, 1)[None])
    ours = inception.Inception(file)([resized])
    assert ours.shape == (1, 2048)
    np.testing.assert_allclose(ours, wanted.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("count", "few"), [(1, "1 is too few"), (2, "2 are too few")])
def test_few_pictures_are_counted_in_words_that_fit(tmp_path, count, few):
    shots = {arm: [Shot(tmp_path / f"{n}.png", n, "") for n in range(count)] for arm in ("true", "other")}
    found = picture_scores(shots, true="true", folder=tmp_path, features="inception", clip="none")
    assert f"they compare sets of pictures, and {few}" in found.skipped["FID and KID"]


@pytest.mark.slow
def test_everything_is_measured_where_weights_are_at_hand(home, shots, tmp_path):
    clip = tiny_models.build_clip(tmp_path / "clip")
    asked = {"true": "true", "folder": tmp_path / "features", "features": "inception", "clip": str(clip)}
    found = picture_scores(shots, **asked)
    assert list(found.skipped) == ["FID"]
    assert "52 pictures are too few" in found.skipped["FID"]
    kid = found.of_set["KID"]
    assert set(kid) == {"noisy", "other"}
    assert abs(kid["noisy"][0]) < kid["other"][0]
    diversity = found.of_pair["LPIPS between seeds"]
    assert set(diversity) == {"noisy", "other"}
    assert diversity["noisy"] == pytest.approx(dict.fromkeys(range(52), 0.0), abs=1e-6)  # twice the same
    assert min(diversity["other"].values()) > 0
    judge = load_clip(str(clip))
    shot = shots["other"][0]
    with torch.no_grad():
        seen = judge.encode_pixels(images.picture_to_tensor([images.load_picture(shot.path)]))
        cosine = float(cosine_similarity(seen, judge.encode_prompt(shot.caption)))
    again = picture_scores({"other": shots["other"][:1], "true": shots["true"][:1]}, **asked)
    assert again.of_pair["CLIP score"]["other"][0] == pytest.approx(max(100 * cosine, 0), abs=1e-3)
    assert "52" not in again.skipped["FID and KID"]
    assert "1 is too few" in again.skipped["FID and KID"]


@pytest.mark.slow
def test_features_are_kept_and_made_anew_when_a_picture_changes(home, shots, tmp_path, monkeypatch):
    asked = {"true": "true", "folder": tmp_path / "features", "features": "inception", "clip": "none"}
    some = {arm: found[:52] for arm, found in shots.items() if arm != "noisy"}
    first = picture_scores(some, **asked)
    looked = []
    network = inception.Inception.__call__
    monkeypatch.setattr(
        inception.Inception, "__call__", lambda self, p: looked.append(len(p)) or network(self, p)
    )
    assert str(picture_scores(some, **asked).of_set) == str(first.of_set)  # nan is not nan
    assert not looked
    shutil.copy(some["true"][3].path, some["other"][0].path)
    assert str(picture_scores(some, **asked).of_set) != str(first.of_set)
    assert sum(looked) == 52


def test_features_are_of_the_network_that_is_asked_for(shots, tmp_path):
    """Another CLIP in the same folder judges anew."""
    few = {arm: found[:3] for arm, found in shots.items()}
    clips = [str(tiny_models.build_clip(tmp_path / f"clip-{seed}", seed=seed)) for seed in (0, 1)]
    asked = {"true": "true", "features": "none"}
    alone = [
        picture_scores(few, **asked, clip=clip, folder=tmp_path / f"features-{k}").of_pair["CLIP score"]
        for k, clip in enumerate(clips)
    ]
    assert alone[0] != alone[1]
    for clip, wanted in zip([*clips, *clips], alone * 2, strict=True):
        found = picture_scores(few, **asked, clip=clip, folder=tmp_path / "features")
        assert found.of_pair["CLIP score"] == wanted


def test_pairs_without_a_caption_have_no_clip_score(shots, tmp_path):
    clip = str(tiny_models.build_clip(tmp_path / "clip"))
    asked = {"true": "true", "features": "none", "clip": clip, "folder": tmp_path / "features"}
    some = {arm: [replace(found[0], caption=" "), *found[1:3]] for arm, found in shots.items()}
    scores = picture_scores(some, **asked).of_pair["CLIP score"]
    assert set(scores["true"]) == {1, 2}
    none = {arm: [replace(shot, caption="") for shot in found[:3]] for arm, found in shots.items()}
    assert picture_scores(none, **asked).skipped["CLIP score"] == "no pair has a caption"


def test_weights_that_cannot_be_had_are_named(tmp_path, monkeypatch, shots):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(NotAtHand, match=r"wants alexnet-owt-7be5be79\.pth in .*, and HF_HUB_OFFLINE forbids"):
        cached_file(ALEXNET, what="LPIPS")
    asked = {"true": "true", "folder": tmp_path / "features", "features": "inception", "clip": "clip-b"}
    found = picture_scores(shots, **asked)
    assert set(found.skipped) == {"CLIP score", "LPIPS between seeds", "FID and KID"}
    assert not found.of_set
    assert not found.of_pair
    assert not any("\n" in reason for reason in found.skipped.values())
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(NotAtHand, match="could not be fetched"):
        cached_file("http://127.0.0.1:9/alexnet-owt-7be5be79.pth", what="LPIPS")
    assert not list((tmp_path / "empty").rglob("*.pth"))


@pytest.mark.parametrize(
    ("home", "shown"),
    [("/home/me", "in ~/.cache/hub, not /home/men/x"), ("/", "in /home/me/.cache/hub, not /home/men/x")],
)
def test_paths_are_told_without_the_home(monkeypatch, home, shown):
    monkeypatch.setenv("HOME", home)
    assert without_home("in /home/me/.cache/hub, not /home/men/x") == shown


def test_a_file_that_holds_something_else(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the weights of Inception v3"):
        inception.Inception(tmp_path / "other.pth")
    (tmp_path / "page.pth").write_bytes(b"<html>")
    with pytest.raises(ValueError, match="does not hold the weights of Inception v3"):
        inception.Inception(tmp_path / "page.pth")
